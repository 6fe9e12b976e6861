# SPDX-License-Identifier: Apache-2.0
"""The variants and initialisations between which a LoraConfig chooses."""

from __future__ import annotations

from typing import Any

from graft.methods.lora.sub_configs import CordaConfig, EvaConfig, LoraGAConfig

VARIANTS = {  # field, or value of init_lora_weights, that selects it → "module:Class" beside this
    "use_dora": "dora:DoRA",
    "kasa_config": "kasa:KaSA",
    "alora_invocation_tokens": "alora:ALoRA",
    "arrow_config": "arrow:Arrow",
    "use_bdlora": "bdlora:BdLoRA",
    "velora_config": "velora:VeLoRA",
    "monteclora_config": "monteclora:MonteCLoRA",
    "mica": "mica:MiCA",
    "use_qalora": "qalora:QALoRA",
}

CONVERTED = ("pissa", "olora", "corda", "lora_ga")  # inits that take B A out of the base weight
TITLES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ", "eva": "EVA"}
SETTINGS: dict[str, tuple[str, Any]] = {  # field with the settings of one init → (that init, class of the settings)
    "eva_config": ("eva", EvaConfig),
    "corda_config": ("corda", CordaConfig),
    "lora_ga_config": ("lora_ga", LoraGAConfig),
}
