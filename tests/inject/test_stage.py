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


class Team:
    """Processes of which some have other bytes, as the last of them sees it."""

    def __init__(self, *differs):
        self.differs = differs

    def gather(self, checksum):
        return {rank: checksum + differs for rank, differs in enumerate(self.differs)}


def test_processes_with_other_values_are_named():
    data = torch.arange(4, dtype=torch.uint8)
    for equal in ([False], [False] * 3):
        stage.check_equal_data(data, "a", Team(*equal))
    with pytest.raises(CheckpointError, match=r"'a' has other values on rank\(s\) \[1, 3\] than on rank 0"):
        stage.check_equal_data(data, "a", Team(False, True, False, True))
