# SPDX-License-Identifier: Apache-2.0
"""Bounds that the annotations of configs hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

import graft
from graft.config.base import is_typed, type_hints
from graft.config.bounds import bounds_of, one_of
from graft.config.fields import POSITIVE, Targeted
from graft.methods import ROWS
from tests.raised import refuses

NEEDED = {"AdaLoraConfig": dict(total_step=100), "CPTConfig": dict(task_type="CAUSAL_LM")}
CONFIGS = [getattr(graft, row.config) for row in ROWS.values()]
WITHIN = [graft.KasaConfig, graft.ArrowConfig, graft.BdLoraConfig, graft.EvaConfig, graft.LoftQConfig]
CASES = [(cls, name) for cls in (*CONFIGS, *WITHIN) for name in bounds_of(cls)]


@pytest.mark.parametrize(("cls", "name"), CASES, ids=lambda part: getattr(part, "__name__", part))
@pytest.mark.filterwarnings("ignore")  # of options that these values make pointless
def test_each_bound_is_checked(cls, name):
    bound, values = bounds_of(cls)[name], NEEDED.get(cls.__name__, {})
    typed = [
        value for value in (-1, 0, 1, 2000, "x", True, {"x": 1}, [(0, 1)]) if is_typed(value, type_hints(cls)[name])
    ]
    wrong = [value for value in typed if not bound.allows(value)]
    assert wrong
    for value in wrong:
        with pytest.raises(graft.ConfigError) as caught:
            cls(**{**values, name: value})
        text = str(caught.value)  # of dropouts it may be that of a probability
        assert text == bound.text.format(name=name, value=value, where="") or text.startswith(f"`{name}`")


@dataclass(kw_only=True)
class BoundedConfig(Targeted):
    width: Annotated[int, POSITIVE] = 8
    side: Annotated[str | None, one_of("left", "right")] = None
    width_pattern: dict[str, int] | None = None
    patterns = {"width_pattern": "width"}


@dataclass(kw_only=True)
class NarrowConfig(BoundedConfig):
    width: int = 2


@pytest.mark.parametrize("cls", [BoundedConfig, NarrowConfig])
def test_a_subclass_with_another_default_keeps_the_bound(cls):
    refuses(graft.ConfigError, r"^`width` must be positive, got 0\.$", cls, width=0)


def test_overrides_by_layer_have_the_bound_of_their_field():
    with pytest.raises(graft.ConfigError, match=r"^`width` must be positive, got -3 in width_pattern\['fc'\]\.$"):
        BoundedConfig(width_pattern={"mlp": 4, "fc": -3})


def test_none_and_known_names_are_allowed():
    assert BoundedConfig().side is None
    assert BoundedConfig(side="left").side == "left"
    refuses(graft.ConfigError, r"^`side` must be one of 'left', 'right', got 'up'\.$", BoundedConfig, side="up")


def test_errors_of_types_name_the_type_without_its_bound():
    refuses(graft.ConfigTypeError, r"BoundedConfig\.width must be int, got 'x' of type str", BoundedConfig, width="x")
    refuses(graft.ConfigTypeError, r"BoundedConfig\.side must be str \| None, got 3 of type int", BoundedConfig, side=3)
