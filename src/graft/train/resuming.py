# SPDX-License-Identifier: Apache-2.0
"""A training to a file and back: adapters, the optimizer's state by parameter name, scheduler, generators, loader.

A state finds its parameter by name, whatever the order of the parameters. A difference raises an error, or is reported.
"""

from __future__ import annotations

import copy
import operator
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graft import AdapterKeyError, CheckpointError, ConfigError, ConfigTypeError, DistributedError, PeftError
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.inject.parts import get_registry, unwrap_model
from graft.io.files import check_tensors
from graft.io.rendezvous import Meeting, exchange_objects, gather_tensors, get_rank, run_on_all
from graft.storage import parallel
from graft.storage.parallel import find_whole_shape, processes, write_whole
from graft.train.helpers import infer_device
from graft.train.optimizer_states import OptimizerStates, check_sharding, wrap_optimizer
from graft.train.state_check import (
    REMEDY,
    check_fields,
    check_generator,
    check_moments,
    check_random,
    check_state_finite,
    check_state_like,
    is_a,
    is_count,
)
from graft.train.state_file import find_generators, iterate_slots, pack, read_state_file, write_state_file

FILE, NOTE = "training.safetensors", "training.json"
FORMAT = 1
VALUE, GENERATOR = "value", "generator"
SAVE = "save_training()"
OF_RANK = {"random": is_a(dict), "loader": lambda value: True}
FIELDS = OF_RANK | {
    "step": is_count, "extra": is_a(dict), "processes": lambda n: is_count(n) and n > 0, "optimizer": is_a(str),
    "groups": is_a(list, dict), "others": is_a(dict), "states": is_a(dict, dict), "bases": is_a(dict, dict),
    "scheduler": lambda name: name is None or type(name) is str, "of_ranks": is_a(list, dict),
    "schedule": lambda state: state is None or type(state) is dict,
}  # fmt: skip
EMPTY: Json = {"params": []}
OF_MEMBERS = ("params", "param_names")  # entries of a group that are no options
OF_THIS_MACHINE = (*OF_MEMBERS, "foreach", "fused", "capturable")  # entries of a group that stay


@dataclass
class Resumed:
    """The result of `resume`.

    Attributes:
        step: as `save_training` was given it.
        extra: the same.
        fresh: parameters that the file does not hold, or in another shape, and "optimizer", "scheduler", "loader" or
            "generators": they begin anew, with the values that they have. Empty if `strict`.
        missing: entries of the file that nothing here takes. Empty if `strict`.
    """

    step: int
    extra: Json
    fresh: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class TrainedTensor(NamedTuple):
    """A tensor that training changes.

    Attributes:
        adapter, slot: of a tensor of an adapter; both None for a parameter of the base in the optimizer.
    """

    tensor: Tensor
    adapter: str | None
    slot: Any

    def assign(self, value: Tensor) -> None:
        """Write a whole value into the tensor, in place, whether it is sharded or not. A tensor on meta is replaced."""
        if self.slot is not None and self.slot.tensor.is_meta:
            self.slot.assign(value)
        else:
            write_whole(self.tensor if self.slot is None else self.slot.tensor, value)


def save_training(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: object = None,
    loader: object = None,
    *,
    step: int,
    extra: dict[str, object] | None = None,
) -> None:
    """Write all that the next step of a training depends on; `resume` continues from it. Call it between two steps.

    The folder is made. The adapters are in files as `save_pretrained` writes them. training.safetensors holds the same
    values as they are in memory, the optimizer's tensors as `<state>/<parameter>`, the generators, and the text of
    training.json, a file for people to read. It is renamed last, so that a process that is killed leaves the old state
    or the new one. Nothing is a pickle. Gradients and float16's scaler are not in it.

    Args:
        model: a PeftModel, or one in a wrapper. If several processes train it, all of them call this, with their own
            generators and loaders; the first writes. Under DDP the others have its values; of FSDP2 and ZeRO-3 whole
            tensors are gathered, one after the other.
        optimizer: of ZeRO-3 engine.optimizer.
        scheduler: of learning rates; None if there is none.
        loader: the loader of batches, if it has `state_dict()`, as torchdata's StatefulDataLoader has.
        extra: numbers, texts and tensors, in lists and dicts.

    Raises:
        ConfigError: an object is kept nowhere but in memory: the optimizer has a parameter that is not the model's, or
            the loader no state, or a value is neither a number, a text nor a tensor. The text names it. Or a parameter
            of the base that trains has adapters merged into it.
        DistributedError: processes hold the tensors together in a way that cannot be resumed by name: FSDP1, ZeRO-1,
            ZeRO-2; or each trains others, as stages of a pipeline do. Nothing is written.
        CheckpointError: a process does not call this.
    """
    note, tensors = collect_training_state(model, optimizer, scheduler, loader, step, extra or {})
    where = os.fspath(folder)
    inner: Any = unwrap_model(model)
    inner.save_pretrained(where)
    write_training(where, note, tensors)


