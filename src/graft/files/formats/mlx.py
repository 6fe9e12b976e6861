# SPDX-License-Identifier: Apache-2.0
"""mlx-lm: a folder with adapters.safetensors and adapter_config.json; factors transposed, one scale and one rank."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace as with_

from graft import CheckpointError
from graft.config.atomic import replace_file
from graft.config.reading import read_object
from graft.files.errors import make_damage_error
from graft.files.formats import Base
from graft.files.holding import (
    FormatLimits,
    check_losses,
    fit_to_format,
    get_factor_pair,
    make_magnitudes,
    make_shape_error,
)
from graft.files.neutral import AdapterFile, Kind, LowRank, OtherMethod
from graft.files.tensors import Tensor, read_header, write_safetensors

NAME = "mlx"
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
FOLDER = (WEIGHTS,), (CONFIG,)
DEFAULT = 20.0  # scale where the config has none
DORA_OF_TOKENS = "MLX DoRA of an embedding"  # a magnitude for each token, where PEFT's is for each output
HOLDS = FormatLimits("one", False, frozenset({"magnitude", "embedding", "experts"}), magnitudes=True)
KEY = re.compile(r"(.+)\.(lora_a|lora_b|m)")
BLOCK = re.compile(r"^(?P<blocks>.*?\.layers)\.(?P<number>\d+)\.(?P<key>.+)$")


def recognises(path: str) -> bool:
    """Return True for a folder with adapters.safetensors and an adapter_config.json without `peft_type`."""
    config = os.path.join(path, CONFIG)
    if not os.path.exists(config) or not os.path.exists(os.path.join(path, WEIGHTS)):
        return False
    return "peft_type" not in read_object(config)


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a folder. After a full fine-tuning all tensors are whole tensors. The scale is 20 if the config has none.

    `base` is the config's `model`. Names other than those of factors and magnitudes go to `unknown_keys`.

    Raises:
        CheckpointError: a file is missing or damaged, factors are missing or not transposed as MLX has them, or the
            scale is no number.
    """
    config = read_object(os.path.join(path, CONFIG))
    tensors, metadata = read_header(os.path.join(path, WEIGHTS))
    out = AdapterFile(NAME, path, config=config, metadata=metadata, base=config.get("model"))
    if config.get("fine_tune_type") == "full":
        out.full = tensors
        return out
    parameters = config.get("lora_parameters") or {}
    scale = parameters.get("scale", DEFAULT) if isinstance(parameters, dict) else None
    if not isinstance(scale, (int, float)):
        raise CheckpointError(f"{path}: the scale in lora_parameters={parameters!r} is no number. Edit {CONFIG}.")
    for module, of_module in out.group_by_module(tensors, KEY.fullmatch).items():
        out.modules[module] = read_mlx_pair(path, module, of_module, float(scale), parameters.get("rank"))
    return out


def read_mlx_pair(
    path: str, module: str, tensors: dict[str, Tensor], scale: float, rank: object
) -> LowRank | OtherMethod:
    """Return a module's factors, transposed to PEFT's order.

    Three dimensions that fit are experts, in PEFT's order already.

    A module with a last name that begins with embed, wte or tok_emb is an embedding; with a magnitude it becomes
    `OtherMethod` with MLX's tensors. All others are linear.

    Args:
        rank: of the config; None: any rank fits. Experts are not compared with it.

    Raises:
        CheckpointError: a factor is missing, the magnitude is no vector, or shapes are not (in, r) and (r, out) of the
            config's rank.
    """
    (a, b), m = get_factor_pair(tensors, ("lora_a", "lora_b"), path, module), tensors.get("m")
    if m is not None and len(m.shape) != 1:
        raise make_damage_error(f"{path}: the magnitude of '{module}' has shape {m.shape}, and is no vector")
    if len(a.shape) == len(b.shape) == 3 and a.shape[:2] == (b.shape[0], b.shape[2]):
        return LowRank(a, b, scale, "experts", m)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or rank not in (None, a.shape[1]):
        r = rank or "r"
        raise make_shape_error(path, module, a, b, f"where MLX has (in, {r}) and ({r}, out)")
    kind: Kind = "embedding" if module.rpartition(".")[2].startswith(("embed", "wte", "tok_emb")) else "linear"
    if kind == "embedding" and m is not None:
        return OtherMethod(DORA_OF_TOKENS, tensors, scale)
    return LowRank(a.transpose(), b.transpose(), scale, kind, m)


def write(adapter: AdapterFile, path: str, base: Base | None = None, lossy: bool = False) -> list[str]:
    """Write a folder with adapter_config.json and adapters.safetensors, which is made if needed.

    Return descriptions of the losses. Modules are named below their block if all blocks have the same, else by whole
    paths.

    Ranks and scales are made equal; the first module gives those of the config. If one module has a magnitude, all get
    one. A and B are transposed, except for experts.

    Raises:
        LossError: without `lossy`, a part cannot be held: another method than LoRA, or an embedding's magnitude. Or
            magnitudes need the base's weights, or nothing is left.
    """
    fitted, lost = fit_to_format(adapter, HOLDS, NAME, lossy)
    of_outputs = {path: m for path, m in fitted.low_rank.items() if m.kind == "embedding" and m.magnitude is not None}
    lost += [f"DoRA's magnitude, which an embedding has for each token there: {path}" for path in of_outputs]
    check_losses(adapter, NAME, lost, lossy, fitted.modules)
    fitted.modules.update({path: with_(m, magnitude=None) for path, m in of_outputs.items()})
    fitted.modules.update(make_magnitudes(fitted, base, NAME, of_rows=True))
    modules = fitted.low_rank
    tensors: dict[str, Tensor] = {}
    dora = any(module.magnitude is not None for module in modules.values())
    for name, module in modules.items():
        for leaf, t in (("lora_a", module.A), ("lora_b", module.B)):
            tensors[f"{name}.{leaf}"] = t if module.kind == "experts" else t.transpose()
        if module.magnitude is not None:
            tensors[f"{name}.m"] = module.magnitude
    first = next(iter(modules.values()))
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {"dropout": 0.0, "keys": choose_keys(modules), "rank": first.rank, "scale": first.scale},
        "model": adapter.base,
        "num_layers": -1,
    }
    os.makedirs(path, exist_ok=True)
    write_safetensors(os.path.join(path, WEIGHTS), tensors, {"format": "mlx"})
    replace_file(os.path.join(path, CONFIG), json.dumps(config, indent=4, sort_keys=True) + "\n")
    return lost


def choose_keys(modules: dict[str, LowRank]) -> list[str]:
    """Return names below a block, sorted and each once, if all modules are in blocks of one stack and all these have
    the same names.

    Else whole paths, sorted, which older versions of mlx-lm cannot read. `modules` must not be empty.
    """
    blocks: dict[str, set[str]] = {}
    for name in modules:
        match = BLOCK.match(name)
        if match is None:
            return sorted(modules)
        blocks.setdefault(f"{match['blocks']}.{match['number']}", set()).add(match["key"])
    first, *other_blocks = blocks.values()
    same = len({block.rpartition(".")[0] for block in blocks}) == 1 and all(
        keys_of_block == first for keys_of_block in other_blocks
    )
    return sorted(first if same else modules)
