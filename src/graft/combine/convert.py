# SPDX-License-Identifier: Apache-2.0
"""An adapter of any method as plain LoRA: the update of each layer becomes a product B A."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.combine import adding, rules
from graft.combine.adding import Tensors, find_start_change
from graft.combine.forms import spread_groups
from graft.config.base import PeftConfig
from graft.core.effect import Effect
from graft.core.errors import ConfigError, ConfigTypeError, PeftWarning, warn
from graft.core.folding import WeightChange, compute_change, why_no_delta
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.ops import META, Opaque
from graft.inject.match import Matcher
from graft.inject.survey import survey_model
from graft.methods import method_of
from graft.methods.lora.config import LoraConfig

SMALLEST = 1e-30
TELL_FROM = 0.1  # of ‖ΔW‖

Layers = dict[str, AdapterLayer]  # by path
Spectrum = tuple[Tensor, Tensor, Tensor]  # Vh (groups, k, n), U S (groups, m, k), S (groups, k)


def convert_layers(
    base: nn.Module,
    layers: Layers,
    adapter: str,
    cfg: PeftConfig,
    rank: int | float,
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    at: Mapping[str, object] | None = None,
) -> tuple[LoraConfig, dict[str, Tensors]]:
    """Return a config of plain LoRA, and by layer the values of its tensors. The model stays.

    `rank` is an int for every layer, on stacks for each matrix, or a float: the part of ‖ΔW‖² to keep.
    `compile_kwargs`, if not None, compiles the SVD. `at` fixes arguments of calls that the adapter follows. The config
    gets patterns of ranks for a float, `fan_in_fan_out` if any layer has it, and `lora_bias` if any layer's change has
    a shift.

    Warns if the adapter is LoRA already, if its start changed the base, or if a layer loses more than a tenth of ‖ΔW‖.

    Raises:
        ConfigError, ConfigTypeError: LoRA of this rank cannot hold the adapter.
    """
    from tqdm import tqdm

    effects = fix_effects(layers, adapter, at or {})
    check_convertible(layers, adapter, cfg, rank, effects)
    if isinstance(cfg, LoraConfig):
        warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that, "
            "unless it is to have another rank."
        )
    if find_start_change(cfg):
        warn(
            f"The initialisation of '{adapter}' changed the base weights, so that the plain LoRA will not fit a fresh "
            "base. Save the base as well.",
            PeftWarning,
        )
    decompose = compute_spectrum if compile_kwargs is None else torch.compile(compute_spectrum, **compile_kwargs)
    changes: dict[str, WeightChange] = {}
    lost: dict[str, float] = {}
    for key, layer in tqdm(layers.items(), desc="Converting to LoRA", unit="layer", disable=not progressbar):
        change = compute_change(layer.methods[adapter], effects.get(key))
        of_all = rank * len(change.A) if isinstance(rank, int) and layer.op.opaque else rank  # each matrix has `rank`
        A, B, lost[key] = truncate_change(change, of_all, decompose)
        changes[key] = WeightChange(A, B, change.shift)
    warn_of_loss(adapter, rank, lost)
    lora = adding.make_plain_config([cfg])
    stacks = [key for key in changes if layers[key].op.opaque]
    ranks = {key: A.shape[1] * (1 if key in stacks else len(A)) for key, (A, _, _) in changes.items()}
    set_ranks(lora, base, ranks, rank, stacks)
    lora.fan_in_fan_out = any(layer.fan_in_fan_out for layer in layers.values())
    lora.lora_bias = any(shift is not None for _, _, shift in changes.values())
    return lora, {key: make_lora_values(layers[key].methods[adapter], change, lora) for key, change in changes.items()}


# checks


def fix_effects(layers: Layers, adapter: str, at: Mapping[str, object]) -> dict[str, Effect]:
    """Return by layer the effect of an adapter with an argument of calls fixed by `at`.

    A layer is left out if its method's `depends_on` is None or no key of `at`; so {} for an empty `at`.

    Raises:
        ConfigError: `at` names an argument that the adapter follows on no layer, or a value that it cannot have.
    """
    methods = {key: layer.methods[adapter] for key, layer in layers.items()}
    follows = {m.depends_on for m in methods.values() if m.depends_on is not None}
    if unknown := sorted(set(at) - follows):
        says = f"follows {sorted(follows)}" if follows else "follows no argument of a call"
        raise ConfigError(f"at={dict(at)!r} names {unknown}, and adapter '{adapter}' {says}. Leave them out.")
    return {k: m.effect_at(at[n]) for k, m in methods.items() if (n := m.depends_on) is not None and n in at}


def check_convertible(layers: Layers, adapter: str, cfg: Any, rank: Any, effects: Mapping[str, Effect]) -> None:
    """Raise ConfigError or ConfigTypeError unless LoRA of this rank can hold the adapter on each layer.

    The checks run in the order below; the first fault raises. The effect in `effects` decides for its layer, otherwise
    the adapter.

    Raises:
        ConfigTypeError: the rank is no number (`check_rank`, which also raises ConfigError for its value), there are no
            layers, or a layer has no ΔW.
        ConfigError: the config's `bias` is not "none". Then, layer by layer for an int rank: it is above the size of
            the layer's weight, per group times groups, or the groups do not divide it.
    """
    check_rank(rank)
    if not layers:
        raise ConfigTypeError("Could not detect any layer that supports LoRA conversion.")

    def is_convertible(key: str, layer: AdapterLayer) -> bool:
        """Return True if the effect in `effects` for the layer has a ΔW; without one, if the layer's
        `supports_lora_conversion` says so.
        """
        if key in effects:
            return why_no_delta(layer.methods[adapter], effects[key]) is None
        return layer.supports_lora_conversion(adapter)

    if wrong := [key for key, layer in layers.items() if not is_convertible(key, layer)]:
        kinds = sorted({type(layers[key].methods[adapter]).__name__ for key in wrong})
        why = why_no_delta(layers[wrong[0]].methods[adapter]) or "its layer says so"
        raise ConfigTypeError(
            f"Some module types on this model do not support LoRA conversion: {', '.join(kinds)}. On layer "
            f"'{wrong[0]}', {why}."
        )
    if getattr(cfg, "bias", "none") != "none":
        raise ConfigError(
            f"The adapter's config sets bias={cfg.bias}, this is not supported right now: LoRA's tensors cannot hold "
            "the biases of the base model that it trained."
        )
    for key, layer in layers.items() if isinstance(rank, int) else ():
        groups = layer.op.count_groups(layer.base_layer)
        most = groups * min(layer.out_features // groups, layer.in_features if layer.op.opaque else layer.fan_in)
        if rank > most:
            raise ConfigError(
                f"The chosen rank {rank} is larger than the weight shape ({most}), please choose a lower rank. The "
                f"layer is '{key}'."
            )
        if rank % groups:
            raise ConfigError(f"Layer '{key}' has {groups} groups, which do not divide rank {rank}. Choose a multiple.")


def check_rank(rank: object) -> None:
    """Raise ConfigTypeError for a bool or a rank that is neither an int nor a float, ConfigError for an int below 1 or
    a float outside (0, 1].
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ConfigTypeError(f"rank must be an int, or a float for the part of ‖ΔW‖² to keep, got {rank!r}.")
    if isinstance(rank, int) and rank <= 0:
        raise ConfigError(f"Passing a rank of {rank} doesn't make sense, please pass a valid value.")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )


