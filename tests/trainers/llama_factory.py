# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory."""

import json

from tests.trainers.both import flags

TITLE = "LLaMA-Factory"
PACKAGE = "llamafactory"
LOADED = ["llamafactory.train.tuner"]
MISSING = ["torchaudio"]  # wants CUDA's libraries

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
SFT = {"file_name": "sft.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}
PAIRS = {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}
DPO = {"file_name": "dpo.jsonl", "formatting": "sharegpt", "ranking": True, "columns": PAIRS, "tags": TAGS}
KTO = {**SFT, "file_name": "kto.jsonl", "columns": {"messages": "messages", "kto_tag": "label"}}
PT = {"file_name": "pt.jsonl", "columns": {"prompt": "text"}}
FILES = {
    "dataset_info.json": json.dumps({"sft": SFT, "dpo": DPO, "kto": KTO, "pt": PT}),
    "pt.jsonl": "".join(json.dumps({"text": f"{a} + {a} is {a + a}."}) + "\n" for a in range(32)),
}

MODEL = dict(model_name_or_path="made/model", template="empty", use_cpu=True, trust_remote_code=True)
TRAIN = dict(
    **MODEL,
    **dict(stage="sft", do_train=True, dataset="sft", dataset_dir="made", finetuning_type="lora", output_dir="out"),
    **dict(lora_target="q_proj,v_proj", lora_dropout=0, learning_rate=1e-3, per_device_train_batch_size=4),
    **dict(max_steps=4, save_steps=2, logging_steps=1, report_to="none"),
)


def train(**options: object) -> list[str]:
    return ["llamafactory-cli", "train", *flags(TRAIN | options)]


def export(**options: object) -> list[str]:
    template = dict(model_name_or_path="made/model", template="empty", finetuning_type="lora", export_dir="merged")
    return ["llamafactory-cli", "export", *flags(template | options)]


CASES = {
    "LoRA": [train(lora_target="all")],
    "torchrun with two processes": [["env", "FORCE_TORCHRUN=1", "NPROC_PER_NODE=2", *train(ddp_backend="gloo")]],
    "DoRA": [train(use_dora=True)],
    "rsLoRA": [train(use_rslora=True)],
    "LoRA+": [train(loraplus_lr_ratio=4)],
    "PiSSA": [train(pissa_init=True)],
    "OFT": [train(finetuning_type="oft", oft_target="q_proj,v_proj", module_dropout=0)],
    "llama-pro": [train(finetuning_type="freeze", use_llama_pro=True, freeze_trainable_layers=1)],
    "freeze": [train(finetuning_type="freeze", freeze_trainable_layers=1)],
    "new words": [train(add_tokens="<new>,<newer>", resize_vocab=True)],
    "pre-training": [train(stage="pt", dataset="pt", cutoff_len=64)],
    "modules to save": [train(additional_target="lm_head")],
    "resume": [train(), train(output_dir="more", resume_from_checkpoint="out/checkpoint-2", max_steps=6)],
    "a second adapter on the first": [train(), train(output_dir="more", adapter_name_or_path="out",
                                                     create_new_adapter=True)],
    "export": [train(), export(adapter_name_or_path="out")],
    "two adapters merged": [train(), train(output_dir="more", seed=1, lora_target="k_proj"),
                            export(adapter_name_or_path="out,more")],
    "ORPO": [train(stage="dpo", dataset="dpo", pref_loss="orpo")],
    "KTO": [train(stage="kto", dataset="kto")],
    "reward model": [train(stage="rm", dataset="dpo")],
    "DPO": [train(stage="dpo", dataset="dpo", pref_beta=0.1)],
}  # fmt: skip
DIFFERS = {
    "a second adapter on the first": "loading the first draws random numbers under PEFT alone",
    "reward model": "the value head's bias has no gradient but rounding, of which Adam makes steps",
}
