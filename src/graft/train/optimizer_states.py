# SPDX-License-Identifier: Apache-2.0
"""The state that an optimizer keeps for each parameter, as whole tensors: torch's own optimizers, and the one of
DeepSpeed's ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from graft import ConfigError, DistributedError
from graft.storage.parallel import DISTRIBUTED, find_master_ids, layout_of, shard_like
from graft.train.helpers import move_tensors

State = dict[str, Any]


class OptimizerStates:
    """The groups and states of an optimizer. With DTensors, tensors of a state are sharded as their parameter is.

    Attributes:
        inner: the torch optimizer that computes.
        groups: its parameter groups; their options may be set.
        members: the parameters of each group.
    """

    def __init__(self, optimizer: Optimizer):
        """Note the optimizer, its groups and their parameters."""
        self.inner, self.groups = optimizer, optimizer.param_groups
        self.members: list[list[nn.Parameter]] = [group["params"] for group in self.groups]

    def check(self) -> None:
        """Check that the optimizer's state can be kept by parameter name.

        Raises:
            ConfigError: its `state_dict()` has other keys than "state" and "param_groups".
            DistributedError: a sharded tensor of a state has another shape than its parameter.
        """
        if odd := sorted(self.inner.state_dict().keys() - {"state", "param_groups"}):
            what = type(self.inner).__name__
            raise ConfigError(f"{what} keeps {odd} outside its state, which the file cannot hold. Use another.")
        for p, state in self.inner.state.items():
            for key, value in state.items() if isinstance(p, Tensor) else ():
                if isinstance(value, Tensor) and layout_of(value) is not None and value.shape != p.shape:
                    raise DistributedError(
                        f"{type(self.inner).__name__} keeps '{key}' of shape {tuple(value.shape)} for a parameter of "
                        f"shape {tuple(p.shape)}, spread over processes. Use another optimizer."
                    )

    def states(self) -> Iterator[tuple[nn.Parameter, State]]:
        """Yield each parameter with its state. Tensors of the state may be sharded as the parameter is."""
        yield from ((p, state) for p, state in self.inner.state.items() if isinstance(p, Tensor))  # type: ignore[misc]

    def collect_other_states(self) -> dict[Any, Any]:
        """Return the states with keys that are no parameters."""
        return {key: state for key, state in self.inner.state.items() if not isinstance(key, Tensor)}

    def replace_states(self, states: list[tuple[nn.Parameter, State, State]], other_states: dict[Any, Any]) -> None:
        """Replace all states by copies of (parameter, group, whole state), and by `other_states` themselves.

        Tensors go to the parameter's device and are sharded like it.

        All copies are made first, so that nothing changes if memory is short.
        """
        new_states: dict[Any, State] = {}  # whole before any of it is in place: there may be no room
        for p, group, state in states:
            placed = {key: place_value(value, p, group) for key, value in state.items()}
            new_states[p] = {key: shard_value(value, p) for key, value in placed.items()}
        self.inner.state.clear()
        self.inner.state.update(other_states)
        self.inner.state.update(new_states)


class Zero3OptimizerStates(OptimizerStates):
    """The optimizer of DeepSpeed's ZeRO-3, which trains flat float32 parts of parameters, one tensor for each
    subgroup.
    """

    def __init__(self, outer: Any):
        """Take DeepSpeed's optimizer, `outer`, and the torch optimizer within it. A group has the parameters of all its
        subgroups.
        """
        super().__init__(outer.optimizer)
        self.outer, self.members = outer, [[] for _ in self.groups]
        for sub_group, parameters in enumerate(outer.fp16_groups):
            self.members[outer.sub_group_to_group_id[sub_group]] += parameters

    def check(self) -> None:
        """Raise DistributedError if it trains in float16, with a scale that files lack, or swaps its state to a disk.

        Its state is not looked at.
        """
        if self.outer.dtype is torch.float16:
            raise DistributedError("DeepSpeed trains in float16, with a scale that the file cannot hold. Use bf16.")
        if self.outer.swap_optimizer:
            raise DistributedError("DeepSpeed swaps the optimizer's state to a disk. Use its own checkpoints.")

    def states(self) -> Iterator[tuple[nn.Parameter, State]]:
        """Yield each parameter with its state.

        Moments are gathered from all processes, so that all must call this; other values stay. Parameters without a
        state yet are left out.
        """
        from deepspeed.utils import safe_get_full_optimizer_state as whole

        for flat, parameters in zip(self.outer.fp32_partitioned_groups_flat, self.outer.fp16_groups):
            state = self.inner.state.get(flat, {})
            for p in parameters if state else ():
                yield p, {key: whole(p, key).clone() if is_moment(v, flat.numel()) else v for key, v in state.items()}

    def replace_states(self, states: list[tuple[nn.Parameter, State, State]], other_states: dict[Any, Any]) -> None:
        """Replace all states of the inner optimizer by `other_states` and those of `states`.

        Moments of each subgroup become zeros, then each parameter's local part is written.

        Other values of a subgroup, such as counters, are those of its first parameter with a state. Subgroups without
        one get no state.
        """
        state_of = {id(p): state for p, _, state in states}
        self.inner.state.clear()
        self.inner.state.update(other_states)
        for flat, parameters in zip(self.outer.fp32_partitioned_groups_flat, self.outer.fp16_groups):
            if not (members := [p for p in parameters if id(p) in state_of]):
                continue
            first = state_of[id(members[0])]
            self.inner.state[flat] = {
                key: torch.zeros_like(flat) if is_moment(value, members[0].ds_numel) else place_value(value, flat, {})
                for key, value in first.items()
            }
            for p in members:
                for key, value in state_of[id(p)].items():
                    if is_moment(value, p.ds_numel):
                        write_local_part(p, key, value)


def wrap_optimizer(optimizer: Any) -> OptimizerStates:
    """Return an `OptimizerStates` of an object with `param_groups`, or a `Zero3OptimizerStates` of DeepSpeed's ZeRO-3.

    Raises:
        DistributedError: it is DeepSpeed's, and no optimizer of torch, or one that keeps single partitions as ZeRO-1
            and 2 do.
        ConfigError: the object has no parameter groups.
    """
    if type(optimizer).__module__.startswith("deepspeed."):
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return Zero3OptimizerStates(optimizer)
        if not isinstance(optimizer, Optimizer) or hasattr(optimizer, "single_partition_of_fp32_groups"):
            raise DistributedError(
                f"{type(optimizer).__name__} is DeepSpeed's, and only ZeRO-3's optimizer can be resumed by "
                "name. Use stage 3, or DeepSpeed's own checkpoints."
            )
    if not hasattr(optimizer, "param_groups"):
        raise ConfigError(f"A {type(optimizer).__name__} is no optimizer. Pass the optimizer second, after the model.")
    return OptimizerStates(optimizer)


def check_sharding(values: Mapping[str, Tensor], optimizer_states: OptimizerStates) -> None:
    """Raise DistributedError for the first tensor that cannot be saved by name: one in a flat parameter of FSDP1, or
    one with a master copy in DeepSpeed, unless the optimizer is that of ZeRO-3.
    """
    masters = find_master_ids(values.values())
    for name, t in values.items():
        layout = layout_of(t)
        if layout is not None and layout.name == "FSDP1":
            raise DistributedError(
                f"'{name}' is a slice of a flat parameter of FSDP1, so that optimizer state belongs to no parameter. "
                "Use FSDP2 (fully_shard), or the checkpoints of your trainer."
            )
        if id(t) in masters and not isinstance(optimizer_states, Zero3OptimizerStates):
            raise DistributedError(
                f"DeepSpeed keeps the values of '{name}' that train. With ZeRO-3 pass engine.optimizer; with ZeRO-1 "
                "and ZeRO-2 use DeepSpeed's own checkpoints."
            )


def is_moment(value: object, numbers: int) -> bool:
    """Return True if a value of a state is a tensor with dimensions and this many numbers."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == numbers


