# SPDX-License-Identifier: Apache-2.0
"""What tells two adapter files apart: settings, modules, and the changes of each weight."""

from __future__ import annotations

import numpy as np

from graft.config.file import DESCRIBING, plain
from graft.config.reading import Json
from graft.files import algebra
from graft.files.errors import OptionError
from graft.files.formats.peft import named_as_there
from graft.files.holding import FIELDS
from graft.files.inspect import check_finite
from graft.files.neutral import AdapterFile, LowRank, Other
from graft.files.tensors import Tensor

TOLERANCE = 1e-6  # relative
IN_THE_TENSORS = {  # fields that say what to adapt, or numbers that `scale` and shapes hold
    "peft_type", "target_modules", "target_parameters", "exclude_modules", "feedforward_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "r", "alpha", "lora_alpha", "rank_pattern",
    "alpha_pattern", "use_rslora", "ensure_weight_tying",
}  # fmt: skip


def difference(a: AdapterFile, b: AdapterFile, tol: float = TOLERANCE) -> Json:
    """Return how two adapters differ, as plain values: `equal` is True if they do the same to every weight.

    Args:
        tol: how far ‖ΔW_a - ΔW_b‖ may be from 0, relative to the larger one.

    Raises:
        OptionError: `tol` is negative, or NaN.
        BaseNeededError: one of them has names of its format's for modules, and the other has not.
        NonFiniteError: one of them holds NaN or infinite numbers, which equal nothing.
    """
    if not tol >= 0:
        raise OptionError(f"The tolerance is at least 0, not {tol}.")
    for adapter in (a, b):
        check_finite(adapter)
        if adapter.flat and not (a.flat and b.flat and a.format == b.format):
            raise named_as_there(adapter)
    fields = sorted({*a.config, *b.config} - DESCRIBING)
    config = {f: [a.config.get(f), b.config.get(f)] for f in fields if plain(a.config.get(f)) != plain(b.config.get(f))}
    modules = [of_module(path, a.modules[path], b.modules[path]) for path in a.modules if path in b.modules]
    tensors = []
    for kind in ("full", "shared"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        tensors += [{"tensor": n, "relative": apart(ours[n], theirs[n])} for n in ours if n in theirs]
    for name in sorted(a.rows.keys() & b.rows.keys()):
        (at, ours), (bt, theirs) = a.rows[name], b.rows[name]
        tensors.append({"tensor": name, "relative": apart(ours, theirs) if at.load() == bt.load() else 1.0})
    names = [{*m.modules, *m.full, *m.shared, *m.rows} for m in (a, b)]
    only = [sorted(names[0] - names[1]), sorted(names[1] - names[0])]
    acts = sorted(acts_otherwise(a, b) & config.keys())
    largest = max((x["relative"] for x in (*modules, *tensors)), default=0.0)
    return {
        "a": a.path, "b": b.path, "config": config, "only_a": only[0], "only_b": only[1], "modules": modules,
        "tensors": tensors, "largest": largest, "tolerance": tol, "acts_otherwise": acts,
        "equal": not any(only) and not acts and largest <= tol and a.changed_base == b.changed_base,
    }  # fmt: skip


def acts_otherwise(a: AdapterFile, b: AdapterFile) -> set[str]:
    """Return the fields of two configs that decide what equal tensors do.

    LoRA has few. Of other methods these are all fields that both configs have, but for those of training.
    """
    fields = {*FIELDS}
    if a.shared or any(isinstance(module, Other) for module in a.modules.values()):
        both = {*a.config} & {*b.config} - IN_THE_TENSORS - DESCRIBING
        fields |= {name for name in both if "dropout" not in name and not name.startswith("init_")}
    return fields


def of_module(path: str, a: LowRank | Other, b: LowRank | Other) -> Json:
    """Compare what two adapters do to one module."""
    x, y = algebra.as_low_rank(a), algebra.as_low_rank(b)
    out: Json = {"module": path}
    if x is None or y is None:
        return out | {"relative": of_tensors(a, b)}
    if algebra.sizes(x) != algebra.sizes(y) or x.kind != y.kind:
        return out | {"ranks": [x.rank, y.rank], "relative": 1.0}
    found = algebra.compare(algebra.products(x), algebra.products(y))
    pairs = ((x.magnitude, y.magnitude, (1.0, 1.0)), (x.bias, y.bias, (x.scale, y.scale)))  # beside the factors
    beside = max((apart(s, t, k) for s, t, k in pairs if s is not None or t is not None), default=0.0)
    out |= {"ranks": [x.rank, y.rank], "cosine": found.cosine, "angle": found.angle}
    return out | {"relative": max(found.relative, beside)}


def of_tensors(a: LowRank | Other, b: LowRank | Other) -> float:
    """Return the largest relative difference of two modules' tensors; 1 if they are not of one kind."""
    if not isinstance(a, Other) or not isinstance(b, Other) or a.method != b.method or a.scale != b.scale:
        return 1.0
    if a.tensors.keys() != b.tensors.keys():
        return 1.0
    return max((apart(t, b.tensors[name]) for name, t in a.tensors.items()), default=0.0)


def apart(a: Tensor | None, b: Tensor | None, scales: tuple[float, float] = (1.0, 1.0)) -> float:
    """Return ‖a - b‖ / the larger of the two; 1 of tensors that have different shapes."""
    if a is None or b is None or a.shape != b.shape:
        return 1.0
    if scales == (1.0, 1.0) and a.dtype == b.dtype and a.load() == b.load():
        return 0.0
    x, y = (t.read().astype("f8") * s for t, s in zip((a, b), scales, strict=True))
    larger = max(np.linalg.norm(x), np.linalg.norm(y))
    return float(np.linalg.norm(x - y) / larger) if larger else 0.0
