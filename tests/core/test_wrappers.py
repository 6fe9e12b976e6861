# SPDX-License-Identifier: Apache-2.0
"""Names without the parts that wrappers put into them, and inputs that a wrapper's hook moves."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graft.core.wrappers import (
    HOOK,
    INNER_ATTRIBUTES,
    load_offloaded,
    move_inputs,
    strip_all_wrappers,
)
from graft.storage.parallel import strip_inner_wrappers


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


def test_only_tensors_on_the_meta_device_are_loaded():
    module, source = nn.BatchNorm1d(2), nn.Module()
    module.register_buffer("none", None)
    module.weight, module.running_var = nn.Parameter(module.weight.to("meta")), module.running_var.to("meta")
    bias, mean, offloaded = module.bias, module.running_mean, {"weight": torch.ones(2), "running_var": torch.zeros(2)}
    source.__dict__[HOOK] = SimpleNamespace(offload=True, weights_map=offloaded, execution_device="cpu")
    load_offloaded(module, source)
    assert module.bias is bias and module.running_mean is mean and module.none is None
    assert torch.equal(module.weight, offloaded["weight"]) and torch.equal(module.running_var, torch.zeros(2))
