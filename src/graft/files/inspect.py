# SPDX-License-Identifier: Apache-2.0
"""Reports on adapter files: contents, sizes and spectra of updates, and the difference of two adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import prod

import numpy as np

from graft import NonFiniteError
from graft.config.atomic import replace_file as put_in_place
from graft.config.pair import find_differing_fields
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.files import algebra
from graft.files.base import BaseDescription
from graft.files.bases import choose_names
from graft.files.errors import BaseNeededError, OptionError, PackageNeededError, make_misfit_error
from graft.files.formats.peft import make_names_error
from graft.files.holding import FIELDS
from graft.files.names import is_stored_in_out
from graft.files.neutral import AdapterFile, LowRank, OtherMethod
from graft.files.sources import read_licence
from graft.files.tensors import FLOATS, Tensor

PICTURES = (".png", ".svg", ".pdf")
TOP = 16  # the number of singular values in a report


def inspect_adapter(adapter: AdapterFile, base: BaseDescription | None = None, spectrum: bool = False) -> Json:
    """Return a report on an adapter as plain values, for a table or JSON.

    The keys are path, format, method, base, changed_base, writer, licence, parameters, bytes, dtypes, groups, modules,
    full, rows, shared and unread. Factors are read; with `spectrum` singular values are computed.

    Args:
        base: adds the weight's norm and the relative size of each update; for DoRA the size of its whole change.
        spectrum: adds singular values, stable and effective rank of each LoRA module.

    Raises:
        BaseModelMismatchError: the base lacks a module, or has another shape.
        BaseNeededError: the base has names but no weights.
        NonFiniteError: with `spectrum`, the adapter has NaN or infinite numbers.
    """
    if spectrum:
        check_adapter_is_finite(adapter)
    tensors = [t for module in adapter.modules.values() for t in list_module_tensors(module)]
    tensors += [t for _, t in adapter.loose_tensors]
    modules = [describe_module(path, module, spectrum) for path, module in adapter.modules.items()]
    if base is not None:
        add_weight_norms(modules, adapter, base)
    return {
        "path": adapter.path, "format": adapter.format, "method": describe_method(adapter), "base": adapter.base,
        "changed_base": adapter.changed_base, "writer": find_writer(adapter), "licence": read_licence(adapter.path),
        "parameters": sum(prod(t.shape) for t in tensors if t.dtype[0] in "FB"),
        "bytes": sum(t.nbytes for t in tensors), "dtypes": sorted({t.dtype for t in tensors}),
        "groups": group_modules(modules), "modules": modules,
        "full": {name: list(t.shape) for name, t in adapter.full.items()},
        "rows": {name: values.shape[0] for name, (_, values) in adapter.rows.items()},
        "shared": {name: list(t.shape) for name, t in adapter.shared.items()}, "unread": adapter.unknown_keys,
    }  # fmt: skip


def list_module_tensors(m: LowRank | OtherMethod) -> Iterable[Tensor]:
    """Return all tensors of a module: of LoRA A, B, core, magnitude, bias and extra tensors, as far as they exist."""
    if isinstance(m, OtherMethod):
        return m.tensors.values()
    return [t for t in (m.A, m.B, m.mid, m.magnitude, m.bias, *m.extra.values()) if t is not None]


def list_floating_tensors(adapter: AdapterFile) -> list[tuple[str, Tensor]]:
    """Return all floating tensors, each with the path of its module or its own name."""
    tensors = [(path, t) for path, module in adapter.modules.items() for t in list_module_tensors(module)]
    return [(name, t) for name, t in (*tensors, *adapter.loose_tensors) if t.dtype in FLOATS]


def check_adapter_is_finite(adapter: AdapterFile) -> None:
    """Read all floating tensors of an adapter.

    Raises NonFiniteError, with the modules' names, if one has NaN or infinite numbers.
    """
    if bad := sorted({name for name, t in list_floating_tensors(adapter) if not np.isfinite(t.read()).all()}):
        raise NonFiniteError(
            f"{join_some(bad, 4)} of {adapter.path} have NaN or infinite numbers. Use an earlier checkpoint, or "
            "download the file again."
        )


def describe_method(adapter: AdapterFile) -> str:
    """Return the adapter's method and, separated by spaces, the variants that change the effect of A and B: "LORA DoRA
    rsLoRA".

    The order is DoRA (any magnitude), aLoRA, rsLoRA, then the modules' other methods, sorted.
    """
    config = adapter.config
    more = ["DoRA"] * any(h.magnitude is not None for h in adapter.low_rank.values())
    more += ["aLoRA"] * bool(config.get("alora_invocation_tokens")) + ["rsLoRA"] * bool(config.get("use_rslora"))
    more += sorted({h.method for h in adapter.modules.values()} - {adapter.method, "LORA"})
    return " ".join([adapter.method, *more])


def find_writer(adapter: AdapterFile) -> str | None:
    """Return "graft" if a key of the file's metadata begins with "graft_", else "PEFT 0.x" if its config names a
    version, or None.
    """
    version = adapter.config.get("peft_version")
    if any(key.startswith("graft_") for key in adapter.metadata):
        return "graft"
    return f"PEFT {version}" if version else None


def describe_module(path: str, module: LowRank | OtherMethod, spectrum: bool) -> Json:
    """Return the report on one module: path, method, scale, number of parameters and kind (None unless it is low rank).

    LoRA and AdaLoRA also have rank, shape and norm of ΔW. With `spectrum` they have the first 16 singular values, the
    effective and stable rank, and the utilisation: the effective rank over the largest possible one. Singular values of
    experts are root sums of squares over all experts; their ranks are means.
    """
    low = algebra.as_low_rank(module)
    out: Json = {
        "module": path, "method": module.method, "scale": module.scale,
        "parameters": sum(prod(t.shape) for t in list_module_tensors(module)), "kind": low.kind if low else None,
    }  # fmt: skip
    if low is None:
        return out
    parts = algebra.list_delta_products(low)
    rows, columns = algebra.delta_shape(low)
    norm = float(np.sqrt(sum(algebra.frobenius_norm(p) ** 2 for p in parts)))
    out |= {"rank": low.rank, "shape": [rows, columns], "norm": norm}
    if spectrum:
        spectra = [algebra.compute_singular_values(p) for p in parts]
        s = np.sqrt((np.stack(spectra) ** 2).sum(0))  # root sum of squares over experts
        effective = float(np.mean([algebra.effective_rank(x) for x in spectra]))
        out |= {
            "singular_values": [float(x) for x in s[:TOP]], "effective_rank": effective,
            "stable_rank": float(np.mean([algebra.stable_rank(x) for x in spectra])),
            "utilisation": effective / max(1, min(low.rank, rows, columns)),
        }  # fmt: skip
    return out


def add_weight_norms(modules: list[Json], adapter: AdapterFile, base: BaseDescription) -> None:
    """Add "weight_norm" and "relative" to the report of each LoRA module, in place.

    For DoRA "norm" becomes that of its whole change.

    Norms are Python floats; W is not cast for them. "relative" is None for a weight of zeros. Modules that are no
    low-rank update are skipped; so are experts if the base has one tensor for each expert. Raises
    BaseModelMismatchError or BaseNeededError if the base lacks a weight or its values.
    """
    base = choose_names(base, adapter.modules)
    for m in modules:
        low = algebra.as_low_rank(adapter.modules[m["module"]])
        if low is None or is_stored_by_expert(m["module"], low, base):
            continue
        W = read_base_weight(m["module"], adapter, base, low)
        m["weight_norm"] = float(np.linalg.norm(W))
        if low.magnitude is not None:
            m["norm"] = float(np.linalg.norm(algebra.compute_dora_delta(low, W)))
        m["relative"] = m["norm"] / m["weight_norm"] if m["weight_norm"] else None


def is_stored_by_expert(path: str, low: LowRank, base: BaseDescription) -> bool:
    """Return True if a module is a stack of experts that the base does not name, while the base has other names with
    ".experts.": its files have a tensor for each expert.
    """
    return low.kind == "experts" and path not in base.shapes and any(".experts." in name for name in base.shapes)


def find_weight_name(path: str, base: BaseDescription) -> str | None:
    """Return the base's tensor name of a module, "path.weight", or of a parameter, "path"; None if it has neither."""
    return next((name for name in (f"{path}.weight", path) if name in base.shapes), None)


