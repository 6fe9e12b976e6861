# SPDX-License-Identifier: Apache-2.0
"""Adapters on a language model in 4 bits: LoRA and DoRA on SmolLM2 in bitsandbytes' NF4, beside LoRA on the dense one.

Run `make demo-4bit`, or `python -m examples.demo_4bit --help`. Each run is a process of its own, so that its memory is
its own. What trained over 4 bits is then used over the 4-bit base, over the dense base, merged into 4 bits and merged
into dense weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.demo.cli import add_common, make_out, parse_common, run
from examples.demo.data import DemoError
from examples.demo.display import Steps, console, waiting
from examples.demo_lm.model import model_source

STEPS, HELD_OUT = 60, 50
RUNS = (("dense", "LoRA"), ("4-bit", "LoRA"), ("4-bit", "DoRA"))
PLACES = ("as trained", "over the 4-bit base", "over the dense base", "merged into 4 bits", "merged, dense")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; return what it writes to demo-4bit.json."""
    start, args = time.perf_counter(), parse(argv)
    steps, held_out = args.steps or (3 if args.quick else STEPS), 10 if args.quick else HELD_OUT
    if find_spec("bitsandbytes") is None:
        raise DemoError("The package bitsandbytes, which packs the weights, is not installed. Run: make demo-4bit")
    with waiting("reading the model; the first time it is converted, which takes half a minute"):
        source = model_source(args.model)
    results = {}
    for base, method in RUNS:
        name = f"{method} on {base}"
        folder = args.out / "demo-4bit" / name.replace(" ", "-")
        results[name] = child(name, [base, method, source, str(folder), str(steps), str(args.seed), str(held_out)])
    console.print(costs(results))
    console.print(answers(results, held_out))
    made = {"seed": args.seed, "steps": steps, "seconds": time.perf_counter() - start, "runs": results}
    (args.out / "demo-4bit.json").write_text(json.dumps(made, indent=2) + "\n")
    console.rule(f"{made['seconds']:.0f} s · {args.out / 'demo-4bit.json'}")
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "demo-4bit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a llama with a chat template: path or hub id (default: the carrier package's)")
    add_common(parser, Path("out"), {"dates": STEPS})
    args = parse_common(parser, argv)
    make_out(parser, args.out)
    return args


def child(name: str, arguments: list[str]) -> dict[str, Any]:
    """Run one training in a process of its own, behind a progress bar; return its results."""
    command = [sys.executable, "-W", "ignore", "-m", "examples.demo_4bit.one", *arguments]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        Steps(name, int(arguments[4]), "reads the model") as shown,
    ):
        for line in process.stdout or ():
            event = json.loads(line)
            if "result" in event:
                shown.update(what=f"exact {event['result']['exact']['as trained']:.2f}")
                return event["result"]  # type: ignore[no-any-return]
            shown.update(event.get("step"), event["what"])
        errors = (process.stderr.read() if process.stderr else "").strip().splitlines()
    raise DemoError(f"{name} ended without a result: {errors[-1] if errors else 'no message'}")


def costs(results: dict[str, Any]) -> Table:
    table = Table(title="what training takes", title_justify="left")
    for i, name in enumerate(("run", "base weights", "peak memory of training", "CPU time of a step", "adapter file")):
        table.add_column(name, justify="right" if i else "left")
    for name, m in results.items():
        table.add_row(
            name,
            f"{m['base_bytes'] / 1e6:.0f} MB",
            f"{m['peak_memory'] / 1e6:.0f} MB",
            f"{m['cpu_seconds'] / m['steps']:.2f} s",
            f"{m['file_bytes'] / 1e3:.0f} kB",
        )
    return table


def answers(results: dict[str, Any], n: int) -> Table:
    table = Table(title=f"dates that come out exactly, of {n} held-out ones", title_justify="left")
    table.add_column("run")
    for place in PLACES:
        table.add_column(place, justify="right")
    for name, m in results.items():
        table.add_row(name, *[f"{m['exact'][p]:.2f}" if p in m["exact"] else "" for p in PLACES])
    return table


if __name__ == "__main__":
    run(main)
