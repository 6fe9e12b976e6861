# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A quantized base
#
# SmolLM2-135M-Instruct in 4 bits (bitsandbytes' NF4, on a CPU too), with a LoRA adapter over it. The base stays packed
# while the adapter trains; afterwards the adapter is merged twice: into 4 bits again, and exactly, into plain weights.

# %%
from examples.guides.start import OUT, QUICK, need

need("bitsandbytes", "gguf", "babel")

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import graft
from examples.demo.display import progress
from examples.demo_lm.chat import training_batch
from examples.demo_lm.data import dates
from examples.demo_lm.model import load, model_source
from examples.demo_lm.training import train

# %%
task = dates(seed=0, held_out=8 if QUICK else 24)
dense, tokenizer = load(model_source(None))
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")


def packed():
    return AutoModelForCausalLM.from_pretrained(model_source(None), quantization_config=nf4)


base = packed()
print(f"weights: {dense.get_memory_footprint() / 1e6:.0f} MB dense, {base.get_memory_footprint() / 1e6:.0f} MB packed")

# %% [markdown]
# `prepare_model_for_kbit_training` freezes the base and casts what is not packed to float32. From here on nothing knows
# that the weights are packed; every other method of graft would work on them in the same way.

# %%
torch.manual_seed(0)
config = graft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
model = graft.get_peft_model(graft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), config)
model.print_trainable_parameters()
steps = 2 if QUICK else 20
losses = progress(train(model, tokenizer, task, steps=steps, lr=3e-3, seed=0), "over 4 bits", steps)
model.save_pretrained(OUT / "quantized_base")


# %%
@torch.no_grad()
def loss(model):
    """The loss of the held-out answers."""
    return model.eval()(**training_batch(tokenizer, task.instruction, task.test)).loss.item()


@torch.no_grad()
def logits(model):
    return model.eval()(**tokenizer("The fifth of March 2024 is", return_tensors="pt")).logits


print(f"held-out loss over 4 bits: {loss(packed()):.3f} without the adapter, {loss(model):.3f} with it")
expected = logits(model)

# %% [markdown]
# Merged into 4 bits, the sum is rounded again, and a small update can vanish in the rounding. With `dequantize=True`
# the layers become plain ones, and nothing is lost.

# %%
for dequantize in (False, True):
    merged = graft.PeftModel.from_pretrained(packed(), OUT / "quantized_base").merge_and_unload(dequantize=dequantize)
    layer = type(merged.model.layers[0].self_attn.q_proj).__name__
    difference = (logits(merged) - expected).abs().max().item()
    print(f"merged into {layer:10}: held-out loss {loss(merged):.3f}, logits differ by at most {difference:.0e}")
