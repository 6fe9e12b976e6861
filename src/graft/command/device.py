# SPDX-License-Identifier: Apache-2.0
"""`graft device-report`: graft on a device of this machine, checked and measured, as a file to send in."""

from __future__ import annotations

import json

from graft.command import show
from graft.command.app import UNREADABLE, Result, add_verb

PLAN = """torch finds no {} on this machine. With one, `graft device-report` does this:
  forward, backward, autocast, save and merge of {} methods in float32, bfloat16 and float16, against the CPU
  waits for the device in a training step, on CUDA
  seconds of LoRA, DoRA and a batch with four adapters, against PEFT if it is installed
  a file with these results, versions, and the device's name and driver"""


@add_verb
def device_report(*, device: str | None = None, output: str = "device-report.json", force: bool = False) -> Result:
    """Check graft on a GPU against the CPU, measure it against PEFT, and write a file to send in.

    The file has versions, the device's name, failed checks and seconds; no names of users, machines or folders. It
    takes minutes. Without a device the verb prints its plan, and the exit code is 3. Exit code 1: a check failed.

    Example: graft device-report -o report.json

    Args:
        device: cuda, xpu, mps, npu or cpu; else the first that torch finds.

    Returns:
        The document is `build_report`'s, or {"device": None, "plan": text} without a device; then no file is written.
        The output path is checked first.
    """
    from graft.command import device_checks
    from graft.files.sources import check_output, place_when_done

    check_output(output, [], force)
    place = device_checks.find_device(device)
    if place is None:
        plan = PLAN.format(device or "GPU", len(device_checks.METHODS))
        return Result({"device": None, "plan": plan}, lambda: show.print_lines(plan), True, UNREADABLE)
    report = device_checks.build_report(place, show.print_progress)
    with place_when_done(output) as path, open(path, "w") as file:
        json.dump(report, file, indent=1)
    checks = report["checks"]

    def print_report() -> None:
        """Print a line for each failed check, then tables of the largest deviations and of the benchmark's seconds.

        The last line has the file and the numbers of passed and failed checks.
        """
        for name, text in checks["failed"].items():
            show.print_line(f"failed: {name}: {text}")
        show.print_table("", ["law", "deviation"], checks["deviations"].items())
        libraries = ("graft", "PEFT", "base")
        rows = [(row, *map(seconds.get, libraries)) for row, seconds in report["benchmark"].items()]
        show.print_table("", ["seconds", *libraries], rows)
        show.print_line(f"{output}: {checks['passed']} checks passed, {len(checks['failed'])} failed")

    return Result(report, print_report, bool(checks["failed"]))
