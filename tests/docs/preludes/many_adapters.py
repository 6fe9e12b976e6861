# SPDX-License-Identifier: Apache-2.0
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=64)


def fresh_base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, initializer_range=0.2, **SIZES)).eval()


def counting(step, n=64):
    """Rows that count by `step`."""
    ids = (torch.arange(n)[:, None] + step * torch.arange(8)) % 64
    return [{"input_ids": row, "labels": row} for row in ids]


base = fresh_base()
loader = DataLoader(counting(1), batch_size=8, shuffle=True)
other = DataLoader(counting(-1), batch_size=8, shuffle=True)
valid = DataLoader(counting(1)[::4], batch_size=8)
