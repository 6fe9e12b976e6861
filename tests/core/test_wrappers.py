# SPDX-License-Identifier: Apache-2.0
"""Names without the parts that wrappers put into them, and inputs that a wrapper's hook moves."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graft.core.wrappers import HOOK, INNER_ATTRIBUTES, move_inputs, strip_all_wrappers, strip_inner_wrappers


@pytest.mark.parametrize("part", INNER_ATTRIBUTES)
def test_names_lose_the_part_of_every_wrapper(part):
    for name in (f"{part}.a.b", f"a.{part}.b", f"a.{part}.{part}.b"):
        assert strip_inner_wrappers(name) == strip_all_wrappers(name) == name.replace(f"{part}.", "")
    assert strip_inner_wrappers(f"my{part}.a") == f"my{part}.a"


@pytest.mark.parametrize("skip, moved", [(None, {"x", "cache"}), (["cache"], {"x"}), ("cache", {"x"})])
def test_inputs_under_skipped_keys_stay_on_their_device(skip, moved):
    module, t = nn.Linear(2, 2), torch.zeros(2)
    module.__dict__[HOOK] = SimpleNamespace(io_same_device=False, execution_device="meta", skip_keys=skip)
    args, kwargs, back = move_inputs(module, (t,), {"x": t, "cache": t})
    assert args[0].is_meta and back is None
    assert {key for key, value in kwargs.items() if value.is_meta} == moved
