# SPDX-License-Identifier: Apache-2.0
"""Run a trainer's commands twice, under PEFT and with graft in its place, and compare the losses and files."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file

import graft
from tests.clients.pair import compare

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSIDE = HERE / "inside"  # what runs in a trainer's environment
LIBRARIES = ("peft", "graft")
LOSSES, TENSORS = 1e-5, 2e-6  # relative or absolute
SAID = "said.jsonl"  # where a command writes what a model answers
MORE = ".lora_shift."  # what graft's files hold beside PEFT's: docs/differences.md
# in names of what is no result
TIMED = ("runtime", "per_sec", "_time", "(s)", "memory", "speed", "tokens_per", "per_minute", "seconds")
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
QUIET = {
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "DISABLE_TELEMETRY", "DO_NOT_TRACK"), "1"),
    **dict(CUDA_VISIBLE_DEVICES="", WANDB_DISABLED="true", TOKENIZERS_PARALLELISM="false", PYTHONHASHSEED="0"),
}


def flags(options: dict[str, object]) -> list[str]:
    """Return `--name value` for each option."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class Side:
    """A trainer with one of the libraries: a process that runs commands in forks, and others on their own."""

    def __init__(self, trainer: Trainer, library: str, folder: Path):
        self.library, self.bin, self.made = library, trainer.bin, folder / "made"
        under = ["-m", "graft.compat.peft"] if library == "graft" else []
        self.start = [str(self.bin / "python"), *under, str(INSIDE / "forks.py"), *trainer.cases.LOADED]
        self.shell = ["bash", "-c", f'eval "$(python {" ".join(under)} --env)" && exec "$@"', "bash"] if under else []
        paths = [self.made, INSIDE, *([ROOT / "src"] if library == "graft" else [])]
        self.env = {**os.environ, **QUIET, "HF_HOME": str(folder / "home")}
        self.env |= getattr(trainer.cases, "ENVIRONMENT", {})
        self.env |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": ":".join(map(str, paths))}
        self.log = folder / f"{library}.log"
        self.forks: subprocess.Popen[str] | None = None

    def run(self, words: list[str], folder: Path, log: Path) -> int:
        """Return the exit status of a command."""
        if words[0] == "env":
            with log.open("a") as out:
                env = {**self.env, "PEFT_WAS": f"{log}.peft"}
                return subprocess.run([*self.shell, *words], cwd=folder, env=env, stdout=out, stderr=out).returncode
        if self.forks is None:
            out, pipe, place = self.log.open("w"), subprocess.PIPE, self.log.parent  # where some write logs
            self.forks = subprocess.Popen(
                self.start, stdin=pipe, stdout=pipe, stderr=out, text=True, env=self.env, cwd=place
            )
        assert self.forks.stdin and self.forks.stdout
        if (self.bin / words[0]).exists():
            words = [str(self.bin / words[0]), *words[1:]]
        self.forks.stdin.write(json.dumps([str(folder), str(log), words]) + "\n")
        self.forks.stdin.flush()
        answer = self.forks.stdout.readline()
        assert answer, f"the modules cannot be imported: {self.log.read_text()[-4000:]}"
        return int(answer)

    def case(self, commands: list[list[str]], place: Path) -> Path:
        """Return the folder in which the commands of a case have run, one after the other."""
        folder, log = place / self.library, place / f"{self.library}.log"
        shutil.copytree(self.made, folder / "made")
        for words in commands:
            for i, word in enumerate(words):
                if word.startswith("{"):  # what the file of options holds
                    (folder / f"made/{i}.yaml").write_text(word)
            words = [f"made/{i}.yaml" if word.startswith("{") else word for i, word in enumerate(words)]
            status = self.run(words, folder, log)
            said = log.read_text()[-4000:] if log.exists() else ""
            assert status == 0, f"with {self.library} {words[0]} ends with {status}:\n{said}"
        had = set(Path(f"{log}.peft").read_text().split())
        assert had == {self.library}, f"{self.library} was to run, and these have: {had}"
        return folder

    def end(self) -> None:
        if self.forks is not None:
            self.forks.kill()
            self.forks.wait()


