# SPDX-License-Identifier: Apache-2.0
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graft

SIZES = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=64)


def fresh_base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, initializer_range=0.2, **SIZES)).eval()


config = graft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
