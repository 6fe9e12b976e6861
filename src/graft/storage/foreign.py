# SPDX-License-Identifier: Apache-2.0
"""The store of weights that only their own module knows how to use, such as integer codes."""

from __future__ import annotations

from torch import Tensor, nn

from graft.core.errors import UnsupportedLayerError
from graft.core.ops import replaced_forward
from graft.core.table import qualified
from graft.storage.dense import Dense


def strange_forward(m: nn.Module) -> str | None:
    """Say why a module may use its weight in another way than its row of OPS says; None if it does not."""
    known = replaced_forward(m)
    if known is None:
        return None
    return (
        f"{type(m).__name__} has a forward of its own, which may use its weight in another way than {known.__name__} "
        f"does: if it does not, say so with graft.core.ops.OPS.add('{qualified(type(m))}', "
        f"graft.core.ops.OPS.find({qualified(known)}))"
    )


class Foreign(Dense):
    """Adapters beside the layer run; whatever reads or writes the weight is refused with the reason."""

    name = "foreign"
    exact = live = False

    def unread(self, m: nn.Module, name: str = "weight") -> str | None:
        return super().unread(m, name) or strange_forward(m)

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        why = self.unread(m, name)
        if why is not None:
            raise UnsupportedLayerError(f"The {name} of a {type(m).__name__} cannot be read: {why}.")
        return super().read(m, name)

    def fixed(self, m: nn.Module, name: str = "weight") -> str | None:
        return super().fixed(m, name) or strange_forward(m)

    def protect(self, y: Tensor) -> Tensor:
        """Copy the output: it may be a view that cannot be written to, or what its backward pass needs."""
        return y.clone()
