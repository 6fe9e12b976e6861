# SPDX-License-Identifier: Apache-2.0
"""A block of experts: one object for a module that holds the matrices of all its experts as stacks.

`ExpertBlock` is the only place that knows such modules. Others ask it:

- `inject/` asks for the packed stacks and their shapes, for the order of parameters, for the orientation, and whether
  graft can run the module. A site of a stack has its block in `Site.experts`.
- `core/plan.py` and `core/mixed.py` let the block run its module with the updates of adapters. These updates are
  views of the adapters' tensors, one part per expert (`core/each.py`).
- `storage/codes.py` lets the block prepare a module with packed stacks for training, and undo that.
- `storage/find.py` takes `PACKED_STACK` as the store of a packed stack; its formats are in `storage/stacks.py`.
- `kernels/experts.py` has the arithmetic: tokens sorted by expert, one product per expert in use.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graft.core.errors import RoutingError, UnsupportedLayerError
from graft.core.method import Layer
from graft.core.rows import Rows
from graft.kernels.experts import StackUpdate, UpdatedStack, run_experts
from graft.kernels.waits import constant
from graft.storage import stacks
from graft.storage.dense import PLAIN, Dense
from graft.storage.dispatch import RUNS, Dispatch, find_dispatch, is_dispatched_stack
from graft.storage.fsdp2 import is_managed
from graft.storage.offload import computes_on, is_away
from graft.storage.parallel import local
from graft.storage.stacks import PackedMatrices

GATE = "_apply_gate"
FLAGS = ("has_gate", "has_bias", GATE, "num_experts")  # attributes that transformers' decorator sets
HOOKED = "_is_hooked"  # gpt-oss: experts with this mark get routes as other blocks do, not those of kernels
MENDED = "_graft_routes"  # mark on modules that `ExpertBlock.prepare` has changed
UPDATES = "_graft_updates"  # mark on a module while layers around it run


@dataclass
class Updates:
    """The updates that layers add to the stacks of one block in one call."""

    key: str = ""  # of the outermost layer
    rows: Rows | None = None  # of a batch with several adapters; None: the updates act on all rows
    of_stacks: dict[str, Callable[[int], Sequence[StackUpdate]]] = field(default_factory=dict)  # number of tokens → …
    # of dispatched experts, in a call with rows: by stack the adapters that the groups of its updates are
    adapters: dict[str, Sequence[str]] = field(default_factory=dict)
    columns: Sequence[str] = ()  # all adapters on the stacks, equal on all processes: each token has a mark for each

    def mark_tokens(self, x: Tensor) -> Tensor:
        """Return tokens (tokens, width) with one more column for each adapter in `columns` behind: 1 where its row uses
        it, else 0. The result is a new tensor in the dtype of `x`.
        """
        assert self.rows is not None
        table = [[float(name == key) for name in self.columns] for key in self.rows.groups]
        flat = constant(tuple(mark for marks in table for mark in marks), x.dtype, x.device)
        marks = flat.view(len(table), -1)[self.rows.groups_of_tokens(len(x), self.key, x.device)]
        return torch.cat([x, marks], 1)

    def read_marks(self, x: Tensor) -> tuple[Tensor, dict[str, list[StackUpdate]]]:
        """Return marked tokens without their last columns, the marks, and the updates by stack, each with its adapter's
        marks as gate.

        The marks are detached. Updates without a group are dropped; the others lose it.
        """
        columns = self.columns
        x, marks = x.split([x.shape[1] - len(columns), len(columns)], 1)
        updates = {}
        for stack, make in self.of_stacks.items():
            gates = [marks.detach()[:, columns.index(name)] for name in self.adapters[stack]]
            updates[stack] = [u._replace(group=None, gate=gates[u.group]) for u in make(len(x)) if u.group is not None]
        return x, updates


@dataclass(frozen=True)
class ExpertBlock:
    """A module of experts. Any module has one; a module without stacks has an empty `packed` and cannot run."""

    module: Any  # nn.Module

    @property
    def is_mxfp4(self) -> bool:
        """True if the module is transformers' block of gpt-oss's experts in MXFP4."""
        return stacks.MODULES.find(type(self.module)) is stacks.MXFP4

    @property
    def names(self) -> tuple[str, str] | None:
        """The names of the two stacks, input first; None if graft does not know how the module computes.

        graft knows MXFP4 blocks, and modules with `has_gate`, `has_bias`, `_apply_gate` and `num_experts`, which
        transformers' decorator of experts sets. The first stack is `gate_up_proj`, or `up_proj` in a module without
        gate; the second `down_proj`.
        """
        if self.is_mxfp4:
            return "gate_up_proj", "down_proj"
        known = all(hasattr(self.module, flag) for flag in FLAGS)
        return ("gate_up_proj" if self.module.has_gate else "up_proj", "down_proj") if known else None

    @property
    def packed(self) -> dict[str, PackedMatrices]:
        """The packed stacks of the module by name, read anew at each use; {} if it has none.

        The names are those of `stacks.list_packed_names` of the module, not `names`. One without a stack is left out.
        """
        names = stacks.list_packed_names(self.module)
        return {name: stack for name in names if (stack := stacks.find_matrices(self.module, name)) is not None}

    @property
    def parameters(self) -> list[str]:
        """The names of the module's parameters.

        In a module with packed stacks all three names of stacks come first, whether it has them or not. Dense and
        packed modules thus have the same order.
        """
        return [*dict.fromkeys([*(stacks.NAMES if self.packed else ()), *self.module._parameters])]

    @property
    def is_transposed(self) -> bool:
        """True if the module has its dense stacks as (experts, in, out): its `is_transposed` says so, or it is an MXFP4
        block.
        """
        return bool(getattr(self.module, "is_transposed", False)) or self.is_mxfp4

    @property
    def sizes(self) -> dict[str, int]:
        """The number of matrices of each stack: of the packed stacks, or else of all parameters with three dimensions.

        A parameter with the name `weight` is no stack of experts.
        """
        dense = {n: p for n, p in self.module._parameters.items() if p is not None and p.dim() == 3 and n != "weight"}
        return {name: stack.shape[0] for name, stack in (self.packed or dense).items()}

    @property
    def can_run(self) -> bool:
        """True if graft can run the module: it knows how, and both stacks are packed, or plain tensors of three
        dimensions, at least during a call, as sharded by FSDP2 or dispatched.
        """

        def is_readable(name: str) -> bool:
            """Return True if a call finds a plain tensor of three dimensions at `name`, or a packed stack.

            A parameter that FSDP2 has sharded and a dispatched stack count as plain.
            """
            p = self.module._parameters.get(name)
            is_plain = p is not None and p.dim() == 3 and (type(p) in PLAIN or is_managed(self.module, name))
            return (
                is_plain
                or is_dispatched_stack(self.module, name)
                or stacks.find_stack_class(self.module, name) is not None
            )

        return self.names is not None and all(map(is_readable, self.names))

    @property
    def dispatch(self) -> Dispatch | None:
        """How transformers dispatches tokens between processes; None if each process has all experts."""
        return find_dispatch(self.module)

    def packed_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the canonical shape (experts, out, in) of a packed stack; None if the parameter is no packed stack."""
        stack = stacks.find_matrices(self.module, name)
        return None if stack is None else stack.shape

    def find_stack(self, name: str) -> Any:
        """Return a stack in canonical orientation (experts, out, in): `PackedMatrices`, or a tensor.

        The tensor is the parameter itself, or a transposed view of it if the module is transposed.

        Raises:
            UnsupportedLayerError: a packed stack cannot be read.
            RoutingError: a dense stack is no plain tensor, or it trains while autograd records.
        """
        m = self.module
        stack = stacks.find_matrices(m, name)
        if stack is not None:
            if (why := stack.why_unreadable) is not None:
                raise UnsupportedLayerError(f"The stack {name} of a {type(m).__name__} cannot be read: {why}.")
            return stack
        W: Any = m._parameters[name]
        if type(W) not in PLAIN or (W.requires_grad and torch.is_grad_enabled()):
            raise RoutingError(
                f"The stack {name} of a {type(m).__name__} trains, is spread over processes, or has an adapter that "
                "is no product. Rows with different adapters and gates need a frozen stack on this process."
            )
        return W.mT if getattr(m, "is_transposed", False) else W

    def run(self, updates: Updates, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the output of the module, (tokens, width), computed by graft, with updates on its stacks.

        Routes, biases and activation are the module's, and so is `post_expert_norm` with `has_post_expert_norm`. `args`
        and `kwargs` are those of its forward: hidden states, indices of experts, weights of routes. With `updates.rows`
        each token gets the updates of its group; with `updates.adapters` the marks in the hidden states select them.
        Under a dispatch the updates are cut to this process's experts.

        Raises:
            RoutingError: rows have different adapters in a module with `_is_expert_parallel`, or a dense stack cannot
                be used.
            UnsupportedLayerError: a packed stack cannot be read.
        """
        m, (x, index, weights) = self.module, self.bind(args, kwargs)
        rows, group, groups, dispatch = updates.rows, None, 1, self.dispatch
        if updates.adapters:
            x, parts = updates.read_marks(x)
        else:
            if rows is not None:
                if getattr(m, "_is_expert_parallel", False):
                    self.refuse_rows(updates.key)
                group, groups = rows.groups_of_tokens(len(x), updates.key, x.device), len(rows.groups)
            parts = {name: list(make(len(x))) for name, make in updates.of_stacks.items()}
        if dispatch is not None:
            parts = {
                name: [dispatch.cut_update(update, updates.key) for update in updates_of_stack]
                for name, updates_of_stack in parts.items()
            }
        biased = self.is_mxfp4 or m.has_bias
        up, down = (
            UpdatedStack(self.find_stack(n), parts.get(n, ()), getattr(m, f"{n}_bias") if biased else None)
            for n in self.names or ()
        )
        act = partial(apply_clamped_gate, m) if self.is_mxfp4 else getattr(m, GATE) if m.has_gate else m.act_fn
        norm = m.post_expert_norm if getattr(m, "has_post_expert_norm", False) else None
        return run_experts(x, index, weights, up, act, down, norm, group, groups)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of a call as a tuple of positional ones, in the order of the forward of the module's
        class.

        Without keyword arguments return `args` unchanged. Raises TypeError for arguments that the forward does not
        take.
        """
        if not kwargs:
            return args
        bound = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs)
        return *bound.args[1:], *bound.kwargs.values()

    def run_updated(
        self,
        layer: Layer,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        updates: Callable[[int], Sequence[StackUpdate]],
        rows: Rows | None,
        adapters: Sequence[str] = (),
    ) -> object:
        """Return the output of a layer's base with updates on the layer's stack.

        The outermost of the layers around the module replaces the module's forward by `run` for the call, and restores
        it afterwards. Layers below it find its mark on the module, add their updates to it, and call their base. Of
        dispatched experts `run` replaces the forward that gets the tokens of this process's experts.

        Args:
            updates: number of tokens → the updates.
            rows: the rows of a batch with several adapters; None: the updates act on all rows.
            adapters: of dispatched experts in a call with rows: all on the layer. The group of an update is an index
                into them, and each token takes marks of its row's adapters along to the process of its expert.

        Raises:
            RoutingError: the experts are dispatched, and the call has gates.
        """
        attributes, name = self.module.__dict__, layer.site.parameter
        if UPDATES in attributes:
            attributes[UPDATES].of_stacks[name] = updates
            if adapters:
                attributes[UPDATES].adapters[name] = adapters
            return layer.base_layer(*args, **kwargs)
        place, before = self.find_forward()
        homes, dispatch = [attributes], self.dispatch
        shared = Updates(layer.site.key, rows, {name: updates})
        if dispatch is not None:
            if layer.call.current_gates() is not None:
                self.refuse_rows(layer.site.key)
            homes, place = list(dispatch.places), RUNS
            before = homes[0][place]
        if adapters:
            shared.adapters[name], shared.columns = adapters, list_adapters_around(layer)
            x, *args_of_routes = self.bind(args, kwargs)
            args, kwargs = (shared.mark_tokens(local(x)), *args_of_routes), {}
        attributes[UPDATES] = shared
        for home in homes:
            home[place] = lambda *args, **kwargs: self.run(shared, args, kwargs)
        try:
            return layer.base_layer(*args, **kwargs)
        finally:
            del attributes[UPDATES]
            for home in homes:
                del home[place]
                if before is not None:
                    home[place] = before

    run_updated._torchdynamo_disable = True  # type: ignore[attr-defined]  # the host must know how many rows experts have

    @staticmethod
    def refuse_rows(key: str) -> NoReturn:
        """Raise RoutingError: gates, generators of adapters, or several adapters of one row cannot reach the process of
        a token's expert.
        """
        raise RoutingError(
            f"Layer '{key}' takes one adapter for each row under expert parallelism, without gates, as it gets tokens "
            "of other processes. Use adapter_names alone, or load the model with fsdp_size and without ep_size."
        )

    def find_forward(self) -> tuple[str, Any]:
        """Return the name of the attribute that the module's calls run, and its value on the module; None: the class's
        is used.

        The name is `_old_forward` if accelerate has set that, else `forward`.
        """
        place = "_old_forward" if "_old_forward" in self.module.__dict__ else "forward"  # accelerate calls the first
        return place, self.module.__dict__.get(place)

    def prepare(self) -> None:
        """Replace the forward of a module with packed stacks: it passes gradients on, and no whole stack is ever dense.

        The module's own forward still runs where it has a gradient or needs none. Marks the module, and an MXFP4 block
        also as hooked, so that it is called with routes. Does nothing for a module without packed stacks, one that
        graft cannot run, and on a second call; `release` undoes it. It replaces the function that calls run
        (`_old_forward` under accelerate), and is left out of torch.compile. Gradients are wanted if autograd records
        and the input or the routes' weights require one. `release` gets the earlier forward and whether the hook mark
        was set.
        """
        m = self.module
        if MENDED in m.__dict__ or not self.packed or not self.can_run:
            return
        place, before = self.find_forward()
        hooked = self.is_mxfp4 and not hasattr(m, HOOKED)

        def forward(m: nn.Module, *args: Tensor, **kwargs: Tensor) -> object:
            """Run the module's earlier forward if all its packed stacks can run this input, else `ExpertBlock.run`
            without updates.

            Gradients are wanted if autograd records and the input or the weights of routes require one.
            """
            block = ExpertBlock(m)
            x, _, weights = block.bind(args, kwargs)
            trains = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
            if all(stack.runs(m, x, trains) for stack in block.packed.values()):
                return type(m).forward(m, *args, **kwargs) if before is None else before(*args, **kwargs)
            return block.run(Updates(), args, kwargs)

        forward._torchdynamo_disable = True  # type: ignore[attr-defined]
        m.__dict__[place] = method = MethodType(forward, m)
        m.__dict__[MENDED] = method, before, hooked
        if hooked:
            m.__dict__[HOOKED] = True

    def release(self) -> None:
        """Give the module the forward that it had before `prepare`, and take the marks off.

        Does nothing without the mark of `prepare`. A forward that someone has replaced since stays; accelerate's
        `_old_forward` is restored, too. An MXFP4 block is hooked no longer, if `prepare` marked it so.
        """
        attributes = self.module.__dict__
        if MENDED not in attributes:
            return
        method, before, hooked = attributes.pop(MENDED)
        for place in ("_old_forward", "forward"):
            if attributes.get(place) is method:
                del attributes[place]
                if before is not None:
                    attributes[place] = before
        if hooked:
            attributes.pop(HOOKED)


