# SPDX-License-Identifier: Apache-2.0
"""The settings that a sweep tries, and their steps: grids, random draws, rungs of halving. Numbers only, no model."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any

from graft import ConfigError

Setting = dict[str, Any]


def list_settings(space: Mapping[str, Any], search: str, n: int | None, seed: int) -> list[Setting]:
    """Return the settings of a sweep, each a dict of name → value: a grid's in the order of `itertools.product`, random
    ones as drawn.

    Args:
        space: name → non-empty list of values. In a random search also a tuple (low, high) with 0 < low < high:
            logarithms are drawn uniformly, and ints are rounded.
        search: "grid", all combinations; "random", `n` different settings, drawn by `seed` in up to 100 n tries.
        n: None for a grid, else an int from 1 on.

    Raises:
        ConfigError: the space, the search or `n` is invalid, a grid has an `n`, or fewer than `n` different settings
            were drawn.
    """
    for name, values in space.items():
        is_range = isinstance(values, tuple) and len(values) == 2 and search == "random"
        if not is_range and not (isinstance(values, list) and values):
            raise ConfigError(
                f"sweep: '{name}' must be a list (for a random search also a range (low, high)), got {values!r}."
            )
        if is_range and not 0 < values[0] < values[1]:
            raise ConfigError(f"sweep: '{name}' must be a range of positive numbers, got {values}.")
    if search == "grid" and n is not None:
        raise ConfigError(f"sweep: n={n!r} belongs to search='random', and a grid has all settings. Leave n out.")
    if search == "grid":
        return [dict(zip(space, values)) for values in product(*space.values())]
    if search != "random" or type(n) is not int or n < 1:
        raise ConfigError(f"sweep: search must be 'grid', or 'random' with a number n, got {search!r} with n={n!r}.")
    generator, settings = random.Random(seed), list[Setting]()
    for _ in range(100 * n):
        setting = {name: draw_value(values, generator) for name, values in space.items()}
        if setting not in settings:
            settings.append(setting)
        if len(settings) == n:
            return settings
    raise ConfigError(f"sweep: the space has only {len(settings)} settings, and n is {n}. Pass a smaller n.")


def draw_value(values: Any, generator: random.Random) -> Any:
    """Return a random item of a list, or a number of a range (low, high), uniform in its logarithm and rounded if both
    ends are ints.
    """
    if isinstance(values, tuple):
        value = math.exp(generator.uniform(math.log(values[0]), math.log(values[1])))
        return round(value) if all(type(end) is int for end in values) else value
    return generator.choice(values)


def compute_rungs(steps: int, keep: float, rungs: int) -> list[int]:
    """Return the steps at the end of each rung, increasing: round(steps · keep^(rungs - 1 - i)).

    With `keep` 1 it is [steps], whatever `rungs` is.

    Raises:
        ConfigError: `steps` or `rungs` is no int from 1 on (True is none), or `keep` is not in (0, 1]. Also if the
            first rung has no step, or a rung no more steps than the one before.
    """
    if type(steps) is not int or steps < 1:
        raise ConfigError(f"sweep: steps must be a positive int, got {steps!r}.")
    if not (isinstance(keep, (int, float)) and 0 < keep <= 1) or type(rungs) is not int or rungs < 1:
        raise ConfigError(f"sweep: keep must be in (0, 1] and rungs a positive int, got {keep!r} and {rungs!r}.")
    ladder = [round(steps * keep ** (rungs - 1 - rung)) for rung in range(rungs)] if keep < 1 else [steps]
    if ladder[0] < 1 or any(a >= b for a, b in pairwise(ladder)):
        raise ConfigError(
            f"sweep: {steps} steps are too few for {rungs} rungs, with {1 / keep:g} times more in each. Pass more "
            "steps."
        )
    return ladder


def select_best(losses: Mapping[int, float], n: int) -> list[int]:
    """Return the `n` keys with the lowest losses, best first; of equal ones the lowest key.

    NaN counts as the highest loss.
    """
    return sorted(losses, key=lambda i: (math.isnan(losses[i]), losses[i], i))[:n]
