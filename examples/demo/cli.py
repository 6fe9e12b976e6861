# SPDX-License-Identifier: Apache-2.0
"""What the command lines of both demos have in common."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from examples import cores
from examples.demo.data import DemoError
from examples.demo.display import console


def add_common(parser: argparse.ArgumentParser, out: Path, steps: dict[str, int]) -> None:
    parser.add_argument("--out", type=Path, default=out, help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the initial values and the batches")
    parser.add_argument("--steps", type=int, help=f"training steps of every adapter (default: {steps})")
    parser.add_argument("--quick", action="store_true", help="a few steps and texts: to see that everything runs")


def parse_common(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def make_out(parser: argparse.ArgumentParser, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out} cannot be written: {error}")


def run(main: Callable[[], Any]) -> None:
    """Call `main`; what is wrong with its input is said without a traceback."""
    logging.set_verbosity_error()  # fresh heads are wanted, no need to warn of them
    logging.disable_progress_bar()
    threads = (
        f"threads: {torch.get_num_threads()}, of {cores.allowed()} cores; the environment's OMP_NUM_THREADS decides"
    )
    console.print(threads, highlight=False)
    try:
        main()
    except DemoError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