class Trainer:
    """A trainer in its environment, with its file of cases."""

    def __init__(self, environment: Path):
        self.name, self.bin = environment.name, environment.resolve() / "bin"
        self.cases: ModuleType = importlib.import_module(f"tests.trainers.{self.name}")

    def versions(self) -> dict[str, str]:
        """Return the releases in the environment, of the trainer and what it stands on."""
        names = [self.cases.PACKAGE, "peft", "transformers", "torch"]
        said = subprocess.run([self.bin / "python", "-c", VERSIONS, *names], check=True, stdout=subprocess.PIPE)
        return dict(json.loads(said.stdout))

    def sides(self, folder: Path) -> list[Side]:
        """Write a model, a tokenizer and data, and empty modules for what the environment cannot import."""
        maker = INSIDE / getattr(self.cases, "MAKER", "tiny.py")
        subprocess.run([self.bin / "python", maker, folder / "made"], check=True, stderr=subprocess.PIPE)
        for name in getattr(self.cases, "MISSING", ()):
            (folder / "made" / f"{name}.py").touch()
        for name, text in getattr(self.cases, "FILES", {}).items():
            (folder / "made" / name).write_text(text)
        return [Side(self, library, folder) for library in LIBRARIES]


def files(folder: Path) -> dict[str, Path]:
    paths = (p for p in folder.rglob("*") if p.is_file() and "made" not in p.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path for path in paths}


def losses(log: Path) -> list[dict[str, Any]]:
    """Return what the trainer logged, without times."""
    text = log.read_text()
    if log.suffix == ".jsonl":  # SimpleTuner's, which tells of the machine in lines of their own
        logged = [said["metrics"] for said in map(json.loads, text.splitlines()) if "train_loss" in said["metrics"]]
    else:
        logged = json.loads(text)["log_history"]
    return [{k: v for k, v in line.items() if not any(part in k for part in TIMED)} for line in logged]


def config(file: Path, folder: Path, keys: set[str]) -> dict[str, Any]:
    said = json.loads(file.read_text().replace(str(folder), "."))  # the base model's path
    kind = graft.PEFT_TYPE_TO_CONFIG_MAPPING.get(said.get("peft_type"), graft.PeftConfig)
    usual = {f.name: f.default for f in fields(kind)}
    told = {key: said[key] for key in keys & said.keys() - {"peft_version"}}
    told = {k: usual.get(k) if v is None else v for k, v in told.items()}  # null means the default, which graft writes
    return {k: sorted(v) if isinstance(v, list) and k.endswith("modules") else v for k, v in told.items()}  # of a set


def differences(theirs: Path, ours: Path) -> Iterator[str]:
    """Yield a line for each difference between the folders that commands have filled under PEFT and graft."""
    here, there = files(ours), files(theirs)
    yield from (f"{name}: only with {'graft' if name in here else 'PEFT'}" for name in here.keys() ^ there.keys())
    for name in sorted(here.keys() & there.keys()):
        a, b, where = here[name], there[name], f"{name}: "
        if name.endswith(".safetensors"):
            held = {k: v for k, v in load_file(a).items() if MORE not in k}
            yield from compare(held, load_file(b), TENSORS, where)
        elif name.endswith(("trainer_state.json", "training_metrics.jsonl")):
            yield from compare(losses(a), losses(b), LOSSES, where)
        elif name.endswith("adapter_config.json"):
            keys = set(json.loads(b.read_text()))  # graft's are those of a newer PEFT
            yield from compare(config(a, ours, keys), config(b, theirs, keys), 0, where)
        elif name == SAID and a.read_text() != b.read_text():
            yield f"{where}graft {a.read_text()!r}, PEFT {b.read_text()!r}"
    if not any(name.endswith(".safetensors") for name in there):
        yield "PEFT's commands wrote no tensors"
