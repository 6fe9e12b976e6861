# SPDX-License-Identifier: Apache-2.0
"""Use damaged, foreign and malicious files, and say what became of each.

    python -m tests.trust.fuzz --n 10000          count the outcomes
    python -m tests.trust.fuzz --only 4711        show one case
    python -m tests.trust.fuzz --kinds files      other files: formats, trainings, runs, sweeps, merges

An outcome is one of:

- right: the model holds what the file says, and runs.
- told: an error of graft's own, and the model is as it was; or a warning.
- untold: an error of another kind.
- silent: the model does not hold what the file says, or does not run, and nothing said so.
- partial: the call failed and the model, or what the call should write, has changed.
- outside: files around have changed.
- executed: code from the folder ran.
- hanging: it took longer than `LIMIT`.
- crashed: the process died.
- large: it took more than `MEMORY`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import graft
from tests import models
from tests.prompts import samples as prompts
from tests.trust.damage import DAMAGES, MARK, choose
from tests.trust.good import BIN, CONFIG, TENSORS, Folder, Seed, base, seeds

LIMIT = 10.0  # seconds of one case
MEMORY = 512 * 2**20  # bytes of one case
ROOM = 4 * 2**30  # bytes of address space that a worker may add: what asks for more fails
GOOD = ("right", "told")
HUGE = 1e10  # values above it may overflow in the forward pass, as the file says
WAYS = ("fresh", "fresh", "fresh", "beside", "over", "over", "swap", "state", "slots", "auto")
SAYS = (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, OSError)  # that graft may raise by itself


@dataclass
class Outcome:
    kind: str
    case: int
    what: str  # seed, damages and way
    why: str = ""
    seconds: float = 0.0
    grown: int = 0  # bytes of memory
    seeds: str = ""  # kind of seeds


# one case


class Kind(Protocol):
    """Seeds of one kind, how they are damaged, and what becomes of them."""

    def make(self, rng: random.Random, room: Path) -> tuple[str, Callable[[], tuple[str, str]]]:
        """Write the files of a case into a room; return what they are, and a function that uses them and judges."""


class Folders:
    """Adapter folders of every method, loaded in every way."""

    def make(self, rng: random.Random, room: Path) -> tuple[str, Callable[[], tuple[str, str]]]:
        seed = rng.choice(seeds())
        names = choose(rng)
        way = rng.choice(WAYS)
        folder = dict(seed.files)
        for name in names:
            try:
                DAMAGES[name][1](rng, folder)
            except Exception:
                continue  # an earlier damage left nothing to damage
        where = room / "adapter"
        write(where, folder)
        return f"{seed.name} {'+'.join(names)} {way}", lambda: judged(seed, way, str(where))


def kinds_of(names: str) -> list[Kind]:
    """Return the kinds of these names, with commas between; `files` are all but folders."""
    from tests.trust import fuzz_files

    known: dict[str, Kind] = {"folders": Folders(), **fuzz_files.KINDS}
    wanted = [*fuzz_files.KINDS] if names == "files" else names.split(",")
    return [known[name] for name in wanted]


def run(case: int, start: int, place: str, kinds: Sequence[Kind]) -> Outcome:
    """Make the files of a case, use them and judge what became of it."""
    rng = random.Random(f"{start}-{case}")
    kind = kinds[case % len(kinds)]
    room = Path(place, "room")
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(Path(place, "around"), room / "around", symlinks=True)
    what, judge = kind.make(rng, room)
    mark = Path(os.environ[MARK])
    mark.unlink(missing_ok=True)
    around = tree(room / "around")
    resident, begun = reset(), time.perf_counter()
    verdict, why = judge()
    seconds, grown = time.perf_counter() - begun, peak() - resident
    if mark.exists():
        verdict = "executed"
    elif tree(room / "around") != around:
        verdict = "outside"
    elif grown > MEMORY or "allocate memory" in why or "MemoryError" in why:
        verdict = "large"
    return Outcome(verdict, case, what, why, seconds, grown, type(kind).__name__.lower())


def tree(folder: Path) -> dict[str, object]:
    """Return what a folder holds, without following links: modes, where links lead, bytes."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(facts.st_mode) else None
        found[str(path.relative_to(folder))] = (facts.st_mode, content)
    return found


