# SPDX-License-Identifier: Apache-2.0
"""Stages of a pipeline: the checks of `pipeline.py`, in two processes that start once."""

import pytest

from tests.distributed.pipeline import CONFIGS
from tests.distributed.processes import run

NAMES = [*(f"trains {name}" for name in CONFIGS), "trains LORA Identity", "trains LORA None", "refusals"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run("tests.distributed.pipeline", tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize("name", NAMES)
def test_stages_together_are_one_model(name, found):
    assert found.get(name, found.get("end", "not reached")) == ""


def test_the_processes_end(found):
    assert "end" not in found, found["end"]
