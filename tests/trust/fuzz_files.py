# SPDX-License-Identifier: Apache-2.0
"""More seeds of the fuzzer: adapter files of every format, states of a training, files of runs and sweeps, and the work
folder of a merge that was killed."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import random
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.torch
import torch

import graft
from graft.config.seal import KEY
from graft.files import formats, serving
from graft.files.bases import open_base
from graft.files.convert import convert_adapter_file
from graft.files.export import export_adapter_file
from graft.files.inspect import compare_adapters as between
from graft.files.inspect import inspect_adapter
from graft.files.lint import lint_adapter
from graft.files.merging.merge import merge_adapters
from graft.files.resize import resize_adapter
from graft.io.tensors import digest_tensors, write_safetensors
from graft.many import MultiTrain
from graft.many.sweep import TABLE
from tests.files.test_formats import BASES
from tests.files.test_load import llama
from tests.many.alone import SPECS, batches, lora, tiny
from tests.train.resumed_loop import CASES, Training
from tests.trust.damage import Payload, anything, bomb, packed, saved, unpacked
from tests.trust.fuzz import HUGE, difference, is_told, shown, snapshot, tree, write
from tests.trust.good import Folder

TESTS = Path(__file__).parents[1]
LLAMA = TESTS / "files" / "fixtures" / "base_llama"
Judged = tuple[str, str]
Damage = Callable[[random.Random, dict[str, Any], str], None]  # of a file in a folder


# damages: each takes the name of a file of its kind

ANY: list[Damage] = []
BY_END: dict[str, list[Damage]] = {}


def damage(*ends: str) -> Callable[[Damage], Damage]:
    def add(function: Damage) -> Damage:
        for damages in [BY_END.setdefault(end, []) for end in ends] or [ANY]:
            damages.append(function)
        return function

    return add


@damage()
def flip(rng, folder, name):
    data = bytearray(folder[name])
    end = rng.choice([8, 300, len(data), len(data)])
    for _ in range(rng.choice([1, 1, 2, 30])):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
    folder[name] = bytes(data)


@damage()
def cut(rng, folder, name):
    data = folder[name]
    folder[name] = rng.choice([data[: rng.randrange(len(data))], data + b"\0" * rng.randrange(1, 99), b"", b"\0" * 64])


@damage()
def take_away(rng, folder, name):
    del folder[name]


@damage()
def other_kind(rng, folder, name):
    """A folder, a pipe, or a link to a file around, to itself, to a device."""
    around = Path("..", "around")
    targets = [around / "file", around / "model.bin", around / "folder", name, "/dev/zero", around / "nothing"]
    target = rng.choice(targets)
    folder.pop(name)
    kind = rng.randrange(4)
    if kind == 0:
        folder[f"{name}/"] = b""
    elif kind == 1:
        folder[name] = os.mkfifo
    else:
        folder[name] = lambda path: path.symlink_to(target)


@damage()
def exchange(rng, folder, name):
    other = rng.choice(sorted(folder))
    folder[name], folder[other] = folder[other], folder[name]


@damage()
def more(rng, folder, name):
    """Another file beside it, of a known name."""
    names = [
        "adapter_config.json",
        "adapter_model.bin",
        "config.json",
        "evil.py",
        "x.gguf",
        "x.safetensors",
        f"{name}.x",
    ]
    folder[rng.choice(names)] = rng.choice([folder[name], b"{}", pickle.dumps(Payload()), b"", bomb()])


def place_in(rng: random.Random, value: Any) -> tuple[Any, Any] | None:
    """Return a place of a JSON value, (container, key), as often near the root as deep inside; None if it has none."""
    found = None
    while isinstance(value, (dict, list)) and value and (found is None or rng.random() < 0.65):
        found = value, rng.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        value = value[found[1]]
    return found


def edit(rng: random.Random, value: Any) -> None:
    """Change a place of a JSON value, anywhere in it: another value, one less, another name."""
    if (held := place_in(rng, value)) is None:
        return
    container, key = held
    kind = rng.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        names = ["", "x", "__tensor__", "__pairs__", "__tuple__", "../../x", *container]
        container[rng.choice(names)] = container.pop(key)
    elif kind == 2 and isinstance(container[key], (int, float)):
        container[key] = rng.choice([0, -1, 2**31 - 1, 2**31, 700, 2**63, 1e30, math.nan, math.inf, 10**400, 0.5, True])
    elif kind == 3:
        other, at = place_in(rng, value) or held
        container[key] = copy.deepcopy(other[at])
    else:
        container[key] = anything(rng)


@damage(".json", ".graft-merge")
def any_place(rng, folder, name):
    value = json.loads(folder[name])
    edit(rng, value)
    folder[name] = json.dumps(value).encode()


@damage(".json")
def odd_text(rng, folder, name):
    text = folder[name]
    folder[name] = rng.choice(
        [b"", b"[]", b"3", b"null", b"{}", b"{", b"\xff\xfe" + text, text.replace(b",", b",,", 1), b"[" * 100_000,
         text.rstrip()[:-1] + b', "x": 1, "x": 2}', b'{"a": ' + b"9" * 5000 + b"}", b"[" + b"[]," * 50_000 + b"1]"]
    )  # fmt: skip


@damage(".yaml")
def odd_yaml(rng, folder, name):
    text = folder[name].decode()
    bombs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
    lines = text.splitlines()
    i = rng.randrange(len(lines))
    field = lines[i].partition(":")[0]
    code = "!!python/object/apply:os.system [true]"
    values = [
        code,
        "[",
        ".nan",
        "9" * 5000,
        "*x",
        "null",
        "-1",
        "1e30",
        "[[1]]",
        "{a: b}",
        "2001-99-99",
        "!!bool x",
        "0",
    ]
    lines[i] = f"{field}: {rng.choice(values)}"
    whole = "\n".join(lines)
    texts = [whole, whole, whole, "a0: &a0 x\n" + bombs, "[" * 5000, "", "- 1", text + text]
    folder[name] = rng.choice(texts).encode()


@damage(".safetensors")
def header(rng, folder, name):
    head, body = unpacked(folder[name])
    edit(rng, head)
    folder[name] = packed(head, body)


@damage(".safetensors")
def tensors(rng, folder, name):
    """Other tensors; half the time with the digest that fits."""
    held, metadata = safetensors.torch.load(folder[name]), unpacked(folder[name])[0].get("__metadata__") or {}
    change_tensor(rng, held)
    folder[name] = bytes_of(held, metadata, forged=rng.random() < 0.5)


@damage(".bin", ".pt", ".lora")
def torch_tensors(rng, folder, name):
    held = torch.load(io.BytesIO(folder[name]), weights_only=True)
    inner = held.get("model", held) if isinstance(held, dict) else held
    if rng.random() < 0.5:
        change_tensor(rng, inner)
    else:
        key = rng.choice(sorted(inner))
        t = inner[key].float()
        inner[key] = rng.choice(
            [t.to_sparse(), torch.empty(t.shape, device="meta"), t.to(torch.complex64), [t], None, 3, "x", {"a": t},
             Payload(), torch.ones(1).expand(10**6, 10**4), t.to(torch.float8_e5m2), torch.nn.Parameter(t), 10**30]
        )  # fmt: skip
    folder[name] = saved(held, _use_new_zipfile_serialization=rng.random() < 0.8)
    if rng.random() < 0.2:
        folder[name] = rng.choice(
            [pickle.dumps(Payload()), saved(Payload()), saved([held]), saved(None), bomb(), b"PK\3\4" + b"\0" * 50,
             b"\x80\x04\x8d" + (2**60).to_bytes(8, "little")]
        )  # fmt: skip


def change_tensor(rng: random.Random, held: dict[str, Any]) -> None:
    key = rng.choice(sorted(held))
    t = held[key]
    if not isinstance(t, torch.Tensor):
        held[key] = anything(rng)
        return
    wide, first = t.double() if t.is_floating_point() else t, t[:1] if t.dim() else t
    twice, turned = torch.cat([t, t]) if t.dim() else t, t.float().T if t.dim() == 2 else t
    others = [
        wide * float("nan"),
        wide * float("inf"),
        wide * 1e30,
        t.long(),
        t.half(),
        t.double(),
        t.bool(),
        first,
        twice,
    ]
    held[key] = rng.choice([*others, torch.zeros(()), torch.zeros(0), turned, t.bfloat16()]).contiguous().clone()
    if t.is_floating_point() and held[key].dtype == torch.float64 and rng.random() < 0.7:
        held[key] = held[key].to(t.dtype)
    if rng.random() < 0.3:
        held[rng.choice(["", "x", key + "x", *held])] = held.pop(key)


def bytes_of(held: Mapping[str, torch.Tensor], metadata: dict[str, str], forged: bool) -> bytes:
    if forged and KEY in metadata:
        metadata = metadata | {KEY: digest_tensors(dict(held))}
    with TemporaryDirectory() as place:
        write_safetensors(f"{place}/x", dict(held), metadata)
        return Path(place, "x").read_bytes()


def note(rng: random.Random, folder: dict[str, Any], name: str) -> None:
    """Change places of the note in the file of a training or run, with the digest that fits."""
    held, metadata = safetensors.torch.load(folder[name]), unpacked(folder[name])[0]["__metadata__"]
    of = next(key for key in held if key.endswith(".json"))
    value = json.loads(held[of].numpy().tobytes())
    for _ in range(rng.choice([1, 1, 1, 3])):
        edit(rng, value)
    held[of] = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    folder[name] = bytes_of(held, metadata, forged=True)


def forged_tensors(rng: random.Random, folder: dict[str, Any], name: str) -> None:
    held, metadata = safetensors.torch.load(folder[name]), unpacked(folder[name])[0]["__metadata__"]
    if rng.random() < 0.3:  # a generator's numbers and positions
        key = rng.choice([key for key in held if held[key].dtype == torch.uint8 and len(held[key]) == 5056])
        data = bytearray(held[key].numpy().tobytes())
        number, at = rng.choice([0, 1, 600, 624, 625]), rng.choice([8, 16, 5016, 5024])
        struct.pack_into(rng.choice(["<i", "<Q", "<d"]), data, at, number)
        held[key] = torch.frombuffer(data, dtype=torch.uint8)
    else:
        change_tensor(rng, held)
    folder[name] = bytes_of(held, metadata, forged=True)


STATES = {"training.safetensors", "run.safetensors"}


@damage(".gguf")
def gguf_number(rng, folder, name):
    """Another length, count, type or offset, anywhere in the header."""
    data = bytearray(folder[name])
    at = rng.choice([4, 8, 16, *range(24, min(len(data), 3000) - 8)])
    number = rng.choice([0, 1, 9, 12, 77, 255, 2**20, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])
    struct.pack_into("<Q" if number > 2**32 - 1 or rng.random() < 0.5 else "<I", data, at, number)
    folder[name] = bytes(data)


def damages_of(name: str) -> list[Damage]:
    own = [d for end, found in BY_END.items() if name.endswith(end) for d in found]
    if name.rpartition("/")[2] in STATES:
        return [*ANY, *own, *[note] * 9, *[forged_tensors] * 5]
    return [*ANY, *own * 4]


def damaged(rng: random.Random, seed: Folder) -> tuple[dict[str, Any], str]:
    """Return a folder with one to three damages, and their names."""
    folder: dict[str, Any] = dict(seed)
    names = []
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        files = sorted(name for name, data in folder.items() if isinstance(data, bytes) and not name.endswith("/"))
        if not files:
            break
        states = [name for name in files if name.rpartition("/")[2] in STATES]
        file = rng.choice(states if states and rng.random() < 0.8 else files)
        function = rng.choice(damages_of(file))
        try:
            function(rng, folder, file)
        except Exception:
            continue  # an earlier damage left nothing to damage
        names.append(f"{function.__name__}({file.rpartition('/')[2]})")
    return folder, "+".join(names)


def files_in(folder: Path) -> Folder:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def told(call: Callable[[], object]) -> tuple[object, Judged | None]:
    """Return what a call returns, or a verdict on its error."""
    try:
        return call(), None
    except Exception as e:
        return None, ("told" if is_told(e) else "untold", shown(e))


# formats


class Formats:
    """Adapter files of every format: read, inspected, checked, compared, converted."""

    def make(self, rng: random.Random, room: Path) -> tuple[str, Callable[[], Judged]]:
        name = rng.choice(sorted(adapters()))
        files, base_path = adapters()[name]
        folder, what = damaged(rng, files)
        write(room / "adapter", folder)
        way = rng.choice(["inspect", "lint", "diff", "resize", "check", "export", "merge", "load", *["convert"] * 3])
        to, lossy = rng.choice(targets(name) or formats.FORMATS), rng.random() < 0.5
        base = None if rng.random() < 0.1 else base_path
        if way == "load" and base_path != str(LLAMA):
            way = "inspect"
        inside = [p for p in sorted((room / "adapter").rglob("*")) if not p.is_dir()]
        path = rng.choice(inside) if inside and rng.random() < 0.1 else room / "adapter"
        return f"{name} {what} {way} {to}", lambda: self.judged(path, base, way, to, lossy, room)

    def judged(self, path: Path, base_path: str | None, way: str, to: str, lossy: bool, room: Path) -> Judged:
        before, out = tree(room), room / "out"
        base = open_base(base_path or LLAMA) if way == "export" or base_path else None
        read = partial(formats.read, path, base)
        model = llama() if way == "load" else None
        state = None if model is None else snapshot(model)
        calls: dict[str, Callable[[], object]] = {
            "inspect": lambda: inspect_adapter(read(), base, spectrum=True), "lint": lambda: lint_adapter(read()),
            "diff": lambda: between(read(), read()), "resize": lambda: resize_adapter(read(), energy=0.9),
            "check": lambda: serving.check_servers(read(), [*serving.list_servers()], base),
            "export": lambda: export_adapter_file(read(), "vllm", base, str(out)),
            "convert": lambda: convert_adapter_file(path, to, out, base, lossy),
            "merge": lambda: merge_adapters(base_path or "", [path], out),
            "load": lambda: graft.load_adapter(model, path),
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, verdict = told(calls[way])
            after = tree(room)
            if verdict is not None:
                changed = "files" if after != before else model is not None and difference(state, snapshot(model))
                return ("partial", f"{changed} changed after {verdict[1]}") if changed else verdict
            if any(after.get(name) != content for name, content in before.items()):
                return "outside", "the source changed"
            if way == "load":
                return self.runs(found, path)
            if way != "convert" or path != room / "adapter":  # of a part of a pipeline, only its own base knows names
                return "right", ""
            made = out if out.exists() else next(p for p in room.iterdir() if p.name not in ("adapter", "around"))
            again, verdict = told(lambda: formats.read(made, base))
            if verdict is not None:
                return "silent", f"what was written cannot be read: {verdict[1]}"
            if not lossy and len(again.modules) != len(read().modules):  # type: ignore[attr-defined]
                return "silent", "what was written has another number of modules"
        return "right", ""

    def runs(self, model: Any, path: Path) -> Judged:
        try:
            y = model(torch.arange(8)[None]).logits
        except Exception as e:
            return "silent", f"does not run: {shown(e)}"
        huge = any(bool((p.abs() > HUGE).any()) for p in model.parameters())
        return ("right", "") if huge or bool(y.isfinite().all()) else ("silent", "its output is not finite")


@cache
def adapters() -> dict[str, tuple[Folder, str | None]]:
    """Return adapters that other libraries wrote, by name: files, and the folder of their base.

    GGUF has none: names of a base take the package gguf.
    """
    fixtures, methods = TESTS / "files" / "fixtures", TESTS / "methods" / "fixtures"
    found: dict[str, tuple[Folder, str | None]] = {
        path.name: (files_in(path), str(fixtures / f"base_{BASES[path.name.partition('_')[0]]}"))
        for path in sorted(fixtures.iterdir()) if path.is_dir() and not path.name.startswith(("base_", "gguf"))
    }  # fmt: skip
    found["gguf_llama"] = files_in(fixtures / "gguf_llama"), None
    hub = methods / "adapterhub"
    for name in ("bert/houlsby", "bert/compacter", "llama/loreft"):
        found[name] = files_in(hub / name), str(hub / name.partition("/")[0])
    for name in ("loreft", "direft"):
        found[f"pyreft/{name}"] = files_in(methods / "pyreft" / name), str(hub / "llama")
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("mlx_lora", "mlx_dora", "lycoris_loha", "adapterhub_ia3", "diffusers_new"):
            made = Path(place, name)
            convert_adapter_file(fixtures / name, "peft", made, found[name][1])
            found[f"peft_{name}"] = files_in(made), found[name][1]
    return found


@cache
def targets(name: str) -> list[str]:
    """Return the formats that the undamaged adapter can be converted to."""
    files, base = adapters()[name]
    found = []
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(Path(place, "a"), files)
        for to in formats.FORMATS:
            with suppress(graft.PeftError):
                convert_adapter_file(Path(place, "a"), to, None, base, dry_run=True)
                found.append(to)
    return found


# trainings


class Trainings:
    """training.safetensors: resumed, looked at, and trained on."""

    def make(self, rng: random.Random, room: Path) -> tuple[str, Callable[[], Judged]]:
        case = rng.choice(sorted(trainings()))
        folder, what = damaged(rng, trainings()[case])
        write(room / "run", folder)
        strict = rng.random() < 0.7
        return f"{case} {what} strict={strict}", lambda: self.judged(case, room, strict)

    def judged(self, case: str, room: Path, strict: bool) -> Judged:
        training, before = Training(case, seed=5).run(1), tree(room)
        state = everything(training)
        done, verdict = told(lambda: graft.resume(room / "run", *training.parts, strict=strict))
        if tree(room) != before:
            return "outside", "the folder changed"
        if verdict is not None:
            return ("partial", f"the training changed after {verdict[1]}") if everything(training) != state else verdict
        held = safetensors.torch.load((room / "run" / "training.safetensors").read_bytes())
        named = dict(training.model.named_parameters())
        for key, t in held.items():
            start, _, name = key.partition("/")
            if name not in named or name in done.fresh or start not in ("value", "exp_avg"):  # type: ignore[attr-defined]
                continue
            here = named[name] if start == "value" else training.optimizer.state[named[name]].get(start, t)
            if not torch.equal(here.detach(), t.to(here.dtype)) and not rerouted(held, key):
                return "silent", f"'{key}' has other values than the file"
        huge = any(bool((t.double().abs() > 1e6).any()) for t in held.values() if t.is_floating_point())
        try:
            drawn = np.random.rand(3), random.gauss(0, 1), torch.rand(700), training.run(2).losses[-1]
        except Exception as e:
            return "silent", f"does not go on: {shown(e)}"
        finite = all(np.isfinite(np.asarray(numbers)).all() for numbers in drawn)
        return ("right", "") if finite or huge else ("silent", f"goes on to {drawn[1]}, {drawn[3]}")


def rerouted(held: Mapping[str, torch.Tensor], key: str) -> bool:
    """Return True if the note names another tensor for a state, whose key says nothing then."""
    text = held["training.json"].numpy().tobytes().decode()
    return text.count(json.dumps(key)) != 1 and not key.startswith("value/")


def everything(training: Training) -> str:
    state = training.optimizer.state_dict()
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()
    return repr((training.values(), state, training.scheduler and training.scheduler.state_dict(), drawn))


@cache
def trainings() -> dict[str, Folder]:
    found = {}
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES:
            training = Training(case).run(3)
            extra = {"best": torch.tensor(0.5), "epoch": 1.5}
            graft.save_training(f"{place}/{case}", *training.parts, step=3, extra=extra)
            found[case] = files_in(Path(place, case))
    return found


# runs and sweeps


class Runs:
    """The file of a run: taken up and trained to its end."""

    def make(self, rng: random.Random, room: Path) -> tuple[str, Callable[[], Judged]]:
        name = rng.choice(sorted(runs()))
        folder, what = damaged(rng, runs()[name])
        write(room / "runs", folder)
        return f"{name} {what}", lambda: self.judged(name, room)

    def judged(self, name: str, room: Path) -> Judged:
        base, files = tiny(), tree(room)
        before, drawn = snapshot(base), torch.get_rng_state()

        def take_up() -> Any:
            job = MultiTrain.resume(base, room / "runs")
            return job, job.add(name, SPECS[name].config, **SPECS[name].options(4))

        found, verdict = told(take_up)
        if tree(room) != files:
            return "outside", "the folder changed"
        if verdict is not None:
            changed = difference(before, snapshot(base)) or not torch.equal(drawn, torch.get_rng_state())
            return ("partial", f"{changed} after {verdict[1]}") if changed else verdict
        job, run = found  # type: ignore[misc]
        step, path = run.step, room / "runs" / name / "run.safetensors"
        if step and path.is_file():
            held = safetensors.torch.load(path.read_bytes())
            state = json.loads(held["run.json"].numpy().tobytes())["values"]
            file = [held[value["__tensor__"]] for value in state.values() if isinstance(value, dict)]
            missing = [p for p in run.parameters if not any(p.shape == t.shape and torch.equal(p, t) for t in file)]
            if missing:
                return "silent", "its values are not those of the file"
        _, verdict = told(job.run)
        if verdict is not None:
            return "silent", f"does not go on: {verdict[1]}"
        job.unload()
        if changed := difference(before, snapshot(base)):
            return "silent", f"the base was not given back: {changed}"
        return "right", ""


@cache
def runs() -> dict[str, Folder]:
    found = {}
    with TemporaryDirectory() as place:
        for name in ("plain", "gathers", "timed"):
            job = MultiTrain(tiny())
            run = job.add(name, SPECS[name].config, **SPECS[name].options(4))
            while run.step < 1 or (name == "gathers" and not run.losses):
                job.step()
            job.save(f"{place}/{name}")
            found[name] = files_in(Path(place, name))
    return found


class Sweeps:
    """The table of a sweep, with the files of its runs: taken up and brought to its end."""

    def make(self, rng: random.Random, room: Path) -> tuple[str, Callable[[], Judged]]:
        folder, what = damaged(rng, half_a_sweep())
        write(room / "sweep", folder)
        return what, lambda: self.judged(room)

    def judged(self, room: Path) -> Judged:
        base, before = tiny(), tree(room)
        state = snapshot(base)
        found, verdict = told(lambda: swept(base, room / "sweep"))
        after = tree(room)
        if verdict is not None:
            if changed := difference(state, snapshot(base)):
                return "partial", f"{changed} after {verdict[1]}"
            lost = [name for name in before if name not in after or before[name] != after[name]]
            if lost == [f"sweep/{TABLE}"]:  # what it had done before is in the table
                same = [json.loads(text)["sweep"] for text in (after[lost[0]][1], half_a_sweep()[TABLE])]
                lost = [] if same[0] == same[1] else lost
            return ("partial", f"{lost} changed after {verdict[1]}") if lost else verdict
        found.runs.unload()  # type: ignore[attr-defined]
        if changed := difference(state, snapshot(base)):
            return "silent", f"the base was not given back: {changed}"
        rows = found.rows  # type: ignore[attr-defined]
        right = len(rows) == 2 and all(isinstance(row["loss"], float) for row in rows)
        return ("right", "") if right else ("silent", f"rows {rows}")


def swept(base: Any, folder: Path) -> Any:
    options = dict(data=batches(3), valid=batches(1), steps=4, keep=0.5, rungs=2)
    return graft.sweep(base, lora(), {"lr": [1e-3, 1e-2]}, folder=folder, **options)


@cache
def half_a_sweep() -> Folder:
    """Return the files of a sweep that was killed within its second rung."""
    module = import_module("graft.many.sweep")
    with TemporaryDirectory() as place:
        rounds = module.SweepJob.run_rounds

        def killed(job: Any) -> None:
            rounds(job)
            if job.trials[0].losses:
                raise KeyboardInterrupt

        module.SweepJob.run_rounds = killed  # type: ignore[method-assign]
        try:
            swept(tiny(), Path(place))
        except KeyboardInterrupt:
            return files_in(Path(place))
        finally:
            module.SweepJob.run_rounds = rounds  # type: ignore[method-assign]
    raise AssertionError("it was not killed")


# merges


class Merges:
    """The work folder of a merge that was killed after some shards: the same merge again."""

    def make(self, rng: random.Random, room: Path) -> tuple[str, Callable[[], Judged]]:
        base, adapter = merge_inputs()
        write(room / "base", base)
        write(room / "adapter", adapter)
        for path in sorted(room.rglob("*")):  # the key has the times of the inputs
            os.utime(path, (1e9, 1e9), follow_symlinks=False)
        left = [rng.choice([1, 2, 3])]

        def kill(_: str) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            merged(room, step=kill)
        work = room / ".out.graft-merge"
        held = files_in(work)
        folder, what = damaged(rng, held)
        for name in held:
            (work / name).unlink()
        write(work, folder)
        if rng.random() < 0.15:
            what += self.other_room(rng, room, work)
        return what, lambda: self.judged(room)

    def other_room(self, rng: random.Random, room: Path, work: Path) -> str:
        """Put a link, or a file, in the work folder's place, or a folder in it that no merge makes."""
        kind = rng.choice(["link", "file", "inner", "output"])
        if kind == "inner":
            (work / "mine").mkdir()
            (work / "mine" / "photo").write_bytes(b"mine")
        elif kind == "output":
            (room / "out").symlink_to(room / "around")
        else:
            work.rename(room / "moved")
            work.symlink_to(room / "around") if kind == "link" else work.write_bytes(b"mine")
        return f" {kind}"

    def judged(self, room: Path) -> Judged:
        inputs = tree(room / "base"), tree(room / "adapter")
        work = room / ".out.graft-merge"
        mine = work / "mine" / "photo", room / "out", room / "moved"
        strange = {p: p.lstat().st_ino for p in mine if os.path.lexists(p)}
        _, verdict = told(lambda: merged(room))
        if (tree(room / "base"), tree(room / "adapter")) != inputs:
            return "outside", "the sources changed"
        if lost := [p.name for p, number in strange.items() if not os.path.lexists(p) or p.lstat().st_ino != number]:
            return "outside", f"{lost} went"
        if verdict is not None:
            half = (room / "out").exists() and not (room / "out").is_symlink()
            return ("partial", f"an output is there after {verdict[1]}") if half else verdict
        found = {k: v for k, v in files_in(room / "out").items()}
        if found != whole_merge():
            return "silent", f"other bytes than those of a merge that was not killed: {sorted(found)}"
        return "right", ""


def merged(room: Path, **options: Any) -> object:
    return merge_adapters(room / "base", [room / "adapter"], room / "out", shard_size=6000, **options)


@cache
def merge_inputs() -> tuple[Folder, Folder]:
    fixtures = TESTS / "files" / "fixtures"
    base = files_in(fixtures / "base_llama")
    with TemporaryDirectory() as place:
        convert_adapter_file(fixtures / "mlx_lora", "peft", Path(place, "a"), fixtures / "base_llama")
        return base, files_in(Path(place, "a"))


@cache
def whole_merge() -> Folder:
    with TemporaryDirectory() as place:
        base, adapter = merge_inputs()
        write(Path(place, "base"), base)
        write(Path(place, "adapter"), adapter)
        merged(Path(place))
        return files_in(Path(place, "out"))


KINDS = {"formats": Formats(), "trainings": Trainings(), "runs": Runs(), "sweeps": Sweeps(), "merges": Merges()}
