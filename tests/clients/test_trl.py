# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers, each given a `peft_config`, and as TRL's own scripts use them."""

from __future__ import annotations

from pathlib import Path

from tests.clients import tiny
from tests.clients.pair import scenario


def lora(task: str = "CAUSAL_LM", **options):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=task, **options)


def arguments(folder: Path, cls: str, **options):
    import trl

    usual = dict(
        output_dir=str(folder / "out"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, save_steps=2, report_to="none", use_cpu=True, bf16=False, seed=0, disable_tqdm=True,
    )  # fmt: skip
    return getattr(trl, cls)(**{**usual, **options})


def texts(n: int = 24):
    from datasets import Dataset

    return Dataset.from_dict({"text": tiny.sentences(n)})


def sft(folder: Path, config=None, **options):
    from trl import SFTTrainer

    args = arguments(folder, "SFTConfig", max_length=32, **options)
    return SFTTrainer(
        tiny.llama(), args, train_dataset=texts(), processing_class=tiny.tokenizer(), peft_config=config or lora()
    )


def result(trainer, folder: Path) -> dict:
    return {"logged": tiny.losses(trainer), "trains": tiny.adapter(trainer.model), "files": tiny.held(folder / "out")}


@scenario
def test_sft_with_checkpointing(folder):
    """Gradient checkpointing; the saved adapter, loaded into a fresh model, is the trained one."""
    import torch
    from peft import PeftModel

    trainer = sft(folder, gradient_checkpointing=True)
    before = tiny.adapter(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[n], t) for n, t in tiny.adapter(trainer.model).items() if "lora_A" in n)
    trainer.save_model(folder / "saved")
    fresh = PeftModel.from_pretrained(tiny.llama(), folder / "saved")
    ids = torch.arange(4, 14)[None]
    logits = fresh.eval()(ids).logits
    torch.testing.assert_close(trainer.model.eval()(ids).logits, logits)
    return {**result(trainer, folder), "saved": tiny.held(folder / "saved"), "logits": logits}


@scenario
def test_sft_resumed(folder):
    """Two steps, then the rest from the checkpoint: as four in one go, to the last bit."""
    import torch

    whole = sft(folder / "whole")
    whole.train()
    first = sft(folder / "parts", max_steps=2, lr_scheduler_type="constant")
    first.train()
    rest = sft(folder / "parts", max_steps=4, lr_scheduler_type="constant")
    rest.train(resume_from_checkpoint=str(folder / "parts/out/checkpoint-2"))
    straight = sft(folder / "straight", max_steps=4, lr_scheduler_type="constant")
    straight.train()
    for name, t in tiny.adapter(straight.model).items():
        torch.testing.assert_close(tiny.adapter(rest.model)[name], t, rtol=0, atol=0)
    return {"whole": result(whole, folder / "whole"), "parts": result(rest, folder / "parts")}


@scenario
def test_sft_packing(folder):
    trainer = sft(folder, packing=True)
    trainer.train()
    return result(trainer, folder)


@scenario
def test_sft_modules_to_save_and_tokens(folder):
    """A head trained whole, and rows of the embedding."""
    trainer = sft(folder, lora(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [5, 6]}))
    trainer.train()
    return result(trainer, folder)


@scenario
def test_sft_prompt(folder):
    """No LoRA: a prompt."""
    from peft import PromptTuningConfig

    trainer = sft(folder, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    trainer.train()
    return result(trainer, folder)


def preferences(n: int = 24):
    from datasets import Dataset

    prompts, chosen, rejected = (tiny.sentences(n, seed) for seed in range(3))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


@scenario
def test_dpo(folder):
    """The reference is the model without its adapter."""
    from trl import DPOTrainer

    args = arguments(folder, "DPOConfig", max_length=32, gradient_checkpointing=True)
    data = preferences()
    trainer = DPOTrainer(
        tiny.llama(), args=args, train_dataset=data, eval_dataset=data.select(range(8)),
        processing_class=tiny.tokenizer(), peft_config=lora(),
    )  # fmt: skip
    assert trainer.ref_model is None
    trainer.train()
    trainer.evaluate()
    return result(trainer, folder)


@scenario
def test_dpo_of_a_trained_adapter(folder):
    """The reference is a copy of the adapter that the model came with: TRL adds and fills "ref"."""
    from peft import get_peft_model
    from trl import DPOTrainer

    model = tiny.randomized(get_peft_model(tiny.llama(), lora()))
    args = arguments(folder, "DPOConfig", max_length=32, precompute_ref_log_probs=True)
    trainer = DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tiny.tokenizer())
    assert sorted(model.peft_config) == ["default", "ref"]
    trainer.train()
    found = result(trainer, folder)
    found["logged"].pop("rewards/accuracies")  # at first the policy is the reference: noise decides which is larger
    return {**found, "reference": tiny.tensors(model, ".ref.")}


@scenario
def test_grpo(folder):
    from datasets import Dataset
    from trl import GRPOTrainer

    def reward(completions, **_):
        return [float(c.count("good")) + 0.1 * len(c.split()) for c in completions]

    args = arguments(
        folder, "GRPOConfig", num_generations=4, max_completion_length=6, beta=0.1, max_steps=3, save_steps=3
    )
    prompts = Dataset.from_dict({"prompt": tiny.sentences(8, words=3)})
    trainer = GRPOTrainer(
        tiny.llama(), reward, args, train_dataset=prompts, processing_class=tiny.tokenizer(padding_side="left"),
        peft_config=lora(),
    )  # fmt: skip
    assert trainer.ref_model is None
    trainer.train()
    return result(trainer, folder)


