# SPDX-License-Identifier: Apache-2.0
"""The face of a tuner and of its registry: what methods, which are below both, ask of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from graft.core.call import Call
from graft.core.carrier import Carrier
from graft.core.rows import Finish, Run
from graft.core.shared import Shared


class Tuner(Protocol):
    """A model with adapters. Each attribute is described where `Registry` defines it."""

    @property
    def model(self) -> nn.Module: ...  # the user's, of any class
    @property
    def training(self) -> bool: ...
    @property
    def disabled(self) -> bool: ...
    @property
    def mixed(self) -> bool: ...
    @property
    def peft_config(self) -> Mapping[str, Any]: ...  # by adapter
    @property
    def active_adapters(self) -> list[str]: ...
    @property
    def layers(self) -> Mapping[str, Any]: ...  # by path
    @property
    def wrappers(self) -> Mapping[str, Any]: ...  # by path
    @property
    def states(self) -> dict[str, Any]: ...  # of methods that allocate a budget, by adapter
    @property
    def shared(self) -> Shared: ...

    starts: dict[str, Any]  # notes of first values, by adapter
    trained: set[str]
    watch: Any
    in_ddp: bool

    @property
    def call(self) -> Call: ...
    def carriers(self) -> Iterator[Carrier]: ...
    def parts_of(self, adapter_name: str) -> Any: ...
    def check_known(self, names: Sequence[str]) -> None: ...
    def calling(self, what: str) -> AbstractContextManager[object]: ...
    def acting(self, run: Run) -> AbstractContextManager[Finish]: ...
