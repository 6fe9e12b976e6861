# SPDX-License-Identifier: Apache-2.0
"""Mixtures of LoRA experts with a router for each layer: Higher Layers Need More LoRA Experts (MoLA), arXiv 2402.08562.

LoRAMoE (2312.09979) lets all experts act on each token (`top_k=None`); HydraLoRA (2404.19245), too, and its experts
have one A (`shared_A`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.config.fields import BELOW_1, COUNT, LORA, NOT_NEGATIVE, POSITIVE, LayerRange, RankPatterns, Targeted
from graft.core.errors import ConfigError
from graft.core.method import Method, NotedTokens, PublishedRate, fill_kaiming, make_dropout
from graft.core.ops import Op


@dataclass(kw_only=True)
class RoutedConfig(Targeted, LayerRange, RankPatterns):
    """The fields of MoE-LoRA and MixLoRA."""

    r: Annotated[int, COUNT] = 8  # of each expert
    lora_alpha: float = 8  # an expert counts alpha / r times
    lora_dropout: Annotated[float, BELOW_1] = 0.0  # of the experts' input
    num_experts: Annotated[int, POSITIVE] = 8  # of each layer, or each MLP
    router_loss: bool = True  # training adds a loss that spreads the tokens over all experts
    router_aux_loss_coef: Annotated[float, NOT_NEGATIVE] = 1e-3  # its weight
    init_weights: bool = True  # B of zeros; False: random, for tests

    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}


@dataclass(kw_only=True)
class MoeLoraConfig(RoutedConfig):
    """MoE-LoRA: several LoRA experts in each layer; a router chooses or weights them for each token.

    Raises:
        ConfigError: a number out of range; more choices than experts; a loss of balance where all experts act.
    """

    peft_type: str = "MOELORA"
    experts_pattern: dict[str, int] | None = field(default_factory=dict)  # number by layer name or regex, as in MoLA
    top_k: int | None = 2  # experts that act on a token; None: all
    shared_A: bool = False  # the experts of a layer have one A
    router_loss: bool = False  # as in MixLoRA

    patterns = {**RoutedConfig.patterns, "experts_pattern": "num_experts"}

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError if `top_k` exceeds a number of experts, or `router_loss` is set with
        top_k=None.
        """
        super().__post_init__()
        check_experts(self.top_k, self.num_experts, self.experts_pattern)
        if self.router_loss and self.top_k is None:
            raise ConfigError("`router_loss` needs a router that chooses: with top_k=None all experts act. Set top_k.")


def check_experts(top_k: int | None, experts: int, pattern: dict[str, int] | None = None) -> None:
    """Raise ConfigError unless top_k is None or from 1 to each number of experts: `experts`, and the values of
    `pattern`.
    """
    places = {"": experts} | {f" in experts_pattern['{key}']": n for key, n in (pattern or {}).items()}
    for place, n in places.items():
        if top_k is not None and not 1 <= top_k <= n:
            raise ConfigError(f"`top_k` is {top_k}, and a router chooses between 1 and all of its experts: {n}{place}.")


def find_expert_weights(p: Tensor, top_k: int | None) -> Tensor:
    """Return the weights of experts from probabilities p (…, experts): p itself for top_k None; else the k largest over
    their sum, others 0.
    """
    if top_k is None:
        return p
    top = p.topk(top_k, -1)
    return torch.zeros_like(p).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))


def sum_experts(op: Op, base: nn.Module, x: Tensor, A: Tensor, B: Tensor, g: Tensor) -> Tensor:
    """Return Σₑ gₑ Bₑ Aₑ x for g (…, experts), A (experts or 1, r, in), B (experts, out, r), by the layer type's own
    products.
    """
    z = op.down(base, x, A.flatten(0, 1)).unflatten(-1, A.shape[:2])
    return op.up(base, (z * g.unsqueeze(-1)).flatten(-2), B.transpose(0, 1).flatten(1))


