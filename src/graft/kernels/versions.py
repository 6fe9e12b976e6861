# SPDX-License-Identifier: Apache-2.0
"""Counts of writes to tensors, so that caches notice new values. torch counts none for tensors of inference mode."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def version_of(t: Tensor) -> int:
    """Return a number that grows with each write to a tensor, as torch counts them.

    torch counts none for a tensor of inference mode: there only writes by `write_all` count.
    """
    return getattr(t, "_graft_writes", 0) if t.is_inference() else t._version


def write_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy values into tensors, (tensor, value) each, by one operation and without gradients.

    Tensors of inference mode get a new version number as an attribute, since torch counts none.
    """
    pairs = list(pairs)
    untracked = [t for t, _ in pairs if t.is_inference()]
    with torch.inference_mode() if untracked else torch.no_grad():
        torch._foreach_copy_([t for t, _ in pairs], [value for _, value in pairs])
    for t in untracked:
        t._graft_writes = version_of(t) + 1  # type: ignore[attr-defined]
