# SPDX-License-Identifier: Apache-2.0
"""Gradients of adapters over processes: who averages them, and the average of adapters on a sharded base.

DDP, FSDP and DeepSpeed look at a model once, when they wrap it. Parameters that come later, or begin to train, would
then train on each process separately, without an error: `check_averaged` raises one. It runs at the first step after a
change of the parameters that train.

If FSDP2 had sharded the base before the adapter came, each process has the whole adapter, and trains it on its own
batch. An `Averager` then averages the gradients, once when a backward pass ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import unserializable_hook

from graft.core.base_config import input_embeddings
from graft.core.carrier import iter_carried
from graft.core.containers import Slot
from graft.core.errors import DistributedError, PeftWarning, warn
from graft.core.method import Tuner
from graft.core.rows import find_tensors
from graft.core.wrappers import MANAGED
from graft.io.fingerprint import hash_text
from graft.io.rendezvous import RankNote
from graft.kernels.waits import constant
from graft.storage.flat import is_flat, trains
from graft.storage.fsdp2 import Sharding
from graft.storage.meeting import LONG_PATIENCE, Meeting
from graft.storage.parallel import find_master_ids, is_sharded, layout_of, processes

MARK = "_replicated_grad_hook_registered"  # transformers' Trainer averages a parameter itself unless it has this


class Averager:
    """Averages the gradients of adapters on a base that FSDP2 had sharded before they came.

    Hooks on parameters, and on the outputs of calls, tell it that a backward pass runs. When the pass ends, one sum
    over the processes takes all gradients of a dtype and device. A process without a gradient adds zeros. If no process
    has one, the gradient stays None.
    """

    def __init__(self, registry: Tuner, sharding: Sharding):
        """Serve the model of a registry. Nothing happens until `find_parameters`."""
        self.registry, self.sharding = registry, sharding
        self.parameters: list[nn.Parameter] = []  # with a hook, in the model's order
        self.agreed: list[int] = []  # ids of those that trained when the processes last compared them
        self.compares_values = True  # at the next comparison: values came from files or data of each process
        self.task: int | None = None  # the backward pass that will be averaged at its end
        self.last_meeting: Meeting | None = None  # its keys are still in the store
        self.follows = False  # a call's output began that pass, and not a parameter

    def find_parameters(self) -> None:
        """Hook each plain parameter of adapters, and each other plain one that trains, unless FSDP2 averages it.

        Stores them in `parameters`; sharded ones and those on the meta device are left out. Adapters' parameters count
        also while they are frozen or inactive. Parameters that have a hook keep it; a frozen one stays frozen. Sets the
        mark `_replicated_grad_hook_registered` on each, so that Trainer does not average it.
        """
        registry, managed = self.registry, self.sharding.list_managed_ids()
        known, parameters = set(map(id, self.parameters)), dict[int, Any]()
        carried = iter_carried(registry.carriers(), [*registry.peft_config])
        slots = [slot for carrier, name in carried for slot in carrier.slots(name)]
        places = [(s.owner, s.attribute, s.tensor) for s in slots if s.is_parameter and s.trains]
        places += [
            (m, name, p)
            for m in registry.model.modules()
            for name, p in m._parameters.items()
            if p is not None and p.requires_grad
        ]
        for owner, name, p in places:
            if (id(owner), name) not in managed and not (is_sharded(p) or p.is_meta):
                parameters[id(p)] = p
        self.parameters = list(parameters.values())
        for p in self.parameters:
            if id(p) not in known:
                before = p.requires_grad
                p.requires_grad_().register_post_accumulate_grad_hook(partial(note_gradient, ref(self)))
                p.requires_grad_(before)
            setattr(p, MARK, True)

    def agree(self) -> None:
        """Compare the parameters that train with the other processes, if others train than at the last time, or with
        `compares_values`.

        All processes of the base meet; shapes and dtypes must agree in order. With `compares_values` their values are
        compared, too; it becomes False. Values are read once, by a checksum. `agreed` then has the ids.

        Raises:
            DistributedError: other parameters, or other values, train on another process; or it does not come in time.
        """
        training = [p for p in self.parameters if p.requires_grad]
        ids = list(map(id, training))
        if ids == self.agreed and not self.compares_values:
            return
        task = f"{len(ids)} tensors that train ({hash_text(str([(tuple(p.shape), p.dtype) for p in training]))}"
        task += f", values {checksum(training)})" if self.compares_values else ")"
        self._meet("A training step", task)
        self.agreed, self.compares_values = ids, False

    def _meet(self, call: str, task: str, compares: bool = True) -> Meeting:
        """Return a meeting of all processes of the base, after all have come, and delete the keys of the one before
        from the store.

        It is kept as `last_meeting`. Raises DistributedError if others do not come within 600 s (`GRAFT_PATIENCE`) or,
        with `compares`, have another task.
        """
        purpose, ranks = "average gradients over", self.sharding.ranks
        meeting = Meeting(call, task, ranks, purpose, DistributedError, LONG_PATIENCE, compares)
        if self.last_meeting is not None:
            self.last_meeting.clear()
        self.last_meeting = meeting
        return meeting

    def reach_inputs(self, names: Iterable[str]) -> AbstractContextManager[object]:
        """Return a context: the backward pass of a call in it, with rows of these adapters, passes through all layers.

        A forward hook, set now, calls `requires_grad_()` on the output of the word embeddings; the context's end
        removes it. FSDP2 gathers the weights of the layers that a pass reaches: those below the
        first adapter of its rows, too, if other processes reach them. Does nothing if none of the adapters trains, or
        without word embeddings.
        """
        registry = self.registry
        words = input_embeddings(registry.model) if any(registry.trains(name) for name in names) else None
        if words is None:
            return nullcontext()
        return words.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())

    def check_rows(self, output: object) -> None:
        """Wait until all processes have called the model with names of rows, then raise on all of them if one's output
        has no tensor with a grad_fn.

        The host waits for the other hosts, and for no device.

        Raises:
            DistributedError: the output of some process has no gradient (its ranks are named), or a process does not
                come in time.
        """
        task = "" if any([t.grad_fn is not None for t in find_tensors(output)]) else "no gradient"
        meeting = self._meet("A call with adapter_names in training", task, compares=False)
        idle_ranks = meeting.list_ranks_with_task()
        if idle_ranks:
            raise DistributedError(
                f"All rows of rank(s) {idle_ranks} lack an adapter that trains: their backward pass would fail, and "
                "the other processes wait for it. Give each process a row with such an adapter."
            )

    def follow(self, output: object) -> None:
        """Hook the tensors of a call's output, so that the gradients are averaged when its backward pass ends.

        A pass that an error broke off before is forgotten (`task` becomes None, `follows` False), unless gradient
        checkpointing makes this call within a pass. Tensors without a gradient function are skipped.
        """
        if torch._C._current_graph_task_id() == -1:  # else gradient checkpointing calls the model
            self.task, self.follows = None, False
        for t in find_tensors(output):
            if t.grad_fn is not None:
                t.register_hook(self._on_output)

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _on_output(self, _grad: Tensor) -> None:
        """Hook of an output's gradient: have autograd call `_on_end` after the pass.

        Sets `follows` and notes the pass in `task`; does nothing while `follows` is set.
        """
        if not self.follows:
            self.follows, self.task = True, torch._C._current_graph_task_id()
            torch.autograd.Variable._execution_engine.queue_callback(self._on_end)

    def note_gradient(self) -> None:
        """Have autograd call `_on_end` after the pass that gives a parameter a gradient, and note the pass in `task`.

        Does nothing if a call's output, or an earlier gradient of the same pass, has done so.

        Under reentrant checkpointing, without a call of the PeftModel, that is after the pass of each block.
        """
        task = torch._C._current_graph_task_id()
        if not self.follows and task != self.task:
            self.task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._on_end)

    @torch.no_grad()
    def _on_end(self) -> None:
        """Forget the pass (`task`, `follows`), and average the gradients of all parameters that train, after `agree`.

        Averages nothing if FSDP2 waits for a later pass as well.

        The next pass then averages the sum of both. Half precision is summed in float32, one sum for each device and
        dtype.
        """
        self.task, self.follows = None, False
        if not self.sharding.syncs_gradients:
            return
        self.agree()
        rows: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for p in self.parameters:
            if p.requires_grad:
                rows.setdefault((p.device, torch.promote_types(p.dtype, torch.float32)), []).append(p)
        for (device, dtype), parameters in rows.items():
            self._average(parameters, device, dtype)

    def _average(self, parameters: list[nn.Parameter], device: torch.device, dtype: torch.dtype) -> None:
        """Average the gradients of parameters over the processes, in place, by one sum in `dtype` for each group.

        Flags of who has a gradient are sent along. A missing gradient counts as zeros. If no process has one, it stays
        None; if another has one, a new `grad` is made. Sparse gradients become dense. Waits for the device only if this
        process lacks a gradient: another one may have it.
        """
        presence = [p.grad is not None for p in parameters]
        grads = [torch.zeros_like(p, dtype=dtype) if p.grad is None else to_dense(p.grad, dtype) for p in parameters]
        row = torch.cat([*(g.reshape(-1) for g in grads), constant(tuple(map(float, presence)), dtype, device)])
        for group in self.sharding.batches:
            dist.all_reduce(row, group=group)
            row /= dist.get_world_size(group)
        *means, shares = row.split([*(p.numel() for p in parameters), len(presence)])
        if not all(presence):
            presence = [share > 0 for share in shares.real.tolist()]
        pairs = [(p, mean.view(p.shape)) for p, mean, is_there in zip(parameters, means, presence) if is_there]
        for p, _ in pairs:
            if p.grad is None or p.grad.is_sparse:
                p.grad = torch.empty_like(p)
        if pairs:
            torch._foreach_copy_([p.grad for p, _ in pairs], [mean for _, mean in pairs])  # type: ignore[misc]


def to_dense(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient in `dtype`, dense if it is sparse."""
    return (grad.to_dense() if grad.is_sparse else grad).to(dtype)


