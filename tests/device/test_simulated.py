# SPDX-License-Identifier: Apache-2.0
"""The simulated device behaves as a real one where the tests rest on it."""

import threading

import pytest
import torch
from torch import nn

from tests.device.simulated import WAITS, WHY_NOT, Waits


def test_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, 2, device="cuda") @ torch.ones(2, 2)


def test_views_writes_and_gradients_are_the_tensors_own():
    layer = nn.Linear(3, 2).to("cuda")
    layer.weight.data[0].zero_()
    y = layer(torch.ones(4, 3, device="cuda"))
    y.sum().backward()
    assert y.device.type == "cuda" and layer.weight[0].cpu().eq(0).all()
    assert torch.equal(layer.weight.grad.cpu(), torch.full((2, 3), 4.0))


def test_a_seed_gives_other_numbers_than_on_the_cpu():
    torch.manual_seed(0)
    assert not torch.equal(torch.randn(5, device="cuda").cpu(), torch.randn(5))


def test_backward_runs_in_a_thread_of_the_device():
    seen = []
    x = torch.ones(2, device="cuda", requires_grad=True)
    x.register_hook(lambda g: seen.append(threading.current_thread()))
    (x * 2).sum().backward()
    assert seen != [threading.current_thread()]


@pytest.mark.skipif(WHY_NOT is not None, reason="a real device tells nobody")
@pytest.mark.parametrize("act", [lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.cpu(), torch.nonzero])
def test_waits_are_noted_with_their_function(act):
    waits, t = WAITS, torch.ones(3, device="cuda")
    before, waits.root = dict(waits.found), __file__.rpartition("/")[0] + "/"
    try:
        with waits.watch("acting"):
            act(t)
    finally:
        waits.root, found = Waits().root, {k: n for k, n in waits.found.items() if n != before.get(k)}
        for k in found:
            del waits.found[k]
    assert found and all(what == "acting" and place.startswith("test_simulated.py:") for what, place in found)
