# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA: Monte Carlo Low-Rank Adaptation, arXiv 2411.04358.

In training A is random: A + c Σₖ wₖ Nₖ, where each row of a sample Nₖ has its own variance. The variances are
drawn from a Wishart distribution, the weights w from one on the simplex; both have parameters that train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graft.config.fields import require_sub_config
from graft.core.effect import Factors
from graft.core.errors import ConfigError
from graft.core.method import Method
from graft.methods.lora.lora import LoRA

if TYPE_CHECKING:
    from graft.methods.lora.sub_configs import MontecloraConfig


class Sampler(nn.Module):
    """Draws the noise of an A of r rows. The loss refers to the last draw."""

    gaussian_var_prior: Tensor  # (r, r), diagonal: variances of the last draw
    expert_weights: Tensor  # (n,): w of the last draw

    def __init__(self, r: int, cfg: MontecloraConfig, device: torch.device | None = None):
        super().__init__()
        n, self.cfg = cfg.num_samples, cfg
        self.std_prior = nn.Parameter(torch.empty(r, device=device))  # logarithms of standard deviations
        self.expert_weights_prior = nn.Parameter(torch.empty(n, device=device))  # of concentrations
        self.register_buffer("gaussian_var_prior", torch.eye(r, device=device))
        self.register_buffer("expert_weights", torch.full((n,), 1 / n, device=device))
        self.drawn: tuple[Tensor, Tensor] | None = None  # what both came from

    def init(self) -> None:
        self.std_prior.data.uniform_()
        self.expert_weights_prior.data.uniform_()

    def forward(self, fan_in: int) -> Tensor:
        """Return noise for A, (r, fan_in)."""
        like = self.std_prior
        r, n = len(like), self.cfg.num_samples
        samples = torch.randn(n, fan_in, r, device=like.device, dtype=like.dtype)
        on_simplex = torch.randn(n, device=like.device, dtype=like.dtype)
        self.drawn = wishart_diagonal(r, like), on_simplex
        variances, weights = self.last()
        with torch.no_grad():
            self.gaussian_var_prior.copy_(variances.diag())
            self.expert_weights.copy_(weights)
        noise: Tensor = torch.tensordot(weights, samples, 1) * (variances.sqrt() * self.cfg.sample_scaler)
        return noise.T

    def last(self) -> tuple[Tensor, Tensor]:
        """Return variances (r,) and weights (n,) of the last draw, as functions of the parameters."""
        if self.drawn is None:
            return self.gaussian_var_prior.diagonal(), self.expert_weights
        chi2, z = self.drawn
        variances = ((2 * self.std_prior).exp() * chi2).clip(min=1e-3)
        concentration = self.expert_weights_prior.exp().clamp(min=1e-6)
        logs, inverse, n = concentration.log(), 1 / concentration, len(z)
        spread = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp(min=1e-6) + 1e-6
        return variances, (spread.sqrt() * z + logs - logs.mean()).softmax(-1)

    def loss(self) -> Tensor:
        """Return kl_loss_weight · (three divergences from the priors), plus Σ w² with `use_entropy`, in float32."""
        cfg, std, prior = self.cfg, self.std_prior.float(), self.expert_weights_prior.float()
        variances, weights = (t.float() for t in self.last())
        variances = variances.clamp(min=1e-6)
        r = len(std)
        wishart = 0.5 * r * (-2 * std + (2 * std).exp() - 1).sum()
        gauss = 0.5 * cfg.num_samples * (variances.sum() - variances.log().sum() - len(variances))
        kl = dirichlet_divergence(prior.exp(), torch.full_like(prior, cfg.dirichlet_prior)) + wishart + gauss
        loss: Tensor = cfg.kl_loss_weight * kl
        return loss + weights.square().sum() if cfg.use_entropy else loss


def wishart_diagonal(r: int, like: Tensor) -> Tensor:
    """Draw the diagonal of a matrix (r, r) from the Wishart distribution of r degrees of freedom, without correlations.

    It comes from Bartlett's decomposition L Lᵀ, with L drawn in the order of torch's `Wishart`.
    """
    freedom = r - torch.arange(r, device=like.device, dtype=torch.float32)
    diagonal = 2 * torch._standard_gamma(freedom / 2)  # chi-squared; torch's class copies a number to the device
    i, j = torch.tril_indices(r, r, -1, device=like.device)
    below = torch.zeros(r, r, device=like.device)
    below[i, j] = torch.randn(r * (r - 1) // 2, device=like.device)
    return (diagonal + below.square().sum(1)).to(like.dtype)


def dirichlet_divergence(a: Tensor, b: Tensor) -> Tensor:
    norms = a.sum().lgamma() - b.sum().lgamma() + (a.lgamma() - b.lgamma()).sum()
    return norms + ((a - b) * (a.digamma() - a.sum().digamma())).sum()


class MonteCLoRA(LoRA):
    lora_monteclora_sampler: Sampler

    holds_any = False
    ungrouped = "MonteCLoRA draws A as a matrix, and a convolution with groups > 1 has none: A mixes its groups"

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        sampler = Sampler(self.cfg.r, require_sub_config(self.cfg.monteclora_config), device)
        return super().build(shared, device) | dict(lora_monteclora_sampler=sampler)

    def init(self) -> None:
        super().init()
        self.lora_monteclora_sampler.init()

    def tie(self, source: Method) -> None:
        raise ConfigError(
            f"MonteCLoRA draws A of an embedding, which the tied layer '{self.site.key}' would have as its B: leave "
            "ensure_weight_tying off."
        )

    def factors(self) -> Factors:
        f = super().factors()
        if not self.layer.training:
            return f
        A = self.pair[0].flatten(1)
        return f._replace(A=A + self.lora_monteclora_sampler(A.shape[1]))

    def loss(self) -> Tensor | float:
        """Return `Sampler.loss`; 0.0 in eval mode."""
        return self.lora_monteclora_sampler.loss() if self.layer.training else 0.0
