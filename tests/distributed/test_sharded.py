# SPDX-License-Identifier: Apache-2.0
"""Bases in parts: the checks of `sharded.py`, in two processes that start once."""

import pytest

from tests.distributed.processes import run
from tests.distributed.sharded import PROMPTS, STACKS, WHOLE
from tests.leaves_out import FSDP2_ON_CPUS

pytestmark = FSDP2_ON_CPUS
NAMES = [*(f"trains {name}" for name in PROMPTS), "trains layers beside units", "refuses experts"]
NAMES += [check.__name__.replace("_", " ") for check in WHOLE]
NAMES += [f"experts {name}" for name in STACKS]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run("tests.distributed.sharded", tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", NAMES)
def test_a_base_in_parts(name, found):
    assert found.get(name, found.get("end", "not reached")) == ""


def test_the_processes_end(found):
    assert "end" not in found, found["end"]
