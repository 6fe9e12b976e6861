# SPDX-License-Identifier: Apache-2.0
"""A reference that knows nothing of graft: dense weights, and what each adapter makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYERS = {"first": (6, 5), "second": (4, 6)}  # shapes (out, in)
SCALES = {"LORA": 3 / 2, "LOHA": 5 / 2}
CONTAINERS = {
    "LORA": ("lora_A", "lora_B"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "IA3": ("ia3_l",),
}


class Adapter:
    """One adapter: its method, and by layer its tensors, in the order of `CONTAINERS`."""

    def __init__(self, kind: str, tensors: dict[str, list[Tensor]]):
        self.kind, self.tensors = kind, tensors

    def act(self, layer: str, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a layer with this adapter on it, too."""
        t = self.tensors[layer]
        if self.kind == "LORA":
            return W + SCALES["LORA"] * t[1] @ t[0], b
        if self.kind == "LOHA":
            return W + SCALES["LOHA"] * (t[0] @ t[1]) * (t[2] @ t[3]), b
        return t[0].flatten()[:, None] * W, t[0].flatten() * b

    def delta(self, layer: str) -> Tensor:
        return self.act(layer, torch.zeros(LAYERS[layer], dtype=torch.float64), torch.zeros(()))[0]

    def copy(self) -> Adapter:
        return Adapter(self.kind, {key: [t.clone() for t in ts] for key, ts in self.tensors.items()})


class Reference:
    """Two linear layers with a tanh between them."""

    def __init__(self, base: dict[str, tuple[Tensor, Tensor]]):
        self.base = {key: (W.clone(), b.clone()) for key, (W, b) in base.items()}
        self.adapters: dict[str, Adapter] = {}
        self.kinds: dict[str, list[str]] = {key: [] for key in LAYERS}  # methods, in the order in which they came
        self.active: list[str] = []
        self.merged: list[str] = []
        self.disabled = False

    def add(self, name: str, adapter: Adapter) -> None:
        self.adapters[name] = adapter
        for key in adapter.tensors:
            if adapter.kind not in self.kinds[key]:
                self.kinds[key].append(adapter.kind)

    def delete(self, name: str) -> None:
        del self.adapters[name]
        for key, kinds in self.kinds.items():
            kinds[:] = [
                kind for kind in kinds if any(a.kind == kind and key in a.tensors for a in self.adapters.values())
            ]
        if name in self.active:
            others = [n for n in self.active if n != name]
            self.active, self.merged = others or sorted(self.adapters)[:1], []

    def set(self, names: list[str]) -> None:
        on_layers = [[n for n in names if key in self.adapters[n].tensors] for key in LAYERS]
        as_merged = [[n for n in self.merged if key in self.adapters[n].tensors] for key in LAYERS]
        if not (names == self.active and on_layers == as_merged):
            self.merged = []
        self.active = names

    def disable(self, off: bool) -> None:
        self.disabled = off
        if off:
            self.merged = []

    def acting(self, layer: str) -> list[str]:
        merged = [n for n in self.merged if layer in self.adapters[n].tensors]
        return merged or ([] if self.disabled else self.active)

    def weight(self, layer: str, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Fold adapters in: methods in the order in which they came to the layer."""
        W, b = self.base[layer]
        here = [self.adapters[n] for n in names if layer in self.adapters[n].tensors]
        for adapter in sorted(here, key=lambda a: self.kinds[layer].index(a.kind)):
            W, b = adapter.act(layer, W, b)
        return W, b

    def run(self, x: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """names: those that act; None: those that do now."""
        for key in LAYERS:
            W, b = self.weight(key, self.acting(key) if names is None else names)
            x = torch.nn.functional.linear(x, W, b).tanh()
        return x

    def round(self) -> None:
        """Lose what float32 cannot hold."""
        self.base = {key: tuple(t.float().double() for t in ts) for key, ts in self.base.items()}  # type: ignore[misc]
        for adapter in self.adapters.values():
            adapter.tensors = {key: [t.float().double() for t in ts] for key, ts in adapter.tensors.items()}
