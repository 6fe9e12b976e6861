# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each method: eight rates and three seeds on a task, trained together by `graft.sweep`.

Run `make rates`, or `python -m examples.compare.rates --help`. Each method's result is a row of the package's
`model/rates.json` as soon as it is there, so that a search that was stopped goes on with the next; so does, within a
method, its sweep. All of it takes hours. What a sweep cannot train trains alone: prompts, a start that changes the base
or looks at data, a loss beside the model's or of its labels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import graft
from examples.compare.choices import CHOICES, Choice, check_names
from examples.compare.fields import FIELDS, Field, mean_loss, schedule, trained
from examples.demo.cli import add_common, make_out, parse_common, run
from examples.demo.data import DemoError
from examples.demo.display import console
from graft.combine.adding import find_start_change
from graft.config.atomic import replace_file
from graft.methods import method_of
from graft.model.rates import FILE, RateSearch, class_name_of, find_settings

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = (0, 1, 2)
STEPS = {"spam": 24, "topics": 32, "dates": 12}


def main(argv: Sequence[str] | None = None) -> list[RateSearch]:
    """Search; return the rows of the file."""
    args = parse(argv)
    rows = read(args.into)
    failed: list[str] = []
    for task in args.tasks:
        field = FIELDS[task](task, args.quick)
        for name in args.methods or CHOICES:
            if name in field.lacks:
                console.print(f"{task}: left out {name}, {field.lacks[name]}", markup=False)
                continue
            steps = args.steps or (4 if args.quick else STEPS[task])
            try:
                config = configured(CHOICES[name], field, steps, args.rank)
                row = blank(name, config, task, field, steps, args.rates)
                if any(same(row, other) for other in rows) and not args.again:
                    continue
                console.rule(f"{task}: {name}, {len(args.rates)} rates, {len(SEEDS)} seeds, {steps} steps")
                folder = args.out / task / "-".join([name, *([] if args.rank is None else [f"r{args.rank}"])])
                found = search(field, CHOICES[name], config, args.rates, steps, folder)
            except Exception as error:  # of a method that cannot be trained so; the others can
                failed.append(f"{task}, {name}: {type(error).__name__}: {error}")
                console.print(failed[-1], style="red", markup=False)
                continue
            for rate in args.rates:
                scores = found[rate]
                lost = not all(map(math.isfinite, scores))
                row["means"].append(None if lost else round(statistics.mean(scores), 4))
                row["spreads"].append(None if lost else round(statistics.stdev(scores), 4))
            console.print(dict(zip(row["rates"], zip(row["means"], row["spreads"]))))
            rows = read(args.into)  # another search may have written meanwhile
            rows = [other for other in rows if not same(row, other)] + [row]
            write(args.into, rows)
    if failed:
        raise DemoError("\n".join(failed))
    return rows


def configured(choice: Choice, field: Field, steps: int, rank: int | None) -> Any:
    config = field.fit(choice.made(steps, field.tokenizer))
    return config if rank is None else dataclasses.replace(config, r=rank)


def blank(name: str, config: Any, task: str, field: Field, steps: int, rates: Sequence[float]) -> RateSearch:
    """Return a row without scores."""
    return RateSearch(
        method=name,
        adapter=class_name_of(config),
        config=find_settings(config),
        task=task,
        model=field.model,
        model_type=field.model_type,
        steps=steps,
        batch=field.batch,
        seeds=len(SEEDS),
        date=date.today().isoformat(),
        rates=list(rates),
        means=[],
        spreads=[],
    )


def search(
    field: Field, choice: Choice, config: Any, rates: Sequence[float], steps: int, folder: Path
) -> dict[float, list[float]]:
    """Return the validation losses of each rate, one for each seed."""
    if alone(choice, config):
        return {rate: [judged(field, choice, config, rate, steps, seed) for seed in SEEDS] for rate in rates}
    trials = graft.sweep(
        field.load(),
        config,
        {"seed": list(SEEDS), "lr": list(rates)},
        data=field.train,
        valid=field.valid,
        steps=steps,
        optimizer=field.optimizer,
        schedule=schedule(steps),
        rungs=1,
        folder=folder,
        save_every=16,
        base_in_eval=True,
        exact=False,
    ).trials
    return {rate: [trial.loss for trial in trials if trial.setting["lr"] == rate] for rate in rates}


def alone(choice: Choice, config: Any) -> bool:
    """Return True if a sweep cannot train a method: a prompt, or what needs more than its config."""
    more = choice.before or choice.after or choice.loss or choice.after_step
    labelled = getattr(method_of(config.peft_type), "has_labelled_loss", False)
    return bool(choice.prompt or more or labelled or find_start_change(config))


def judged(field: Field, choice: Choice, config: Any, rate: float, steps: int, seed: int) -> float:
    """Return the validation loss after a training; NaN if it diverged."""
    found = trained(field, choice, config, rate, steps, seed)
    return mean_loss(found.model, field.valid) if math.isfinite(found.loss) else math.nan


def same(one: RateSearch, other: RateSearch) -> bool:
    """Return True if two rows are of one search, whatever it found and when."""
    found = ("means", "spreads", "date")
    return {k: v for k, v in one.items() if k not in found} == {k: v for k, v in other.items() if k not in found}


def read(path: Path) -> list[RateSearch]:
    return json.loads(path.read_text()) if path.exists() else []  # type: ignore[no-any-return]


def write(path: Path, rows: Iterable[RateSearch]) -> None:
    """Write one row a line, in the order of tasks and methods."""
    tasks, methods = list(FIELDS), list(CHOICES)
    ordered = sorted(rows, key=lambda r: (tasks.index(r["task"]), methods.index(r["method"]), str(r["config"])))
    replace_file(str(path), "[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("rates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"which ones (default: all): {', '.join(CHOICES)}")
    parser.add_argument("--tasks", nargs="+", choices=list(FIELDS), default=list(FIELDS), help="(default: all)")
    parser.add_argument("--rates", type=float, nargs="+", default=list(GRID), help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, help="instead of each method's own, to see how the rate moves with it")
    parser.add_argument("--into", type=Path, default=FILE, help="the file of rows (default: the package's)")
    parser.add_argument("--again", action="store_true", help="search again what the file has")
    add_common(parser, Path("out/rates"), STEPS)
    args = parse_common(parser, argv)
    check_names(parser, args.methods)
    if min(args.rates) <= 0:
        parser.error("--rates must be above 0")
    make_out(parser, args.out)
    return args


if __name__ == "__main__":
    run(main)
