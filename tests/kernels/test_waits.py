# SPDX-License-Identifier: Apache-2.0
"""Checks of values and numbers of the host, on a CPU: tests/device/test_waits.py counts waits for a device."""

import pytest
import torch

from graft.kernels import waits
from tests.leaves_out import WHOLE_GRAPHS
from tests.prompts import samples as prompts
from tests.raised import refuses


def whole(call):
    torch._dynamo.reset()
    return torch.compile(call, backend="eager", fullgraph=True)


@WHOLE_GRAPHS
def test_a_check_of_values_does_not_break_a_graph():
    def checked(x):
        waits.raise_unless((x > 0).all(), lambda: ValueError("no"), "all must be positive")
        return x + 1

    assert torch.equal(whole(checked)(torch.ones(2)), torch.full((2,), 2.0))
    refuses(RuntimeError, "all must be positive", whole(checked), torch.zeros(2))
    refuses(ValueError, "no", checked, torch.zeros(2))


@WHOLE_GRAPHS
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [pytest.param("MULTITASK_PROMPT_TUNING", marks=pytest.mark.slow), "CPT"])
def test_prompts_that_check_values_compile_as_one_graph(method):
    sample = prompts.first(method)
    model, given = prompts.adapt(prompts.LIBS[0], sample).eval(), prompts.batch(sample)
    if method == "CPT":
        given["input_type_mask"] = torch.full_like(given["input_ids"], 4)
    assert torch.equal(whole(lambda: model(**given).loss)(), model(**given).loss)


def test_sizes_of_groups_are_read_once_while_they_stay():
    ends = torch.tensor([1, 1, 4], dtype=torch.int32)
    first = waits.differences(ends, 4)
    assert first == [1, 0, 3] and waits.differences(ends, 4) is first
    ends[0] = 0
    assert waits.differences(ends, 4) == [0, 1, 3]
    assert waits.differences(torch.tensor([2, 3]), 3) == [2, 1]
    assert waits.differences(torch.empty(3, device="meta"), 7) == [3, 2, 2]  # nobody knows: even
