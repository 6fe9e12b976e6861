# SPDX-License-Identifier: Apache-2.0
"""What the cases gave, kept for the documentation: `make test-trainers TRAINER=--record`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from tests.trainers.both import Trainer

KEPT = Path(__file__).parent / "results.json"
NOTHING = "No run is recorded yet."
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def record(trainer: Trainer, equal: Mapping[str, bool]) -> None:
    """Keep what a whole run gave, with the day and the versions."""
    names = [trainer.cases.PACKAGE, "peft", "transformers", "torch"]
    asked = [str(trainer.bin / "python"), "-c", VERSIONS, *names]
    versions = json.loads(subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout)
    said = dict(title=trainer.cases.TITLE, date=date.today().isoformat(), versions=versions)
    runs = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    runs[trainer.name] = said | {"equal": dict(equal)}
    KEPT.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


def kept() -> list[dict[str, Any]]:
    return list(json.loads(KEPT.read_text()).values()) if KEPT.exists() else []


def named(run: dict[str, Any], equal: bool) -> list[str]:
    return [case for case, good in run["equal"].items() if good is equal]


def figures() -> str:
    """Return a table of how many cases are equal, under which releases, and when."""
    rows = []
    for run in kept():
        version, peft, transformers, _ = run["versions"].values()
        counted = f"{len(named(run, True))} of {len(run['equal'])}"
        rows.append(f"| {run['title']} {version} | {peft} | {transformers} | {counted} | {run['date']} |")
    head = "| trainer | its PEFT | its transformers | commands equal | run on |\n|---|---|---|---|---|"
    return "\n".join([head, *rows]) if rows else NOTHING


def cases() -> str:
    """Return a table of what was run."""
    rows = [
        f"| {run['title']} | {', '.join(named(run, True)) or '–'} | {', '.join(named(run, False)) or '–'} |"
        for run in kept()
    ]
    return "\n".join(["| trainer | equal | not equal |\n|---|---|---|", *rows]) if rows else NOTHING
