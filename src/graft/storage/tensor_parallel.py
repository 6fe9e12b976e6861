# SPDX-License-Identifier: Apache-2.0
"""Layers that transformers' tensor parallelism has cut: each process computes with its piece of the weight.

The weight is a DTensor, as under FSDP2; but FSDP2 gathers it before the module runs. The module tells the two apart:
`tp_plan` replaces its forward by one that knows its style and its processes. Adapters act only on styles that cut a
linear layer's inputs or outputs in plain pieces.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.core.errors import UnsupportedLayerError
from graft.core.ops import Op, find_op
from graft.core.pieces import LayerPiece
from graft.kernels.cuts import Cut
from graft.storage import megatron, offload
from graft.storage.dense import Dense
from graft.storage.parallel import is_sharded, local, shard_value

STYLES = "transformers.distributed.tensor_parallel"  # where transformers has them, from 5.17 on
OF_EXPERTS = "transformers.distributed.expert_parallel"  # of whole experts, some on each process: `ep_size`
WHOLE = ("EmbeddingParallel", "TensorParallelLayer")  # with inputs and outputs as without parallelism


class Style(NamedTuple):
    """A style of transformers' tensor parallelism, as one module runs it."""

    name: str  # in a plan
    kind: str  # name of its class
    home: str  # module of its class
    it: Any  # the style object; None if the forward does not hold it
    mesh: Any


def style_of(module: nn.Module) -> Style | None:
    """Return the style of a module's tensor parallelism; None without one.

    It is read from the closure of a forward that transformers has replaced, with the style object if the closure holds
    one. Else it comes from `_hf_tp_plan`: that style has only a name and a mesh, no kind and no object. The mesh is
    that of processes with one batch, also for dispatched experts.
    """
    forward = module.__dict__.get("forward")
    if type(forward) is FunctionType and forward.__module__ in (STYLES, OF_EXPERTS):
        kind, _, installs = forward.__qualname__.partition(".install_forward")
        if installs:
            closure = dict(zip(forward.__code__.co_freevars, (c.cell_contents for c in forward.__closure__ or ())))
            it = closure.get("self")
            kind, home = kind if it is None else type(it).__name__, forward.__module__
            mesh = getattr(closure.get("implementation"), "tp_mesh", closure.get("ep_mesh"))
            return Style(_name(kind, it, home), kind, home, it, closure.get("mesh", mesh))
    plan = module.__dict__.get("_hf_tp_plan")
    return None if plan is None else Style(str(plan), "", STYLES, None, module.__dict__.get("_hf_device_mesh"))


def _name(kind: str, it: object, home: str) -> str:
    """Return the name of a style in transformers' table of styles; `kind`, the name of its class, if the table lacks
    it.

    The object `it` is looked up; if it is None, a style of that class.
    """
    known = sys.modules[home].ALL_PARALLEL_STYLES
    names = [name for name in known if known[name] is it or (it is None and type(known[name]).__name__ == kind)]
    return names[0] if names else kind


def find_parallel_piece(module: nn.Module, op: Op) -> LayerPiece | None:
    """Return this process's piece of a layer's work, with the cut of its outputs or inputs.

    Outputs are cut in a column parallel style with sharded outputs and in a packed one; inputs in a row parallel style
    with sharded inputs. Other styles, and one process alone, have no cut. None if the module has no style, its Op is
    unknown, or `why_not_cut` has a reason.
    """
    style = style_of(module)
    if style is None or not op.known or why_not_cut(module, style) is not None:
        return None
    group, it = style.mesh.get_group(), style.it
    place = dict(group=group, rank=style.mesh.get_local_rank(), world=style.mesh.size())
    out_features, in_features = op.dims(module)
    inputs = outputs = None
    if place["world"] > 1 and style.kind == "ColwiseParallel" and it.output_layouts.is_shard():
        outputs = Cut(size=out_features, **place)
    elif place["world"] > 1 and style.kind == "PackedColwiseParallel":
        outputs = Cut(size=out_features, stripes=it.split_factor, **place)
    elif place["world"] > 1 and style.kind == "RowwiseParallel" and it.input_layouts.is_shard():
        inputs = Cut(size=in_features, **place)
    return LayerPiece(style.name, group, inputs, outputs)


