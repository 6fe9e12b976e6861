# SPDX-License-Identifier: Apache-2.0
"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning, arXiv 2005.00247.

An adapter over bottlenecks of other tasks: at each token it attends to their updates. The bottlenecks do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from graft.config.fields import BELOW_1, Chosen, Targeted
from graft.core.carrier import layer_in
from graft.core.containers import Transient
from graft.core.effect import Effect, Rewrite, Tap
from graft.core.errors import ConfigError, RoutingError
from graft.core.method import Method, NotedTokens, PublishedRate, make_dropout
from graft.methods.bottleneck import ENDS, PLACES, Bottleneck, BottleneckPlace

STRENGTH = 0.01  # of the regularisation


@dataclass(kw_only=True)
class AdapterFusionConfig(Targeted, Chosen):
    """AdapterFusion: at each token, attention over the updates of several bottlenecks.

    The bottlenecks are adapters of the same model, a PeftMixedModel, and have to be there before. A file holds the
    fusion alone, and names them.

    Raises:
        ConfigError: an adapter twice, or a share of dropout out of range.
    """

    peft_type: str = "ADAPTER_FUSION"
    adapters: list[str] = field(default_factory=list)  # names of the bottlenecks
    value: bool = True  # their updates pass a matrix, which starts as the identity
    regularization: bool = True  # add 0.01 · ‖W_value - I‖² of each place to the loss
    dropout: Annotated[float, BELOW_1] = 0.0  # of the scores, before the softmax

    def __post_init__(self) -> None:
        """Validate the fields; make `adapters` a list, [] for None, and set `places` to {}, which `prepare` fills for
        one model.

        Raises ConfigError if `adapters` has a name twice.
        """
        super().__post_init__()
        self.places: dict[str, Fused] = {}  # no field: they hold for one model only
        self.adapters = list(self.adapters or ())
        if len(set(self.adapters)) < len(self.adapters):
            raise ConfigError(f"AdapterFusion takes the names of adapters, each once, got adapters={self.adapters}.")


class Fused(NamedTuple):
    """The place of bottlenecks at a layer, and the names of the adapters."""

    place: BottleneckPlace
    adapters: tuple[str, ...]


def find_fused_places(model: nn.Module, names: list[str]) -> dict[str, Fused]:
    """Return, by path, the layers of a model where any of the bottlenecks `names` acts, with their place and names.

    A layer's names are in the order of `names`, and only those that act there.

    Raises:
        ConfigError: `names` is empty, or one acts on no layer, is no bottleneck, is invertible, or has another place at
            a layer than the others.
    """
    if not names:
        raise ConfigError("AdapterFusion needs bottlenecks. Name them in AdapterFusionConfig(adapters=[…]).")
    places: dict[str, Fused] = {}
    layers = {layer.site.key: layer for layer in filter(None, map(layer_in, model.modules()))}
    for key, layer in layers.items():
        for m in (layer.methods[name] for name in names if name in layer.methods):
            if not isinstance(m, Bottleneck):
                raise ConfigError(
                    f"AdapterFusion takes bottlenecks: adapter '{m.name}' is {type(m).__name__}. Drop it."
                )
            if m.place.role in ENDS:
                raise ConfigError(f"AdapterFusion cannot mix adapter '{m.name}', invertible at '{key}'. Drop it.")
            before = places.get(key, Fused(m.place, ()))
            if before.place != m.place:
                raise ConfigError(f"Adapters {names} act in different ways at '{key}'. Fuse bottlenecks of one kind.")
            places[key] = Fused(m.place, (*before.adapters, m.name))
    missing = [name for name in names if not any(name in fused.adapters for fused in places.values())]
    if missing:
        raise ConfigError(
            f"AdapterFusion needs adapters {missing}, which the model does not have. Load them before, into a "
            "PeftMixedModel."
        )
    return places


