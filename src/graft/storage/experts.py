# SPDX-License-Identifier: Apache-2.0
"""Modules of experts that graft can run itself, from their stacks of matrices.

Packed stacks need it for a backward pass without a dense copy; dense stacks, for rows with different adapters.

Their forward takes tokens, the experts of each token, and the weights of these. transformers' decorator records how
they use their stacks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import RoutingError, UnsupportedLayerError
from graft.core.routing import Handed
from graft.kernels.experts import ExpertBlock, UpdatedStack, run_experts
from graft.storage import stacks
from graft.storage.dense import PLAIN, Dense
from graft.storage.offload import computes_on, is_away
from graft.storage.stacks import PackedMatrices

GATE = "_apply_gate"
FLAGS = ("has_gate", "has_bias", GATE, "num_experts")
HOOKED = "_is_hooked"  # gpt-oss: so marked, the experts are called with routes, and not with those of kernels
MENDED = "_graft_routes"  # mark on modules that `let_experts_train` has changed


@dataclass(frozen=True)
class Dense3:
    """A dense stack that returns views of its matrices."""

    W: Tensor  # (experts, out, in)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.W.shape)  # type: ignore[return-value]

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.W.dtype

    def dense(self, experts: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        return [self.W[e].to(dtype) for e in experts]


def describe_block(m: nn.Module) -> ExpertBlock | None:
    """Return which stacks, activation, biases and norm a module of experts has; None if graft does not know it."""
    if stacks.MODULES.find(type(m)) is stacks.MXFP4:
        return ExpertBlock(
            "gate_up_proj", "down_proj", make_clamped_activation(m), m.gate_up_proj_bias, m.down_proj_bias
        )
    if not all(hasattr(m, flag) for flag in FLAGS):
        return None
    up = "gate_up_proj" if m.has_gate else "up_proj"
    up_bias, down_bias = (getattr(m, f"{up}_bias"), m.down_proj_bias) if m.has_bias else (None, None)
    norm = m.post_expert_norm if getattr(m, "has_post_expert_norm", False) else None
    return ExpertBlock(up, "down_proj", getattr(m, GATE) if m.has_gate else m.act_fn, up_bias, down_bias, norm)


def make_clamped_activation(m: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return gpt-oss's activation, for rows with gate and input in turn, clamped to the module's limit."""

    def act(y: Tensor) -> Tensor:
        gate, up = y[:, ::2].clamp(max=m.limit), y[:, 1::2].clamp(-m.limit, m.limit)
        out: Tensor = (up + 1) * gate * torch.sigmoid(gate * m.alpha)
        return out

    return act


def find_matrix_stack(m: nn.Module, name: str) -> Any:
    """Return a stack of a module, packed or dense, in canonical orientation.

    Raises:
        UnsupportedLayerError: a packed stack cannot be read.
        RoutingError: a dense stack trains, is spread over processes, or has an adapter that is no product.
    """
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
    return Dense3(W.mT if getattr(m, "is_transposed", False) else W)


