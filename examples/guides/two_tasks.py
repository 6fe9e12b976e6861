# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Two tasks on one base
#
# One MiniLM in memory, two adapters with heads of their own: spam has two labels, the topics of headlines have five.
# Both train at once, in batches whose rows belong to either, and answer in such batches.

# %%
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import graft
from examples.demo.data import MODEL, load_task, locate
from examples.demo.display import progress
from examples.demo.training import accuracy, batches, predict
from examples.guides.start import OUT, QUICK

# %%
tasks = {name: load_task(name, limit=80 if QUICK else None) for name in ("spam", "topics")}
source = locate(MODEL)
tokenizer = AutoTokenizer.from_pretrained(source)


def encode(texts):
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))


def fresh():
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)


# %%
torch.manual_seed(0)
config = graft.LoraConfig(
    task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
)
model = graft.get_peft_model(fresh(), config, "spam")
model.add_adapter("topics", config, heads={"classifier": torch.nn.Linear(384, 5)})
model.set_requires_grad(["spam", "topics"])  # add_adapter leaves all but the active one frozen

# %% [markdown]
# `adapter_names` says the adapter of each row. Logits are as wide as the widest head: labels that a row's head does not
# have are at -inf, so that one cross entropy serves both.

# %%
steps = 4 if QUICK else 100
rows = ["spam"] * 8 + ["topics"] * 8


def train():
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    drawn = [batches(task.train, 8, steps, seed=0) for task in tasks.values()]
    for (spam, spam_labels), (topics, topic_labels) in zip(*drawn):
        logits = model(**encode(spam + topics), adapter_names=rows).logits
        loss = F.cross_entropy(logits, torch.cat([spam_labels, topic_labels]))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


losses = progress(train(), "both", steps)

# %% [markdown]
# Each adapter goes into a folder of its own, and either can be loaded without the other.

# %%
model.save_pretrained(OUT / "two_tasks")
model = graft.PeftModel.from_pretrained(fresh(), OUT / "two_tasks/spam", adapter_name="spam")
model.load_adapter(OUT / "two_tasks/topics", adapter_name="topics")
for name, task in tasks.items():
    model.set_adapter(name)  # for whole batches; its head comes with it
    majority = (task.test.labels == task.train.labels.mode().values).float().mean().item()
    right = accuracy(predict(model, encode, task.test.texts), task.test.labels)
    print(f"{name}: accuracy {right:.3f} on {len(task.test)} held-out texts, majority {majority:.3f}")

# %%
texts = [tasks["spam"].test.texts[0], tasks["topics"].test.texts[0], tasks["topics"].test.texts[1]]
names = ["spam", "topics", "topics"]
with torch.no_grad():
    chosen = model(**encode(texts), adapter_names=names).logits.argmax(-1).tolist()
for name, text, label in zip(names, texts, chosen):
    print(f"{name:7} {tasks[name].labels[label]:14} {text[:70]}")