class AdapterFusion(Method[AdapterFusionConfig]):
    """AdapterFusion, arXiv 2005.00247: y + Σᵢ pᵢ W_v uᵢ(h), p = softmax over the bottlenecks of (W_q h + b) · (W_k
    uᵢ(h) + b'), h their input.
    """

    prefix = "fusion_"
    fallback_targets = PLACES
    published_lr = PublishedRate(5e-5, 5e-5, "arXiv 2005.00247")
    compresses_targets = False

    fusion_query: nn.Linear  # (H, H)
    fusion_key: nn.Linear
    fusion_value: nn.Linear  # without bias
    fusion_dropout: nn.Module

    @classmethod
    def prepare(cls, cfg: AdapterFusionConfig, model: nn.Module) -> None:
        """Set `cfg.places` to the places of the bottlenecks in the model (`find_fused_places`, which raises
        ConfigError); with the default target "places", also set `cfg.target_paths` to the set of their paths.

        Other targets leave `target_paths` as it is.
        """
        cfg.places = find_fused_places(model, cfg.adapters)
        if cfg.target_modules == PLACES:
            cfg.target_paths = set(cfg.places)

    @property
    def place(self) -> BottleneckPlace:
        """The place of the bottlenecks at this site; None if none acts here."""
        fused = self.cfg.places.get(self.site.key)
        return BottleneckPlace("after") if fused is None else fused.place

    def check(self) -> str | None:
        """Return a reason if no bottleneck acts here, None at a tap, else the reason of `Method.check`."""
        if self.site.key not in self.cfg.places:
            return f"None of the adapters {self.cfg.adapters} acts on it"
        return None if self.place.role == "tap" else super().check()

    def describe(self) -> Effect:
        """Return the effect of the bottlenecks' role here.

        "tap": a `Tap` for the place's readers. "norm": a `Rewrite` of the input (`pre`) by `before_norm`, of a block.
        A reader of a tap: a Rewrite by its branch of the tapped input. Any other role, or no place: the part `after`.
        The last two mark a block if the module's kind is unknown.
        """
        place, block = self.place, not self.site.op.known
        if place.role == "tap":
            return Tap(place.readers)
        if place.role == "norm":
            return Rewrite(pre=self.before_norm, block=True)
        beside = place.role == "beside"
        return Rewrite(part=self.beside if beside else self.after, tapped=beside, block=block)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return linear layers `fusion_query` and `fusion_key` (H, H) with bias and, with `value`, `fusion_value` (H,
        H) without, and `fusion_dropout` (`make_dropout(cfg.dropout)`).

        At a tap return one empty buffer, `fusion_tap`. Floating-point tensors are made on the default device, in the
        default dtype.
        """
        place = self.place
        if place.role == "tap":
            return dict(fusion_tap=Transient(torch.empty(0)))
        H = place.width or 0
        values: dict[str, object] = dict(fusion_query=nn.Linear(H, H), fusion_key=nn.Linear(H, H))
        if self.cfg.value:
            values["fusion_value"] = nn.Linear(H, H, bias=False)
        return values | dict(fusion_dropout=make_dropout(self.cfg.dropout))

    def init_values(self) -> None:
        """Fill query and key with normal values of std 0.02, and their biases with zeros.

        If the config has `value`, fill the value matrix with 1e-6 and a diagonal of 1.

        At a tap do nothing.
        """
        if self.place.role == "tap":
            return
        for linear in (self.fusion_query, self.fusion_key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.cfg.value:
            nn.init.constant_(self.fusion_value.weight, 1e-6)
            with torch.no_grad():
                self.fusion_value.weight.fill_diagonal_(1)

    def fuse(self, h: Tensor) -> Tensor:
        """Return the fusion's update for h (…, H), the input of the bottlenecks: attention over their updates, without
        their dropout and gates.

        The query is of h; keys are of the updates, and so are the values, unless the config has no `value`: then the
        updates themselves are mixed. The scores are plain products, not divided by √H. The dropout acts on them, before
        the softmax. The result has the adapter's dtype. In training, the value matrix is noted for
        `compute_auxiliary_loss`, if it trains and the config has `value` and `regularization`.

        Raises:
            RoutingError: one of the bottlenecks is gone.
        """
        methods, names = self.layer.methods, self.cfg.places[self.site.key].adapters
        if gone := [name for name in names if name not in methods]:
            raise RoutingError(
                f"AdapterFusion '{self.name}' needs adapters {gone} on layer '{self.site.key}', which are gone. "
                "Load them again, and then the fusion."
            )
        u = torch.stack([methods[name].up(h).to(self.dtype) for name in names], -2)  # (…, adapters, H)
        q, k = self.fusion_query(h.to(self.dtype)), self.fusion_key(u)
        scores = self.fusion_dropout((k @ q[..., None]).squeeze(-1))  # (…, adapters)
        v = self.fusion_value(u) if self.cfg.value else u
        if self.cfg.value and self.cfg.regularization and self.layer.training:
            W = self.fusion_value.weight
            if W.requires_grad:
                self.layer.call.record_value(self.name, self.site.key, W)
        return (scores.softmax(-1)[..., None, :] @ v).squeeze(-2)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update `fuse` for the layer's output y; x is not read."""
        return self.fuse(y)

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update `fuse` for x, the input of the tapped module; y is not read."""
        return self.fuse(x)

    def before_norm(self, s: Tensor) -> Tensor:
        """Return s + fused(LN s), the norm's new input."""
        return s + self.fuse(self.layer.base_layer(s))

    @classmethod
    def compute_auxiliary_loss(cls, cfg: AdapterFusionConfig, noted: Sequence[NotedTokens]) -> Tensor:
        """Return 0.01 · Σ ‖W_value - I‖² over the places, (), each once, with the last noted matrix, however often its
        layer ran; on the first place's device.
        """
        values = {one.layer: one.values for one in noted}.values()
        device = noted[0].values.device
        each = [(W - torch.eye(len(W), device=W.device, dtype=W.dtype)).square().sum().to(device) for W in values]
        return STRENGTH * torch.stack(each).sum()
