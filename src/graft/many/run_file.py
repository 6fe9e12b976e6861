# SPDX-License-Identifier: Apache-2.0
"""The file of a run: everything that its next step depends on, as safetensors and JSON.

It is written whole or not at all.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft import CheckpointError, ConfigError
from graft.config.atomic import is_link
from graft.config.reading import Json, describe_fault
from graft.core.errors import join_some
from graft.inject.parts import get_registry
from graft.many.run import STATES, Run, StepRecord, ValidationRecord
from graft.train.state_check import (
    REMEDY,
    check_fields,
    check_generator,
    check_moments,
    check_state_finite,
    check_state_like,
    is_a,
    is_count,
    is_number,
)  # fmt: skip
from graft.train.state_file import iterate_slots, pack, read_state_file, simulate_read, write_state_file

FILE, NOTE = "run.safetensors", "run.json"
FIELDS = {
    "config": is_a(dict), "base": is_a(dict), "settings": is_a(dict), "values": is_a(dict), "optimizer": is_a(dict),
    "schedule": lambda state: state is None or type(state) is dict, "draws": is_a(list, Tensor),
    "position": is_a(dict), "under_way": is_a(dict), "step": is_count, "state": is_a(list), "unseen": is_a(bool),
    "curve": is_a(list, list), "valid": is_a(list, list),
    "first": lambda first: first is None or (type(first) is tuple and len(first) == 2 and type(first[0]) is str),
}  # fmt: skip
POSITION = {"epoch": is_count, "taken": is_count, "began": is_a(list, Tensor)}
UNDER_WAY = {"losses": is_a(list, Tensor), "gradients": lambda all_: all_ is None or type(all_) is list}


def list_runs(folder: str) -> list[str]:
    """Return the sorted names of the runs with a file in a folder; none if there is no folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, FILE)))


def delete_run(name: str, folder: str) -> None:
    """Delete the file of a run, if there is one, and its folder, if it is then empty.

    Leave a run's folder alone that is a symbolic link. A folder that cannot be deleted stays, without an error; a file
    that cannot raises OSError.
    """
    where = os.path.join(folder, name)
    if is_link(where):
        return
    with suppress(FileNotFoundError):
        os.remove(os.path.join(where, FILE))
    with suppress(OSError):  # it holds other files
        os.rmdir(where)


