# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Merging and exporting
#
# Two adapters, each trained on half of the messages, become one; an adapter of another method becomes plain LoRA, which
# every server runs; and an adapter becomes part of the weights, in a model that needs no graft.

# %%
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import graft
from examples.demo.baselines import fit_probe
from examples.demo.data import MODEL, Split, load_task, locate
from examples.demo.display import progress
from examples.demo.training import accuracy, predict, train
from examples.guides.start import OUT, QUICK

task = load_task("spam", limit=80 if QUICK else None)
source = locate(MODEL)
tokenizer = AutoTokenizer.from_pretrained(source)


def encode(texts):
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt"))


def score(model):
    return accuracy(predict(model, encode, task.test.texts), task.test.labels)


# %% [markdown]
# Both halves need the same head: a linear probe of three hundred messages, which stays as it is from then on. What the
# halves learn is in their adapters.

# %%
torch.manual_seed(0)
base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
some = Split(task.train.texts[:300], task.train.labels[:300])
pooled = predict(base.base_model, encode, some.texts, lambda output, batch: output.pooler_output)
base.classifier = fit_probe(pooled, some.labels, 2)
base.save_pretrained(OUT / "merging/base")  # with this head
print(f"head alone: accuracy {score(base):.3f}")
lora = graft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
model = graft.get_peft_model(base, lora, "first")
model.add_adapter("second", lora)
steps, middle = 3 if QUICK else 40, len(task.train) // 2
for name, rows in (("first", slice(middle)), ("second", slice(middle, None))):
    half = Split(task.train.texts[rows], task.train.labels[rows])
    model.set_adapter(name)
    progress(train(model, encode, half, steps=steps, batch_size=16, lr=1e-3, seed=0), name, steps)

# %% [markdown]
# `add_weighted_adapter` writes their mean into a third adapter. "cat" keeps every rank, "svd" the largest.

# %%
model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mean", combination_type="svd", svd_rank=8)
for name in ("first", "second", "mean"):
    model.set_adapter(name)
    print(f"{name:6} accuracy {score(model):.3f}")

# %% [markdown]
# Into the weights: a plain BERT, which transformers alone saves and loads.

# %%
expected = predict(model, encode, task.test.texts)
merged = model.merge_and_unload()
merged.save_pretrained(OUT / "merging/plain")
plain = AutoModelForSequenceClassification.from_pretrained(OUT / "merging/plain")
difference = (predict(plain, encode, task.test.texts) - expected).abs().max().item()
print(f"{type(plain).__name__}, adapters: {hasattr(plain, 'peft_config')}; logits differ by at most {difference:.0e}")

# %% [markdown]
# HiRA's update is the weight times a product of low rank, entry by entry, so its own rank is high. Servers know LoRA
# alone; a LoRA of low rank loses something on the way, one of higher rank less.

# %%
hira = graft.HiraConfig(r=8, target_modules=["query", "value"])
model = graft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(OUT / "merging/base"), hira)
progress(train(model, encode, task.train, steps=steps, batch_size=16, lr=1e-2, seed=0), "HiRA", steps)
print(f"HiRA: accuracy {score(model):.3f}")
for rank in (16, 64):
    graft.save_as_lora(OUT / f"merging/rank{rank}", model, rank=rank)
    base = AutoModelForSequenceClassification.from_pretrained(OUT / "merging/base")
    exported = graft.PeftModel.from_pretrained(base, OUT / f"merging/rank{rank}")
    print(f"as LoRA of rank {rank}: accuracy {score(exported):.3f}")