def write_training(folder: str, note: Json, tensors: dict[str, Tensor]) -> None:
    """Write training.json, then training.safetensors, which holds the same text and is the one that is read.

    With several processes the first writes, and the others wait.
    """

    write = partial(write_state_file, os.path.join(folder, FILE), NOTE, note, tensors, readable=True)
    if processes() > 1:
        Meeting(SAVE, f"{folder}, step {note['step']}", range(processes())).run_on_first(write)
    else:
        write()


def resume(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: object = None,
    loader: object = None,
    strict: bool = True,
) -> Resumed:
    """Put a training into the state that `save_training` wrote: model, optimizer, scheduler, loader and generators.

    Make all of them as they were made then: the model by `PeftModel.from_pretrained(base, folder, is_trainable=True)`,
    for example. Everything is checked before anything changes.

    Args:
        strict: raise an error for any difference. If False, new things here begin at step 0 with the values that they
            have, and the report lists them. Options of groups go to those with parameters of the same names.

    Raises:
        AdapterKeyError: a tensor has another shape or dtype, is not in the file, or has no place here.
        BaseModelMismatchError: the base is another one, whatever `strict`.
        CheckpointError: there is no such file, or it is damaged; or the scheduler or loader refuses its state. Whatever
            `strict`, also for values that no training could use, such as NaN (NonFiniteError), a rate of 1e30 or an
            impossible position of a generator.
        ConfigError: another optimizer, other groups, another scheduler, another number of processes, or a loader that
            the file has no state for.
        DistributedError: as of `save_training`.
        InUseError: calls of the model last longer than its `change_timeout`. In any case nothing has changed.
    """
    where = os.fspath(folder)
    note, tensors = run_on_all(lambda: load_training(where), f"resume('{where}')")
    return ResumeJob(note, tensors, where, strict).run(model, optimizer, scheduler, loader)


def load_training(folder: str) -> tuple[Json, dict[str, Tensor]]:
    """Return the note and the tensors of a folder's training.safetensors, checked.

    Raises:
        CheckpointError: there is no such file, it is damaged, or a later graft wrote it.
    """
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{folder} holds no {FILE}, so that it holds no whole state of a training. "
            "Take an earlier folder of save_training or graft.train.Resumable."
        )
    note, tensors = read_state_file(path, NOTE, "the file of a training: save_training writes these")
    if note.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {note.get('format')!r}. A later graft wrote it: update.")
    check_training_note(note, path)
    return note, tensors


def check_training_note(note: Json, path: str) -> None:
    """Raise CheckpointError unless a note has the fields of `TrainingSnapshot.note`, each of its kind, and agrees with
    itself on the scheduler and the number of processes.
    """
    check_fields(note, FIELDS, path)
    for group in note["groups"]:
        check_fields(group, {"params": is_a(list, str)}, f"{path}: a group of parameters")
    for rank_state in note["of_ranks"]:
        check_fields(rank_state, OF_RANK, f"{path}: the state of a process")
    if (note["scheduler"] is None) != (note["schedule"] is None) or len(note["of_ranks"]) != note["processes"] - 1:
        raise CheckpointError(f"{path} contradicts itself on its scheduler or its processes. {REMEDY}")


# the state of a training


def collect_training_state(
    model: nn.Module, optimizer: Optimizer, scheduler: object, loader: object, step: int, extra: dict[str, object]
) -> tuple[Json, dict[str, Tensor]]:
    """Return the note and the tensors of a training, whole. All processes must call this.

    Raises:
        ConfigError, DistributedError: as `save_training`, on every process.
    """
    snapshot = run_on_all(lambda: TrainingSnapshot(model, optimizer, scheduler, loader, step, extra), SAVE)
    check_same_values(snapshot.values)
    return snapshot.gather()


def check_same_values(values: dict[str, TrainedTensor]) -> None:
    """Raise DistributedError unless all processes train tensors of the same names and shapes, since the file holds
    those of the first.
    """
    first, *later = exchange_objects({name: tuple(find_whole_shape(v.tensor)) for name, v in values.items()})
    for number, shapes in enumerate(later, 1):
        if differ := sorted(name for name in first.keys() | shapes.keys() if first.get(name) != shapes.get(name)):
            raise DistributedError(
                f"Rank {number} trains other tensors than rank 0, which the file would lack: {join_some(differ, 3)}. "
                "For stages of a pipeline, save each adapter by save_pretrained, and its optimizer yourself."
            )


