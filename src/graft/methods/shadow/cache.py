# SPDX-License-Identifier: Apache-2.0
"""A cache that packs the base model's with those of shadow networks, for `generate`."""

from __future__ import annotations

from functools import cache
from typing import Any

NAMES = ("cache", "past_key_values")  # the argument in transformers from 5.2x on, and before


@cache
def packed_class() -> type:
    """Return the class of the cache, which derives from transformers' own."""
    from transformers import Cache

    class ShadowCache(Cache):
        """The base model's cache, whose layers stand first, and those of the shadow networks, by adapter.

        What reorders, repeats, selects or cuts rows does so to all layers.
        """

        __module__, __qualname__ = __name__, "ShadowCache"  # where `pickle` finds it

        def __init__(self, base: Any, shadows: dict[str, Any]):
            self.base, self.shadows = base, shadows

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or name in ("base", "shadows"):
                raise AttributeError(name)
            return getattr(self.base, name)

        @property
        def layers(self) -> list[Any]:  # type: ignore[override]
            return [layer for cache in (self.base, *self.shadows.values()) for layer in cache.layers]

        def __len__(self) -> int:
            return len(self.base)

    return ShadowCache


def __getattr__(name: str) -> Any:
    if name == "ShadowCache":
        return packed_class()
    raise AttributeError(name)


def pack(base: Any, shadows: dict[str, Any]) -> Any:
    """Return a cache that packs the base model's with those of shadow networks."""
    return packed_class()(base, shadows)


def unpack(model: Any, kwargs: dict[str, Any], use_cache: bool | None) -> dict[str, Any] | None:
    """Return the shadow networks' caches from a call's arguments, and leave the base model's there; None: no cache.

    Raises:
        ValueError: the cache holds tokens that the shadow network has not seen.
    """
    name = next((n for n in NAMES if kwargs.get(n) is not None), None)
    if name is None:
        wanted = getattr(getattr(model, "config", None), "use_cache", False) if use_cache is None else use_cache
        return {} if wanted else None
    cache = kwargs[name]
    if isinstance(cache, packed_class()):
        kwargs[name] = cache.base  # type: ignore[attr-defined]
        return cache.shadows  # type: ignore[attr-defined,no-any-return]
    if not hasattr(cache, "get_seq_length"):
        raise NotImplementedError(f"SHADOW needs a Cache of transformers as `{name}`, not a {type(cache).__name__}.")
    if cache.get_seq_length():
        raise ValueError(
            f"`{name}` holds tokens that the shadow network has not seen: pass on what an output of this model "
            "holds, or an empty cache."
        )
    return {}


def with_cache(output: Any, shadows: dict[str, Any]) -> Any:
    """Return a model's output with its cache packed."""
    from transformers import Cache

    def packed(value: Any) -> Any:
        plain = isinstance(value, Cache) and not isinstance(value, packed_class())
        return pack(value, shadows) if plain else value

    if isinstance(output, tuple):
        return tuple(packed(value) for value in output)
    for key, value in list(output.items()):
        if packed(value) is not value:
            output[key] = packed(value)
    return output


def empty(network: Any) -> Any:
    """Return a cache for a shadow network."""
    from transformers import DynamicCache

    return DynamicCache(config=network.config)
