# SPDX-License-Identifier: Apache-2.0
"""The attributes and functions of an AdapterLayer that methods, plans and merging use.

`core/layer.py` imports these modules, so that they cannot import its class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graft.core.call import Call
from graft.core.carrier import CarrierState
from graft.core.containers import Slot
from graft.core.method import Method
from graft.core.ops import Op
from graft.core.site import Site, Store, Weight


class Layer(Protocol):
    """A base layer and the adapters on it. Each attribute and function is described where AdapterLayer defines it."""

    site: Site
    op: Op
    store: Store
    call: Call
    methods: dict[str, Method]  # by adapter
    kinds: list[type]
    containers: list[str]
    scaling: dict[str, float]
    scaling_at_start: dict[str, float]
    attached: set[str]
    training: bool
    cast_input_dtype_enabled: bool
    _modules: dict[str, nn.Module | None]

    @property
    def state(self) -> CarrierState: ...
    @property
    def base_layer(self) -> nn.Module: ...
    @property
    def base_module(self) -> nn.Module: ...
    @property
    def base_weight(self) -> Weight: ...
    @property
    def weight_now(self) -> Tensor: ...
    @property
    def bias_now(self) -> Tensor | None: ...
    @property
    def W0(self) -> Tensor: ...
    @property
    def base_trains(self) -> bool: ...
    @property
    def may_fuse(self) -> bool: ...
    @property
    def type_name(self) -> str: ...
    @property
    def adapter_layer_names(self) -> tuple[str, ...]: ...
    @property
    def where(self) -> tuple[torch.device | None, torch.dtype | None]: ...
    @property
    def argument_names(self) -> tuple[str, ...]: ...
    def get_base_layer(self) -> nn.Module: ...
    def find_reader_plan(self) -> Any: ...
    def plan_for(self, names: tuple[str, ...], weights: tuple[float, ...] | None = None) -> Any: ...
    def refresh_plan(self) -> None: ...
    def slots(self, adapter: str) -> list[Slot]: ...
    def tensors(self, adapter: str, transient: bool = False) -> Iterator[tuple[Slot, Tensor]]: ...
    def write_bias(self, bias: Tensor) -> None: ...
