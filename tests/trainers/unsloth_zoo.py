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
    "it finds layers by the name of their class, which is not ParamWrapper": (
        "moe_grouped_mm_format::test_peft_get_peft_model_marks_nested_gpt_oss_experts_and_dims",
        "moe_stacked_expert_lora_reaches_forward::"
        "test_the_fold_swaps_inside_parameters_and_never_shadows_through_dunder_dict",
        "moe_stacked_expert_lora_reaches_forward::test_the_fold_refuses_a_parameter_something_else_already_shadows",
        "moe_stacked_expert_lora_reaches_forward::test_one_adapter_over_many_experts_folds_through_the_factors",
        "moe_stacked_expert_lora_reaches_forward::test_a_peft_without_the_factored_api_still_folds",
    ),
    "graft merges without a replaced get_delta_weight, which it warns of": (
        "moe_fused_lora_merge_layout::test_merge_then_unmerge_round_trips_the_fused_parameter",
        "moe_fused_lora_merge_layout::test_merge_and_unload_writes_the_separated_forward_delta",
        "moe_fused_lora_merge_layout::test_merge_adapter_and_unmerge_adapter_go_through_the_same_delta",
        "moe_fused_lora_merge_layout::test_merge_matches_the_adapter_forward_on_a_tiny_fused_moe[grouped_by_expert]",
    ),
    "from_pretrained does not call a replaced load_adapter": (
        "moe_legacy_lora_b_load::test_pre_fix_unsloth_adapter_is_repacked_on_load",
        "moe_legacy_lora_b_load::test_repacked_adapter_saves_rank_major_and_reloads_unchanged",
        "moe_legacy_lora_b_load::test_resumed_optimizer_state_follows_the_repack",
    ),
}
DIFFERS = {f"tests.test_{name}": why for why, names in REASONS.items() for name in names}
