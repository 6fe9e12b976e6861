# SPDX-License-Identifier: Apache-2.0
"""A reference that knows nothing of graft: dense weights, and what each adapter makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS = {"first": (6, 5), "second": (4, 6)}  # shapes (out, in)
SCALES = {"LORA": 3 / 2, "DORA": 3 / 2, "LOHA": 5 / 2}
CONTAINERS = {
    "LORA": ("lora_A", "lora_B"),
    "DORA": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "HIRA": ("hira_A", "hira_B"),
    "IA3": ("ia3_l",),
}
METHODS = {"DORA": "LORA"}  # kinds that are variants of another method
ADD = ("LORA", "LOHA", "HIRA")  # kinds that add to the output, and so can be averaged


class Adapter:
    """One adapter: its kind, and by layer its tensors, in the order of `CONTAINERS`."""

    def __init__(self, kind: str, tensors: dict[str, list[Tensor]]):
        self.kind, self.tensors = kind, tensors
        self.method = METHODS.get(kind, kind)

    def act(self, layer: str, W0: Tensor, W: Tensor, b: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a layer with this adapter on it, too. W0: the weight without any."""
        t = self.tensors[layer]
        if self.kind == "IA3":
            return t[0].flatten()[:, None] * W, t[0].flatten() * b
        if self.kind == "DORA":
            # the norm is a constant for gradients: https://arxiv.org/abs/2402.09353, section 4.3
            norm = torch.linalg.vector_norm(W0 + self.delta(layer, W0), dim=1, keepdim=True).detach()
            return t[2].flatten()[:, None] / norm * (W + self.delta(layer, W0)), b
        return W + weight * self.delta(layer, W0), b

    def delta(self, layer: str, W0: Tensor) -> Tensor:
        """Return the update that an adapter adds to a weight; of DoRA, before it is scaled."""
        t = self.tensors[layer]
        if self.kind == "LOHA":
            return SCALES["LOHA"] * (t[0] @ t[1]) * (t[2] @ t[3])
        return W0 * (t[1] @ t[0]) if self.kind == "HIRA" else SCALES[self.kind] * t[1] @ t[0]

    def copy(self) -> Adapter:
        return Adapter(self.kind, {key: [t.clone() for t in ts] for key, ts in self.tensors.items()})


@dataclass(frozen=True)
class Together:
    """Adapters that act together: one on the layer that those before it made, or as parts of a sum with weights."""

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None


class Reference:
    """Two linear layers with a tanh after each, and adapters on them."""

    def __init__(self, base: dict[str, tuple[Tensor, Tensor]]):
        self.base = {key: (W.clone(), b.clone()) for key, (W, b) in base.items()}
        self.adapters: dict[str, Adapter] = {}
        self.methods: dict[str, list[str]] = {key: [] for key in LAYERS}  # in the order in which they came
        self.active: tuple[Together, ...] = (Together(),)  # several: each has a copy of the batch
        self.merged: dict[str, float] = {}
        self.disabled = False

    def snapshot(self) -> Reference:
        """Return a copy that later changes leave alone."""
        made = Reference(self.base)
        made.adapters = {name: a.copy() for name, a in self.adapters.items()}
        made.methods = {key: [*methods] for key, methods in self.methods.items()}
        made.active, made.merged, made.disabled = self.active, dict(self.merged), self.disabled
        return made

    @property
    def active_names(self) -> list[str]:
        return list(dict.fromkeys(name for together in self.active for name in together.names))

    @property
    def merged_names(self) -> list[str]:
        """The merged adapters, active ones first, in the order in which they act."""
        active = self.active_names
        return sorted(self.merged, key=lambda n: active.index(n) if n in active else len(active))

    # what changes

    def add(self, name: str, adapter: Adapter) -> None:
        self.adapters[name] = adapter
        for key in adapter.tensors:
            if adapter.method not in self.methods[key]:
                self.methods[key].append(adapter.method)

    def delete(self, name: str) -> None:
        del self.adapters[name]
        for key, methods in self.methods.items():
            there = {a.method for a in self.adapters.values() if key in a.tensors}
            methods[:] = [method for method in methods if method in there]
        if name in self.active_names:
            others = [n for n in self.active_names if n != name]
            self.active, self.merged = (Together(tuple(others or sorted(self.adapters)[:1])),), {}

    def set(self, active: Sequence[Together]) -> None:
        names = list(dict.fromkeys(name for together in active for name in together.names))
        on_layers = [[n for n in names if key in self.adapters[n].tensors] for key in LAYERS]
        as_merged = [[n for n in self.merged if key in self.adapters[n].tensors] for key in LAYERS]
        if not (tuple(active) == self.active and on_layers == as_merged):
            self.merged = {}
        self.active = tuple(active)

    def disable(self, off: bool) -> None:
        self.disabled = off
        if off:
            self.merged = {}

    def merge(self, names: Sequence[str]) -> None:
        """Merge adapters, which count by the weights with which they are active."""
        (together,) = self.active
        weights = dict(zip(together.names, together.weights or ()))
        self.merged |= {name: weights.get(name, 1.0) for name in names}

    def fold(self, together: Together) -> None:
        """Make the weights with adapters those of the base, and forget all adapters."""
        self.base = {key: self.weight(key, together) for key in LAYERS}
        self.adapters, self.merged, self.active, self.disabled = {}, {}, (Together(),), False
        self.methods = {key: [] for key in LAYERS}

    def round(self) -> None:
        """Lose what float32 cannot hold."""
        self.base = {key: (W.float().double(), b.float().double()) for key, (W, b) in self.base.items()}
        for adapter in self.adapters.values():
            adapter.tensors = {key: [t.float().double() for t in ts] for key, ts in adapter.tensors.items()}

    # what a call computes

    def weight(self, layer: str, together: Together) -> tuple[Tensor, Tensor]:
        """Fold adapters in: methods in the order in which they came to the layer."""
        W0, b = self.base[layer]
        W, weights = W0, together.weights or (1.0,) * len(together.names)
        here = [(self.adapters[n], w) for n, w in zip(together.names, weights) if layer in self.adapters[n].tensors]
        for adapter, w in sorted(here, key=lambda pair: self.methods[layer].index(pair[0].method)):
            W, b = adapter.act(layer, W0, W, b, w)
        return W, b

    def run(self, x: Tensor, together: Together | None = None) -> Tensor:
        """Return the output for adapters that act together; None: for those that act now."""
        if together is None and not self.disabled and len(self.active) > 1:
            return torch.cat([self.run(x, each) for each in self.active])
        for key in LAYERS:
            acting = together
            if together is None:
                merged = [n for n in self.merged_names if key in self.adapters[n].tensors]
                acting = Together(tuple(merged), tuple(self.merged[n] for n in merged))
                if not merged:
                    acting = Together() if self.disabled else self.active[0]
            W, b = self.weight(key, acting)
            x = torch.nn.functional.linear(x, W, b).tanh()
        return x