def read_base_weight(path: str, adapter: AdapterFile, base: BaseDescription, low: LowRank) -> np.ndarray:
    """Return the base's weight of a module, oriented as its update: (out, in), an embedding (vocabulary, dim), experts
    (E, out, in).

    Kernels of convolutions are flattened. Weights of the turned shape are turned. Square weights of linear modules are
    turned if the configs say that weights are stored (in, out).

    Args:
        base: with the adapter's names, see `graft.files.bases.choose_names`.

    Raises:
        BaseModelMismatchError: the base has no such weight, or another shape or number of experts.
        BaseNeededError: the base has names but no weights.
    """
    rows, columns = algebra.delta_shape(low)
    if (name := find_weight_name(path, base)) is None:
        raise make_misfit_error(f"{base.path} has no weight for '{path}'")
    shape = base.shapes[name]
    expected = (columns, rows) if low.kind == "embedding" else (rows, columns)
    stack = low.kind == "experts"
    flat = (shape[-2], shape[-1]) if stack else (shape[0], prod(shape[1:]))
    if flat not in (expected, expected[::-1]) or (stack and shape[0] != low.A.shape[0]):
        raise make_misfit_error(f"'{path}' is {shape} in {base.path}, and {expected} in {adapter.path}")
    if name not in base.tensors:
        raise BaseNeededError(f"{base.path} has only names of weights. Give the base model with its files.")
    W = base.tensors[name].read()
    W = W if stack else W.reshape(flat)
    turned = flat != expected or (rows == columns and low.kind == "linear" and is_stored_in_out(adapter, base.config))
    return W.swapaxes(-1, -2) if turned else W


