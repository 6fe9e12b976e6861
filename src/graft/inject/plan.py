# SPDX-License-Identifier: Apache-2.0
"""`plan`: what a config would do to a model, without touching either."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.method import Method
from graft.inject.inject import survey_and_match
from graft.inject.report import InjectReport, Matched
from graft.inject.saved import add_task_heads
from graft.inject.survey import kind_of
from graft.methods import method_of


def plan(model: nn.Module, config: Any, adapter_name: str = "default") -> InjectReport:
    """What injecting `config` would do: layers, trainable parameters, skipped modules and why.

    Nothing is allocated and nothing changes; the model may be on the meta device. Print the result to see a table.

    Raises:
        NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: as `get_peft_model` would.
    """
    method = method_of(config.peft_type)
    config = copy.copy(config)
    add_task_heads(config)
    undo = method.restructure(config, model)
    try:
        return _plan(model, config, method, adapter_name)
    finally:
        if undo is not None:
            undo()


def _plan(model: nn.Module, config: Any, method: type[Method], adapter_name: str) -> InjectReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same, in one place
        made = survey_and_match(model, config, method, adapter_name)
        with torch.device("meta"):
            shared = method.share(list(made.sites.values()), made.cfg, {}, {}) if method.shares else {}
            for key, site in made.sites.items():
                cfg = made.cfg.at(key)
                values = method.variant(cfg).build(site, cfg, shared)
                sized = [(name, p) for name, v in values.items() for p in _parameters(v)]
                shapes = tuple(f"{name} {tuple(p.shape)}" for name, p in sized)
                made.report.matched.append(Matched(key, site.type_name, sum(p.numel() for _, p in sized), shapes))
        report = {m.name: m for m in made.report.matched}
        for key, source in made.followers.items():
            if source in report:
                twin = report[source]
                made.report.matched.append(Matched(key, kind_of(made.tree.modules[key]), twin.parameters))
    for key in made.saved:
        module = made.tree.modules[key]
        size = sum(p.numel() for p in module.parameters())
        made.report.modules_to_save.append(Matched(key, type(module).__name__, size))
    return made.report


def _parameters(value: Any) -> list[Tensor]:
    if isinstance(value, nn.Parameter):
        return [value]
    return list(value.parameters()) if isinstance(value, nn.Module) else []
