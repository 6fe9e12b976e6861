# SPDX-License-Identifier: Apache-2.0
"""An adapter made from others: its config (layers, ranks, modules to save), and the injection with its values."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.config.fields import Targets
from graft.core.containers import Slot
from graft.core.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning, UnsupportedLayerError, warn
from graft.core.folding import widen
from graft.core.layer import AdapterLayer
from graft.core.method import Method, Tuner
from graft.inject.job import Options, TensorWriter
from graft.inject.parts import AdapterCarriers
from graft.inject.survey import Wrapper
from graft.methods import config_of, method_of

if TYPE_CHECKING:
    from graft.methods.lora.config import LoraConfig

Tensors = dict[tuple[str, str], Tensor]  # by (container, path below the adapter's name)
Rows = dict[str, list[tuple[Method, float]]]  # (TrainableTokens, weight) of each adapter, by path of the module

MIXED = (
    "all adapter configs should follow the same target modules type. Combining adapters with `target_modules` type "
    "being a mix of list/set and string is not supported."
)


def union_configs(configs: Sequence[Any], mixed: str = MIXED, like: Any = None) -> Any:
    """Return a deep copy of `like`, by default the first config, with the union of all targets, target parameters and
    modules to save. Layer replication and token indices are those of the first config that has them.

    Fields that `like` lacks are not added, except modules_to_save. Without any name, target_parameters and
    modules_to_save become None.

    Raises:
        ConfigError: some targets are names and others a regular expression; the message is `mixed`.
    """
    cfg = copy.deepcopy(configs[0] if like is None else like)
    cfg.target_modules = union_targets([c.target_modules for c in configs], mixed)
    for name in ("layer_replication", "trainable_token_indices"):
        if hasattr(cfg, name):
            setattr(cfg, name, next((v for c in configs if (v := getattr(c, name, None)) is not None), None))
    if hasattr(cfg, "target_parameters"):
        cfg.target_parameters = union_names(getattr(c, "target_parameters", None) for c in configs)
    cfg.modules_to_save = union_names(getattr(c, "modules_to_save", None) for c in configs)
    return cfg


def union_names(lists: Iterable[Iterable[str] | None]) -> list[str] | None:
    """Return the names in any of these lists, each once, in the order of first occurrence; None if there are none.

    A list may be None.
    """
    return list(dict.fromkeys(name for names in lists for name in names or ())) or None


def make_plain_config(configs: Sequence[PeftConfig]) -> LoraConfig:
    """Return a LoraConfig with the union of all targets of these configs of any methods.

    Exclusions, layer ranges, task type, base and revision are those of the first; all other fields have their defaults.
    Raises ConfigError if some targets are names and others a regular expression.
    """
    first = configs[0]
    names = ("task_type", "base_model_name_or_path", "revision")
    like = config_of("LORA")(**{name: getattr(first, name) for name in names})
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(like, name, getattr(first, name, None))
    return union_configs(configs, like=like)


def union_targets(targets: Sequence[str | Collection[str] | None], mixed: str) -> str | set[str]:
    """Return one value of `target_modules` that selects all modules of any: a regular expression of alternatives, each
    in parentheses, or a set of names.

    None counts as an empty collection; only None gives an empty set. Raises ConfigError with the text `mixed` if some
    are expressions and others are not. An empty sequence raises IndexError.
    """
    if len({isinstance(t, str) for t in targets}) > 1:
        raise ConfigError(mixed)
    if isinstance(targets[0], str):
        return "|".join(f"({t})" for t in targets)
    return set().union(*(t or () for t in targets))


def target_exactly(cfg: PeftConfig, keys: Iterable[str], parameters: Sequence[str] = ()) -> None:
    """Change `cfg` so that it targets exactly the layers at these paths; those in `parameters` by `target_parameters`.

    `target_modules` becomes a regular expression of the other paths, escaped, with "|" between them, or [] if there are
    none. Without `parameters` the field `target_parameters` stays. Exclusions and layer ranges become None, where the
    config has them.
    """
    modules = [re.escape(key) for key in keys if key not in parameters]
    cfg.target_modules = "|".join(modules) if modules else []
    if parameters:
        cfg.target_parameters = list(parameters)
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(cfg, name):
            setattr(cfg, name, None)


def make_rank_patterns(ranks: dict[str, int]) -> dict[str, int]:
    """Return rank patterns for the layers with another rank than the highest; {} if all have one rank.

    A pattern is the layer's last name, if all layers of this name have one rank, else "^" and its path; both are
    escaped as regular expressions.
    """
    usual = max(ranks.values())
    by_name: dict[str, set[int]] = {}
    for key, r in ranks.items():
        by_name.setdefault(key.rpartition(".")[2], set()).add(r)
    patterns: dict[str, int] = {}
    for key, r in ranks.items():
        if r != usual:
            name = key.rpartition(".")[2]
            patterns[re.escape(name) if len(by_name[name]) == 1 else f"^{re.escape(key)}"] = r
    return patterns


# modules outside the adapted layers


def find_owners(tuner: Tuner, names: Sequence[str]) -> dict[str, str]:
    """Return by path the adapter of `names` that trains a whole copy of a module.

    Modules with token rows do not count, nor do those without such an adapter. A name that is there twice counts once.

    Raises:
        ConfigError: two of the adapters have a copy of one module, since copies cannot be added.
    """
    whole = {key: w for key, w in tuner.wrappers.items() if not w.takes_rows}
    copies = {key: [n for n in dict.fromkeys(names) if n in w.adapters] for key, w in whole.items()}
    shared = {key: adapters for key, adapters in copies.items() if len(adapters) > 1}
    if shared:
        where = ", ".join(f"'{key}' of {adapters}" for key, adapters in shared.items())
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s). Each has its own copy, which cannot be combined: {where}."
        )
    return {key: adapters[0] for key, adapters in copies.items() if adapters}


def copy_heads(tuner: Tuner, owner: dict[str, str], cfg: Targets) -> dict[str, nn.Module]:
    """Return deep copies of the owners' modules for the new adapter, by path, if the path ends with a name of
    `cfg.modules_to_save`, also inside a part.

    Tied modules are not among them; the injection ties them again.
    """
    return {
        key: copy.deepcopy(tuner.wrappers[key].modules_to_save[name])
        for key, name in owner.items()
        if any(key.endswith(n) for n in cfg.modules_to_save or ())
    }


def find_token_rows(tuner: Tuner, names: Sequence[str], weights: Sequence[float], cfg: PeftConfig) -> Rows:
    """Return by path the (method, weight) of each named adapter that trains token rows of a module.

    A module that none of them trains has an empty list. If token indices of the adapters differ, sets
    `cfg.trainable_token_indices` to their union: a sorted list if all are lists, otherwise a dict of sorted lists by
    path, without paths that none trains.
    """
    wrappers = {key: w for key, w in tuner.wrappers.items() if w.takes_rows}
    rows = {key: [(w.methods[n], x) for n, x in zip(names, weights) if n in w.methods] for key, w in wrappers.items()}
    indices = [v for n in names if (v := getattr(tuner.peft_config[n], "trainable_token_indices", None))]
    if any(v != indices[0] for v in indices):
        tokens = {key: sorted({t for m, _ in pairs for t in m.token_indices}) for key, pairs in rows.items() if pairs}
        lists = not any(isinstance(v, dict) for v in indices)  # rows of the input embedding
        cfg.trainable_token_indices = sorted(set().union(*indices)) if lists else tokens
    return rows


def warn_if_base_changed(tuner: Tuner, names: list[str], adapter_name: str, cfg: PeftConfig) -> None:
    """Give one PeftWarning if an adapter's initialisation changed the base and the new adapter's (`cfg`) does not: then
    the new one fits only this changed base.
    """
    if find_start_change(cfg):
        return
    changed = [n for n in dict.fromkeys(names) if find_start_change(tuner.peft_config[n])]
    if changed:
        warn(
            f"The initialisation of {changed} changed the base weights, so that '{adapter_name}' will not fit a fresh "
            "base. Save the base as well.",
            PeftWarning,
        )


def find_start_change(cfg: PeftConfig) -> str | None:
    """Return the setting of a config that makes its initialisation change the base weights, such as
    "init_lora_weights='pissa'".

    It is the answer of `changes_base` of the method's variant for this config. Return None if that is None, or if the
    variant has no `changes_base`.
    """
    setting_of = getattr(method_of(cfg.peft_type).variant(cfg), "changes_base", None)
    return None if setting_of is None else setting_of(cfg)


class OtherLayersError(Exception):
    """A config selects other layers than those that were combined."""


class CombinedValues:
    """The values of a new adapter for its injection: of each layer by path, and the pairs (method, weight) for token
    rows.
    """

    names = ()  # of no file

    def __init__(self, values: dict[str, Tensors], rows: Rows):
        self.values, self.rows = values, rows

    def make_head(self, key: str, module: nn.Module) -> None:
        """Return None: heads are passed as modules."""
        return None

    def check_room(self, numbers: float) -> None:
        """Do nothing: the config was made for the values."""

    def match_entries(self, parts: AdapterCarriers, adapter: str) -> list[tuple[TensorWriter, Tensor]]:
        """Return for each slot of the new adapter a writer (`fill_slot`) and its value: those of layers as given, token
        rows computed by `combine_rows`.

        All saved slots of a token rows' carrier get the same rows. Whole copies of modules get nothing here.

        Raises:
            OtherLayersError: the adapter has other layers than the values.
            ConfigError: a layer shares its tokens' rows with the embedding, and not all adapters do.
        """
        if set(parts.layers) != set(self.values):
            raise OtherLayersError
        out: list[tuple[TensorWriter, Tensor]] = []
        for key, layer in parts.layers.items():
            values = self.values[key]
            out += [
                (partial(fill_slot, layer, slot), values[slot.container, slot.path]) for slot in layer.slots(adapter)
            ]
        for key, host in parts.wrappers.items():
            if host.takes_rows:
                pairs = self.rows[key]
                if host.methods[adapter].lenders and not all(m.lenders for m, _ in pairs):
                    raise ConfigError(
                        f"'{key}' shares its weight with the embedding, and its rows are its own in some of the "
                        f"adapters {[m.name for m, _ in pairs]}, so that adapter '{adapter}' cannot hold their sum. "
                        "Combine the others."
                    )
                rows = combine_rows(host.methods[adapter], pairs)
                out += [(partial(fill_slot, host, slot), rows) for slot in host.slots(adapter) if slot.saved]
        return out


def combine_rows(method: Method, pairs: list[tuple[Method, float]]) -> Tensor:
    """Return W + Σ wᵢ (rowᵢ - W) for the token rows of a new adapter, in its order of tokens.

    W are the rows that it has now, in float32 at least. An adapter without a token leaves this token's W. Nothing is
    written. A token that the new adapter lacks raises KeyError.
    """
    base = widen(method.trainable_tokens_delta)
    out, left = torch.zeros_like(base), torch.ones_like(base[:, :1])
    place = {token: i for i, token in enumerate(method.token_indices)}
    for m, weight in pairs:
        at = [place[token] for token in m.token_indices]
        out[at] += widen(m.rows) * weight
        left[at] -= weight
    return (out + base * left)[[place[token] for token in method.token_indices]]  # a token may have several rows


def fill_slot(layer: AdapterLayer | Wrapper, slot: Slot, value: Tensor) -> None:
    """Write a copy of a value into a slot of a layer, reshaped to the slot's shape, in its dtype, contiguous, on the
    layer's device. A slot on the meta device gets a new tensor.
    """
    shape, dtype, device = slot.tensor.shape, slot.tensor.dtype, layer.where[0]
    slot.assign(value.detach().reshape(shape).to(device=device, dtype=dtype).contiguous(), device)


def inject_combined(
    tuner: Any,
    name: str,
    cfg: Targets,
    values: dict[str, Tensors],
    owner: dict[str, str],
    rows: Rows,
    widened: bool = True,
) -> None:
    """Inject the new adapter with its values: in float32 if `widened`, else in half precision on layers of such a
    dtype. Warnings of the injection are silenced.

    If the config selects other layers than the values, none, or one that the method cannot adapt, change it to target
    exactly these, and inject again. There, layers with another path than their site's become target parameters. Heads
    are copied from the adapters in `owner`.
    """

    def inject() -> None:
        """Add the adapter with the values, rows and copies of heads."""
        tuner.add_adapter(
            name, cfg, Options(widened, False, CombinedValues(values, rows), copy_heads(tuner, owner, cfg))
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user saw them when the adapters came
        try:
            inject()
        # exclusions or layer ranges differ
        except (OtherLayersError, NoMatchingPeftModuleError, UnsupportedLayerError):
            sites = {key: tuner.layers[key].site for key in values}
            target_exactly(cfg, values, [key for key, site in sites.items() if site.path != key])
            inject()
