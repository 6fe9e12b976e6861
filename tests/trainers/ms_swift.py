# SPDX-License-Identifier: Apache-2.0
"""ms-swift."""

from tests.trainers.both import SAID, flags

TITLE = "ms-swift"
PACKAGE = "ms-swift"
LOADED = ["swift.pipelines"]

MODEL = dict(model="made/model", model_type="llama", template="dummy", torch_dtype="float32")
TRAIN = dict(
    **MODEL,
    **dict(dataset="made/sft.jsonl", tuner_type="lora", output_dir="out", add_version=False),
    **dict(lora_dropout=0, learning_rate=1e-3, per_device_train_batch_size=4, max_steps=4, save_steps=2),
    **dict(logging_steps=1, report_to="none", use_cpu=True, dataloader_num_workers=0, gradient_checkpointing=False),
)
RLHF = dict(rlhf_type="dpo", dataset="made/dpo.jsonl")
KTO = dict(rlhf_type="kto", dataset="made/kto.jsonl", gradient_accumulation_steps=1)
GRPO = dict(
    **dict(rlhf_type="grpo", dataset="made/sft.jsonl", reward_funcs="soft_overlong", soft_max_length=24),
    **dict(soft_cache_length=20, num_generations=4, max_completion_length=24, gradient_accumulation_steps=1),
)
INFER = dict(
    **dict(adapters="out/checkpoint-4", val_dataset="made/sft.jsonl", result_path=SAID),
    **dict(temperature=0, max_new_tokens=16, max_batch_size=4),
)


def train(**options: object) -> list[str]:
    return ["swift.cli.sft", *flags(TRAIN | options)]


def rlhf(**options: object) -> list[str]:
    return ["swift.cli.rlhf", *flags(TRAIN | RLHF | options)]


CASES = {
    "LoRA": [train()],
    "torchrun with two processes": [
        ["env", "NPROC_PER_NODE=2", "swift", "sft", *flags(TRAIN), "--ddp_backend", "gloo"]
    ],
    "DoRA": [train(use_dora=True)],
    "rsLoRA": [train(use_rslora=True)],
    "LoRA+": [train(lorap_lr_ratio=4)],
    "LoRA in bfloat16": [train(lora_dtype="bfloat16")],
    "modules to save": [train(modules_to_save="lm_head")],
    "AdaLoRA": [train(tuner_type="adalora", adalora_tinit=1, adalora_tfinal=1)],
    "VeRA": [train(tuner_type="vera", vera_rank=8, target_modules="q_proj")],
    "BOFT": [train(tuner_type="boft")],
    "FourierFT": [train(tuner_type="fourierft", fourier_n_frequency=50)],
    "IA3": [train(tuner_type="ia3")],
    "all weights": [train(tuner_type="full")],
    "resume": [train(lora_dtype="bfloat16"),
               train(lora_dtype="bfloat16", output_dir="more", resume_from_checkpoint="out/checkpoint-2", max_steps=6)],
    "export": [train(), ["swift.cli.export", *flags(dict(adapters="out/checkpoint-4", merge_lora=True,
                                                         output_dir="merged"))]],
    "infer": [train(), ["swift.cli.infer", *flags(INFER)]],
    "DPO": [rlhf()],
    **{name: [rlhf(rlhf_type=name.lower())] for name in ("ORPO", "SimPO", "CPO")},
    "KTO": [rlhf(**KTO)],
    "GRPO": [rlhf(**GRPO)],
    "reward model": [rlhf(rlhf_type="rm")],
}  # fmt: skip
DIFFERS = {"FourierFT": "PEFT's norms of gradients are 1e-4 off those in double precision, graft's less"}
