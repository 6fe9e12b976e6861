# SPDX-License-Identifier: Apache-2.0
"""The stores of weights that only their own module knows how to use: linear layers are read by running them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graft.core.ops import find_op
from graft.storage.dense import Dense, own_forward, strange_tensor
from graft.storage.identity import by_identity, dtype_of, not_affine, not_linear, tensors_of
from graft.storage.offload import computes_on
from graft.storage.quantized import OwnModule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # to try where a layer does not tell


class ByIdentity(OwnModule):
    """A layer that is known to be linear, and is read by its own forward. Each reading runs it on in_features rows.

    Args:
        codes: what it has in place of a weight: "GPTQ codes".
        calibrated: data of a model in use were needed to make the codes.
    """

    writes = False

    def __init__(self, name: str, codes: str, calibrated: bool = True):
        self.name, self.codes = name, codes
        self.calibrated = f"its weight is {codes} that were calibrated" if calibrated else None
        # what `look` says of a layer, and the dtype in which it runs
        self.known: WeakKeyDictionary[nn.Module, tuple[str | None, torch.dtype]] = WeakKeyDictionary()

    look = staticmethod(not_affine)

    def reason(self, m: nn.Module) -> tuple[str, str]:
        """Return why graft itself cannot read the weight, and what a user can do about it, if anything."""
        return f"its weight is {self.codes}", ""

    def unreadable(self, m: nn.Module) -> str | None:
        reason, remedy = self.reason(m)
        op, (device, dtype) = find_op(m), self.where(m)
        if not op.linear:
            return reason + remedy
        if m not in self.known:
            first: Exception | None = None
            for runs_in in DTYPES if dtype is None else (dtype,):
                try:
                    self.known[m] = self.look(m, op.dims(m), device, runs_in), runs_in
                    break
                except Exception as e:  # whatever a forward raises; it may run later, on another device
                    first = first or e
            else:
                return f"{reason}, and running the layer to read it ends in {type(first).__name__}: {first}"
        why = self.known[m][0]
        return None if why is None else f"{reason}, and {why}"

    def values(self, m: nn.Module) -> Tensor:
        op, (device, dtype) = find_op(m), self.where(m)
        return op.uncanon(by_identity(m, op.dims(m), device, dtype or self.known[m][1]))

    def fixed(self, m: nn.Module, name: str = "weight") -> str | None:
        if name != "weight" or self.calibrated is not None:
            return super().fixed(m, name)
        reason, remedy = self.reason(m)
        return f"{reason}, and graft does not know how to write it{remedy}"

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> dict[str, Any]:
        return {part: t for held in (m._parameters, m._buffers) for part, t in held.items() if t is not None}

    def compute_dtype(self, m: nn.Module) -> torch.dtype | None:
        return dtype_of(m)

    def where(self, m: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        return computes_on(m, next((t.device for t in tensors_of(m)), None)), self.compute_dtype(m)

    def strange(self, m: nn.Module) -> str | None:
        return None  # its own forward says what the weight is


class Foreign(ByIdentity):
    """Adapters beside the layer run. What reads the weight runs if the layer is found linear; nothing writes it."""

    look = staticmethod(not_linear)

    def __init__(self) -> None:
        super().__init__("foreign", "", calibrated=False)

    def reason(self, m: nn.Module) -> tuple[str, str]:
        if (why := strange_tensor(m, "weight")) is not None:
            return why, ""
        return own_forward(m) or (f"graft does not know how a {type(m).__name__} holds its weight", "")

    def protect(self, y: Tensor) -> Tensor:
        """Copy the output: it may be a view that cannot be written to, or what its backward pass needs."""
        return y.clone()

    def ready(self, m: nn.Module) -> str | None:
        return None  # classes that graft does not know stay as they are


class Packed(Dense):
    """One parameter that holds codes: its module would not understand anything else in its place."""

    name = "packed"
    exact = live = False

    def unread(self, m: nn.Module, name: str = "weight") -> str | None:
        why = strange_tensor(m, name) or f"a {type(m).__name__} computes with codes in place of its {name}"
        return f"{why}: load the base model dequantized (in transformers: dequantize=True in its quantization_config)"

    fixed = unread
