# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Instruction tuning with TRL
#
# SmolLM2-135M-Instruct learns to write dates, given in ten languages, as ISO 8601. TRL's `SFTTrainer` takes a graft
# config as its `peft_config`, and computes the loss of the answers alone.

# %%
from examples.guides.start import OUT, QUICK, need

need("trl", "datasets", "gguf", "babel")

import graft.compat.peft

graft.compat.peft.install()  # from here on `import peft`, also within TRL, is graft

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from examples.demo_lm.chat import prompt
from examples.demo_lm.data import dates
from examples.demo_lm.model import load, model_source
from examples.demo_lm.scoring import exact, share
from examples.demo_lm.training import generate

# %% [markdown]
# A pair becomes a chat: the instruction and a date as the prompt, the ISO form as the completion. The day of no
# held-out date is among those to train on, in any language.

# %%
task = dates(seed=0, held_out=10 if QUICK else 30)
model, tokenizer = load(model_source(None))


def chat(pair):
    asked = [{"role": "system", "content": task.instruction}, {"role": "user", "content": pair.text}]
    return {"prompt": asked, "completion": [{"role": "assistant", "content": pair.answer}]}


data = Dataset.from_list([chat(pair) for pair in task.train[: 32 if QUICK else None]])
print(data[0])


# %%
def answers(model):
    asked = [prompt(tokenizer, task.instruction, pair.text) for pair in task.test]
    return generate(model, tokenizer, asked, tokens=16)


def score(answers):
    return share([exact(answer, pair.answer) for answer, pair in zip(answers, task.test)])


before = answers(model)

# %%
trainer = SFTTrainer(
    model,
    SFTConfig(
        str(OUT / "instruction_tuning"),
        max_steps=2 if QUICK else 40,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        warmup_steps=4,
        logging_steps=10,
        gradient_checkpointing=False,  # the model is small: time matters more than memory
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=graft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
)
trainer.model.print_trainable_parameters()
trainer.train()
trainer.save_model(OUT / "instruction_tuning/dates")

# %% [markdown]
# What counts is the saved adapter on a fresh base.

# %%
tuned = graft.PeftModel.from_pretrained(load(model_source(None))[0], OUT / "instruction_tuning/dates")
after = answers(tuned)
for pair, old, new in list(zip(task.test, before, after))[:5]:
    print(f"{pair.text:>32} → {' '.join(new.split())} (before: {' '.join(old.split())})")
print(f"exactly right, of {len(task.test)} held-out dates: before {score(before):.2f}, after {score(after):.2f}")
