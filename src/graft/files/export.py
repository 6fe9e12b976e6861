# SPDX-License-Identifier: Apache-2.0
"""Plain LoRA, the form that every server reads correctly: A, B, one rank, and a list of module suffixes.

The scale is multiplied into B, and lora_alpha equals r. All modules have one rank. Every module that a suffix selects
has factors; they are zeros where the adapter does nothing. The update of the same base is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from graft import BaseModelMismatchError, LossError
from graft.config.pair import TRAINING_ONLY
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.files.algebra import as_low_rank, block_diagonal
from graft.files.bases import view_by_model_names
from graft.files.errors import make_misfit_error
from graft.files.formats import Base, writer_of
from graft.files.holding import pad_rank
from graft.files.inspect import check_adapter_is_finite
from graft.files.lint import check_whole
from graft.files.lycoris import kasa_to_lora
from graft.files.names import check_shapes, mask_layer_number
from graft.files.neutral import AdapterFile, LowRank, OtherMethod
from graft.files.serving import Server, Subject, get_server, list_copied_weights, read_server_data
from graft.files.tensors import make_tensor

# conditions that no plain LoRA can express
MERGED = ("dora", "bias", "whole_norms", "whole_modules", "token_rows", "kasa")
LAYOUTS = ("vllm", "sglang")  # graft writes expert layouts of these servers
PLACES = ("embeddings", "output_head", "kernels")  # conditions on modules that some servers do not adapt
KNOWN = ("lora_shift.", *TRAINING_ONLY)  # extra tensors that become factors, or that only training needs
SAME = 2**-7  # relative tolerance: a base rounded to half precision is the same base
SAME_PATH = "language_model"  # a path part that only some classes of a multimodal model have


@dataclass
class ExportReport:
    """The account of an export.

    Attributes:
        rank: of all modules.
        modules: the number of modules in the output.
        added: modules that got factors of zeros.
        renamed: path in the adapter → path in the base, where they differ.
        rounding: the largest relative error of a B, from rounding to its dtype with the scale in it.
        notes: the changes, one sentence each.
        error: ‖ΔW − B A‖ / ‖ΔW‖ over all modules for methods other than LoRA; None for LoRA.
    """

    rank: int
    modules: int
    added: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    rounding: float = 0.0
    notes: list[str] = field(default_factory=list)
    error: float | None = None


def export_adapter_file(adapter: AdapterFile, server: str, base: Base, path: str) -> ExportReport:
    """Write an adapter as plain LoRA to `path`, in the first format that the server loads. Return an account.

    Raises:
        LossError: plain LoRA cannot do the same as the adapter. The text names the remedy.
        BaseModelMismatchError: the base lacks modules of the adapter, or has other shapes.
        ConfigError: the server is unknown.
        NonFiniteError: the adapter has NaN or infinite numbers.
        CheckpointError: the adapter is incomplete.
    """
    target = get_server(server)
    lora_file, report = to_plain_lora(adapter, target, base)
    writer_of(target.formats[0]).write(lora_file, path, base)
    return report


def to_plain_lora(adapter: AdapterFile, server: Server, base: Base) -> tuple[AdapterFile, ExportReport]:
    """Convert an adapter to the LoRA that `server` loads, and return it with a report of the changes: one rank, the
    scale in B, alpha = r, and the base's module names. Other base modules with the same suffixes get factors of zeros.

    The config is new; only task type, base and fan_in_fan_out are taken over. It has `r` and `lora_alpha`,
    `target_modules`, dropout 0.0, bias "none", `init_lora_weights` and `inference_mode` True, `modules_to_save` None,
    and no rsLoRA or DoRA. `selected` has all modules, those with zeros included. The report has B's largest relative
    rounding error as `rounding`, and the changes as `notes`. Factors keep their common dtype, and smaller ranks are
    padded with zeros. The adapter itself does not change.

    Raises:
        LossError: B overflows its dtype with its scale in it.
        BaseModelMismatchError: two modules have one name in the base.
        And the other errors of `export_adapter_file`.
    """
    check_whole(adapter)
    adapter = to_lora_on_base(adapter, base)
    check_is_plain(adapter, server)
    check_adapter_is_finite(adapter)
    if not {*base.modules}.issuperset(adapter.modules):  # the model's module names differ from the file's
        base = view_by_model_names(base) or base
    check_copied_weights(adapter, base)
    loras = {path: read_unscaled_factors(path, of, adapter.config) for path, of in adapter.modules.items()}
    names = {path: find_base_module(path, base) for path in loras}
    if len({*names.values()}) < len(names):
        raise make_misfit_error(f"Two modules of {adapter.path} have one name in the base: {join_some(sorted(names))}")
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
            f"B of {join_some(over)} in {adapter.path} is beyond the largest number of {dtype} with its scale in it. "
            "Save the adapter in float32 or bfloat16, and export that."
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
    """Return an adapter with AdaLoRA converted to LoRA, and KaSA to LoRA plus a shift of the original base.

    KaSA stays KaSA if `base` is a live model, which KaSA has changed already. An adapter without both is returned as it
    is.
    """
    if base.model is None:  # a live model has KaSA's change already
        adapter = kasa_to_lora(adapter, base)
    if adapter.method != "ADALORA":
        return adapter
    modules = {path: as_low_rank(module) or module for path, module in adapter.modules.items()}
    return replace(adapter, method="LORA", modules=modules)


def check_is_plain(adapter: AdapterFile, server: Server) -> None:
    """Raise LossError for the first kind of part that plain LoRA on this server cannot hold; the text names the parts
    and the remedy.

    The kinds, in order: 1. parts that only a merge can serve: DoRA, biases, whole modules, rows of tokens, KaSA; 2.
    stacks of experts; 3. modules that this server does not adapt, by graft's table of servers; 4. aLoRA's tokens and
    repeated layers; 5. an unknown change of the base; 6. another method than LoRA, unknown or shared tensors, or no
    modules. Tensors that only training needs are allowed.
    """
    subject, data, path, merge = Subject(adapter, server), read_server_data(), adapter.path, "Merge it (graft merge)"
    layout = data["remedies"]["layout" if server.name in LAYOUTS else "merge"]
    rows = [row for row in data["servers"][server.name]["rows"] if row["when"] in PLACES and row["remedy"] == "merge"]
    refusals: list[tuple[str, list[str], str]] = [  # the words before the parts, the parts, the words behind them
        (f"{path} holds", [what for name in MERGED for what in subject.find(name)],
         f", which plain LoRA cannot hold. {merge}. KaSA in memory: save it, and export the file."),
        (f"{path} holds stacks of experts,", subject.find("experts"),
         f": {layout.format(server=server.name, adapter=path, base='BASE')}."),
        *((f"{server.name} {row['does']}, and {path} has factors there:", subject.find(row["when"]), f". {merge}.")
          for row in rows),
        (f"{path} has", subject.find("invocation_tokens") + subject.find("layer_replication"),
         ", which neither plain LoRA nor merged weights can do. Serve it from a PeftModel."),
        (f"{path} belongs to a base that", [adapter.changed_base] if adapter.changed_base is not None else [],
         " has changed, and does not say how. Load it with graft onto the original base, and save it."),
    ]  # fmt: skip
    for before, parts, after in refusals:
        if parts:
            raise LossError(f"{before} {join_some(parts)}{after}")
    unknown = [f"{p}.{name}" for p, of in adapter.low_rank.items() for name in of.extra if not name.startswith(KNOWN)]
    leftovers = [*adapter.unknown_keys, *adapter.shared, *unknown]
    if adapter.method != "LORA" or leftovers or not adapter.modules:
        what = f"{path} ({adapter.method}) is no LoRA, or has more: {join_some(leftovers)}"
        raise LossError(f"{what}. {merge}, or see graft.convert_to_lora.")


def check_copied_weights(adapter: AdapterFile, base: Base) -> None:
    """Compare the base weights that the file holds next to factors of the same module with those of the base.

    The first weight with a fault raises the error.

    Raises:
        BaseModelMismatchError: the base lacks such a weight.
        LossError: shapes differ, or values differ by more than rounding to half precision (relative 2⁻⁷, absolute a
            hundredth of it).
    """
    for name in list_copied_weights(adapter):
        file_weight, base_weight = adapter.full[name], base.tensors.get(name)
        if base_weight is None:
            raise make_misfit_error(f"{adapter.path} holds '{name}' of its base, which {base.path} lacks")
        if file_weight.shape != base_weight.shape or not np.allclose(
            file_weight.read(), base_weight.read(), SAME, SAME * 1e-2
        ):
            raise LossError(
                f"{adapter.path} holds a '{name}' with other rows or values than the base's. Merge it (graft merge), "
                "and serve the model."
            )


def read_unscaled_factors(path: str, module: LowRank | OtherMethod, config: dict[str, object]) -> LowRank:
    """Return the factors A (r, …) and B (out, r, …) of a module in float32, with the scale multiplied into B and scale
    1.

    A shift (PiSSA) is subtracted by appending its factors, which adds its rank. QA-LoRA and BD-LoRA become dense
    factors of kind "linear". Magnitude, bias and `extra` are left out. Raises LossError for a Tucker core and for other
    methods.
    """
    if isinstance(module, OtherMethod):
        A, B = expand_shared_factors(path, module, config)
        return LowRank(make_tensor(A, "F32"), make_tensor(B.astype("f4") * np.float32(module.scale or 1.0)), 1.0)
    A, B = (t.read().astype("f4") for t in (module.A, module.B))
    if module.mid is not None:
        raise LossError(f"'{path}' has a core between its factors. Convert it to PEFT's format first (graft convert).")
    B = B * np.float32(module.scale)
    if module.shift is not None:
        gone_A, gone_B = (t.read().astype("f4") for t in module.shift)
        A = np.concatenate([A, gone_A.reshape(len(gone_A), *A.shape[1:])])
        B = np.concatenate([B, -gone_B.reshape(*gone_B.shape, *B.shape[2:])], 1)
    return LowRank(make_tensor(A), make_tensor(B), 1.0, module.kind)


def expand_shared_factors(path: str, module: OtherMethod, config: Json) -> tuple[np.ndarray, np.ndarray]:
    """Return dense A (r, in) and B (out, r) of QA-LoRA or BD-LoRA.

    QA-LoRA: A is repeated over the inputs of each group, and multiplied by the number of groups / the group size.
    BD-LoRA: the block-diagonal factor (A for modules of target_modules_bd_a, otherwise B) is filled with zeros. Raises
    LossError for other methods with `lora_A` and `lora_B`, KeyError for a module without these.
    """
    A, B = (module.tensors[f"lora_{name}.weight"].read() for name in "AB")
    if module.method == "QALORA":  # A acts on means of `size` inputs, times the number of groups
        size = config["qalora_group_size"]
        return A.repeat(size, 1) * (A.shape[1] * size / size**2), B
    if module.method != "BDLORA":
        raise LossError(f"'{path}' has a {module.method}, which is no LoRA. Export it from its loaded model.")
    blocks = config["use_bdlora"]
    n = blocks["nblocks"]
    if any(part in path for part in blocks.get("target_modules_bd_a") or ()):
        return block_diagonal(np.split(A, n)), B
    return A, block_diagonal(np.split(B, n))


def make_zero_factors(path: str, like: LowRank | None, base: Base, rank: int, dtype: str, transposed: bool) -> LowRank:
    """Return factors of zeros for a module, of rank `rank` and scale 1.

    Shapes and kind are those of `like`. If that is None, they come from the base's weight (out, in), or (in, out) if
    `transposed`. Raises BaseModelMismatchError if that weight is no matrix.
    """
    if like is not None:
        A, B, kind = like.A.shape[1:], (like.B.shape[0], rank, *like.B.shape[2:]), like.kind
    else:
        shape = base.shapes.get(f"{path}.weight", ())
        if len(shape) != 2:
            raise make_misfit_error(f"The weight of the base's '{path}' has the shape {shape} and is no matrix")
        out, fan_in = shape[::-1] if transposed else shape
        A, B, kind = (fan_in,), (out, rank), "linear"
    return LowRank(make_tensor(np.zeros((rank, *A), "f4"), dtype), make_tensor(np.zeros(B, "f4"), dtype), 1.0, kind)


def find_factor_dtype(adapter: AdapterFile) -> str:
    """Return the common dtype of all A and B of an adapter, or "F32" if there are several."""
    modules = adapter.modules.values()
    pairs = [
        (of.A, of.B) if isinstance(of, LowRank) else [of.tensors[f"lora_{x}.weight"] for x in "AB"] for of in modules
    ]
    dtypes = {t.dtype for pair in pairs for t in pair}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def rounding_error_of_b(lora: LowRank, dtype: str) -> float:
    """Return the relative error of `lora.B`, as it is and without the scale, from rounding it to `dtype` (Frobenius
    norms).

    0 for a B of zeros, not finite if B overflows.
    """
    exact = lora.B.read()
    return float(np.linalg.norm(exact - make_tensor(exact, dtype).read()) / max(float(np.linalg.norm(exact)), 1e-30))


# names


def find_base_module(path: str, base: Base) -> str:
    """Return the base's path for a module: the path itself, or the only one that is equal without "language_model"
    parts.

    Raises BaseModelMismatchError if there is none, or several.
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
    """Return a path without its "language_model" parts."""
    return ".".join(part for part in path.split(".") if part != SAME_PATH)


