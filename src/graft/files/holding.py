# SPDX-License-Identifier: Apache-2.0
"""What a format can hold, and adapters made to fit: scales folded into B, ranks filled up, the rest listed as lost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from graft import CheckpointError, LossError
from graft.core.errors import join_some
from graft.files.algebra import as_low_rank, contract_tucker_core, list_delta_products
from graft.files.formats.peft import PREFIXES, VARIANTS, make_names_error
from graft.files.names import CONV1D
from graft.files.neutral import AdapterFile, LostModule, LowRank, OtherMethod
from graft.files.tensors import Tensor, make_tensor, rearrange_tensor

if TYPE_CHECKING:
    from graft.files.formats import Base

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
    "extra": "what a variant of LoRA keeps beside its factors",
    "alora_invocation_tokens": "the tokens after which aLoRA begins to act",
    "layer_replication": "layers of the base that it repeats",
    "arrow_config": "a router among other adapters",
}
FIELDS = (
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
)  # of PEFT's config, by which the same factors do another thing


@dataclass(frozen=True)
class FormatLimits:
    """What a format can hold.

    Attributes:
        scales: of each module its own, or alpha / rank with one alpha for all, or one for all.
        ranks: each module has its own.
        parts: keys of PARTS.
        methods: those that are not LoRA.
        magnitudes: some modules may have a magnitude where others have none.
    """

    scales: Literal["each", "alpha", "one"] = "each"
    ranks: bool = True
    parts: Parts = frozenset()
    methods: Parts = frozenset()
    magnitudes: bool = False


PEFT = FormatLimits(
    parts=frozenset({*PARTS, "changed_base"}), methods=frozenset({*PREFIXES, *VARIANTS.values()} - {"LORA"})
)  # but methods beside each other, which its writer looks for


def fit_to_format(
    adapter: AdapterFile, holds: FormatLimits, to: str, lossy: bool = False, base: Base | None = None
) -> tuple[AdapterFile, list[str]]:
    """Return an adapter as a format can hold it, and what that leaves out.

    Args:
        to: the format's name, for errors.
        lossy: leave out what it cannot hold.
        base: whose weights give magnitudes to modules that have none beside others that do.

    Raises:
        LossError: it cannot hold something; or, with `lossy`, anything.
        BaseNeededError: the adapter's names are no paths of modules.
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
            module = fold_tucker_core(module)
        for part in ("magnitude", "bias"):
            if getattr(module, part) is not None and part not in holds.parts:
                lost.append(f"{PARTS[part]}: {path}")
                module = replace(module, magnitude=None) if part == "magnitude" else replace(module, bias=None)
        if module.extra and "extra" not in holds.parts:
            lost.append(f"{PARTS['extra']} ({join_some([*module.extra], 2)}): {path}")
            module = replace(module, extra={})
        out.modules[path] = module
    if adapter.changed_base is not None and "changed_base" not in holds.parts:
        lost.append(f"that the base was changed by {adapter.changed_base}, which the file does not say how to undo")
    check_losses(adapter, to, lost, lossy, out.modules or out.full or out.shared or out.rows)
    if adapter.method == "ADALORA" and out.low_rank:
        out.method, out.config = "LORA", {}
    if "magnitude" in holds.parts and not holds.magnitudes and adapter.format != to:
        out.modules.update(make_magnitudes(out, base, to))
    unify_scales_and_ranks(out, holds)
    return out, lost


def make_magnitudes(adapter: AdapterFile, base: Base | None, to: str, of_rows: bool = False) -> dict[str, LowRank]:
    """Return the modules that get a magnitude as others have one: the norm of W + ΔW, which changes nothing.

    Args:
        of_rows: an embedding has one for each token, as in MLX.

    Raises:
        LossError: that needs the base's weights, which are not there.
    """
    by_part: dict[str, dict[str, LowRank]] = {}  # a file has one config for each part of a pipeline
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
                    f"{to} has a magnitude for all modules or for none, and '{path}' of {adapter.path} has none: give "
                    "the base model with its weights (--base), of which it can be made."
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
    """Raise LossError for what a format cannot hold, unless it may be lost and something is left."""
    if not left:
        raise LossError(
            f"The format {to} can hold nothing of {adapter.path}: {join_some(lost)}. Make it LoRA first, by "
            "graft.convert_to_lora, if it changes weights."
        )
    if lost and not lossy:
        raise LossError(
            f"The format {to} cannot hold all of {adapter.path}: {join_some(lost)}. Pass lossy=True (--lossy) to "
            "write the "
            "rest."
        )


def unify_scales_and_ranks(adapter: AdapterFile, holds: FormatLimits) -> float:
    """Fold scales into B and fill up ranks, in place, as far as a format needs it; return the largest rounding."""
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
    """Return alpha / rank; 1 where there is no alpha, or it is 0, as all readers take it."""
    value = 0.0 if alpha is None else float(alpha.read().reshape(-1)[0])
    return value / rank if value and rank else 1.0


def group_by_module(
    out: AdapterFile, tensors: Mapping[str, Tensor], key: re.Pattern[str]
) -> dict[str, dict[str, Tensor]]:
    """Return tensors by module and name, the two groups of `key`; add other keys to `out.unknown_keys`."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if match := key.fullmatch(name):
            groups.setdefault(match[1], {})[match[2]] = t
        else:
            out.unknown_keys.append(name)
    return groups


def get_factor_pair(
    tensors: Mapping[str, Tensor], names: Sequence[str], what: str, module: str
) -> tuple[Tensor, Tensor]:
    """Return the factors A and B of a module; raise CheckpointError if one is not there."""
    A, B = (tensors.get(name) for name in names)
    if A is None or B is None:
        raise CheckpointError(f"{what} has only one factor for '{module}': it is cut off, or was written wrong.")
    return A, B


def make_shape_error(what: str, module: str, A: Tensor, B: Tensor, where: str = "which do not fit") -> CheckpointError:
    """Return the error for factors whose shapes cannot be."""
    return CheckpointError(f"{what}: the factors of '{module}' have shapes {A.shape} and {B.shape}, {where}.")


def fold_scale(module: LowRank, scale: float) -> tuple[LowRank, float]:
    """Return a module whose scale is `scale`, with the rest of its own in B; and how far rounding put an entry off.

    The product is formed in float32 and rounded once, to B's own dtype.
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
        raise CheckpointError(f"A factor B of dtype {module.B.dtype} does not hold its scale {factor:g}: it overflows.")
    return replace(module, B=B, bias=bias, scale=scale, alpha=None), error


def pad_rank(module: LowRank, rank: int) -> LowRank:
    """Return a module of a higher rank that does the same: its factors have zeros from its own rank on."""
    more = rank - module.rank
    if not more:
        return module
    of_a, of_b = (1, 2) if module.kind == "experts" else (0, 1)
    return replace(module, A=pad_axis(module.A, of_a, more), B=pad_axis(module.B, of_b, more), alpha=None)


def pad_axis(t: Tensor, axis: int, more: int) -> Tensor:
    """Return a tensor with zeros behind the last entry of an axis."""
    pads = [(0, more if i == axis else 0) for i in range(len(t.shape))]
    return rearrange_tensor(t, lambda bits: np.pad(bits, pads), *(n + after for n, (_, after) in zip(t.shape, pads)))


def fold_tucker_core(module: LowRank) -> LowRank:
    """Return a convolution with Tucker's core in A, which becomes one of the whole kernel: the same rank, exactly."""
    return replace(module, A=make_tensor(contract_tucker_core(module).astype("f4"), "F32"), mid=None)
