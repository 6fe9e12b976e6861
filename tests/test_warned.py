# SPDX-License-Identifier: Apache-2.0
"""The list of warnings that tests call forth names tests that there are, and pytest makes the others errors."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

import graft
from tests import models
from tests.warned import WARNED

TESTS = Path(__file__).parent


@pytest.mark.parametrize("known", WARNED, ids=lambda known: known.says)
def test_every_place_is_there(known):
    re.compile(known.says)
    for place in known.where.split():
        file, _, name = place.partition("::")
        assert (TESTS / file).exists(), place
        assert not name or f"def {name}(" in (TESTS / file).read_text(), place


@pytest.mark.graft_only
def test_a_warning_of_graft_is_an_error():
    with pytest.raises(UserWarning, match="fan_in_fan_out is set to False"):
        graft.get_peft_model(models.make("conv1D"), graft.LoraConfig(target_modules=["c_fc"]))


def test_the_oracle_may_warn():
    scope = {"__name__": "peft.tuners.lora.layer", "warnings": warnings}
    exec("warnings.warn('PEFT says something')", scope)
    scope["__name__"] = "graft.core.layer"
    with pytest.raises(UserWarning, match="graft says something"):
        exec("warnings.warn('graft says something')", scope)
