# SPDX-License-Identifier: Apache-2.0
"""unsloth's helpers: unsloth itself wants a GPU, and these have tests that need none."""

TITLE = "unsloth_zoo"
PACKAGE = "unsloth_zoo"
LOADED: list[str] = []
CASES: dict[str, list[list[str]]] = {}
ENVIRONMENT = {"UNSLOTH_IS_PRESENT": "1", "UNSLOTH_ALLOW_CPU": "1"}
OWN = [
    f"tests/test_{name}.py"
    for name in (
        "dora_merge",
        "fast_lora_forward_under_partial_disable",
        "gemma4_clippable_linear_peft_reload",
        "get_transformers_model_type_empty",
        "lora_bias_merge",
        "merge_active_adapter",
        "peft_lora_integer_input",
        "portable_adapter_target_modules",
        "prepare_model_for_training_bias",
        "prepare_model_for_training_embedding_lora",
    )
]
