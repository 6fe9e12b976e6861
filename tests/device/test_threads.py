# SPDX-License-Identifier: Apache-2.0
"""Requests of several threads on a device: autograd runs layers again in the device's thread, which is in no call."""

import threading
from functools import partial

import torch

from tests.looks import get_registry
from tests.model.test_requests import NAMES, X, two_adapters
from tests.threads import at_once

ORDERS = [NAMES, NAMES[::-1], ["bob"] * 6, None]


def trained():
    return two_adapters(checkpoints=True).train().to("cuda")


def gradient(model, names):
    x = X.to("cuda").requires_grad_()
    y = model(x) if names is None else model(x, adapter_names=names)
    return torch.autograd.grad(y.square().sum(), x)[0]


def test_layers_run_again_in_the_thread_of_the_device_with_the_rows_of_their_request():
    model, threads = trained(), set()
    expected, wrong = [gradient(model, names) for names in ORDERS], []
    handle = model.base_model.model.second.register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    gradient(model, NAMES)
    handle.remove()
    assert len(threads) == 2, "that of the call and that of the device"

    def work(i):
        wrong.extend(i for _ in range(10) if not torch.equal(gradient(model, ORDERS[i]), expected[i]))

    at_once(*(partial(work, i) for i in range(4)))
    assert not wrong and not get_registry(model).call.open


def test_a_backward_pass_does_not_wait_for_a_change():
    model = trained()
    model.change_timeout = 5
    x = X.to("cuda").requires_grad_()
    loss = model(x, adapter_names=NAMES).square().sum()
    with get_registry(model).call.gate.change("a change"):
        loss.backward()
    assert x.grad.abs().sum() > 0