class TrainedParts:
    """The parts of a training, and the tensors that it changes.

    Attributes:
        registry: of the model.
        optimizer_states: of the optimizer within wrappers of accelerate.
        scheduler: within wrappers of accelerate.
        schedule, loader_state: `state_dict()` of the scheduler and the loader, None for None.
        values: trained tensors by name.
        names: id of a trained tensor → its name.
        group_names: for each group of the optimizer the names of its parameters.
        masters: ids of the parameters that DeepSpeed trains through a float32 copy.
    """

    def find_parts(self, model: nn.Module, optimizer: object, scheduler: object, loader: Any) -> None:
        """Set all attributes. `optimizer` and `scheduler` may be wrapped by accelerate; scheduler and loader may be
        None.

        Checked are, in this order, the model, scheduler, loader, optimizer, its parameters, the sharding and merges.
        Raises ConfigError or DistributedError if the training cannot be saved or resumed by name.
        """
        self.registry, self.loader, self.scheduler = find_registry(model), loader, unwrap_accelerate(scheduler)
        self.schedule: Any = get_state(
            self.scheduler, "A {} is no scheduler. Pass the scheduler third, then the loader."
        )
        self.loader_state = get_state(
            loader,
            "The loader ({}) has no state_dict() with its position. Pass torchdata's StatefulDataLoader; or "
            "loader=None, and skip the earlier batches yourself.",
        )
        self.optimizer_states = wrap_optimizer(unwrap_accelerate(optimizer))
        self.values = collect_trained_tensors(unwrap_model(model), self.registry, self.optimizer_states)
        self.names = {id(v.tensor): name for name, v in self.values.items()}
        self.group_names = [[self.names[id(p)] for p in members] for members in self.optimizer_states.members]
        self.masters = parallel.find_master_ids(v.tensor for v in self.values.values())
        check_sharding({name: v.tensor for name, v in self.values.items()}, self.optimizer_states)
        check_unmerged(self.registry, self.names)

    def get_dtype(self, t: Tensor) -> torch.dtype:
        """Return the dtype of the values that train for a tensor: float32 if DeepSpeed has a copy of it."""
        return torch.float32 if id(t) in self.masters else t.dtype


class TrainingSnapshot(TrainedParts):
    """The state of a training as this process has it, checked; `gather` adds that of the other processes.

    Attributes:
        tensors: of the note, shared by all processes.
        rank_state, rank_tensors: note and tensors of this process only.
        kind: class name of the optimizer.
    """

    def __init__(
        self, model: nn.Module, optimizer: object, scheduler: object, loader: object, step: int, extra: Json
    ) -> None:  # fmt: skip
        """Collect this process's trained tensors, optimizer groups, other states of the optimizer, schedule, loader and
        random states. Nothing is written or exchanged, and tensors are not copied; optimizer states of parameters
        follow in `gather`.

        `optimizer` and `scheduler` may be wrapped by accelerate, and `scheduler` may be None.

        Raises:
            ConfigError, DistributedError: a part has state that cannot be saved.
        """
        self.find_parts(model, optimizer, scheduler, loader)
        optimizer_states = self.optimizer_states
        optimizer_states.check()
        self.kind = type(optimizer_states.inner).__name__
        self.tensors = tensors = dict[str, Tensor]()
        self.note: Json = {
            "format": FORMAT,
            "step": to_step(step),
            "extra": pack(extra, tensors, "extra"),
            "processes": processes(),
            "optimizer": get_class_name(optimizer_states.inner),
            "groups": [
                {"params": names}
                | {k: pack(v, tensors, f"{self.kind}, option '{k}'") for k, v in group.items() if k not in OF_MEMBERS}
                for names, group in zip(self.group_names, optimizer_states.groups)
            ],
            "others": pack(optimizer_states.collect_other_states(), tensors, self.kind),
            "scheduler": describe_scheduler(self.scheduler),
            "schedule": pack(self.schedule, tensors, get_class_name(self.scheduler)),
        }
        self.rank_tensors: dict[str, Tensor] = {}  # of this process alone
        at = rank_prefix(get_rank())
        self.rank_state = {
            "loader": pack(self.loader_state, self.rank_tensors, "The loader", stem=f"{at}own/t"),
            "random": pack({"python": random.getstate(), "numpy": get_numpy_state()}, self.rank_tensors, "random"),
        }
        self.rank_tensors |= {f"{at}{GENERATOR}/{name}": get() for name, (get, _) in list_generators(loader).items()}

    def gather(self) -> tuple[Json, dict[str, Tensor]]:
        """Return the note and all tensors, whole: optimizer states, master values and those of other processes
        included. The note also gets "bases" (fingerprints of the base by adapter), "states" (by parameter), the first
        process's state, and those of the others in "of_ranks".

        Every process of the training must call this, since tensors are exchanged. `self.tensors` is filled and
        returned, too.
        """
        for name, (t, *_) in self.values.items():
            self.tensors[f"{VALUE}/{name}"] = parallel.gather_master_values(t) if id(t) in self.masters else t
        states: dict[str, dict[str, object]] = {}
        for p, state in self.optimizer_states.states():
            name = self.names[id(p)]
            states[name] = {
                k: pack(v, self.tensors, f"{self.kind}, '{k}' of '{name}'", f"{k}/{name}") for k, v in state.items()
            }
        self.tensors |= gather_tensors(self.tensors)
        together = processes() > 1
        bases = {name: self.registry.fingerprint_base(name, together) for name in list_trained(self.registry)}
        everyone = exchange_objects((self.rank_state, self.rank_tensors))
        for _, rank_tensors in everyone:
            self.tensors |= rank_tensors
        notes = [notes for notes, _ in everyone]
        return self.note | notes[0] | {"bases": bases, "states": states, "of_ranks": notes[1:]}, self.tensors


