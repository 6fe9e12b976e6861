# SPDX-License-Identifier: Apache-2.0
"""Adapter methods side by side on one task of a real language model: the dates of `make demo-lm`, equal steps.

Run `make compare`, or `python -m examples.compare --help`. Prints a table and leaves a picture, the numbers and the
table as Markdown in `out/`. Results of an earlier run are kept unless --again is given, so that a run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from examples.compare.choices import CHOICES, DTYPE, FAMILY, LEFT_OUT, check_names
from examples.compare.picture import deviation, draw
from examples.demo.cli import add_common, make_out, parse_common, run
from examples.demo.data import DemoError
from examples.demo.display import Steps, console, waiting
from examples.demo_lm.model import model_source

STEPS, HELD_OUT, SEEDS = 60, 100, 3
AVERAGED = ("exact", "lenient", "loss", "cpu_seconds", "prepare_seconds", "peak_memory")
COLUMNS = ("method", "", "exact match", "lenient", "loss", "step", "prepare", "peak memory", "file", "parameters", "lr")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison; return what it writes to compare.json.

    Raises:
        DemoError: some methods failed, after all others ran.
    """
    args = parse(argv)
    steps, held_out = (3, 10) if args.quick else (args.steps or STEPS, HELD_OUT)
    with waiting("reading the model; the first time it is converted, which takes half a minute"):
        source = model_source(args.model)
    file = args.out / "compare.json"
    settings = {"steps": steps, "seed": args.seed, "held_out": held_out}
    if args.rates:
        return search(args.methods, args.rates, source, settings)
    kept = {**settings, "dtype": str(DTYPE)}
    results = {} if args.again else earlier(file, kept)
    runs = {name: m.get("runs", {str(args.seed): m}) for name, m in results.items()}
    names = list(dict.fromkeys(args.methods or (FAMILY if args.lora else CHOICES)))
    failed: list[str] = []
    for seed in range(args.seed, args.seed + args.seeds):  # all methods with one seed, then with the next
        wanted = [(name, None) for name in names if str(seed) not in runs.get(name, {})]
        for (name, _), result in outcomes(wanted, failed, source, settings | {"seed": seed}):
            runs.setdefault(name, {})[str(seed)] = result
            results[name] = averaged(runs[name])
            file.write_text(json.dumps({"settings": kept, "methods": results}, indent=2) + "\n")
    if failed and not results:
        raise DemoError("; ".join(failed))
    results = {name: results[name] for name in CHOICES if name in results}
    console.print(table(rows(results, held_out), f"dates, {held_out} held-out questions"))
    console.print(left_out())
    (args.out / "compare.md").write_text(markdown(results, held_out))
    draw(results, held_out, args.out / "compare.png")
    console.rule(f"{file} · {args.out / 'compare.md'} · {args.out / 'compare.png'}")
    if failed:
        raise DemoError("; ".join(failed))
    return {"settings": kept, "methods": results}


