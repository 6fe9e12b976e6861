# SPDX-License-Identifier: Apache-2.0
"""torchtune, read only: a folder with adapter_model.pt and a config; torchtune's names, rows of q and k as pairs.

The PEFT files that torchtune 0.6 writes next to it are wrong. It leaves DoRA's magnitude in the other order, and
permutes Qwen's rows though they are no pairs: graft reads adapter_model.pt.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

from graft import CheckpointError, LossError
from graft.config.reading import Json, read_object
from graft.files.errors import BaseNeededError
from graft.files.formats import Base, one_file
from graft.files.formats.peft import find_rank_and_alpha
from graft.files.holding import get_factor_pair, make_shape_error
from graft.files.names import count_heads
from graft.files.neutral import AdapterFile, LowRank
from graft.files.pickles import convert_tensors, mentions_name, read_torch
from graft.files.tensors import Tensor, reorder_rows

NAME = "torchtune"
FILE, CONFIG = "adapter_model.pt", "adapter_config.json"
FOLDER = (FILE,), (CONFIG,)
NAMES = {  # torchtune's → transformers', for llama's family and Qwen2; Phi's fused layers have no such names
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
LEAVES = {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "magnitude"}
KEY = re.compile(rf"(?P<path>.+)\.(?P<leaf>{'|'.join(map(re.escape, LEAVES))})")
OWN = re.compile(r"(?:decoder\.)?layers\.(?P<number>\d+)\.(?P<rest>.+)")
PAIRS = {"llama", "mistral", "gemma", "gemma2"}  # model types with rows of q and k as pairs in torchtune
HALVES = {"qwen2"}


def find_torchtune_file(path: str) -> str | None:
    """Return the path of adapter_model.pt of a folder, or the path itself of a file called adapter_model.pt or
    adapter_<number>.pt; None for others, also for a folder without adapter_model.pt.
    """
    if os.path.isdir(path) and os.path.exists(os.path.join(path, FILE)):
        return os.path.join(path, FILE)
    file = one_file(path, ".pt") if os.path.isfile(path) else None
    return file if file and re.fullmatch(r"adapter_(model|\d+)\.pt", os.path.basename(file)) else None


def recognises(path: str) -> bool:
    """Return True if there is such a file that mentions ".lora_a.weight". It is not loaded."""
    file = find_torchtune_file(path)
    return file is not None and mentions_name(file, b".lora_a.weight")


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a folder, or the file in it with the config next to it.

    The config is kept without `peft_type`, and its base_model_name_or_path becomes `base`. Names that transformers does
    not have go to `unknown_keys`.

    Raises:
        CheckpointError: the config is missing, a file is damaged, or factors are missing or not of the config's rank.
        BaseNeededError: q or k is adapted, and only the base says how many heads it has.
        LossError: q or k is adapted in a model of another family.
    """
    file = find_torchtune_file(path) or path
    config_path = os.path.join(os.path.dirname(file), CONFIG)
    if not os.path.exists(config_path):
        raise CheckpointError(f"{config_path} is not there, and has rank and alpha. Copy it next to the weights.")
    config = read_object(config_path)
    out = AdapterFile(NAME, path, config={k: v for k, v in config.items() if k != "peft_type"})
    out.base = config.get("base_model_name_or_path")
    modules = out.group_by_module(convert_tensors(read_torch(file), file), split_key)
    for name, tensors in modules.items():
        out.modules[name] = read_torchtune_pair(out, name, tensors, config, base)
    return out


def split_key(key: str) -> tuple[str, str] | None:
    """Return transformers' path of the module and "A", "B" or "magnitude" for a key of torchtune's.

    None for a key of another form, or of a module that is neither the output nor in NAMES.

    The path is "lm_head" for the output, else "model.layers.N." and the name in the block.
    """
    if (of_key := KEY.fullmatch(key)) is None:
        return None
    leaf, match = LEAVES[of_key["leaf"]], OWN.fullmatch(of_key["path"])
    if of_key["path"] in ("output", "decoder.output"):
        return "lm_head", leaf
    known = match is not None and match["rest"] in NAMES
    return (f"model.layers.{match['number']}.{NAMES[match['rest']]}", leaf) if known else None  # type: ignore[index]


def read_torchtune_pair(
    out: AdapterFile, name: str, tensors: dict[str, Tensor], config: Json, base: Base | None
) -> LowRank:
    """Return a module's factors with scale alpha / r and magnitude.

    Rows of B and of the magnitude that are in pairs by heads are put into transformers' order of halves.

    Raises:
        CheckpointError: a factor is missing, or the shapes are not of the config's rank.
        BaseNeededError, LossError: see `heads_in`.
    """
    A, B = get_factor_pair(tensors, "AB", out.path, name)
    r, alpha = find_rank_and_alpha(config, name, "lora_alpha")
    if len(A.shape) != 2 or len(B.shape) != 2 or (A.shape[0], B.shape[1]) != (r, r):
        raise make_shape_error(out.path, name, A, B, f"of rank {r}")
    module = LowRank(A, B, alpha / r, "linear", tensors.get("magnitude"))
    heads = heads_in(name, base)
    if heads is None:
        return module
    magnitude = None if module.magnitude is None else reorder_rows(module.magnitude, heads, to_halves=True)
    return replace(module, B=reorder_rows(B, heads, to_halves=True), magnitude=magnitude)


def heads_in(name: str, base: Base | None) -> int | None:
    """Return the number of heads if the rows of module `name` are in pairs by heads: q_proj and k_proj of model types
    llama, mistral, gemma and gemma2.

    None for other modules, and for qwen2.

    Raises:
        BaseNeededError: for q and k, there is no base to say it.
        LossError: for q and k, graft does not know torchtune's order for this model type.
    """
    leaf = name.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return None
    if base is None:
        raise BaseNeededError(
            f"torchtune has the rows of {name} in pairs per head. Give the base model for its number of heads (--base)."
        )
    kind = base.config.get("model_type")
    if kind in HALVES:
        return None
    if kind not in PAIRS:
        raise LossError(f"graft does not know torchtune's order of the rows of {name} for model type {kind!r}.")
    return count_heads(base, leaf == "k_proj")