def group_modules(modules: list[Json]) -> list[Json]:
    """Return one summary for all modules with the same last name and method: count, ranks, scales, parameters, and
    least, median and largest norm.

    Scales are rounded to 9 digits, and None is left out. Modules without a rank or a norm are left out of that list
    alone.
    """
    out: dict[tuple[str, str], list[Json]] = {}
    for m in modules:
        out.setdefault((m["module"].rpartition(".")[2], m["method"]), []).append(m)
    summaries = []
    for (name, method), members in out.items():
        norms = sorted(m["norm"] for m in members if "norm" in m)
        summaries.append({
            "modules": name, "method": method, "count": len(members),
            "ranks": sorted({m["rank"] for m in members if "rank" in m}),
            "scales": sorted({round(m["scale"], 9) for m in members if m["scale"] is not None}),
            "parameters": sum(m["parameters"] for m in members),
            "norms": [norms[0], median(norms), norms[-1]] if norms else None,
        })  # fmt: skip
    return summaries


def median(ordered: list[float]) -> float:
    """Return the median of sorted numbers, of an even count the mean of the middle two; IndexError for none. numpy's
    function is slow to import.
    """
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def plot_spectra(report: Json, path: str) -> None:
    """Draw two plots into an image file, which appears whole and replaces an earlier one.

    Left: the positive singular values of each module, on a logarithmic scale. Right: the sizes of the updates in the
    modules' order, relative to the weights where the report has that.

    Modules with the same last name share a color. Modules without a norm are left out. matplotlib is switched to the
    backend Agg for the whole process.

    Args:
        report: from `inspect_adapter`.
        path: ends with .png, .svg or .pdf, in any case of letters.

    Raises:
        OptionError: `path` has another ending.
        PackageNeededError: matplotlib is not installed.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in PICTURES:
        raise OptionError(f"{path} is no picture. Give a name that ends with {', '.join(PICTURES)}.")
    try:
        import matplotlib
    except ImportError:
        raise PackageNeededError("Pictures need matplotlib. Install it: pip install matplotlib.") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modules = [m for m in report["modules"] if "norm" in m]
    fig, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    names = list(dict.fromkeys(m["module"].rpartition(".")[2] for m in modules))
    for i, name in enumerate(names):
        members = [m for m in modules if m["module"].rpartition(".")[2] == name]
        for j, m in enumerate(members):
            s = [x for x in m.get("singular_values", ()) if x > 0]
            left.semilogy(range(1, len(s) + 1), s, color=f"C{i % 10}", alpha=0.5, label=name if j == 0 else None)
        right.plot(
            [m.get("relative") or m["norm"] for m in members], "o-", color=f"C{i % 10}", label=name, markersize=3
        )
    left.set(xlabel="i", ylabel="σᵢ of ΔW", title="Spectra")
    relative = any(m.get("relative") for m in modules)
    right.set(xlabel="module, in order", ylabel="‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖", title="Sizes of the changes")
    left.legend(fontsize="small")
    fig.suptitle(os.path.basename(os.path.normpath(report["path"])))
    fig.tight_layout()
    put_in_place(path, lambda temporary: fig.savefig(temporary, dpi=110, format=kind[1:]))
    pyplot.close(fig)


TOLERANCE = 1e-6  # relative
IN_THE_TENSORS = {  # fields of targets, and numbers that are in `scale` and shapes already
    "peft_type", "target_modules", "target_parameters", "exclude_modules", "feedforward_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "r", "alpha", "lora_alpha", "rank_pattern",
    "alpha_pattern", "use_rslora", "ensure_weight_tying",
}  # fmt: skip


def compare_adapters(a: AdapterFile, b: AdapterFile, tol: float = TOLERANCE) -> Json:
    """Return the difference of two adapters as plain values; `equal` is True if both do the same to every weight.

    It holds differing config fields, sorted names in only one adapter, and the relative difference of each common
    module and tensor. Rows of tokens with other indices differ by 1. `largest` is the largest difference, 0 without
    common parts. `equal` needs the same names, the same changed base, equal config fields of `list_deciding_fields`,
    and differences up to `tol`.

    The tolerance is checked first. Then, for `a` before `b`, the numbers, then the names.

    Args:
        tol: the largest relative difference that counts as equal.

    Raises:
        OptionError: `tol` is negative or NaN.
        NonFiniteError: one of them has NaN or infinite numbers.
        BaseNeededError: one adapter has the names of its format, and the other does not, or those of another format.
    """
    if not tol >= 0:
        raise OptionError(f"The tolerance {tol} is no number of at least 0. Give another.")
    for adapter in (a, b):
        check_adapter_is_finite(adapter)
        if adapter.has_flat_names and not (a.has_flat_names and b.has_flat_names and a.format == b.format):
            raise make_names_error(adapter)
    config = {f: [a.config.get(f), b.config.get(f)] for f in find_differing_fields(a.config, b.config)}
    modules = [compare_module(path, a.modules[path], b.modules[path]) for path in a.modules if path in b.modules]
    tensors = []
    for kind in ("full", "shared"):
        in_a, in_b = getattr(a, kind), getattr(b, kind)
        tensors += [{"tensor": n, "relative": relative_difference(in_a[n], in_b[n])} for n in in_a if n in in_b]
    for name in sorted(a.rows.keys() & b.rows.keys()):
        (at, in_a), (bt, in_b) = a.rows[name], b.rows[name]
        tensors.append({"tensor": name, "relative": relative_difference(in_a, in_b) if at.load() == bt.load() else 1.0})
    names = [{*m.modules, *m.full, *m.shared, *m.rows} for m in (a, b)]
    only = [sorted(names[0] - names[1]), sorted(names[1] - names[0])]
    acts = sorted(list_deciding_fields(a, b) & config.keys())
    largest = max((x["relative"] for x in (*modules, *tensors)), default=0.0)
    return {
        "a": a.path, "b": b.path, "config": config, "only_a": only[0], "only_b": only[1], "modules": modules,
        "tensors": tensors, "largest": largest, "tolerance": tol, "acts_otherwise": acts,
        "equal": not any(only) and not acts and largest <= tol and a.changed_base == b.changed_base,
    }  # fmt: skip


def list_deciding_fields(a: AdapterFile, b: AdapterFile) -> set[str]:
    """Return the names of config fields that change the effect of equal tensors.

    For LoRA these are alora_invocation_tokens, layer_replication and arrow_config. With other methods or shared
    tensors, all common fields are added, except for those of targets, dropout and initialisation.
    """
    fields = {*FIELDS}
    if a.shared or any(isinstance(module, OtherMethod) for module in a.modules.values()):
        both = {*a.config} & {*b.config} - IN_THE_TENSORS
        fields |= {name for name in both if "dropout" not in name and not name.startswith("init_")}
    return fields


def compare_module(path: str, a: LowRank | OtherMethod, b: LowRank | OtherMethod) -> Json:
    """Return the report on one module of two adapters: its path and "relative", and for two low-rank modules also both
    ranks, cosine and angle.

    "relative" is the largest of the relative differences of ΔW, magnitudes, and biases with their scales. For other
    shapes or kinds it is 1, without cosine and angle. If one is not low rank, it is that of the tensors, without ranks.
    """
    x, y = algebra.as_low_rank(a), algebra.as_low_rank(b)
    out: Json = {"module": path}
    if x is None or y is None:
        return out | {"relative": compare_module_tensors(a, b)}
    if algebra.delta_shape(x) != algebra.delta_shape(y) or x.kind != y.kind:
        return out | {"ranks": [x.rank, y.rank], "relative": 1.0}
    comparison = algebra.compare_deltas(algebra.list_delta_products(x), algebra.list_delta_products(y))
    # parts other than the factors
    pairs = ((x.magnitude, y.magnitude, (1.0, 1.0)), (x.bias, y.bias, (x.scale, y.scale)))
    further = max((relative_difference(s, t, k) for s, t, k in pairs if s is not None or t is not None), default=0.0)
    out |= {"ranks": [x.rank, y.rank], "cosine": comparison.cosine, "angle": comparison.angle}
    return out | {"relative": max(comparison.relative, further)}


def compare_module_tensors(a: LowRank | OtherMethod, b: LowRank | OtherMethod) -> float:
    """Return the largest relative difference of two modules' tensors, 0 without tensors.

    It is 1 if methods, scales or tensor names differ, or one is `LowRank`.
    """
    if not isinstance(a, OtherMethod) or not isinstance(b, OtherMethod) or a.method != b.method or a.scale != b.scale:
        return 1.0
    if a.tensors.keys() != b.tensors.keys():
        return 1.0
    return max((relative_difference(t, b.tensors[name]) for name, t in a.tensors.items()), default=0.0)


def relative_difference(a: Tensor | None, b: Tensor | None, scales: tuple[float, float] = (1.0, 1.0)) -> float:
    """Return ‖a - b‖ / max(‖a‖, ‖b‖) in float64, each tensor multiplied by its scale; 1 if one or both are None or
    shapes differ; 0 if both are 0. Equal bytes of one dtype with both scales 1 give 0 without computing, also with NaN.
    """
    if a is None or b is None or a.shape != b.shape:
        return 1.0
    if scales == (1.0, 1.0) and a.dtype == b.dtype and a.load() == b.load():
        return 0.0
    x, y = (t.read().astype("f8") * s for t, s in zip((a, b), scales, strict=True))
    larger = max(np.linalg.norm(x), np.linalg.norm(y))
    return float(np.linalg.norm(x - y) / larger) if larger else 0.0
