# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.config.targets import ADALORA
from graft.core.dropout import share_dropped
from graft.core.method import Method
from graft.core.params import Transient
from graft.core.site import Site
from graft.kernels.low_rank import add_low_rank, low_rank_linear
from graft.methods.adalora.allocator import orthogonal_loss, trainable, update_and_allocate, warn_if_forgotten
from graft.methods.adalora.config import AdaLoraConfig


class AdaLoRA(Method):
    """ΔW = s · B diag(E) A, A (r, in), E (r, 1), B (out, r): of the least important, E becomes 0 in training."""

    config = AdaLoraConfig
    prefix = "lora_"
    targets = ADALORA
    single_trainable = True
    tuner_methods: ClassVar[dict[str, Any]] = {
        "update_and_allocate": update_and_allocate,
        "trainable_adapter_name": property(lambda tuner: (trainable(tuner) or (None,))[0]),
    }

    lora_A: nn.Parameter  # (r, fan_in), right singular vectors
    lora_B: nn.Parameter  # (out, r), left singular vectors
    lora_E: nn.Parameter  # (r, 1), singular values
    ranknum: nn.Parameter  # (1,) the rank at the start, which the scaling keeps
    lora_dropout: nn.Module
    scaling: float

    @classmethod
    def build(cls, site: Site, cfg: AdaLoraConfig, shared):
        kept = cfg.kept(site.key)
        r = cfg.init_r if kept is None else sum(kept)
        A, E, B = torch.randn(r, site.fan_in), torch.randn(r, 1), torch.randn(site.out_features, r)
        alpha = cfg.lora_alpha if cfg.lora_alpha > 0 else cfg.init_r
        return dict(
            r=r,
            lora_alpha=cfg.lora_alpha,
            scaling=alpha,
            lora_dropout=nn.Dropout(cfg.lora_dropout) if cfg.lora_dropout > 0 else nn.Identity(),
            lora_A=nn.Parameter(A),
            lora_B=nn.Parameter(B),
            lora_E=nn.Parameter(E),
            ranknum=Transient(nn.Parameter(torch.randn(1).fill_(cfg.init_r), requires_grad=False)),
        )

    def init(self, cfg: AdaLoraConfig) -> None:
        if cfg.init_lora_weights:
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, mean=0.0, std=0.02)
            nn.init.normal_(self.lora_B, mean=0.0, std=0.02)

    def frozen(self):
        return (self.ranknum,)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * (self.lora_E * (self.scaling / (self.ranknum + 1e-5))), self.lora_B

    def join(self, x: Tensor) -> Tensor:
        layer, p = self.layer, share_dropped(self.lora_dropout)
        if p is None:
            return super().join(x)
        return low_rank_linear(layer.base_layer, layer.op.input_gradient, layer.base_weight, x, *self.factors(), 1.0, p)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        layer, p = self.layer, share_dropped(self.lora_dropout)
        if p is None or not layer.may_fuse:
            return super().post(x, y)
        return add_low_rank(y, x, *self.factors(), 1.0, p)

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x if self.layer.op.takes_ids else self.lora_dropout(x))

    @classmethod
    def stored(cls, layer: Any, container: str, tensor: Tensor, cfg: AdaLoraConfig) -> Tensor:
        """Checkpoints hold the singular triples that were kept."""
        kept, dim = cfg.kept(layer.site.key), triples(container)
        if kept is None or len(kept) != tensor.shape[dim]:  # an adapter that was loaded has no others
            return tensor
        return tensor.index_select(dim, where(kept, tensor))

    @classmethod
    def restored(cls, layer: Any, container: str, here: Tensor, tensor: Tensor, cfg: AdaLoraConfig) -> Tensor:
        """The triples that were kept go back to their places; the others have the singular value 0."""
        kept, dim = cfg.kept(layer.site.key), triples(container)
        if kept is None or (len(kept), sum(kept)) != (here.shape[dim], tensor.shape[dim]):
            return tensor
        whole = torch.zeros_like(here) if container == "lora_E" else here.detach().clone()
        return whole.index_copy_(dim, where(kept, here), tensor.to(here))

    @classmethod
    def after_forward(cls, tuner: Any, output: Any) -> Any:
        """Add the orthogonal regularisation to the loss of a training step."""
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and tuner.training and torch.is_grad_enabled():
            warn_if_forgotten(tuner)
            output.loss = loss + orthogonal_loss(tuner)
        return output


def triples(container: str) -> int:
    """The dimension that counts singular triples."""
    return 1 if container == "lora_B" else 0


def where(kept: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(kept, device=like.device).nonzero()[:, 0]