# updates


def compute_spectrum(A: Tensor, B: Tensor | None) -> Spectrum:
    """Return Vh, U S and S of B A, with as many triples as the smallest of its sizes and rank; of A if B is None."""
    if B is None:
        return rules.truncate_matrix(A, min(A.shape[-2:]))
    return rules.truncate_product(A, B, min(*A.shape[-2:], B.shape[-2]))


def truncate_change(
    change: WeightChange, rank: int | float, decompose: Callable[..., Spectrum]
) -> tuple[Tensor, Tensor, float]:
    """Return A (groups, k, n) and B (groups, m, k) with the product nearest to ΔW, and the part of ‖ΔW‖ that is lost.

    The part is computed only for an int and an update without factors, else it is 0: the caller compares the results.

    k is the int divided by the number of groups, rounded down. A float takes the smallest k, at least 1, that keeps
    this part of ‖ΔW‖²; rounding noise, (4 ε)² of ‖ΔW‖² for each triple, is never kept. Factors of rank k are returned
    as they are. With an int, factors of a lower rank are decomposed anew, with further orthonormal rows in A and zeros
    in B.
    """
    A, B, _ = change
    if isinstance(rank, int):
        k = rank // len(A)
        if B is not None and A.shape[1] <= k:
            return (*((A, B) if A.shape[1] == k else rules.truncate_product(A, B, k)[:2]), 0.0)  # rows that can learn
        Vh, US, S = decompose(A, B)
        lost = float(S[:, k:].norm() / S.norm().clamp_min(SMALLEST)) if B is None else 0.0
        return Vh[:, :k], US[..., :k], lost
    Vh, US, S = decompose(A, B)
    left = S.double().square().sum(0).flip(0).cumsum(0).flip(0)  # energy of all triples, of all but the first, …
    noise = len(left) * (4 * torch.finfo(S.dtype).eps) ** 2
    k = max(1, int((left > max(1 - rank, noise) * left[0]).sum()))
    return (*((A, B) if B is not None and A.shape[1] == k else (Vh[:, :k], US[..., :k])), 0.0)