REMEDY = (
    "wrap the model again, or set all adapters trainable before wrapping "
    "(model.set_requires_grad([…]) of all their names) and find_unused_parameters=True"
)


def note_gradient(averager: ref[Averager], _parameter: Tensor) -> None:
    """Tell an averager of a parameter's new gradient: the hook of the parameter, which keeps no model in memory."""
    if (it := averager()) is not None:
        it.note_gradient()


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return a CRC-32 of the bytes of all tensors, as 8 hex digits. Waits for their devices."""
    crc = 0
    for t in tensors:
        data = t.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
        crc = zlib.crc32(data.numpy(), crc)  # type: ignore[arg-type]  # an array is a buffer
    return f"{crc:08x}"


WHY_NOT_DDP = (
    "DistributedDataParallel cannot wrap a model with a base that FSDP2 has sharded: graft averages the gradients of "
    "its adapters already. Train it without DistributedDataParallel."
)


def note_start(registry: Tuner, adapter: str) -> None:
    """Leave a RankNote of an adapter's first values in the store, and keep it in `registry.starts`, for a comparison
    with other processes.

    Shapes and dtypes are its topic, the norms of all values its text. Values that are no floats, empty, sharded or on
    the meta device are left out.
    """
    tensors = [s.tensor.detach() for s in registry.slots_of(adapter) if s.tensor.is_floating_point()]
    tensors = [t for t in tensors if t.numel() and not t.is_meta and layout_of(t) is None]
    norms = torch._foreach_norm(tensors) if tensors else []
    norms = torch.stack([n.to(norms[0].device) for n in norms]).tolist() if norms else []  # of several devices, maybe
    registry.starts[adapter] = RankNote(str([(tuple(t.shape), t.dtype) for t in tensors]), str(norms))


def check_averaged(registry: Tuner) -> None:
    """Raise DistributedError if gradients of parameters that train will not be averaged over the processes.

    With an averager, DDP is an error, also with one process; without DDP the averager finds its parameters and agrees
    on them with the other processes. With one process nothing else is checked.

    Else DDP, FSDP1, FSDP2 and DeepSpeed are checked: each must have known the parameter when it wrapped the model.
    FSDP1 must not have stopped the training of an active tensor; with an averager, late parameters of FSDP are not
    checked. With tensors in parts, warn if processes began with other values. Sets `registry.in_ddp` to whether the
    model runs within DDP.
    """
    ddp = DistributedDataParallel._active_ddp_module
    registry.in_ddp = ddp is not None
    averager = registry.averager
    if averager is not None:
        if ddp is not None:
            raise DistributedError(WHY_NOT_DDP)
        averager.find_parameters()
        averager.agree()
    if processes() < 2:
        return
    slots = list(slots_of_active(registry))
    trained = {name: slot.tensor for name, slot, _ in slots if trains(slot.tensor)}
    if ddp is not None:
        owned = {id(p) for bucket in ddp.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
        check_none_missed([n for n, p in trained.items() if id(p) not in owned], "DistributedDataParallel", REMEDY)
    still = [name for name, slot, wanted in slots if wanted and is_flat(slot.tensor) and not trains(slot.tensor)]
    check_none_missed(still, "FullyShardedDataParallel", f"{REMEDY}, or use_orig_params=True")
    if averager is None and any(map(is_managed, registry.model.modules())):
        late = [name for name, slot, _ in slots if trains(slot.tensor) and is_late(slot)]
        check_none_missed(late, "FSDP", "inject all adapters before fully_shard (or FullyShardedDataParallel)")
    ids = find_master_ids([*registry.model.parameters(), *trained.values()])
    if ids:
        check_none_missed(
            [n for n, p in trained.items() if id(p) not in ids], "DeepSpeed", "call deepspeed.initialize again"
        )
    if any([layout_of(slot.tensor) is not None or is_managed(slot.owner) for _, slot, _ in slots]):
        warn_other_starts(registry)


def is_replicated(registry: Tuner) -> bool:
    """Return True if there are several processes, and each is known to hold the whole adapter: with DDP, DeepSpeed or a
    base that was sharded before.
    """
    if processes() < 2:
        return False
    has_copies = registry.in_ddp or registry.averager is not None
    return has_copies or bool(find_master_ids(registry.model.parameters()))


def check_none_missed(names: list[str], who: str, remedy: str) -> None:
    """Raise DistributedError if `names`, parameters that `who` did not see when it wrapped the model, is not empty."""
    if names:
        raise DistributedError(
            f"{len(names)} parameters train that {who} did not see when it wrapped the model, such as '{names[0]}': no "
            f"process averages them. After set_adapter(), add_adapter() or set_requires_grad(): {remedy}."
        )


def warn_other_starts(registry: Tuner) -> None:
    """Give a PeftWarning for each active adapter with other initial values on other processes, since each process holds
    a part of it.

    Each adapter is compared once: its note is removed from `registry.starts`. One without a note is skipped, and so are
    processes that left no note yet.
    """
    for adapter in registry.active_adapters:
        note = registry.starts.pop(adapter, None)
        ranks = [] if note is None else note.list_differing_ranks()
        if ranks:
            warn(
                f"Adapter '{adapter}', with a part on each process, began with other values on rank(s) {ranks}. Call "
                "torch.manual_seed() with one seed on all processes before, or broadcast rank 0's values.",
                PeftWarning,
            )


def slots_of_active(registry: Tuner) -> Iterable[tuple[str, Slot, bool]]:
    """Yield (name for errors, slot, whether the adapter is set to train) of each tensor of active adapters that can
    train.
    """
    for carrier, name in iter_carried(registry.carriers(), registry.active_adapters):
        for slot in carrier.slots(name):
            if slot.trains:
                yield f"{carrier.key}.{slot.container}.{name}", slot, name in carrier.state.trainable


def is_late(slot: Slot) -> bool:
    """Return True if FSDP2 does not know a parameter: FSDP does not manage its module, or other parameters there are in
    parts and this one is not.

    A whole parameter alone proves nothing: by now FSDP has gathered those of its outermost unit.
    """
    if not is_managed(slot.owner):
        return True
    are_sharded = [layout_of(p) is not None for p in slot.owner._parameters.values() if p is not None]
    return layout_of(slot.tensor) is None and any(are_sharded)


def is_managed(module: nn.Module) -> bool:
    """Return True if a module's `__dict__` has the mark `_is_fsdp_managed_module`, whatever its value."""
    return MANAGED in module.__dict__
