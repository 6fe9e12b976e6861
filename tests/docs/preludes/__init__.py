# SPDX-License-Identifier: Apache-2.0
"""Names that the pages take for granted, a file for each page, and the tiny models that they share."""

from __future__ import annotations

from typing import Any

import torch

SIZES = dict(num_hidden_layers=2, hidden_size=24, intermediate_size=36, num_attention_heads=4, vocab_size=61)


def language_model() -> Any:
    """A tiny Llama, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, initializer_range=0.2, **SIZES)).eval()


def classifier(labels: int = 2) -> Any:
    """A tiny BERT with a head."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(num_labels=labels, initializer_range=0.2, **SIZES)
    return BertForSequenceClassification(config).eval()


def tokens(rows: int = 4, length: int = 7) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, SIZES["vocab_size"], (rows, length))
