# SPDX-License-Identifier: Apache-2.0
"""Bases that FSDP2 has sharded before their adapters come: the processes that share them, and the store of weights.

A weight is a DTensor between calls, and whole while its unit of FSDP2 runs; under tensor parallelism it is then a
DTensor over that dimension alone. A unit may keep its weights whole after a call. Its DTensors, which FSDP2 reads for
the next call, are then not at the module: the store has FSDP2 put them there before it reads or writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.core.ops import Op
from graft.core.wrappers import MANAGED
from graft.kernels.cuts import Cut
from graft.storage import offload, tensor_parallel
from graft.storage.parallel import copy_unwrapped, gather_slots, is_sharded
from graft.storage.tensor_parallel import TensorParallel

GROUPS: WeakKeyDictionary[nn.Module, dict[str, ref[Any]]] = WeakKeyDictionary()  # FSDP2's groups by module and name


def find_parameter_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """Return FSDP2's parameter groups with parameters, of the units among these modules, each once.

    After a first call of the model, units around them count as well, if any module is a unit. [] if torch's FSDP2 is
    not imported. Notes the group of each parameter in `GROUPS`, weakly, for `find_parameter_group`.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if not hasattr(fsdp, "FSDPModule"):
        return []
    states: list[Any] = [module._get_fsdp_state() for module in modules if isinstance(module, fsdp.FSDPModule)]
    # a unit around the model as well
    states += [state for first in states[:1] for state in first._state_ctx.all_states]
    groups: dict[int, Any] = {}
    for state in states:
        several = getattr(state, "_fsdp_param_groups", None)  # until torch 2.11 a state has one group
        for group in [state._fsdp_param_group] if several is None else several:
            if group is not None and group.fsdp_params:
                groups[id(group)] = group
    for group in groups.values():
        for owner, name in list_managed([group]):
            GROUPS.setdefault(owner, {})[name] = ref(group)
    return list(groups.values())


def list_managed(groups: Iterable[Any]) -> Iterator[tuple[nn.Module, str]]:
    """Yield (module, name) of each parameter of FSDP2's groups, at all modules that share it."""
    for info in (parameter._module_info for group in groups for parameter in group.fsdp_params):
        yield info.module, info.param_name
        yield from zip(info.shared_modules, info.shared_param_names)


def find_parameter_group(m: nn.Module, name: str) -> Any:
    """Return FSDP2's group of a module's parameter, once `find_parameter_groups` has seen it; else None."""
    group = GROUPS.get(m, {}).get(name) if MANAGED in m.__dict__ else None
    return None if group is None else group()


def find_compute_dtype(module: nn.Module) -> torch.dtype | None:
    """Return `param_dtype` of FSDP2's mixed precision, from the first group in `GROUPS` of `module` or a module below.

    None without a group there, if that one is gone, or without mixed precision.
    """
    group = next((g for m in module.modules() for g in GROUPS.get(m, {}).values()), lambda: None)()
    return None if group is None else group.mp_policy.param_dtype


def is_running(group: Any) -> bool:
    """Return True if a parameter group is unsharded and its training state is not IDLE: within a call or backward pass
    of its unit.
    """
    return group.is_unsharded and group._training_state.name != "IDLE"


def is_managed(m: nn.Module, name: str) -> bool:
    """Return True if FSDP2 manages a module's parameter: its module has FSDP2's mark, and it is a DTensor, or
    `find_parameter_groups` has seen it.
    """
    t = m._parameters.get(name) if MANAGED in m.__dict__ else None
    return t is not None and (is_sharded(t) or find_parameter_group(m, name) is not None)


@dataclass
class Sharding:
    """The processes that share a base, which FSDP2 had sharded before an adapter came.

    Args:
        parameter_groups: FSDP2's.
        ranks: of all processes that hold a part of the base.
        groups: process groups, one per dimension of their mesh. Broadcasts in each group in turn reach all ranks.
        batches: process groups, one per dimension, of processes that compute different batches.
    """

    parameter_groups: list[Any]
    ranks: list[int]
    groups: list[dist.ProcessGroup]
    batches: list[dist.ProcessGroup]

    @property
    def syncs_gradients(self) -> bool:
        """True if all parameter groups have `reduce_grads`: no unit has `set_requires_gradient_sync(False)` at the
        moment.
        """
        return all(group.reduce_grads for group in self.parameter_groups)

    def set_trainability(self, parameters: Iterable[nn.Parameter], trains: bool) -> None:
        """Set `requires_grad` of the sharded parameters among these, in both forms: the DTensor and the whole one.

        A unit that kept its weights whole after a call shows only these, and would else train the DTensors of frozen
        weights.
        """
        ids = set(map(id, parameters))
        for group in self.parameter_groups:
            for parameter in group.fsdp_params:
                forms = [parameter.sharded_param, getattr(parameter, "_unsharded_param", None)]
                for form in forms if not ids.isdisjoint(map(id, forms)) else ():
                    if form is not None:
                        form.requires_grad_(trains)

    def list_managed_ids(self) -> set[tuple[int, str]]:
        """Return a set of (id of the module, name) of the parameters that FSDP2 knows, shared ones under each name."""
        return {(id(owner), name) for owner, name in list_managed(self.parameter_groups)}


def find_sharding(modules: Iterable[nn.Module]) -> Sharding | None:
    """Return the processes that share a model of these modules; None if FSDP2 has sharded nothing of it, or
    torch.distributed is not initialized.

    Of the parameters' meshes the largest gives the ranks, sorted, and `groups`. Of the units' meshes the largest gives
    `batches`. So the experts' smaller mesh does not count.
    """
    parameter_groups = find_parameter_groups(modules)
    if not parameter_groups or not dist.is_initialized():
        return None
    parameters = [p.sharded_param for group in parameter_groups for p in group.fsdp_params]
    mesh: dist.DeviceMesh = max((p.device_mesh for p in parameters), key=lambda mesh: mesh.size())
    unit: dist.DeviceMesh = max((group.mesh_info.mesh for group in parameter_groups), key=lambda mesh: mesh.size())
    return Sharding(parameter_groups, sorted(mesh.mesh.flatten().tolist()), list_groups(mesh), list_groups(unit))


