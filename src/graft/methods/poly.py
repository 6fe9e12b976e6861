# SPDX-License-Identifier: Apache-2.0
"""Poly: Combining Modular Skills in Multitask Learning, arXiv 2202.13914; with splits, multi-head routing, 2211.03831.

Each layer has an inventory of skills, pairs A and B. A task mixes them: with its weights α of the skills, A' = Σ α A
and B' = Σ α B, and x A' B' / r is added. With splits, each part of the inputs, and of the outputs, has its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from graft.config.fields import COUNT, LORA, POSITIVE, Targeted
from graft.core.errors import ConfigError
from graft.core.random import kaiming_bound
from graft.methods.tasks import ByTask


@dataclass(kw_only=True)
class PolyConfig(Targeted):
    """Poly (arXiv 2202.13914) and, with `n_splits` > 1, multi-head routing (2211.03831).

    Raises:
        ConfigError: a number that is not positive, or another `poly_type`.
    """

    peft_type: str = "POLY"
    r: Annotated[int, COUNT] = 8  # rank of each skill
    init_weights: bool = True  # B starts at 0
    poly_type: Literal["poly"] = "poly"
    n_tasks: Annotated[int, POSITIVE] = 1
    n_skills: Annotated[int, POSITIVE] = 4  # of each layer
    n_splits: Annotated[int, POSITIVE] = 1  # of its inputs and outputs

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError for a `poly_type` other than "poly" or None."""
        if self.poly_type not in ("poly", None):
            raise ConfigError(
                f"Unsupported poly_type: {self.poly_type}. Currently, only the following types are supported: `poly`."
            )
        super().__post_init__()


EPS = 1e-12


class Router(nn.Module):
    """The logits of a task for each skill, in each split."""

    def __init__(self, tasks: int, splits: int, skills: int):
        """Make an uninitialised parameter `module_logits` (tasks, splits · skills)."""
        super().__init__()
        self.module_logits = nn.Parameter(torch.empty(tasks, splits * skills))


class Poly(ByTask[PolyConfig]):
    """Poly, arXiv 2202.13914: Δy = x A' B' / r, A' = Σ α A and B' = Σ α B over skills, with α of the row's task."""

    prefix = "poly_"
    unmergeable = "Poly mixes its skills for each task, and no weight is that of all tasks"
    targets = LORA
    only_linear = "Currently, only the following modules are supported: `torch.nn.Linear`, and those like it"
    facts = ("r", "n_tasks", "n_skills", "n_splits", "poly_type")

    poly_lora_A: nn.Parameter  # (splits, skills, in / splits, r)
    poly_lora_B: nn.Parameter  # (splits, skills, r, out / splits)
    poly_router: nn.Module  # module_logits (tasks, splits · skills)

    def check(self) -> str | None:
        """Return the reason of `Method.check`. Before that, raises ConfigError if `n_splits` does not divide both
        widths of a linear layer.
        """
        site, q = self.site, self.cfg.n_splits
        for what, size in (("in_features", site.in_features), ("out_features", site.out_features)):
            if site.op.linear and size % q:
                raise ConfigError(f"{what}={size} of layer '{site.key}' must be divisible by n_splits={q}.")
        return super().check()

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `poly_router`, a `Router`, and uninitialised parameters `poly_lora_A` (splits, skills, in / splits, r)
        and `poly_lora_B` (splits, skills, r, out / splits). Floating-point tensors are made on the default device, in
        the default dtype.
        """
        cfg, site = self.cfg, self.site
        q, k = cfg.n_splits, cfg.n_skills
        A, B = torch.empty(q, k, site.in_features // q, cfg.r), torch.empty(q, k, cfg.r, site.out_features // q)
        return dict(
            poly_lora_A=nn.Parameter(A),
            poly_lora_B=nn.Parameter(B),
            poly_router=Router(cfg.n_tasks, q, k),
        )

    def init_values(self) -> None:
        """Fill A as kaiming does (`fill_skills`), B with zeros, and the logits uniform within ±0.001.

        With `init_weights=False` B is filled like A.
        """
        fill_skills(self.poly_lora_A.data)
        if self.cfg.init_weights:
            nn.init.zeros_(self.poly_lora_B)
        else:
            fill_skills(self.poly_lora_B.data)
        nn.init.uniform_(self.poly_router.module_logits, -1e-3, 1e-3)

    def branch(self, x: Tensor) -> Tensor:
        """Return x A' B' / r in x's leading shape, with A' (in, r) and B' (r, out) of each row's task, mixed in A's
        dtype. x is not cast here, and nothing is dropped.

        Raises RoutingError without a task for each row.
        """
        mixing = self.mixing(self.tasks_of(x)).to(self.poly_lora_A.dtype)
        A = torch.einsum("bqk,qkir->bqir", mixing, self.poly_lora_A).flatten(1, 2)  # (batch, in, r)
        B = torch.einsum("bqk,qkro->brqo", mixing, self.poly_lora_B).flatten(2)  # (batch, r, out)
        y: Tensor = x.reshape(len(x), prod(x.shape[1:-1]), self.site.in_features) @ A @ B / self.cfg.r
        return y.view(*x.shape[:-1], self.site.out_features)

    def mixing(self, tasks: Tensor) -> Tensor:
        """Return α (batch, splits, skills) of tasks (batch,): sigmoid of the logits, divided by their sum over skills
        plus 1e-12.

        In training the sigmoids are draws from a relaxed Bernoulli distribution.
        """
        logits = self.poly_router.module_logits
        z = logits[tasks.to(logits.device)].unflatten(-1, (self.cfg.n_splits, -1))
        z = draw_relaxed_bernoulli(z) if self.layer.training else z.sigmoid()
        return z / (z.sum(-1, keepdim=True) + EPS)


def draw_relaxed_bernoulli(logits: Tensor) -> Tensor:
    """Draw from the relaxed Bernoulli distribution of temperature 1, strictly between 0 and 1, as torch does but
    without its check of the logits.
    """
    temperature = torch.ones((), device=logits.device)
    drawn: Tensor = LogitRelaxedBernoulli(temperature, logits=logits, validate_args=False).rsample()
    limits = torch.finfo(drawn.dtype)
    return drawn.sigmoid().clamp(limits.tiny, 1 - limits.eps)


def fill_skills(skills: Tensor) -> None:
    """Fill (splits, skills, n, m) uniform within ±1/√n, as kaiming draws (m, n) for each skill, skill by skill in
    PEFT's order.
    """
    q, k, n, m = skills.shape
    bound = kaiming_bound(n)
    for skill in range(k):
        for split in range(q):
            skills[split, skill] = torch.empty(m, n, device=skills.device, dtype=skills.dtype).uniform_(-bound, bound).T