def compute_balance_loss(noted: Sequence[NotedTokens], top_k: int) -> Tensor:
    """Return E Σₑ fₑ Pₑ, (), for E experts: fₑ the share of tokens that chose expert e among their `top_k`, Pₑ the mean
    of its probability.

    Padding does not count; without real tokens the loss is 0. Gradients flow through Pₑ only. Routers count together:
    all tokens of all of them. If numbers of experts differ, each router counts alone, and the mean is returned.
    """
    alone = len({one.values.shape[-1] for one in noted}) > 1
    device = noted[0].values.device
    sums: dict[str, Tensor] = {}  # (3, E) by router: choices of each expert, probabilities of each, tokens
    for one in noted:
        p = one.values
        real = torch.ones_like(p) if one.real is None else one.real.unsqueeze(-1).expand_as(p)
        chosen = torch.zeros_like(p).scatter(-1, p.topk(top_k, -1).indices, 1.0)
        counts = torch.stack([chosen * real, p * real, real]).sum(1).to(device)  # no product, which autocast rounds
        router = one.layer if alone else ""
        sums[router] = sums[router] + counts if router in sums else counts
    means = [(chosen / n.clamp_min(1), p / n.clamp_min(1)) for chosen, p, n in sums.values()]
    return torch.stack([len(f) * (f * P).sum() for f, P in means]).mean()


class MoeLoRA(Method[MoeLoraConfig]):
    """MoLA, arXiv 2402.08562: Δy = s · Σₑ gₑ Bₑ Aₑ x, g from p = softmax(G x): p itself, or its k largest divided by
    their sum.
    """

    prefix = "moelora_"
    unmergeable = "MoE-LoRA's routers weigh experts by each token, which no weight does"
    published_lr = PublishedRate(2e-4, 2e-4, "HydraLoRA, arXiv 2404.19245, with r 4 and alpha 32")
    targets = LORA
    only_linear = "MoE-LoRA adapts linear layers only"

    moelora_A: nn.Parameter  # (experts, r, in), (1, r, in) if they share it
    moelora_B: nn.Parameter  # (experts, out, r)
    moelora_router: nn.Linear  # weight (experts, in)
    moelora_dropout: nn.Module

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised `moelora_A` (experts, r, in), or (1, r, in) with `shared_A`, `moelora_B` (experts, out,
        r), the linear layer `moelora_router` (experts, in) without bias, and `moelora_dropout`
        (`make_dropout(cfg.lora_dropout)`). Floating-point tensors are made on the default device, in the
        default dtype.
        """
        cfg, site = self.cfg, self.site
        E, r = cfg.num_experts, cfg.r
        A, B = torch.empty(1 if cfg.shared_A else E, r, site.in_features), torch.empty(E, site.out_features, r)
        return dict(
            moelora_A=nn.Parameter(A),
            moelora_B=nn.Parameter(B),
            moelora_router=nn.Linear(site.in_features, E, bias=False),
            moelora_dropout=make_dropout(cfg.lora_dropout),
        )

    def init_values(self) -> None:
        """Fill each A and the router kaiming uniform (a=√5), and B with zeros; with `init_weights=False` B is normal
        with std 1/√r.
        """
        for matrix in (*self.moelora_A, self.moelora_router.weight):
            fill_kaiming(matrix)
        self.fill_start(self.moelora_B, self.cfg.r**-0.5)

    def branch(self, x: Tensor) -> Tensor:
        """Return alpha / r · Σₑ gₑ Bₑ Aₑ dropout(x), with g from a softmax of the router in float32
        (`find_expert_weights`: all experts, or the `top_k` over their sum).

        The router sees x before the dropout. In training with `router_loss`, record the router's probabilities at the
        call, for the auxiliary loss, unless the router is frozen.
        """
        cfg, op, base = self.cfg, self.site.op, self.layer.base_layer
        p = self.moelora_router(x).softmax(-1, dtype=torch.float32)  # (…, experts)
        if cfg.router_loss and self.layer.training and self.moelora_router.weight.requires_grad:
            self.layer.call.record_value(self.name, self.site.key, p)
        g = find_expert_weights(p, cfg.top_k).to(x.dtype) * (cfg.lora_alpha / cfg.r)
        return sum_experts(op, base, self.moelora_dropout(x), self.moelora_A, self.moelora_B, g)

    @classmethod
    def compute_auxiliary_loss(cls, cfg: Any, noted: Sequence[NotedTokens]) -> Tensor:
        """Return router_aux_loss_coef · the balance loss of the noted probabilities (`compute_balance_loss`), ()."""
        return cfg.router_aux_loss_coef * compute_balance_loss(noted, cfg.top_k)
