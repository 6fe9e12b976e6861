# SPDX-License-Identifier: Apache-2.0
"""RoAd: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, arXiv 2409.00119."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.bounds import Bound
from graft.config.fields import LORA, Targets
from graft.core.effect import Effect, Rewrite
from graft.core.errors import ConfigError
from graft.core.method import COMPARISON, Method, PublishedRate
from graft.kernels.orthogonal import rotate_pairs

RoadVariant = Literal["road_1", "road_2", "road_4"]
# numbers of angles, and of scales, that a pair has: (2 if c and s have their own, 2 if both channels have their own)
LAYOUT = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}
VARIANT = Bound(LAYOUT.__contains__, f"Invalid variant {{value}} specified. Known ones: {', '.join(LAYOUT)}.")
EVEN = Bound(
    lambda size: size > 0 and size % 2 == 0,
    "The group_size must be divisible by 2 when using RoadLayer, but got {value}. Give 2, 4, …",
)


@dataclass(kw_only=True)
class RoadConfig(Targets):
    """RoAd: rotation and scaling of each pair of output channels. Channels j and j + g / 2 are a pair.

    Raises:
        ConfigError: an unknown variant, or a group that has no halves.
    """

    peft_type: str = "ROAD"
    variant: Annotated[str, VARIANT] = "road_1"  # an angle and a scale per pair; road_2: per channel; road_4: per entry
    group_size: Annotated[int, EVEN] = 64  # g; must divide the channels of every layer
    init_weights: bool = True  # the identity; else random


class Road(Method[RoadConfig]):
    """RoAd, arXiv 2409.00119: R (W x + b): of each pair, (c₁ z₁ - s₁ z₂, c₂ z₂ + s₂ z₁), c = α cos θ, s = α sin θ."""

    prefix = "road_"
    published_lr = PublishedRate(1e-3, 1e-3, COMPARISON)
    targets = LORA
    facts = ("variant", "group_size")

    road_theta: nn.Parameter  # (n / 2), (n) or (2 n), n = out
    road_alpha: nn.Parameter  # as road_theta

    def check(self) -> str | None:
        """Raise ConfigError if `group_size` does not divide out_features, also of layers of unknown type; else return
        the reason of `Method.check`.
        """
        n, g = self.site.out_features, self.cfg.group_size
        if n % g:
            raise ConfigError(
                f"The out_features of the base layer must be divisible by group_size ({g}) when using RoadLayer. "
                f"Layer '{self.site.key}' has {n}. Choose another group_size, or do not target it."
            )
        return super().check()

    def describe(self) -> Effect:
        """Return a `Rewrite` by `fold` and `post`.

        It cannot merge (`why_unmergeable`) if a group of a known convolution's channels is no multiple of `group_size`.
        """
        op, per_group = self.site.op, self.cfg.group_size
        torn = self.site.out_features // op.count_groups(self.site.module) % per_group if op.known else 0
        why = "A pair of channels that are in two groups of a convolution has no kernel" if torn else None
        return Rewrite(self.fold, post=self.post, why_unmergeable=why)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised parameters `road_theta` and `road_alpha`, (n / 2), (n) or (2 n) for road_1, road_2,
        road_4, n = out. Floating-point tensors are made on the default
        device, in the default dtype.
        """
        size = self.site.out_features // 2 * math.prod(LAYOUT[self.cfg.variant])
        return dict(road_theta=nn.Parameter(torch.empty(size)), road_alpha=nn.Parameter(torch.empty(size)))

    def init_values(self) -> None:
        """Fill θ with zeros and α with ones, the identity; with `init_weights=False` normal values of std 0.5 around 0
        and 1.
        """
        self.fill_start(self.road_theta, 0.5)
        self.fill_start(self.road_alpha, 0.5, mean=1.0)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output y with each pair of channels rotated and scaled, R y, in y's dtype. x is not read."""
        return self.rotate_channels(y, 1 - len(self.site.shape))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return R W and R b (None without bias), in their own dtypes.

        Raises NotImplementedError if the effect cannot merge.
        """
        if self.effect.why_unmergeable is not None:
            raise NotImplementedError(f"{self.effect.why_unmergeable} (layer '{self.site.key}').")
        return self.rotate_channels(W, 0), None if b is None else self.rotate_channels(b, 0)

    def rotate_channels(self, z: Tensor, dim: int) -> Tensor:
        """Return R z, where `dim` is the dimension of z that counts channels; in z's dtype, computed in the wider one
        of z and θ.

        In each group of `group_size` channels, z₁ of the first half and z₂ of the second are a pair. It becomes (c₁ z₁
        - s₁ z₂, c₂ z₂ + s₂ z₁) with c = α cos θ and s = α sin θ. With road_1 a pair has one θ and one α, with road_2
            each of its channels, with road_4 each channel has others for c and s.
        """
        (of, each), half = LAYOUT[self.cfg.variant], self.cfg.group_size // 2
        dtype = torch.promote_types(self.road_theta.dtype, z.dtype)
        both = (self.road_theta, self.road_alpha)
        theta, alpha = (p.to(dtype).view(-1, of, each, half).unbind(1) for p in both)
        c, s = alpha[0] * theta[0].cos(), alpha[-1] * theta[-1].sin()  # (groups, each, half)
        c, s = torch.cat((c[:, :1], c[:, -1:]), 1), torch.cat((-s[:, :1], s[:, -1:]), 1)
        return rotate_pairs(z, c, s) if dim == -1 else rotate_pairs(z.movedim(dim, -1), c, s).movedim(-1, dim)
