# SPDX-License-Identifier: Apache-2.0
"""The file of a run: all that its next step depends on, as safetensors and JSON. It is written whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from graft.config.reading import Json
from graft.core.errors import ConfigError
from graft.io.save import base_fingerprint
from graft.train.multi.run import Point, Run, Valid
from graft.train.state_file import check_base, pack, read, slots, unpack, write

FILE, NOTE = "run.safetensors", "run.json"


def folders_in(folder: str) -> list[str]:
    """Return the names of the runs that a folder holds."""
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, FILE)))


def delete(name: str, folder: str) -> None:
    """Delete the file of a run, if there is one."""
    where = os.path.join(folder, name)
    with suppress(FileNotFoundError):
        os.remove(os.path.join(where, FILE))
    with suppress(OSError):  # it holds other files
        os.rmdir(where)


def save(run: Run, model: nn.Module, folder: str) -> None:
    """Write `folder`/<name of the run>/run.safetensors."""
    tensors: dict[str, Tensor] = {}
    note = pack(state_of(run, model), tensors, f"Run '{run.name}'")
    path = os.path.join(folder, run.name, FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write(path, NOTE, note, tensors)


def load(name: str, folder: str) -> Json | None:
    """Return what the file of a run holds; None if there is none.

    Raises:
        CheckpointError: it is damaged, or no file of a run.
    """
    path = os.path.join(folder, name, FILE)
    if not os.path.exists(path):
        return None
    return read(path, NOTE, "the file of a run: MultiTrain.save() writes these")[0]


def state_of(run: Run, model: nn.Module) -> Json:
    """Return all that the next step of a run depends on, and what it has made."""
    loader = run.loader
    return {
        "config": run.config_values,
        "base": base_fingerprint(model, run.name),
        "settings": settings(run),
        "values": {key: slot.tensor for key, slot in slots(model, run.name)},
        "optimizer": run.optimizer_state(),
        "schedule": None if run.schedule is None else run.schedule.state_dict(),
        "draws": run.draws.states,
        "position": {"epoch": loader.epoch, "taken": loader.taken, "began": loader.began},
        "first": loader.first,
        "under_way": {"losses": run.losses, "gradients": run.gradients()},
        "step": run.step,
        "state": [run.state, run.why],
        "unseen": run.unseen,
        "curve": [list(point) for point in run.curve],
        "valid": [list(look) for look in run.valid],
    }


def settings(run: Run) -> Json:
    """Return what a run was told that its values depend on."""
    return {
        "optimizer": run.begun,
        "schedule": run.begun_schedule,
        "clip": run.clip,
        "accumulate": run.accumulate,
        "seed": run.seed,
        "loss": run.loss_name,
    }


def described(value: object) -> Any:
    """Return a value as JSON has it; objects, functions and classes by name, the same in any process."""
    return json.loads(json.dumps(value, default=said))


def said(value: object) -> object:
    """Return what JSON has not as lists and text."""
    if isinstance(value, partial):
        return [value.func, *value.args, value.keywords]
    text = str(value)
    return getattr(value, "__qualname__", type(value).__qualname__ if " at 0x" in text else text)


def restore(run: Run, model: nn.Module, state: Json, where: str) -> None:
    """Put a run into the state that its file holds. The run is new, with its adapter on the model.

    Raises:
        BaseModelMismatchError: it was made on another base.
        ConfigError: it has another config, other settings, or data with another first batch. Nothing has changed then.
    """
    check_base(state["base"], base_fingerprint(model, run.name), f"Run '{run.name}' in {where}")
    own = {"config": run.config_values, "settings": settings(run)}
    for what, now in own.items():
        tensors = dict[str, Tensor]()
        now = unpack(json.loads(json.dumps(pack(now, tensors, ""))), tensors)  # as a file holds it
        differ = [f"{k} = {state[what][k]!r}, now {v!r}" for k, v in now.items() if state[what].get(k, v) != v]
        if differ:
            raise ConfigError(
                f"Run '{run.name}' in {where} was begun with {'; '.join(differ)}: add it as it was, or under another "
                "name."
            )
    first = state.get("first")
    if first is not None and not run.loader.begins_with(first):
        raise ConfigError(
            f"Run '{run.name}' in {where} was begun with other data: their first batch was another one. Add it with "
            "the data that it had, which only torch's generators may draw."
        )
    if run.steps is not None and state["step"] > run.steps:
        raise ConfigError(f"Run '{run.name}' in {where} has made {state['step']} steps, and is to make {run.steps}.")
    run.optimizer.load_state_dict(state["optimizer"])
    if run.schedule is not None:
        run.schedule.load_state_dict(state["schedule"])
    run.take_up(**state["under_way"])
    run.step, (run.state, run.why) = state["step"], state["state"]
    run.unseen = state.get("unseen", False)
    run.curve, run.valid = [Point(*p) for p in state["curve"]], [Valid(*v) for v in state["valid"]]
    if run.may_go_on:
        run.state, run.why = "running", None
    to = run.loader.move if run.goes_on else run.loader.stand  # a run that has ended may be saved again, and go on then
    to(**state["position"], now=state["draws"])
    for key, slot in slots(model, run.name):
        slot.assign(state["values"][key])
