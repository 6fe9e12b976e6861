# SPDX-License-Identifier: Apache-2.0
"""The comparison sees every kind of difference."""

import pytest
import torch

from tests.clients.pair import compare

FOUND = {"losses": [1.0, 2.0], "files": {"a": torch.ones(2), "b": "a file"}, "names": ["x"], "n": 3}
OTHERS = {
    "losses: [1] ": {**FOUND, "losses": [1.0, 2.001]},
    "losses: [": {**FOUND, "losses": [1.0]},
    "files: a: Tensor": {**FOUND, "files": {**FOUND["files"], "a": torch.ones(2) * 1.001}},
    "files: a: The values for attribute 'shape'": {**FOUND, "files": {**FOUND["files"], "a": torch.ones(3)}},
    "files: a: The values for attribute 'dtype'": {**FOUND, "files": {**FOUND["files"], "a": torch.ones(2).half()}},
    "files: b: only with PEFT": {**FOUND, "files": {"a": torch.ones(2)}},
    "more: only with graft": {**FOUND, "more": 1},
    "names: [0] 'y' with graft, 'x' with PEFT": {**FOUND, "names": ["y"]},
    "n: 3.0 with graft, 3 with PEFT": {**FOUND, "n": 3.0},
}


def test_equal():
    assert not list(compare({**FOUND, "losses": [1.0 + 1e-7, 2.0]}, FOUND, 1e-5))


@pytest.mark.parametrize("text", OTHERS)
def test_a_difference(text):
    (line,) = compare(OTHERS[text], FOUND, 1e-5)
    assert line.startswith(text)


def test_nan_is_a_difference():
    assert list(compare({"loss": float("nan")}, {"loss": float("nan")}, 1e-5))
