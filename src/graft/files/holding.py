# SPDX-License-Identifier: Apache-2.0
"""The limits of file formats, and adapters made to fit: scales folded into B, ranks padded, other parts listed
as lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from graft import CheckpointError, LossError
from graft.core.errors import join_some
from graft.files.algebra import as_low_rank, contract_tucker_core, list_delta_products
from graft.files.base import BaseDescription as Base
from graft.files.errors import make_damage_error
from graft.files.formats.peft import PREFIXES, VARIANTS, make_names_error
from graft.files.names import CONV1D
from graft.files.neutral import AdapterFile, LostModule, LowRank, OtherMethod
from graft.files.tensors import Tensor, make_tensor

Parts = frozenset[str]
PARTS = {
    "magnitude": "DoRA's magnitude",
    "bias": "a bias of the second factor",
    "full": "whole tensors of the base",
    "rows": "rows of embeddings",
    "shared": "tensors of no module",
    "conv": "convolutions",
    "embedding": "embeddings",
    "experts": "stacks of experts",
    "extra": "further tensors of a variant of LoRA",
    "alora_invocation_tokens": "the tokens after which aLoRA begins to act",
    "layer_replication": "repeated layers of the base",
    "arrow_config": "a router among other adapters",
}
# fields of PEFT's config that change the effect of the same factors
FIELDS = ("alora_invocation_tokens", "layer_replication", "arrow_config")


@dataclass(frozen=True)
class FormatLimits:
    """The parts of adapters that a format can hold.

    Attributes:
        scales: "each": every module has its own; "alpha": one alpha for all, divided by each rank; "one": one for all.
        ranks: modules may have different ranks.
        parts: keys of PARTS.
        methods: methods other than LoRA.
        magnitudes: modules with a magnitude and modules without one may be mixed.
    """

    scales: Literal["each", "alpha", "one"] = "each"
    ranks: bool = True
    parts: Parts = frozenset()
    methods: Parts = frozenset()
    magnitudes: bool = False


PEFT = FormatLimits(
    parts=frozenset({*PARTS, "changed_base"}), methods=frozenset({*PREFIXES, *VARIANTS.values()} - {"LORA"})
)  # its writer checks that no methods are mixed


def fit_to_format(
    adapter: AdapterFile, holds: FormatLimits, to: str, lossy: bool = False, base: Base | None = None
) -> tuple[AdapterFile, list[str]]:
    """Return a copy of an adapter with only the parts that a format can hold, and descriptions of the lost parts.

    Unknown keys are always lost, and so is every part that the format lacks: methods, kinds of modules, whole tensors,
    rows, shared tensors, magnitudes, biases, `extra`, fields of `FIELDS` with a value, and an undescribed change of the
    base. AdaLoRA becomes LoRA with an empty config, unless the format holds it. Tucker cores are multiplied into A
    where needed, which is no loss. Last, scales and ranks are made equal where needed, by folding into B and padding
    with zeros. If the format needs a magnitude for all modules, modules without one get it, unless `adapter.format` is
    `to`.

    Args:
        to: the format's name.
        lossy: drop the parts that the format cannot hold.
        base: gives the weights for new magnitudes.

    Raises:
        LossError: a part does not fit and `lossy` is False, nothing would be left, or new magnitudes need the base's
            weights.
        BaseNeededError: the adapter's names are the file's own, and no module paths.
    """
    if adapter.has_flat_names:
        raise make_names_error(adapter)
    lost = [f"the key '{key}', which no reader knows" for key in adapter.unknown_keys]
    out = replace(adapter, modules={}, unknown_keys=[])
    for name, items in (("full", adapter.full), ("rows", adapter.rows), ("shared", adapter.shared)):
        if items and name not in holds.parts:
            lost += [f"{PARTS[name]}: {key}" for key in items]
            setattr(out, name, {})
    facts = {name: adapter.config.get(name) for name in FIELDS if name not in holds.parts}
    lost += [f"{PARTS[name]}: {value}" for name, value in facts.items() if value]
    for path, module in adapter.modules.items():
        if isinstance(module, OtherMethod) and module.method in holds.methods:
            out.modules[path] = module
            continue
        if (low_rank := as_low_rank(module)) is None:
            lost.append(LostModule(f"{module.method} on {path}"))
            continue
        module = low_rank
        if module.kind not in ("linear", *holds.parts):
            lost.append(LostModule(f"{PARTS[module.kind]}: {path}"))
            continue
        if module.mid is not None and "mid" not in holds.parts:
            # exact, and of the same rank
            module = replace(module, A=make_tensor(contract_tucker_core(module).astype("f4"), "F32"), mid=None)
        for part in ("magnitude", "bias"):
            if getattr(module, part) is not None and part not in holds.parts:
                lost.append(f"{PARTS[part]}: {path}")
                module = replace(module, magnitude=None) if part == "magnitude" else replace(module, bias=None)
        if module.extra and "extra" not in holds.parts:
            lost.append(f"{PARTS['extra']} ({join_some([*module.extra], 2)}): {path}")
            module = replace(module, extra={})
        out.modules[path] = module
    if adapter.changed_base is not None and "changed_base" not in holds.parts:
        lost.append(f"the change of the base by {adapter.changed_base}, which the file does not describe")
    check_losses(adapter, to, lost, lossy, out.modules or out.full or out.shared or out.rows)
    if adapter.method == "ADALORA" and out.low_rank:
        out.method, out.config = "LORA", {}
    if "magnitude" in holds.parts and not holds.magnitudes and adapter.format != to:
        out.modules.update(make_magnitudes(out, base, to))
    unify_scales_and_ranks(out, holds)
    return out, lost


def make_magnitudes(adapter: AdapterFile, base: Base | None, to: str, of_rows: bool = False) -> dict[str, LowRank]:
    """Return the modules without a magnitude, each with one added in float32, if others of the adapter (or of its
    pipeline part) have one. {} if all have one or none has.

    The magnitude is the norm of W + ΔW for each output, for an embedding each dimension, so that the output stays the
    same. A weight stored (in, out) is turned.

    Args:
        to: the format's name, for the error.
        of_rows: an embedding has one number for each token (MLX), not for each dimension.

    Raises:
        LossError: the base's weights are missing or quantized, or the module is a stack of experts.
    """
    by_part: dict[str, dict[str, LowRank]] = {}  # a file has one config per part of a pipeline
    for path, module in adapter.low_rank.items():
        by_part.setdefault(path.partition(".")[0] if adapter.is_pipeline else "", {})[path] = module
    out = {}
    turned = base is not None and base.config.get("model_type") in CONV1D
    for modules in by_part.values():
        bare = {path: module for path, module in modules.items() if module.magnitude is None}
        if len(bare) == len(modules):
            continue
        for path, module in bare.items():
            weight = None if base is None else base.tensors.get(f"{path}.weight")
            if weight is None or weight.dtype not in ("F64", "F32", "F16", "BF16") or module.kind == "experts":
                raise LossError(
                    f"{to} needs a magnitude for all modules or none, and '{path}' of {adapter.path} lacks one. Give "
                    "the base model with its weights (--base)."
                )
            ((B, A),) = list_delta_products(module)
            W = weight.read().astype("f8")
            W, shape = W.reshape(len(W), -1), (len(B), A.shape[1])
            if W.shape[::-1] == shape and (turned or W.shape != shape):
                W = W.T
            norm = np.linalg.norm(W + B @ A, axis=0 if module.kind == "embedding" and not of_rows else 1)
            out[path] = replace(module, magnitude=make_tensor(norm.astype("f4"), "F32"))
    return out


def check_losses(adapter: AdapterFile, to: str, lost: list[str], lossy: bool, left: object) -> None:
    """Raise LossError if `left` is empty, also with `lossy`, or if `lost` has entries and `lossy` is False."""
    if not left:
        raise LossError(
            f"{to} can hold nothing of {adapter.path}: {join_some(lost)}. Make it LoRA first: graft.convert_to_lora."
        )
    if lost and not lossy:
        raise LossError(
            f"{to} cannot hold all of {adapter.path}: {join_some(lost)}. Pass lossy=True (--lossy) to write the rest."
        )


def unify_scales_and_ranks(adapter: AdapterFile, holds: FormatLimits) -> float:
    """Make scales and ranks of the LoRA modules equal, in place, as far as a format needs it.

    Return the largest rounding error of B, 0 if no scale was folded.

    Ranks are padded with zeros to the largest, unless the format holds several. Unless it holds a scale for each
    module, all get the most common scale (or alpha) that is not 0, or 1 without any. Of equally common ones the first
    counts. The difference is multiplied into B. Without LoRA modules nothing changes.
    """
    low_rank = adapter.low_rank
    rounding = 0.0
    if not low_rank:
        return rounding
    if not holds.ranks:
        most = max(module.rank for module in low_rank.values())
        low_rank = {path: pad_rank(module, most) for path, module in low_rank.items()}
    if holds.scales != "each":
        by = {path: module.rank if holds.scales == "alpha" else 1 for path, module in low_rank.items()}
        common = Counter(module.scale * by[path] for path, module in low_rank.items() if module.scale)
        wanted = common.most_common(1)[0][0] if common else 1.0
        for path, module in low_rank.items():
            low_rank[path], error = fold_scale(module, wanted / by[path])
            rounding = max(rounding, error)
    adapter.modules.update(low_rank)
    return rounding


def divide_alpha(alpha: Tensor | None, rank: int) -> float:
    """Return alpha / rank. Without alpha, or if alpha or the rank is 0, return 1, as other readers do."""
    value = 0.0 if alpha is None else float(alpha.read().reshape(-1)[0])
    return value / rank if value and rank else 1.0


def get_factor_pair(
    tensors: Mapping[str, Tensor], names: Sequence[str], what: str, module: str
) -> tuple[Tensor, Tensor]:
    """Return the tensors A and B of a module, by their two names.

    Raises CheckpointError if one or both are missing; shapes are not checked.
    """
    A, B = (tensors.get(name) for name in names)
    if A is None or B is None:
        raise make_damage_error(f"{what} has only one factor for '{module}'")
    return A, B


def make_shape_error(what: str, module: str, A: Tensor, B: Tensor, where: str = "which do not fit") -> CheckpointError:
    """Return a CheckpointError (not raised) with the shapes of factors A and B that do not fit.

    `where` ends the only sentence; no remedy follows.
    """
    return CheckpointError(f"{what}: the factors of '{module}' have shapes {A.shape} and {B.shape}, {where}.")


def fold_scale(module: LowRank, scale: float) -> tuple[LowRank, float]:
    """Return a module with the scale `scale`, and the largest relative rounding error of B.

    B and bias are multiplied by old / new scale, and `alpha` becomes None. `scale` must not be 0.

    The product is rounded once, to B's dtype. If the scales are equal to 1e-12, only `scale` is set, and the error is
    0. Raises CheckpointError if B overflows its dtype.
    """
    factor = module.scale / scale
    if abs(factor - 1) < 1e-12:
        return replace(module, scale=scale), 0.0
    exact = module.B.read().astype("f8") * factor
    B = make_tensor(exact.astype("f4"), module.B.dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = np.abs(B.read() - exact) / np.abs(exact)
    bias = None if module.bias is None else make_tensor((module.bias.read() * factor).astype("f4"), module.bias.dtype)
    error = float(np.max(errors[exact != 0], initial=0.0))
    if not np.isfinite(error):
        raise CheckpointError(
            f"A factor B of dtype {module.B.dtype} overflows when its scale {factor:g} is multiplied in. Save the "
            "adapter in float32."
        )
    return replace(module, B=B, bias=bias, scale=scale, alpha=None), error


def pad_rank(module: LowRank, rank: int) -> LowRank:
    """Return a module of rank `rank` with the same effect: the factors get zeros at the end, and `alpha` is dropped.

    With an equal rank the module is returned unchanged.
    """
    more = rank - module.rank
    if not more:
        return module
    of_a, of_b = (1, 2) if module.kind == "experts" else (0, 1)
    return replace(module, A=pad_axis(module.A, of_a, more), B=pad_axis(module.B, of_b, more), alpha=None)


def pad_axis(t: Tensor, axis: int, more: int) -> Tensor:
    """Return a tensor with `more` zeros at the end of an axis; values are read later."""
    pads = [(0, more if i == axis else 0) for i in range(len(t.shape))]
    return t.rearrange(lambda bits: np.pad(bits, pads), *(n + after for n, (_, after) in zip(t.shape, pads)))
