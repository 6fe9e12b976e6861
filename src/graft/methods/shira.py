# SPDX-License-Identifier: Apache-2.0
"""SHiRA: Sparse High Rank Adapters, arXiv 2406.13175."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, PHI_ATTENTION, FanInFanOut, Targets
from graft.core.containers import CheckpointOnly
from graft.core.errors import CheckpointError, ConfigError, warn
from graft.core.merging import lift_merged
from graft.core.method import COMPARISON, Method, PublishedRate, Tensors, WeightUse
from graft.core.site import Site
from graft.kernels.sparse import Scattered


@dataclass(kw_only=True)
class ShiraConfig(Targets, FanInFanOut):
    """SHiRA: r · (in + out) entries of each weight train, at places that a mask chooses.

    `mask_fn` of a config is a function (base_layer, r, **kwargs) → mask of the weight's shape, of zeros and that many
    ones. No file holds it: files hold the places. With another `mask_type` than "random", set it before injection.
    """

    peft_type: str = "SHIRA"
    r: Annotated[int, COUNT] = 32  # as many numbers train as in LoRA of this rank
    mask_type: str = "random"  # or any other name, for a `mask_fn` of your own
    random_seed: int | None = None
    init_weights: bool = True  # zero; else N(0, 1)

    counters = ("random_seed",)

    def __post_init__(self) -> None:
        """Validate the fields; set `mask_fn` to `random_mask` for mask_type="random", else to None.

        Without a mask function, warn unless the config is for inference.
        """
        super().__post_init__()
        self.mask_fn: Callable[..., Tensor] | None = random_mask if self.mask_type == "random" else None
        if self.mask_fn is None and not self.inference_mode:
            warn(
                f"Argument mask_type={self.mask_type!r} is not recognized. Set `mask_fn` of this config to a function "
                "(base_layer, r, **kwargs) → mask before get_peft_model()."
            )


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **_: object) -> Tensor:
    """Return a mask of the weight's shape, dtype and device with r · (in + out) ones at random places
    (`random_places`), zeros elsewhere. Other keywords are ignored.
    """
    weight = base_layer.weight
    places = random_places(weight.shape, r, random_seed).to(weight.device)
    return torch.zeros_like(weight).view(-1).index_fill(0, places, 1).view(weight.shape)


def random_places(shape: Sequence[int], r: int, seed: int | None) -> Tensor:
    """Return r · (in + out) distinct random places of a matrix (out, in), as ascending flat indices on the CPU.

    If there are not that many, all are returned, without an error.

    A new generator draws them. With `seed` None it has torch's default seed: the places are the same each time.
    """
    generator = torch.Generator("cpu")  # without a seed, torch's default one
    if seed is not None:
        generator.manual_seed(seed)
    out, n = shape
    return torch.randperm(out * n, generator=generator, device="cpu")[: r * (out + n)].sort().values


class SHiRA(Method[ShiraConfig]):
    """SHiRA, arXiv 2406.13175: ΔW = s · v at the places of a mask, 0 elsewhere."""

    prefix = "shira_"
    published_lr = PublishedRate(3e-4, 3e-4, COMPARISON)
    targets = PHI_ATTENTION

    shira_weight: nn.Parameter  # v (k,), in the order of the places
    shira_indices: Tensor  # (2, k) int32: output and input of each, row by row of the weight
    scaling: float

    @property
    def size(self) -> int:
        """The number of entries that train: r · (in + out)."""
        return int(self.cfg.r) * (self.site.out_features + self.site.fan_in)

    def check(self) -> str | None:
        """Raise ConfigError if r < 1, or if more entries would train than the weight of a known layer has; else return
        the reason of `Method.check`.
        """
        COUNT.check("r", self.cfg.r)
        total = self.site.out_features * self.site.fan_in
        if self.site.op.known and self.size > total:
            raise ConfigError(
                f"The set rank {self.cfg.r} results in more shira params than the total number of params in the base "
                f"layer '{self.site.key}': {self.size} of {total}. Choose a smaller r."
            )
        return super().check()

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS` with a `mask_fn` of the user's, which may look at the weight; else
        `WeightUse.NONE`.
        """
        # a mask may look at it
        return WeightUse.STARTS if self.cfg.mask_fn not in (None, random_mask) else WeightUse.NONE

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `shira_weight` (k,) of zeros, trained, the places `shira_indices` (2, k) int32 zeros, which files
        hold, `r` and scaling = 1. Floating-point tensors are made on the default device, in the default dtype.
        """
        return dict(
            r=self.cfg.r,
            scaling=1.0,
            shira_weight=nn.Parameter(torch.zeros(self.size)),
            shira_indices=CheckpointOnly(torch.zeros(2, self.size, dtype=torch.int32)),
        )

    def init_values(self) -> None:
        """Fill the places as output and input of each entry of the mask.

        v stays 0, or is normal with `init_weights=False`.
        """
        self.fill_start(self.shira_weight, 1.0)
        places = self.chosen()
        n = self.site.fan_in
        self.shira_indices.copy_(torch.stack((places // n, places % n)))

    def chosen(self) -> Tensor:
        """Return the places that the mask chooses, as ascending flat indices of the canonical weight, (k,), on the CPU.

        With `random_mask` they are `random_places` by the seed, without a look at the weight. A `mask_fn` of the user's
        gets the base layer with merged adapters removed for the call, and r.

        Raises:
            ConfigError: there is no mask function, or its mask has another shape, or another number of ones than r ·
                (in + out).
        """
        cfg, layer = self.cfg, self.layer
        if cfg.mask_fn is None:
            raise ConfigError(
                f"Adapter '{self.name}' has no mask. Set `mask_fn` of the ShiraConfig, which has mask_type="
                f"{cfg.mask_type!r}, to a function (base_layer, r, **kwargs) → mask."
            )
        if cfg.mask_fn is random_mask:
            return random_places((self.site.out_features, self.site.fan_in), cfg.r, cfg.random_seed)
        with lift_merged(layer):
            mask = cfg.mask_fn(layer.base_layer, cfg.r)
        wanted = layer.op.uncanon(torch.empty(self.site.shape, device="meta")).shape
        if mask.shape != wanted:
            raise ConfigError(
                f"mask_fn returned a mask of shape {tuple(mask.shape)} for layer '{self.site.key}' with a weight of "
                f"shape {tuple(wanted)}. Return a mask of that shape."
            )
        places: Tensor = layer.op.canon(mask).flatten().nonzero().flatten()
        if len(places) != self.size:
            raise ConfigError(
                f"The mask for layer '{self.site.key}' has {len(places)} ones, and r · (in + out) = {self.size} are "
                "to train. Return that many."
            )
        return places.cpu()

    def delta(self) -> Scattered:
        """Return ΔW with s · v at the places, 0 elsewhere, as a `Scattered`."""
        rows, cols = self.shira_indices.long()
        return Scattered(self.shira_weight * self.scaling, rows * self.site.fan_in + cols, self.site.shape)

    def from_file_tensors(self, tensors: Tensors, cfg: ShiraConfig) -> Tensors:
        """Return the file's tensors with the places as int32, since some files hold floats; unchanged if it has none.

        Raises CheckpointError if they are outside of the weight.
        """
        return with_places(tensors, "shira_indices", self.site)


def with_places(tensors: Tensors, name: str, site: Site) -> Tensors:
    """Return a file's tensors with tensor `name` (2, k), the output and the input of each entry, as int32.

    Without it return them unchanged. A tensor of another shape is converted, too, but its values are not checked.

    Raises:
        CheckpointError: places are outside of the weight.
    """
    at = name, ""
    if at not in tensors:
        return tensors
    indices = tensors[at].to(torch.int32)
    most = torch.tensor([site.out_features, site.fan_in], device=indices.device)
    if indices.dim() == 2 and len(indices) == 2 and not ((indices >= 0) & (indices < most[:, None])).all():
        raise CheckpointError(f"{name} of layer '{site.key}' are outside of its weight. Load another file.")
    return tensors | {at: indices}
