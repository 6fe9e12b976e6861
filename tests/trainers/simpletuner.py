# SPDX-License-Identifier: Apache-2.0
"""SimpleTuner: its commands import every family of models that it has; these of its tests concern adapters."""

TITLE = "SimpleTuner"
PACKAGE = "simpletuner"
LOADED: list[str] = []
CASES: dict[str, list[list[str]]] = {}
OWN = [
    f"tests/test_{name}.py"
    for name in (
        "assistant_lora",
        "diffusers_overrides_lora",
        "lora_metadata",
        "peft_init",
    )
]
