# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from graft.config.targets import ADALORA
from graft.core.containers import Transient
from graft.core.dropout import dropout_for
from graft.core.effect import Factors
from graft.core.method import Method, Tensors
from graft.kernels.orthogonal import gram_distance
from graft.methods.adalora.allocator import all_trainable, orthogonal_loss
from graft.methods.adalora.api import API
from graft.methods.adalora.config import AdaLoraConfig
from graft.methods.adalora.forgotten import warn_if_forgotten
from graft.storage.parallel import layout_of, whole

TENSORS = ("lora_A", "lora_B", "lora_E")


class AdaLoRA(Method):
    """ΔW = s · B diag(E) A, A (r, in), E (r, 1), B (out, r). Training sets the least important of E to 0."""

    config = AdaLoraConfig
    prefix = "lora_"
    targets = ADALORA
    single_trainable = True
    over_layers = "divides a budget of ranks among all layers"
    tuner_methods = API

    lora_A: nn.Parameter  # (r, fan_in), right singular vectors
    lora_B: nn.Parameter  # (out, r), left singular vectors
    lora_E: nn.Parameter  # (r, 1), singular values
    ranknum: nn.Parameter  # (1,) the rank at the start, which the scaling keeps
    lora_dropout: nn.Module
    scaling: float

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        site, cfg = self.site, self.cfg
        kept = cfg.kept(site.key)
        r = cfg.init_r if kept is None else sum(kept)
        A, E, B = torch.randn(r, site.fan_in), torch.randn(r, 1), torch.randn(site.out_features, r)
        return dict(
            r=r,
            lora_alpha=cfg.lora_alpha,
            scaling=cfg.lora_alpha if cfg.lora_alpha > 0 else cfg.init_r,
            lora_dropout=dropout_for(cfg.lora_dropout),
            lora_A=nn.Parameter(A),
            lora_B=nn.Parameter(B),
            lora_E=nn.Parameter(E),
            ranknum=Transient(nn.Parameter(torch.randn(1).fill_(cfg.init_r), requires_grad=False)),
        )

    def init(self) -> None:
        if self.cfg.init_lora_weights:
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, mean=0.0, std=0.02)
            nn.init.normal_(self.lora_B, mean=0.0, std=0.02)

    seen: list[Tensor] | None = None  # distances of A and B as the layer's call saw them
    sees = False  # the tensors are whole only then

    def distances(self) -> list[Tensor]:
        """Return how far the singular vectors are from orthonormal, on the right and on the left."""
        seen, self.seen = self.seen, None
        if not self.sees:
            return [gram_distance(self.lora_A), gram_distance(self.lora_B.T)]
        if seen is None:
            raise NotImplementedError(
                f"AdaLoRA adapter '{self.name}' needs the tensors of layer '{self.site.key}' whole, and the call of "
                "this step left no graph: pass use_reentrant=False to gradient checkpointing."
            )
        return seen

    def factors(self) -> Factors:
        if self.sees and torch.is_grad_enabled() and self.layer.training:
            self.seen = [gram_distance(self.lora_A), gram_distance(self.lora_B.T)]
        E = (self.lora_E * (self.scaling / (self.ranknum + 1e-5))).flatten()
        return Factors(self.lora_A, self.lora_B, dropout=self.lora_dropout, inner=E)

    def stored(self, values: Tensors, cfg: AdaLoraConfig) -> Tensors:
        """Return the singular triples that the layer kept."""
        kept = cfg.kept(self.site.key)
        if kept is None:
            return values
        return {
            (name, path): t.index_select(triples(name), where(kept, t)) if len(kept) == t.shape[triples(name)] else t
            for (name, path), t in values.items()  # an adapter from a file has no others
        }

    def restored(self, stored: Tensors, cfg: AdaLoraConfig) -> Tensors:
        """Put the triples of the file in their places; the others get the singular value 0."""
        kept = cfg.kept(self.site.key)
        if kept is None:
            return stored
        out = {}
        for (name, path), t in stored.items():
            if name not in TENSORS:
                out[name, path] = t
                continue
            here, dim = whole(getattr(self, name)), triples(name)
            if (
                t.dim() == here.dim()
                and t.shape != here.shape
                and (len(kept), sum(kept)) == (here.shape[dim], t.shape[dim])
            ):
                all_ = torch.zeros_like(here) if name == "lora_E" else here.detach().clone()
                t = all_.index_copy_(dim, where(kept, here), t.to(here))
            out[name, path] = t
        return out

    @classmethod
    @contextmanager
    def around(cls, tuner: Any, call: Any, run: Any) -> Iterator[Callable[[Any], Any]]:
        """Add the orthogonal regularisation to the loss of a training step; say if nobody allocates."""

        trains = tuner.training and torch.is_grad_enabled() and not is_dynamo_compiling()
        for _, methods in all_trainable(tuner) if trains else ():
            for m in methods.values():
                m.sees = layout_of(m.lora_A) is not None

        def with_loss(output: Any) -> Any:
            if not torch.is_grad_enabled():
                return output
            if not torch.compiler.is_compiling():  # a version is no number that can be traced
                warn_if_forgotten(tuner)
            loss = getattr(output, "loss", None)
            if isinstance(loss, Tensor) and tuner.training:
                output.loss = loss + orthogonal_loss(tuner)
            return output

        yield with_loss


def triples(container: str) -> int:
    """Return the dimension that counts singular triples."""
    return 1 if container == "lora_B" else 0


def where(kept: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(kept, device=like.device).nonzero()[:, 0]