def write(where: Path, folder: Folder) -> None:
    """Write files by their paths; a name that ends with a slash is a folder, other values than bytes are functions."""
    where.mkdir(exist_ok=True)
    for name, data in folder.items():
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif callable(data):  # makes a link or a pipe
            data(path)
        else:
            path.write_bytes(data)


def judged(seed: Seed, way: str, where: str) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain = copy.deepcopy(base(seed.model, seed.is_prompt))
        model = plain
        if way in ("beside", "over", "swap", "state") and not way_fits(way, seed):
            way = "fresh"
        if way in ("beside", "over", "swap", "state"):
            model = graft.PeftModel.from_pretrained(plain, GOOD_FOLDERS[seed.name])
        before, first = snapshot(model), len(said)
        try:
            loaded, name = load(way, model, where)
        except Exception as e:
            changed = difference(before, snapshot(model))
            if changed:
                return "partial", f"{changed} after {shown(e)}"
            return ("told" if is_told(e) else "untold"), shown(e)
        own = [str(w.message) for w in said[first:]]
        if loaded is None:
            return "right", ""
        try:
            wrong = fault(seed, way, loaded, name, where, before)
        except Exception as e:
            wrong = f"does not run: {shown(e)}"
        if wrong is None:
            return "right", ""
        return ("told" if own else "silent"), wrong + (f" | {own[-1][:200]}" if own else "")


GOOD_FOLDERS: dict[str, str] = {}  # undamaged, by name of the seed


def way_fits(way: str, seed: Seed) -> bool:
    return seed.method == "LORA" if way == "swap" else True


def load(way: str, model: nn.Module, where: str) -> tuple[Any, str]:
    """Load the folder; return the model to look at, or None, and the adapter's name."""
    if way == "fresh":
        return graft.PeftModel.from_pretrained(model, where), "default"
    if way == "beside":
        model.load_adapter(where, "other")  # type: ignore[operator]
        return model, "other"
    if way == "over":
        model.load_adapter(where, "default")  # type: ignore[operator]
        return model, "default"
    if way == "swap":
        graft.hotswap_adapter(model, where, "default")
        return None, "default"
    if way == "state":
        graft.set_peft_model_state_dict(model, graft.load_peft_weights(where))
        return None, "default"
    if way == "slots":
        from graft.serving import AdapterSlots

        targets = ["fc1", "fc2", "lin0", "head"] if hasattr(model, "lin0") else "all-linear"
        slots = AdapterSlots(model, 2, 8, targets=targets)
        try:
            slots.load("a", where)
        finally:
            slots.remove()
        return None, "a"
    auto = graft.AutoPeftModel if random.Random(where).random() < 0.3 else graft.AutoPeftModelForCausalLM
    os.environ["HF_HUB_OFFLINE"] = "1"
    auto.from_pretrained(where)
    return None, "default"


def is_told(e: BaseException) -> bool:
    """Return True if an error is one that graft raises to say what is wrong."""
    if isinstance(e, graft.PeftError):
        return True
    raised_in = traceback.extract_tb(e.__traceback__)[-1]
    own = f"{os.sep}graft{os.sep}" in raised_in.filename and (raised_in.line or "").startswith("raise")
    base_model = f"{os.sep}transformers{os.sep}" in raised_in.filename and isinstance(e, ValueError)  # of AutoPeftModel
    return (isinstance(e, SAYS) and own) or base_model or (isinstance(e, OSError) and bool(str(e)))


def shown(e: BaseException) -> str:
    last = traceback.extract_tb(e.__traceback__)[-1]
    return f"{type(e).__name__}: {str(e)[:300]} ({os.path.basename(last.filename)}:{last.lineno})"


# what a model holds


