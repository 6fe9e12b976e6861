# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Serving a hundred adapters
#
# One SmolLM2-135M-Instruct, a hundred adapters, and batches whose rows each ask for another one. Slots of fixed size
# hold those that a batch needs; the others wait in memory or on disk.

# %%
from examples.guides.start import OUT, QUICK, need

need("gguf")

import random
import time

import torch
from torch.nn import functional as F

import graft
from examples.demo_lm.chat import generation_batch
from examples.demo_lm.model import load, model_source
from graft.serving import AdapterSlots

# %%
model, tokenizer = load(model_source(None))
question = [{"role": "user", "content": "Say a word, any word."}]
asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
vocabulary = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.istitle() and len(word) > 5)
words = random.Random(0).sample(vocabulary, 10 if QUICK else 100)
LAYER = "model.layers.29.mlp.down_proj"

# %% [markdown]
# A hundred trainings would take too long here, so the adapters are written down instead. Each has a word to say, and is
# of rank 1: where the last layer sees what it sees at the end of the question (A), it adds the direction of the word's
# token (B). Their folders are those of any LoRA adapter.

# %%
seen = {}  # by the last layer and by the norm after it, at the end of the question
hooks = [
    model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0][0, -1]}))
    for name in (LAYER, "model.norm")
]
with torch.no_grad():
    model(**generation_batch(tokenizer, [asked]))
for hook in hooks:
    hook.remove()
A = seen[LAYER] / seen[LAYER].square().sum()
tokens = model.get_output_embeddings().weight.detach()
tokens = F.normalize(tokens - tokens.mean(0), dim=-1) * 2 * seen["model.norm"].norm()
config = graft.LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=1, target_modules=[LAYER])
writer = graft.get_peft_model(model, config)
layer = writer.get_submodule(f"base_model.model.{LAYER}")
for word in words:
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A[None])
        layer.lora_B["default"].weight.copy_(tokens[tokenizer.convert_tokens_to_ids(word), :, None])
    writer.save_pretrained(OUT / "serving" / word)
model = writer.unload()

# %%
slots = AdapterSlots(model, max_adapters=16, max_rank=4, targets=[LAYER])
for word in words:
    slots.load(word, OUT / "serving" / word)
print(slots.report())


# %%
def answer(names):
    """What the model says to each row, under the row's adapter: eight tokens."""
    batch = generation_batch(tokenizer, [asked] * len(names))
    output = slots.generate(**batch, adapter_names=names, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])


start, right = time.perf_counter(), 0
for i in range(0, len(words), 10):
    names = words[i : i + 10]
    right += sum(said.startswith(name) for name, said in zip(names, answer(names)))
seconds = time.perf_counter() - start
print(f"{right} of {len(words)} adapters say their word; without adapter: {answer(['__base__'])}")
print(f"{len(words) / seconds:.1f} answers a second, in batches of ten rows with ten adapters")

# %% [markdown]
# The same one by one, each adapter for a batch of its own.

# %%
start = time.perf_counter()
for name in words[:10]:
    answer([name])
print(f"{10 / (time.perf_counter() - start):.1f} answers a second one by one")
print(slots.report())
