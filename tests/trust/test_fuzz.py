# SPDX-License-Identifier: Apache-2.0
"""A sample of the fuzzer's cases (`make fuzz` runs more): each is right, or told, and nothing else."""

import pytest

from tests.covering import EVERYTHING
from tests.trust.damage import DAMAGES
from tests.trust.fuzz import GOOD, outcomes

pytestmark = pytest.mark.graft_only

START, CASES = (0, 200) if EVERYTHING else (204, 44)  # the fewest that have all damages


def test_damaged_foreign_and_malicious_folders():
    found = list(outcomes(range(CASES), START))
    bad = [outcome for outcome in found if outcome.kind not in GOOD]
    assert not bad, bad
    assert {o.kind for o in found} == set(GOOD), "neither all folders are refused, nor all loaded"
    assert set(DAMAGES) == {name for o in found for name in o.what.split(" ")[1].split("+")}
