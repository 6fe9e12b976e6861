# SPDX-License-Identifier: Apache-2.0
"""Run a trainer's cases: `python -m tests.trainers .venv/trainers/ms_swift`, an environment of ms_swift.txt."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.clients.pair import SHOWN
from tests.trainers import own, results
from tests.trainers.both import Trainer, differences


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trainers", description=__doc__)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--only", nargs="*", metavar="CASE", help="'DoRA' …; and not its own tests")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave what the commands write there")
    parser.add_argument("--record", action="store_true", help="keep what the cases gave, for the documentation")
    args = parser.parse_args()
    trainer = Trainer(args.environment)
    cases = {case: commands for case, commands in trainer.cases.CASES.items() if case in (args.only or [case])}
    equal = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = (args.keep or Path(temporary)).resolve()
        sides = trainer.sides(root)
        for number, (case, commands) in enumerate(cases.items()):
            place = root / str(number)
            place.mkdir()
            try:
                theirs, ours = (side.case(commands, place) for side in sides)
                found = list(differences(theirs, ours))
            except AssertionError as e:
                found = [str(e)]
            equal[case] = not found
            head = f"{len(found)} differences, of which the first are" if found else "equal"
            print("\n  ".join([f"{case}: {head}", *found[:SHOWN]]), flush=True)
        for side in sides:
            side.end()
        tests = own.compared(trainer, root / "own") if hasattr(trainer.cases, "OWN") and args.only is None else None
    if args.record:
        results.record(trainer, equal, tests)
    differs = getattr(trainer.cases, "DIFFERS", {})
    failed = [case for case, good in equal.items() if good is (case in differs)]
    for case in failed:
        print(f"{case} is {'equal' if equal[case] else 'not equal'}, and was to be other")
    parts = [f"{len(equal) - len(failed)} cases as expected, {len(failed)} not"] if equal else []
    if tests is not None:
        failed += [name for name in tests["PEFT alone"] if name not in differs]
        print(*(f"with PEFT alone passes {name}" for name in tests["PEFT alone"]), sep="\n")
        parts.append(
            f"{len(tests['both'])} of its own tests pass, {len(tests['PEFT alone'])} with PEFT alone, "
            f"{len(tests['neither'])} with neither"
        )
    print(f"{trainer.cases.TITLE}: {'; '.join(parts)}")
    return 1 if failed or not (equal or tests) else 0


if __name__ == "__main__":
    sys.exit(main())
