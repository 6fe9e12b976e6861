# SPDX-License-Identifier: Apache-2.0
"""Whether a tensor's values are still those from which something was made. torch counts none of inference mode."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def version_of(t: Tensor) -> int:
    """Return how often a tensor was written to; of those of inference mode, how often graft wrote to it."""
    return getattr(t, "_graft_writes", 0) if t.is_inference() else t._version


def write_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy values into tensors of this process, in one go, those of inference mode included."""
    pairs = list(pairs)
    untracked = [t for t, _ in pairs if t.is_inference()]
    with torch.inference_mode() if untracked else torch.no_grad():
        torch._foreach_copy_([t for t, _ in pairs], [value for _, value in pairs])
    for t in untracked:
        t._graft_writes = version_of(t) + 1  # type: ignore[attr-defined]
