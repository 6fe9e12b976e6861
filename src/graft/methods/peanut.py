# SPDX-License-Identifier: Apache-2.0
"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, arXiv 2410.01870."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, NOT_NEGATIVE, LayerRange, Targeted
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import ConfigError
from graft.core.method import Method, fill_kaiming
from graft.kernels.narrow import multiply_widened

F = nn.functional
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # as transformers names them
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "relu6": F.relu6, "mish": F.mish, "leaky_relu": F.leaky_relu,
}  # fmt: skip


@dataclass(kw_only=True)
class PeanutConfig(Targeted, LayerRange):
    """PEANuT: ΔWᵀ = scaling · f(Wᵀ) B. f is a narrow network that sees the weight: σ(Wᵀ A), `depth` pairs of layers.

    Raises:
        ConfigError: a rank that is not positive, a negative depth, or an unknown activation.
    """

    peft_type: str = "PEANUT"
    r: Annotated[int, COUNT] = 32
    depth: Annotated[int, NOT_NEGATIVE] = 0  # number of encoders, and of decoders
    act_fn: str = "relu"  # σ, by its name in transformers
    scaling: float = 1.0
    init_weights: bool = True  # B is zero; else random

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError for an unknown `act_fn`."""
        super().__post_init__()
        activation(self.act_fn)


class PEANuT(Method[PeanutConfig]):
    """PEANuT, arXiv 2410.01870: ΔW = scaling · B z, z = σ(A W₀) (r, in); encoders z ← σ(E z), decoders z ← σ(D z) +
    input of its encoder.
    """

    prefix = "peanut_"
    targets = LORA
    facts = ("r", "scaling")
    files = dict.fromkeys(("peanut_encoders", "peanut_decoders"), "{0}{1}")

    peanut_A: nn.Linear  # (r, out)
    peanut_B: nn.Linear  # (out, r)
    peanut_encoders: nn.ModuleList  # depth × (r, r)
    peanut_decoders: nn.ModuleList
    scaling: float

    def describe(self) -> Effect:
        """Return an `Update` by `factors` that reads W₀ (`of_weight`)."""
        return Update(factors=self.factors, of_weight=True)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return linear layers without bias: `peanut_A` (r, out), `peanut_B` (out, r), and lists `peanut_encoders`,
        `peanut_decoders` of `depth` layers (r, r) each. Values are drawn in the
        order A, encoders, decoders, B. Floating-point tensors are made on the default device, in the default dtype.
        """
        cfg, r, out = self.cfg, self.cfg.r, self.site.out_features
        A = nn.Linear(out, r, bias=False)  # PEFT draws in this order, and holds in another
        encoders, decoders = (nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(cfg.depth)) for _ in "ED")
        B = nn.Linear(r, out, bias=False)
        return dict(peanut_A=A, peanut_B=B, peanut_encoders=encoders, peanut_decoders=decoders)

    def init_values(self) -> None:
        """Fill A, encoders and decoders kaiming uniform (a=√5), and B with zeros; with `init_weights=False` B, too, is
        kaiming uniform.
        """
        for layer in (self.peanut_A, *self.peanut_encoders, *self.peanut_decoders):
            fill_kaiming(layer.weight)
        self.fill_start(self.peanut_B.weight)

    def factors(self) -> Factors:
        """Return z (r, in) as A, and B, with the scaling.

        z = σ(A W₀) goes through encoders and decoders, with σ after each. To a decoder's result after σ the input of
        its encoder is added, the last encoder's first. There is no dropout.
        """
        act = activation(self.cfg.act_fn)
        z = act(multiply_widened(self.peanut_A.weight, self.layer.W0.flatten(1)))
        skips = []
        for encoder in self.peanut_encoders:
            skips.append(z)
            z = act(encoder.weight @ z)
        for decoder in self.peanut_decoders:
            z = act(decoder.weight @ z) + skips.pop()
        return Factors(z, self.peanut_B.weight, self.scaling)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation function with transformers' name `name`; one that is not in ACTIVATIONS is added from
    transformers.

    Raises:
        ConfigError: there is none of that name.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        ACT2FN = {}  # type: ignore[assignment]
    if name not in ACT2FN:
        known = ", ".join(dict.fromkeys([*ACTIVATIONS, *ACT2FN]))
        raise ConfigError(f"Unsupported activation function: {name!r}. Known ones: {known}.")
    return ACTIVATIONS.setdefault(name, ACT2FN[name])