def save_run(run: Run, model: nn.Module, folder: str) -> None:
    """Write `folder`/<name of the run>/run.safetensors, and make the folder.

    The file holds all that the next step of the run depends on, its curve and validation losses. Tensors of the adapter
    and of the optimizer are not copied before.

    Raises ConfigError for state that is more than numbers, texts and tensors.
    """
    loader, tensors = run.loader, dict[str, Tensor]()
    state = {
        "config": run.config_values,
        "base": get_registry(model).fingerprint_base(run.name),
        "settings": describe_settings(run),
        "values": {key: slot.tensor for key, slot in iterate_slots(model, run.name)},
        "optimizer": run.optimizer_state_dict(),
        "schedule": None if run.schedule is None else run.schedule.state_dict(),
        "draws": run.draws.states,
        "position": {"epoch": loader.epoch, "taken": loader.taken, "began": loader.began},
        "first": loader.first,
        "under_way": {"losses": run.losses, "gradients": run.gradients()},
        "step": run.step,
        "state": [run.state, run.why],
        "unseen": run.needs_check,
        "curve": [list(point) for point in run.curve],
        "valid": [list(look) for look in run.valid],
    }
    note, path = pack(state, tensors, f"Run '{run.name}'"), os.path.join(folder, run.name, FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_state_file(path, NOTE, note, tensors)


def load_run(name: str, folder: str) -> Json | None:
    """Return the content of a run's file; None if there is no file. A file of an older graft gets `first` = None.

    Raises:
        CheckpointError: it is damaged, or another kind of file.
    """
    path = os.path.join(folder, name, FILE)
    if not os.path.exists(path):
        return None
    older = {"first": None}  # fields that files of earlier states of graft lack
    note = older | read_state_file(path, NOTE, "the file of a run: MultiTrain.save() writes these")[0]
    check_fields(note, FIELDS, path)
    return note


def describe_settings(run: Run) -> Json:
    """Return the settings of a run that its results depend on: "optimizer" and "schedule" as at the start, "clip",
    "accumulate", "seed", and "loss" by name.
    """
    return {
        "optimizer": run.settings,
        "schedule": run.schedule_settings,
        "clip": run.clip,
        "accumulate": run.accumulate,
        "seed": run.seed,
        "loss": run.loss_name,
    }


def to_json_value(value: object) -> Any:
    """Return a value as JSON reads it back.

    Objects, functions and classes become names that are equal in all processes; keys that JSON lacks are dropped.
    """
    return json.loads(json.dumps(value, default=name_object, skipkeys=True))


def name_object(value: object) -> object:
    """Return a name for an object that JSON lacks: a list of function and arguments for a partial, the qualified name
    of a function or class, else its text. If the text holds an address, the name of the class.

    A partial gives one flat list: its function, its arguments and its keywords. A qualified name has no module.
    """
    if isinstance(value, partial):
        return [value.func, *value.args, value.keywords]
    text = str(value)
    return getattr(value, "__qualname__", type(value).__qualname__ if " at 0x" in text else text)


def restore_run(run: Run, model: nn.Module, state: Json, where: str) -> None:
    """Put a new run, with its adapter on the model, into the state of its file.

    The checks run in this order: base, config and settings, contents, first batch, number of steps. Then schedule,
    optimizer, the partial step, and `step`, `state`, `why`, `needs_check`, `curve` and `valid` are overwritten; then
    the loader, and at last the adapter's values. An ended run that now has more steps is running again. A run that
    takes part in the next round reads its data up to the position; others only note the position.

    Raises:
        BaseModelMismatchError: it was made on another base.
        ConfigError: it has another config, other settings, fewer steps than it has made, or data with another first
            batch.
        CheckpointError: the file's content cannot be used, or optimizer or schedule refuse their state. Whatever is
            raised, the adapter's values have not changed. If either refuses, the schedule loads its old state again;
            the optimizer is not restored, since torch's check a state before they change.
    """
    path = os.path.join(where, run.name, FILE)
    get_registry(model).check_base(run.name, state["base"], f"Run '{run.name}' in {where}")
    current = {"config": run.config_values, "settings": describe_settings(run)}
    for what, now in current.items():
        now = simulate_read(now)
        differ = [f"{k} = {state[what][k]!r}, now {v!r}" for k, v in now.items() if differs(state[what].get(k, v), v)]
        if differ:
            raise ConfigError(
                f"Run '{run.name}' in {where} was begun with {'; '.join(differ)}. Add it as it was, or under another "
                "name."
            )
    check_run_contents(run, model, state, path)
    first = state["first"]
    if first is not None and run.has_data and not run.loader.begins_with(first):
        raise ConfigError(
            f"Run '{run.name}' in {where} was begun with other data, since the first batch differs. Add it with "
            "the data that it had, drawn by torch's generators only."
        )
    if run.steps is not None and state["step"] > run.steps:
        raise ConfigError(f"Run '{run.name}' has made {state['step']} steps, and is to make {run.steps}. Raise it.")
    before = {} if run.schedule is None else copy.deepcopy(run.schedule.state_dict())
    for thing, name in (run.schedule, "schedule"), (run.optimizer, "optimizer"):
        try:
            if thing is not None:
                thing.load_state_dict(state[name])
        except Exception as e:  # of a class that graft does not know
            if run.schedule is not None:
                with suppress(Exception):
                    run.schedule.load_state_dict(before)
            raise CheckpointError(f"{path}: a {type(thing).__name__} refuses its state ({e!r}). {REMEDY}") from e
    run.restore_partial_step(**state["under_way"])
    run.step, (run.state, run.why) = state["step"], state["state"]
    run.needs_check = state["unseen"]
    run.curve, run.valid = [StepRecord(*p) for p in state["curve"]], [ValidationRecord(*v) for v in state["valid"]]
    if run.can_continue:
        run.state, run.why = "running", None
    # a run that has ended may be saved again, and continue later: it does not read its data now
    to = run.loader.seek if run.joins_next_round else run.loader.set_position
    to(**state["position"], now=state["draws"])
    for key, slot in iterate_slots(model, run.name):
        slot.assign(state["values"][key])


def differs(a: object, b: object) -> bool:
    """Return True if two values of settings differ, or if the comparison raises RuntimeError, as for tensors of several
    numbers. Other errors are raised.
    """
    try:
        return bool(a != b)
    except RuntimeError:
        return True


def check_run_contents(run: Run, model: nn.Module, state: Json, path: str) -> None:
    """Raise CheckpointError if the contents of a run's file do not fit the run. Nothing changes.

    First come the fields of the position and of the step under way. Then come end state, curve, validation rows,
    position, losses and gradients; one error lists all wrong ones of these. A run with data has fewer losses than
    `accumulate`, and a position within `(step + 1) * accumulate` batches. Gradients must be there exactly if there are
    losses, with the shapes of the run's parameters; single ones may be None. Then come the adapter's values, the
    optimizer, the schedule (in both file and run, or in neither), and the random states, of as many generators as the
    run has. NaN or infinite values raise NonFiniteError, a CheckpointError.
    """
    check_fields(state["position"], POSITION, f"{path}: the position in the data")
    check_fields(state["under_way"], UNDER_WAY, f"{path}: the step under way")
    losses, gradients = state["under_way"]["losses"], state["under_way"]["gradients"]
    shapes = [p.shape for p in run.parameters]
    right = {
        "state": len(state["state"]) == 2 and state["state"][0] in STATES and isinstance(state["state"][1], str | None),
        "curve": len(state["curve"]) == state["step"] and all(map(make_row_test(4), state["curve"])),
        "valid": all(map(make_row_test(2), state["valid"])),
        "position": state["position"]["taken"] <= (state["step"] + 1) * run.accumulate,  # it may have failed there
        "losses": (len(losses) < run.accumulate or not run.has_data)
        and all(loss.shape == () and is_number(loss) for loss in losses),
        "gradients": (gradients is not None) == bool(losses) and len(gradients or shapes) == len(shapes) and all(
            g is None or (isinstance(g, Tensor) and g.shape == shape and describe_fault(g) is None)
            for g, shape in zip(gradients or (), shapes)
        ),
    }  # fmt: skip
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise CheckpointError(f"{path}: {join_some(wrong)} do not fit a run. {REMEDY}")
    check_run_values(state["values"], {key: slot.tensor for key, slot in iterate_slots(model, run.name)}, path)
    check_state_finite({"losses": torch.stack(losses)} if losses else {}, f"{path}: the step under way")
    check_state_finite({f"{i}": g for i, g in enumerate(gradients or ())}, f"{path}: the gradients")
    check_optimizer_state(run, state["optimizer"], path)
    if (state["schedule"] is None) != (run.schedule is None):
        raise CheckpointError(f"{path} has a schedule and the run has none, or the reverse. {REMEDY}")
    if run.schedule is not None:
        check_state_like(run.schedule, state["schedule"], run.schedule.state_dict(), f"{path}: the schedule")
    for states in (state["draws"], state["position"]["began"], *([state["first"][1]] if state["first"] else [])):
        if not isinstance(states, list) or len(states) != len(run.draws.states):
            raise CheckpointError(f"{path} has states of another number of generators than the run. {REMEDY}")
        for generator in states:
            check_generator(generator, path)


def make_row_test(length: int) -> Callable[[list[object]], bool]:
    """Return a function that tells whether a list has `length` entries: a step (an int from 0 on), then ints and
    floats. Bools are refused.
    """
    return lambda row: len(row) == length and is_count(row[0]) and all(type(n) in (int, float) for n in row)


def check_run_values(values: Json, tensors: dict[str, Tensor], path: str) -> None:
    """Raise CheckpointError unless the names are those of `tensors`, and each value has the tensor's shape and dtype
    and is finite. A NaN or infinite value raises NonFiniteError, a CheckpointError.
    """
    if not values.keys() == tensors.keys():
        raise CheckpointError(
            f"{path} holds other tensors than the adapter has: {join_some(sorted(values.keys() ^ tensors.keys()))}. "
            f"{REMEDY}"
        )
    for name, t in tensors.items():
        value = values[name]
        if not isinstance(value, Tensor) or describe_fault(value) or (value.shape, value.dtype) != (t.shape, t.dtype):
            raise CheckpointError(f"{path}: '{name}' is no tensor of shape {tuple(t.shape)} and {t.dtype}. {REMEDY}")
    check_state_finite(values, f"{path}: the values")


def check_optimizer_state(run: Run, state: Json, path: str) -> None:
    """Raise CheckpointError unless a `state_dict` fits the run's optimizer: its fields, its groups' options, the same
    parameters in the same order, and for each parameter the state that its class keeps. Parameters may lack a state.
    NaN or infinite values raise NonFiniteError.
    """
    check_fields(state, {"state": is_a(dict, dict), "param_groups": is_a(list, dict)}, f"{path}: the optimizer")
    optimizer, groups = run.optimizer, run.optimizer.state_dict()["param_groups"]
    check_state_like(optimizer, state["param_groups"], groups, f"{path}: the optimizer's groups")
    group_of = {i: group for group in groups for i in group["params"]}
    numbers = [i for group in state["param_groups"] for i in group.get("params", ())]
    if numbers != [*group_of] or not state["state"].keys() <= group_of.keys():
        raise CheckpointError(f"{path}: the optimizer has other parameters than the run. {REMEDY}")
    for i, p in zip(group_of, (p for group in optimizer.param_groups for p in group["params"])):
        of_p = state["state"].get(i, {})
        check_moments(of_p, p.shape, p.dtype, optimizer, group_of[i], f"{path}: the optimizer's state of parameter {i}")
