# SPDX-License-Identifier: Apache-2.0
"""P-tuning: embeddings in front of the input, computed by a small network (https://arxiv.org/abs/2103.10385)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from torch import Tensor, nn

from graft.config.fields import POSITIVE
from graft.config.prompt import PromptLearningConfig
from graft.core.errors import ConfigError, warn
from graft.prompts.base import Prompt, pick


class PromptEncoderReparameterizationType(str, Enum):
    """The network that computes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: embeddings in front of the input, computed by an MLP or LSTM in training."""

    peft_type: str = "P_TUNING"
    encoder_reparameterization_type: Any = PromptEncoderReparameterizationType.MLP  # or "LSTM"
    encoder_hidden_size: Annotated[int | None, POSITIVE] = None  # None: token_dim
    encoder_num_layers: Annotated[int, POSITIVE] = 2  # layers of the LSTM
    encoder_dropout: float = 0.0  # dropout of the LSTM

    def __post_init__(self) -> None:
        """Make encoder_reparameterization_type a member of its enum, after the base class's checks.

        Raises ConfigError for another value than MLP and LSTM.
        """
        super().__post_init__()
        try:
            self.encoder_reparameterization_type = PromptEncoderReparameterizationType(
                self.encoder_reparameterization_type
            )
        except ValueError:
            raise ConfigError(
                "Prompt encoder type not recognized. Please use one of MLP (recommended) or LSTM, not "
                f"{self.encoder_reparameterization_type!r}."
            ) from None


class PromptEncoder(Prompt):
    """The prompt that a network computes. Files hold only the result."""

    config = PromptEncoderConfig

    def __init__(self, cfg: Any, words: nn.Module | None = None):
        """Make `embedding` of all rows, set `encoder_type` and, unless inference_mode is set, make the network.

        With the type LSTM it is `lstm_head`, a bidirectional LSTM with `encoder_dropout`, and `mlp_head`, an MLP of 2
        layers, on top. Otherwise it is `mlp_head` alone, 3 linear layers without dropout. The MLP alone warns that it
        ignores encoder_num_layers, if that is not the default.
        """
        super().__init__(cfg, words)
        dim, H = cfg.token_dim, cfg.encoder_hidden_size
        self.embedding = nn.Embedding(cfg.rows, dim)
        self.encoder_type = cfg.encoder_reparameterization_type
        if cfg.inference_mode:
            return
        if self.encoder_type == "LSTM":
            self.lstm_head = nn.LSTM(
                dim, H, cfg.encoder_num_layers, dropout=cfg.encoder_dropout, bidirectional=True, batch_first=True
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * H, 2 * H), nn.ReLU(), nn.Linear(2 * H, dim))
            return
        if cfg.encoder_num_layers != type(cfg)().encoder_num_layers:
            warn(
                f"for {self.encoder_type.value}, the argument `encoder_num_layers` is ignored. "
                "Exactly 2 MLP layers are used."
            )
        self.mlp_head = nn.Sequential(nn.Linear(dim, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, dim))

    def forward(self, indices: Tensor | None = None, **arguments: object) -> Tensor:
        """Return the prompt (tokens, dim), the network's output for the embedding; with `indices` the network runs on
        these rows alone.

        Without a network return rows of the embedding.
        """
        rows = pick(self.embedding.weight, indices)
        if not hasattr(self, "mlp_head"):
            return rows
        if self.encoder_type == "LSTM":
            rows = self.lstm_head(rows)[0]
        return self.mlp_head(rows)

    def restore(self, name: str, value: Tensor) -> None:
        """Put the computed prompt in as the embedding, and delete the network, if there is one.

        A value of the embedding's shape is written into it in place; another becomes a new parameter.

        Raises CheckpointError if the shape differs and the embedding is spread over processes.
        """
        super().restore(name, value)
        for network in ("lstm_head", "mlp_head"):
            self._modules.pop(network, None)
