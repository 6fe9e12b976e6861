# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning: learned keys and values in front of every layer's own (https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import POSITIVE
from graft.config.prompt import PromptLearningConfig
from graft.core.method import COMPARISON, PublishedRate
from graft.prompts.base import Prompt, pick


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: num_virtual_tokens learned keys and values in front of every layer's own."""

    peft_type: str = "PREFIX_TUNING"
    encoder_hidden_size: Annotated[int | None, POSITIVE] = None  # width of the projection; None: token_dim
    prefix_projection: bool = False  # a small network, which no file holds, computes keys and values
    init_weights: Literal["zero"] | None = None  # "zero": keys and values of zeros
    holds_keys = True


class PrefixEncoder(Prompt):
    """The prompt of prefix tuning, (tokens, 2 · layers · token_dim): key and value of each layer in turn."""

    config = PrefixTuningConfig
    published_lr = PublishedRate(1e-3, 5e-3, COMPARISON)

    def __init__(self, cfg: Any, words: nn.Module | None = None):
        """Make the embedding, of keys and values or, with prefix_projection and without inference_mode, of a
        projection's inputs.

        With init_weights "zero" keys and values start at 0: the embedding, or the projection's last layer, is filled
        with zeros.
        """
        super().__init__(cfg, words)
        tokens, D, width = cfg.num_virtual_tokens, cfg.token_dim, 2 * cfg.num_layers * cfg.token_dim
        self.prefix_projection = cfg.prefix_projection and not cfg.inference_mode
        if self.prefix_projection:
            self.embedding = nn.Embedding(tokens, D)
            H = cfg.encoder_hidden_size
            self.transform = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, width))
            last: list[Tensor] = list(self.transform[2].parameters())
        else:
            self.embedding = nn.Embedding(tokens, width)
            last = [self.embedding.weight]
        if cfg.init_weights == "zero":
            for p in last:
                nn.init.zeros_(p)

    def forward(self, indices: Tensor | None = None, **arguments: object) -> Tensor:
        """Return keys and values (tokens, 2 · layers · token_dim), from the projection if there is one; with `indices`
        only these rows are projected.
        """
        rows = pick(self.embedding.weight, indices)
        return self.transform(rows) if self.prefix_projection else rows

    def restore(self, name: str, value: Tensor) -> None:
        """Put keys and values in as the embedding, delete the projection, if there is one, and set `prefix_projection`
        to False.

        A value of the embedding's shape is written into it in place; another becomes a new parameter.

        Raises CheckpointError if the shape differs and the embedding is spread over processes.
        """
        super().restore(name, value)
        if self.prefix_projection:
            del self.transform
            self.prefix_projection = False

    def load_prompt_embeddings(self, values: Tensor) -> None:
        """Write keys and values (tokens, 2 · layers · token_dim) into the embedding.

        Raises:
            ValueError: the shape differs, or a projection computes them.
        """
        if self.prefix_projection:
            raise ValueError("Keys and values that a projection computes cannot be set. Use prefix_projection=False.")
        check_shape(values, self.embedding.weight)
        self.restore("", values)


def check_shape(values: Tensor, there: Tensor) -> None:
    """Raise ValueError if the values have another shape than the tensor `there`."""
    if values.shape != there.shape:
        raise ValueError(f"Prompt embeddings must have shape {tuple(there.shape)}, got {tuple(values.shape)}.")


def as_pairs(prompt: Tensor, cfg: Any) -> list[tuple[Tensor, Tensor]]:
    """Return key and value of each layer, (batch, heads, tokens, head_dim), as views of the prompt.

    A wrong size is torch's RuntimeError.

    An encoder-decoder (two submodules) gets them as in PEFT: the pairs of every second layer, then again from the
    first.

    Args:
        prompt: ([batch,] tokens, 2 · layers · token_dim).
    """
    prompt = prompt if prompt.dim() == 3 else prompt[None]
    batch, tokens, _ = prompt.shape
    heads = cfg.num_attention_heads
    parts = prompt.view(batch, tokens, 2 * cfg.num_layers, heads, cfg.token_dim // heads).permute(2, 0, 3, 1, 4)
    step, n = 2 * cfg.num_transformer_submodules, len(parts)
    return [(parts[step * i % n], parts[step * i % n + 1]) for i in range(cfg.num_layers)]


def from_pairs(pairs: list[tuple[Tensor, Tensor]], tokens: int) -> Tensor:
    """Return a prompt, (tokens, 2 · layers · token_dim): the first tokens of each layer's (1, heads, T, head_dim).

    Only the first sample is taken. Layers need at least `tokens` tokens, which is not checked. It is the reverse of
    `as_pairs` for one submodule.
    """
    flat = [t[0, :, :tokens].transpose(0, 1).reshape(tokens, -1) for pair in pairs for t in pair]
    return torch.cat(flat, dim=1)
