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
from graft.files.bases import view_by_model_names
from graft.files.formats import Base, writer_of
from graft.files.holding import pad_rank
from graft.files.inspect import check_adapter_is_finite
from graft.files.lint import check_whole
from graft.files.lycoris import kasa_to_lora
from graft.files.names import check_shapes, mask_layer_number
from graft.files.neutral import AdapterFile, LowRank, OtherMethod
from graft.files.serving import CONDITIONS, Server, Subject, get_server, list_copied_weights, read_server_data
from graft.files.tensors import make_tensor
from graft.io.written import TRAINING_ONLY

MERGED = ("dora", "bias", "whole_norms", "whole_modules", "token_rows", "kasa")  # conditions without a form
LAYOUTS = ("vllm", "sglang")  # servers with layouts of experts that graft writes
PLACES = ("embeddings", "output_head", "kernels")  # conditions of modules that some servers do not adapt
KNOWN = ("lora_shift.", *TRAINING_ONLY)  # tensors that become factors, or are left out
SAME = 2**-7  # relative: a base in half precision is the same base
SAME_PATH = "language_model"  # a part of paths that classes of one multimodal model have or do not have


@dataclass
class ExportReport:
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


def export_adapter_file(adapter: AdapterFile, server: str, base: Base, path: str) -> ExportReport:
    """Write an adapter for a server, in the first of the formats that it loads.

    Raises:
        LossError: LoRA alone cannot do what the adapter does: the text names the remedy.
        BaseModelMismatchError: the base lacks modules of the adapter.
        ConfigError: nothing is known of the server.
        NonFiniteError: the adapter holds NaN or infinite numbers.
    """
    target = get_server(server)
    lora_file, report = to_plain_lora(adapter, target, base)
    writer_of(target.formats[0]).write(lora_file, path, base)
    return report


def to_plain_lora(adapter: AdapterFile, server: Server, base: Base) -> tuple[AdapterFile, ExportReport]:
    """Return an adapter in that form, and what changed."""
    check_whole(adapter)
    adapter = to_lora_on_base(adapter, base)
    check_is_plain(adapter, server)
    check_adapter_is_finite(adapter)
    if not {*base.modules}.issuperset(adapter.modules):  # the model's modules have other names than its files
        base = view_by_model_names(base) or base
    check_copied_weights(adapter, base)
    loras = {path: read_unscaled_factors(path, of, adapter.config) for path, of in adapter.modules.items()}
    names = {path: find_base_module(path, base) for path in loras}
    if len({*names.values()}) < len(names):
        raise BaseModelMismatchError(
            f"Two modules of {adapter.path} are one of the base's: {join_some(sorted(names))}."
        )
    by_name = {names[path]: of for path, of in loras.items()}
    check_shapes(by_name, adapter, base)
    check_whole(adapter, base)
    rank = max(of.A.shape[0] for of in by_name.values())
    targets, added = choose_suffixes(by_name, base, server)
    shapes = {mask_layer_number(path): of for path, of in by_name.items()}
    fan_in_fan_out = bool(adapter.config.get("fan_in_fan_out"))
    dtype = find_factor_dtype(adapter)
    errors = {path: rounding_error_of_b(of, dtype) for path, of in by_name.items()}
    if over := sorted(path for path, error in errors.items() if not np.isfinite(error)):
        raise LossError(
            f"B of {join_some(over)} in {adapter.path} is beyond the largest number of {dtype} with its scale in it: "
            "save "
            "the adapter in float32 or bfloat16, and export that."
        )
    wide = {path: pad_rank(of, rank) for path, of in by_name.items()}
    out: dict[str, LowRank | OtherMethod] = {
        path: replace(of, A=make_tensor(of.A.read(), dtype), B=make_tensor(of.B.read(), dtype))
        for path, of in wide.items()
    }
    for path in added:
        out[path] = make_zero_factors(path, shapes.get(mask_layer_number(path)), base, rank, dtype, fan_in_fan_out)
    config = {
        "peft_type": "LORA", "task_type": adapter.config.get("task_type"), "base_model_name_or_path": adapter.base,
        "r": rank, "lora_alpha": rank, "target_modules": targets, "fan_in_fan_out": fan_in_fan_out, "lora_dropout": 0.0,
        "bias": "none", "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
        "inference_mode": True,
    }  # fmt: skip
    lora_file = AdapterFile(adapter.format, adapter.path, "LORA", out, config=config, base=adapter.base)
    lora_file.selected = frozenset(out)
    report = ExportReport(rank, len(out), added, {a: b for a, b in names.items() if a != b})
    report.rounding = max(errors.values())
    report.notes = [*describe_changes(adapter, report, by_name)]
    return lora_file, report


