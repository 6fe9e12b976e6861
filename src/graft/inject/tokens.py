# SPDX-License-Identifier: Apache-2.0
"""`trainable_token_indices`: single embedding rows that train beside an adapter of another method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from graft.core.errors import NoMatchingPeftModuleError
from graft.core.layer import AdapterLayer
from graft.methods.trainable_tokens import input_embedding


class TrainableTokensWrapper(nn.Module):
    """Stands for an embedding (or a head tied to it) some of whose rows train. `token_adapter` does the work."""

    how = "already trained in single rows, through trainable_token_indices"

    def __init__(self, token_adapter: AdapterLayer, key: str):
        super().__init__()
        self.token_adapter = token_adapter
        self.key = key
        self.tied: set[str] = set()  # adapters whose rows here are those of the embedding, and not saved
        self.call = token_adapter.call

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.base_layer

    @property
    def kept(self) -> nn.Module:
        return self.token_adapter.base_layer

    @property
    def weight(self) -> Tensor:
        """For models that use an embedding's weight without calling it."""
        return self.token_adapter.effective_weight()

    def adapter_state_dict_load_map(self, adapter: str) -> dict[str, str]:
        """{name below this module in a file: name in memory}, which transformers' `load_adapter` asks for."""
        name = "token_adapter.trainable_tokens_delta"
        return {} if adapter in self.tied else {name: f"{name}.{adapter}"}

    def adapter_state_dict(self, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a file holds of an adapter, out of this module's state dict."""
        return {name: state_dict[memory] for name, memory in self.adapter_state_dict_load_map(adapter).items()}

    adapter_layer_names, other_param_names = ("token_adapter",), ()

    @property
    def merged_adapters(self) -> list[str]:
        return self.token_adapter.merged_adapters

    @property
    def adapters(self) -> list[str]:
        return list(self.token_adapter.methods)

    @property
    def active_adapters(self) -> list[str]:
        return self.token_adapter.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return self.token_adapter.disable_adapters

    def check_active(self, names: Sequence[str]) -> None:
        own = [n for n in names if n in self.token_adapter.methods]
        if len(own) > 1:
            raise ValueError(
                f"Only one adapter can be set at a time for TrainableTokensWrapper, got {own}: each trains rows of "
                f"'{self.key}'. Activate one of them."
            )

    def set_adapter(self, adapters: str | Sequence[str], inference_mode: bool = False) -> None:
        self.token_adapter.set_adapter(adapters, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        self.token_adapter.enable_adapters(enabled)

    def delete_adapter(self, adapter: str, new_active_adapters: list[str] | None = None) -> None:
        self.token_adapter.delete_adapter(adapter, new_active_adapters)
        self.tied.discard(adapter)

    def forget(self, adapter: str) -> None:
        self.token_adapter.forget(adapter)
        self.tied.discard(adapter)

    def require_grad(self, adapter: str, requires_grad: bool) -> None:
        if adapter in self.token_adapter.methods:
            self.token_adapter.require_grad(adapter, requires_grad)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.require_grad(name, requires_grad)

    def parameters_of(self, adapter: str) -> Iterator[nn.Parameter]:
        yield from self.token_adapter.parameters_of(adapter)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.token_adapter.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(x, *args, **kwargs)


def token_targets(cfg: Any, model: nn.Module, modules: dict[str, nn.Module], adapter: str) -> dict[str, list[int]]:
    """The modules whose rows a config trains, by path."""
    wanted = getattr(cfg, "trainable_token_indices", None)
    if not wanted:
        return {}
    named = wanted if isinstance(wanted, dict) else {input_embedding(model) or "embed_tokens": wanted}
    out: dict[str, list[int]] = {}
    for name, indices in named.items():
        paths = [k for k in modules if k == name or k.endswith(f".{name}")]
        if not paths:
            raise NoMatchingPeftModuleError(
                f"Target modules {{'{name}'}} not found in the base model. Please check the target modules and try "
                f"again (trainable_token_indices). Adapter '{adapter}'."
            )
        out |= {path: list(indices) for path in paths}
    return out
