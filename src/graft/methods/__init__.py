# SPDX-License-Identifier: Apache-2.0
"""The table of methods: one line each. A method's file is imported when it is first used."""

from __future__ import annotations

from enum import Enum
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from graft.config.base import PeftConfig
from graft.core.errors import ConfigError


class Row(NamedTuple):
    method: str  # "module:Class" below graft.methods
    config: str  # public name of its config
    tuner: str  # public name of the model class that holds it; of a prompt, its encoder


METHODS: dict[str, Row] = {
    "LORA": Row("lora:LoRA", "LoraConfig", "LoraModel"),
    "ADALORA": Row("adalora:AdaLoRA", "AdaLoraConfig", "AdaLoraModel"),
    "IA3": Row("ia3:IA3", "IA3Config", "IA3Model"),
    "VERA": Row("vera:VeRA", "VeraConfig", "VeraModel"),
    "LOHA": Row("loha:LoHa", "LoHaConfig", "LoHaModel"),
    "OFT": Row("oft:OFT", "OFTConfig", "OFTModel"),
    "HRA": Row("hra:HRA", "HRAConfig", "HRAModel"),
    "TRAINABLE_TOKENS": Row("trainable_tokens:TrainableTokens", "TrainableTokensConfig", "TrainableTokensModel"),
    "LN_TUNING": Row("ln_tuning:LNTuning", "LNTuningConfig", "LNTuningModel"),
    "ADAPTION_PROMPT": Row("adaption_prompt:AdaptionPrompt", "AdaptionPromptConfig", "AdaptionPromptModel"),
}
PROMPTS: dict[str, Row] = {
    "PROMPT_TUNING": Row("prompt_tuning:PromptEmbedding", "PromptTuningConfig", "PromptEmbedding"),
    "P_TUNING": Row("p_tuning:PromptEncoder", "PromptEncoderConfig", "PromptEncoder"),
    "PREFIX_TUNING": Row("prefix_tuning:PrefixEncoder", "PrefixTuningConfig", "PrefixEncoder"),
    "MULTITASK_PROMPT_TUNING": Row(
        "multitask_prompt_tuning:MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptEmbedding"
    ),
    "CPT": Row("cpt:CPTEmbedding", "CPTConfig", "CPTEmbedding"),
    "CARTRIDGE": Row("cartridge:CartridgeEncoder", "CartridgeConfig", "CartridgeEncoder"),
}
ROWS = METHODS | PROMPTS

PeftType = Enum("PeftType", {name: name for name in ROWS}, type=str, module=__name__)  # type: ignore[misc]
PeftType.__doc__ = "The methods, by the name that adapter_config.json uses."


@cache
def method_of(peft_type: str) -> Any:
    """The Method class of a peft_type, or the Prompt class; imports its file.

    Raises:
        ConfigError: there is no such method.
    """
    name = getattr(peft_type, "value", peft_type)
    if name not in ROWS:
        raise ConfigError(f"Unknown peft_type {name!r}. Known ones: {', '.join(ROWS)}.")
    module, cls = ROWS[name].method.split(":")
    return getattr(import_module(f"graft.methods.{module}"), cls)


def config_of(peft_type: str) -> type[PeftConfig]:
    """The config class of a peft_type."""
    return method_of(peft_type).config


PeftConfig.resolve = staticmethod(config_of)  # type: ignore[method-assign]
PeftConfig.peft_types = PeftType
