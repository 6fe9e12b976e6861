# SPDX-License-Identifier: Apache-2.0
"""A sample of the fuzzer's cases (`make fuzz` runs more): each is right, or told, and nothing else."""

import itertools

import pytest

from tests.trust.damage import DAMAGES
from tests.trust.fuzz import GOOD, outcomes

pytestmark = pytest.mark.graft_only

CASES = 400
ONCE_BAD = (1203, 1337, 1416, 10173, 12756, 20132, 22875)  # cases that one version got wrong


def test_damaged_foreign_and_malicious_folders():
    found = list(outcomes(itertools.chain(range(CASES), ONCE_BAD), start=0))
    bad = [outcome for outcome in found if outcome.kind not in GOOD]
    assert not bad, bad
    assert {o.kind for o in found} == set(GOOD), "neither all folders are refused, nor all loaded"
    assert set(DAMAGES) == {name for o in found for name in o.what.split(" ")[1].split("+")}
