# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel models of transformers: the checks of `tensor_parallel.py`, in two processes that start once."""

import pytest

from tests.distributed.processes import run
from tests.distributed.tensor_parallel import ALL_LAWS, MODELS, NAMED, TRIED

OTHERS = ("two methods", "several adapters", "refusals", "differences")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run("tests.distributed.tensor_parallel", tmp_path_factory.mktemp("tensor_parallel"))


@pytest.mark.parametrize("style", TRIED)
def test_a_layer_in_pieces_is_the_layer(style, found):
    checked = {name.removeprefix(f"{style} "): text for name, text in found.items() if name.startswith(f"{style} ")}
    assert checked.keys() >= set(NAMED) and (len(checked) > len(NAMED)) == ALL_LAWS, found.get("end")
    assert not {name: text for name, text in checked.items() if text}


@pytest.mark.parametrize("name", [*(f"model {name}" for name in MODELS), *OTHERS])
def test_a_model_in_pieces_is_the_model(name, found):
    assert found.get(name, found.get("end", "not reached")) == ""


def test_the_processes_end(found):
    assert "end" not in found, found["end"]
