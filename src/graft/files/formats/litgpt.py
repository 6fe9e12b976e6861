# SPDX-License-Identifier: Apache-2.0
"""litgpt: lit_model.pth.lora beside two YAML files; q, k and v as one product with a block for each that is adapted."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from graft.config.atomic import replace, write_text
from graft.config.reading import LARGEST_NUMBER, Json, check, open_file
from graft.core.errors import CheckpointError, shortened, some
from graft.files.errors import BaseNeededError, LossError
from graft.files.formats import Base
from graft.files.formats.peft import plain
from graft.files.holding import Holds, both, by_module, check_lost, fit, misfit
from graft.files.neutral import AdapterFile, LowRank
from graft.files.pickles import mentions, read_torch, tensors_of, to_torch, write_torch
from graft.files.tensors import Tensor, tensor

NAME = "litgpt"
FILE, OF_RUN, OF_MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
FOLDER = (FILE,), (OF_RUN, OF_MODEL)
HOLDS = Holds("alpha", False)
KEY = re.compile(r"(.+)\.lora_([AB])")
OWN = re.compile(r"transformer\.h\.(?P<number>\d+)\.(?P<rest>.+)")
THEIRS = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<rest>.+)")
NAMES = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj",
         "mlp.proj": "mlp.down_proj"}  # fmt: skip
BACK = {theirs: own for own, theirs in NAMES.items()}
QKV = {"self_attn.q_proj": "lora_query", "self_attn.k_proj": "lora_key", "self_attn.v_proj": "lora_value"}
MLPS = ("LLaMAMLP", "GemmaMLP")  # classes of which litgpt's checkpoints become models of transformers with these names
LARGEST = 2**16  # bytes of a YAML file


def file_in(path: str) -> str | None:
    where = os.path.join(path, FILE) if os.path.isdir(path) else path
    return where if os.path.basename(where) == FILE and os.path.isfile(where) else None


def recognises(path: str) -> bool:
    file = file_in(path)
    return file is not None and mentions(file, b".lora_A")


def fields_of(path: str) -> Json:
    """Return what a YAML file holds: plain values, each named once.

    Raises:
        CheckpointError: it is not there, too large, or holds more than plain values; or it has an alias, since a few
            bytes of aliases can become gigabytes.
    """
    import yaml

    if not os.path.exists(path):
        raise CheckpointError(f"{path} is not there: litgpt's weights alone say neither scale nor which of q, k and v.")
    with open_file(path) as f:
        text = f.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise CheckpointError(f"{path} has more than {LARGEST:,} bytes: it is no config. Copy it again.")
    try:
        fields = yaml.load(text, plain_loader())
    except Exception as e:  # of odd tags, dates and numbers: errors of many types
        raise CheckpointError(f"{path} is damaged, or holds more than plain values: {shortened(str(e))}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}, not the fields of a config.")
    check(fields, path, "", 0)
    return fields


def plain_loader() -> Any:
    """Return a class that reads YAML of plain values, and refuses aliases and names that stand twice."""
    import yaml

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias: write the value in its place")
            node = super().compose_node(parent, index)
            names = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if len({*names}) < len(names):
                raise yaml.YAMLError(f"a name stands twice among {some(names)}")
            return node

    return PlainLoader


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a folder, or the file of weights in it.

    Raises:
        CheckpointError: one of the three files is not there or damaged, or they contradict each other.
    """
    file = file_in(path) or path
    folder = os.path.dirname(file)
    run, model = fields_of(os.path.join(folder, OF_RUN)), fields_of(os.path.join(folder, OF_MODEL))
    if model.get("mlp_class_name") not in MLPS:
        raise CheckpointError(
            f"{path} is for a model with the MLP {model.get('mlp_class_name')!r}: graft knows litgpt's names of those "
            f"with {' or '.join(MLPS)}."
        )
    loaded = read_torch(file)
    tensors = tensors_of(loaded.get("model", loaded) if isinstance(loaded, dict) else loaded, file)
    out = AdapterFile(NAME, path, config=run, base=model.get("name"))
    r, alpha = run.get("lora_r"), run.get("lora_alpha", "none")
    if (
        type(r) is not int
        or not 1 <= r <= LARGEST_NUMBER
        or type(alpha) not in (int, float)
        or abs(alpha) > LARGEST_NUMBER
    ):
        raise CheckpointError(f"{os.path.join(folder, OF_RUN)}: lora_r is {r!r} and lora_alpha {alpha!r}.")
    for name, of_module in by_module(out, tensors, KEY).items():
        A, B = both(of_module, "AB", file, name)
        if len(A.shape) != 2 or len(B.shape) != 2:
            raise misfit(file, name, A, B)
        match = OWN.fullmatch(name)
        if match is not None and match["rest"] == "attn.qkv":
            stem = f"model.layers.{match['number']}."
            for rest, (a, b) in parts(path, name, A, B, r, run, model).items():
                out.modules[stem + rest] = LowRank(a, b, alpha / r)
        elif name == "lm_head" or (match is not None and match["rest"] in NAMES):
            if A.shape[0] != r or B.shape[1] != r:
                raise misfit(file, name, A, B, f"of rank {r}")
            inner = name if match is None else f"model.layers.{match['number']}.{NAMES[match['rest']]}"
            out.modules[inner] = LowRank(A, B, alpha / r)
        else:
            out.unread += [f"{name}.lora_{side}" for side in of_module]
    return out