def to_step(value: object) -> int:
    """Return a number of steps of any integer type as an int. Raises ConfigTypeError for other values."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigTypeError(f"step must be an int, got {value!r}.") from None


def rank_prefix(number: int) -> str:
    """Return the beginning of the names of a process's tensors: "rank1/" for number 1, "" for the first."""
    return f"rank{number}/" if number else ""


def find_registry(model: object) -> Any:
    """Return the registry of a PeftModel within wrappers; any model with adapters and `save_pretrained` passes.

    Raises:
        ConfigError: the object is no module, has no adapter, or has no `save_pretrained`.
    """
    inner: Any = unwrap_model(model) if isinstance(model, nn.Module) else None
    if inner is not None and not getattr(get_registry(inner), "peft_config", None):
        raise ConfigError(f"The model ({type(inner).__name__}) has no adapter. Add one before you save.")
    if not hasattr(inner, "save_pretrained"):
        raise ConfigError(f"A training needs a PeftModel, got {type(model).__name__}. Make one by get_peft_model.")
    return get_registry(inner)


def list_trained(registry: Any) -> list[str]:
    """Return the names of the adapters that are not frozen, as `save_pretrained` saves them."""
    return [name for name in registry.peft_config if name not in registry.frozen]


def collect_trained_tensors(
    model: nn.Module, registry: Any, optimizer_states: OptimizerStates
) -> dict[str, TrainedTensor]:
    """Return all tensors of the adapters, and all parameters in an optimizer, by name without wrappers.

    Each has its adapter and slot; parameters that are no adapter's have None for both.

    Tensors of an adapter that are not in the model are named by place and adapter.

    Raises:
        ConfigError: a parameter of the optimizer is not the model's, or a method has state that is not in tensors.
    """
    names: dict[int, str] = {}
    for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(t), parallel.strip_inner_wrappers(name))
    tensors: dict[str, TrainedTensor] = {}
    for adapter in list_trained(registry):
        state = registry.states.get(adapter)
        if state is not None and not isinstance(state, bool):
            raise ConfigError(
                f"Adapter '{adapter}' ({registry.peft_config[adapter].peft_type}) allocates while it trains, and its "
                "measurements are in no tensors. Save its adapter by save_pretrained instead."
            )
        for place, slot in iterate_slots(model, adapter):
            name = names.get(id(slot.tensor), f"{place}.{adapter}")
            tensors.setdefault(name, TrainedTensor(slot.tensor, adapter, slot))
    for i, members in enumerate(optimizer_states.members):
        for p in members:
            if id(p) not in names:
                raise ConfigError(
                    f"Group {i} of the optimizer has a parameter of shape {tuple(p.shape)} that is not the model's "
                    "(any more). Make the optimizer from model.parameters()."
                )
            tensors.setdefault(names[id(p)], TrainedTensor(p, None, None))
    return tensors


def check_unmerged(registry: Any, names: dict[int, str]) -> None:
    """Raise ConfigError if a weight of the base, or a bias that the merge has changed, has merged adapters in it and is
    among the trained tensors, id → name.
    """
    for key, layer in registry.layers.items():
        undo = layer.state.undo
        changed = [layer.site.parameter] if undo else []
        changed += ["bias"] if any(bias is not None for _, _, bias in undo) else []
        for attribute in changed:
            if name := names.get(id(getattr(layer.get_base_layer(), attribute, None))):
                raise ConfigError(
                    f"'{name}' is in the optimizer, and adapter(s) {', '.join(layer.merged_adapters)} are merged into "
                    f"layer '{key}', so that it is not the value that trains. Call unmerge_adapter() first."
                )


