# SPDX-License-Identifier: Apache-2.0
"""Which kernels run for every method, and how often they cast, as tests/conformance/graphs.txt has it.

python -m tests.conformance.graphs       write the file anew, after a change that is meant to change them
"""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from graft.kernels.low_rank import FUSED_FROM
from tests.conformance.samples import ADAPTERS, CALLED_CELLS, CELLS, Cell
from tests.models import seed, seeded

FILE = Path(__file__).with_suffix(".txt")
LAYERS = ("linear", "norm", "embedding", "conv2d")
CELLS_BY_NAME = {
    f"{cell.sample} {cell.layer}": cell
    for cell in CELLS + CALLED_CELLS
    if cell.store.name == "dense" and cell.layer.name in LAYERS[: 1 if cell.sample.label else None]
}
TORCH = ".".join(torch.__version__.split(".")[:2])  # whose names of operations the file has


def calls(cell: Cell) -> Iterator[tuple[str, Tensor]]:
    """Yield names and outputs: few rows, as many as a kernel needs, half precision, autocast, rows of two adapters."""
    model, x = cell.fresh(ADAPTERS).train(), rows(cell, FUSED_FROM)
    model.set_requires_grad(ADAPTERS)
    yield "few", model(x[:-1])
    yield "many", model(x)
    yield "mixed", model(x, adapter_names=[ADAPTERS[i % 2] for i in range(len(x))])
    if not cell.layer.ids and cell.sample.method != "LN_TUNING":
        with torch.autocast("cpu", torch.bfloat16):
            yield "autocast", model(x)
    if not cell.sample.prepare:
        model = cell.fresh(base=cell.base().bfloat16()).train()
        yield "bfloat16", model(x if cell.layer.ids else x.bfloat16())
    rates = [name for name in vars(cell.sample.make()) if name.endswith("dropout") and not cell.sample.label]
    if rates and not cell.layer.ids:
        sample = replace(cell.sample, config={**cell.sample.config, **dict.fromkeys(rates, 0.3)})
        model = replace(cell, sample=sample).fresh().train()
        yield "few dropped", model(x[:-1])
        yield "many dropped", model(x)


def rows(cell: Cell, count: int) -> Tensor:
    """Return as many rows of one token each, as the layer takes them."""
    x = cell.inputs(count)
    x = x[:, :1] if len(cell.layer.shape) < 3 else x[: count // 8]
    return x if cell.layer.ids else x.requires_grad_()


def describe(y: Tensor) -> str:
    """Return the operations behind a tensor: graft's by name, the number of casts, number and hash of others."""
    names, others = Counter[str](), list[str]()
    left, seen = [y.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            if isinstance(node, BackwardCFunction) or "ToCopy" in node.name():
                names["cast" if "ToCopy" in node.name() else node.name().removesuffix("Backward")] += 1
            else:
                others.append(node.name())
    counts = [f"{name}*{count}" for name, count in sorted(names.items())]
    return " ".join([*counts, f"{len(others)}:{zlib.crc32(' '.join(sorted(others)).encode()) % 2**16:04x}"])


def lines_of(name: str) -> list[str]:
    """Return a line for each call of a cell."""
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed(3)
        return [f"{name} {call}: {describe(y)}" for call, y in calls(CELLS_BY_NAME[name])]


def main() -> None:
    FILE.write_text("\n".join([TORCH, *(line for name in CELLS_BY_NAME for line in lines_of(name))]) + "\n")


if __name__ == "__main__":
    main()
