# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each method: eight rates and three seeds on a task, trained together by `graft.sweep`.

Run `make rates`, or `python -m examples.compare.rates --help`. Each method's result is a row of the package's
`model/rates.json` as soon as it is there, so that a search that was stopped goes on with the next; so does, within a
method, its sweep. All of it takes hours. A start that changes the base has a base of its own for each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import graft
from examples.compare.choices import CHOICES, Choice
from examples.demo.__main__ import load as load_minilm
from examples.demo.cli import add_common, make_out, parse_common, run
from examples.demo.data import DemoError, load_task
from examples.demo.display import console
from examples.demo.sweep import loaders
from examples.demo_lm.chat import training_batch
from examples.demo_lm.data import dates
from examples.demo_lm.model import load as load_smollm
from examples.demo_lm.model import model_source
from graft.combine.adding import changes_base
from graft.config.atomic import replace, write_text
from graft.model.rates import FILE, Row, adapter_of, settings_of
from graft.train.multi.sweep import Trial

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = (0, 1, 2)
STEPS = {"spam": 32, "topics": 32, "dates": 12}
HEAD_LR = 2e-3  # of the classifier, which is no part of the method
MINILM, SMOLLM = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"
TARGETS = {  # of a Llama → of a BERT
    "q_proj": "query",
    "v_proj": "value",
}


@dataclasses.dataclass
class Field:
    """A task with its model.

    Attributes:
        load: makes a fresh base.
        fit: a method's config → the one for this model.
        optimizer: of the parameters of a run, and lr.
        batch: samples of a step.
    """

    model: str
    model_type: str
    load: Callable[[], nn.Module]
    fit: Callable[[Any], Any]
    optimizer: Callable[..., torch.optim.Optimizer]
    train: DataLoader
    valid: DataLoader
    batch: int
    tokenizer: Any = None


def minilm(task: str, quick: bool) -> Field:
    """Texts to classify; the classifier trains with each adapter, at a rate of its own."""
    held = load_task(task, limit=240 if quick else None)
    base, encode = load_minilm(None, len(held.labels))
    train, valid = loaders(held, encode, quick)
    valid = DataLoader(valid.dataset[::3], valid.batch_size, collate_fn=valid.collate_fn)  # type: ignore[index]

    def load() -> nn.Module:
        torch.manual_seed(0)  # of the classifier's first values
        return load_minilm(None, len(held.labels))[0]

    optimizer = two_groups(len(held.labels), base.config.hidden_size)
    return Field(MINILM, "bert", load, for_bert, optimizer, train, valid, train.batch_size or 0)


def two_groups(labels: int, width: int) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes an optimizer of an adapter's parameters at a rate, and of the classifier's at its own."""
    sizes = {(labels, width), (labels,)}

    def make(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        head = [p for p in parameters if tuple(p.shape) in sizes]
        if len(head) != 2:
            raise DemoError(f"A parameter of the adapter is as large as the classifier's, {sizes}: change its rank.")
        rest = [p for p in parameters if tuple(p.shape) not in sizes]
        groups = [{"params": rest, "lr": lr}, {"params": head, "lr": HEAD_LR}]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    return make


def for_bert(config: Any) -> Any:
    """Return a config for a Llama as one for a BERT that classifies."""
    own: dict[str, Any] = {"task_type": "SEQ_CLS"}
    names = getattr(config, "target_modules", None)
    if names is not None:
        own["target_modules"] = [TARGETS[name] for name in names]
    elif isinstance(config, graft.LNTuningConfig):
        own["target_modules"] = ["LayerNorm"]
    return dataclasses.replace(config, **own)


def smollm(task: str, quick: bool) -> Field:
    """Dates in ten languages, to be written in ISO 8601."""
    source = model_source(None)
    tokenizer = load_smollm(source)[1]
    held = dates(0, held_out=16 if quick else 48)
    collate = partial(training_batch, tokenizer, held.instruction)
    train = DataLoader(held.train, 8, shuffle=True, collate_fn=collate, drop_last=True)  # type: ignore[arg-type]
    valid = DataLoader(held.validation, 8, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = partial(torch.optim.AdamW, weight_decay=0.0)
    return Field(SMOLLM, "llama", lambda: load_smollm(source)[0], lambda c: c, optimizer, train, valid, 8, tokenizer)


FIELDS = {"spam": minilm, "topics": minilm, "dates": smollm}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Search; return the rows of the file."""
    args = parse(argv)
    rows = read(args.into)
    failed: list[str] = []
    if not args.methods:
        console.print(f"Left out: {', '.join(prompts())}: {NO_PROMPTS}.", markup=False)
    for task in args.tasks:
        field = FIELDS[task](task, args.quick)
        for name in args.methods or searchable():
            steps = args.steps or (4 if args.quick else STEPS[task])
            try:
                config = configured(CHOICES[name], field, steps, args.rank)
                row = blank(name, config, task, field, steps, args.rates)
                if any(same(row, other) for other in rows) and not args.again:
                    continue
                console.rule(f"{task}: {name}, {len(args.rates)} rates, {len(SEEDS)} seeds, {steps} steps")
                folder = args.out / task / "-".join([name, *([] if args.rank is None else [f"r{args.rank}"])])
                found = search(field, config, args.rates, steps, folder)
            except Exception as error:  # of a method that cannot be trained so; the others can
                failed.append(f"{task}, {name}: {type(error).__name__}: {error}")
                console.print(failed[-1], style="red", markup=False)
                continue
            for rate in args.rates:
                scores = [trial.loss for trial in found if trial.setting["lr"] == rate]
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


