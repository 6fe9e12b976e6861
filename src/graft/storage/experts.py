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
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import RoutingError, UnsupportedLayerError
from graft.core.protocols import Layer
from graft.core.rows import Rows
from graft.kernels.experts import StackUpdate, UpdatedStack, run_experts
from graft.storage import stacks
from graft.storage.dense import PLAIN, Dense
from graft.storage.offload import computes_on, is_away
from graft.storage.stacks import PackedMatrices

GATE = "_apply_gate"
FLAGS = ("has_gate", "has_bias", GATE, "num_experts")  # attributes that transformers' decorator sets
HOOKED = "_is_hooked"  # gpt-oss: so marked, the experts are called with routes, and not with those of kernels
MENDED = "_graft_routes"  # mark on modules that `ExpertBlock.prepare` has changed
UPDATES = "_graft_updates"  # mark on a module while layers around it run


@dataclass
class Updates:
    """The updates that layers add to the stacks of one block in one call."""

    key: str = ""  # of the outermost layer
    rows: Rows | None = None  # of a batch with several adapters; None: the updates act on all rows
    of_stacks: dict[str, Callable[[int], Sequence[StackUpdate]]] = field(default_factory=dict)  # number of tokens → …


@dataclass(frozen=True)
class ExpertBlock:
    """A module of experts. Any module has one; a module without stacks has an empty `packed` and cannot run."""

    module: Any  # nn.Module

    @property
    def is_mxfp4(self) -> bool:
        return stacks.MODULES.find(type(self.module)) is stacks.MXFP4

    @property
    def names(self) -> tuple[str, str] | None:
        """The names of the two stacks, input first; None if graft does not know how the module computes."""
        if self.is_mxfp4:
            return "gate_up_proj", "down_proj"
        known = all(hasattr(self.module, flag) for flag in FLAGS)
        return ("gate_up_proj" if self.module.has_gate else "up_proj", "down_proj") if known else None

    @property
    def packed(self) -> dict[str, PackedMatrices]:
        """The packed stacks by name."""
        names = stacks.list_packed_names(self.module)
        return {name: stack for name in names if (stack := stacks.find_matrices(self.module, name)) is not None}

    @property
    def parameters(self) -> list[str]:
        """The names of the module's parameters, stacks first, in the same order for packed and dense modules."""
        return [*dict.fromkeys([*(stacks.NAMES if self.packed else ()), *self.module._parameters])]

    @property
    def is_transposed(self) -> bool:
        """True if the module has its dense stacks as (experts, in, out)."""
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
        """True if graft can run the module: it knows how, and both stacks are packed or plain tensors."""

        def is_readable(name: str) -> bool:
            p = self.module._parameters.get(name)
            return (type(p) in PLAIN and p.dim() == 3) or stacks.find_stack_class(self.module, name) is not None

        return self.names is not None and all(map(is_readable, self.names))

    def packed_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the canonical shape (experts, out, in) of a packed stack; None if the parameter is no packed stack."""
        stack = stacks.find_matrices(self.module, name)
        return None if stack is None else stack.shape

    def find_stack(self, name: str) -> Any:
        """Return a stack, packed matrices or a tensor, in canonical orientation.

        Raises:
            UnsupportedLayerError: a packed stack cannot be read.
            RoutingError: a dense stack trains, is spread over processes, or has an adapter that is no product.
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
        """Return the output of the module, computed by graft, with updates on its stacks.

        Raises:
            RoutingError: rows have different adapters under expert parallelism.
        """
        m, (x, index, weights) = self.module, self.bind(args, kwargs)
        rows, group, groups = updates.rows, None, 1
        if rows is not None:
            if getattr(m, "_is_expert_parallel", False):
                raise RoutingError(
                    f"Layer '{updates.key}' does not support mixed adapter batches under expert parallelism, where "
                    "tokens of other processes come. Give all rows of a batch one adapter."
                )
            group, groups = rows.groups_of_tokens(len(x), updates.key, x.device), len(rows.groups)
        parts = {name: make(len(x)) for name, make in updates.of_stacks.items()}
        biased = self.is_mxfp4 or m.has_bias
        up, down = (
            UpdatedStack(self.find_stack(n), parts.get(n, ()), getattr(m, f"{n}_bias") if biased else None)
            for n in self.names or ()
        )
        act = partial(apply_clamped_gate, m) if self.is_mxfp4 else getattr(m, GATE) if m.has_gate else m.act_fn
        norm = m.post_expert_norm if getattr(m, "has_post_expert_norm", False) else None
        return run_experts(x, index, weights, up, act, down, norm, group, groups)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of a call as positional ones, in the order of the module's forward."""
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
    ) -> object:
        """Return the output of a layer's base with updates on the layer's stack.

        The outermost of the layers around the module puts `run` in the place of the module's forward for the call; the
        layers below it only add their updates.

        Args:
            updates: number of tokens → the updates.
            rows: the rows of a batch with several adapters; None: the updates act on all rows.
        """
        attributes, name = self.module.__dict__, layer.site.parameter
        if UPDATES in attributes:
            attributes[UPDATES].of_stacks[name] = updates
            return layer.base_layer(*args, **kwargs)
        place, before = self.find_forward()
        shared = attributes[UPDATES] = Updates(layer.site.key, rows, {name: updates})
        attributes[place] = lambda *args, **kwargs: self.run(shared, args, kwargs)
        try:
            return layer.base_layer(*args, **kwargs)
        finally:
            del attributes[UPDATES], attributes[place]
            if before is not None:
                attributes[place] = before

    run_updated._torchdynamo_disable = True  # type: ignore[attr-defined]  # the host must know how many rows experts have

    def find_forward(self) -> tuple[str, Any]:
        """Return the attribute that the module's calls run, and its value; None: that of the class."""
        place = "_old_forward" if "_old_forward" in self.module.__dict__ else "forward"  # accelerate calls the first
        return place, self.module.__dict__.get(place)

    def prepare(self) -> None:
        """Replace the forward of a module with packed stacks: it passes gradients on, and no whole stack is ever dense.

        The module's own forward still runs where it has a gradient or needs none. Does nothing for other modules, and
        on a second call; `release` undoes it.
        """
        m = self.module
        if MENDED in m.__dict__ or not self.packed or not self.can_run:
            return
        place, before = self.find_forward()
        hooked = self.is_mxfp4 and not hasattr(m, HOOKED)

        def forward(m: nn.Module, *args: Tensor, **kwargs: Tensor) -> object:
            """Run the module's own forward where its packed stacks allow it, else `ExpertBlock.run` without updates."""
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
        """Give the module the forward that it had before `prepare`."""
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


