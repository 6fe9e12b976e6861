# SPDX-License-Identifier: Apache-2.0
"""Adapter methods side by side on texts that MiniLM classifies, each at the learning rate that `make rates` has found.

Run `make compare-texts`, or `python -m examples.compare.texts --help`. Prints a table; leaves the numbers and a picture
of each task in `out/`. What an earlier run has found is kept unless --again is given.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table

from examples.compare.choices import CHOICES, check_names
from examples.compare.fields import FIELDS, Field, trained
from examples.compare.picture import draw
from examples.compare.rates import SEEDS
from examples.demo.cli import add_common, make_out, parse_common, run
from examples.demo.data import DemoError
from examples.demo.display import console
from examples.demo_lm.story import size
from graft.model.rates import RateSearch, best_lr, find_settings, read_searches

STEPS = {"topics": 96, "spam": 96}
WHAT = {"topics": "headlines", "spam": "messages"}
AVERAGED = ("exact", "loss", "cpu_seconds", "prepare_seconds")
COLUMNS = ("method", "", "accuracy", "loss", "step", "prepare", "file", "parameters", "lr")

Result = dict[str, Any]
Results = dict[str, dict[str, Result]]  # task → method → what it gave


def main(argv: Sequence[str] | None = None) -> Results:
    """Compare; return what goes to texts.json.

    Raises:
        DemoError: some methods failed, or have no rate, after all others ran.
    """
    args = parse(argv)
    file = args.out / "texts.json"
    results: Results = {} if args.again or not file.exists() else json.loads(file.read_text())
    failed: list[str] = []
    for task in args.tasks:
        field, found = FIELDS[task](task, args.quick), results.setdefault(task, {})
        steps = args.steps or (2 if args.quick else STEPS[task])
        console.rule(f"{task}: {steps} steps, {len(SEEDS)} seeds")
        for name in args.methods or CHOICES:
            if name in field.lacks:
                continue
            try:
                rate = searched(name, task, field)
                if (found.get(name, {}).get("lr"), found.get(name, {}).get("steps")) == (rate, steps):
                    continue
                found[name] = averaged([once(field, name, rate, steps, seed) for seed in SEEDS])
            except Exception as error:  # of one method; the others can
                failed.append(f"{task}, {name}: {type(error).__name__}: {error}")
                console.print(failed[-1], style="red", markup=False)
                continue
            console.print(f"{name}: {found[name]['exact']:.3f} ± {found[name]['spread']:.3f}", markup=False)
            file.write_text(json.dumps(results, indent=1) + "\n")
        results[task] = found = {name: found[name] for name in CHOICES if name in found}
        if found:
            console.print(table(found, task))
            draw(found, held_out(field), args.out / f"{task}.png", what=WHAT[task])
    file.write_text(json.dumps(results, indent=1) + "\n")
    if failed:
        raise DemoError("\n".join(failed))
    return results


def searched(name: str, task: str, field: Field) -> float:
    """Return the best rate of a method.

    Raises:
        DemoError: it was not searched with the config of today.
    """
    found = [row for row in read_searches() if (row["method"], row["task"]) == (name, task)]
    own = [row for row in found if row["config"] == find_settings(fitted(name, field, row))]
    if not own:
        raise DemoError(f"no rate was searched. Run: make rates RATES='\"{name}\" --tasks {task}'")
    return best_lr(own)


def fitted(name: str, field: Field, row: RateSearch) -> Any:
    return field.fit(CHOICES[name].made(row["steps"], field.tokenizer))


def once(field: Field, name: str, rate: float, steps: int, seed: int) -> Result:
    """Return what one training gives: `exact` is the accuracy on the held-out texts."""
    choice = CHOICES[name]
    got = trained(field, choice, field.fit(choice.made(steps, field.tokenizer)), rate, steps, seed, warmup=steps // 10)
    with tempfile.TemporaryDirectory() as folder:
        got.model.save_pretrained(folder)
        bytes_ = size(Path(folder))
    return {
        "exact": accuracy(got.model, field),
        "loss": got.loss,
        "steps": steps,
        "cpu_seconds": got.cpu_seconds,
        "prepare_seconds": got.prepare_seconds,
        "bytes": bytes_,
        "parameters": got.model.get_nb_trainable_parameters()[0],
        "lr": rate,
        "note": choice.note,
    }


def held_out(field: Field) -> int:
    return len(field.test.dataset)  # type: ignore[union-attr,arg-type]


@torch.no_grad()
def accuracy(model: Any, field: Field) -> float:
    assert field.test is not None
    right = [(model(**batch).logits.argmax(-1) == batch["labels"]).float() for batch in field.test]
    return float(torch.cat(right).mean())


def averaged(runs: Sequence[Result]) -> Result:
    """Return the means over seeds, with the standard deviation of the accuracy."""
    means = {key: mean([r[key] for r in runs]) for key in AVERAGED}
    return runs[0] | means | {"spread": stdev([r["exact"] for r in runs]), "seeds": [r["exact"] for r in runs]}


def cells(name: str, m: Result) -> list[str]:
    return [
        name,
        m["note"],
        f"{m['exact']:.3f} ± {m['spread']:.3f}",
        f"{m['loss']:.3f}",
        f"{m['cpu_seconds'] / m['steps'] * 1e3:.0f} ms",
        f"{m['prepare_seconds']:.1f} s",
        f"{m['bytes'] / 1e3:.0f} kB",
        f"{m['parameters']:,}",
        f"{m['lr']:g}",
    ]


def table(found: dict[str, Result], title: str) -> Table:
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(COLUMNS):
        made.add_column(name, justify="left" if i < 2 else "right")
    for name, m in found.items():
        made.add_row(*cells(name, m))
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("texts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"which ones (default: all): {', '.join(CHOICES)}")
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=list(STEPS), help="(default: all)")
    parser.add_argument("--again", action="store_true", help="forget the results of earlier runs")
    add_common(parser, Path("out"), STEPS)
    args = parse_common(parser, argv)
    check_names(parser, args.methods)
    make_out(parser, args.out)
    return args


if __name__ == "__main__":
    run(main)
