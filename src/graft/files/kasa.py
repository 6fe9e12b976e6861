# SPDX-License-Identifier: Apache-2.0
"""KaSA in files: LoRA on a base without its smallest singular components, which only the base's weights tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from graft.files.algebra import wide
from graft.files.base import Known
from graft.files.bases import fitted
from graft.files.inspect import weight
from graft.files.neutral import AdapterFile, LowRank, Other
from graft.files.tensors import Tensor, tensor


def as_lora(adapter: AdapterFile, base: Known) -> AdapterFile:
    """Return an adapter whose KaSA is LoRA, with what KaSA takes out of the base as PiSSA's files have it.

    The singular components of a weight are computed when the tensors are read.

    Raises:
        BaseModelMismatchError: the base lacks a weight of the adapter, or has it in another shape.
        BaseNeededError: of the base only names are known.
    """
    modules = {path: m for path, m in adapter.modules.items() if isinstance(m, Other) and m.method == "KASA"}
    if not modules:
        return adapter
    known, made = fitted(base, adapter.modules), dict(adapter.modules)
    for path, module in modules.items():
        A, B = module.tensors["lora_A.weight"], module.tensors["lora_B.weight"]
        scaled = tensor((wide(module.tensors["lora_diag"])[:, None] * wide(A)).astype("f4"))
        lora = LowRank(scaled, B, 1.0 if module.scale is None else module.scale)
        weight(path, adapter, known, lora)  # looks whether it fits
        smallest = cache(partial(components, path, adapter, known, lora))
        lora.extra = {
            "lora_shift.A": Tensor(A.shape, "F32", partial(taken, smallest, 0)),
            "lora_shift.B": Tensor(B.shape, "F32", partial(taken, smallest, 1)),
        }
        made[path] = lora
    return replace(adapter, modules=made)


def taken(smallest: Callable[[], Sequence[bytes]], i: int) -> bytes:
    return smallest()[i]


def components(path: str, adapter: AdapterFile, base: Known, lora: LowRank) -> tuple[bytes, bytes]:
    """Return the smallest singular components of a module's weight, as many as its rank: the bytes of A and B."""
    U, s, Vt = np.linalg.svd(weight(path, adapter, base, lora).astype("f8"), full_matrices=False)
    r = lora.rank
    return Vt[-r:].astype("<f4").tobytes(), np.ascontiguousarray(U[:, -r:] * s[-r:], "<f4").tobytes()
