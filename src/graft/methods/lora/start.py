# SPDX-License-Identifier: Apache-2.0
"""Initialisations that begin with the base weight and take their part out of it: which there are, and the rest."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.core.errors import ConfigError
from graft.methods.lora.choices import TITLES

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STARTS = {  # init → "module:function" beside this, which takes the adapter and W (out, in) in float32
    "pissa": "pissa:start",
    "olora": "olora:start",
    "corda": "corda:start",
    "lora_ga": "loraga:start",
    "loftq": "loftq:start",
}


class Start(NamedTuple):
    """Values to begin with, and what is taken out of the base weight for them, in float32."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    taken_A: Tensor  # (k, in)
    taken_B: Tensor  # (out, k)

    @classmethod
    def of(cls, A: Tensor, B: Tensor, scaling: float) -> Start:
        """Return the start that leaves W + scaling · B A what it was."""
        return cls(A, B, A, scaling * B)


def kind_of(how: Any) -> str | None:
    """Return the init in STARTS that `init_lora_weights` asks for; None for any other."""
    if not isinstance(how, str):
        return None
    return "pissa" if how.startswith("pissa") else how if how in STARTS else None


@torch.no_grad()
def start_of(lora: Any, W: Tensor) -> Start:
    """Return the start of an adapter on W (out, in).

    Raises:
        TypeError: W is of another dtype than float32, float16 and bfloat16.
        ConfigError: the rank is above what the weight has.
        CalibrationError: data are needed, and this layer has none.
    """
    kind: Any = kind_of(lora.cfg.init_lora_weights)
    if W.dtype not in FLOATS:
        raise TypeError(
            f"Please initialize {TITLES[kind]} under float32, float16, or bfloat16 (layer '{lora.site.key}' is "
            f"{W.dtype}). A quantized base can be quantized again afterwards."
        )
    check_rank(lora, 2 if kind == "lora_ga" else 1)
    module, name = STARTS[kind].split(":")
    return getattr(import_module(f"graft.methods.lora.{module}"), name)(lora, W.detach().float())  # type: ignore[no-any-return]


def check_rank(lora: Any, times: int) -> None:
    """Raise ConfigError unless the weight has r (or 2 r) singular vectors, and the scaling a root."""
    cfg, most = lora.cfg, min(lora.site.shape) // times
    if lora.scaling <= 0 or cfg.r > most:
        raise ConfigError(
            f"init_lora_weights={cfg.init_lora_weights!r} needs a positive lora_alpha and a rank that the weight of "
            f"'{lora.site.key}' can have, at most {most}: r={cfg.r}, lora_alpha={cfg.lora_alpha}."
        )
