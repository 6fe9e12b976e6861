# SPDX-License-Identifier: Apache-2.0
"""The one form of LoRA that every server reads right: what an adapter does, in A, B, r and a list of suffixes.

The scale stands in B, and lora_alpha is r; all modules have one rank; `target_modules` are suffixes, and every module
of such a suffix has factors, of zeros where the adapter does nothing. It adds the same to the same base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from graft import BaseModelMismatchError, LossError
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.files.algebra import as_low_rank, block_diagonal
from graft.files.base import Skeleton
from graft.files.bases import by_model
from graft.files.formats import Base, writer_of
from graft.files.holding import padded
from graft.files.inspect import check_finite
from graft.files.lint import check_whole
from graft.files.lycoris import kasa_as_lora
from graft.files.names import check_shapes, kind_of
from graft.files.neutral import AdapterFile, LowRank, Other
from graft.files.serving import CONDITIONS, Server, Subject, beside, data, server_named
from graft.files.tensors import tensor
from graft.io.written import TRAINING_ONLY

MERGED = ("dora", "bias", "whole_norms", "whole_modules", "token_rows", "kasa")  # conditions without a form
LAYOUTS = ("vllm", "sglang")  # servers with layouts of experts that graft writes
PLACES = ("embeddings", "output_head", "kernels")  # conditions of modules that some servers do not adapt
KNOWN = ("lora_shift.", *TRAINING_ONLY)  # tensors that become factors, or are left out
SAME = 2**-7  # relative: a base in half precision is the same base
SAME_PATH = "language_model"  # a part of paths that classes of one multimodal model have or do not have


@dataclass
class Exported:
    """What became of an adapter.

    Attributes:
        rank: of all modules.
        added: modules that have factors of zeros.
        renamed: modules under another path than in the file.
        rounding: the largest relative error of B by its dtype, which the scale in it brings.
        notes: what changed, a sentence each.
        error: ‖ΔW − B A‖ / ‖ΔW‖ over all modules, where the adapter's method is not LoRA.
    """

    rank: int
    modules: int
    added: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    rounding: float = 0.0
    notes: list[str] = field(default_factory=list)
    error: float | None = None


def export(adapter: AdapterFile, server: str, base: Base, path: str) -> Exported:
    """Write an adapter for a server, in the first of the formats that it loads.

    Raises:
        LossError: LoRA alone cannot do what the adapter does: the text names the remedy.
        BaseModelMismatchError: the base lacks modules of the adapter.
        ConfigError: nothing is known of the server.
        NonFiniteError: the adapter holds NaN or infinite numbers.
    """
    target = server_named(server)
    made, report = plain(adapter, target, base)
    writer_of(target.formats[0]).write(made, path, base)
    return report


def plain(adapter: AdapterFile, server: Server, base: Base) -> tuple[AdapterFile, Exported]:
    """Return an adapter in that form, and what changed."""
    check_whole(adapter)
    adapter = as_lora(adapter, base)
    check(adapter, server)
    check_finite(adapter)
    if not {*base.modules}.issuperset(adapter.modules):  # the model's modules have other names than its files
        base = by_model(base) or base
    check_beside(adapter, base)
    loras = {path: factors(path, of, adapter.config) for path, of in adapter.modules.items()}
    names = {path: named(path, base) for path in loras}
    if len({*names.values()}) < len(names):
        raise BaseModelMismatchError(
            f"Two modules of {adapter.path} are one of the base's: {join_some(sorted(names))}."
        )
    by_name = {names[path]: of for path, of in loras.items()}
    check_shapes(by_name, adapter, base)
    check_whole(adapter, base)
    rank = max(of.A.shape[0] for of in by_name.values())
    targets, added = covered(by_name, base, server)
    shapes = {kind_of(path): of for path, of in by_name.items()}
    fan_in_fan_out = bool(adapter.config.get("fan_in_fan_out"))
    dtype = dtype_of(adapter)
    errors = {path: rounding(of, dtype) for path, of in by_name.items()}
    if over := sorted(path for path, error in errors.items() if not np.isfinite(error)):
        raise LossError(
            f"B of {join_some(over)} in {adapter.path} is beyond the largest number of {dtype} with its scale in it: "
            "save "
            "the adapter in float32 or bfloat16, and export that."
        )
    wide = {path: padded(of, rank) for path, of in by_name.items()}
    out: dict[str, LowRank | Other] = {
        path: replace(of, A=tensor(of.A.read(), dtype), B=tensor(of.B.read(), dtype)) for path, of in wide.items()
    }
    for path in added:
        out[path] = zeros(path, shapes.get(kind_of(path)), base, rank, dtype, fan_in_fan_out)
    config = {
        "peft_type": "LORA", "task_type": adapter.config.get("task_type"), "base_model_name_or_path": adapter.base,
        "r": rank, "lora_alpha": rank, "target_modules": targets, "fan_in_fan_out": fan_in_fan_out, "lora_dropout": 0.0,
        "bias": "none", "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
        "inference_mode": True,
    }  # fmt: skip
    made = AdapterFile(adapter.format, adapter.path, "LORA", out, config=config, base=adapter.base)
    made.selected = frozenset(out)
    report = Exported(rank, len(out), added, {a: b for a, b in names.items() if a != b})
    report.rounding = max(errors.values())
    report.notes = [*notes(adapter, report, by_name)]
    return made, report


def as_lora(adapter: AdapterFile, base: Base) -> AdapterFile:
    """Return an adapter whose AdaLoRA is LoRA, and whose KaSA is LoRA on the base as it was."""
    if not isinstance(base, Skeleton) or base.model is None:  # else KaSA has changed it already
        adapter = kasa_as_lora(adapter, base)
    if adapter.method != "ADALORA":
        return adapter
    made = {path: as_low_rank(module) or module for path, module in adapter.modules.items()}
    return replace(adapter, method="LORA", modules=made)


def check(adapter: AdapterFile, server: Server) -> None:
    """Raise LossError for what LoRA alone cannot do."""
    subject = Subject(adapter, server)
    found = [what for name in MERGED for what in CONDITIONS[name](subject)]
    if found:
        raise LossError(
            f"{adapter.path} holds {join_some(found)}, which plain LoRA cannot hold. Merge it into the base (graft "
            "merge), "
            "or of KaSA in memory save it, and export the file."
        )
    if stacks := [*CONDITIONS["experts"](subject)]:
        remedies, name = data()["remedies"], "layout" if server.name in LAYOUTS else "merge"
        remedy = remedies[name].format(server=server.name, adapter=adapter.path, base="BASE")
        raise LossError(f"{adapter.path} holds stacks of experts, {join_some(stacks)}: {remedy}.")
    for row in data()["servers"][server.name]["rows"]:
        there = [*CONDITIONS[row["when"]](subject)] if row["when"] in PLACES and row["remedy"] == "merge" else []
        if there:
            raise LossError(
                f"{server.name} {row['does']}, and {adapter.path} has factors there: {join_some(there)}. Merge it "
                "into the "
                "base (graft merge), and serve the model."
            )
    if what := [*CONDITIONS["activated"](subject), *CONDITIONS["replicated"](subject)]:
        raise LossError(
            f"{adapter.path} has {join_some(what)}, which plain LoRA cannot do, and no merged weight of this base."
        )
    if adapter.changed_base is not None:
        raise LossError(
            f"{adapter.path} belongs to a base that {adapter.changed_base} has changed, and does not say how: load it "
            "by graft onto the base as it was, and save it."
        )
    unknown = [f"{p}.{name}" for p, of in adapter.low_rank.items() for name in of.extra if not name.startswith(KNOWN)]
    rest = [*adapter.unread, *adapter.shared, *unknown]
    if adapter.method != "LORA" or rest or not adapter.modules:
        raise LossError(f"{adapter.path} ({adapter.method}) is no LoRA, or not only: {join_some(rest)}.")


def check_beside(adapter: AdapterFile, base: Base) -> None:
    """Raise LossError unless the base's weights that stand in the file are those of the base."""
    for name in beside(adapter):
        own, there = adapter.full[name], base.tensors.get(name)
        if there is None:
            raise BaseModelMismatchError(f"{adapter.path} holds '{name}' of its base, which {base.path} does not have.")
        if own.shape != there.shape or not np.allclose(own.read(), there.read(), SAME, SAME * 1e-2):
            raise LossError(
                f"{adapter.path} holds a '{name}' of other rows or values than the base's: merge it (graft merge), and "
                "serve the model."
            )


