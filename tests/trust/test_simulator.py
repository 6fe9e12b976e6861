# SPDX-License-Identifier: Apache-2.0
"""Lives of adapters: any sequence of calls computes what a dense reference does. `make simulate` has more of them."""

import os

import pytest

from tests.covering import EVERYTHING
from tests.trust import simulator
from tests.trust.dense import CONTAINERS
from tests.trust.simulator import STEPS, WEIGHTS, Life, fate, report_of

pytestmark = [pytest.mark.graft_only, pytest.mark.filterwarnings("ignore")]
GROUPS, LIVES = 16, 200 if EVERYTHING else 16  # lives of a group


@pytest.mark.parametrize("group", range(GROUPS))
def test_lives(group):
    first = 10**6 * int(os.environ.get("GRAFT_TESTS_SEED", "0")) + group * LIVES
    for seed in range(first, first + LIVES):
        error, life = fate(seed, range(STEPS))
        assert error is None, report_of(seed, error, life)


def test_every_step_and_every_method_is_drawn(tmp_path):
    lives = [Life(seed, tmp_path) for seed in range(40)]
    assert {life.kind for life in lives} == {*CONTAINERS, None}
    drawn = {simulator.draw_step(seed, number)[0] for seed in range(GROUPS) for number in range(STEPS)}
    assert drawn == {*WEIGHTS}


def test_a_failure_is_shown_in_few_steps_that_replay(monkeypatch):
    """A model that forgets to unmerge: the report names the steps that show it."""

    def forget(self, dice):
        self.reference.merged = {}

    monkeypatch.setattr(Life, "unmerge", forget)
    seed = next(seed for seed in range(100) if fate(seed, range(STEPS))[0] is not None)
    report = report_of(seed, *fate(seed, range(STEPS)))
    told, *story = report.splitlines()
    steps = [int(number) for number in told.rsplit("--steps ", 1)[1].split(",")]
    assert f"--seed {seed} " in told and len(steps) < 10
    assert isinstance(fate(seed, steps)[0], AssertionError)
    assert [line.split()[1] for line in story[: len(steps)]][-1] == "unmerge" and "merge" in report
    monkeypatch.undo()
    assert fate(seed, steps)[0] is None
