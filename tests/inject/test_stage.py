# SPDX-License-Identifier: Apache-2.0
"""Stages of a pipeline and equal processes, as one process sees them; tests/distributed has several."""

import pytest
import torch

from graft.core.errors import CheckpointError
from graft.inject import stage


def test_paths_below_absent_modules():
    absent = ["model.layers.1", "head"]
    paths = ["model.layers.1", "model.layers.1.fc", "head.weight", "model.layers.10", "model.layers", "header"]
    assert [stage.is_below(path, absent) for path in paths] == [True] * 3 + [False] * 3


def test_a_process_with_other_values_is_named(monkeypatch):
    others: list[bool] = []

    def all_gather_object(found, digest, group):
        found[:] = [digest, *(digest + 1 if differs else digest for differs in others)]

    monkeypatch.setattr(stage.dist, "get_world_size", lambda group: 1 + len(others))
    monkeypatch.setattr(stage.dist, "all_gather_object", all_gather_object)
    data = torch.arange(4, dtype=torch.uint8)
    for equal in ([], [False, False]):
        others[:] = equal
        stage.check_equal_data(data, "a", None)
    others[:] = [False, True]
    with pytest.raises(CheckpointError, match="'a' has other values on process 2"):
        stage.check_equal_data(data, "a", None)
