# SPDX-License-Identifier: Apache-2.0
"""Counts of writes to tensors, so that caches notice new values. torch counts none for tensors of inference mode."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def version_of(t: Tensor) -> int:
    """Return a number that grows with each write to a tensor, torch's `_version`.

    A tensor of inference mode has none: there it is `_graft_writes`, the count of writes by `write_all`, 0 without that
    attribute.
    """
    return getattr(t, "_graft_writes", 0) if t.is_inference() else t._version


def write_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy values into tensors, (tensor, value) each, by one operation and without gradients.

    Tensors of inference mode get `_graft_writes`, one more than before, since torch counts no version. With one of
    these among them, all are written in inference mode.
    """
    pairs = list(pairs)
    untracked = [t for t, _ in pairs if t.is_inference()]
    with torch.inference_mode() if untracked else torch.no_grad():
        torch._foreach_copy_([t for t, _ in pairs], [value for _, value in pairs])
    for t in untracked:
        t._graft_writes = version_of(t) + 1  # type: ignore[attr-defined]