def run(m: nn.Module, handed: Handed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the output of a module of experts, computed by graft, with the updates of adapters in `handed`.

    Raises:
        RoutingError: rows have different adapters under expert parallelism.
    """
    block, (x, index, weights) = describe_block(m), bind_positionally(m, args, kwargs)
    assert block is not None
    if handed.groups is not None and getattr(m, "_is_expert_parallel", False):
        raise RoutingError(
            f"Layer '{handed.key}' does not support mixed adapter batches under expert parallelism, where tokens "
            "of other processes come. Give all rows of a batch one adapter."
        )
    group = handed.group_of(len(x), x.device)
    used = {
        name: UpdatedStack(find_matrix_stack(m, name), handed.parts_of(name, len(x))) for name in (block.up, block.down)
    }
    count = 1 if handed.groups is None else handed.groups.count
    return run_experts(block, x, index, weights, used, group, count)


def bind_positionally(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call as positional ones, in the order of the module's forward."""
    if not kwargs:
        return args
    bound = inspect.signature(type(m).forward).bind(m, *args, **kwargs)
    return *bound.args[1:], *bound.kwargs.values()


def find_experts_function(m: nn.Module) -> Callable[..., Tensor] | None:
    """Return `run` if graft can run this module of experts in place of its forward; else None."""
    block = describe_block(m)
    if block is None:
        return None
    plain = (type(p := m._parameters.get(name)) in PLAIN and p.dim() == 3 for name in (block.up, block.down))  # type: ignore[union-attr]
    return run if all(stacks.find_stack_class(m, n) or ok for n, ok in zip((block.up, block.down), plain)) else None


class PackedStack(Dense):
    """The store of one packed stack of a module of experts."""

    exact = live = False

    def __init__(self, parameter: str):
        self.name, self.parameter = "stack", parameter

    def matrices(self, m: nn.Module) -> PackedMatrices:
        stack = stacks.find_matrices(m, self.parameter)
        assert stack is not None
        return stack

    def why_unreadable(self, m: nn.Module, name: str = "weight") -> str | None:
        away = "it is offloaded: it is there only while the module itself is called"
        return away if is_away(m) else self.matrices(m).why_unreadable

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        return self.why_unreadable(m, name) or self.matrices(m).why_unwritable

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        return self.snapshot_values(m, name, find_matrix_stack(m, self.parameter))

    def snapshot_values(self, m: nn.Module, name: str, state: PackedMatrices) -> Tensor:
        with torch.no_grad():
            W = state.dense(range(state.shape[0]), state.dtype or torch.float32)
            return W.mT if is_transposed(m) else W

    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> None:
        with torch.no_grad():
            self.matrices(m).remake((W.mT if is_transposed(m) else W).__getitem__).put(m, self.parameter)

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> PackedMatrices:
        return self.matrices(m)

    def restore(self, m: nn.Module, name: str, state: PackedMatrices) -> None:
        state.to(self.matrices(m).device).put(m, self.parameter)

    def where(self, m: nn.Module, name: str = "weight") -> tuple[torch.device | None, torch.dtype | None]:
        stack = self.matrices(m)
        return computes_on(m, stack.device), stack.dtype


def is_transposed(m: nn.Module) -> bool:
    """Return True if a module of experts has its dense stacks as (experts, in, out)."""
    return bool(getattr(m, "is_transposed", False)) or stacks.MODULES.find(type(m)) is stacks.MXFP4


def list_parameter_names(m: nn.Module) -> list[str]:
    """Return the names of a module's parameters, stacks first, in the same order for packed and dense modules."""
    stacked = stacks.NAMES if stacks.list_packed_names(m) else ()
    return [*dict.fromkeys([*stacked, *m._parameters])]


def find_packed_shape(m: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the canonical shape of a packed stack, (experts, out, in); None if this parameter is none."""
    stack = stacks.find_matrices(m, name)
    return None if stack is None else stack.shape


def let_experts_train(m: nn.Module) -> None:
    """Replace the forward of a module with packed stacks: it passes gradients on, without a dense copy of the stacks.

    The module's own forward still runs where it has a gradient or needs none. Does nothing for other modules, and on a
    second call; `restore_experts` undoes it.
    """
    if MENDED in m.__dict__ or not stacks.list_packed_names(m) or find_experts_function(m) is None:
        return
    place = "_old_forward" if "_old_forward" in m.__dict__ else "forward"  # accelerate's hooks call the first
    before = m.__dict__.get(place)
    hooked = stacks.MODULES.find(type(m)) is stacks.MXFP4 and not hasattr(m, HOOKED)

    def forward(m: nn.Module, *args: Tensor, **kwargs: Tensor) -> object:
        x, _, weights = bind_positionally(m, args, kwargs)
        trains = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        packed = [h for name in stacks.list_packed_names(m) if (h := stacks.find_matrices(m, name)) is not None]
        if all(h.runs(m, x, trains) for h in packed):
            return type(m).forward(m, *args, **kwargs) if before is None else before(*args, **kwargs)
        return run(m, Handed(), args, kwargs)

    forward._torchdynamo_disable = True  # type: ignore[attr-defined]
    m.__dict__[place] = method = MethodType(forward, m)
    m.__dict__[MENDED] = method, before, hooked
    if hooked:
        m.__dict__[HOOKED] = True


def restore_experts(m: nn.Module) -> None:
    """Give the module the forward that it had before `let_experts_train`."""
    if MENDED not in m.__dict__:
        return
    method, before, hooked = m.__dict__.pop(MENDED)
    for place in ("_old_forward", "forward"):
        if m.__dict__.get(place) is method:
            del m.__dict__[place]
            if before is not None:
                m.__dict__[place] = before
    if hooked:
        m.__dict__.pop(HOOKED)
