# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The table of methods, a row for each. The first use of a method imports its file."""

from __future__ import annotations

from enum import Enum
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from graft.config.base import PeftConfig, make_type_error


class Row(NamedTuple):
    """One row of the table: the places and public names of a method's classes."""

    method: str  # "module:Class" below graft
    config: str  # public name of its config
    tuner: str  # public name of the model class that holds it; of a prompt, its encoder
    base: str = "model.tuner:Tuner"  # base of that class, "module:Class" below graft
    in_peft: bool = True  # PEFT has the method; else the package `peft` gets no names for it


METHODS: dict[str, Row] = {
    "LORA": Row("methods.lora.lora:LoRA", "LoraConfig", "LoraModel"),
    "ADALORA": Row("methods.adalora.adalora:AdaLoRA", "AdaLoraConfig", "AdaLoraModel"),
    "IA3": Row("methods.ia3:IA3", "IA3Config", "IA3Model"),
    "VERA": Row("methods.vera:VeRA", "VeraConfig", "VeraModel"),
    "PVERA": Row("methods.pvera:PVeRA", "PveraConfig", "PveraModel"),
    "LOHA": Row("methods.loha:LoHa", "LoHaConfig", "LoHaModel"),
    "OFT": Row("methods.oft:OFT", "OFTConfig", "OFTModel"),
    "HRA": Row("methods.hra:HRA", "HRAConfig", "HRAModel"),
    "HIRA": Row("methods.hira:HiRA", "HiraConfig", "HiraModel"),
    "MISS": Row("methods.miss:MiSS", "MissConfig", "MissModel"),
    "VBLORA": Row("methods.vblora:VBLoRA", "VBLoRAConfig", "VBLoRAModel"),
    "GRALORA": Row("methods.gralora:GraLoRA", "GraloraConfig", "GraloraModel"),
    "DELORA": Row("methods.delora:DeLoRA", "DeloraConfig", "DeloraModel"),
    "C3A": Row("methods.c3a:C3A", "C3AConfig", "C3AModel"),
    "FOURIERFT": Row("methods.fourierft:FourierFT", "FourierFTConfig", "FourierFTModel"),
    "WAVEFT": Row("methods.waveft:WaveFT", "WaveFTConfig", "WaveFTModel"),
    "LOKR": Row("methods.lokr:LoKr", "LoKrConfig", "LoKrModel"),
    "ROAD": Row("methods.road:Road", "RoadConfig", "RoadModel"),
    "RANDLORA": Row("methods.randlora:RandLoRA", "RandLoraConfig", "RandLoraModel"),
    "UNILORA": Row("methods.unilora:UniLoRA", "UniLoraConfig", "UniLoraModel"),
    "TINYLORA": Row("methods.tinylora:TinyLoRA", "TinyLoraConfig", "TinyLoraModel"),
    "GLORA": Row("methods.glora:GLoRA", "GloraConfig", "GloraModel"),
    "PEANUT": Row("methods.peanut:PEANuT", "PeanutConfig", "PeanutModel"),
    "LILY": Row("methods.lily:Lily", "LilyConfig", "LilyModel"),
    "SHADOW": Row("methods.shadow.shadow:Shadow", "ShadowConfig", "ShadowModel"),
    "ADAMSS": Row("methods.adamss:AdaMSS", "AdamssConfig", "AdamssModel"),
    "FROD": Row("methods.frod:FRoD", "FrodConfig", "FrodModel"),
    "TRAINABLE_TOKENS": Row(
        "methods.trainable_tokens:TrainableTokens", "TrainableTokensConfig", "TrainableTokensModel"
    ),
    "BEFT": Row("methods.beft:BEFT", "BeftConfig", "BeftModel"),
    "SHIRA": Row("methods.shira:SHiRA", "ShiraConfig", "ShiraModel"),
    "SUPERTUNING": Row("methods.supertuning:SuperTuning", "SupertuningConfig", "SupertuningModel"),
    "DEFT": Row("methods.deft:DEFT", "DeftConfig", "DeftModel"),
    "BOFT": Row("methods.boft:BOFT", "BOFTConfig", "BOFTModel"),
    "PSOFT": Row("methods.psoft:PSOFT", "PsoftConfig", "PsoftModel"),
    "OSF": Row("methods.osf:OSF", "OSFConfig", "OSFModel"),
    "LN_TUNING": Row("methods.ln_tuning:LNTuning", "LNTuningConfig", "LNTuningModel"),
    "POLY": Row("methods.poly:Poly", "PolyConfig", "PolyModel"),
    "XLORA": Row("methods.xlora:XLora", "XLoraConfig", "XLoraModel", "model.experts:XLoraTuner"),
    "ADAPTION_PROMPT": Row("methods.adaption_prompt:AdaptionPrompt", "AdaptionPromptConfig", "AdaptionPromptModel"),
    "LORAXS": Row("methods.loraxs:LoraXS", "LoraXsConfig", "LoraXsModel", in_peft=False),
    "FINEGATES": Row("methods.finegates:FineGates", "FineGatesConfig", "FineGatesModel", in_peft=False),
    "SVFT": Row("methods.svft:SVFT", "SvftConfig", "SvftModel", in_peft=False),
    "MTLLORA": Row("methods.mtllora:MtlLoRA", "MtlLoraConfig", "MtlLoraModel", in_peft=False),
    "TLORA": Row("methods.tlora:TLoRA", "TLoraConfig", "TLoraModel", in_peft=False),
    "BOTTLENECK": Row("methods.bottleneck:Bottleneck", "BottleneckConfig", "BottleneckModel", in_peft=False),
    "ADAPTER_FUSION": Row("methods.fusion:AdapterFusion", "AdapterFusionConfig", "AdapterFusionModel", in_peft=False),
    "REFT": Row("methods.reft:Reft", "ReftConfig", "ReftModel", in_peft=False),
    "SDT": Row("methods.sdt:SDT", "SdtConfig", "SdtModel", in_peft=False),
    "STEERING": Row("methods.steering:Steering", "SteeringConfig", "SteeringModel", in_peft=False),
    "EWORA": Row("methods.ewora:Ewora", "EworaConfig", "EworaModel", in_peft=False),
    "MOELORA": Row("methods.moelora:MoeLoRA", "MoeLoraConfig", "MoeLoraModel", in_peft=False),
    "MIXLORA": Row("methods.mixlora:MixLoRA", "MixLoraConfig", "MixLoraModel", in_peft=False),
}
PROMPTS: dict[str, Row] = {
    "PROMPT_TUNING": Row("prompts.prompt_tuning:PromptEmbedding", "PromptTuningConfig", "PromptEmbedding"),
    "P_TUNING": Row("prompts.p_tuning:PromptEncoder", "PromptEncoderConfig", "PromptEncoder"),
    "PREFIX_TUNING": Row("prompts.prefix_tuning:PrefixEncoder", "PrefixTuningConfig", "PrefixEncoder"),
    "MULTITASK_PROMPT_TUNING": Row(
        "prompts.multitask_prompt_tuning:MultitaskPromptEmbedding",
        "MultitaskPromptTuningConfig",
        "MultitaskPromptEmbedding",
    ),
    "CPT": Row("prompts.cpt:CPTEmbedding", "CPTConfig", "CPTEmbedding"),
    "CARTRIDGE": Row("prompts.cartridge:CartridgeEncoder", "CartridgeConfig", "CartridgeEncoder"),
}
ROWS = METHODS | PROMPTS
IN_PEFT = {name: row for name, row in ROWS.items() if row.in_peft}
UNMERGEABLE = frozenset({"LILY", "SHADOW", "POLY", "XLORA", "ADAPTION_PROMPT", *PROMPTS})  # of PEFT's
EXPERIMENTAL = frozenset({"FINEGATES", "EWORA", "SVFT"})  # measured: no better than LoRA at LoRA's cost

