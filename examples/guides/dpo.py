# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Preferences: DPO with TRL
#
# Direct preference optimization raises the chosen of two answers against the rejected one, compared with a reference
# model. With an adapter the reference costs no memory: TRL runs the same model with the adapter disabled.
#
# Here SmolLM2-135M-Instruct is asked for a date in ISO 8601. Chosen is 2024-03-05, rejected is 05/03/2024. That the
# chosen answer becomes likelier than the rejected one does not make it the likeliest of all: the answers to held-out
# questions show what it comes to.

# %%
from examples.guides.start import OUT, QUICK, need

need("trl", "datasets", "gguf", "babel")

import graft.compat.peft

graft.compat.peft.install()  # from here on `import peft`, also within TRL, is graft

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from examples.demo_lm.chat import prompt
from examples.demo_lm.data import dates
from examples.demo_lm.model import load, model_source
from examples.demo_lm.training import generate

# %%
task = dates(seed=0, held_out=8 if QUICK else 24)
model, tokenizer = load(model_source(None))


def preference(pair):
    year, month, day = pair.answer.split("-")
    answer = lambda text: [{"role": "assistant", "content": text}]
    return {
        "prompt": [{"role": "system", "content": task.instruction}, {"role": "user", "content": pair.text}],
        "chosen": answer(pair.answer),
        "rejected": answer(f"{day}/{month}/{year}"),
    }


parts = task.train[: 16 if QUICK else 400], task.test
train, held_out = (Dataset.from_list([preference(pair) for pair in part]) for part in parts)
print(train[0])

# %%
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        str(OUT / "dpo"),
        max_steps=2 if QUICK else 20,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        beta=0.1,
        logging_steps=5,
        gradient_checkpointing=False,  # the model is small: time matters more than memory
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    ),
    train_dataset=train,
    eval_dataset=held_out,
    processing_class=tokenizer,
    peft_config=graft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
)
print(f"a second model as reference: {trainer.ref_model is not None}")
trainer.train()

# %% [markdown]
# The reward of an answer is β times the logarithm of how much likelier the adapter makes it. The margin is the chosen
# answer's reward less that of the rejected one, 0 before training.

# %%
result = trainer.evaluate()
print(f"held-out pairs: {len(held_out)}")
print(f"the chosen answer has the higher reward in {result['eval_rewards/accuracies']:.2f} of them")
print(f"mean margin of the rewards {result['eval_rewards/margins']:.2f}")
print(f"loss {result['eval_loss']:.3f}, log 2 = 0.693 before")

asked = [prompt(tokenizer, task.instruction, pair.text) for pair in task.test]
with trainer.model.disable_adapter():
    before = generate(trainer.model, tokenizer, asked, tokens=16)
after = generate(trainer.model, tokenizer, asked, tokens=16)
for pair, old, new in list(zip(task.test, before, after))[:5]:
    print(f"{pair.text:>32} → {' '.join(new.split())} (before: {' '.join(old.split())})")
said = [sum(answer.strip() == pair.answer for answer, pair in zip(by, task.test)) for by in (before, after)]
print(f"exactly right: {said[0]} of {len(task.test)} before, {said[1]} after")
