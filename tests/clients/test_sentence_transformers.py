# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers: an adapter on an embedding model and on a cross-encoder, trained, saved and loaded."""

from __future__ import annotations

from pathlib import Path

from tests.clients import tiny
from tests.clients.pair import scenario


def saved_base(folder: Path, cls: str, **options) -> str:
    """Save a BERT with its tokenizer as "base", and return that name, to which adapters refer."""
    tiny.bert(cls, **options).save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    return "base"  # in the working folder


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**{**dict(r=4, lora_alpha=8, target_modules=["query", "value"]), **options})


def pairs(n: int = 16):
    from datasets import Dataset

    one, two = tiny.sentences(n, 0), tiny.sentences(n, 1)
    return Dataset.from_dict({"one": one, "two": two, "score": [i % 3 / 2 for i in range(n)]})


def arguments(folder: Path) -> dict:
    return dict(
        output_dir=str(folder / "out"), max_steps=4, save_steps=2, logging_steps=1, learning_rate=3e-2,
        per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip


@scenario
def test_embeddings(folder):
    """Two adapters; one trains, and its folder alone is enough to load the model."""
    import torch
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import CosineSimilarityLoss

    model = SentenceTransformer(saved_base(folder, "BertModel"), device="cpu")
    texts = tiny.sentences(4, seed=7)
    embed = lambda model: model.encode(texts, convert_to_tensor=True, show_progress_bar=False).clone()
    found = {"base": embed(model)}
    model.add_adapter(lora(task_type="FEATURE_EXTRACTION"), "one")
    tiny.randomized(model)
    found["trains"] = sorted(tiny.adapter(model))
    trainer = SentenceTransformerTrainer(
        model, Arguments(**arguments(folder)), pairs(), loss=CosineSimilarityLoss(model)
    )
    trainer.train()
    found["logged"] = tiny.losses(trainer)
    found["trained"] = embed(model)
    assert not torch.allclose(found["trained"], found["base"], atol=1e-3)
    found["active"] = [str(a) for a in model.active_adapters()]
    found["state"] = {k: t.clone() for k, t in model.get_adapter_state_dict("one").items()}
    model.save(str(folder / "saved"), create_model_card=False)
    found["files"] = {place: tiny.held(folder / place) for place in ("saved", "out")}

    loaded = SentenceTransformer(str(folder / "saved"), device="cpu")
    torch.testing.assert_close(embed(loaded), found["trained"])
    found["names"] = sorted(loaded.state_dict())

    model.add_adapter(lora(r=2), "two")
    model.set_adapter("two")
    torch.testing.assert_close(embed(model), found["base"])
    model.set_adapter("one")
    torch.testing.assert_close(embed(model), found["trained"])
    model.disable_adapters()
    torch.testing.assert_close(embed(model), found["base"])
    model.enable_adapters()
    model.delete_adapter("two")
    found["left"] = embed(model)
    again = SentenceTransformer("base", device="cpu")
    again.load_adapter(str(folder / "saved"), adapter_name="read")
    found["read"] = embed(again)
    torch.testing.assert_close(found["read"], found["trained"])
    return found


@scenario
def test_resumed(folder):
    """The rest of a training from a checkpoint, which is an adapter with its trainer's state."""
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    saved_base(folder, "BertModel")
    found = {}
    for part in ("whole", "rest"):
        model = SentenceTransformer("base", device="cpu")
        model.add_adapter(lora())
        data = pairs().remove_columns("score")
        loss = MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model, Arguments(**arguments(folder)), data, loss=loss)
        trainer.train(resume_from_checkpoint=None if part == "whole" else str(folder / "out/checkpoint-2"))
        found[part] = {"logged": tiny.losses(trainer), "trains": tiny.adapter(model)}
    return found


@scenario
def test_cross_encoder(folder):
    """With its classifier trained whole, and kept in float32 by the client."""
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer
    from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as Arguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    saved_base(folder, "BertForSequenceClassification", num_labels=1)
    model = CrossEncoder("base", device="cpu")
    texts = list(zip(tiny.sentences(4, seed=7), tiny.sentences(4, seed=8)))
    score = lambda model: torch.tensor(model.predict(texts, show_progress_bar=False))
    found = {"base": score(model)}
    model.add_adapter(lora(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    names = [n.removesuffix(".original_module") for n, _ in model.named_modules() if n.endswith("original_module")]
    trainer = CrossEncoderTrainer(model, Arguments(**arguments(folder)), pairs(), loss=BinaryCrossEntropyLoss(model))
    trainer.train()
    found["logged"], found["trains"] = tiny.losses(trainer), tiny.adapter(model)
    found["trained"] = score(model)
    assert not torch.allclose(found["trained"], found["base"], atol=1e-3)
    model.set_keep_in_fp32_modules(names)
    found["kept"], found["in float32"] = names, score(model)
    model.save_pretrained(str(folder / "saved"), create_model_card=False)
    found["files"] = tiny.held(folder / "saved")
    found["loaded"] = score(CrossEncoder(str(folder / "saved"), device="cpu"))
    torch.testing.assert_close(found["loaded"], found["trained"])
    return found


@scenario
def test_a_folder_that_peft_saved(folder):
    """An adapter that `PeftModel.save_pretrained` wrote, named in place of a model."""
    import torch
    from peft import get_peft_model
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    model = get_peft_model(
        AutoModel.from_pretrained(saved_base(folder, "BertModel")), lora(task_type="FEATURE_EXTRACTION")
    )
    tiny.randomized(model).save_pretrained("adapter")
    tiny.tokenizer().save_pretrained("adapter")
    texts = tiny.sentences(4, seed=7)
    plain, adapted = (SentenceTransformer(name, device="cpu").encode(texts) for name in ("base", "adapter"))
    assert abs(plain - adapted).max() > 1e-3
    return {"embeddings": torch.tensor(adapted), "files": tiny.held(folder / "adapter")}
