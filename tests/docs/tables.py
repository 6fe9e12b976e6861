# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/methods.md, printed from the code: `python -m tests.docs.tables` writes them into the page."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from graft.core.folding import why_none
from graft.methods import METHODS, PROMPTS
from tests.conformance.samples import LAYERS, REFUSED, SAMPLES, STORES, UNMERGEABLE, Cell, Layer, find
from tests.docs.marks import put
from tests.looks import layers
from tests.samples.laws import Sample

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
MARK = "printed by tests/docs/tables.py"
KINDS = {  # column → layers of the law suite
    "linear": ("linear", "Conv1D"),
    "embedding": ("embedding",),
    "convolutions": ("conv1d", "conv2d", "conv3d"),
    "grouped": ("conv2d-grouped", "conv2d-depthwise"),
}
HEAD = ["config", *KINDS, "merges", "several at once", "rows of a batch", "as LoRA"]
BY_NAME = {layer.name: layer for layer in LAYERS}


def fits(sample: Sample, layer: Layer) -> bool:
    return find(REFUSED, sample, layer) is None


def cell(samples: list[Sample], names: tuple[str, ...]) -> str:
    """yes, if a sample of the method adapts all of these layers; some, if it adapts one of them."""
    taken = [any(fits(s, BY_NAME[name]) for s in samples) for name in names]
    return "yes" if all(taken) else "some" if any(taken) else ""


def merges(samples: list[Sample]) -> str:
    can = [find(UNMERGEABLE, s, BY_NAME["linear"]) is None for s in samples if fits(s, BY_NAME["linear"])]
    return "yes" if all(can) else "some" if any(can) else ""


def converts(sample: Sample) -> str:
    """Whether `convert_to_lora` takes it: exact where its update is a product of few rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Cell(sample, BY_NAME["linear"], STORES[0]).fresh()
    m: Any = layers(model)["layer"].methods["default"]
    if why_none(m) is not None:
        return ""
    return "exact" if type(m.effect).__name__ == "LowRank" and not m.effect.gains else "by SVD"


def row(name: str) -> list[str]:
    samples = [s for s in SAMPLES if s.method == name]
    config = METHODS[name].config
    plain = samples[0]
    return [
        f"`{config}`",
        *(cell(samples, names) for names in KINDS.values()),
        merges(samples),
        "yes" if plain.together else "one at a time",
        "yes" if all(s.by_row for s in samples) else "",
        converts(plain) if fits(plain, BY_NAME["linear"]) else "",
    ]


def single() -> list[str]:
    """The methods that act on single layers."""
    return [name for name in METHODS if any(s.method == name for s in SAMPLES)]


def table() -> str:
    names = single()
    lines = [HEAD, ["---"] * len(HEAD), *(row(name) for name in names)]
    others = ", ".join(f"`{METHODS[n].config}`" for n in METHODS if n not in names)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    prompts = ", ".join(f"`{r.config}`" for r in PROMPTS.values())
    return (
        f"{len(METHODS) + len(PROMPTS)} methods. Those that act on single layers:\n\n{text}\n\n"
        f"On attentions, blocks, or over other adapters: {others}. Prompts: {prompts}."
    )


def page() -> str:
    """The page with the tables as the code has them now."""
    return put(PAGE.read_text(), MARK, table())


if __name__ == "__main__":
    PAGE.write_text(page())