def choose_suffixes(modules: Iterable[str], base: Base, server: Server) -> tuple[list[str], list[str]]:
    """Return suffixes that select these modules, and the further base modules that they also select; both sorted.

    A suffix is the last name, with earlier names, up to a layer number, as long as it would select another kind of
    module. Suffixes that end with another one are left out. For SGLang, `v_proj` is added where `q_proj` is, if the
    base has it.
    """
    paths, known = {*modules}, [*base.modules]
    kinds = {mask_layer_number(path) for path in paths}
    if server.name == "sglang":  # SGLang needs v_proj with q_proj
        kinds |= {k.replace(".q_proj", ".v_proj") for k in kinds} & {mask_layer_number(m) for m in known}
    suffixes, other_modules = set(), [m for m in known if mask_layer_number(m) not in kinds]
    for kind in kinds:
        parts = kind.split(".")
        suffix = parts.pop()
        while parts and parts[-1] != "#" and any(ends_with_suffix(m, suffix) for m in other_modules):
            suffix = f"{parts.pop()}.{suffix}"
        suffixes.add(suffix)
    selected = {m for m in known if any(ends_with_suffix(m, suffix) for suffix in suffixes)}
    shorter = {s for s in suffixes if not any(s != ending and ends_with_suffix(s, ending) for ending in suffixes)}
    return sorted(shorter), sorted(selected - paths)


