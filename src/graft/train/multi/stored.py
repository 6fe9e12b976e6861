# SPDX-License-Identifier: Apache-2.0
"""The file of a run: all that its next step depends on, as safetensors and JSON. It is written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from graft.config.atomic import replace
from graft.core.containers import Slot
from graft.core.errors import BaseModelMismatchError, CheckpointError, ConfigError
from graft.inject.parts import registry_of
from graft.io.files import read_safetensors
from graft.io.fingerprint import difference, same_values
from graft.io.save import base_fingerprint
from graft.io.seal import KEY
from graft.io.tensors import digest_of, write_safetensors
from graft.train.multi.run import Point, Run, Valid

FILE, NOTE = "run.safetensors", "run.json"
TENSOR, PAIRS, TUPLE = "__tensor__", "__pairs__", "__tuple__"  # what JSON has not


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


def save(run: Run, model: Any, folder: str) -> None:
    """Write `folder`/<name of the run>/run.safetensors."""
    tensors: dict[str, Tensor] = {}
    note = pack(state_of(run, model), tensors, f"Run '{run.name}'")
    tensors[NOTE] = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    held = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    path = os.path.join(folder, run.name, FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    replace(path, lambda to: write_safetensors(to, held, {"format": "pt", KEY: digest_of(held)}))


def load(name: str, folder: str) -> dict[str, Any] | None:
    """Return what the file of a run holds; None if there is none.

    Raises:
        CheckpointError: it is damaged, or no file of a run.
    """
    path = os.path.join(folder, name, FILE)
    if not os.path.exists(path):
        return None
    tensors = read_safetensors(path).tensors
    if NOTE not in tensors:
        raise CheckpointError(f"{path} is not the file of a run: MultiTrain.save() writes these.")
    held: dict[str, Any] = unpack(json.loads(tensors[NOTE].numpy().tobytes()), tensors)
    return held


def state_of(run: Run, model: Any) -> dict[str, Any]:
    """Return all that the next step of a run depends on, and what it has made."""
    loader = run.loader
    return {
        "config": run.told,
        "base": base_fingerprint(model, run.name),
        "settings": settings(run),
        "values": {key: slot.tensor for key, slot in slots(model, run.name)},
        "optimizer": run.optimizer.state_dict(),
        "schedule": None if run.schedule is None else run.schedule.state_dict(),
        "draws": run.draws.states,
        "position": {"epoch": loader.epoch, "taken": loader.taken, "began": loader.began},
        "under_way": {"losses": run.losses, "gradients": run.gradients()},
        "step": run.step,
        "state": [run.state, run.why],
        "curve": [list(point) for point in run.curve],
        "valid": [list(look) for look in run.valid],
    }


def settings(run: Run) -> dict[str, Any]:
    """Return what a run was told that its values depend on."""
    return {"optimizer": run.begun, "clip": run.clip, "accumulate": run.accumulate, "seed": run.seed}


def restore(run: Run, model: Any, held: dict[str, Any], where: str) -> None:
    """Put a run into the state that its file holds. The run is new, with its adapter on the model.

    Raises:
        BaseModelMismatchError: it was made on another base.
        ConfigError: it has another config, or other settings. Nothing has changed then.
    """
    check_base(held["base"], base_fingerprint(model, run.name), run.name, where)
    own = {"config": run.told, "settings": settings(run)}
    for what, now in own.items():
        now = unpack(json.loads(json.dumps(pack(now, {}, ""))), {})  # as a file holds it
        differ = [f"{k} = {held[what].get(k)!r}, now {v!r}" for k, v in now.items() if held[what].get(k) != v]
        if differ:
            raise ConfigError(
                f"Run '{run.name}' in {where} was begun with {'; '.join(differ)}: add it as it was, or under another "
                "name."
            )
    for key, slot in slots(model, run.name):
        slot.assign(held["values"][key])
    run.optimizer.load_state_dict(held["optimizer"])
    if run.schedule is not None:
        run.schedule.load_state_dict(held["schedule"])
    run.take_up(**held["under_way"])
    run.step, (run.state, run.why) = held["step"], held["state"]
    run.curve, run.valid = [Point(*p) for p in held["curve"]], [Valid(*v) for v in held["valid"]]
    if run.may_go_on:
        run.state, run.why = "running", None
    if run.goes_on:
        run.loader.move(**held["position"], now=held["draws"])


def slots(model: Any, adapter: str) -> Iterator[tuple[str, Slot]]:
    """Yield all tensors of an adapter, parameters and buffers, by place."""
    for carrier in registry_of(model).parts_of(adapter).carriers():
        for slot in carrier.slots(adapter):
            yield f"{carrier.key}.{slot.container}.{slot.path}", slot


def check_base(then: dict[str, Any], now: dict[str, Any], name: str, where: str) -> None:
    """Raise BaseModelMismatchError unless two fingerprints are of one base."""
    why = difference(then, now)
    if why is None and not same_values(then, now):
        why = "its weights have other values"
    if why is not None:
        raise BaseModelMismatchError(
            f"Run '{name}' in {where} was trained on another base: {why}. Resume it on the base that it had."
        )


def pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Return a value as JSON takes it; tensors go to `tensors`.

    Raises:
        ConfigError: it holds an object that is neither a number, a text, a tensor nor made of these.
    """
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value
        return {TENSOR: key}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {TUPLE: [pack(v, tensors, where) for v in value]}
    if isinstance(value, list):
        return [pack(v, tensors, where) for v in value]
    if isinstance(value, dict):
        return {PAIRS: [[pack(k, tensors, where), pack(v, tensors, f"{where}, '{k}'")] for k, v in value.items()]}
    if isinstance(value, (bool, int, float, str)):  # subclasses: enums, numpy's numbers
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        return value.item()
    raise ConfigError(f"{where}: a {type(value).__name__} cannot be written to a file without pickle.")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `pack` took."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(unpack(v, tensors) for v in value[TUPLE])
    return {unpack(k, tensors): unpack(v, tensors) for k, v in value[PAIRS]}
