# SPDX-License-Identifier: Apache-2.0
"""SimpleTuner: its commands import every family of models that it has; these of its tests concern adapters."""

TITLE = "SimpleTuner"
PACKAGE = "simpletuner"
LOADED: list[str] = []
MISSING = ["librosa"]
CASES: dict[str, list[list[str]]] = {}
OWN = [
    f"tests/test_{name}.py"
    for name in (
        "assistant_lora",
        "diffusers_overrides_lora",
        "krea2_model",
        "lora_format",
        "lora_loading_regression",
        "lora_metadata",
        "minimaxh3",
        "minimaxmusic_model",
        "peft_init",
        "qwen_image_21",
        "training_wrappers",
        "validation_adapters",
    )
]
DIFFERS = {
    "tests.test_qwen_image_21.QwenImage21Tests::"
    "test_regionally_compiled_adapter_roundtrips_to_eager_and_compiled_models": "it wants torch.compile's `_orig_mod` "
    "in the names of get_peft_model_state_dict, and graft leaves it out",
}
