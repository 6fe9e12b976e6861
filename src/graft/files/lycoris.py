# SPDX-License-Identifier: Apache-2.0
"""What LyCORIS writes and PEFT has methods for, as PEFT's files have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from graft.files.neutral import AdapterFile, Other
from graft.files.tensors import tensor


def as_peft(adapter: AdapterFile, base: Any = None) -> AdapterFile:
    """Return an adapter whose (IA)³ and LoKr are those of PEFT, with the fields that its config needs for them.

    LyCORIS keeps what (IA)³ adds to 1. Where it scales outputs it leaves the bias alone, and PEFT's method does not:
    such a module stays as it is, and no file of PEFT can hold it.
    """
    methods = {m.method for m in adapter.modules.values() if isinstance(m, Other)}
    if len(methods) != 1 or adapter.low_rank:
        return adapter
    method = methods.pop()
    if method == "LyCORIS IA3":
        return ia3(adapter, base)
    if method == "LOKR":
        return lokr(adapter)
    return adapter


def ia3(adapter: AdapterFile, base: Any) -> AdapterFile:
    modules: dict[str, Any] = {}
    of_inputs = []
    for path, m in adapter.modules.items():
        on_input = bool(m.tensors["on_input"].read().reshape(-1)[0])  # type: ignore[union-attr]
        vector = 1 + m.tensors["weight"].read().reshape(-1).astype("f8")  # type: ignore[union-attr]
        if not on_input and (base is None or f"{path}.bias" in base.shapes):
            return adapter
        of_inputs += [path] * on_input
        shape = (1, -1) if on_input else (-1, 1)
        modules[path] = Other("IA3", {"ia3_l": tensor(np.ascontiguousarray(vector.reshape(shape)).astype("f4"))})
    config = {"peft_type": "IA3", "target_modules": sorted(modules), "feedforward_modules": of_inputs}
    return replace(adapter, method="IA3", modules=modules, config=config)


def lokr(adapter: AdapterFile) -> AdapterFile:
    """Return an adapter whose config makes PEFT's LoKr of the same shapes: the factor, and a rank per module.

    A second factor that is whole has a rank from which on PEFT keeps it whole.
    """
    modules: dict[str, Any] = {}
    ranks, alphas = {}, {}
    for path, m in adapter.modules.items():
        held = m.tensors  # type: ignore[union-attr]
        scale = m.scale or 1.0  # type: ignore[union-attr]
        small = next((held[k].shape[0] for k in ("lokr_w2_b", "lokr_w1_b") if k in held), None)
        rank = small if small is not None else max(held["lokr_w2"].shape[:2])
        modules[path], ranks[path], alphas[path] = m, rank, scale * rank
    first = next(iter(modules))
    firsts = [held.tensors.get("lokr_w1") for held in modules.values()]
    factor = max((min(t.shape) if min(t.shape) > 1 else max(t.shape) for t in firsts if t is not None), default=-1)
    config = {
        "peft_type": "LOKR", "r": ranks[first], "alpha": alphas[first], "target_modules": sorted(modules),
        "decompose_both": any("lokr_w1_b" in m.tensors for m in modules.values()), "decompose_factor": factor,
        "use_effective_conv2d": any("lokr_t2" in m.tensors for m in modules.values()),
        "rank_pattern": {f"^{path}": r for path, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {f"^{path}": a for path, a in alphas.items() if a != alphas[first]},
    }  # fmt: skip
    return replace(adapter, method="LOKR", modules=modules, config=config)
