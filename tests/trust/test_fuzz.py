# SPDX-License-Identifier: Apache-2.0
"""A sample of the fuzzer's cases (`make fuzz` runs more): each is right, or told, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from tests import fresh
from tests.covering import EVERYTHING
from tests.trust.damage import DAMAGES
from tests.trust.fuzz import GOOD, Outcome
from tests.trust.fuzz_files import KINDS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.graft_only

START, CASES = (0, 200) if EVERYTHING else (204, 44)  # the fewest that have all damages
FOLDERS = """
import json, sys
from tests.trust.fuzz import outcomes
print(json.dumps([vars(outcome) for outcome in outcomes(range(int(sys.argv[1])), int(sys.argv[2]), how="fork")]))
"""


def test_damaged_foreign_and_malicious_folders():
    done = fresh.run("-W", "ignore", "-c", FOLDERS, CASES, START, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [Outcome(**outcome) for outcome in json.loads(done.stdout)]
    bad = [outcome for outcome in found if outcome.kind not in GOOD]
    assert not bad, bad
    assert {o.kind for o in found} == set(GOOD), "neither all folders are refused, nor all loaded"
    assert set(DAMAGES) == {name for o in found for name in o.what.split(" ")[1].split("+")}


@pytest.mark.parametrize("first", [0, 2000] if EVERYTHING else [2000])
def test_damaged_and_forged_files(first):
    """Adapters of every format, files of trainings, runs, sweeps and merges: `make fuzz-files` has the others."""
    words = ("--kinds", "files", "--first", first, "--n", 2000 if EVERYTHING else 200)
    done = fresh.run("-W", "ignore", "-m", "tests.trust.fuzz", *words, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {kind: json.loads(found) for kind, found in re.findall(r"(?m)^(\w+): ({.*})$", done.stdout)}
    assert set(counts) == set(KINDS) and all(set(found) == set(GOOD) for found in counts.values())
