# SPDX-License-Identifier: Apache-2.0
"""Sample configurations of every method that adapts layers: a file for each, and whoever adds a method adds one.

A file has up to five tables. `LAWS`: configurations that show the ways in which the method acts, for the laws of
tests/conformance; `CALLED`: those that act only where a call brings something along. `REFUSED` and `UNMERGEABLE`: what
those cannot do (names of samples, a trait of the layer, the error and a part of its text), tested to fail in that way.
`PARITY`: rows on which graft is compared with PEFT everywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from tests.covering import Sometimes, law
from tests.samples import laws
from tests.samples.parity import SHARED, Sample

_files: list[Any] = [
    importlib.import_module(f"{__name__}.{info.name}")
    for info in pkgutil.iter_modules(__path__)
    if info.name not in ("laws", "parity")
]
LAWS: list[laws.Sample] = [sample for file in _files for sample in file.LAWS]
CALLED: list[laws.Sample] = [sample for file in _files for sample in getattr(file, "CALLED", ())]
REFUSED: list[tuple] = [entry for file in _files for entry in getattr(file, "REFUSED", ())]
UNMERGEABLE: list[tuple] = [entry for file in _files for entry in getattr(file, "UNMERGEABLE", ())]
METHODS: dict[str, list[tuple]] = {file.LAWS[0].method: file.PARITY for file in _files if hasattr(file, "PARITY")}
# starts that change the base, or look at data, have tests of their own wherever weights are not dense
BY_THEMSELVES = [s for s in LAWS if not s.shifts and s.prepare is None]
DRAWS = {sample.method for sample in LAWS if sample.draws}  # random in training, whatever drops out
# compared with PEFT in tests of their own: one adapter trains at a time, targets are attentions or blocks, calls take
# task ids, adapters are experts
ELSEWHERE = {
    "ADALORA": "methods/test_adalora.py",
    "ADAPTION_PROMPT": "methods/test_adaption_prompt.py",
    "POLY": "methods/test_poly.py",
    "SHADOW": "methods/test_shadow.py",
    "XLORA": "methods/test_xlora.py",
}

SAMPLES = [
    Sample(method, name, model, config, unlike)
    for method, rows in METHODS.items()
    for name, model, config, unlike in rows
]


def each(name: str = "plain", models: str = "mlp llama") -> list[Sample]:
    """The samples of that name on those models, every method: for what needs no variety of configurations."""
    return [s for s in SAMPLES if s.name in name.split() and s.model in models.split()]


def over(samples: list[Sample]) -> Any:
    """Decorate a test of one `sample` with a few: half of the methods, every model, and rows of both."""
    return law("sample", samples, _some)


def over_all(samples: list[Sample]) -> Any:
    """Decorate a test of one `sample` with a few that have every row of every method, and every model."""
    return law("sample", samples, _every)


def _every(s: Sample) -> list[Any]:
    """What a test meets: every row of a method's own; of those that all methods have, each with a quarter of them."""
    own = "row", s.method, s.name
    return [("method", s.method), ("model", s.model), *([("row", s.name), Sometimes(own, 4)] if _shared(s) else [own])]


def _some(s: Sample) -> list[Any]:
    """Half of the methods, an eighth of the rows of their own, a few of the others: which, the test's name decides."""
    row = ("row", s.name) if _shared(s) else Sometimes(("row", s.method, s.name), 8)
    return [Sometimes(("method", s.method), 2), ("model", s.model), row]


def _shared(s: Sample) -> bool:
    return s.name in SHARED


def mergeable(samples: list[Sample]) -> list[Sample]:
    """Those of methods that have a merged form on some layers at least."""
    never = {name for names, trait, *_ in UNMERGEABLE if not trait for name in names.split()}
    return [s for s in samples if s.method not in never]


def by_row(samples: list[Sample]) -> list[Sample]:
    """Those of methods in which what a row gets does not depend on other rows."""
    return [s for s in samples if all(law.by_row for law in LAWS if law.method == s.method)]


def first(method: str, model: str = "mlp", name: str = "plain") -> Sample:
    return next(s for s in SAMPLES if (s.method, s.name, s.model) == (method, name, model))


def alike(aspect: str) -> list[Sample]:
    """The samples in which PEFT is the oracle for that aspect."""
    return [s for s in SAMPLES if aspect not in s.unlike]
