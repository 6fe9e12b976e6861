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
        "moe_expert_lora_b_packing",
        "moe_fused_lora_merge_layout",
        "moe_grouped_mm_format",
        "moe_legacy_lora_b_load",
        "moe_lora_square_stack",
        "moe_merge_e2e_cpu",
        "moe_router_not_a_lora_target",
        "moe_stacked_expert_lora_reaches_forward",
        "peft_lora_integer_input",
        "peft_paramwrapper_layout_drift",
        "portable_adapter_target_modules",
        "prepare_model_for_training_bias",
        "prepare_model_for_training_embedding_lora",
        "qwen_moe_lora_extractor",
    )
]
REASONS = {
    "it asks PEFT's own _convert_peft_config_moe, which graft has not, and is skipped": (
        "portable_adapter_target_modules::test_dropped_names_stop_pefts_v5_moe_conversion_doubling_the_rank",
    ),
}
DIFFERS = {f"tests.test_{name}": why for why, names in REASONS.items() for name in names}