NO_PROMPTS = "prompts are no adapters on layers, of which a sweep trains several at once"


def searchable() -> list[str]:
    """Return the methods on layers that need nothing but a config: no look at data, nothing after steps, no loss."""
    return [name for name in only_configs() if name not in prompts()]


def prompts() -> list[str]:
    return [name for name in only_configs() if CHOICES[name].prompt]


def only_configs() -> list[str]:
    return [name for name, c in CHOICES.items() if not (c.before or c.after or c.loss or c.after_step or c.invocation)]


def configured(choice: Choice, field: Field, steps: int, rank: int | None) -> Any:
    config = field.fit(choice.made(steps, field.tokenizer))
    return config if rank is None else dataclasses.replace(config, r=rank)


def blank(name: str, config: Any, task: str, field: Field, steps: int, rates: Sequence[float]) -> Row:
    """Return a row without scores."""
    return Row(
        method=name,
        adapter=adapter_of(config),
        config=settings_of(config),
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


def search(field: Field, config: Any, rates: Sequence[float], steps: int, folder: Path) -> list[Trial]:
    """Return a trial of each seed and rate, trained together; of a start that changes the base, one after another."""
    schedule = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.01, total_iters=steps)

    def sweep(seeds: Sequence[int], rates: Sequence[float], folder: Path) -> list[Trial]:
        return graft.sweep(
            field.load(),
            config,
            {"seed": list(seeds), "lr": list(rates)},
            data=field.train,
            valid=field.valid,
            steps=steps,
            optimizer=field.optimizer,
            schedule=schedule,
            rungs=1,
            folder=folder,
            save_every=16,
            base_in_eval=True,
            exact=False,
        ).trials

    if not changes_base(config):
        return sweep(SEEDS, rates, folder)
    return [t for seed in SEEDS for rate in rates for t in sweep([seed], [rate], folder / f"{seed}-{rate:g}")]


def same(one: Row, other: Row) -> bool:
    """Return True if two rows are of one search, whatever it found and when."""
    found = ("means", "spreads", "date")
    return {k: v for k, v in one.items() if k not in found} == {k: v for k, v in other.items() if k not in found}


def read(path: Path) -> list[Row]:
    return json.loads(path.read_text()) if path.exists() else []  # type: ignore[no-any-return]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write one row a line, in the order of tasks and methods."""
    tasks, methods = list(FIELDS), list(CHOICES)
    ordered = sorted(rows, key=lambda r: (tasks.index(r["task"]), methods.index(r["method"]), str(r["config"])))
    replace(str(path), write_text("[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("rates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"which ones (default: all): {', '.join(searchable())}")
    parser.add_argument("--tasks", nargs="+", choices=list(FIELDS), default=list(FIELDS), help="(default: all)")
    parser.add_argument("--rates", type=float, nargs="+", default=list(GRID), help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, help="instead of each method's own, to see how the rate moves with it")
    parser.add_argument("--into", type=Path, default=FILE, help="the file of rows (default: the package's)")
    parser.add_argument("--again", action="store_true", help="search again what the file has")
    add_common(parser, Path("out/rates"), STEPS)
    args = parse_common(parser, argv)
    unknown = [name for name in args.methods if name not in searchable()]
    if unknown:
        why = f" ({NO_PROMPTS})" if {*unknown} & {*prompts()} else ""
        parser.error(f"cannot search {', '.join(unknown)}{why}; can: {', '.join(searchable())}")
    if min(args.rates) <= 0:
        parser.error("--rates must be above 0")
    make_out(parser, args.out)
    return args


if __name__ == "__main__":
    run(main)