def warn_of_loss(adapter: str, rank: int | float, lost: dict[str, float]) -> None:
    """Warn if an update without factors loses more than a tenth of ‖ΔW‖ on some layer, and name the worst."""
    worst = max(lost, key=lambda key: lost[key])
    if lost[worst] > TELL_FROM:
        warn(
            f"As LoRA of rank {rank}, adapter '{adapter}' loses up to {lost[worst]:.0%} of ‖ΔW‖ (layer '{worst}'). "
            "rank=0.99 takes the lowest rank that keeps 99 % of ‖ΔW‖² in each layer.",
            PeftWarning,
        )


# LoRA


def set_ranks(
    cfg: LoraConfig, base: nn.Module, ranks: dict[str, int], rank: int | float, parameters: Sequence[str] = ()
) -> None:
    """Change `cfg` so that these layers of `base` get these ranks with scaling 1, and no other layer an adapter.

    With an int rank, `r` and `lora_alpha` are it. Else both are 1, and rank and alpha patterns hold the ranks by path;
    by "^" and escaped path if one path ends with another. Targets stay if they select exactly these layers already;
    otherwise, and for any `parameters`, they become the exact paths.

    Args:
        parameters: the paths that are parameters, not modules.
    """
    if isinstance(rank, int):
        cfg.r = cfg.lora_alpha = rank
    else:
        cfg.r = cfg.lora_alpha = 1
        cfg.rank_pattern = dict(ranks)
        if any(cfg.at(key).r != r for key, r in ranks.items()):  # one path ends with another
            cfg.rank_pattern = {f"^{re.escape(key)}": r for key, r in ranks.items()}
        cfg.alpha_pattern = dict(cfg.rank_pattern)
    matcher = Matcher(cfg)
    if parameters or {key for key in survey_model(base).modules if matcher(key).outcome == "matched"} != set(ranks):
        adding.target_exactly(cfg, ranks, parameters)


def make_lora_values(m: Method, change: WeightChange, cfg: LoraConfig) -> Tensors:
    """Return the values of LoRA's tensors on the layer of a method, by (container, path).

    They are contiguous copies in the method's dtype. With `cfg.lora_bias` the bias of B is the change's shift, or zeros
    without one; opaque layers have none. Factors of other layers get the shapes of the modules that LoRA makes for
    them, as for convolutions.

    Raises:
        ConfigError: `cfg.lora_bias` is set on an embedding, which LoRA cannot hold.
    """
    site, B = m.site, change.B
    assert B is not None
    if site.op.opaque:
        A, B = Opaque.join_matrices(change.A, B)
    else:
        A, B = spread_groups(change.A, site).flatten(0, 1), B.flatten(0, 1)
    values = method_of("LORA")(site, cfg, m.name).holding(A, B)
    if cfg.lora_bias and not site.op.opaque:
        if site.op.takes_ids:
            raise ConfigError(f"The adapter changes the bias of embedding '{site.key}', which LoRA cannot. Drop it.")
        values["lora_B", "bias"] = B.new_zeros(site.out_features) if change.shift is None else change.shift
    if not (site.op.takes_ids or site.op.opaque):
        factors = site.op.factor_modules(site.module, len(A), False, False, META)
        for name, factor in zip("AB", factors or ()):
            values[f"lora_{name}", "weight"] = values[f"lora_{name}", "weight"].reshape(factor.weight.shape)
    return {place: t.detach().to(m.dtype, copy=True).contiguous() for place, t in values.items()}
