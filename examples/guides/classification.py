# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Classification
#
# LoRA teaches MiniLM, a sentence encoder of 22.7 M parameters, to tell spam from other text messages. transformers'
# `Trainer` trains, as it would train any model; what is saved is the adapter alone.

# %%
import graft.compat.peft

graft.compat.peft.install()  # Trainer asks for peft.PeftModel, and graft answers

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from examples.demo.data import MODEL, load_task, locate
from examples.guides.start import OUT, QUICK

# %%
task = load_task("spam", limit=80 if QUICK else None)
source = locate(MODEL)
tokenizer = AutoTokenizer.from_pretrained(source)


def rows(split):
    inputs = tokenizer(split.texts, truncation=True, max_length=32)["input_ids"]
    return [{"input_ids": ids, "label": label} for ids, label in zip(inputs, split.labels.tolist())]


# %% [markdown]
# The adapter has two small matrices for the queries and two for the values of each layer. The head is new, so it is
# trained and saved whole. `graft.plan` shows what would happen before anything does.

# %%
torch.manual_seed(0)
base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
config = graft.LoraConfig(
    task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
)
print(graft.plan(base, config))
model = graft.get_peft_model(base, config)


# %%
def accuracy(predictions):
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


trainer = Trainer(
    model,
    TrainingArguments(
        OUT / "classification",
        max_steps=4 if QUICK else 100,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=2e-3,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=rows(task.train),
    eval_dataset=rows(task.test),
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=accuracy,
)
before = trainer.evaluate()["eval_accuracy"]
trainer.train()
after = trainer.evaluate()["eval_accuracy"]
majority = (task.test.labels == task.train.labels.mode().values).float().mean().item()
print(f"held out: {len(task.test)} messages; majority {majority:.3f}, before {before:.3f}, after {after:.3f}")

# %% [markdown]
# The adapter's folder holds a third of a megabyte, and knows which model it is for.

# %%
trainer.save_model(OUT / "classification/spam")
print({file.name: f"{file.stat().st_size / 1000:.0f} kB" for file in (OUT / "classification/spam").glob("adapter*")})

model = graft.AutoPeftModelForSequenceClassification.from_pretrained(OUT / "classification/spam", num_labels=2).eval()
texts = ["Are you coming to dinner on Sunday?", "You have WON a free cruise! Call 09061 now to claim your prize"]
with torch.no_grad():
    spam = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)[:, 1]
for text, p in zip(texts, spam.tolist()):
    print(f"spam {p:.2f}  {text}")