def factors(path: str, module: LowRank | Other, config: dict[str, object]) -> LowRank:
    """Return the factors A (r, …) and B (out, r, …) of a module in float32, of scale 1."""
    if isinstance(module, Other):
        A, B = whole(path, module, config)
        return LowRank(tensor(A, "F32"), tensor(B.astype("f4") * np.float32(module.scale or 1.0)), 1.0)
    A, B = (t.read().astype("f4") for t in (module.A, module.B))
    if module.mid is not None:
        raise LossError(f"'{path}' has a core between its factors: convert it to PEFT's format first (graft convert).")
    B = B * np.float32(module.scale)
    if module.shift is not None:
        gone_A, gone_B = (t.read().astype("f4") for t in module.shift)
        A = np.concatenate([A, gone_A.reshape(len(gone_A), *A.shape[1:])])
        B = np.concatenate([B, -gone_B.reshape(*gone_B.shape, *B.shape[2:])], 1)
    return LowRank(tensor(A), tensor(B), 1.0, module.kind)


def whole(path: str, module: Other, config: Json) -> tuple[np.ndarray, np.ndarray]:
    """Return the dense factors of QA-LoRA and BD-LoRA."""
    A, B = (module.tensors[f"lora_{name}.weight"].read() for name in "AB")
    if module.method == "QALORA":  # A sees means of `size` inputs, times their number
        size = config["qalora_group_size"]
        return A.repeat(size, 1) * (A.shape[1] * size / size**2), B
    if module.method != "BDLORA":
        raise LossError(f"'{path}' has a {module.method}, which is no LoRA: export it with its base model at hand.")
    blocks = config["use_bdlora"]
    n = blocks["nblocks"]
    if any(part in path for part in blocks.get("target_modules_bd_a") or ()):
        return block_diagonal(np.split(A, n)), B
    return A, block_diagonal(np.split(B, n))


