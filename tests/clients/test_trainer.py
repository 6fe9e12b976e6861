# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer: the best model at the end, and training on from a checkpoint, for several methods."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.clients import tiny
from tests.clients.pair import scenario

TARGETS = dict(target_modules=["query", "value"], task_type="SEQ_CLS")
CONFIGS = {
    "LoraConfig": dict(TARGETS, r=4, lora_dropout=0.1),
    "IA3Config": dict(TARGETS, feedforward_modules=[]),
    "OFTConfig": dict(TARGETS, r=0, oft_block_size=4),
    "VeraConfig": dict(TARGETS, r=8),
    "PromptTuningConfig": dict(task_type="SEQ_CLS", num_virtual_tokens=3),
}


def classes(n: int, seed: int):
    """Sentences, some of which say "good" first."""
    from datasets import Dataset

    texts = [("good " if i % 2 else "bad ") + text for i, text in enumerate(tiny.sentences(n, seed))]
    rows = tiny.tokenizer()(texts)
    return Dataset.from_dict(
        {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "labels": [i % 2 for i in range(n)]}
    )


def margin(predicted) -> dict[str, float]:
    """How far the right class is ahead of the other."""
    ahead = predicted.predictions[:, 1] - predicted.predictions[:, 0]
    return {"margin": float((ahead * (2 * predicted.label_ids - 1)).mean())}


def trainer(folder: Path, config, rate: float = 5e-2, **options):
    from peft import get_peft_model
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    set_seed(0)
    model = get_peft_model(tiny.bert(), config)
    usual = dict(
        output_dir=str(folder / "out"), max_steps=6, per_device_train_batch_size=8, learning_rate=rate, use_cpu=True,
        logging_steps=1, eval_strategy="steps", eval_steps=2, save_steps=2, report_to="none", disable_tqdm=True,
        load_best_model_at_end=True, metric_for_best_model="margin",
    )  # fmt: skip
    args = TrainingArguments(**{**usual, **options})
    collator = DataCollatorWithPadding(tiny.tokenizer())
    data = dict(train_dataset=classes(32, 0), eval_dataset=classes(16, 1))
    return Trainer(model, args, data_collator=collator, compute_metrics=margin, **data)


def method(name: str, tolerance: float = 1e-5):
    """Make the scenario of a method."""

    def run(folder: Path) -> dict:
        import peft
        import torch

        make = lambda: getattr(peft, name)(**CONFIGS[name])
        whole = trainer(folder / "whole", make())
        whole.train()
        best = whole.state.best_model_checkpoint
        assert best, "no checkpoint was the best"
        at_end = whole.evaluate()["eval_margin"]
        assert at_end == pytest.approx(whole.state.best_metric, abs=1e-6)

        shutil.copytree(folder / "whole/out/checkpoint-4", folder / "part/out/checkpoint-4")
        part = trainer(folder / "part", make())
        part.train(resume_from_checkpoint=True)
        found = {}
        for run, place in ((whole, "whole"), (part, "part")):
            run.save_model(folder / place / "saved")
            found[place] = {
                "logged": tiny.losses(run),
                "best": Path(run.state.best_model_checkpoint).name,
                "files": tiny.held(folder / place),
                "trains": tiny.adapter(run.model),
            }
        with torch.no_grad():
            found["logits"] = part.model.eval()(input_ids=torch.arange(4, 16)[None]).logits
        return found

    run.__name__, run.__module__ = f"test_{name.removesuffix('Config').lower()}", __name__
    return scenario(run, tolerance=tolerance)


test_lora = method("LoraConfig")
test_ia3 = method("IA3Config")
test_oft = method("OFTConfig")
test_vera = method("VeraConfig")
test_prompttuning = method("PromptTuningConfig")


@scenario
def test_adalora(folder):
    """With a callback that prunes, as PEFT's documentation has it. PEFT's evaluation counts the regularisation."""
    from peft import AdaLoraConfig
    from transformers import TrainerCallback

    class Allocate(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            model.base_model.update_and_allocate(state.global_step)

    config = AdaLoraConfig(**TARGETS, init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6)
    made = trainer(folder, config, load_best_model_at_end=False, logging_strategy="no")
    made.add_callback(Allocate())
    made.train()
    logged = tiny.losses(made)
    assert logged.pop("eval_loss")
    at_end = made.evaluate()["eval_margin"]
    return {"logged": logged, "files": tiny.held(folder), "trains": tiny.adapter(made.model), "at the end": at_end}


@scenario
def test_seq2seq(folder):
    """Seq2SeqTrainer, which generates in evaluation, on a T5 with noise on its embeddings."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(0)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=tiny.SIZES["vocab_size"], **sizes, initializer_factor=2.0)
    ).double()  # Adam makes much of the rounding of gradients that are nearly 0
    model = get_peft_model(t5, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=4, target_modules=["q", "v"]))
    rows = tiny.tokenizer()(tiny.sentences(24))["input_ids"]
    data = Dataset.from_dict({"input_ids": rows, "labels": [row[::-1] for row in rows]})
    args = transformers.Seq2SeqTrainingArguments(
        str(folder / "out"), max_steps=4, learning_rate=5e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=1, eval_strategy="steps", eval_steps=2, save_steps=2, predict_with_generate=True,
        generation_max_length=6, neftune_noise_alpha=1.0, load_best_model_at_end=True,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(tiny.tokenizer(), model=model)
    made = transformers.Seq2SeqTrainer(model, args, collator, data, data.select(range(8)))
    made.train()
    answers = torch.tensor(made.predict(data.select(range(8))).predictions)
    return {"logged": tiny.losses(made), "files": tiny.held(folder), "answers": answers}


@scenario
def test_compiled(folder):
    """`torch_compile`, with accumulated gradients, clipping and label smoothing."""
    from peft import LoraConfig

    made = trainer(
        folder, LoraConfig(**TARGETS, r=4), load_best_model_at_end=False, torch_compile=True, max_steps=3,
        torch_compile_backend="eager", gradient_accumulation_steps=2, max_grad_norm=0.1, label_smoothing_factor=0.1,
    )  # fmt: skip
    made.train()
    return {"logged": tiny.losses(made), "files": tiny.held(folder), "trains": tiny.adapter(made.model)}
