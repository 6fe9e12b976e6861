# SPDX-License-Identifier: Apache-2.0
"""Cartridge: keys and values distilled from a long text, the first of them frozen
(https://arxiv.org/abs/2506.06266)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.prompt import PromptLearningConfig
from graft.core.errors import ConfigError
from graft.prompts.base import STORED, Prompt, pick
from graft.prompts.prefix_tuning import check_shape


@dataclass(kw_only=True)
class CartridgeConfig(PromptLearningConfig):
    """Cartridge: num_virtual_tokens keys and values of every layer, made from a text or at random."""

    peft_type: str = "CARTRIDGE"
    num_frozen_tokens: int = 1  # first tokens that never train, which keeps training stable
    holds_keys = True

    def __post_init__(self) -> None:
        """Check the fields, after those of the base class.

        Raises ConfigError if num_frozen_tokens is negative, or above num_virtual_tokens where that is not None.
        """
        super().__post_init__()
        total = self.num_virtual_tokens
        if self.num_frozen_tokens < 0 or (total is not None and self.num_frozen_tokens > total):
            raise ConfigError(
                "`num_frozen_tokens` must be <= `num_virtual_tokens`, and not negative: "
                f"got num_frozen_tokens={self.num_frozen_tokens} and num_virtual_tokens={total}."
            )


class CartridgeEncoder(Prompt):
    """The prompt of a Cartridge: (tokens, 2 · layers · token_dim), as in prefix tuning."""

    config = CartridgeConfig

    def __init__(self, cfg: Any, words: nn.Module | None = None):
        """Make the frozen tokens, None if there are none, and those that train, both of random normal numbers."""
        super().__init__(cfg, words)
        width, frozen = 2 * cfg.num_layers * cfg.token_dim, cfg.num_frozen_tokens
        self.num_frozen_tokens = frozen
        self.frozen_embedding = nn.Parameter(torch.randn(frozen, width), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(torch.randn(cfg.num_virtual_tokens - frozen, width))

    @property
    def weight(self) -> Tensor:
        """The prompt (tokens, 2 · layers · token_dim) as a new tensor: frozen tokens, if any, then those that train."""
        frozen = () if self.frozen_embedding is None else (self.frozen_embedding,)
        return torch.cat([*frozen, self.trainable_embedding])

    @property
    def embedding(self) -> CartridgeEncoder:
        """The encoder itself: `encoder.embedding.weight` is then the prompt, as in other encoders."""
        return self

    def forward(self, indices: Tensor | None = None, **arguments: object) -> Tensor:
        """Return keys and values (tokens, 2 · layers · token_dim), frozen tokens first; with `indices` only these
        tokens.
        """
        return pick(self.weight, indices)

    def restore(self, name: str, value: Tensor) -> None:
        """Copy keys and values (tokens, 2 · layers · token_dim) into the frozen and the trainable tokens.

        `name` is unused, and the shape is not checked.
        """
        with torch.no_grad():
            if self.frozen_embedding is not None:
                self.frozen_embedding.copy_(value[: self.num_frozen_tokens])
            self.trainable_embedding.copy_(value[self.num_frozen_tokens :])

    def load_prompt_embeddings(self, values: Tensor) -> None:
        """Copy keys and values (tokens, 2 · layers · token_dim) into the frozen and the trainable tokens.

        Raises:
            ValueError: the shape differs.
        """
        check_shape(values, self.weight)
        self.restore(STORED, values)
