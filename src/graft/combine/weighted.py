# SPDX-License-Identifier: Apache-2.0
"""`add_weighted_adapter`: a new adapter from a weighted combination of others, on a Tuner."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NoReturn

import torch

from graft.combine import adding, rules
from graft.combine.adding import Tensors, inject_combined, warn_if_base_changed
from graft.combine.forms import FORMS, Parts, ProductForm, UpdateForm
from graft.combine.rules import TYPES, Recipe
from graft.config.base import PeftConfig
from graft.core.errors import AdapterNotFoundError, ConfigError, ConfigTypeError, escape_controls
from graft.core.finite import is_finite
from graft.core.folding import widen
from graft.core.gate import prepares
from graft.core.method import Tuner
from graft.inject.stage import discard_initial_values
from graft.methods import method_of
from graft.storage.parallel import gather_slots


@dataclass
class WeightedReport:
    """The report of a combination.

    Attributes:
        ranks: by layer.
        energy: by layer, ‖truncated‖² / ‖full‖², where a sum was truncated.
    """

    adapter: str
    combination_type: str
    ranks: dict[str, int] = field(default_factory=dict)  # by layer
    energy: dict[str, float] = field(default_factory=dict)  # ‖truncated‖² / ‖full‖² by layer, where a sum was truncated

    def __str__(self) -> str:
        """Return one line: adapter, type and number of layers; with energies also their mean, and the least one with
        its layer.

        Control characters in names are escaped.
        """
        text = f"'{escape_controls(self.adapter)}' ({self.combination_type}): {len(self.ranks)} layers"
        if not self.energy:
            return text
        key = min(self.energy, key=lambda k: self.energy[k])
        mean = sum(self.energy.values()) / len(self.energy)
        where = escape_controls(key)
        return f"{text}, retained energy {mean:.4f} on average, at least {self.energy[key]:.4f} ('{where}')"


def gather_whole(combine: Callable[..., WeightedReport]) -> Callable[..., WeightedReport]:
    """Decorate a combination so that the tensors of its adapters are whole during the call, where processes hold parts
    of them.

    Heads trained whole are not gathered.
    """

    @wraps(combine)
    def call(tuner: Tuner, adapters: list[str], *args: object, **kwargs: object) -> WeightedReport:
        """Gather the slots of the named adapters on layers and token rows, call the combination within, and return its
        report.

        Names that no layer has are ignored here: the combination refuses them.
        """
        layers = [*tuner.layers.values(), *(w for w in tuner.wrappers.values() if w.takes_rows)]
        named = [(layer, name) for layer in layers for name in adapters if name in layer.methods]
        with gather_slots([slot for layer, name in named for slot in layer.slots(name)]):
            return combine(tuner, adapters, *args, **kwargs)

    return call


@prepares
@torch.no_grad()
@gather_whole
def add_weighted_adapter(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> WeightedReport:
    """Add an adapter, inactive and frozen, that combines others. A call that fails changes nothing.

    With Δᵢ = sᵢ Bᵢ Aᵢ the update of an adapter, sᵢ its scaling, wᵢ its weight (negative ones subtract):

    - `exact`: Σ wᵢ Δᵢ. Of rank Σ rᵢ, or truncated to `svd_rank`: then no adapter of that rank comes closer.
    - `svd`: the same, truncated to `svd_rank`, by default the highest rank among the adapters.
    - `cat`: the same, with all A below each other and all B next to each other, rank Σ rᵢ.
    - `linear`: A = Σ ±√|wᵢsᵢ| Aᵢ and B = Σ √|wᵢsᵢ| Bᵢ, of equal ranks. The product has cross terms Bᵢ Aⱼ besides the
        sum.
    - `magnitude_prune`, `dare_linear`, `ties`, `dare_ties`: prune A and B and combine them separately, as `linear`
        does.
    - the same with `_svd`: prune and combine the updates themselves, then truncate. These are dense matrices, which
        need an SVD of full size.

    Sums without pruning never become dense matrices: QR of the factors and an SVD of a small matrix are enough. A
    single adapter is combined by `linear` (`cat` for methods other than LoRA) if none of `svd_rank`, `svd_clamp` and
    `density` is given. Warns for options that the type ignores, and if an adapter's start changed the base. The new
    adapter gets copies of the modules that one of the adapters trains whole, and its token rows are W + Σ wᵢ (rowᵢ -
    W).

    Args:
        svd_clamp: cut the factors at ± this quantile of their values.
        svd_full_matrices: for compatibility; the result does not depend on it.
        svd_driver: the driver of torch.linalg.svd, on CUDA.
        density: the part of the values that pruning keeps.
        majority_sign_method: for ties, "total" (sign of the sum) or "frequency" (of the votes).

    Returns:
        Rank and, where something was truncated, retained energy of each layer.

    Raises:
        AdapterNotFoundError: one of the adapters is not loaded.
        AdapterNameError: `adapter_name` is taken, or cannot be a name.
        ConfigError: the adapters or options do not go together; a weight or a result is not finite in float32.
        NotImplementedError: adapters of this kind have no combination of this type.
    """
    names, weights = check_arguments(tuner, adapters, weights)
    peft_type = ", ".join(sorted({tuner.peft_config[name].peft_type.value for name in names}))
    kind = combination_type
    form = FORMS.get(peft_type) or UpdateForm()
    if len(names) == 1 and kind in TYPES and svd_rank is svd_clamp is density is None:
        kind = "linear" if form.takes_factors else "cat"
    recipe = Recipe(kind, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
    recipe.check(form, peft_type)
    for name in names if not form.takes_factors else ():  # an update of another method has no slices for each expert
        if getattr(tuner.peft_config[name], "target_parameters", None):
            raise ConfigError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}') together "
                f"with adapters of other methods ({peft_type}): combine the LoRA adapters only, or activate all, "
                f"base_model.set_adapter({names})."
            )
    configs = [tuner.peft_config[name] for name in names]
    parts = find_parts(tuner, names, weights, form)
    owner = adding.find_owners(tuner, names)
    cfg = form.make_config(configs)
    rows = adding.find_token_rows(tuner, names, weights, cfg)
    terms = {key: [form.read(m, w) for m, w in pairs] for key, pairs in parts.items()}
    ranks = recipe.ranks(terms)
    form.configure(cfg, ranks, adding.make_rank_patterns(ranks), configs)
    tuner.check_new(adapter_name, cfg)
    warn_if_base_changed(tuner, names, adapter_name, cfg)
    report = WeightedReport(adapter_name, kind, ranks)
    if recipe.is_random and form.takes_factors:
        draw_start(tuner, adapter_name, cfg, list(parts))
    values = {}
    for key, pairs in parts.items():
        try:
            A, B, energy = recipe.combine(terms.pop(key), ranks[key])
        except torch.linalg.LinAlgError as e:
            raise make_overflow_error(names, weights, key) from e
        values[key] = form.write(A, B, pairs, cfg)
        if not all(t.isfinite().all() for t in values[key].values()):
            raise make_overflow_error(names, weights, key)
        if energy is not None:
            report.energy[key] = energy
    inject_combined(tuner, adapter_name, cfg, values, owner, rows)
    return report


@prepares
@torch.no_grad()
@gather_whole
def add_weighted_vectors(tuner: Any, adapters: list[str], weights: list[float], adapter_name: str) -> WeightedReport:
    """Add an IA3 adapter, inactive and frozen, with the vectors Σ wᵢ lᵢ.

    Return a report of the type "linear", without ranks and energies. A call that fails changes nothing.

    An adapter without a vector on a layer counts with ones there. Targets and feed-forward modules are the unions of
    the adapters'. The model changes only when all vectors are computed and finite.

    Raises:
        AdapterNotFoundError: one of the adapters is not loaded.
        AdapterNameError: `adapter_name` is taken, or cannot be a name.
        ConfigError: the adapters do not go together, as with a feed-forward module of only some; a weight or a result
            is not finite in float32.
        ConfigTypeError: names or weights are no list.
    """
    names, weights = check_arguments(tuner, adapters, weights)
    configs = [tuner.peft_config[name] for name in names]
    owner = adding.find_owners(tuner, names)
    mixed = "All adapter configs should have the same type for target and feedforward modules."
    cfg = adding.union_configs(configs, mixed)
    cfg.feedforward_modules = adding.union_targets([c.feedforward_modules for c in configs], mixed)
    tuner.check_new(adapter_name, cfg)
    values: dict[str, Tensors] = {}
    for key, parts in find_parts(tuner, names, weights, ProductForm()).items():
        if len({m.inner for m, _ in parts}) > 1:
            raise ConfigError(
                f"Layer '{key}' is a feed-forward module of some of the adapters {names} and not of others, so that "
                "inputs and outputs are scaled. Combine only one kind."
            )
        l = rules.linear([widen(m.ia3_l) for m, _ in parts], [w for _, w in parts])
        values[key] = {("ia3_l", ""): l + (sum(weights) - sum(w for _, w in parts))}
        if not values[key]["ia3_l", ""].isfinite().all():
            raise make_overflow_error(names, weights, key)
    inject_combined(tuner, adapter_name, cfg, values, owner, {})
    return WeightedReport(adapter_name, "linear")


def add_weighted_mixed(
    tuner: Tuner, adapters: list[str], weights: list[float], adapter_name: str, *args: object, **kwargs: object
) -> WeightedReport:
    """Combine adapters of a mixed model: those of one kind as a model of their method does, all others by
    `add_weighted_adapter` as plain LoRA.

    One kind: all have the same function in `choose_combination`, other than `refuse_combination`. Names that are no
    adapters are left to the function. A ΔW without factors counts with the rank of a full matrix: pass `svd_rank`.

    Raises:
        NotImplementedError: an adapter has no ΔW, as IA3 or OFT, which act on inputs and outputs.
    """
    configs = tuner.peft_config
    functions = {choose_combination(configs[name].peft_type) for name in adapters if name in configs}
    combine = functions.pop() if len(functions) == 1 and refuse_combination not in functions else add_weighted_adapter
    return combine(tuner, adapters, weights, adapter_name, *args, **kwargs)


def refuse_combination(tuner: Any, *args: object, **kwargs: object) -> NoReturn:
    """Raise NotImplementedError: the parameters of this tuner's method cannot hold a sum of updates.

    The text names the alternatives.
    """
    method = tuner.method
    why = "their parameters cannot hold a sum of what they do"
    remedy = (
        "Activate them together instead, model.base_model.set_adapter([…]), or merge them, "
        "model.merge_adapter(adapter_names=[…]). Those that have a ΔW combine into a LoRA adapter in a PeftMixedModel, "
        "get_peft_model(…, mixed=True), or after graft.save_as_lora"
    )
    raise NotImplementedError(f"{method.__name__} adapters cannot be combined into one: {why}. {remedy}.")


TUNER_METHODS: dict[str, Callable[..., WeightedReport]] = {
    **dict.fromkeys(FORMS, add_weighted_adapter),
    "IA3": add_weighted_vectors,
}


def choose_combination(peft_type: str) -> Callable[..., WeightedReport]:
    """Return the combining function of a method: `add_weighted_adapter` for LoRA, AdaLoRA and LoHa,
    `add_weighted_vectors` for IA3, else `refuse_combination`.
    """
    return TUNER_METHODS.get(peft_type, refuse_combination)


# steps


def draw_start(tuner: Tuner, adapter_name: str, cfg: PeftConfig, keys: list[str]) -> None:
    """Draw the new adapter's initial values on these layers and drop them, since PEFT's pruning draws after those.

    This only advances torch's random generators; the layers stay. Warnings are silenced.
    """
    method = method_of(cfg.peft_type).variant(cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user saw them when the adapters came
        for key in keys:
            layer = tuner.layers[key]
            discard_initial_values(method(layer.site, cfg.at(key), adapter_name), {}, layer.call)


def check_arguments(tuner: Tuner, adapters: list[str], weights: list[float]) -> tuple[list[str], list[float]]:
    """Return names and weights as new lists, the weights by `float`. Any iterables are accepted.

    The checks run in this order:

    Raises:
        ConfigTypeError: `adapters` is a single str, or `weights` a single int or float.
        ConfigError: there is no adapter.
        AdapterNotFoundError: an adapter is not loaded.
        ConfigError: the numbers differ, or a weight is not finite in float32.
    """
    if isinstance(adapters, str):
        raise ConfigTypeError(f"adapters should be a list of names, got {adapters!r}. Write ['{adapters}'].")
    if isinstance(weights, (int, float)):
        raise ConfigTypeError(f"weights should be a list, one for each of {list(adapters)}, got {weights!r}.")
    names, numbers = list(adapters), [float(w) for w in weights]
    if not names:
        raise ConfigError("Found no adapter to combine: `adapters` is empty. Name one at least.")
    for name in names:
        if name not in tuner.peft_config:
            raise AdapterNotFoundError(
                f"Adapter {name} does not exist. Loaded adapters: {', '.join(tuner.peft_config)}."
            )
    if len(numbers) != len(names):
        raise ConfigError(f"Got {len(names)} adapters, {names}, and {len(numbers)} weights. Pass one for each.")
    if not all(map(is_finite, numbers)):
        raise ConfigError(f"weights must be finite in float32, got {numbers}. Give smaller ones.")
    return names, numbers


def make_overflow_error(names: list[str], weights: list[float], key: str) -> ConfigError:
    """Return the error for a combination that is not finite on a layer: it overflows float32, or an adapter has NaN."""
    return ConfigError(
        f"The combination of {names} with weights {weights} is not finite on layer '{key}'. Give smaller weights, or "
        "look for NaN in the adapters."
    )


def find_parts(tuner: Tuner, names: list[str], weights: list[float], form: ProductForm[Any]) -> dict[str, Parts]:
    """Return by path the (method, weight) of each adapter on a layer, for layers that have any of them, in the order of
    `names`.

    Raises:
        NotImplementedError: `form` cannot read a method, such as DoRA, which does more than add.
    """
    by_layer: dict[str, Parts] = {}
    for key, layer in tuner.layers.items():
        parts = [(layer.methods[n], w) for n, w in zip(names, weights) if n in layer.methods]
        for m, _ in parts:
            why = form.why_not(m)
            if why is not None:
                raise NotImplementedError(
                    f"{type(m).__name__} adapters cannot be combined: of '{m.name}' on layer '{key}', {why}. Merge "
                    "adapters into the base instead, one after the other."
                )
        if parts:
            by_layer[key] = parts
    return by_layer
