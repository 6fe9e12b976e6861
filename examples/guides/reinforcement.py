# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Reinforcement learning: GRPO, and a server that gets new versions
#
# TRL's GRPO trains a policy: LoRA on attention and experts of a mixture. Now and then a server gets its newest version,
# under a name of its own, while older ones still answer. Each has to answer as the policy did when it was published.
#
# The mixture is tiny and random (Qwen3-MoE: 2 layers, 4 experts), its text is made of 32 numbers, and the reward is the
# share of even ones: something to see within a minute.
#
# The server is a vLLM on this CPU if GRAFT_VLLM is the Python of its environment. vLLM's kernels for experts' LoRA are
# for GPUs: a plugin of 30 lines (examples/vllm_plugin) stands in for them; loaders, slots and router are vLLM's own.
# Without GRAFT_VLLM a copy of the base stands in for the server, and loads the same files.

# %%
from examples.guides.start import OUT, QUICK, need

need("trl", "datasets")

import os
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

import graft.compat.peft

graft.compat.peft.install()  # from here on `import peft`, also within TRL, is graft

from trl import GRPOConfig, GRPOTrainer

from examples.servers import in_this_process, vllm_on_a_cpu
from graft.serving import Versions

# %%
words = Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token="0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = dict(unk_token="0", pad_token="0", bos_token="1", eos_token="1")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=32)
ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
config = Qwen3MoeConfig(vocab_size=32, initializer_range=0.1, max_position_embeddings=128, **sizes, **experts, **ends)
FOLDER = OUT / "reinforcement"
Qwen3MoeForCausalLM(config).save_pretrained(FOLDER / "base")
tokenizer.save_pretrained(FOLDER / "base")
fresh = lambda: Qwen3MoeForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32).eval()

# %% [markdown]
# A callback publishes; nothing else of the trainer is changed. What it saves beside that is only for comparing later.


# %%
class Publish(TrainerCallback):
    def on_step_end(self, args, state, control, model, **_):
        if state.global_step % EVERY == 0:
            name = versions.publish(graft.adapter_tensors(model, layout="vllm"))
            model.save_pretrained(FOLDER / name)
            print(f"step {state.global_step}: {name}; the server holds {len(versions.names)}")


def reward(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


EVERY = 1 if QUICK else 15
lora = graft.LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)  # fmt: skip
lengths = dict(num_generations=8, per_device_train_batch_size=16, max_completion_length=12)
plain = dict(
    save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1 if QUICK else 5
)
arguments = GRPOConfig(str(FOLDER), max_steps=3 * EVERY, learning_rate=0.01, **lengths, **plain)
starts = Dataset.from_list([{"prompt": f"{i} {31 - i}"} for i in range(2, 30)])
policy = dict(args=arguments, train_dataset=starts, processing_class=tokenizer, peft_config=lora)
trainer = GRPOTrainer(fresh(), reward, callbacks=[Publish()], **policy)
trainer.remove_callback(PrinterCallback)

# %%
python, memory = os.environ.get("GRAFT_VLLM"), tempfile.TemporaryDirectory()  # /dev/shm on a server of yours
server = vllm_on_a_cpu(python, FOLDER / "base", 8, memory.name) if python else in_this_process(fresh(), memory.name)
with memory, server as held:
    versions = Versions("policy", held.load, held.unload, keep=3)
    trainer.train()
    for name in versions.names:
        print(f"{name}: {held.answers_as(name, FOLDER / name, fresh())}")
logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"share of even numbers: {logged[0]:.2f} at first, {logged[-1]:.2f} at the end")
