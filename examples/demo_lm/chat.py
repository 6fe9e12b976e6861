# SPDX-License-Identifier: Apache-2.0
"""Pairs as the chat that the model was trained on: prompts, and batches whose loss falls on the answer only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from examples.demo_lm.data import Pair

IGNORED = -100  # no label: of torch's cross entropy

Batch = dict[str, Tensor]


def prompt(tokenizer: Any, instruction: str, text: str, shots: Sequence[Pair] = ()) -> str:
    """The chat up to where the model answers. `shots` are answered before."""
    turns = [("system", instruction)]
    for shot in shots:
        turns += [("user", shot.text), ("assistant", shot.answer)]
    chat = [{"role": role, "content": content} for role, content in (*turns, ("user", text))]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def training_batch(tokenizer: Any, instruction: str, pairs: Sequence[Pair]) -> Batch:
    """Prompt, answer, end of turn, padded on the right; labels are the answer and the end of turn: (batch, tokens)."""
    questions = [tokenizer(prompt(tokenizer, instruction, pair.text)).input_ids for pair in pairs]
    answers = [tokenizer(pair.answer + tokenizer.eos_token).input_ids for pair in pairs]
    rows = list(zip(questions, answers, strict=True))
    return {
        "input_ids": padded([q + a for q, a in rows], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(q + a) for q, a in rows], 0),
        "labels": padded([[IGNORED] * len(q) + a for q, a in rows], IGNORED),
    }


def padded(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def generation_batch(tokenizer: Any, prompts: Sequence[str]) -> Batch:
    """Padded on the left, so that every row's answer begins in the same column."""
    return dict(tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt"))
