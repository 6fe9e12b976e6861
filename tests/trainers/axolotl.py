# SPDX-License-Identifier: Apache-2.0
"""axolotl."""

import json
from typing import Any

from tests.trainers.both import SAID

TITLE = "axolotl"
PACKAGE = "axolotl"
LOADED = ["axolotl.cli.main", "axolotl.train"]
MISSING = ["gradio"]  # a page for a browser

SFT = {"path": "made/sft.jsonl", "ds_type": "json", "split": "train", "type": "chat_template"}
DPO = {"path": "made/dpo.jsonl", "ds_type": "json", "split": "train", "type": "chat_template.default"}
PAIRS = {"field_messages": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
CONFIG = dict(
    **dict(base_model="made/model", datasets=[SFT], dataset_prepared_path="prepared", val_set_size=0, sequence_len=128),
    **dict(chat_template="tokenizer_default", adapter="lora", lora_r=8, lora_alpha=16, lora_dropout=0),
    **dict(lora_target_modules=["q_proj", "v_proj"], output_dir="out", micro_batch_size=4, max_steps=4, save_steps=2),
    **dict(gradient_accumulation_steps=1, optimizer="adamw_torch", lr_scheduler="cosine", learning_rate=1e-3),
    **dict(logging_steps=1, bf16=False, fp16=False, tf32=False, attn_implementation="eager", seed=0),
)
TOKENS = [3, 4]
# a chat without draws, typed on a terminal
FILES = {
    "chat.sh": f"""script -qec "axolotl inference $1 --launcher python --chat" /dev/null << 'END'
/set temperature 0
/set max_new_tokens 16
What is 1 + 2?
/save {SAID}
/exit
END
"""
}


def command(*words: str, **options: Any) -> list[str]:
    """Return a command whose file of options, which is YAML because it is JSON, the last word holds."""
    return ["axolotl", *words, json.dumps(CONFIG | options)]


def train(**options: Any) -> list[str]:
    return command("train", "--launcher", "python", **options)


CASES = {
    "LoRA": [train()],
    "DoRA": [train(peft_use_dora=True)],
    "rsLoRA": [train(peft_use_rslora=True)],
    "LoRA+": [train(loraplus_lr_ratio=4)],
    "PiSSA": [train(peft_init_lora_weights="pissa")],
    "ranks of their own": [train(lora_rank_pattern={"q_proj": 4}, lora_alpha_pattern={"q_proj": 4})],
    "modules to save": [train(lora_modules_to_save=["lm_head"])],
    "rows of tokens": [train(peft_trainable_token_indices=TOKENS)],
    "replicated layers": [train(peft_layer_replication=[[0, 2], [1, 2]])],
    "ReLoRA": [train(relora=True, jagged_restart_steps=2, jagged_restart_warmup_steps=1, max_steps=6)],
    "kernels for QKV": [train(lora_qkv_kernel=True, lora_target_modules=["q_proj", "k_proj", "v_proj"])],
    "resume": [train(), train(output_dir="more", resume_from_checkpoint="out/checkpoint-2", max_steps=6)],
    "merge-lora": [train(), command("merge-lora", lora_model_dir="out")],
    "merge-lora in memory": [train(), command("merge-lora", lora_model_dir="out", merge_method="legacy")],
    "inference": [train(), ["env", "bash", "made/chat.sh", json.dumps(CONFIG | dict(lora_model_dir="out"))]],
    "4-bit": [train(adapter="qlora", load_in_4bit=True)],
    "8-bit": [train(load_in_8bit=True)],
    "DPO": [train(rl="dpo", datasets=[DPO | PAIRS])],
}
DIFFERS = {
    "8-bit": "losses agree; tensors are up to 4e-5 off after four steps, where activations are rounded to 8 bits"
}
