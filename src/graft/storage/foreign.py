# SPDX-License-Identifier: Apache-2.0
"""The stores of weights that only their own module knows how to use: linear layers are read by running them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graft.core.ops import find_op, replaced_forward
from graft.core.table import qualified
from graft.storage.dense import Dense, strange_tensor
from graft.storage.identity import by_identity, dtype_of, not_linear, tensors_of
from graft.storage.quantized import Quantized


class ByIdentity(Quantized):
    """A layer that is known to be linear, and is read by its own forward. Each reading runs it on in_features rows."""

    name = "by identity"

    def __init__(self, calibrated: str | None = None):
        self.calibrated = calibrated

    def values(self, m: nn.Module) -> Tensor:
        op, (device, dtype) = find_op(m), self.where(m)
        return op.uncanon(by_identity(m, op.dims(m), device, dtype or torch.get_default_dtype()))

    def compute_dtype(self, m: nn.Module) -> torch.dtype | None:
        return dtype_of(m)

    def where(self, m: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        return next((t.device for t in tensors_of(m)), None), self.compute_dtype(m)


class Foreign(ByIdentity):
    """Adapters beside the layer run. What reads the weight runs if the layer is found linear; nothing writes it."""

    name = "foreign"

    def __init__(self) -> None:
        super().__init__()
        self.linear: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()  # why it is not; None: it is

    def unreadable(self, m: nn.Module) -> str | None:
        what, hint = strange(m)
        if not find_op(m).linear:
            return what + hint
        device, dtype = self.where(m)
        if device is not None and device.type == "meta":
            return f"{what}; whether it is linear cannot be seen on the meta device"
        if m not in self.linear:
            try:
                why = not_linear(m, find_op(m).dims(m), device, dtype or torch.get_default_dtype())
            except Exception as e:  # whatever a forward raises; it may run later, on another device
                return f"{what}, and running the layer to read it ends in {type(e).__name__}: {e}"
            self.linear[m] = why
        return None if self.linear[m] is None else f"{what}, and {self.linear[m]}"

    def fixed(self, m: nn.Module, name: str = "weight") -> str | None:
        if name != "weight":
            return super().fixed(m, name)
        what, hint = strange(m)
        return f"{what}, and graft does not know how to write it{hint}"

    def protect(self, y: Tensor) -> Tensor:
        """Copy the output: it may be a view that cannot be written to, or what its backward pass needs."""
        return y.clone()


def strange(m: nn.Module) -> tuple[str, str]:
    """Say why graft does not know how a module holds its weight, and what to do if the module is a common one."""
    if (why := strange_tensor(m, "weight")) is not None:
        return why, ""
    known = replaced_forward(m)
    if known is None:
        return f"graft does not know how a {type(m).__name__} holds its weight", ""
    return (
        f"{type(m).__name__} has a forward of its own, which may use its weight in another way than {known.__name__} "
        "does",
        f": if it does not, say so with graft.core.ops.OPS.add('{qualified(type(m))}', "
        f"graft.core.ops.OPS.find({qualified(known)}))",
    )


class Packed(Dense):
    """One parameter that holds codes: its module would not understand anything else in its place."""

    name = "packed"
    exact = live = False

    def unread(self, m: nn.Module, name: str = "weight") -> str | None:
        why = strange_tensor(m, name) or f"a {type(m).__name__} computes with codes in place of its {name}"
        return (
            f"{why}: load the base model dequantized (with transformers, by dequantize=True in its quantization_config)"
        )

    fixed = unread