def parts(
    path: str, name: str, A: Tensor, B: Tensor, r: int, run: Json, model: Json
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of q, k and v, as far as the run adapted them."""
    rows = rows_of(model)
    on = [rest for rest, flag in QKV.items() if run.get(flag)]
    if A.shape[0] != r * len(on) or B.shape != (sum(rows[rest] for rest in on), r):
        raise misfit(path, name, A, B, f"which do not fit rank {r} on {some(on)}: {OF_RUN} is of another run")
    a, b = A.read(), B.read()
    out, row = {}, 0
    for i, rest in enumerate(on):
        out[rest] = tensor(a[i * r : (i + 1) * r], A.dtype), tensor(b[row : row + rows[rest]], B.dtype)
        row += rows[rest]
    return out


def rows_of(model: Mapping[str, object]) -> dict[str, int]:
    """Return the number of rows of q, k and v by litgpt's config of a model."""
    heads, width = model.get("n_head"), model.get("n_embd")
    groups = model.get("n_query_groups") or heads
    size = model.get("head_size") or (
        width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
    )
    if not all(isinstance(n, int) and n > 0 for n in (heads, groups, size)):
        raise CheckpointError(f"{OF_MODEL} does not say how many heads of which size the model has.")
    q, kv = heads * size, groups * size  # type: ignore[operator]
    return {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}


def write(adapter: AdapterFile, path: str, base: Base | None = None, lossy: bool = False) -> list[str]:
    """Write a folder, for a base of llama's family. Ranks are filled up, scales folded into B.

    Raises:
        BaseNeededError: there is no base: its heads are in litgpt's config.
        LossError: the base is of another family, or litgpt has no name for a module.
    """
    import yaml

    if base is None:
        raise BaseNeededError("litgpt's files have the base's sizes: give the base model (--base).")
    model = model_config(base)
    made, lost = fit(adapter, HOLDS, NAME, lossy)
    rows = rows_of(model)
    blocks: dict[str, dict[str, LowRank]] = {}
    tensors: dict[str, object] = {}
    flags = dict.fromkeys((*QKV.values(), "lora_projection", "lora_mlp", "lora_head"), False)
    for module, m in made.low_rank.items():
        match = THEIRS.fullmatch(module)
        rest = match["rest"] if match is not None else None
        if match is not None and rest in QKV:
            blocks.setdefault(match["number"], {})[rest] = m
            flags[QKV[rest]] = True
        elif module == "lm_head" or rest in BACK:
            own = module if match is None or rest is None else f"transformer.h.{match['number']}.{BACK[rest]}"
            tensors |= {f"{own}.lora_A": to_torch(m.A), f"{own}.lora_B": to_torch(m.B)}
            flags["lora_head" if module == "lm_head" else "lora_projection" if "attn" in own else "lora_mlp"] = True
        else:
            lost.append(f"no name in litgpt: {module}")
    check_lost(adapter, NAME, lost, lossy, tensors or blocks)
    first = next(iter(made.low_rank.values()))
    on = [rest for rest, flag in QKV.items() if flags[flag]]
    for number, block in blocks.items():
        A, B = joined(block, on, rows, first.rank)
        stem = f"transformer.h.{number}.attn.qkv.lora_"
        tensors |= {f"{stem}A": to_torch(A), f"{stem}B": to_torch(B)}
    run = {"lora_r": first.rank, "lora_alpha": plain(first.scale * first.rank), "lora_dropout": 0.0, **flags}
    os.makedirs(path, exist_ok=True)
    write_torch(os.path.join(path, FILE), {"model": tensors})
    replace(os.path.join(path, OF_RUN), write_text(yaml.safe_dump(run)))
    replace(os.path.join(path, OF_MODEL), write_text(yaml.safe_dump(model)))
    return lost


def joined(block: dict[str, LowRank], on: list[str], rows: dict[str, int], rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of a block's qkv; those of its modules that are not adapted are zeros."""
    one = next(iter(block.values()))
    a = [block[rest].A.read() if rest in block else np.zeros(one.A.shape, "f4") for rest in on]
    b = [block[rest].B.read() if rest in block else np.zeros((rows[rest], rank), "f4") for rest in on]
    return tensor(np.concatenate(a), one.A.dtype), tensor(np.concatenate(b), one.B.dtype)


def model_config(base: Base) -> Json:
    """Return litgpt's config of a base of llama's family.

    Raises:
        LossError: it is of another.
    """
    config = base.config
    if config.get("model_type") not in ("llama", "mistral"):
        raise LossError(f"graft writes litgpt's files for llama's family, not for {config.get('model_type')!r}.")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {}
    return {
        "name": os.path.basename(os.path.abspath(base.path)), "block_size": config.get("max_position_embeddings", 4096),
        "vocab_size": config["vocab_size"], "padded_vocab_size": config["vocab_size"],
        "n_layer": config["num_hidden_layers"], "n_head": heads, "n_embd": width,
        "n_query_groups": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or width // heads,
        "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6), "mlp_class_name": "LLaMAMLP",
        "intermediate_size": config["intermediate_size"],
        "rope_base": int(config.get("rope_theta") or rope.get("rope_theta") or 10000),
    }  # fmt: skip
