# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' 4 bits under FSDP2, in two processes that start once."""

import pytest

from tests.distributed.processes import run
from tests.packages.bnb_fsdp import CONFIGS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run("tests.packages.bnb_fsdp", tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_weights_in_parts(name, found):
    assert found.get(name, found.get("end", "not reached")) == ""
