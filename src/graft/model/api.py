# SPDX-License-Identifier: Apache-2.0
"""get_peft_model makes a PeftModel of a model and a config; `plan` reports the same injection without making it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig, add_task_heads, check_config
from graft.config.prompt import PromptLearningConfig
from graft.config.reading import Json
from graft.core.carrier import SharedTensors
from graft.core.errors import AlreadyInjectedError, ConfigError, warn
from graft.core.gate import PATIENCE
from graft.core.method import AdaptedLayers, Method, build_placeholders
from graft.inject.inject import Injection
from graft.inject.job import Options
from graft.inject.parts import check_no_foreign_adapters, get_registry, unwrap_model
from graft.inject.report import InjectReport, Matched
from graft.inject.survey import survey_model
from graft.methods import ROWS, PeftType, config_of, method_of
from graft.model.mixed import PeftMixedModel
from graft.model.peft_model import PeftModel
from graft.model.registry import restore_on_error
from graft.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from graft.model.tuner import find_replaced_steps, tuner_of


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    heads: dict[str, nn.Module] | None = None,
    change_timeout: float | None = PATIENCE,
) -> PeftModel:
    """Inject an adapter into `model`, in place, activate it, and return the PeftModel of the config's task type around
    it.

    The model's name and `revision` are written into the config. Warns if the adapter's name is a part of the method's
    prefix in keys. An unknown task type, or none, gives a plain PeftModel.

    Args:
        model: any torch module; adapter layers replace modules of it.
        peft_config: the method and its settings, such as a LoraConfig.
        adapter_name: the adapter's name, for `set_adapter`, `adapter_names` and files.
        mixed: make a PeftMixedModel, for adapters of several methods.
        autocast_adapter_dtype: train half-precision adapters in float32.
        revision: the base model's, for the config.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device.
        heads: modules for the config's `modules_to_save`, by name, instead of copies of the base's.
        change_timeout: as in `PeftModel`.

    Raises:
        NoMatchingPeftModuleError: the config targets nothing in this model.
        AlreadyInjectedError: the model has adapters.
        UnsupportedLayerError: it targets a layer type that the method cannot adapt.
        ConfigError: it does not fit this model in another way. After each error model and config are as before.
    """
    check_config(peft_config)
    get_registry(model)  # raises if it is no model
    tree = survey_model(model)
    if tree.layers:
        raise AlreadyInjectedError(
            "You are trying to modify a model with PEFT for a second time. For another adapter call add_adapter() of "
            "the PeftModel, and delete_adapter() to replace one. To start over, make sure to call `.unload()` before."
        )
    prefix = method_of(peft_config.peft_type).prefix
    if adapter_name and adapter_name in prefix:
        warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. graft keeps them apart, "
            "but PEFT may not find all keys of a checkpoint that it loads under that name."
        )
    cls = PeftMixedModel if mixed else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    with restore_on_error(peft_config):
        record_origin(model, peft_config, revision)
        options = Options(autocast_adapter_dtype, low_cpu_mem_usage, heads=heads)
        return cls(model, peft_config, adapter_name, change_timeout=change_timeout, options=options, tree=tree)


def record_origin(model: nn.Module, config: PeftConfig, revision: str | None) -> None:
    """Write the base model's `name_or_path` and `revision` into the config.

    The name is that in the model's `__dict__`; None if it is missing there or empty.

    Warn if the config has another name, or another revision. `revision=None` leaves the config's.
    """
    old, new = config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    if old is not None and old != new:
        warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. "
            "The checkpoint will name the latter as its base model."
        )
    config.base_model_name_or_path = new
    if revision is not None:
        if config.revision is not None and config.revision != revision:
            warn(
                f"peft config has already set base model revision to {config.revision}, overwriting with revision "
                f"{revision}"
            )
        config.revision = revision


def get_peft_config(config_dict: Json) -> PeftConfig:
    """Return a config of the class that `config_dict["peft_type"]` names. Raises KeyError without that key."""
    return PeftConfig.resolve(config_dict["peft_type"])(**config_dict)


# a plan


def plan(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> InjectReport:
    """Return the report of injecting `config`, with heads of its task: layers, trainable parameters, skipped modules
    and why.

    Print it to see a table.

    The model and `config` do not change; the model may be on the meta device or have adapters. No memory is allocated,
    except a prompt's for a moment. Warnings are suppressed, since the report contains them.

    Raises:
        NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: as `get_peft_model` would; ConfigError also for a
            config without `target_modules` (X-LoRA), which adapts no layers itself.
        TypeError: `config` is no config of graft.
        AlreadyInjectedError: the model has adapters of another package.
    """
    check_config(config)
    check_no_foreign_adapters(unwrap_model(model))
    method = method_of(config.peft_type)
    config = copy.copy(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        add_task_heads(config)
        if isinstance(config, PromptLearningConfig):
            from graft.model.prompts import Prompts  # not needed for adapters on layers

            return Prompts.plan(model, config, adapter_name)
        if not hasattr(config, "target_modules"):
            raise ConfigError(f"{config.peft_type.value} adapts no layers itself: plan its experts, one by one.")
        injection = Injection(model, config, method, adapter_name, steps=find_replaced_steps(model, config))
        with injection.restructure_model(keep=False):
            return _fill_report(injection.find(), method, adapter_name)


def _fill_report(injection: Injection, method: type[Method], adapter_name: str) -> InjectReport:
    """Return the report of an injection that has found its targets.

    Its `matched` gets entries for them, then for tied modules; its `modules_to_save` those of heads and token rows.

    Parameters are counted on the meta device; the model does not change. Those that layers share are added to
    `other_trainable`. Of a tied target, the parameters of its source count again, unless it is always tied: then it has
    0.
    """
    report = injection.report
    with torch.device("meta"):
        shared = SharedTensors()
        if method.shares:
            sites = [m.site for m in injection.local_methods.values()]
            values = method.share(AdaptedLayers(injection.model, sites, injection.cfg))
            report.other_trainable += shared.hold(adapter_name, values, (None, None), False)
        for m in injection.local_methods.values():
            report.matched.append(describe_target(m, shared.wrap_containers()))
    sizes = {m.name: m.parameters for m in report.matched}
    for key, m in injection.methods.items():
        if m.source is not None:
            size = 0 if m.always_tied else sizes[m.source.site.key]
            report.matched.append(Matched(key, m.site.type_name, size))
    injection.report_heads_and_rows()
    return report


def describe_target(method: Method, shared: dict[str, object]) -> Matched:
    """Return a report's row for one target: path, type, number of trainable parameters without borrowed ones, and
    shapes.

    The tensors are placeholders that are built for this. Shapes are texts "name (n, m)" of all parameters, borrowed and
    frozen ones included.
    """
    site, values = method.site, build_placeholders(method, shared)
    sized = [(name, p) for name, v in values.items() for p in _parameters_in(v)]
    shapes = tuple(f"{name} {tuple(p.shape)}" for name, p in sized)
    count = sum(p.numel() for name, p in sized if p.requires_grad and name not in method.lenders)
    return Matched(site.key, site.type_name, count, shapes)


def _parameters_in(value: object) -> list[Tensor]:
    """Return the parameters of a placeholder: [itself], those of a module, or []."""
    if isinstance(value, nn.Parameter):
        return [value]
    return list(value.parameters()) if isinstance(value, nn.Module) else []


# by peft_type, as in PEFT; reading a value imports the method's file


T = TypeVar("T")


class _TypeTable(Mapping[str, T]):
    """A read-only mapping from peft_type, as text or member of the enum, to a value that a function makes on access."""

    def __init__(self, of: Callable[[str], T]):
        """Keep the function that makes a value of a peft_type."""
        self._of = of

    def __getitem__(self, peft_type: str) -> T:
        """Return the value of a peft_type; KeyError for an unknown one."""
        if getattr(peft_type, "value", peft_type) not in ROWS:
            raise KeyError(peft_type)
        return self._of(peft_type)

    def __iter__(self) -> Iterator[str]:
        """Iterate over all members of PeftType."""
        return iter(PeftType)

    def __len__(self) -> int:
        """Return the number of methods."""
        return len(ROWS)


PEFT_TYPE_TO_CONFIG_MAPPING = _TypeTable(config_of)
PEFT_TYPE_TO_TUNER_MAPPING = _TypeTable(tuner_of)
PEFT_TYPE_TO_PREFIX_MAPPING = _TypeTable(lambda peft_type: method_of(peft_type).prefix)
