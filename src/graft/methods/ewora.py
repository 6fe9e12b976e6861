# SPDX-License-Identifier: Apache-2.0
"""EWoRA: Expert Weighted Low-Rank Adaptation for Heterogeneous Data, Findings of IJCNLP 2025, 108."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.bounds import Bound
from graft.config.fields import BELOW_1, COUNT, LORA, POSITIVE, BaseBias, FanInFanOut, LayerRange, RankPattern, Targeted
from graft.core.method import Method, fill_kaiming

UNSET = Bound(lambda value: not value, "`{name}` means nothing to EWoRA. Leave it out.")


@dataclass(kw_only=True)
class EworaConfig(Targeted, LayerRange, RankPattern, FanInFanOut, BaseBias):
    """EWoRA: products of two matrices, experts, each weighed anew for each token.

    Raises:
        ConfigError: a number out of range, or a field that EWoRA has no use for is set.
    """

    peft_type: str = "EWORA"
    r: Annotated[int, COUNT] = 256  # of each expert; the paper divides its rank by the number of experts
    num_experts: Annotated[int, POSITIVE] = 8  # of each layer
    ewora_dropout: Annotated[float, BELOW_1] = 0.0  # of the input of each expert, drawn for each
    init_weights: bool = True  # B of zeros; False: random, for tests
    use_dora: Annotated[bool, UNSET] = False
    megatron_config: Annotated[dict[str, object] | None, UNSET] = None
    layer_replication: Annotated[list[tuple[int, int]] | None, UNSET] = None


class Ewora(Method[EworaConfig]):
    """EWoRA, IJCNLP 2025 Findings 108: Δy = Σₑ gₑ Bₑᵀ Aₑᵀ x, g = W relu(all Aₑᵀ x) + b.

    The weights g have any sign and any sum.
    """

    prefix = "ewora_"
    unmergeable = "EWoRA's experts are dynamically weighted, by each token, which no weight is"
    targets = LORA
    only_linear = "EWoRA adapts linear layers only"

    ewora_As: nn.Parameter  # (experts, in, r)
    ewora_Bs: nn.Parameter  # (experts, r, out)
    ewora_weighting: nn.Linear  # weight (experts, experts · r)
    ewora_dropout: nn.Module

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised `ewora_As` (experts, in, r) and `ewora_Bs` (experts, r, out), and
        `ewora_weighting`, a linear layer (experts, experts · r) with bias.

        Floating-point tensors are made on the default device, in the default dtype.
        """
        site, E, r = self.site, self.cfg.num_experts, self.cfg.r
        A, B = torch.empty(E, site.in_features, r), torch.empty(E, r, site.out_features)
        return dict(
            ewora_As=nn.Parameter(A),
            ewora_Bs=nn.Parameter(B),
            ewora_weighting=nn.Linear(E * r, E),
        )

    def init_values(self) -> None:
        """Fill A uniform within ±1/√(in · r), the weighting within ±0.01, its bias within ±1/√(experts · r), and B with
        zeros.

        With `init_weights=False` B is kaiming uniform.
        """
        fill_kaiming(self.ewora_As)  # of all three dimensions: ±1 / √(in · r)
        nn.init.uniform_(self.ewora_weighting.weight, -0.01, 0.01)
        nn.init.uniform_(self.ewora_weighting.bias, *(s * (self.cfg.num_experts * self.cfg.r) ** -0.5 for s in (-1, 1)))
        self.fill_start(self.ewora_Bs)

    def branch(self, x: Tensor) -> Tensor:
        """Return Σₑ gₑ Bₑᵀ Aₑᵀ x, (…, out), with gates g from `ewora_weighting` of relu(Aᵀ x) of all experts.

        Dropout acts on the input of each expert, drawn for each; without dropout all A are one product.
        """
        op, base, E = self.site.op, self.layer.base_layer, self.cfg.num_experts
        A = self.ewora_As.mT  # (experts, r, in)
        if isinstance(self.ewora_dropout, nn.Identity):
            z = op.down(base, x, A.flatten(0, 1))
        else:
            z = torch.cat([op.down(base, self.ewora_dropout(x), A_expert) for A_expert in A], -1)
        g = self.ewora_weighting(z.relu())  # (…, experts)
        z = z.unflatten(-1, (E, -1)) * g.unsqueeze(-1)
        return op.up(base, z.flatten(-2), self.ewora_Bs.flatten(0, 1).T)