def find_parallel_group(module: nn.Module) -> dist.ProcessGroup | None:
    """Return the group of processes that compute a parallel module together; None for another module or
    without a mesh.
    """
    style = style_of(module)
    return None if style is None or style.mesh is None else style.mesh.get_group()


def why_not_cut(module: nn.Module, style: Style) -> str | None:
    """Return why a parallel module has no plain pieces of inputs or outputs; None if it has.

    The style TensorParallelLayer never has a reason. All others need a weight that is a DTensor over a mesh of one
    dimension, and `use_local_output`, so that they return no DTensor. EmbeddingParallel, for layers that are whole on
    each process, needs nothing else. ColwiseParallel needs replicated inputs, and RowwiseParallel replicated outputs;
    its other side is replicated or cut along the last dimension. PackedColwiseParallel needs no bias, and
    `out_features` that `split_factor` divides. Other styles have no rule.
    """
    kind, it = style.kind, style.it
    weight = module._parameters.get("weight")
    if kind == "TensorParallelLayer":
        return None
    if weight is None or not is_sharded(weight) or style.mesh is None or style.mesh.ndim != 1:
        return "its weight is not a DTensor over one dimension of processes, as transformers makes it from 5.17 on"
    if not getattr(it, "use_local_output", False):
        return "it returns a DTensor"
    right = kind in WHOLE
    if kind == "ColwiseParallel":
        right = it.input_layouts.is_replicate() and (it.output_layouts.is_replicate() or _last(it.output_layouts))
    elif kind == "RowwiseParallel":
        right = it.output_layouts.is_replicate() and (it.input_layouts.is_replicate() or _last(it.input_layouts))
    elif kind == "PackedColwiseParallel":
        if module._parameters.get("bias") is not None:  # transformers cuts it without stripes, which the weight has
            return "its bias is cut in another way than its weight, so that the model itself computes other outputs"
        right = module.out_features % it.split_factor == 0
    return None if right else "graft has no rule for it"


def _last(layout: Any) -> bool:
    """Return True if a layout shards the last dimension, as 1 or -1."""
    return bool(layout.is_shard() and layout.dim in (-1, 1))


def standalone(module: nn.Module) -> nn.Module:
    """Return a copy of a module with all tensors in memory, whole on each process, and without parallel forwards.

    DTensors are gathered, so that every process must call this; offloaded tensors are loaded. Gathered parameters are
    new, with their requires_grad. A module without a parallel style is only copied. Raises the errors of `list_styles`.
    """
    styles = list_styles(module)
    if not styles:
        return offload.copy_into_memory(module)
    cut = [p for p in module.parameters() if is_sharded(p)]
    whole: dict[int, object] = {id(p): nn.Parameter(gather_dtensor(p.detach()).clone(), p.requires_grad) for p in cut}
    clone = offload.copy_into_memory(module, whole)
    for path in styles:
        del clone.get_submodule(path).__dict__["forward"]
    return clone


def list_styles(module: nn.Module) -> list[str]:
    """Return the paths of the parallel modules in a module that is to be copied whole; "" is the module itself.

    Raises:
        UnsupportedLayerError: a layer of Megatron in it has a piece of its weight. Or a parallel module, unless its
            style is EmbeddingParallel or TensorParallelLayer, takes or returns pieces, or has no known pieces; the copy
            would not.
    """
    styles = [(path, m, style) for path, m in module.named_modules() if (style := style_of(m)) is not None]
    child = next((m for m in module.modules() if megatron.KINDS.find(type(m)) and megatron.find_cut(m)), None)
    if child is not None:
        raise UnsupportedLayerError(
            f"A {type(child).__name__} has a piece of its weight, and a copy of it, which would train whole, has no "
            "place in the model. Take it out of modules_to_save, or name other target_modules."
        )
    for path, m, style in styles:
        piece = find_parallel_piece(m, find_op(m))
        if style.kind not in WHOLE and (piece is None or piece.inputs is not None or piece.outputs is not None):
            name = f"'{path}' in it" if path else f"The {type(m).__name__}"
            why = "a copy of it, which would train whole, has no place in the model"
            raise UnsupportedLayerError(f"{name}: {_explain_style(style, why)}.")
    return [path for path, *_ in styles]