PeftType = Enum("PeftType", {name: name for name in ROWS}, type=str, module=__name__)  # type: ignore[misc]
PeftType.__doc__ = "The methods, by the name that adapter_config.json uses."


@cache
def method_of(peft_type: str) -> Any:
    """Return the Method or Prompt class of a peft_type, given as a string or a `PeftType`; import its file. Cached.

    Raises:
        ConfigError: there is no such method.
    """
    name = getattr(peft_type, "value", peft_type)
    if name not in ROWS:
        raise make_type_error(name, [*ROWS])
    module, cls = ROWS[name].method.split(":")
    return getattr(import_module(f"graft.{module}"), cls)


def config_of(peft_type: str) -> type[PeftConfig]:
    """Return the config class of a peft_type: the `config` of `method_of`, which imports the method's file.

    Raises:
        ConfigError: there is no such method.
    """
    return method_of(peft_type).config


def tier_of(peft_type: str) -> str:
    """Return "core", "extra" or "experimental": the promise that a method keeps until version 1.0.

    experimental: in EXPERIMENTAL; it may be removed. core: PEFT has the method and it merges; API and files stay.
    extra: all others, unknown names too; files stay.
    """
    name = getattr(peft_type, "value", peft_type)
    if name in EXPERIMENTAL:
        return "experimental"
    return "core" if name in IN_PEFT and name not in UNMERGEABLE else "extra"


PeftConfig.resolve = staticmethod(config_of)
PeftConfig.peft_types = PeftType
