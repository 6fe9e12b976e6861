# SPDX-License-Identifier: Apache-2.0
"""An update that is a transform of few coefficients, at places that a seed draws: the base of FourierFT and WaveFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from graft.config.fields import COUNT, FanInFanOut, LayerRange, Targeted
from graft.core.containers import Transient
from graft.core.errors import ConfigError
from graft.core.method import Method
from graft.kernels.eager import watched


@dataclass(kw_only=True)
class SpectralConfig(Targeted, LayerRange, FanInFanOut):
    """The fields of FourierFT and WaveFT."""

    n_frequency: Annotated[int, COUNT]
    random_loc_seed: int | None = 777  # of the places, which no file holds; so there has to be one
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)  # n by layer name or regex

    patterns = {"n_frequency_pattern": "n_frequency"}
    counters = ("random_loc_seed",)

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError if `random_loc_seed` is None: no file holds the places."""
        super().__post_init__()
        if self.random_loc_seed is None:
            raise ConfigError("`random_loc_seed` must be a number: nothing else says where the coefficients stand.")


S = TypeVar("S", bound=SpectralConfig)


class Spectral(Method[S]):
    """The base of FourierFT and WaveFT: ΔW is a transform of a matrix that is zero but at n places."""

    shown: ClassVar[tuple[str, ...]] = ("n_frequency", "scaling", "random_loc_seed")  # facts, with the prefix in front
    places: ClassVar[str] = ""  # name of the container of the places

    def transform(self) -> Any:
        """Return ΔW, not formed yet; `times(x)` is its product with vectors.

        A subclass overrides it: here NotImplementedError.
        """
        raise NotImplementedError

    def check(self) -> str | None:
        """Return the reason of `Method.check`, or, only if that is None, that `n_frequency` is above out · fan_in."""
        n, most = self.cfg.n_frequency, self.site.out_features * self.site.fan_in
        too_many = (
            "`n_frequency` should be less than or equal to the product of the input and output dimensions but the "
            f"value passed is {n} and the product is {most}"
        )
        return super().check() or (too_many if n > most else None)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the places of the coefficients, (2, n), drawn from `random_loc_seed`, as a `Transient` that no file
        holds; and the config's values in `shown`, each with the method's prefix.
        """
        cfg, site = self.cfg, self.site
        assert cfg.random_loc_seed is not None
        places = Transient(draw_places(site.out_features, site.fan_in, cfg.n_frequency, cfg.random_loc_seed))
        return {self.places: places} | {f"{self.prefix}{name}": getattr(cfg, name) for name in self.shown}

    def delta(self) -> Any:
        """Return ΔW, not formed yet (`transform`)."""
        return self.transform()

    def branch(self, x: Tensor) -> Tensor:
        """Return ΔW x, (…, out), by the transform's own product, in at least float32."""
        return self.transform().times(x)


def draw_places(out: int, fan_in: int, n: int, seed: int) -> Tensor:
    """Return n places in a matrix (out, fan_in) as row and column indices, (2, n): the first of a random order of all,
    drawn on the CPU from `seed`. An n above their number gives all, without an error.

    The last 16 results are cached, and shared between layers: the caller must not write into them; under a dispatch
    mode nothing is cached.
    """
    if watched():  # a dispatch mode may give tensors without values
        return _draw_places.__wrapped__(out, fan_in, n, seed)
    with torch.inference_mode(False):  # layers that train may get the same tensor
        return _draw_places(out, fan_in, n, seed)


@lru_cache(maxsize=16)
def _draw_places(out: int, fan_in: int, n: int, seed: int) -> Tensor:
    """Return n different places of a matrix (out, fan_in) as rows and columns, (2, n): the first of a random
    permutation of all, drawn on the CPU with `seed`.

    The last 16 results are kept and returned again.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(out * fan_in, generator=generator, device="cpu")[:n]
    return torch.stack((order // fan_in, order % fan_in))