def why_no_parallel_adapter(module: nn.Module, op: Op, inside: bool) -> str | None:
    """Return why tensor parallelism keeps a module from being adapted; None if it does not.

    A module with a style gets the reason of `why_not_cut`, or "no rule" if its Op is unknown or opaque; modules inside
    it are then not looked at. The text names the style.

    inside: the adapter computes with modules inside this one, which then must not be parallel either.
    """
    style = style_of(module)
    if style is not None:
        why = why_not_cut(module, style) if op.known and not op.opaque else "graft has no rule for it"
        return None if why is None else _explain_style(style, why)
    if not inside:
        return None
    child_style = next((s for m in module.modules() if (s := style_of(m)) is not None), None)
    why = "the adapter would take the piece of one process for the whole"
    return None if child_style is None else _explain_style(child_style, why)


def _explain_style(style: Style, why: str) -> str:
    """Return a text with the style's name, the reason `why` and the remedy: no ep_size for experts, else another
    tp_plan.
    """
    if style.home == OF_EXPERTS:
        return f"It is expert parallel by the style '{style.name}', and {why}. Load the model without ep_size"
    return (
        f"It is tensor parallel by the style '{style.name}', and {why}. Load the model without tp_plan, or with a plan "
        "that leaves the module out"
    )


class TensorParallel(Dense):
    """The store of transformers' pieces of dense weights.

    All processes have to take part in reads, writes and restores.
    """

    name, live, exact = "tensor parallel", False, True
    in_parts = True
    copies = "all"  # it may be a view of a DTensor

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        """Return the whole tensor, gathered, with a gradient where autograd records and it trains; a plain tensor
        itself.
        """
        return gather_dtensor(self.tensor(m, name))

    def piece(self, m: nn.Module, op: Op) -> tuple[Tensor, Cut | None, Cut | None]:
        """Return this process's piece of the weight (canonical), and the cuts of its rows and columns.

        At most one of the cuts is set; both are None if the weight is whole on each process, or there is only one. Only
        the first placement of the DTensor counts; its `split_factor`, 1 without, gives the stripes.
        """
        t: Any = m.weight
        mesh, shard = t.device_mesh, t.placements[0]
        if mesh.size() == 1 or not hasattr(shard, "dim"):
            return op.canon(local(t)), None, None
        dim = (shard.dim % t.dim()) ^ op.transposed
        stripes = getattr(shard, "split_factor", 1)
        cut = Cut(mesh.get_group(), mesh.get_local_rank(), mesh.size(), op.shape(m)[dim], stripes)
        return op.canon(local(t)), *((cut, None) if dim == 0 else (None, cut))

    @torch.no_grad()
    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> None:
        """Copy this process's piece of the whole W into the tensor in place, in its dtype.

        If the weight is tied (`shared`), the module gets a new parameter with the piece, with the same requires_grad.
        """
        if is_sharded(p := self.tensor(m, name)):
            W = shard_value(W.detach().to(p.dtype), p.device_mesh, p.placements)
        super().write(m, name, W, shared)

    def snapshot_values(self, m: nn.Module, name: str, state: Tensor) -> Tensor:
        """Return the whole tensor of a snapshot, gathered; a plain tensor itself."""
        return gather_dtensor(state)


def gather_dtensor(t: Tensor) -> Tensor:
    """Return the whole tensor of a DTensor; other tensors unchanged. Every process of the mesh must call this.

    The result has a gradient if the tensor trains and autograd records; else it is detached.
    """
    if not is_sharded(t):
        return t
    return (t if t.requires_grad and torch.is_grad_enabled() else t.detach()).full_tensor()  # type: ignore[attr-defined]