def list_adapters_around(layer: Any) -> list[str]:
    """Return the names of all adapters on a layer and on the layers beneath it, sorted, each once.

    Follows `base_layer` down to the first object without that attribute.
    """
    names: set[str] = set()
    while hasattr(layer, "base_layer"):
        names.update(layer.methods)
        layer = layer.base_layer
    return sorted(names)


def apply_clamped_gate(m: nn.Module, y: Tensor) -> Tensor:
    """Return gpt-oss's activation of y (rows, 2 · inner): (up + 1) · gate · sigmoid(alpha · gate), (rows, inner).

    Even columns are the gate, clamped from above to the module's `limit`; odd ones `up`, clamped to ± `limit`.
    """
    gate, up = y[:, ::2].clamp(max=m.limit), y[:, 1::2].clamp(-m.limit, m.limit)
    return (up + 1) * gate * torch.sigmoid(gate * m.alpha)


class PackedStack(Dense):
    """The store of one packed stack of a module of experts. `name` is the stack's parameter."""

    name = "stack"
    exact = live = False

    def why_unreadable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why the packed stack cannot be read: the module is offloaded, or the format's reason.

        None if it can.
        """
        away = "it is offloaded: it is there only while the module itself is called"
        return away if is_away(m) else self.snapshot(m, name).why_unreadable

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why a merge cannot write the packed stack: it cannot be read, or its format cannot be written.

        None if it can.
        """
        return self.why_unreadable(m, name) or self.snapshot(m, name).why_unwritable

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        """Return the whole stack dense, in the module's orientation, in the stack's dtype or float32 if that is not
        known.

        Raises UnsupportedLayerError if the stack cannot be read.
        """
        return self.snapshot_values(m, name, ExpertBlock(m).find_stack(name))

    def snapshot_values(self, m: nn.Module, name: str, state: PackedMatrices) -> Tensor:
        """Return the whole stack of a snapshot dense, without gradients, in the module's orientation, in its dtype or
        float32.
        """
        with torch.no_grad():
            W = state.dense(range(state.shape[0]), state.dtype or torch.float32)
            return W.mT if ExpertBlock(m).is_transposed else W

    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> None:
        """Quantize W (in the module's orientation) matrix by matrix with the old settings, and put new tensors into the
        module.

        Earlier snapshots keep their values. Returns None. `shared` changes nothing.
        """
        with torch.no_grad():
            self.snapshot(m, name).remake((W.mT if ExpertBlock(m).is_transposed else W).__getitem__).put(m, name)

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> PackedMatrices:
        """Return the present packed stack, which refers to the module's tensors without a copy."""
        stack = stacks.find_matrices(m, name)
        assert stack is not None
        return stack

    def restore(self, m: nn.Module, name: str, state: PackedMatrices) -> None:
        """Put the packed stack of a snapshot back into the module, on the device of the present one."""
        state.to(self.snapshot(m, name).device).put(m, name)

    def where(self, m: nn.Module, name: str = "weight") -> tuple[torch.device | None, torch.dtype | None]:
        """Return the device of the stack, or accelerate's if it is offloaded; and the dtype of its dense values, or
        None.
        """
        stack = self.snapshot(m, name)
        return computes_on(m, stack.device), stack.dtype


PACKED_STACK = PackedStack()