def zeros(path: str, like: LowRank | None, base: Base, rank: int, dtype: str, transposed: bool) -> LowRank:
    """Return factors that add nothing to a module: of the shapes of one like it, or of the base's weight."""
    if like is not None:
        A, B, kind = like.A.shape[1:], (like.B.shape[0], rank, *like.B.shape[2:]), like.kind
    else:
        shape = base.shapes.get(f"{path}.weight", ())
        if len(shape) != 2:
            raise BaseModelMismatchError(f"The weight of the base's '{path}' is no matrix, but of shape {shape}.")
        out, fan_in = shape[::-1] if transposed else shape
        A, B, kind = (fan_in,), (out, rank), "linear"
    return LowRank(tensor(np.zeros((rank, *A), "f4"), dtype), tensor(np.zeros(B, "f4"), dtype), 1.0, kind)


def dtype_of(adapter: AdapterFile) -> str:
    """Return the dtype of an adapter's factors; float32 if there are several."""
    modules = adapter.modules.values()
    pairs = [
        (of.A, of.B) if isinstance(of, LowRank) else [of.tensors[f"lora_{x}.weight"] for x in "AB"] for of in modules
    ]
    dtypes = {t.dtype for pair in pairs for t in pair}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def rounding(lora: LowRank, dtype: str) -> float:
    """Return the relative error that a dtype brings to a B."""
    exact = lora.B.read()
    return float(np.linalg.norm(exact - tensor(exact, dtype).read()) / max(float(np.linalg.norm(exact)), 1e-30))


# names


def named(path: str, base: Base) -> str:
    """Return the path of a module in the base.

    Raises:
        BaseModelMismatchError: the base has none, or several, that it could be.
    """
    known = {*base.modules}
    if path in known:
        return path
    found = [m for m in known if without(m) == without(path)]
    if len(found) != 1:
        raise BaseModelMismatchError(
            f"The base {base.path} has no module '{path}'" + (f", but {join_some(sorted(found))}." if found else ".")
        )
    return found[0]


def without(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != SAME_PATH)


def covered(modules: Iterable[str], base: Base, server: Server) -> tuple[list[str], list[str]]:
    """Return suffixes that select all these modules, and which others of the base they select."""
    paths, known = {*modules}, [*base.modules]
    kinds = {kind_of(path) for path in paths}
    if server.name == "sglang":  # which wants v beside q
        kinds |= {k.replace(".q_proj", ".v_proj") for k in kinds} & {kind_of(m) for m in known}
    suffixes = set()
    for kind in kinds:
        parts = kind.split(".")
        suffix = parts.pop()
        while parts and parts[-1] != "#" and any(ends(m, suffix) and kind_of(m) not in kinds for m in known):
            suffix = f"{parts.pop()}.{suffix}"
        suffixes.add(suffix)
    selected = {m for m in known if any(ends(m, suffix) for suffix in suffixes)}
    shorter = {s for s in suffixes if not any(s != other and ends(s, other) for other in suffixes)}
    return sorted(shorter), sorted(selected - paths)


def ends(path: str, suffix: str) -> bool:
    return f".{path}".endswith(f".{suffix}")


# what changed


def notes(adapter: AdapterFile, report: Exported, loras: dict[str, LowRank]) -> Iterable[str]:
    """Yield what changed in a sentence each."""
    low_rank = adapter.low_rank.values()
    if any(of.scale != 1.0 for of in low_rank):
        yield "the scale stands in B, and lora_alpha is r"
    if any(of.shift is not None for of in low_rank):
        yield "what the initialisation took out of the base is subtracted: twice the rank, for the base as it was"
    if len({of.A.shape[0] for of in loras.values()}) > 1:
        yield f"all modules have rank {report.rank}, with zeros"
    if extra := sorted({name for of in low_rank for name in of.extra if not name.startswith("lora_shift")}):
        yield f"{join_some(extra)} are left out, which count in training only"
    if any(isinstance(of, Other) for of in adapter.modules.values()):
        yield "blocks and sums became whole factors"
    if report.renamed:
        yield f"{len(report.renamed)} modules have the base's names"
    if report.added:
        yield f"{len(report.added)} modules have factors of zeros, so that suffixes select what is there"
