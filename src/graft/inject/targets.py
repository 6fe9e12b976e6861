# SPDX-License-Identifier: Apache-2.0
"""The meaning of `target_modules` in a model: defaults by architecture, "all-linear", compression of long lists."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.core.base_config import model_type
from graft.core.carrier import layer_in
from graft.core.errors import ConfigError
from graft.core.method import Method
from graft.core.ops import find_op
from graft.inject.match import Names, minimal_names
from graft.inject.survey import uncovered

ALL_LINEAR = "all-linear"
DUMMY = "dummy-target-modules"  # inject into no module
COMPRESS_FROM = 20  # names: this many become the shortest suffixes that tell them apart from others
HEAD_NAMES = ("score", "classifier")


def resolve_targets(cfg: Any, method: type[Method], model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Complete `cfg.target_modules` in place."""
    if cfg.target_modules is None and getattr(cfg, "target_parameters", None):
        return
    if cfg.target_modules is None:
        defaults = method.default_targets(model)
        if defaults is None:
            what = (
                "`target_modules` or `target_parameters`in"
                if hasattr(cfg, "target_parameters")
                else "`target_modules` in"
            )
            raise ConfigError(
                f"Please specify {what} `peft_config`: there are no defaults for model_type '{model_type(model)}'."
            )
        cfg.target_modules = defaults if isinstance(defaults, str) else set(defaults)
    if isinstance(cfg.target_modules, str):
        if cfg.target_modules.lower() == ALL_LINEAR:
            cfg.target_modules = all_linear(cfg, model, modules)
        else:
            return
    if len(cfg.target_modules) >= COMPRESS_FROM and method.compresses_targets:
        ends = Names(cfg.target_modules)
        shorter = minimal_names(cfg.target_modules, [k for k in modules if ends.find(k) is None])
        if len(shorter) < len(cfg.target_modules):
            cfg.target_modules = shorter


def all_linear(cfg: Any, model: Any, modules: dict[str, nn.Module]) -> set[str]:
    """Return the names of all linear layers but the output head."""
    head: nn.Module | None = None
    if hasattr(model, "get_output_embeddings"):
        head = uncovered(model.get_output_embeddings())
        if head is None and cfg.task_type == "SEQ_CLS":
            head = next((getattr(model, n) for n in HEAD_NAMES if isinstance(getattr(model, n, None), nn.Module)), None)
    return {key for key, m in modules.items() if is_linear(m) and not is_or_wraps(m, head)}


def is_linear(module: nn.Module) -> bool:
    layer = layer_in(module)
    return find_op(module).linear if layer is None else layer.op.linear


def is_or_wraps(module: nn.Module, other: nn.Module | None) -> bool:
    return other is not None and (module is other or any(m is other for m in module.modules()))
