# SPDX-License-Identifier: Apache-2.0
"""`trainable_token_indices`: single embedding rows that train beside an adapter of another method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from graft.core.carrier import Carrier, State
from graft.core.containers import Slot
from graft.core.layer import AdapterLayer
from graft.core.names import one_or_several


class TrainableTokensWrapper(Carrier, nn.Module):
    """A wrapper of an embedding (or a head tied to it) some of whose rows train. `token_adapter` does the work."""

    how = "already trained in single rows, through trainable_token_indices"

    def __init__(self, token_adapter: AdapterLayer, key: str):
        super().__init__()
        self.token_adapter = token_adapter
        self.key = key
        self.tied: set[str] = set()  # adapters that use the embedding's rows here; files do not hold them twice
        self.call = token_adapter.call

    inner_name, claim, takes_rows = "token_adapter", f"is {how} of", True

    @property
    def adapter_layer(self) -> AdapterLayer:  # type: ignore[override]
        return self.token_adapter

    @property
    def base_module(self) -> nn.Module:  # type: ignore[override]
        return self.token_adapter.base_layer

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.base_layer

    @property
    def kept(self) -> nn.Module:
        return self.token_adapter.base_layer

    @property
    def weight(self) -> Tensor:
        """The weight with the active rows, for models that use it without calling the embedding."""
        return self.token_adapter.effective_weight()

    def adapter_state_dict_load_map(self, adapter: str) -> dict[str, str]:
        """Return {name below this module in a file: name in memory}, for transformers' `load_adapter`."""
        name = "token_adapter.trainable_tokens_delta"
        return {} if adapter in self.tied else {name: f"{name}.{adapter}"}

    def adapter_state_dict(self, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that a file holds of an adapter, from this module's state dict."""
        return {name: state_dict[memory] for name, memory in self.adapter_state_dict_load_map(adapter).items()}

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    @property
    def state(self) -> State:  # type: ignore[override]
        return self.token_adapter.state

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        return self.token_adapter.merged_adapters

    @property
    def adapters(self) -> list[str]:
        return list(self.token_adapter.methods)

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self.state.active if name in self.token_adapter.methods]

    def slots(self, adapter: str) -> list[Slot]:
        return self.token_adapter.slots(adapter)

    def check_active(self, names: Sequence[str]) -> None:
        own = [n for n in names if n in self.token_adapter.methods]
        if len(own) > 1:
            raise ValueError(
                f"Only one adapter can be set at a time for TrainableTokensWrapper, got {own}: each trains rows of "
                f"'{self.key}'. Activate one of them."
            )

    def set_adapter(self, adapters: str | Sequence[str], inference_mode: bool = False) -> None:
        names = one_or_several(adapters, "set_adapter")
        self.check_active(names)
        self.token_adapter.set_adapter(names, inference_mode)

    def activate(self, names: list[str], train: bool) -> None:
        self.token_adapter.activate(names, train)

    def enable_adapters(self, enabled: bool) -> None:
        self.token_adapter.enable_adapters(enabled)

    def drop(self, adapter: str) -> None:
        self.token_adapter.drop(adapter)
        self.tied.discard(adapter)

    def changed(self) -> None:
        self.token_adapter.changed()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.token_adapter.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(x, *args, **kwargs)
