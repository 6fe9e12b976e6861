# SPDX-License-Identifier: Apache-2.0
"""SimpleTuner: its commands on a Stable Diffusion XL, and of its tests those that concern adapters."""

import json
from typing import Any

from tests.trainers.both import flags

TITLE = "SimpleTuner"
PACKAGE = "simpletuner"
LOADED = ["unpinned", "simpletuner.helpers.training.trainer", "simpletuner.helpers.models.sdxl.model"]
MISSING = ["librosa", "soxr"]
MAKER = "pictures.py"
ENVIRONMENT = {"SIMPLETUNER_CONFIG_BACKEND": "cmd", "MIXED_PRECISION": "no"}  # the options from the command line

PICTURES = dict(
    **dict(id="pictures", type="local", instance_data_dir="made/pictures", caption_strategy="filename", crop=True),
    **dict(crop_style="center", crop_aspect="square", resolution=64, resolution_type="pixel", minimum_image_size=0),
    **dict(cache_dir_vae="made/cache/pictures", metadata_backend="discovery", repeats=4),
)
WORDS = dict(id="words", type="local", dataset_type="text_embeds", default=True, cache_dir="made/cache/words")
LYCORIS = dict(algo="lokr", multiplier=1.0, linear_dim=4, linear_alpha=4, factor=4)
FILES = {
    # its loader pins memory, which torch refuses on a machine without a GPU
    "unpinned.py": "from torch import Tensor\nTensor.pin_memory = lambda self: self\n",
    "data.json": json.dumps([PICTURES, WORDS]),
    "lycoris.json": json.dumps(LYCORIS),
    # as one types it: the options in a file, which the trainer looks for
    "train.sh": "mkdir config && cp $1 config/config.json\n"
    "unset SIMPLETUNER_CONFIG_BACKEND; IMPORT_FIRST=unpinned simpletuner train\n",
}
OPTIONS = dict(
    **dict(model_family="sdxl", model_type="lora", pretrained_model_name_or_path="made/model", output_dir="out"),
    pretrained_vae_model_name_or_path="made/model",
    **dict(data_backend_config="made/data.json", cache_dir="made/cache", resolution=64, resolution_type="pixel"),
    **dict(train_batch_size=2, num_train_epochs=0, max_train_steps=4, checkpoint_step_interval=2, seed=1),
    **dict(lora_rank=4, lora_alpha=4, lora_dropout=0, optimizer="torch-adamw", learning_rate=1e-3),
    **dict(lr_scheduler="constant", lr_warmup_steps=0, mixed_precision="no", vae_dtype="fp32"),
    **dict(enable_multiprocessing="true", aspect_bucket_worker_count=1),  # its threads lose pictures on a busy machine
    **dict(report_to="simpletuner", validation_disable="true", caption_dropout_probability=0),
)


def train(**options: Any) -> list[str]:
    return ["simpletuner.train", *flags(OPTIONS | options)]


CASES = {
    "LoRA": [train()],
    "simpletuner train": [["env", "bash", "made/train.sh", json.dumps(OPTIONS)]],
    "PiSSA": [train(lora_init_type="pissa")],
    "convolutions": [train(peft_lora_target_modules='["to_q", "conv1", "conv_in"]')],
    "ComfyUI's names": [train(lora_format="comfyui")],
    "averaged weights": [train(use_ema="true")],
    "another adapter to begin with": [
        train(),
        train(output_dir="more", init_lora="out/pytorch_lora_weights.safetensors"),
    ],
    "resume": [train(), train(resume_from_checkpoint="latest", max_train_steps=6)],
    "LyCORIS": [train(lora_type="lycoris", lycoris_config="made/lycoris.json")],
    "SingLoRA": [train(peft_lora_mode="singlora")],
}
OWN = [
    f"tests/test_{name}.py"
    for name in (
        "acestep_lora_targets",
        "anyflow_lora_sidecar",
        "assistant_lora",
        "assistant_lora_distiller",
        "crepa",
        "data_signals_lora_targets",
        "diffusers_overrides_lora",
        "dynamo",
        "krea2_model",
        "lora_format",
        "lora_loading_regression",
        "lora_metadata",
        "ltxvideo2_lora_format",
        "ltxvideo2_lora_targets",
        "minimaxh3",
        "minimaxmusic_model",
        "peft_init",
        "qwen_image_21",
        "ramtorch",
        "regularisation_assistant_freeze",
        "training_wrappers",
        "validation_adapter_strength",
        "validation_adapters",
    )
]
DIFFERS = {
    "SingLoRA": "its layers are classes of their own, written for PEFT",
    "tests.test_qwen_image_21.QwenImage21Tests::"
    "test_regionally_compiled_adapter_roundtrips_to_eager_and_compiled_models": "it wants torch.compile's `_orig_mod` "
    "in the names of get_peft_model_state_dict, and graft leaves it out",
}
