# SPDX-License-Identifier: Apache-2.0
"""Smaller ranks for a LoRA adapter, chosen per module: the largest singular triplets stay, so that the loss is
least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from graft import LossError
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.files import algebra
from graft.files.errors import OptionError
from graft.files.holding import pad_rank
from graft.files.inspect import check_adapter_is_finite
from graft.files.lint import check_whole
from graft.files.neutral import AdapterFile, LowRank, OtherMethod
from graft.files.tensors import BITS, dtype_for_writing

MB = 10**6
OVERHEAD = 100  # bytes of a tensor's entry in a file's header, without its name
OF_TRAINING: Json = {  # fields of PEFT's config on initialisation and training → reset value
    "use_rslora": False, "init_lora_weights": True, "eva_config": None, "corda_config": None, "lora_ga_config": None,
    "loftq_config": {}, "velora_config": None, "monteclora_config": None,
}  # fmt: skip


@dataclass(frozen=True)
class ResizedModule:
    """The account of one module."""

    module: str
    before: int  # rank
    after: int
    energy: float  # the remaining share of Σ σ²
    size: float  # ‖ΔW‖ before


def resize_adapter(
    adapter: AdapterFile,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    max_mb: float | None = None,
    max_rank: int | None = None,
    uniform: bool = False,
) -> tuple[AdapterFile, list[ResizedModule]]:
    """Return a copy of an adapter with other ranks, and an account of each module.

    Exactly one of four options chooses the ranks.

    A module that loses nothing keeps its factors, padded with zeros if its rank grows. Other factors come from an SVD,
    in the same dtype; for 8-bit floats in bfloat16. DoRA's magnitudes stay, and extra tensors of variants are dropped.
    No rank exceeds the smaller side of ΔW, except with `uniform`. The method becomes LoRA, and fields on initialisation
    and `use_rslora` of the config are reset where they are set.

    Args:
        rank: of all modules.
        energy: the share of Σ σ² that each module keeps, in (0, 1].
        ratio: each module keeps σ above its largest σ / ratio.
        max_mb: megabytes (10⁶ bytes) of the file. The ranks lose the least Σ σ² in total.
        max_rank: an upper limit for all ranks.
        uniform: all modules get one rank, padded with zeros: the largest that a module needs, or that fits `max_mb`.

    Raises:
        OptionError: not exactly one of `rank`, `energy`, `ratio` and `max_mb`, or a value out of range.
        LossError: a module is no LoRA, the file does not describe the change of the base by its initialisation, or rank
            1 exceeds `max_mb`.
        CheckpointError: the adapter is incomplete.
        NonFiniteError: it has NaN or infinite numbers.
    """
    check_resize_options(dict(rank=rank, energy=energy, ratio=ratio, max_mb=max_mb), max_rank)
    check_whole(adapter)
    loras = collect_loras(adapter)
    check_adapter_is_finite(adapter)
    profiles = {path: compute_rank_profile(h) for path, h in loras.items()}
    most = {path: max(1, min(len(s), max_rank or len(s))) for path, s in profiles.items()}
    if max_mb is not None:
        ranks = choose_ranks_for_size(adapter, loras, profiles, most, max_mb, uniform)
    else:
        ranks = {
            path: min(
                most[path],
                rank or (algebra.rank_for_energy(s, energy) if energy else algebra.rank_for_ratio(s, ratio or 1)),
            )
            for path, s in profiles.items()
        }
        if uniform:
            one = rank or max(ranks.values())
            ranks = dict.fromkeys(ranks, min(one, max_rank or one))
    modules = dict(adapter.modules)
    rows = []
    for path, h in loras.items():
        if h.rank <= ranks[path] and h.mid is None and h.shift is None:  # nothing is lost, so no bit changes
            modules[path] = replace(pad_rank(h, ranks[path]), extra={})
        else:
            modules[path] = algebra.replace_factors(
                h, [algebra.compute_svd(p) for p in algebra.list_delta_products(h)], ranks[path]
            )
        s = profiles[path]
        rows.append(
            ResizedModule(path, h.rank, ranks[path], algebra.energy_share(s, ranks[path]), float(np.linalg.norm(s)))
        )
    config = adapter.config | {k: v for k, v in OF_TRAINING.items() if k in adapter.config}
    return replace(adapter, method="LORA", modules=modules, config=config), rows


def check_resize_options(ways: Mapping[str, float | None], max_rank: int | None) -> None:
    """Raise OptionError unless exactly one of the options rank, energy, ratio and max_mb is not None, and its value is
    in range: rank from 1, energy in (0, 1], ratio above 1, max_mb above 0 and finite. Also if `max_rank` is below 1.
    """
    names = [name for name, value in ways.items() if value is not None]
    if len(names) != 1:
        raise OptionError(f"Give one of rank, energy, ratio and max_mb: {join_some(names) if names else 'none'} given.")
    name = names[0]
    value = ways[name]
    assert value is not None
    fits = {"rank": value >= 1, "energy": 0 < value <= 1, "ratio": value > 1, "max_mb": 0 < value < math.inf}
    if not fits[name] or (max_rank is not None and max_rank < 1):
        raise OptionError(
            f"{name}={value} with max_rank={max_rank} is not possible. A rank is at least 1, an energy in (0, 1], a "
            "ratio above 1, a size above 0."
        )


def collect_loras(adapter: AdapterFile) -> dict[str, LowRank]:
    """Return the LoRA of each module by path, with AdaLoRA as LoRA.

    Raises:
        LossError: the change of the base is unknown, a module is no LoRA, is a grouped convolution, or there is no
            module. Checked in this order.
    """
    if adapter.changed_base is not None:
        raise LossError(
            f"{adapter.path} was initialised by {adapter.changed_base}, which changed the base, and the file does not "
            "say how. Load it with graft and save it again."
        )
    loras = {path: algebra.as_low_rank(module) for path, module in adapter.modules.items()}
    low_rank = {path: lora for path, lora in loras.items() if lora is not None}
    unfit = {path: m for path, m in adapter.modules.items() if isinstance(m, OtherMethod) and path not in low_rank}
    if unsuitable := [f"{path} ({m.method})" for path, m in unfit.items()]:
        raise LossError(
            f"{adapter.path} has modules that are no LoRA: {join_some(unsuitable)}. See graft.convert_to_lora."
        )
    if grouped := [path for path, h in low_rank.items() if h.kind == "conv" and h.B.shape[1] != h.rank]:
        raise LossError(
            f"{adapter.path} adapts grouped convolutions, which have no SVD of one rank: {join_some(grouped)}. Keep "
            "their rank."
        )
    if not low_rank:
        raise LossError(f"{adapter.path} ({adapter.method}) has no LoRA on any module. Give a LoRA adapter.")
    return low_rank


def compute_rank_profile(lora: LowRank) -> np.ndarray:
    """Return the singular values that decide a module's rank, at most min(out, in); for experts the i-th is the root
    sum of squares over all experts.
    """
    spectra = np.stack([algebra.compute_singular_values(p) for p in algebra.list_delta_products(lora)])
    rows, columns = algebra.delta_shape(lora)
    return np.sqrt((spectra**2).sum(0))[: min(rows, columns)]


def choose_ranks_for_size(
    adapter: AdapterFile, loras: Mapping[str, LowRank], profiles: Mapping[str, np.ndarray], most: Mapping[str, int],
    max_mb: float, uniform: bool,
) -> dict[str, int]:  # fmt: skip
    """Return the rank of each module for a file of at most `max_mb`, by adding triplets in order of σ² per byte.

    A triplet that does not fit is skipped, and later cheaper ones are tried; those with σ = 0 are not added. Every
    module has at least rank 1 and at most its `most`. With `uniform` all get the largest rank that fits, up to the
    largest `most`. Raises LossError if rank 1 does not fit.
    """
    costs = {path: bytes_per_rank(h) for path, h in loras.items()}
    left = int(max_mb * MB) - count_other_bytes(adapter, loras) - sum(costs.values())
    if left < 0:
        raise LossError(
            f"{adapter.path} needs {(int(max_mb * MB) - left) / MB:.3g} MB at rank 1: {max_mb} is too little. Give a "
            "larger max_mb."
        )
    if uniform:
        return dict.fromkeys(loras, min(max(most.values()), 1 + left // sum(costs.values())))
    ranks = dict.fromkeys(loras, 1)
    gains = [(s[i] ** 2 / costs[path], path) for path, s in profiles.items() for i in range(1, most[path]) if s[i] > 0]
    for _, path in sorted(gains, key=lambda gain: -gain[0]):  # a module's triplets stay in order, since its σ fall
        if costs[path] <= left:
            ranks[path], left = ranks[path] + 1, left - costs[path]
    return ranks


def bytes_per_rank(lora: LowRank) -> int:
    """Return the bytes that one more rank adds to a module's factors, after its Tucker core is multiplied into A."""
    rows, columns = algebra.delta_shape(lora)  # of a Tucker core, too, which the new A contains
    bits = rows * BITS[dtype_for_writing(lora.B.dtype)] + columns * BITS[dtype_for_writing(lora.A.dtype)]
    return bits // 8 * (lora.A.shape[0] if lora.kind == "experts" else 1)


def count_other_bytes(adapter: AdapterFile, loras: Mapping[str, LowRank]) -> int:
    """Return an estimate of a file's bytes without the factors: other tensors, the header with 100 bytes per tensor and
    its name, config and metadata. A path counts four times more for the config's patterns.
    """
    other_tensors = adapter.loose_tensors + [
        (path, t) for path, h in loras.items() for t in (h.magnitude, h.bias) if t is not None
    ]
    names = [name for name, _ in other_tensors] + [path for path in loras for _ in "AB"]
    text = len(str(adapter.config)) + sum(len(v) for v in adapter.metadata.values()) + 4 * sum(map(len, loras))
    return sum(t.nbytes for _, t in other_tensors) + sum(len(n) + OVERHEAD for n in names) + text
