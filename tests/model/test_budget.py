# SPDX-License-Identifier: Apache-2.0
"""The estimate of training memory against what real models hold and keep."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import graft
from graft.core.errors import ConfigError
from graft.model.budget import Counter, arguments, block_kinds, budget, coverage, largest_batch

LLAMA = dict(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, vocab_size=200)
MODELS = {
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=n)),
    "tied": lambda n: LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=n, tie_word_embeddings=True)),
    "gpt2": lambda n: GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, vocab_size=200, n_layer=n)),
    "bert": lambda n: BertForMaskedLM(
        BertConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=200, num_hidden_layers=n)
    ),
}
CONFIGS = {
    "lora": lambda: graft.LoraConfig(r=8, target_modules="all-linear"),
    "conv1d": lambda: graft.LoraConfig(r=8, target_modules="all-linear", fan_in_fan_out=True),
    "dora": lambda: graft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "ia3": lambda: graft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def meta(kind):
    def make(n):
        with torch.device("meta"):
            return MODELS[kind](n)

    return make


def real(kind, config, layers, batch, length, dtype, checkpointing=False):
    """Return the bytes of a real model's frozen weights, and those that its forward pass keeps."""
    model = graft.get_peft_model(MODELS[kind](layers).to(dtype), config).train()
    if checkpointing:
        base = model.get_base_model()
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
        model.enable_input_require_grads()
    counted = Counter(model)
    with torch.autograd.graph.saved_tensors_hooks(counted, lambda held: held):
        out = model(**arguments(model, torch.zeros(batch, length, dtype=torch.long)))
    assert out.loss is not None
    weights = sum(
        p.untyped_storage().nbytes() for p in {id(p): p for p in model.parameters() if not p.requires_grad}.values()
    )
    return weights, counted.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, config", [("llama", "lora"), ("llama", "dora"), ("llama", "ia3"), ("tied", "lora"),
                                          ("gpt2", "conv1d"), ("bert", "lora")])  # fmt: skip
def test_the_estimate_is_within_a_tenth_of_what_a_model_keeps(kind, config, dtype):
    held = budget(meta(kind), 5, CONFIGS[config](), 3, 48, dtype)
    weights, kept = real(kind, CONFIGS[config](), 5, 3, 48, dtype)
    assert held.weights == weights
    assert held.kept == pytest.approx(kept, rel=0.1)


def test_checkpointing_keeps_the_inputs_of_blocks_and_what_is_around_them():
    held = budget(meta("llama"), 8, CONFIGS["lora"](), 2, 64, torch.float32, checkpointing=True)
    whole = budget(meta("llama"), 8, CONFIGS["lora"](), 2, 64, torch.float32)
    _, kept = real("llama", CONFIGS["lora"](), 8, 2, 64, torch.float32, checkpointing=True)
    assert held.kept == pytest.approx(kept + held.block, rel=0.1)  # the block that runs again
    assert held.kept < whole.kept / 2


def test_what_trains_is_counted_once_and_optimizers_differ():
    model = graft.get_peft_model(MODELS["llama"](4), CONFIGS["lora"]())
    trained = model.get_nb_trainable_parameters()[0]
    held = {o: budget(meta("llama"), 4, CONFIGS["lora"](), 1, 16, optimizer=o) for o in ("adamw", "sgd")}
    assert held["adamw"].adapter == held["adamw"].gradients == 4 * trained
    assert held["adamw"].optimizer == 8 * trained and held["sgd"].optimizer == 0
    with pytest.raises(ConfigError, match="optimizer is one of"):
        budget(meta("llama"), 4, CONFIGS["lora"](), 1, 16, optimizer="lion")


def test_the_largest_batch_fits_and_the_next_does_not():
    held = budget(meta("llama"), 4, CONFIGS["lora"](), 2, 64, torch.float32)
    memory = 4 * held.total
    most = largest_batch(held, 2, memory)
    for batch, fits in ((most, True), (most + 1, False)):
        there = budget(meta("llama"), 4, CONFIGS["lora"](), batch, 64, torch.float32)
        assert (there.total <= memory * 0.97) is fits
    assert largest_batch(held, 2, held.fixed) == 0


def test_blocks_without_an_adapter_are_counted():
    model = MODELS["llama"](6)
    config = graft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 3])
    matched = [m.name for m in graft.plan(model, config).matched]
    assert coverage(matched, block_kinds(model)) == {"LlamaDecoderLayer": (6, 2)}
