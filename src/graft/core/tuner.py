# SPDX-License-Identifier: Apache-2.0
"""The face of a tuner: what methods, which are below it, ask of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn


class Tuner(Protocol):
    """A model with adapters of some methods; `model/tuner.py` has the class."""

    model: nn.Module
    training: bool

    @property
    def peft_config(self) -> Mapping[str, object]: ...  # by adapter
    @property
    def active_adapters(self) -> list[str]: ...
    def __getattr__(self, name: str) -> Any: ...  # what its registry and the user's model have
