# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA: Monte Carlo Low-Rank Adaptation, arXiv 2411.04358.

In training A is random: A + c Σₖ wₖ Nₖ, where each row of a sample Nₖ has its own variance. The variances are
drawn from a Wishart distribution, the weights w from one on the simplex; both have parameters that train.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.config.fields import require_sub_config
from graft.core.effect import Factors
from graft.core.errors import ConfigError
from graft.core.method import Method
from graft.methods.lora.lora import LoRA
from graft.methods.lora.sub_configs import MontecloraConfig


class Sampler(nn.Module):
    """Draws the noise of MonteCLoRA for an A with r rows.

    Two parameters train: standard deviations and concentrations.

    `last` and `loss` refer to the last draw.
    """

    gaussian_var_prior: Tensor  # (r, r), diagonal: variances of the last draw
    expert_weights: Tensor  # (n,): w of the last draw

    def __init__(self, r: int, cfg: MontecloraConfig, device: torch.device | None = None):
        """Make parameters `std_prior` (r,) and `expert_weights_prior` (n,), n = `num_samples`, both uninitialised.

        Buffers: `gaussian_var_prior`, the identity (r, r), and `expert_weights` (n,), all 1/n. There is no draw yet.
        """
        super().__init__()
        n, self.cfg = cfg.num_samples, cfg
        self.std_prior = nn.Parameter(torch.empty(r, device=device))  # logarithms of standard deviations
        self.expert_weights_prior = nn.Parameter(torch.empty(n, device=device))  # of concentrations
        self.register_buffer("gaussian_var_prior", torch.eye(r, device=device))
        self.register_buffer("expert_weights", torch.full((n,), 1 / n, device=device))
        self.drawn: tuple[Tensor, Tensor] | None = None  # χ² and normal values of the last draw

    def init_values(self) -> None:
        """Fill both parameters with uniform values from [0, 1)."""
        self.std_prior.data.uniform_()
        self.expert_weights_prior.data.uniform_()

    def forward(self, fan_in: int) -> Tensor:
        """Draw and return noise for A, (r, fan_in): sample_scaler · √variance ⊙ Σₖ wₖ Nₖ, with N (n, fan_in, r)
        standard normal.

        Stores the random numbers in `drawn`, and copies variances (as a diagonal matrix) and weights into the buffers.
        """
        like = self.std_prior
        r, n = len(like), self.cfg.num_samples
        samples = torch.randn(n, fan_in, r, device=like.device, dtype=like.dtype)
        on_simplex = torch.randn(n, device=like.device, dtype=like.dtype)
        self.drawn = wishart_diagonal(r, like), on_simplex
        variances, weights = self.last()
        with torch.no_grad():
            self.gaussian_var_prior.copy_(variances.diag())
            self.expert_weights.copy_(weights)
        return (torch.tensordot(weights, samples, 1) * (variances.sqrt() * self.cfg.sample_scaler)).T

    def last(self) -> tuple[Tensor, Tensor]:
        """Return variances (r,) and weights w (n,) of the last draw, as differentiable functions of the parameters.

        Variances: exp(2 std_prior) · χ², at least 1e-3. Weights: a softmax of normal values with mean log aᵢ - mean(log
        a) and variance (1 - 2 / n) / aᵢ + Σ 1 / a / n². This approximates the Dirichlet distribution. Here a is
        exp(`expert_weights_prior`), at least 1e-6. Without a draw, return the buffers.
        """
        if self.drawn is None:
            return self.gaussian_var_prior.diagonal(), self.expert_weights
        chi2, z = self.drawn
        variances = ((2 * self.std_prior).exp() * chi2).clip(min=1e-3)
        concentration = self.expert_weights_prior.exp().clamp(min=1e-6)
        logs, inverse, n = concentration.log(), 1 / concentration, len(z)
        spread = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp(min=1e-6) + 1e-6
        return variances, (spread.sqrt() * z + logs - logs.mean()).softmax(-1)

    def loss(self) -> Tensor:
        """Return kl_loss_weight · (wishart + gauss + dirichlet), (), in float32, of the last draw; with `use_entropy`
        plus Σ w².

        With σ = `std_prior` and variances v ≥ 1e-6: wishart = r / 2 · Σ (exp 2σ - 2σ - 1), gauss = n / 2 · Σ (v - log v
        - 1). The last one is the divergence of the concentrations exp(`expert_weights_prior`) from `dirichlet_prior`
        for all.
        """
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
    """Draw the diagonal (r,) of a matrix (r, r) from the Wishart distribution of r degrees of freedom and scale 1, in
    the dtype of `like`.

    It is the row sums of squares of Bartlett's L, drawn on the device of `like` in the order of torch's `Wishart`.
    """
    freedom = r - torch.arange(r, device=like.device, dtype=torch.float32)
    diagonal = 2 * torch._standard_gamma(freedom / 2)  # chi-squared; torch's class copies a number to the device
    i, j = torch.tril_indices(r, r, -1, device=like.device)
    below = torch.zeros(r, r, device=like.device)
    below[i, j] = torch.randn(r * (r - 1) // 2, device=like.device)
    return (diagonal + below.square().sum(1)).to(like.dtype)


def dirichlet_divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return KL(Dirichlet(a) ‖ Dirichlet(b)), (), for two vectors of concentrations."""
    norms = a.sum().lgamma() - b.sum().lgamma() + (a.lgamma() - b.lgamma()).sum()
    return norms + ((a - b) * (a.digamma() - a.sum().digamma())).sum()


class MonteCLoRA(LoRA):
    """MonteCLoRA, arXiv 2411.04358: LoRA with A + noise in training; variances and weights of the noise train, too."""

    lora_monteclora_sampler: Sampler

    holds_any = False
    ungrouped = "MonteCLoRA draws A as a matrix, and a convolution with groups > 1 has none: A mixes its groups"

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return LoRA's tensors and `lora_monteclora_sampler`, a `Sampler` for r rows on `device`, which is made before
        them.
        """
        sampler = Sampler(self.cfg.r, require_sub_config(self.cfg.monteclora_config), device)
        return super().build(shared, device) | dict(lora_monteclora_sampler=sampler)

    def init_values(self) -> None:
        """Initialise as LoRA, then the sampler's parameters."""
        super().init_values()
        self.lora_monteclora_sampler.init_values()

    def tie_to_embedding(self, source: Method) -> None:
        """Raise ConfigError: a tied layer would have the random A as its B, so `ensure_weight_tying` cannot be used."""
        raise ConfigError(
            f"MonteCLoRA draws A of an embedding, which the tied layer '{self.site.key}' would have as its B. Leave "
            "ensure_weight_tying off."
        )

    def factors(self) -> Factors:
        """Return LoRA's factors; in training with A + a new draw of noise, a matrix (r, fan-in), in place of A."""
        f = super().factors()
        if not self.layer.training:
            return f
        A = self.pair[0].flatten(1)
        return f._replace(A=A + self.lora_monteclora_sampler(A.shape[1]))

    def loss(self) -> Tensor | float:
        """Return the sampler's loss of the last draw (`Sampler.loss`) in training; 0.0 in eval mode.

        Without a draw yet, the buffers' values count.
        """
        return self.lora_monteclora_sampler.loss() if self.layer.training else 0.0