def ends_with_suffix(path: str, suffix: str) -> bool:
    """Return True if a path ends with a suffix of whole names: "a.q_proj" ends with "q_proj", "a.xq_proj" does not."""
    return f".{path}".endswith(f".{suffix}")


# what changed


def describe_changes(adapter: AdapterFile, report: ExportReport, loras: dict[str, LowRank]) -> Iterable[str]:
    """Yield a sentence for each kind of change in an export that took place; nothing for an export without changes.

    The order is: scales other than 1 that went into B, shifts of the base, and unequal ranks in `loras`. Then come
    extra tensors left out (except the shift's), dense factors for other methods, renamed modules, and modules with
    zeros.
    """
    low_rank = adapter.low_rank.values()
    if any(of.scale != 1.0 for of in low_rank):
        yield "the scale is multiplied into B, and lora_alpha is r"
    if any(of.shift is not None for of in low_rank):
        yield "the change of the base by the initialisation is in the factors: twice the rank, for the original base"
    if len({of.A.shape[0] for of in loras.values()}) > 1:
        yield f"all modules have rank {report.rank}, with zeros"
    if extra := sorted({name for of in low_rank for name in of.extra if not name.startswith("lora_shift")}):
        yield f"{join_some(extra)} are left out, which only training needs"
    if any(isinstance(of, OtherMethod) for of in adapter.modules.values()):
        yield "blocks and sums became dense factors"
    if report.renamed:
        yield f"{len(report.renamed)} modules have the base's names"
    if report.added:
        yield f"{len(report.added)} modules have factors of zeros, so that suffixes select only modules with factors"
