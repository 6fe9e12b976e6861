# SPDX-License-Identifier: Apache-2.0
"""The face of an AdapterLayer: what methods, plans and merging, which `core/layer.py` imports, ask of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from graft.core.containers import Slot
from graft.core.method import Method
from graft.core.ops import Op
from graft.core.site import Site, Store


class Layer(Protocol):
    """A base layer and the adapters on it. Each attribute and function is described where AdapterLayer defines it."""

    site: Site
    op: Op
    store: Store
    call: Any  # Call
    state: Any  # LayerState
    methods: dict[str, Method]  # by adapter
    kinds: list[Any]
    attached: set[str]
    training: bool
    cast_input_dtype_enabled: bool
    _modules: dict[str, nn.Module | None]

    @property
    def base_layer(self) -> Any: ...
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
    def argument_names(self) -> tuple[str, ...]: ...
    def get_base_layer(self) -> Any: ...
    def plan_of_reader(self) -> Any: ...
    def plan_for(self, names: tuple[str, ...]) -> Any: ...
    def slots(self, adapter: str) -> list[Slot]: ...
    def tensors(self, adapter: str, transient: bool = False) -> Iterator[tuple[Slot, Tensor]]: ...
    def first_tensor(self, adapter: str) -> Tensor: ...
    def check_active(self, names: Sequence[str]) -> None: ...
    def write_bias(self, bias: Tensor) -> None: ...
    def rewrite_base(self, W: Tensor) -> None: ...