@scenario
def test_reward(folder):
    """A head for one number, which TRL has the adapter train whole."""
    from trl import RewardTrainer

    args = arguments(folder, "RewardConfig", max_length=32, gradient_checkpointing=True)
    trainer = RewardTrainer(
        tiny.llama("LlamaForSequenceClassification", num_labels=1), args, train_dataset=preferences(),
        processing_class=tiny.tokenizer(), peft_config=lora("SEQ_CLS"),
    )  # fmt: skip
    trainer.train()
    return result(trainer, folder)


def dora(folder: Path, dtype: str):
    """Train a PeftModel that TRL gets as it is: DoRA, rsLoRA, all linear layers, noise on embeddings."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl import SFTTrainer

    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, use_rslora=True, task_type="CAUSAL_LM")
    model = tiny.randomized(get_peft_model(tiny.llama().to(getattr(torch, dtype)), config))
    args = arguments(folder, "SFTConfig", max_length=32, neftune_noise_alpha=0.5, gradient_checkpointing=True)
    trainer = SFTTrainer(model, args, train_dataset=texts(), processing_class=tiny.tokenizer())
    trainer.train()
    return trainer


@scenario
def test_sft_of_a_trained_adapter(folder):
    return result(dora(folder, "float32"), folder)


@scenario(tolerance=3e-2)
def test_sft_in_bfloat16(folder):
    """Losses and dtypes alone: each library rounds at places of its own, and Adam makes that large."""
    trainer = dora(folder, "bfloat16")
    dtypes = {name: str(t.dtype) for name, t in tiny.adapter(trainer.model).items()}
    return {"losses": tiny.losses(trainer)["loss"], "dtypes": dtypes}


@scenario
def test_sft_experts(folder):
    """LoRA on parameters of experts, in a model that also needs their router's loss."""
    import torch
    import transformers
    from trl import SFTTrainer

    def mixtral():
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            **tiny.SIZES, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
            output_router_logits=True, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config)

    config = lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    args = arguments(folder, "SFTConfig", max_length=32, gradient_checkpointing=False)
    data = texts()
    trainer = SFTTrainer(mixtral(), args, train_dataset=data, processing_class=tiny.tokenizer(), peft_config=config)
    trainer.train()
    fresh = mixtral()
    report = fresh.load_adapter(str(folder / "out/checkpoint-4"))
    ids = torch.arange(4, 14)[None]
    logits = fresh.eval()(ids).logits.detach()
    torch.testing.assert_close(logits, trainer.model.eval()(ids).logits)
    return {**result(trainer, folder), "logits": logits, "missing": sorted(report.missing_keys)}


@scenario
def test_grpo_of_a_trained_adapter(folder):
    """The reference is a copy of the adapter; generation samples."""
    from datasets import Dataset
    from peft import get_peft_model
    from trl import GRPOTrainer

    def reward(completions, **_):
        return [float(len(c.split())) for c in completions]

    model = tiny.randomized(get_peft_model(tiny.llama(), lora()))
    args = arguments(
        folder, "GRPOConfig", num_generations=4, max_completion_length=6, beta=0.1, max_steps=2, num_iterations=2
    )
    prompts = Dataset.from_dict({"prompt": tiny.sentences(8, words=3)})
    tokens = tiny.tokenizer(padding_side="left")
    trainer = GRPOTrainer(model, reward, args, train_dataset=prompts, processing_class=tokens)
    trainer.train()
    return {**result(trainer, folder), "reference": tiny.tensors(model, ".ref.")}


@scenario
def test_kto_and_rloo(folder):
    """Two more trainers, with the disabled adapter as reference."""
    from datasets import Dataset
    from trl import KTOTrainer, RLOOTrainer

    n = 16
    data = Dataset.from_dict(
        {"prompt": tiny.sentences(n, 0), "completion": tiny.sentences(n, 1), "label": [i % 2 == 0 for i in range(n)]}
    )
    args = arguments(folder / "kto", "KTOConfig", max_length=32)
    kto = KTOTrainer(tiny.llama(), args=args, train_dataset=data, processing_class=tiny.tokenizer(), peft_config=lora())
    kto.train()

    def reward(completions, **_):
        return [float(len(c.split())) for c in completions]

    args = arguments(folder / "rloo", "RLOOConfig", num_generations=4, max_completion_length=6, beta=0.1, max_steps=2)
    rloo = RLOOTrainer(
        tiny.llama(), reward, args, train_dataset=data.select_columns("prompt"), peft_config=lora(),
        processing_class=tiny.tokenizer(padding_side="left"),
    )  # fmt: skip
    rloo.train()
    return {"kto": result(kto, folder / "kto"), "rloo": result(rloo, folder / "rloo")}


@scenario
def test_sft_script(folder):
    """TRL's own script, with its arguments for LoRA."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
    from trl.scripts import sft as script

    tiny.llama().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    (folder / "data").mkdir()
    texts().to_json(folder / "data/train.jsonl")
    args = arguments(folder, "SFTConfig", max_length=32, eval_strategy="no")
    model = ModelConfig(
        "base", use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "v_proj"], dtype="float32",
        lora_modules_to_save=["lm_head"],
    )  # fmt: skip
    script.main(ScriptArguments(dataset_name=str(folder / "data")), args, model, DatasetMixtureConfig())
    return {"files": tiny.held(folder / "out")}
