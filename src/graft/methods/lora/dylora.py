# SPDX-License-Identifier: Apache-2.0
"""DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation, 2210.07558.

A training step uses the first b ranks, with b at random, and only the last of them learns. So the first b ranks of the
trained adapter are an adapter of rank b: see `graft.truncate_lora`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from graft.core.call import Call
from graft.core.effect import Factors
from graft.core.errors import RoutingError
from graft.core.method import Tuner
from graft.core.rows import Constant, Facts, Run
from graft.methods.lora.lora import LoRA

DRAWN = "dylora"  # the part of an adapter's ranks that a run uses, in [0, 1)
CPU = torch.device("cpu")


class DyLoRA(LoRA):
    """DyLoRA, arXiv 2210.07558: LoRA that in training uses the first b ranks, ΔW = alpha / b · B[:, :b] A[:b], b drawn
    for each run.
    """

    surrounds_disabled = True  # draws do not depend on it

    def check(self) -> str | None:
        """Return a reason against known layers with opaque parameters or groups > 1, then one against `lora_bias` on
        any layer; else that of `LoRA.check`.
        """
        site = self.site
        if site.op.known and (site.op.opaque or site.op.count_groups(site.module) > 1):
            return "DyLoRA uses the first ranks of one matrix, and this weight is several"
        if self.cfg.lora_bias:
            return "DyLoRA has no ranks of a bias: leave lora_bias off"
        return super().check()

    def factors(self) -> Factors:
        """Return LoRA's factors in eval mode.

        In training, the first b = 1 + ⌊share · r⌋ ranks with the scale for rank b (alpha / b, or alpha / √b).

        The share is this run's draw. Only rank b gets a gradient; the ranks before it are detached. No dropout on
        embeddings.

        Raises:
            RoutingError: there is no draw: somebody called another model than the one that `get_peft_model` returns.
        """
        if not self.layer.training:
            return super().factors()
        share = self.layer.call.fact((DRAWN, self.name))
        if share is None:
            raise RoutingError(
                f"DyLoRA draws its ranks when a training step calls the model that get_peft_model returns, and layer "
                f"'{self.site.key}' was called in another way. Call that one, or eval() first."
            )
        r = self.cfg.r
        b = 1 + int(share.value * r)
        A, B = (p.flatten(1) for p in self.pair)
        scale = self.scaling * (math.sqrt(r / b) if self.cfg.use_rslora else r / b)
        dropout = None if self.site.op.takes_ids else self.lora_dropout
        return Factors(last_alone(A[:b], 0), last_alone(B[:, :b], 1), scale, dropout)

    @classmethod
    def facts_of_run(cls, tuner: Tuner, call: Call, run: Run) -> Facts:
        """Draw a number in [0, 1) for each adapter, on the CPU, and return them by key (DRAWN, adapter).

        An adapter's own generator draws it, if the call has generators by adapter; else torch's. In eval mode it draws
        as well.
        """
        draws, shares = call.context.draws, {}
        for name in run.adapters:
            with nullcontext() if draws is None else draws.use_generator(name, draws.ticket(), CPU):
                shares[DRAWN, name] = Constant(torch.rand((), dtype=torch.float64, device=CPU).item())
        return shares


def last_alone(factor: Tensor, dim: int) -> Tensor:
    """Return `factor` with gradient only for the last index of dimension `dim`; all before it is detached."""
    *before, last = factor.split(1, dim)
    return torch.cat([t.detach() for t in before] + [last], dim)