def unwrap_accelerate(wrapper: Any) -> Any:
    """Return the optimizer or scheduler within wrappers of accelerate; another object as it is."""
    while type(wrapper).__module__.startswith("accelerate."):
        wrapper = wrapper.optimizer if hasattr(wrapper, "optimizer") else wrapper.scheduler
    return wrapper


def get_state(thing: Any, fault: str) -> Any:
    """Return `state_dict()` of a scheduler or loader, None for None.

    Raises ConfigError if it lacks `state_dict` or `load_state_dict`, with the text `fault`, which gets its class name.
    """
    if thing is None:
        return None
    if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
        raise ConfigError(fault.format(type(thing).__name__))
    return thing.state_dict()


def get_class_name(thing: object) -> str:
    """Return module and qualified name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def describe_scheduler(scheduler: object) -> str | None:
    """Return module and qualified name of a scheduler's class; None for None.

    If it has `lr_lambdas`, their names follow in parentheses, each once, since no state holds these functions: of a
    partial its function's, of an object its class's.
    """
    if scheduler is None:
        return None
    rules = [f.func if isinstance(f, partial) else f for f in getattr(scheduler, "lr_lambdas", ())]
    names = dict.fromkeys(f.__qualname__ if hasattr(f, "__qualname__") else type(f).__qualname__ for f in rules)
    return f"{get_class_name(scheduler)}({', '.join(names)})" if names else get_class_name(scheduler)


def get_numpy_state() -> tuple[object, ...]:
    """Return the state of NumPy's global generator, with its array as a list."""
    kind, keys, *position = np.random.get_state()
    return (kind, np.asarray(keys).tolist(), *position)


def list_generators(loader: object) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], object]]]:
    """Return functions that get and set the state of each of torch's generators: "cpu", each device of the accelerator
    by name, and those in a loader as "loader:0" and so on.

    An accelerator that is not initialized is left out, and stays so.
    """
    generators: dict[str, Any] = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    kind = infer_device()
    module = torch.get_device_module(kind)
    if kind != "cpu" and getattr(module, "is_initialized", lambda: True)():  # MPS always is
        for i in range(module.device_count()):
            at = {} if kind == "mps" else {"device": torch.device(kind, i)}
            generators[f"{kind}:{i}"] = partial(module.get_rng_state, **at), partial(module.set_rng_state, **at)
    return generators | {f"loader:{i}": (g.get_state, g.set_state) for i, g in enumerate(find_generators(loader))}


# back