def snapshot(model: nn.Module) -> dict[str, Any]:
    configs = (
        {n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()} if hasattr(model, "peft_config") else {}
    )
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: (type(m).__name__, m.training) for n, m in model.named_modules()},
        "configs": configs,
        "active": list(getattr(model, "active_adapters", []) or []) if configs else [],
    }


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Name the first thing that differs; "" if nothing does."""
    for name in ("flags", "modes", "configs", "active"):
        if before[name] != after[name]:
            return f"{name} changed"
    if before["tensors"].keys() != after["tensors"].keys():
        return "other tensors"
    changed = [
        k for k, t in before["tensors"].items() if not torch.equal(t.nan_to_num(), after["tensors"][k].nan_to_num())
    ]
    return f"{changed[0]} changed" if changed else ""


def tensors_in(where: str) -> dict[str, Tensor]:
    """Read the tensors of a folder without graft."""
    path = os.path.join(where, TENSORS)
    if not os.path.isfile(path):
        return torch.load(os.path.join(where, BIN), map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    data = Path(path).read_bytes()
    n = int.from_bytes(data[:8], "little")
    dtypes = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F64": torch.float64,
        "I64": torch.int64,
        "U8": torch.uint8,
        "I32": torch.int32,
        "I16": torch.int16,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
    }
    out = {}
    for name, entry in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            first, end = (8 + n + offset for offset in entry["data_offsets"])
            flat = (
                torch.frombuffer(bytearray(data[first:end]), dtype=dtypes[entry["dtype"]])
                if end > first
                else torch.zeros(0)
            )
            out[name] = flat.view(entry["shape"])
    return out


FREE = {
    "inference_mode",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_type",
    "task_type",
    "runtime_config",
    "fan_in_fan_out",
    "num_layers",
    "token_dim",
    "num_attention_heads",
    "num_transformer_submodules",
    "encoder_hidden_size",
    "num_virtual_tokens",
    "auto_map",
}


def fault(seed: Seed, way: str, model: Any, name: str, where: str, before: dict[str, Any]) -> str | None:
    """Say in what a loaded model is not what the files say; None if it is."""
    file = tensors_in(where)
    held = graft.get_peft_model_state_dict(model, adapter_name=name)
    whole = model.state_dict()
    for key, value in file.items():
        there = held.get(key, whole.get(key, whole.get(key.replace(".base_layer", ""))))
        if there is None:
            return f"'{key}' of the file is not in the model"
        if there.shape != value.shape or not same(there, value, key.endswith("_topk_weights")):
            return f"'{key}' has other values than the file"
    missing = {key for key in held.keys() - file.keys() if not key.endswith(".base_layer.weight")}  # the base has it
    if missing:
        return f"'{min(missing)}' is not in the file"
    config = model.peft_config[name]
    if way != "over":
        wanted = json.loads(Path(where, CONFIG).read_text(encoding="utf-8-sig"))
        mine = json.loads(config.to_json())
        for field in wanted.keys() & mine.keys() - FREE:
            if field == "modules_to_save" and mine[field]:  # the heads of the task join them
                wanted[field] = [*(wanted[field] or []), *(mine[field] or [])]
            if alike(wanted[field]) != alike(mine[field]) and wanted[field] is not None:
                return f"the config's {field} is {str(mine[field])[:80]}, in the file {str(wanted[field])[:80]}"
    model.set_adapter(name)
    inputs = (
        models.inputs(seed.model) if not seed.is_prompt else prompts.batch(prompts.first(seed.method), labels=False)
    )
    inputs = {k: v for k, v in inputs.items() if k != "task_ids" or config.peft_type == "MULTITASK_PROMPT_TUNING"}
    if config.peft_type == "MULTITASK_PROMPT_TUNING":
        inputs.setdefault("task_ids", torch.zeros(len(inputs["input_ids"]), dtype=torch.long))
    with torch.no_grad():
        y = models.output(model, inputs)
    huge = any(bool((t.double().abs() > HUGE).any()) for t in file.values() if t.is_floating_point())
    return None if huge or bool(y.isfinite().all()) else "its output is not finite"


def same(there: Tensor, value: Tensor, rounded: bool) -> bool:
    a, b = there.double(), value.to(there.dtype).double()
    return torch.allclose(a, b, 1e-3, 1e-3) if rounded else torch.equal(a.nan_to_num(), b.nan_to_num())


def alike(value: Any) -> Any:
    if isinstance(value, list):
        return sorted({json.dumps(alike(v)) for v in value})
    if isinstance(value, dict):
        return {k: alike(v) for k, v in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


# many cases


def prepare(place: str, kinds: str) -> None:
    os.environ[MARK] = os.path.join(place, "mark")
    write(Path(place, "around"), {"file": b"mine", "folder/inner": b"mine, too", "empty/": b"", "model.bin": b"\0" * 9})
    for seed in seeds() if "folders" in kinds else ():
        path = Path(place, "good", seed.name)
        if not path.exists():
            path.mkdir(parents=True)
            for file, data in seed.files.items():
                (path / file).write_bytes(data)
        GOOD_FOLDERS[seed.name] = str(path)


def peak() -> int:
    """Return the largest memory in use since the last `reset`."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def reset() -> int:
    """Forget the peak; return the memory in use."""
    Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


