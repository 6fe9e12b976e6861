# SPDX-License-Identifier: Apache-2.0
"""Conversion of methods to the form of PEFT's files: (IA)³ and LoKr of LyCORIS, and KaSA to LoRA with a shift of the
base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from graft.files.algebra import read_float64
from graft.files.base import BaseDescription as Base
from graft.files.bases import choose_names
from graft.files.errors import make_damage_error
from graft.files.inspect import read_base_weight
from graft.files.neutral import AdapterFile, LowRank, OtherMethod
from graft.files.tensors import Tensor, make_tensor


def lycoris_to_peft(adapter: AdapterFile, base: Base | None = None) -> AdapterFile:
    """Return an adapter that has only LyCORIS' (IA)³, or only LoKr, converted to PEFT's, with a config; other adapters
    unchanged.

    LyCORIS stores (IA)³ as the difference from 1. It leaves biases alone where it scales outputs, which PEFT cannot
    express: such an adapter is unchanged, and writing it as PEFT fails. Without a base, every module counts as one with
    a bias.
    """
    other_modules = {path: m for path, m in adapter.modules.items() if isinstance(m, OtherMethod)}
    methods = {m.method for m in adapter.modules.values()}
    if methods == {"LyCORIS IA3"}:
        return convert_ia3(adapter, other_modules, base)
    return convert_lokr(adapter, other_modules, base) if methods == {"LOKR"} else adapter


def convert_ia3(adapter: AdapterFile, other_modules: Mapping[str, OtherMethod], base: Base | None) -> AdapterFile:
    """Return the adapter as PEFT's (IA)³: vectors plus 1 in float32, and a config with the input-side modules as
    feedforward_modules, in the file's order, and all modules as target_modules, sorted.

    If any module scales outputs, and the base is None or has a bias there, the adapter is returned unchanged.
    """
    modules: dict[str, LowRank | OtherMethod] = {}
    of_inputs = []
    for path, m in other_modules.items():
        on_input = bool(m.tensors["on_input"].read().reshape(-1)[0])
        vector = 1 + m.tensors["weight"].read().reshape(-1).astype("f8")
        if not on_input and (base is None or f"{path}.bias" in base.shapes):
            return adapter
        of_inputs += [path] * on_input
        shape = (1, -1) if on_input else (-1, 1)
        modules[path] = OtherMethod(
            "IA3", {"ia3_l": make_tensor(np.ascontiguousarray(vector.reshape(shape)).astype("f4"))}
        )
    config = {"peft_type": "IA3", "target_modules": sorted(modules), "feedforward_modules": of_inputs}
    return replace(adapter, method="IA3", modules=modules, config=config)


def convert_lokr(adapter: AdapterFile, other_modules: Mapping[str, OtherMethod], base: Base | None) -> AdapterFile:
    """Return a copy of an adapter with a config of PEFT's LoKr: one decompose_factor, and the rank and alpha of each
    module.

    The first of -1, 1, 2, … that gives all shapes is the factor. If none does, the config stays, and the modules'
    method becomes "LoKr of several factors", which writing as PEFT refuses. A full second factor gets the lowest rank
    that keeps it full in PEFT. The first module gives `r` and `alpha`, and others that differ get patterns, each "^"
    and the path. `decompose_both` is True if any module has a "lokr_w1_b", `use_effective_conv2d` if any has a
    "lokr_t2". `target_modules` are the sorted paths; a missing scale counts as 1. With a base, the columns of its
    weight correct those of a kernel's second factor.

    Raises:
        CheckpointError: factors are missing or one-dimensional.
    """
    from graft import LoKrConfig  # loads torch

    ranks, alphas = {}, {}
    grids: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for path, m in other_modules.items():
        try:
            one, two = factor_shape(m, "lokr_w1"), factor_shape(m, "lokr_w2")
        except (KeyError, IndexError) as e:
            raise make_damage_error(f"{adapter.path} has no valid factors of '{path}': {e}") from e
        # the last factor of a kernel has n · kernel size columns
        if base is not None and f"{path}.weight" in base.shapes:
            two = two[0], base.shapes[f"{path}.weight"][1] // one[1]
        grids.append((one, two))
        ranks[path] = m.rank or max(two)
        alphas[path] = (1.0 if m.scale is None else m.scale) * ranks[path]
    sizes = {pair for one, two in grids for pair in zip(one, two)}
    candidates = (LoKrConfig(decompose_factor=f) for f in (-1, *range(1, 1 + max(max(one) for one, _ in grids))))
    fits = (c.decompose_factor for c in candidates if all(c.factor_sizes(a * b) == (a, b) for a, b in sizes))
    factor = next(fits, None)
    if factor is None:
        several: dict[str, LowRank | OtherMethod] = {
            path: OtherMethod("LoKr of several factors", m.tensors, m.scale) for path, m in other_modules.items()
        }
        return replace(adapter, method="LOKR", modules=several)
    first = next(iter(ranks))
    config = {
        "peft_type": "LOKR", "r": ranks[first], "alpha": alphas[first], "target_modules": sorted(ranks),
        "decompose_both": any("lokr_w1_b" in m.tensors for m in other_modules.values()),
        "decompose_factor": factor,
        "use_effective_conv2d": any("lokr_t2" in m.tensors for m in other_modules.values()),
        "rank_pattern": {f"^{path}": r for path, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {f"^{path}": a for path, a in alphas.items() if a != alphas[first]},
    }  # fmt: skip
    return replace(adapter, method="LOKR", config=config)


def factor_shape(m: OtherMethod, name: str) -> tuple[int, int]:
    """Return the rows and columns of a LoKr factor: one full tensor, or a product of two, `name`_a and `name`_b.

    With a Tucker core `lokr_t2`, the second factor's rows are the columns of its `_a`.

    Raises KeyError for a missing tensor, and IndexError for one of one dimension.
    """
    tensors = m.tensors
    if name in tensors:
        return tensors[name].shape[0], tensors[name].shape[1]
    if "lokr_t2" in tensors and name == "lokr_w2":
        return tensors[f"{name}_a"].shape[1], tensors[f"{name}_b"].shape[1]
    return tensors[f"{name}_a"].shape[0], tensors[f"{name}_b"].shape[1]


def kasa_to_lora(adapter: AdapterFile, base: Base) -> AdapterFile:
    """Return an adapter with each KaSA module as LoRA plus a shift: the smallest singular components that KaSA removes
    from the base.

    An adapter without KaSA is returned as it is. A is multiplied by `lora_diag`, in float32. The components are
    computed once per module, when they are read.

    Raises:
        BaseModelMismatchError: the base lacks a weight of the adapter, or has another shape.
        BaseNeededError: the base has names but no weights.
    """
    # only the base's weights contain the components that KaSA removes
    modules = {path: m for path, m in adapter.modules.items() if isinstance(m, OtherMethod) and m.method == "KASA"}
    if not modules:
        return adapter
    known, new_modules = choose_names(base, adapter.modules), dict(adapter.modules)
    for path, module in modules.items():
        A, B = module.tensors["lora_A.weight"], module.tensors["lora_B.weight"]
        scaled = make_tensor((read_float64(module.tensors["lora_diag"])[:, None] * read_float64(A)).astype("f4"))
        lora = LowRank(scaled, B, 1.0 if module.scale is None else module.scale)
        read_base_weight(path, adapter, known, lora)  # raises an error early if the base does not fit
        lora.extra = make_shift(path, adapter, known, lora)
        new_modules[path] = lora
    return replace(adapter, modules=new_modules)


def make_shift(path: str, adapter: AdapterFile, base: Base, lora: LowRank) -> dict[str, Tensor]:
    """Return the smallest singular components of a module's base weight, as many as the rank, as float32 factors named
    as those of a `shift`: "lora_shift.A", and "lora_shift.B" with the singular values.

    They are computed once, when the first is read.
    """

    @cache
    def compute() -> tuple[bytes, bytes]:
        """Return the bytes of A and B from an SVD of the weight in float64. Computed once."""
        U, s, Vt = np.linalg.svd(read_base_weight(path, adapter, base, lora).astype("f8"), full_matrices=False)
        r = lora.rank
        return Vt[-r:].astype("<f4").tobytes(), np.ascontiguousarray(U[:, -r:] * s[-r:], "<f4").tobytes()

    A, B = Tensor(lora.A.shape, "F32", lambda: compute()[0]), Tensor(lora.B.shape, "F32", lambda: compute()[1])
    return {"lora_shift.A": A, "lora_shift.B": B}