def list_groups(mesh: dist.DeviceMesh) -> list[dist.ProcessGroup]:
    """Return the process groups of a mesh that this process is in, one per dimension.

    For a mesh of all processes with several dimensions it is the default group alone.
    """
    if mesh.ndim > 1 and mesh.size() == dist.get_world_size():
        return [dist.distributed_c10d._get_default_group()]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


class Sharded(TensorParallel):
    """The store of dense weights that FSDP2 had sharded before the adapter came.

    All processes have to take part in reads, writes and restores, except within a call of the unit.
    """

    name, live, exact = "FSDP2", False, True
    copies = "views"  # of a DTensor

    def tensor(self, m: nn.Module, name: str) -> Tensor:
        """Return the parameter that holds the values now: the DTensor between calls, the whole one within a call.

        If the unit kept its whole weights after a call, it gives them up first.
        """
        group = find_parameter_group(m, name)
        if group is not None and not (group.is_sharded or is_running(group)):
            group.reshard()
        return getattr(m, name)

    def piece(self, m: nn.Module, op: Op) -> tuple[Tensor, Cut | None, Cut | None]:
        """Return this process's piece of the weight and its cuts within a call (while its group runs) or without a
        group, as tensor parallelism has them.

        Otherwise return the whole weight, gathered, and None for both cuts: between calls a DTensor is one over FSDP2's
        processes, too.
        """
        group = find_parameter_group(m, "weight")
        return super().piece(m, op) if group is None or is_running(group) else (op.canon(self.read(m)), None, None)

    def why_tied_unwritable(self, name: str) -> str | None:
        """Return the reason, always: tensor `name` is tied to another module's, and FSDP2 has sharded both as one.

        The text advises to save the adapter and merge it in one process.
        """
        return (
            f"its {name} is tied to that of another module, and FSDP2 has sharded both as one: save the adapter, and "
            "load it into a model of one process to merge it"
        )

    def where(self, m: nn.Module, name: str = "weight") -> tuple[torch.device | None, torch.dtype | None]:
        """Return the device that FSDP2 computes on, another than the weight's under offload, and the weight's dtype.

        A weight on the meta device keeps that device, and so does one without a group. (None, None) for a module
        without parameters.
        """
        device, dtype = super().where(m, name)
        group = find_parameter_group(m, name)
        return device if group is None or device is None or device.type == "meta" else group.device, dtype

    @contextmanager
    def bring_in(self, layer: Any, written: nn.Module | None = None) -> Iterator[None]:
        """Within the block, tensors of the layer's adapters that FSDP2 has sharded as well are whole, for reading;
        changes to them are lost. Offloaded tensors are loaded, and changes to those of `written` kept, as by the base
        class.

        Every process must call this.
        """
        with super().bring_in(layer, written), gather_slots(s for name in layer.adapters for s in layer.slots(name)):
            yield


def gather_module(module: nn.Module) -> nn.Module:
    """Return a module for a call between those of its unit: a copy with whole tensors and without FSDP2, or itself if
    FSDP2 has not sharded it.

    Buffers of a copy are shared. Every process must call this.
    """
    owners = [(path, m) for path, m in module.named_modules() if m in GROUPS]
    store = Sharded()
    values = {f"{path}.{n}" if path else n: store.read(m, n).detach() for path, m in owners for n in GROUPS[m]}
    return copy_unwrapped(module, values) if owners else module


def standalone(module: nn.Module) -> nn.Module:
    """Return a copy of a module with all tensors in memory and whole on each process, which no layout manages.

    If FSDP2 has sharded it, every process must call this, and hooks and parallel forwards stay behind. If its mixed
    precision computes in another dtype than the copy's, hooks cast inputs to the copy's dtype and the output to that of
    the precision. Else as `tensor_parallel.standalone`. Raises the errors of `list_styles`.
    """
    if not any(m in GROUPS for m in module.modules()):
        return tensor_parallel.standalone(module)
    styles = tensor_parallel.list_styles(module)
    clone = offload.copy_into_memory(gather_module(module))
    for path in styles:
        del clone.get_submodule(path).__dict__["forward"]
    dtype = find_compute_dtype(module)
    copy_dtype = next((p.dtype for p in clone.parameters() if p.is_floating_point()), None)
    if dtype is not None and copy_dtype not in (None, dtype):
        clone.register_forward_pre_hook(partial(cast_inputs, copy_dtype), with_kwargs=True)
        clone.register_forward_hook(partial(cast_output, dtype))
    return clone


def cast_inputs(
    dtype: torch.dtype, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of a call with floating-point tensors in `dtype`. A hook of whole copies.

    Tensors within lists or dicts stay as they are.
    """
    return tuple(cast_tensor(x, dtype) for x in args), {name: cast_tensor(x, dtype) for name, x in kwargs.items()}


def cast_output(dtype: torch.dtype, module: nn.Module, args: object, output: object) -> object:
    """Return an output that is a floating-point tensor in `dtype`, that of FSDP2's mixed precision; any other, such as
    a tuple, unchanged.

    A hook of whole copies.
    """
    return cast_tensor(output, dtype)


def cast_tensor(x: object, dtype: torch.dtype) -> object:
    """Return a floating-point tensor in `dtype`, and any other object unchanged."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
