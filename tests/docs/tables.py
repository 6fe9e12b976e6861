# SPDX-License-Identifier: Apache-2.0
"""What pages say of each method, printed from the code: `python -m tests.docs.tables` writes it into them,
and into README.

Printed anew: the tables of docs/reference/methods.md and measurements.md, and the entries of reference/configs.md.
A method without a row in the list of all methods gets one: the first sentence of its config's docstring and the paper
that its file names.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

from graft.core.folding import why_no_delta
from graft.methods import IN_PEFT, METHODS, PROMPTS, ROWS, config_of, method_of, tier_of
from tests.conformance.samples import LAYERS, REFUSED, SAMPLES, STORES, UNMERGEABLE, Cell, Layer, find
from tests.docs import rates
from tests.docs.marks import put
from tests.looks import layers
from tests.samples.laws import Sample

DOCS = Path(__file__).parents[2] / "docs"
PAGE, CONFIGS = DOCS / "reference" / "methods.md", DOCS / "reference" / "configs.md"
MEASUREMENTS = DOCS / "reference" / "measurements.md"
MARK = "printed by tests/docs/tables.py"
KINDS = {  # column → layers of the law suite
    "linear": ("linear", "Conv1D"),
    "embedding": ("embedding",),
    "convolutions": ("conv1d", "conv2d", "conv3d"),
    "grouped": ("conv2d-grouped", "conv2d-depthwise"),
}
HEAD = ["config", "tier", "PEFT's", *KINDS, "merges", "several at once", "rows of a batch", "as LoRA"]
STATE_SPACES = ("SDT",)  # samples are of their LoRA, on layers that are no state space
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
    if why_no_delta(m) is not None:
        return ""
    return "by SVD" if m.effect.product is None else "exact"


def row(name: str) -> list[str]:
    samples = [s for s in SAMPLES if s.method == name]
    config = METHODS[name].config
    plain = samples[0]
    return [
        f"`{config}`",
        tier_of(name),
        "yes" if METHODS[name].in_peft else "",
        *(cell(samples, names) for names in KINDS.values()),
        merges(samples),
        "yes" if plain.together else "one at a time",
        "yes" if all(s.by_row for s in samples) else "",
        converts(plain) if fits(plain, BY_NAME["linear"]) else "",
    ]


def single() -> list[str]:
    """The methods that act on single layers."""
    return [name for name in METHODS if name not in STATE_SPACES and any(s.method == name for s in SAMPLES)]


def table() -> str:
    names = single()
    lines = [HEAD, ["---"] * len(HEAD), *(row(name) for name in names)]
    others = ", ".join(f"`{METHODS[n].config}`" for n in METHODS if n not in names)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    prompts = ", ".join(f"`{r.config}`" for r in PROMPTS.values())
    own = ", ".join(f"`{row.config}`" for row in ROWS.values() if not row.in_peft)
    return (
        f"{len(ROWS)} methods. PEFT 0.21.2 has {len(IN_PEFT)} of them, all but {own}. Those that act on single layers:"
        f"\n\n{text}\n\n"
        f"On attentions, blocks, state spaces, or over other adapters: {others}. Prompts: {prompts}."
    )


def entries() -> str:
    """The entries of all configs in the reference."""
    options = "".join(f"\n      {name}: false" for name in ("members", "show_signature", "separate_signature"))
    configs = [config_of(name) for name in ROWS]
    return "\n\n".join(f"::: {c.__module__}.{c.__name__}\n    options:{options}" for c in configs)


def listing(name: str) -> str:
    """The row of the list of all methods, by what the file of the method says."""
    config, method = config_of(name), method_of(name)
    title, _, says = (config.__doc__ or "").partition(": ")
    text = sys.modules[method.__module__].__doc__ or ""
    paper = re.search(r"arXiv (\d{4}\.\d{5})", text)
    link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "–"
    return f"| {title} | `{config.__name__}` | {' '.join(says.split('.')[0].split())} | {link} |"


def listed(text: str) -> str:
    """The page, with a row in its list of all methods for each that has none."""
    before, heading, rest = text.partition("## All methods, with configs and papers\n")
    table, end, after = rest.partition("\n\nPrompt methods serve")
    assert heading and end
    missing = [name for name, row in ROWS.items() if f"| `{row.config}` |" not in table]
    return before + heading + "\n".join([table, *map(listing, missing)]) + end + after


def pages() -> dict[Path, str]:
    """The pages as the code has them now."""
    return {
        PAGE: listed(put(PAGE.read_text(), MARK, table())),
        MEASUREMENTS: put(MEASUREMENTS.read_text(), "rates", rates.table()),
        CONFIGS: put(CONFIGS.read_text(), MARK, f"\n{entries()}\n"),
    }


if __name__ == "__main__":
    from tests.docs import readme  # which counts methods by these tables

    for path, text in (pages() | readme.pages()).items():
        path.write_text(text)
