# SPDX-License-Identifier: Apache-2.0
"""The config of SHiRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graft.config.fields import Targets, require_positive_rank
from graft.core.errors import warn
from graft.methods.shira.masks import random_mask


@dataclass(kw_only=True)
class ShiraConfig(Targets):
    """SHiRA: r · (in + out) entries of each weight train, at places that a mask chooses.

    `mask_fn` of a config is a function (base_layer, r, **kwargs) → mask of the weight's shape, of zeros and that many
    ones. No file holds it: files hold the places. With another `mask_type` than "random", set it before injection.
    """

    peft_type: Any = "SHIRA"
    r: int = 32  # as many numbers train as in LoRA of this rank
    mask_type: str = "random"  # or any other name, for a `mask_fn` of your own
    random_seed: int | None = None
    fan_in_fan_out: bool = False  # the layers store (in, out); corrected by layer type
    init_weights: bool = True  # zero; else N(0, 1)

    counters: ClassVar[tuple[str, ...]] = ("random_seed",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)
        self.mask_fn: Callable[..., Tensor] | None = random_mask if self.mask_type == "random" else None
        if self.mask_fn is None and not self.inference_mode:
            warn(
                f"Argument mask_type={self.mask_type!r} is not recognized: set `mask_fn` of this config to a function "
                "(base_layer, r, **kwargs) → mask before get_peft_model()."
            )
