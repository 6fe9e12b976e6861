# SPDX-License-Identifier: Apache-2.0
"""The config of an adapter made of others: its layers, its ranks, its modules to save."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from graft.core.errors import ConfigError
from graft.methods import config_of

Rows = dict[str, list[tuple[Any, float]]]  # (TrainableTokens, weight) of each adapter, by path of the module

MIXED = (
    "all adapter configs should follow the same target modules type. Combining adapters with `target_modules` type "
    "being a mix of list/set and string is not supported."
)


def union_of(configs: Sequence[Any], mixed: str = MIXED, like: Any = None) -> Any:
    """Return a copy of `like`, by default the first config, that targets all that any of the configs does.

    Raises:
        ConfigError: some targets are names and others a regular expression, with `mixed` as the message.
    """
    cfg = copy.deepcopy(configs[0] if like is None else like)
    cfg.target_modules = either([c.target_modules for c in configs], mixed)
    for name in ("layer_replication", "trainable_token_indices"):
        if hasattr(cfg, name):
            setattr(cfg, name, next((v for c in configs if (v := getattr(c, name, None)) is not None), None))
    if hasattr(cfg, "target_parameters"):
        cfg.target_parameters = union_of_names(getattr(c, "target_parameters", None) for c in configs)
    saved = [name for c in configs for name in getattr(c, "modules_to_save", None) or ()]
    cfg.modules_to_save = list(dict.fromkeys(saved)) or None
    return cfg


def union_of_names(lists: Iterable[Iterable[str] | None]) -> list[str] | None:
    """Return the names in any of these, each once, in their order."""
    return list(dict.fromkeys(name for names in lists for name in names or ())) or None


def plain_lora(configs: Sequence[Any]) -> Any:
    """Return a config of plain LoRA that targets all that any of these configs of any methods does."""
    first = configs[0]
    like = config_of("LORA")(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(like, name, getattr(first, name, None))
    return union_of(configs, like=like)


def either(targets: Sequence[Any], mixed: str) -> Any:
    """Return one value of `target_modules` that selects all that any of them does."""
    if len({isinstance(t, str) for t in targets}) > 1:
        raise ConfigError(mixed)
    if isinstance(targets[0], str):
        return "|".join(f"({t})" for t in targets)
    return set().union(*(t or () for t in targets))


def name_exactly(cfg: Any, keys: Iterable[str], parameters: Sequence[str] = ()) -> None:
    """Make `cfg` target the layers at these paths and no others, those of `parameters` by their own names."""
    modules = [re.escape(key) for key in keys if key not in parameters]
    cfg.target_modules = "|".join(modules) if modules else []
    if parameters:
        cfg.target_parameters = list(parameters)
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(cfg, name):
            setattr(cfg, name, None)


def rank_patterns(ranks: dict[str, int]) -> dict[str, int]:
    """Return patterns for the layers whose rank is not the highest: by last names where these tell them apart."""
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


# modules beside the layers


def owners(tuner: Any, names: Sequence[str]) -> dict[str, str]:
    """Return the adapter that has its own copy of a module, by path.

    Raises:
        ConfigError: two have a copy of the same module: copies are no updates that add up.
    """
    whole = {key: w for key, w in tuner.wrappers.items() if not w.takes_rows}
    found = {key: [n for n in dict.fromkeys(names) if n in w.adapters] for key, w in whole.items()}
    shared = {key: own for key, own in found.items() if len(own) > 1}
    if shared:
        where = ", ".join(f"'{key}' of {own}" for key, own in shared.items())
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s). Each has its own copy, which cannot be combined: {where}."
        )
    return {key: own[0] for key, own in found.items() if own}


def heads(tuner: Any, owner: dict[str, str], cfg: Any) -> dict[str, nn.Module]:
    """Copy the modules trained whole for the new adapter. Tied ones follow by themselves."""
    return {
        key: copy.deepcopy(tuner.wrappers[key].modules_to_save[name])
        for key, name in owner.items()
        if any(key.endswith(n) for n in cfg.modules_to_save or ())
    }


def rows_of(tuner: Any, names: Sequence[str], weights: Sequence[float], cfg: Any) -> Rows:
    """Return who trains rows of a module, by path. `cfg` names all of these rows."""
    wrappers = {key: w for key, w in tuner.wrappers.items() if w.takes_rows}
    rows = {
        key: [(w.token_adapter.methods[n], x) for n, x in zip(names, weights) if n in w.adapters]
        for key, w in wrappers.items()
    }
    given = [v for n in names if (v := getattr(tuner.peft_config[n], "trainable_token_indices", None))]
    if any(v != given[0] for v in given):
        tokens = {key: sorted({t for m, _ in found for t in m.token_indices}) for key, found in rows.items() if found}
        lists = not any(isinstance(v, dict) for v in given)  # rows of the input embedding
        cfg.trainable_token_indices = sorted(set().union(*given)) if lists else tokens
    return rows
