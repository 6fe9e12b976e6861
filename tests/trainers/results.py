# SPDX-License-Identifier: Apache-2.0
"""What the cases gave, kept for the documentation: `make test-trainers TRAINER=--record`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from tests.trainers.both import Trainer

KEPT = Path(__file__).parent / "results.json"
NOTHING = "No run is recorded yet."


def record(trainer: Trainer, equal: Mapping[str, bool], own: Mapping[str, list[str]] | None = None) -> None:
    """Keep what a run gave, with the versions and the day, which is that of the oldest case."""
    versions = trainer.versions()
    runs = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    run = dict(title=trainer.cases.TITLE, date=date.today().isoformat(), versions=versions, equal=dict(equal))
    if own is not None:
        run["own"] = {**own, "both": len(own["both"])}
    before = runs.get(trainer.name, {})
    if before.get("versions") == versions and (before["equal"].keys() - equal or before.keys() - run):
        run = before | run | {"date": before["date"], "equal": before["equal"] | run["equal"]}
    run["equal"] = {case: run["equal"][case] for case in trainer.cases.CASES if case in run["equal"]}
    runs[trainer.name] = run
    KEPT.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


def kept() -> list[dict[str, Any]]:
    return list(json.loads(KEPT.read_text()).values()) if KEPT.exists() else []


def named(run: dict[str, Any], equal: bool) -> list[str]:
    return [case for case, good in run["equal"].items() if good is equal]


def counted(run: dict[str, Any]) -> str:
    """Return how many commands are equal, and how many of the trainer's tests pass of those that do with PEFT."""
    own = run.get("own")
    commands = [f"{len(named(run, True))} of {len(run['equal'])}"] if run["equal"] else []
    tests = [f"own tests: {own['both']} of {own['both'] + len(own['PEFT alone'])}"] if own else []
    return "; ".join(commands + tests)


def figures() -> str:
    """Return a table of how many cases are equal, under which releases, and when."""
    rows = []
    for run in kept():
        version, peft, transformers, _ = run["versions"].values()
        rows.append(f"| {run['title']} {version} | {peft} | {transformers} | {counted(run)} | {run['date']} |")
    head = "| trainer | its PEFT | its transformers | commands equal | run on |\n|---|---|---|---|---|"
    return "\n".join([head, *rows]) if rows else NOTHING


def cases() -> str:
    """Return a table of what was run."""
    rows = [
        f"| {run['title']} | {', '.join(named(run, True)) or '–'} | {', '.join(named(run, False)) or '–'} |"
        for run in kept()
        if run["equal"]
    ]
    return "\n".join(["| trainer | equal | not equal |\n|---|---|---|", *rows]) if rows else NOTHING


def tests() -> str:
    """Return a table of a trainer's own tests that do not pass here."""
    runs = [(run["title"], run["own"]) for run in kept() if "own" in run]
    rows = [
        f"| {title} | {own['both']} | {ticked(own['PEFT alone'])} | {ticked(own['neither'])} |" for title, own in runs
    ]
    head = "| trainer | pass with both | pass with PEFT alone | do not pass with PEFT either |\n|---|---|---|---|"
    return "\n".join([head, *rows]) if rows else NOTHING


def ticked(names: list[str]) -> str:
    """Return the tests' names, without their classes, in order of their files."""
    files: dict[str, list[str]] = {}
    for name in names:
        module, _, test = name.rpartition("::")
        file = next((part for part in module.split(".") if part.startswith("test_")), test)
        files.setdefault(file, []).append(test)
    return "; ".join(f"`{file}`: {', '.join(f'`{t}`' for t in sorted(part))}" for file, part in files.items()) or "–"