def work(pipe: Any, start: int, names: str) -> None:
    """Run the cases that come through a pipe, in a process of its own."""
    torch.set_num_threads(1)
    sys.stdin = io.StringIO()
    with tempfile.TemporaryDirectory() as place:
        prepare(place, names)
        kinds = kinds_of(names)
        for i in range(len(kinds)):
            run(-1 - i, start, place, kinds)  # imports
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        pipe.send("ready")
        while (case := pipe.recv()) is not None:
            pipe.send(run(case, start, place, kinds))
            if case % 200 == 0:
                gc.collect()


class Worker:
    """A process that runs cases; a new one takes its place where one hangs or dies."""

    def __init__(self, start: int, kinds: str, how: str = "spawn"):
        self.start, self.kinds, self.how = start, kinds, how
        self.begin()

    def begin(self) -> None:
        context: Any = multiprocessing.get_context(self.how)
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=work, args=(there, self.start, self.kinds), daemon=True)
        self.process.start()
        there.close()
        self.pipe.recv()

    def run(self, case: int) -> Outcome:
        """Return what became of a case. One that hangs runs again: the machine may have stood still."""
        outcome = self.run_once(case)
        return self.run_once(case) if outcome.kind == "hanging" else outcome

    def run_once(self, case: int) -> Outcome:
        self.pipe.send(case)
        try:
            if self.pipe.poll(LIMIT):
                return self.pipe.recv()  # type: ignore[no-any-return]
            outcome = Outcome("hanging", case, "", f"longer than {LIMIT} s", LIMIT, 0, self.seeds_of(case))
        except EOFError:
            outcome = Outcome("crashed", case, "", "the process died", 0.0, 0, self.seeds_of(case))
        self.process.kill()
        self.process.join()
        self.begin()
        return outcome

    def seeds_of(self, case: int) -> str:
        kinds = kinds_of(self.kinds)
        return type(kinds[case % len(kinds)]).__name__.lower()

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join(10)


def outcomes(cases: Iterable[int], start: int, kinds: str = "folders", how: str = "spawn") -> Iterator[Outcome]:
    """Yield what became of cases. how: the process begins; by "fork" only if this one has computed nothing."""
    worker = Worker(start, kinds, how)
    try:
        for case in cases:
            yield worker.run(case)
    finally:
        worker.end()


def main() -> bool:
    """Return True if all outcomes are good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--start", type=int, default=0, help="begin of the random numbers")
    parser.add_argument("--only", type=int, help="run this case alone, in this process")
    parser.add_argument("--kinds", default="folders", help="of seeds, with commas between; files: all but folders")
    parser.add_argument("--log", help="file for the outcomes that are not good")
    args = parser.parse_args()
    if args.only is not None:
        with tempfile.TemporaryDirectory() as place:
            prepare(place, args.kinds)
            outcome = run(args.only, args.start, place, kinds_of(args.kinds))
            print(outcome)
        return outcome.kind in GOOD
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    slowest = Outcome("", 0, "")
    log = open(args.log, "w") if args.log else sys.stdout  # noqa: SIM115
    for outcome in outcomes(range(args.first, args.first + args.n), args.start, args.kinds, "fork"):
        counts[outcome.seeds][outcome.kind] += 1
        slowest = max(slowest, outcome, key=lambda o: o.seconds)
        if outcome.kind not in GOOD:
            print(outcome, file=log, flush=True)
    for seeds_, found in sorted(counts.items()):
        print(f"{seeds_}: {json.dumps(dict(found))}")
    print(f"the slowest: {slowest}")
    found = sum(counts.values(), Counter())
    bad = found.total() - found["told"] - found["right"]
    print(
        f"{found['told']:,} refused, {found['right']:,} loaded whole, {bad} bad; at most {slowest.seconds:.1f} s each"
    )
    return bad == 0


if __name__ == "__main__":
    sys.exit(not main())