def apply_clamped_gate(m: nn.Module, y: Tensor) -> Tensor:
    """Return gpt-oss's activation of y, (rows, 2 · inner), with gate and input in turn, clamped to its limit."""
    gate, up = y[:, ::2].clamp(max=m.limit), y[:, 1::2].clamp(-m.limit, m.limit)
    out: Tensor = (up + 1) * gate * torch.sigmoid(gate * m.alpha)
    return out


class PackedStack(Dense):
    """The store of one packed stack of a module of experts. `name` is the stack's parameter."""

    name = "stack"
    exact = live = False

    def why_unreadable(self, m: nn.Module, name: str = "weight") -> str | None:
        away = "it is offloaded: it is there only while the module itself is called"
        return away if is_away(m) else self.snapshot(m, name).why_unreadable

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        return self.why_unreadable(m, name) or self.snapshot(m, name).why_unwritable

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        return self.snapshot_values(m, name, ExpertBlock(m).find_stack(name))

    def snapshot_values(self, m: nn.Module, name: str, state: PackedMatrices) -> Tensor:
        with torch.no_grad():
            W = state.dense(range(state.shape[0]), state.dtype or torch.float32)
            return W.mT if ExpertBlock(m).is_transposed else W

    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> None:
        with torch.no_grad():
            self.snapshot(m, name).remake((W.mT if ExpertBlock(m).is_transposed else W).__getitem__).put(m, name)

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> PackedMatrices:
        stack = stacks.find_matrices(m, name)
        assert stack is not None
        return stack

    def restore(self, m: nn.Module, name: str, state: PackedMatrices) -> None:
        state.to(self.snapshot(m, name).device).put(m, name)

    def where(self, m: nn.Module, name: str = "weight") -> tuple[torch.device | None, torch.dtype | None]:
        stack = self.snapshot(m, name)
        return computes_on(m, stack.device), stack.dtype


PACKED_STACK = PackedStack()
