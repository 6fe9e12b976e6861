# SPDX-License-Identifier: Apache-2.0
"""ShadowConfig: the fields of PEFT 0.21.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graft.config.fields import LayerRange, Targeted, require_positive_rank
from graft.core.errors import ConfigError

MIRROR = "mirror"  # the shadow network is of the base model's own class
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@dataclass(kw_only=True)
class ShadowConfig(Targeted, LayerRange):
    """SHADOW: h ← h + α Up Down (h - s) before each block, s ← (1 - g) s + g T h after it; s starts as the output of a
    small network.

    Raises:
        ConfigError: a number that is not positive, or a size for a network that is loaded.
    """

    peft_type: Any = "SHADOW"
    r: int = 8  # width of Down
    shadow_alpha: float = 0.1  # α
    shadow_dropout: float = 0.2  # of Down's output
    init_weights: bool = True  # Up is zero: the adapter starts as nothing
    shadow_model: str = MIRROR  # or a folder, or a name on the hub
    shadow_num_hidden_layers: int | None = None  # of a mirror; None: 1
    shadow_hidden_size: int | None = None  # of a mirror; None, here and below: as the base model
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True  # a mirror as wide as the base model uses its word embeddings
    update_hidden_size: int | None = None  # width of T and of the gate's network; None: r
    auxiliary_loss_weight: float = 0.05  # of the shadow network's own loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)
        for name in ("update_hidden_size", *(f"shadow_{size}" for size in SIZES)):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"`{name}` should be a positive integer value but the value passed is {value}")
        given = [f"shadow_{size}" for size in SIZES if getattr(self, f"shadow_{size}") is not None]
        if self.shadow_model != MIRROR and given:
            raise ConfigError(
                f"{', '.join(given)} can only be set with shadow_model='{MIRROR}': '{self.shadow_model}' has sizes of "
                "its own."
            )
