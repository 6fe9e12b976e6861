# SPDX-License-Identifier: Apache-2.0
"""get_peft_model: from a model and a config to a PeftModel."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.config.base import PeftConfig
from graft.core.errors import AlreadyInjectedError, warn
from graft.core.gate import PATIENCE
from graft.inject.survey import survey
from graft.methods import method_of
from graft.model.mixed import PeftMixedModel
from graft.model.peft_model import PeftModel
from graft.model.registry import unless_it_fails
from graft.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING


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
    """Inject an adapter into `model`, in place, and wrap it in the PeftModel class of the config's task type.

    Args:
        mixed: make a PeftMixedModel, for adapters of several methods.
        autocast_adapter_dtype: train half-precision adapters in float32.
        revision: the base model's, for the config.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device.
        heads: modules for the config's `modules_to_save`, instead of copies of the base's, by name.
        change_timeout: as in `PeftModel`.

    Raises:
        NoMatchingPeftModuleError: the config targets nothing in this model.
        AlreadyInjectedError: the model has adapters.
        UnsupportedLayerError: it targets a layer type that the method cannot adapt.
        ConfigError: it does not fit this model in another way. In each case nothing has changed.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a PeftConfig, got {type(peft_config).__name__}.")
    tree = survey(model)
    if tree.layers:
        raise AlreadyInjectedError(
            "You are trying to modify a model with PEFT for a second time. For another adapter beside the one it has, "
            "call add_adapter() of the model you got; to replace it, delete_adapter() before; to start over, make sure "
            "to call `.unload()` before."
        )
    hint_at_name(adapter_name, peft_config)
    cls = PeftMixedModel if mixed else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    with unless_it_fails(peft_config):
        record_origin(model, peft_config, revision)
        return cls(
            model,
            peft_config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            heads=heads,
            tree=tree,
            change_timeout=change_timeout,
        )


def hint_at_name(adapter_name: str, config: Any) -> None:
    prefix = method_of(config.peft_type).prefix
    if adapter_name and adapter_name in prefix:
        warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. graft keeps them apart, "
            "but PEFT may not find all keys of a checkpoint that it loads under that name."
        )


def record_origin(model: nn.Module, config: Any, revision: str | None) -> None:
    """Write the base model's name and revision into the config."""
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


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Make a config of the class that `config_dict["peft_type"]` names."""
    return PeftConfig.resolve(config_dict["peft_type"])(**config_dict)
