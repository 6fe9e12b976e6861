# SPDX-License-Identifier: Apache-2.0
"""What became of PEFT's tests: read, sorted by left_out.md, told, and kept for the documentation."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
KEPT = HERE / "run.json"
LIST = HERE / "left_out.md"
PARTS = {"On purpose": "differs", "PEFT's inside": "inside", "Not in PEFT either": "fails"}


@dataclass(frozen=True)
class Line:
    """Tests that do not count, and why: a line of left_out.md."""

    part: str  # differs, inside or fails
    reason: str
    tests: str  # file::class::test, or test[parameters], with * for anything

    def names(self) -> re.Pattern[str]:
        body = "".join(".*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", self.tests))
        return re.compile(body if "[" in self.tests else rf"{body}(\[.*\])?")


def lines() -> list[Line]:
    found, part, reason = [], "", ""
    for text in LIST.read_text().splitlines():
        if text.startswith("# "):
            part = PARTS.get(text[2:], "")
        elif text.startswith("## "):
            reason = text[3:]
        elif text.startswith("- `"):
            found.append(Line(part, reason, text[3:].rstrip("`")))
    return found


@dataclass
class Found:
    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # test → why
    left_out: Counter[str] = field(default_factory=Counter)  # part → tests that fail and do not count
    idle: list[str] = field(default_factory=list)  # lines whose tests ran, and none of them failed

    @property
    def counted(self) -> int:
        return self.passed + len(self.failed)

    @property
    def good(self) -> bool:
        return self.passed >= 0.999 * self.counted and not self.idle


@dataclass(frozen=True)
class Run:
    """The numbers of a whole run, as run.json keeps them."""

    date: str
    passed: int
    failed: int
    skipped: int
    differs: int = 0
    inside: int = 0
    fails: int = 0

    @property
    def counted(self) -> int:
        return self.passed + self.failed


def read(out: Path) -> Found:
    outcomes: dict[str, tuple[str, str]] = {}
    for text in out.read_text().splitlines():
        said = json.loads(text)
        name = said["test"].removeprefix("tests/")
        if outcomes.get(name, ("",))[0] != "failed":
            outcomes[name] = said["outcome"], said["why"]
    found, all_lines = Found(), [(line, line.names()) for line in lines()]
    ran: Counter[Line] = Counter()
    used: Counter[Line] = Counter()
    for name, (outcome, reason) in sorted(outcomes.items()):
        match = [
            line for line, names in all_lines if line.tests.startswith(name.split("::")[0]) and names.fullmatch(name)
        ]
        ran.update(match if outcome != "skipped" else ())
        if outcome == "failed" and match:
            found.left_out[match[0].part] += 1
            used.update(match)
        elif outcome == "failed":
            found.failed[name] = reason
        elif outcome == "skipped":
            found.skipped += 1
        elif outcome == "passed":
            found.passed += 1
    found.idle = [line.tests for line in ran if not used[line] and line.part != "fails"]
    return found


def percent(passed: int, counted: int) -> str:
    """A share, rounded down, so that 100.0 % is all."""
    return f"{int(1000 * passed / max(counted, 1)) / 10:.1f} %"


def sentences() -> str:
    """What the documentation says of the last whole run."""
    run = kept()
    if run is None:
        return "No whole run is recorded yet."
    share = f"{run.passed:,} of the other {run.counted:,}: {percent(run.passed, run.counted)}"
    return (
        f"The last whole run was on {run.date}. Of the tests that do not pass, {run.differs:,} want behavior that "
        f"differs here on purpose, {run.inside:,} test PEFT's inside, and {run.fails:,} fail with PEFT, too. graft "
        f"passes {share if run.failed else f'all of the other {run.counted:,}'}."
    )


def first_line(text: str) -> str:
    return text.partition("\n")[0][:200]


def told(found: Found, show: int) -> str:
    said = [f"{name}\n    {first_line(reason)}" for name, reason in list(found.failed.items())[:show]]
    said += [f"passes, though left_out.md names it: {tests}" for tests in found.idle]
    left = ", ".join(f"{found.left_out[part]} {kind}" for kind, part in PARTS.items())
    said += [f"left out: {left}; skipped by the tests themselves: {found.skipped}"]
    said += [f"{found.passed} of {found.counted} pass: {percent(found.passed, found.counted)}"]
    return "\n".join(said)


def kept() -> Run | None:
    """Return the last whole run with graft, if one is recorded."""
    return Run(**json.loads(KEPT.read_text())) if KEPT.exists() else None


def record(found: Found) -> None:
    """Keep the numbers of a whole run with graft."""
    numbers = dict(passed=found.passed, failed=len(found.failed), skipped=found.skipped)
    run = Run(date=date.today().isoformat(), **numbers, **found.left_out)
    KEPT.write_text(json.dumps(asdict(run), indent=1) + "\n")