class ResumeJob(TrainedParts):
    """One call of `resume`: it finds the targets, checks them, then writes.

    Attributes:
        tensors: values of the file by name of the trained tensor.
        rank_state, generator_states: of this process in the file. `rank_state` is {} if the file has fewer processes.
        report: is returned.
    """

    def __init__(self, note: Json, tensors: dict[str, Tensor], folder: str, strict: bool) -> None:
        """Sort the file's note and tensors, for this process. Nothing is checked yet."""
        self.note, self.folder, self.strict = note, folder, strict
        self.tensors = {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{VALUE}/")}
        rank_states: list[Json] = [note, *note["of_ranks"]]
        self.rank_state = rank_states[get_rank()] if get_rank() < len(rank_states) else {}
        stem = f"{rank_prefix(get_rank())}{GENERATOR}/"
        self.generator_states = {k.removeprefix(stem): t for k, t in tensors.items() if k.startswith(stem)}
        self.report = Resumed(note["step"], note["extra"])

    def run(self, model: nn.Module, optimizer: object, scheduler: object, loader: object) -> Resumed:
        """Check everything, then write values, optimizer, scheduler, loader and generators, and return the report.

        All processes agree after each check, so that an error is raised on all.

        Writing waits until no call of the model runs, or raises InUseError after the model's `change_timeout`. If
        loader or scheduler refuses its state, both get theirs back, and nothing has changed.
        """
        call = f"resume('{self.folder}')"
        run_on_all(partial(self.find_parts, model, optimizer, scheduler, loader), call)
        run_on_all(self.check_all, call)
        with self.registry.call.gate.change("resume", None):
            with ExitStack() as undo:
                run_on_all(partial(self.load_states, undo), call)
                undo.pop_all()
            self.put_values()
            self.put_optimizer()
        self.put_generators()
        return self.report

    def load_states(self, undo: ExitStack) -> None:
        """Load copies of the file's states into the loader, then the scheduler. One is skipped that is None, begins
        anew, or has no state in the file.

        On `undo` is put the way back to state and attributes, since their code may refuse a state.

        Raises:
            CheckpointError: one of them raises an error.
        """
        schedule = None if "scheduler" in self.report.fresh else self.note["schedule"]
        for thing, state in (self.loader, self.rank_state.get("loader")), (self.scheduler, schedule):
            if thing is None or state is None:
                continue
            undo.callback(restore_object, thing, copy.deepcopy(thing.state_dict()), {**getattr(thing, "__dict__", {})})
            try:
                thing.load_state_dict(copy.deepcopy(state))
            except Exception as e:
                raise CheckpointError(
                    f"{self.folder}: a {type(thing).__name__} refuses the state in {FILE} ({e!r}). {REMEDY}"
                ) from e

    def check_all(self) -> None:
        """Check base, values, optimizer, scheduler, processes, loader and contents, in this order.

        Differences are raised with `strict`, else they go into the report; another base is always raised.
        """
        self.check_base()
        self.check_values()
        self.check_optimizer()
        self.check_scheduler()
        self.check_processes()
        self.check_loader()
        self.check_contents()

    def check_contents(self) -> None:
        """Raise CheckpointError for unusable contents of the files that would be written into the model and the
        trainer: values, options of optimizer groups, moments, schedule and random states. Nothing is written.

        Values have to be finite. Options of this machine are left out, and options that the file or the group lacks.
        Optimizer, schedule or random states that begin anew are not checked. Moments of ZeRO-3's masters have to be
        float32. A generator of the CPU has to be in the file; others are checked where the file and this program have
        them.
        """
        path = os.path.join(self.folder, FILE)
        check_tensors(self.tensors, path, allow_nonfinite=True)
        check_state_finite(self.tensors, f"{path}: the values")
        inner, fresh = self.optimizer_states.inner, self.report.fresh
        for group, then in self.matching_groups():
            for name in then.keys() & {*group, "initial_lr"} - {*OF_THIS_MACHINE}:
                check_state_like(inner, then[name], group.get(name, 0.0), f"{path}: the option '{name}'", name)
        for p, group, name in self.parameters_with_state():
            where = f"{path}: the optimizer's state of '{name}'"
            check_moments(self.note["states"][name], find_whole_shape(p), self.get_dtype(p), inner, group, where)
        if self.note["schedule"] is not None and "scheduler" not in fresh:
            check_state_like(self.scheduler, self.note["schedule"], self.schedule, f"{path}: the schedule")
        if self.rank_state and "generators" not in fresh:
            check_random(self.rank_state["random"], path)
            for name in self.generator_states.keys() & list_generators(self.loader).keys() | {"cpu"}:
                device = "cpu" if name.startswith("loader:") else name
                check_generator(self.generator_states.get(name), f"{path}: '{name}'", device)

    def add_mismatch(self, error: type[PeftError], text: str, fresh: list[str], missing: list[str]) -> None:
        """Raise `error` with the text if `strict`.

        Else append to the report's `fresh` the names that begin anew, and to its `missing` those left over in the file.
        `error` and `text` are not used then.
        """
        if self.strict:
            raise error(
                f"The training in {self.folder} cannot continue: {text}. Nothing has changed; strict=False resumes the "
                "parts that fit, and begins anew with the rest."
            )
        self.report.fresh += fresh
        self.report.missing += missing

    def check_base(self) -> None:
        """Raise BaseModelMismatchError if an adapter of the file, which the model has, was on another base.

        Fields are compared that both fingerprints have. If one fingerprint does not name its weights, both are compared
        in full. The present one is made for each adapter, by all processes together where there are several. Raises
        CheckpointError if the file has no valid fingerprint.
        """
        for adapter, then in self.note["bases"].items():
            if adapter not in self.registry.peft_config:
                continue  # its tensors are missing
            what = f"The training of adapter '{adapter}' in {self.folder}"
            # other targets show in the names of parameters
            self.registry.check_base(adapter, then, what, together=processes() > 1, common=True)

    def check_values(self) -> None:
        """Report a mismatch, an error with `strict`, for each of three differences between the adapter's values and the
        file: shapes, dtypes, and names that are only here or only in the file.

        Values with another shape are noted as fresh, and names only here or there as fresh or missing; other dtypes are
        noted as neither. Shapes are those of whole tensors, also where a value is sharded. Values with another shape
        are not compared by dtype. Master values of ZeRO-3 count as float32. Tensors of a prompt's network are left to
        `check_prompts`.
        """
        network_names = self.check_prompts()
        current = {name: v.tensor for name, v in self.values.items() if name not in network_names}
        both = [name for name in current if name in self.tensors]
        shape = {n: tuple(find_whole_shape(current[n])) for n in both}
        shapes = [n for n in both if shape[n] != self.tensors[n].shape]
        if shapes:
            text = [f"'{n}' has shape {tuple(self.tensors[n].shape)} there and {shape[n]} here" for n in shapes]
            self.add_mismatch(AdapterKeyError, f"{join_some(text, 3)}, as of another rank", shapes, [])
        dtype = {n: self.get_dtype(current[n]) for n in both}
        dtypes = [n for n in both if n not in shapes and dtype[n] != self.tensors[n].dtype]
        if dtypes:
            text = [f"'{n}' is {self.tensors[n].dtype} there and {dtype[n]} here" for n in dtypes]
            self.add_mismatch(AdapterKeyError, f"{join_some(text, 3)}", [], [])
        fresh = [n for n in current if n not in self.tensors]
        missing = [n for n in self.tensors if n not in current and n not in network_names]
        if fresh or missing:
            lists = (("it does not hold", fresh), ("here is no", missing))
            parts = [f"{what} {join_some(sorted(names), 3)}" for what, names in lists if names]
            self.add_mismatch(AdapterKeyError, f"{'; '.join(parts)}: other targets, or another adapter", fresh, missing)

    def check_prompts(self) -> set[str]:
        """Return the names of prompt tensors, here and in the file, where only one of the two computes the prompt by a
        network: the names of the prompt's parameters differ. Reports a mismatch, an error with `strict`, for each such
        adapter.

        Without this check, the network's first tensor would match a prompt's by name, and maybe by shape.
        """
        differing: set[str] = set()
        for adapter in self.registry.peft_config:
            prompt = self.registry.parts_of(adapter).prompt
            named = {self.names[id(p)]: name for name, p in prompt.named_parameters()} if prompt is not None else {}
            stem = next((whole.removesuffix(name) for whole, name in named.items()), None)
            saved = [n for n in self.tensors if stem is not None and n.startswith(stem)]
            if saved and named.keys() != {*saved}:
                places = ("there", "here") if len(saved) > len(named) else ("here", "there")
                self.add_mismatch(
                    AdapterKeyError,
                    f"{places[0]} a network computes the prompt of adapter '{adapter}', and {places[1]} none does "
                    "(get_peft_model makes the network, a load of the adapter does not)",
                    [*named],
                    saved,
                )
                differing.update(named, saved)
        return differing

    def check_optimizer(self) -> None:
        """Report a mismatch, an error with `strict`, if the optimizer is of another class: then all of it begins anew.

        Otherwise report one if its groups, in order, have other parameters: those only here begin anew, and those only
        in the file are missing.
        """
        then, now = self.note["optimizer"], get_class_name(self.optimizer_states.inner)
        if then != now:
            self.add_mismatch(ConfigError, f"its optimizer is a {then}, and here is a {now}", ["optimizer"], [])
            return
        groups = [set(group["params"]) for group in self.note["groups"]]
        sets = [set(names) for names in self.group_names]
        if groups != sets:
            saved, live = set().union(*groups), set().union(*sets)
            one = sorted(saved ^ live)
            text = f"parameters of only one of the two are {join_some(one, 3)}"
            text = text if one else "they hold others of the parameters"
            self.add_mismatch(
                ConfigError,
                f"its optimizer has {len(groups)} groups of {[*map(len, groups)]} parameters, and here are {len(sets)} "
                f"of {[*map(len, sets)]}; {text}",
                sorted(live - saved - {*self.report.fresh}),
                sorted(saved - live - {*self.report.missing}),
            )

    def check_processes(self) -> None:
        """Report a mismatch, an error with `strict`, if the number of processes differs: then "generators" is fresh and
        missing.
        """
        then, now = self.note["processes"], processes()
        if then != now:
            text = f"{then} processes trained it, and here are {now}, so that their rows and random numbers are others"
            self.add_mismatch(ConfigError, text, ["generators"], ["generators"])

    def check_scheduler(self) -> None:
        """Report the first mismatch, an error with `strict`, of the scheduler: another class or functions, or a
        scheduler only here or there; other keys in its state; another number of rates. The number is not compared if
        the optimizer begins anew. After a mismatch the scheduler begins anew. Without a scheduler on both sides nothing
        is reported.
        """
        then, now = self.note["scheduler"], describe_scheduler(self.scheduler)
        if then != now:
            text = f"its scheduler is {then}, and here is {now}"
            self.add_mismatch(ConfigError, text, ["scheduler"] if now else [], ["scheduler"] if then else [])
        elif now and (differing := self.note["schedule"].keys() ^ self.schedule.keys()):
            self.add_mismatch(ConfigError, f"its scheduler's state differs in {sorted(differing)}", ["scheduler"], [])
        elif now and "optimizer" not in self.report.fresh:
            rates, current = self.note["schedule"].get("base_lrs", []), getattr(self.scheduler, "base_lrs", [])
            if isinstance(rates, list) and len(rates) != len(current):
                text = f"its scheduler has {len(rates)} rates, here {len(current)}"
                self.add_mismatch(ConfigError, text, ["scheduler"], [])

    def check_loader(self) -> None:
        """Report a mismatch, an error with `strict`, if only one of this process's state in the file and this call has
        a loader: "loader" is then missing or fresh.
        """
        then, now = self.rank_state.get("loader"), self.loader_state
        if (then is None) != (now is None):
            text = "it holds the state of a loader, and none is passed" if now is None else "it holds no loader's state"
            self.add_mismatch(ConfigError, text, [] if now is None else ["loader"], ["loader"] if now is None else [])

    def put_values(self) -> None:
        """Write the file's values into the adapters, one adapter after the other, then into the base's parameters.

        Names that begin anew, or are not in the file, are left alone. State that the registry keeps for an adapter that
        gets values is dropped.
        """
        known = self.tensors.keys() - self.report.fresh
        fits = [(v, self.tensors[n]) for n, v in self.values.items() if n in known]
        for adapter in self.registry.peft_config:
            adapter_pairs = [(v.assign, tensor) for v, tensor in fits if v.adapter == adapter]
            if adapter_pairs:
                self.registry.assign_values(adapter, adapter_pairs)
        for v, tensor in fits:
            if v.adapter is None:
                v.assign(tensor)

    def put_optimizer(self) -> None:
        """Replace the optimizer's states, also those of no parameter, by those of the file, and overwrite the options
        of its groups.

        Options of this machine, such as `fused`, stay. Nothing happens if the optimizer begins anew.
        """
        if "optimizer" in self.report.fresh:
            return
        states = self.note["states"]
        parameter_states = [(p, group, states[name]) for p, group, name in self.parameters_with_state()]
        self.optimizer_states.replace_states(parameter_states, self.note["others"])
        for group, then in self.matching_groups():
            for k, value in then.items():
                if k not in OF_THIS_MACHINE:
                    group[k] = place_option(value, group.get(k))

    def matching_groups(self) -> Iterator[tuple[Json, Json]]:
        """Yield the optimizer's groups that share a parameter with a group of the file, each with the group of the file
        that shares most, of equals the first. Yields nothing if the optimizer begins anew.
        """
        for group, names in zip(self.optimizer_states.groups, self.group_names):
            then = max(self.note["groups"], key=lambda g: len({*names} & {*g["params"]}), default=EMPTY)
            if "optimizer" not in self.report.fresh and {*names} & {*then["params"]}:
                yield group, then

    def parameters_with_state(self) -> Iterator[tuple[nn.Parameter, Json, str]]:
        """Yield (parameter, its group, name) for parameters with a state in the file that do not begin anew.

        Yields nothing if the optimizer begins anew.
        """
        known = self.note["states"].keys() - self.report.fresh if "optimizer" not in self.report.fresh else ()
        for group, members in zip(self.optimizer_states.groups, self.optimizer_states.members):
            yield from ((p, group, self.names[id(p)]) for p in members if self.names[id(p)] in known)

    def put_generators(self) -> None:
        """Set the states of Python's, NumPy's and torch's generators, and those in the loader, to those of this process
        in the file.

        Devices that are not here, and generators of the loader that the file lacks, are skipped. Nothing happens if
        generators begin anew, or the file has no state of this process.
        """
        if not self.rank_state or "generators" in self.report.fresh:
            return
        state = self.rank_state["random"]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        for name, (_, set_state) in list_generators(self.loader).items():
            if name in self.generator_states:
                set_state(self.generator_states[name])


def restore_object(thing: Any, state: object, attributes: dict[str, object]) -> None:
    """Put a loader or scheduler back into its state of before: by `load_state_dict`, with its errors ignored, then by
    its attributes.
    """
    with suppress(Exception):
        thing.load_state_dict(state)
    for name, value in attributes.items():
        setattr(thing, name, value)


def place_option(value: object, now: object) -> object:
    """Return an option for a group.

    If `now` is a tensor of the value's shape it is overwritten in place, since a compiled step holds it; another tensor
    is cloned. A value that is no tensor is returned as it is.
    """
    if not isinstance(value, Tensor):
        return value
    if isinstance(now, Tensor) and now.shape == value.shape:
        return now.copy_(value)
    return value.clone()