def to_lora_on_base(adapter: AdapterFile, base: Base) -> AdapterFile:
    """Return an adapter whose AdaLoRA is LoRA, and whose KaSA is LoRA on the base as it was."""
    if not isinstance(base, Skeleton) or base.model is None:  # else KaSA has changed it already
        adapter = kasa_to_lora(adapter, base)
    if adapter.method != "ADALORA":
        return adapter
    modules = {path: as_low_rank(module) or module for path, module in adapter.modules.items()}
    return replace(adapter, method="LORA", modules=modules)


def check_is_plain(adapter: AdapterFile, server: Server) -> None:
    """Raise LossError for what LoRA alone cannot do."""
    subject = Subject(adapter, server)
    blockers = [what for name in MERGED for what in CONDITIONS[name](subject)]
    if blockers:
        raise LossError(
            f"{adapter.path} holds {join_some(blockers)}, which plain LoRA cannot hold. Merge it into the base (graft "
            "merge), "
            "or of KaSA in memory save it, and export the file."
        )
    if stacks := [*CONDITIONS["experts"](subject)]:
        remedies, name = read_server_data()["remedies"], "layout" if server.name in LAYOUTS else "merge"
        remedy = remedies[name].format(server=server.name, adapter=adapter.path, base="BASE")
        raise LossError(f"{adapter.path} holds stacks of experts, {join_some(stacks)}: {remedy}.")
    for row in read_server_data()["servers"][server.name]["rows"]:
        matches = [*CONDITIONS[row["when"]](subject)] if row["when"] in PLACES and row["remedy"] == "merge" else []
        if matches:
            raise LossError(
                f"{server.name} {row['does']}, and {adapter.path} has factors there: {join_some(matches)}. Merge it "
                "into the "
                "base (graft merge), and serve the model."
            )
    if what := [*CONDITIONS["invocation_tokens"](subject), *CONDITIONS["layer_replication"](subject)]:
        raise LossError(
            f"{adapter.path} has {join_some(what)}, which plain LoRA cannot do, and no merged weight of this base."
        )
    if adapter.changed_base is not None:
        raise LossError(
            f"{adapter.path} belongs to a base that {adapter.changed_base} has changed, and does not say how: load it "
            "by graft onto the base as it was, and save it."
        )
    unknown = [f"{p}.{name}" for p, of in adapter.low_rank.items() for name in of.extra if not name.startswith(KNOWN)]
    leftovers = [*adapter.unknown_keys, *adapter.shared, *unknown]
    if adapter.method != "LORA" or leftovers or not adapter.modules:
        raise LossError(f"{adapter.path} ({adapter.method}) is no LoRA, or not only: {join_some(leftovers)}.")


def check_copied_weights(adapter: AdapterFile, base: Base) -> None:
    """Raise LossError unless the base's weights that stand in the file are those of the base."""
    for name in list_copied_weights(adapter):
        file_weight, base_weight = adapter.full[name], base.tensors.get(name)
        if base_weight is None:
            raise BaseModelMismatchError(f"{adapter.path} holds '{name}' of its base, which {base.path} does not have.")
        if file_weight.shape != base_weight.shape or not np.allclose(
            file_weight.read(), base_weight.read(), SAME, SAME * 1e-2
        ):
            raise LossError(
                f"{adapter.path} holds a '{name}' of other rows or values than the base's: merge it (graft merge), and "
                "serve the model."
            )


def read_unscaled_factors(path: str, module: LowRank | OtherMethod, config: dict[str, object]) -> LowRank:
    """Return the factors A (r, …) and B (out, r, …) of a module in float32, of scale 1."""
    if isinstance(module, OtherMethod):
        A, B = expand_shared_factors(path, module, config)
        return LowRank(make_tensor(A, "F32"), make_tensor(B.astype("f4") * np.float32(module.scale or 1.0)), 1.0)
    A, B = (t.read().astype("f4") for t in (module.A, module.B))
    if module.mid is not None:
        raise LossError(f"'{path}' has a core between its factors: convert it to PEFT's format first (graft convert).")
    B = B * np.float32(module.scale)
    if module.shift is not None:
        gone_A, gone_B = (t.read().astype("f4") for t in module.shift)
        A = np.concatenate([A, gone_A.reshape(len(gone_A), *A.shape[1:])])
        B = np.concatenate([B, -gone_B.reshape(*gone_B.shape, *B.shape[2:])], 1)
    return LowRank(make_tensor(A), make_tensor(B), 1.0, module.kind)


