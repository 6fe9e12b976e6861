# SPDX-License-Identifier: Apache-2.0
"""Lily: Low-Rank Interconnected Adaptation across Layers, arXiv 2407.09946."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from graft.config.bounds import at_least
from graft.config.fields import COUNT, LORA, LayerRange, Targeted
from graft.core.method import Method, fill_kaiming


@dataclass(kw_only=True)
class LilyConfig(Targeted, LayerRange):
    """Lily: a down-projection for every few layers, up-projections that all layers of a kind mix by a router.

    Raises:
        ConfigError: r < 1, stride_A < 1 or num_B < 2.
    """

    peft_type: str = "LILY"
    r: Annotated[int, COUNT] = 32
    stride_A: Annotated[int, COUNT] = 1  # so many consecutive layers of a kind share A
    num_B: Annotated[int, at_least(2)] = 2  # up-projections that all layers of a kind share
    scaling: float = 1.0
    init_weights: bool = True  # B is zero; else random


def entry_of(targets: str | Iterable[str] | None, key: str) -> str:
    """Return the longest entry of `target_modules` that ends the path `key`, or the path itself if none does.

    An entry also fits inside a name: "proj" ends "q_proj". A regular expression is returned as it is.
    """
    if isinstance(targets, str):
        return targets
    return max((entry for entry in targets or () if key.endswith(entry)), key=len, default=key)


def kinds(methods: Sequence[Method]) -> list[Hashable]:
    """Return the kind of each layer: the entry of `target_modules` that names it, and the weight's shape.

    Layers of one kind share B.
    """
    return [(entry_of(m.cfg.target_modules, m.site.key), m.site.shape) for m in methods]


def strides(methods: Sequence[Method]) -> list[Hashable]:
    """Return (kind, number) for each layer: `stride_A` consecutive layers of a kind have one number, and share A."""
    before = Counter[Hashable]()
    stretches: list[Hashable] = []
    for m, kind in zip(methods, kinds(methods)):
        stretches.append((kind, before[kind] // m.cfg.stride_A))
        before[kind] += 1
    return stretches


class Lily(Method[LilyConfig]):
    """Lily, arXiv 2407.09946: Δy = scaling · B̄ A x, B̄ = Σ p_e B_e, p the mean over all tokens of the call of
    softmax(router A x).

    Layers are of a kind if the same entry of `target_modules` names them and their weights have one shape.
    """

    prefix = "lily_"
    unmergeable = "Lily mixes its projections anew for each input, which no weight does"
    targets = LORA
    ungrouped = "Its groups of channels do not mix, and Lily's projections would mix them"
    facts = ("r", "num_B", "stride_A", "scaling")
    layer_keys = {"lily_A": strides, "lily_B": kinds}

    lily_A: nn.Linear  # (r, in · kernel)
    lily_B: nn.Linear  # weight (num_B · r, out): the B_e, transposed, one after another
    lily_router: nn.Linear  # (num_B, r)
    scaling: float

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return three linear layers without bias: `lily_A` (r,
        fan_in), `lily_B` (num_B · r, out) and `lily_router` (num_B, r). Floating-point tensors are made on the default
        device, in the default dtype.
        """
        cfg, site = self.cfg, self.site
        return dict(
            lily_A=nn.Linear(site.fan_in, cfg.r, bias=False),
            lily_B=nn.Linear(site.out_features, cfg.num_B * cfg.r, bias=False),
            lily_router=nn.Linear(cfg.r, cfg.num_B, bias=False),
        )

    def init_values(self) -> None:
        """Fill A and router kaiming uniform (a=√5), and B with zeros; with `init_weights=False` B kaiming
        uniform, too.
        """
        for layer in (self.lily_A, self.lily_router):
            fill_kaiming(layer.weight)
        self.fill_start(self.lily_B.weight)

    def branch(self, x: Tensor) -> Tensor:
        """Return scaling · B̄ A x, (…, out), with B̄ = Σ p_e B_e.

        p averages the softmax of the router for A x over all tokens of all rows, padding included; A and B move to x's
        device; without tokens p is 0.
        """
        op, base = self.site.op, self.layer.base_layer
        h = op.down(base, x, self.lily_A.weight.to(x.device))
        p = self.lily_router(h.movedim(1 - len(self.site.shape), -1)).softmax(-1).flatten(0, -2)
        p = p.mean(0) if len(p) else p.sum(0)  # without tokens a mean is not finite, and so are gradients
        B = p @ self.lily_B.weight.to(p.device).view(self.cfg.num_B, -1)
        return op.up(base, h, B.view(self.cfg.r, -1).T) * self.scaling
