# SPDX-License-Identifier: Apache-2.0
"""Sixteen settings of an adapter on MiniLM, for each of the two tasks, by successive halving: trained together.

Run `make demo-sweep`, or `python -m examples.demo.sweep --help`. At the end a plain loop trains the best setting
alone, to compare time and losses.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import graft
from examples.demo.__main__ import load
from examples.demo.cli import add_common, make_out, parse_common, run
from examples.demo.data import DATA, Task, load_task
from examples.demo.display import console
from examples.demo.training import Encode, accuracy, predict

SPACE = {"r": [2, 4, 8, 16], "lr": [2e-4, 6e-4, 2e-3, 6e-3]}
STEPS, BATCH = 192, 8


def loaders(task: Task, encode: Encode, quick: bool) -> tuple[DataLoader, DataLoader]:
    """Return a loader of what to train on, and one of what to judge by: a fifth that is held out of it."""

    def batch(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows)
        return {**encode(list(texts)), "labels": torch.tensor(labels)}

    rows = list(zip(task.train.texts, task.train.labels.tolist()))
    held, rest = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    held.sort(key=lambda row: len(row[0]))  # similar lengths together: little padding
    held = held[: len(held) // 8 * 8]
    train = DataLoader(rest, BATCH, shuffle=True, collate_fn=batch, drop_last=True)
    return train, DataLoader(held[:16] if quick else held, 8, collate_fn=batch)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Sweep both tasks; return what goes to results.json."""
    args = parse(argv)
    steps = args.steps or (9 if args.quick else STEPS)
    results: dict[str, Any] = {}
    space = {name: values[-2:] if args.quick else values for name, values in SPACE.items()}
    for task in (load_task(name, seed=args.seed, limit=240 if args.quick else None) for name in DATA):
        console.rule(f"{task.name}: {len(space['r']) * len(space['lr'])} settings")
        base, encode = load(args.model, len(task.labels))
        config = graft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
        train, valid = loaders(task, encode, args.quick)
        schedule = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.01, total_iters=steps)
        options = dict(steps=steps, schedule=schedule, seed=args.seed)
        start = time.perf_counter()
        found = graft.sweep(
            base, config, space, data=train, valid=valid, base_in_eval=True, progress=True,
            keep=1 / (3 if args.quick else 4), folder=args.out / task.name, **options,
        )  # fmt: skip
        took, best = time.perf_counter() - start, found.best
        console.print(found.table())
        found.runs.model.set_adapter(best.name)
        right = accuracy(predict(found.runs.model, encode, task.test.texts), task.test.labels)
        start = time.perf_counter()
        losses = alone(found.runs.unload(), config, best.setting, train, options)
        one = time.perf_counter() - start
        said = "the same losses" if losses == [point[1] for point in best.curve] else "other losses"
        console.print(
            f"{best.setting}: {right:.3f} of the held-out texts are right. The sweep took {took:.0f} s, a run of this "
            f"setting by itself {one:.0f} s ({took / one:.1f} ×), with {said}."
        )
        results[task.name] = {"best": best.setting, "accuracy": right, "seconds": [took, one], "alone": said}
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.rule(f"{args.out}: tables, curves and the best adapters")
    return results


def alone(
    base: nn.Module, config: Any, setting: dict[str, Any], train: DataLoader, options: dict[str, Any]
) -> list[float]:
    """Train one setting by a plain loop; return its losses."""
    torch.manual_seed(options["seed"])
    config.r = setting["r"]
    model = graft.get_peft_model(base, config)  # in eval mode, as the sweep has the base; the adapter drops nothing
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setting["lr"])
    schedule, losses = options["schedule"](optimizer), []
    while len(losses) < options["steps"]:
        for batch in train:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == options["steps"]:
                break
    return losses


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("demo-sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a BERT checkpoint: local path or hub id (default: the carrier package's)")
    add_common(parser, Path("out/demo-sweep"), {name: STEPS for name in DATA})
    args = parse_common(parser, argv)
    make_out(parser, args.out)
    return args


if __name__ == "__main__":
    run(main)