def expand_shared_factors(path: str, module: OtherMethod, config: Json) -> tuple[np.ndarray, np.ndarray]:
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


def make_zero_factors(path: str, like: LowRank | None, base: Base, rank: int, dtype: str, transposed: bool) -> LowRank:
    """Return factors that add nothing to a module: of the shapes of one like it, or of the base's weight."""
    if like is not None:
        A, B, kind = like.A.shape[1:], (like.B.shape[0], rank, *like.B.shape[2:]), like.kind
    else:
        shape = base.shapes.get(f"{path}.weight", ())
        if len(shape) != 2:
            raise BaseModelMismatchError(f"The weight of the base's '{path}' is no matrix, but of shape {shape}.")
        out, fan_in = shape[::-1] if transposed else shape
        A, B, kind = (fan_in,), (out, rank), "linear"
    return LowRank(make_tensor(np.zeros((rank, *A), "f4"), dtype), make_tensor(np.zeros(B, "f4"), dtype), 1.0, kind)


def find_factor_dtype(adapter: AdapterFile) -> str:
    """Return the dtype of an adapter's factors; float32 if there are several."""
    modules = adapter.modules.values()
    pairs = [
        (of.A, of.B) if isinstance(of, LowRank) else [of.tensors[f"lora_{x}.weight"] for x in "AB"] for of in modules
    ]
    dtypes = {t.dtype for pair in pairs for t in pair}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def rounding_error_of_b(lora: LowRank, dtype: str) -> float:
    """Return the relative error that a dtype brings to a B."""
    exact = lora.B.read()
    return float(np.linalg.norm(exact - make_tensor(exact, dtype).read()) / max(float(np.linalg.norm(exact)), 1e-30))


# names


def find_base_module(path: str, base: Base) -> str:
    """Return the path of a module in the base.

    Raises:
        BaseModelMismatchError: the base has none, or several, that it could be.
    """
    known = {*base.modules}
    if path in known:
        return path
    candidates = [m for m in known if drop_language_model(m) == drop_language_model(path)]
    if len(candidates) != 1:
        raise BaseModelMismatchError(
            f"The base {base.path} has no module '{path}'"
            + (f", but {join_some(sorted(candidates))}." if candidates else ".")
        )
    return candidates[0]


def drop_language_model(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != SAME_PATH)


def choose_suffixes(modules: Iterable[str], base: Base, server: Server) -> tuple[list[str], list[str]]:
    """Return suffixes that select all these modules, and which others of the base they select."""
    paths, known = {*modules}, [*base.modules]
    kinds = {mask_layer_number(path) for path in paths}
    if server.name == "sglang":  # which wants v beside q
        kinds |= {k.replace(".q_proj", ".v_proj") for k in kinds} & {mask_layer_number(m) for m in known}
    suffixes = set()
    for kind in kinds:
        parts = kind.split(".")
        suffix = parts.pop()
        while (
            parts
            and parts[-1] != "#"
            and any(ends_with_suffix(m, suffix) and mask_layer_number(m) not in kinds for m in known)
        ):
            suffix = f"{parts.pop()}.{suffix}"
        suffixes.add(suffix)
    selected = {m for m in known if any(ends_with_suffix(m, suffix) for suffix in suffixes)}
    shorter = {s for s in suffixes if not any(s != ending and ends_with_suffix(s, ending) for ending in suffixes)}
    return sorted(shorter), sorted(selected - paths)


def ends_with_suffix(path: str, suffix: str) -> bool:
    return f".{path}".endswith(f".{suffix}")


# what changed


def describe_changes(adapter: AdapterFile, report: ExportReport, loras: dict[str, LowRank]) -> Iterable[str]:
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
    if any(isinstance(of, OtherMethod) for of in adapter.modules.values()):
        yield "blocks and sums became whole factors"
    if report.renamed:
        yield f"{len(report.renamed)} modules have the base's names"
    if report.added:
        yield f"{len(report.added)} modules have factors of zeros, so that suffixes select what is there"