def averaged(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a method from those of its seeds: means, with the standard deviation of the exact match."""
    first, *others = runs.values()
    if not others:
        return first
    means = {key: mean([run[key] for run in runs.values()]) for key in AVERAGED}
    return first | means | {"spread": stdev([run["exact"] for run in runs.values()]), "runs": runs}


def search(names: Sequence[str], rates: Sequence[float], source: str, settings: dict[str, int]) -> dict[str, Any]:
    """Train each method with each learning rate, and judge them on the validation dates; keep nothing.

    Raises:
        DemoError: some of them failed, after all others ran.
    """
    failed: list[str] = []
    found = dict(outcomes([(name, rate) for name in names for rate in rates], failed, source, settings))
    if found:
        n = settings["held_out"]
        console.print(table([cells(name, m, n) for (name, _), m in found.items()], f"dates, {n} validation questions"))
    if failed:
        raise DemoError("; ".join(failed))
    return {name: {rate: found[name, rate] for rate in rates} for name in names}


def outcomes(
    wanted: Sequence[tuple[str, float | None]], failed: list[str], source: str, settings: dict[str, int]
) -> Iterator[tuple[tuple[str, float | None], dict[str, Any]]]:
    """Yield the results of methods by name and learning rate; enter into `failed` those that fail, and go on."""
    for name, rate in wanted:
        try:
            result = compare(name, source, **settings, rate=rate)
        except DemoError as e:
            failed.append(str(e))
        else:
            yield (name, rate), result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help=f"which ones (default: all): {', '.join(CHOICES)}")
    parser.add_argument("--model", help="a llama with a chat template: path or hub id (default: the carrier package's)")
    parser.add_argument("--lora", action="store_true", help="LoRA and its relatives only")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates to try, judged on validation dates; for methods by name"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from --seed on (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="forget the results of earlier runs")
    add_common(parser, Path("out"), {"dates": STEPS})
    args = parse_common(parser, argv)
    check_names(parser, args.methods)
    if args.rates and not args.methods:
        parser.error("--rates wants methods by name, before it")
    if args.rates and min(args.rates) <= 0:
        parser.error("--rates must be above 0")
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if args.quick:
        args.seeds = 1
    make_out(parser, args.out)
    return args


def earlier(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results of an earlier run with the same settings, of choices that are as they were then."""
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return current(before["methods"]) if before.get("settings") == settings else {}


def current(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results whose learning rate and note are those of today's choices."""
    now = {name: (choice.lr, choice.note) for name, choice in CHOICES.items()}
    return {name: m for name, m in results.items() if (m["lr"], m["note"]) == now.get(name)}


def compare(name: str, source: str, steps: int, seed: int, held_out: int, rate: float | None = None) -> dict[str, Any]:
    """Train and judge a method in a process of its own, behind a progress bar."""
    values = [name, source, steps, seed, held_out, *([] if rate is None else [rate])]
    command = [sys.executable, "-m", "examples.compare.one", *map(str, values)]
    title = name if rate is None else f"{name} {rate:g}"
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child,
        Steps(title, steps, "reads the model") as shown,
    ):
        for line in child.stdout or ():
            event = json.loads(line)
            if "result" in event:
                shown.update(what=f"exact {event['result']['exact']:.2f}")
                return event["result"]  # type: ignore[no-any-return]
            what = "answers" if event.get("answering") else f"loss {event['loss']:.3f}"
            shown.update(event["step"], what)
        errors = (child.stderr.read() if child.stderr else "").strip().splitlines()
    raise DemoError(f"{title} ended without a result: {errors[-1] if errors else 'no message'}")


def cells(name: str, m: dict[str, Any], n: int) -> list[str]:
    return [
        name,
        m["note"],
        f"{m['exact']:.2f} ± {deviation(m, n):.2f}",
        f"{m['lenient']:.2f}",
        f"{m['loss']:.3f}",
        f"{m['cpu_seconds'] / m['steps']:.2f} s",
        f"{m['prepare_seconds']:.0f} s",
        f"{m['peak_memory'] / 1e9:.2f} GB",
        f"{m['bytes'] / 1e3:.0f} kB",
        f"{m['parameters']:,}",
        f"{m['lr']:g}",
    ]


def rows(results: dict[str, Any], n: int) -> list[list[str]]:
    return [cells(name, m, n) for name, m in results.items()]


def table(rows: list[list[str]], title: str) -> Table:
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(COLUMNS):
        made.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def left_out() -> str:
    """Say which methods have no row, and why."""
    reasons: dict[str, list[str]] = {}
    for config, reason in LEFT_OUT.items():
        reasons.setdefault(reason, []).append(config)
    return "Not for this task: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()) + "."


def markdown(results: dict[str, Any], n: int) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(results, n)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{left_out()}\n"


if __name__ == "__main__":
    run(main)
