# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/reference/storages.md and storages_matrix.md, as `python -m tests.docs.storages` prints them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from graft.storage.find import STORES, TENSORS
from tests.docs.marks import put
from tests.samples import LAWS, mergeable

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "storages.md"
MATRIX = PAGE.with_name("storages_matrix.md")
PEFTS = Path(__file__).with_name("peft_storages.md")  # measured with PEFT 0.21.2
COLUMNS = {  # of PEFT's table → our row
    "bnb4": "bitsandbytes.nn.modules.Linear4bit",
    "bnb8": "bitsandbytes.nn.modules.Linear8bitLt",
    "int8": "torchao.quantization.Int8Tensor",
    "int8d": "torchao.quantization.Int8Tensor",
    "ao f8": "torchao.quantization.Float8Tensor",
    "intx": "torchao.quantization.IntxUnpackedToInt8Tensor",
    "nf4": "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor",
    "hqq": "hqq.core.quantize.HQQLinear",
    "qnt8": "optimum.quanto.nn.qlinear.QLinear",
    "qnt4": "optimum.quanto.nn.qlinear.QLinear",
    "gptq": "gptqmodel.nn_modules.qlinear.BaseQuantLinear",
    "awq": "gptqmodel.nn_modules.qlinear.AWQuantLinear",
    "aqlm": "aqlm.inference.QuantizedLinear",
    "fp8": "transformers.integrations.finegrained_fp8.FP8Linear",
    "gem": "transformers.integrations.gemma_quant.QuantizedLinear",
    "pk": "bitsandbytes.nn.modules.Linear4bit",
}
METHODS = {  # as PEFT's table names them → methods, or samples, of tests/samples
    "LoRA": ["LORA"],
    "LoRA+DoRA": ["LORA-dora"],
    "MiSS bat": ["MISS-bat"],
    "VB-LoRA": ["VBLORA"],
    "SuperTuning": ["SUPERTUNING"],
    "Poly": ["LORA"],  # which it adds up
}
ON_NO_WEIGHT = {"prompt tuning", "P-tuning", "prefix", "MPT", "CPT", "Cartridge", "SHADOW", "adaption prompt"}
ELSEWHERE = {"LN tuning": "om"}  # a norm changes places


def store_of(row: str) -> Any:
    table = STORES if row in STORES.names() else TENSORS
    return table.entry(row)


def storages() -> str:
    """The storages with rows of their own, and the modules or tensors by which each is known."""
    rows: dict[tuple[str, str], list[str]] = {}
    for table in (STORES, TENSORS):
        for name in table.names():
            store: Any = table.entry(name)
            if name.startswith("tests."):
                continue
            written = "no" if getattr(store, "calibrated", None) or not getattr(store, "writes", True) else "yes"
            rows.setdefault((store.name, written), []).append(f"`{short(name)}`")
    lines = [f"| {s} | {', '.join(dict.fromkeys(names))} | {written} |" for (s, written), names in sorted(rows.items())]
    return "\n".join(["| storage | modules, or tensors | merging writes into it |", "|---|---|---|", *lines])


def short(name: str) -> str:
    package, *_, last = name.split(".")
    return f"{package}…{last}"


def matrix() -> str:
    head, rule, *rows = PEFTS.read_text().splitlines()
    columns = [c.strip() for c in head.strip("|").split("|")][1:]
    lines = [head, rule]
    for line in rows:
        names, *cells = [c.strip() for c in line.strip("|").split("|")]
        made = [f"{cell(names, column)} · {theirs}" for column, theirs in zip(columns, cells, strict=True)]
        lines.append(f"| {names} | {' | '.join(made)} |")
    return "\n".join(lines)


def cell(names: str, column: str) -> str:
    found = [of_method(name, column) for name in re.split(r"[,;] ", names)]
    return "; ".join(dict.fromkeys(found))


def of_method(name: str, column: str) -> str:
    if name in ON_NO_WEIGHT:
        return "o"
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    wanted = METHODS.get(name, [re.sub(r"[ -]", "_", name.upper()), re.sub(r"[ -]", "", name.upper())])
    samples = [s for s in LAWS if str(s) in wanted or s.method in wanted]
    assert samples, f"no sample of {name}"
    if not mergeable(samples):
        return "o–"
    store = store_of(COLUMNS[column])
    return "or" if store.calibrated or not store.writes else "om"


def pages() -> dict[Path, str]:
    """The pages with the tables as the code has them now, by their paths."""
    printed = {PAGE: ("storages", storages()), MATRIX: ("matrix", matrix())}
    return {path: put(path.read_text(), mark, table) for path, (mark, table) in printed.items()}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