def write_local_part(p: Any, key: str, value: Tensor) -> None:
    """Write this process's part of a whole moment into ZeRO-3's state, in the device of the parameter.

    The last part is padded with zeros.
    """
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    n = safe_get_local_optimizer_state(p, key).numel()
    rank = dist.get_rank(group=p.ds_process_group)
    part = torch.zeros(n, dtype=value.dtype)
    local_values = value.flatten()[rank * n : (rank + 1) * n]
    part[: local_values.numel()] = local_values
    safe_set_local_optimizer_state(p, part.to(p.ds_tensor.device), key)


def shard_value(value: object, p: nn.Parameter) -> object:
    """Return a tensor of a state as a DTensor, sharded like its parameter, if that is a DTensor of this shape; any
    other value as it is.
    """
    if layout_of(p) is DISTRIBUTED and isinstance(value, Tensor) and value.dim() and value.shape == p.shape:
        return shard_like(value, p)
    return value


def place_value(value: object, p: Tensor, group: Mapping[str, object]) -> object:
    """Return a copy of a state's value with tensors on the parameter's device; dtypes stay.

    Tensors without dimensions, such as counters, stay on their device unless the group is capturable or fused. Dicts,
    lists and tuples are copied item by item; other values are returned as they are.
    """
    counters_move = group.get("capturable") or group.get("fused")  # else a counter stays on the CPU
    return move_tensors(value, lambda t: t.to(p.device, copy=True) if t.dim() or counters_move else t.clone())
