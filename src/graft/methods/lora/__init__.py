# SPDX-License-Identifier: Apache-2.0
"""LoRA: its config, its maths, its initialisations."""

from graft.methods.lora.config import LoraConfig, LoraRuntimeConfig
from graft.methods.lora.lora import LoRA
from graft.methods.lora.sub_configs import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoRA",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "VeloraConfig",
]
