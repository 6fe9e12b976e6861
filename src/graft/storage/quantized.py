# SPDX-License-Identifier: Apache-2.0
"""The base of the stores of linear layers that hold codes and scales in place of a weight.

Such a store reads the dense weight, and packs a new one. A snapshot is the old codes themselves, so that unmerging
restores the bits without a dense copy. Each further merge into a rounded weight folds anew from W₀ with all merged
adapters, so that the weight is rounded once. When an adapter is added, a hook of the store runs for every module of the
model. It mends gradients that would be wrong on or below a packed layer (`storage/straight.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import UnsupportedLayerError
from graft.core.ops import find_op
from graft.storage.dense import Dense, strange_forward
from graft.storage.offload import computes_on, is_away
from graft.storage.straight import let_gradients_through


class Quantized(Dense):
    """The base of stores of rounded weights.

    A subclass decodes them (`values`), and encodes new ones unless `calibrated`.

    A file of a storage lists its stores by the qualified names of their modules (`MODULES`), or of their tensors
    (`TENSORS`), and `storage/find.py` names the file. It imports its package only when one of these is met.
    """

    name = "quantized"
    exact = live = False
    parts: tuple[str, ...] = ("weight",)  # attributes of the module that make up the packed weight
    typed = ""  # attribute of the module that has the dtype of the dense weight
    writes = True  # graft knows how to quantize anew: a column of docs/reference/storages.md
    calibrated: str | None = None  # why it cannot be written: "its weight is … codes that were calibrated"

    def values(self, m: nn.Module) -> Tensor:
        """Raise NotImplementedError here. A store returns the dense weight in new memory, without gradients.

        It is in the module's orientation, and in the dtype that the module computes in.
        """
        raise NotImplementedError

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        """Raise NotImplementedError here.

        A store returns new values of `parts` that hold W, with the settings of the old ones.

        The old ones do not change.
        """
        raise NotImplementedError

    def compute_dtype(self, m: nn.Module) -> torch.dtype | None:
        """Return the dtype of the tensor `typed` if it holds floats wider than a byte; else None: nothing tells."""
        dtype = getattr(m, self.typed).dtype if self.typed else None
        return dtype if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else None

    def trains(self, m: nn.Module) -> bool:
        """Return True if the module rounds floats at each call, so that a copy of it can train; False here."""
        return False

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return why the codes of this module cannot be decoded; None if they can, as here."""
        return None

    def on_meta(self, m: nn.Module) -> bool:
        """Return True if the module's codes are on the meta device, and accelerate does not offload them."""
        device = self.where(m)[0]
        return device is not None and device.type == "meta"

    def strange(self, m: nn.Module) -> str | None:
        """Return the text of a replaced forward of the module, which may compute with other values than `values`
        returns.

        None if the forward is a known one.
        """
        return strange_forward(m)

    def why_unreadable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why the weight cannot be read; None if it can.

        The first of four reasons: it is offloaded now; it is on the meta device; its codes cannot be decoded; or the
        module has a replaced forward. For another tensor return the reason of plain ones.
        """
        if name != "weight":
            return super().why_unreadable(m, name)
        if is_away(m):
            return "its weight is offloaded: it is there only while the module itself is called"
        if self.on_meta(m):
            return "its packed weight is on the meta device, not loaded: have the model on real devices first"
        return self.why_undecodable(m) or self.strange(m)

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        """Return the decoded weight in new memory, without gradients; a tensor of another name as the base class reads
        it.

        Raises UnsupportedLayerError if the weight cannot be read.
        """
        if name != "weight":
            return super().read(m, name)
        if (why := self.why_unreadable(m)) is not None:
            raise UnsupportedLayerError(f"The weight of a {type(m).__name__} cannot be read: {why}.")
        with torch.no_grad():
            return self.values(m)

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why merging cannot write the weight: codes that are calibrated, else the reason why it cannot be read.

        None if it can.

        Another tensor can be written if it is a plain attribute of the module; else the rules of plain tensors decide.
        """
        if name != "weight":
            return None if isinstance(m.__dict__.get(name), Tensor) else super().why_unwritable(m, name)
        if self.calibrated is not None:
            return f"{self.calibrated}, and merging would quantize them anew"
        return self.why_unreadable(m)

    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> None:
        """Quantize W, cast to the compute dtype, with the old settings, and put new tensors into the module.

        Those of a snapshot do not change. `name` and `shared` change nothing.
        """
        with torch.no_grad():
            self.put(m, self.pack(m, W.to(self.compute_dtype(m) or W.dtype)))

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> dict[str, object]:
        """Return `parts` of the module by name: the packed tensors themselves, as `write` replaces and never overwrites
        them.
        """
        return {part: getattr(m, part) for part in self.parts}

    def snapshot_values(self, m: nn.Module, name: str, state: dict[str, object]) -> Tensor:
        """Return the decoded weight of a snapshot, read through a copy of the module that holds the snapshot.

        Raises UnsupportedLayerError if it cannot be read.
        """
        return self.read(copy_with(m, state), name)

    def restore(self, m: nn.Module, name: str, state: dict[str, object]) -> None:
        """Put the parts of a snapshot back into the module, moved to the device where the module computes."""
        device = self.where(m)[0]
        self.put(m, {part: move_snapshot(value, device) for part, value in state.items()})

    def where(self, m: nn.Module, name: str = "weight") -> tuple[torch.device | None, torch.dtype | None]:
        """Return the device of the first of `parts` that is a tensor (None without any), or accelerate's if it is
        offloaded; and the compute dtype. The name does not matter.
        """
        values = (getattr(m, part) for part in self.parts)
        device = next((t.device for t in values if isinstance(t, Tensor)), None)
        return computes_on(m, device), self.compute_dtype(m)

    def dense(self, m: nn.Module, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a new linear layer with the decoded weight (out, in), in `dtype`; None keeps the dtype that `read`
        gives.

        Its weight has no gradient. A bias is copied, cast to the weight's dtype, with its requires_grad. The layer has
        the module's training mode. Raises UnsupportedLayerError if the weight cannot be read.
        """
        W, bias = find_op(m).canon(self.read(m)), getattr(m, "bias", None)
        W = W.to(dtype or W.dtype).contiguous()
        layer = nn.Linear(W.shape[1], W.shape[0], bias is not None, device="meta").requires_grad_(False)
        layer.weight = nn.Parameter(W, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(W.dtype, copy=True), requires_grad=bias.requires_grad)
        return layer.train(m.training)

    def ready(self, m: nn.Module) -> str | None:
        """Prepare a module for adapters on it or below it; return a warning for the user, or None.

        Does nothing here.
        """
        return None

    def release(self, m: nn.Module) -> None:
        """Undo `ready` when no adapter acts on the module any more. Does nothing here."""

    def put(self, m: nn.Module, values: dict[str, object]) -> None:
        """Set `parts` of the module to these values: parameters without checks, others as attributes."""
        set_parts(m, values)

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return True if the module's own backward pass is wrong or missing: `straight.py` then replaces it.

        False here.
        """
        return False


def set_parts(m: nn.Module, values: Mapping[str, Any]) -> None:
    """Set attributes of a module by name; names of parameters are set in its dictionary of parameters, without
    checks.
    """
    for part, value in values.items():
        if part in m._parameters:
            m._parameters[part] = value
        else:
            setattr(m, part, value)


def copy_with(m: nn.Module, values: Mapping[str, object]) -> nn.Module:
    """Return a shallow copy of m with these attributes or parameters; m does not change, as another thread may run it.

    Other tensors and the children are shared.
    """
    clone = copy.copy(m)
    clone.__dict__.update({key: dict(m.__dict__[key]) for key in ("_parameters", "_buffers", "_modules")})
    set_parts(clone, values)
    return clone


class OwnModule(Quantized):
    """The base of stores of rounded weights in modules of another class, with kernels that may lack a backward pass."""

    def ready(self, m: nn.Module) -> str | None:
        """Replace the forward of the module's class, or of the module, so that gradients pass: see
        `let_gradients_through`.

        Return a warning if the module's backward pass is missing and its codes, unless on the meta device, cannot be
        decoded; else the answer of the base class.
        """
        let_gradients_through(m, self)
        if self.loses_gradient(m) and not self.on_meta(m) and (why := self.why_undecodable(m)) is not None:
            return f"Layers below a {type(m).__name__} get no gradient: {why}."
        return super().ready(m)


def move_snapshot(value: object, device: torch.device | None) -> object:
    """Return a value of a snapshot on a device, dictionaries included; a Parameter stays one.

    Values that are no tensors, tensors that are there already, and all values if `device` is None, are returned as they
    are. Dictionaries are always new. A moved plain parameter has no gradient and does not require one.
    """
    if isinstance(value, dict):
        return {key: move_snapshot(inner, device) for key, inner in value.items()}
    if not isinstance(value, Tensor) or device is None or value.device == device:
        return value
    to = value.to(device)
    return to if isinstance(to, nn.Parameter) or not isinstance(value, nn.Parameter) else nn.Parameter(to, False)
