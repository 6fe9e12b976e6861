# SPDX-License-Identifier: Apache-2.0
"""The store of weights that are plain tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graft.core.ops import TypeTable, class_path, find_replaced_forward
from graft.core.wrappers import MANAGED, collect_parameters, copy_offloaded, find_offload_hooks
from graft.storage.offload import bring_in, device_of, is_hooked, is_tied
from graft.storage.parallel import gather_tensor, layout_of, local

# narrower dtypes have scales in another tensor
NUMBERS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
PLAIN = frozenset({Tensor, nn.Parameter})
LIKE_PLAIN: TypeTable[bool] = TypeTable(  # types of tensors that are read and written like plain ones
    {
        "torch.distributed.tensor.DTensor": True,
        "torch._subclasses.fake_tensor.FakeTensor": True,
        "torch.nn.parameter.UninitializedParameter": True,
    }
)


def strange_tensor(m: nn.Module, name: str) -> str | None:
    """Return why a parameter or buffer of a module is not a plain tensor of floating-point numbers; None if it is.

    Reasons are a tensor class that graft does not know, and a dtype other than float64, float32, bfloat16 and float16.
    Also None if the module has no such parameter or buffer: it is then absent, or computed from others.
    """
    t: Tensor | None = m._parameters.get(name)
    t = m._buffers.get(name) if t is None else t
    if t is None:
        return None
    kind = type(t)
    if kind not in PLAIN and not LIKE_PLAIN.find(kind):
        return f"its {name} is of type {kind.__name__}, which graft does not know"
    if t.dtype not in NUMBERS:
        return f"its {name} holds {str(t.dtype).removeprefix('torch.')}, not plain floating-point numbers"
    return None


def is_composed(t: Tensor) -> bool:
    """Return True if a tensor owns no memory: its type computes its values from other tensors.

    False for plain tensors and parameters, for types without a `__torch_dispatch__` of their class, and for DTensor,
    FakeTensor and UninitializedParameter.
    """
    kind = type(t)
    return not (kind in PLAIN or kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or LIKE_PLAIN.find(kind))


def plain_tensors(t: Tensor) -> list[Tensor] | None:
    """Return the plain tensors that hold the values of a tensor; None if its type, or one inside, does not show them.

    A composed tensor that torch can flatten gives those of all its inner tensors, otherwise None. A plain one, a
    DTensor, a FakeTensor and an UninitializedParameter give themselves. Any other subclass gives one plain tensor with
    the same memory, detached.
    """
    if is_composed(t):
        if not is_traceable_wrapper_subclass(t):
            return None
        parts = [plain_tensors(getattr(t, name)) for name in t.__tensor_flatten__()[0]]
        return None if None in parts else [p for part in parts for p in part]
    if type(t) in PLAIN or LIKE_PLAIN.find(type(t)):
        return [t]
    with torch._C.DisableTorchFunctionSubclass():  # such a subclass only adds attributes
        return [t.detach().as_subclass(Tensor)]


def strange_forward(m: nn.Module) -> str | None:
    """Return why a module may use its weight differently from its row of OPS, with the remedy, as one text.

    None if the module has no replaced forward.
    """
    return "".join(explain_forward(m) or ()) or None


def explain_forward(m: nn.Module) -> tuple[str, str] | None:
    """Return the reason and the remedy for a module with a replaced forward, whether of its class or of itself alone.

    The reason names the class in OPS that the forward replaces. None if the forward is a known one.
    """
    known = find_replaced_forward(m)
    if known is None:
        return None
    return (
        f"{type(m).__name__} has a replaced forward, which may use its weight in another way than {known.__name__} "
        "does",
        f": if it does not, say so with graft.core.ops.OPS.add('{class_path(type(m))}', "
        f"graft.core.ops.OPS.find({class_path(known)}))",
    )


def why_flat(m: nn.Module, name: str) -> str | None:
    """Return why a parameter cannot be read or written: FSDP manages the module, and keeps the tensor in a flat
    parameter.

    None if FSDP does not manage it, there is no such parameter, or its layout can be written (FSDP2).
    """
    t = collect_parameters(m).get(name) if MANAGED in m.__dict__ else None
    layout = None if t is None else layout_of(t)
    return explain_parts(name, layout.name) if layout is not None and not layout.writable else None


def explain_parts(name: str, layout: str) -> str:
    """Return the reason and the remedy, in one text, for a tensor that a layout spreads over processes.

    The remedy is the same for all layouts: save the adapter and merge it in a model of one process. The layout is only
    named.
    """
    return (
        f"its {name} is in parts, which {layout} puts together for a call of the module: save the adapter, and load it "
        "into a model of one process to merge it"
    )


class Dense:
    """The store of plain tensors, read and written in place. It is the base class of the other stores."""

    name = "dense"
    exact = live = True
    in_parts = False
    copies = ""  # the outputs that are copied before rows are written into them: "views" or "all"

    def why_unreadable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why a call cannot read a tensor: its class or dtype is strange, or FSDP1 has it in a flat parameter.

        None if it can, also for a tensor that is absent or computed.
        """
        t = m._parameters.get(name)
        if type(t) in PLAIN and t.dtype in NUMBERS and MANAGED not in m.__dict__:  # type: ignore[union-attr]
            return None  # the quick answer for nearly all tensors
        return strange_tensor(m, name) or why_flat(m, name)

    def tensor(self, m: nn.Module, name: str) -> Tensor:
        """Return the attribute `name` of the module, which `write`, `snapshot` and `restore` act on."""
        return getattr(m, name)

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        """Return the module's tensor itself, in the module's orientation and with its gradient.

        For an offloaded tensor on the meta device return a copy of the stored values. A tensor without numbers, which
        ZeRO-3 empties between calls, is gathered: every process must call this.
        """
        t: Tensor = getattr(m, name)
        if t.is_meta and find_offload_hooks(m):
            return copy_offloaded(m, name)
        return t if t.numel() else gather_tensor(t)

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why a merge cannot write the parameter or buffer `name`; None if it can.

        The first reason that holds, in this order:

        - FSDP1 or ZeRO-3 has it in parts.
        - It is computed from other tensors, as by a parametrization: no parameter or buffer has its name.
        - Its class or dtype is strange.
        - It has a sharded layout that cannot be written.
        - It is on the meta device and tied to another module.
        - It is on the meta device and has no offload hook.
        """
        t: Tensor | None = m._parameters.get(name)
        if t is None:
            t = m._buffers.get(name)
        if (why := why_flat(m, name)) is not None:
            return why
        if t is None:
            return (
                f"its {name} is computed from other tensors: make it a plain parameter first, with torch's "
                "parametrize.remove_parametrizations, remove_weight_norm or prune.remove"
            )
        if (why := strange_tensor(m, name)) is not None:
            return why
        if (layout := layout_of(t)) is not None and not layout.writable:
            return explain_parts(name, layout.name)
        if t.is_meta and is_tied(m, name):
            return f"its {name} is offloaded and tied to that of another module: have the model on real devices first"
        if t.is_meta and not find_offload_hooks(m):
            return f"its {name} is on the meta device, not loaded or offloaded: have the model on real devices first"
        return None

    def why_tied_unwritable(self, name: str) -> str | None:
        """Return None: the module of a tied tensor can get another tensor."""
        return None

    def bring_in(self, layer: nn.Module, written: nn.Module | None = None) -> AbstractContextManager[None]:
        """Return a context that loads offloaded tensors of `layer` with its children.

        Changes to tensors of `written` are kept afterwards. Without accelerate's hooks on the base layer it does
        nothing.
        """
        return bring_in(layer, written) if is_hooked(layer) else nullcontext()

    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> None:
        """Write W into the tensor in place, past autograd; of DTensors, this process's piece.

        If the weight is tied to another module (`shared`), the module gets a new parameter with W's memory if W is
        contiguous, and the other module stays.
        """
        p = self.tensor(m, name)
        if shared:
            setattr(m, name, nn.Parameter(W.contiguous(), requires_grad=p.requires_grad))
        else:
            local(p.data).copy_(local(W))

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> Any:
        """Return a detached copy of the tensor, on the CPU if the module has an offload hook, else on its device.

        If the weight is tied (`shared`), return the parameter itself.
        """
        p = self.tensor(m, name)
        if shared:
            return p
        return p.detach().to("cpu", copy=True) if find_offload_hooks(m) else p.detach().clone()

    def snapshot_values(self, m: nn.Module, name: str, state: Any) -> Tensor:
        """Return the snapshot: it is the tensor."""
        return state

    def restore(self, m: nn.Module, name: str, state: Any) -> None:
        """Put a snapshot back: a parameter becomes the module's parameter again, which ties it; a tensor is copied in
        place, of DTensors this process's piece.
        """
        if isinstance(state, nn.Parameter):
            setattr(m, name, state)
        else:
            local(self.tensor(m, name).data).copy_(local(state))

    def where(self, m: nn.Module, name: str = "weight") -> tuple[torch.device | None, torch.dtype | None]:
        """Return device and dtype of a tensor.

        For one on the meta device it is the device that accelerate runs the module on, if it does. A computed attribute
        counts, too. A block without the tensor answers by the first parameter below it, a module without any by (None,
        None). The dtype is None if it is no floating-point one.
        """
        p, owner = m._parameters.get(name), m
        if p is None:
            p = getattr(m, name, None)
        if p is None:  # a block: its first parameter decides
            owner, p = next(((o, p) for o in m.modules() for p in o._parameters.values() if p is not None), (m, None))
        if p is None:
            return None, None
        device = p.device
        if device.type == "meta":
            device = device_of(owner) or device
        return device, p.dtype if p.is_floating_point() else None

    def protect(self, y: Tensor) -> Tensor:
        """Return the output, or a copy of one that rows cannot be written into in place.

        `copies` decides: "all" copies each output, "views" only views, any other none.
        """
        return y.clone() if self.copies == "all" or (self.copies == "views" and y._is_view()) else y
