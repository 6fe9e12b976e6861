# SPDX-License-Identifier: Apache-2.0
"""Tensors that never train, drawn once from a seed for all layers of a model and all adapters of a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, FanInFanOut, LayerRange, Targets
from graft.core.containers import Transient
from graft.core.errors import CheckpointError, ConfigError, warn
from graft.core.method import AdaptedLayers, Method, Tensors
from graft.core.site import Site

DRAWN = ("projection_prng_key", "save_projection", "r")  # in these, adapters that share matrices agree


@dataclass(kw_only=True)
class DrawnConfig(Targets, LayerRange, FanInFanOut):
    """The fields of a method that draws tensors for all layers from a seed."""

    projection_prng_key: int = 0  # the seed
    save_projection: bool = True  # put the tensors into files, too, which then do not depend on the generator

    matrices: ClassVar[str]  # the names of the tensors
    counters: ClassVar[tuple[str, ...]] = ("projection_prng_key",)

    def __post_init__(self) -> None:
        """Validate the fields; warn if `save_projection` is False, so that a load draws the tensors again."""
        super().__post_init__()
        if not self.save_projection:
            warn(
                f"Specified to not save {self.matrices}: they are drawn again from `projection_prng_key` on load, "
                "which gives the same values only if torch's generator is the same."
            )


@dataclass(kw_only=True)
class ProjectionConfig(DrawnConfig):
    """The fields of a method that shares random matrices A and B between layers."""

    r: Annotated[int, COUNT]


def maybe_transient(tensor: Tensor, saved: bool) -> Tensor | Transient:
    """Return the tensor itself if `saved`: checkpoints hold it.

    Else return `Transient(tensor)`, which no checkpoint holds.
    """
    return tensor if saved else Transient(tensor)


def indivisible(site: Site, part: int, text: str, names: Sequence[str] = ("in_features", "out_features")) -> str | None:
    """Return the reason why a layer's widths do not fit blocks of `part` values, or None if `part` divides both.

    Checked in order: fan_in, out_features. The reason is `text`, with {name} and {size} of the first width that `part`
    does not divide; `names` are their two names.
    """
    sizes = zip(names, (site.fan_in, site.out_features))
    return next((text.format(name=name, size=size) for name, size in sizes if size % part), None)


def check_wide(name: str, size: int, needed: int) -> None:
    """Raise ConfigError if `size`, a width of projections that an earlier adapter drew, is below the `needed` one."""
    if size < needed:
        raise ConfigError(
            f"{name} has a size of {size} but {needed} or greater is required; add the adapter with the widest layers "
            "first."
        )


def check_places(tensors: Tensors, name: str, most: int, key: str) -> Tensors:
    """Return a file's tensors as they are.

    Raises CheckpointError if the tensor (`name`, "") is there and has an index below 0 or not below `most`.

    An index past the end would stop a GPU for good in the first call; a negative one would count from the end.
    """
    places = tensors.get((name, ""))
    if places is not None and not ((places >= 0) & (places < most)).all():
        raise CheckpointError(f"{name} of layer '{key}' are outside of 0 to {most - 1}. Load another file.")
    return tensors


P = TypeVar("P", bound=ProjectionConfig)


class Projected(Method[P]):
    """The base of VeRA and PVeRA: vectors λ_d and λ_b train, and scale random matrices A and B that all layers share.

    The containers are called `<prefix>d`, `<prefix>b`, and A and B `<method>_A` and `<method>_B`.
    """

    agreeing_fields = DRAWN
    multiple: ClassVar[int] = 1  # rows of A, and numbers of λ_d, are so many times r

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Return the shared random matrices: A (multiple · r, widest in) and B (widest out, r), `Transient` unless
        `save_projection`.

        If another adapter shares them already, return that one's; ConfigError if they are too small. Else draw both, A
        first, from one CPU generator with the seed `projection_prng_key`, uniform within ±√(6 / columns). On the meta
        device nothing is drawn.
        """
        cfg, wide_in, wide_out = layers.cfg, layers.max_fan_in, layers.max_out_features
        names = [f"{cls.prefix.removesuffix('lambda_')}{x}" for x in "AB"]
        if layers.existing and layers.other_configs:
            A, B = (layers.existing[name][next(iter(layers.other_configs))] for name in names)
            check_wide(names[0], A.shape[1], wide_in)
            check_wide(names[1], B.shape[0], wide_out)
        else:
            generator = torch.Generator("cpu").manual_seed(cfg.projection_prng_key)
            A, B = torch.empty(cls.multiple * cfg.r, wide_in), torch.empty(wide_out, cfg.r)
            for matrix in (A, B):  # kaiming uniform: the bound follows from the number of inputs
                bound = math.sqrt(6 / matrix.shape[1])
                if not matrix.is_meta:
                    matrix.uniform_(-bound, bound, generator=generator)
        return {name: maybe_transient(matrix, cfg.save_projection) for name, matrix in zip(names, (A, B))}

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the shared matrices, and trained λ_b (out,) of ones and λ_d (multiple · r,) of normal values.

        Floating-point tensors are made on the default device, in the default dtype.
        """
        b, d = torch.ones(self.site.out_features), torch.randn(self.multiple * self.cfg.r)
        return shared | {f"{self.prefix}b": nn.Parameter(b), f"{self.prefix}d": nn.Parameter(d)}

    def init_values(self) -> None:
        """Fill λ_d with `d_initial` and λ_b with zeros.

        With `init_weights=False` keep the values of `build`: normal and ones.
        """
        if self.cfg.init_weights:  # type: ignore[attr-defined]
            nn.init.constant_(getattr(self, f"{self.prefix}d"), self.cfg.d_initial)  # type: ignore[attr-defined]
            nn.init.zeros_(getattr(self, f"{self.prefix}b"))
