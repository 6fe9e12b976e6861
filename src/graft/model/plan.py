# SPDX-License-Identifier: Apache-2.0
"""`plan`: the report of an injection that leaves model and config alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ConfigError
from graft.core.method import Layers, Method
from graft.core.shared import Shared
from graft.inject.beside import add_task_heads
from graft.inject.inject import Injection
from graft.inject.report import InjectReport, Matched
from graft.inject.survey import kind_of, site_of
from graft.methods import method_of
from graft.methods.trainable_tokens import TrainableTokens, TrainableTokensConfig
from graft.model.prompts import Prompts
from graft.model.tuner import steps_for


def plan(model: nn.Module, config: Any, adapter_name: str = "default") -> InjectReport:
    """Return the report of injecting `config`: layers, trainable parameters, skipped modules and why.

    Allocate nothing (but a prompt, for a moment) and change nothing; the model may be on the meta device. Print the
    report to see a table.

    Raises:
        NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: as `get_peft_model` would.
    """
    method = method_of(config.peft_type)
    config = copy.copy(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        add_task_heads(config)
        if config.is_prompt_learning:
            return Prompts.plan(model, config, adapter_name)
        if not hasattr(config, "target_modules"):
            raise ConfigError(f"{config.peft_type.value} adapts no layers itself: plan its experts, one by one.")
        made = Injection(model, config, method, adapter_name, steps=steps_for(model, config))
        with made.restructured(keep=False):
            return _plan(made.find(), method, adapter_name)


def _plan(made: Injection, method: type[Method], adapter_name: str) -> InjectReport:
    report, modules = made.report, made.tree.modules
    with torch.device("meta"):
        shared = Shared()
        if method.shares:
            values = method.share(Layers(made.model, list(made.sites.values()), made.cfg))
            report.other_trainable += shared.hold(adapter_name, values, (None, None), False)
        for key in made.sites:
            report.matched.append(matched(made.methods[key], shared.attached()))
    sizes = {m.name: m.parameters for m in report.matched}
    for key, source in made.tied_modules.items():
        if source in sizes:
            size = 0 if method.always_tied else sizes[source]
            report.matched.append(Matched(key, kind_of(modules[key]), size))
    made.count_saved()
    for key, indices in made.tokens.items():
        if key not in made.tied_rows:
            site = site_of(key, modules[key], made.tree)
            rows = TrainableTokens(site, TrainableTokensConfig(token_indices=indices), adapter_name)
            size = matched(rows, {}).parameters
            report.modules_to_save.append(Matched(key, f"{len(indices)} tokens", size))
    return report


def matched(method: Method, shared: dict[str, Any]) -> Matched:
    site, values = method.site, method.placeholders(shared)
    sized = [(name, p) for name, v in values.items() for p in _parameters(v)]
    shapes = tuple(f"{name} {tuple(p.shape)}" for name, p in sized)
    return Matched(
        site.key,
        site.type_name,
        sum(p.numel() for name, p in sized if p.requires_grad and name not in method.lenders),
        shapes,
    )


def _parameters(value: Any) -> list[Tensor]:
    if isinstance(value, nn.Parameter):
        return [value]
    return list(value.parameters()) if isinstance(value, nn.Module) else []
