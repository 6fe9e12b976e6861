# SPDX-License-Identifier: Apache-2.0
"""Every method on a device, in every way to get it there: equal to the CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from tests.conformance.samples import ADAPTERS, CALLED_CELLS, CELLS, Cell, Net
from tests.covering import Case, Sometimes, law
from tests.models import disturb

DEVICE = torch.device(os.environ.get("GRAFT_TESTS_DEVICE") or "cuda", 0)
pytestmark = pytest.mark.filterwarnings("ignore")  # what is warned of is tested elsewhere, on the CPU
NAMES = ["other", "__base__", "default", "other", "default"]  # a mixed batch


@contextlib.contextmanager
def default(device: torch.device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


# ways to a model whose adapters do something


def made(cell: Cell, device: torch.device, folder) -> nn.Module:
    return disturb(cell.fresh(ADAPTERS, base=cell.base().to(device)))


def moved(cell, device, folder):
    return cell.trained(ADAPTERS).to(device)


def made_by_default(cell, device, folder):
    base = cell.base().to(device)
    with default(device):
        model = cell.fresh(ADAPTERS, base=base)
    return disturb(model)


def made_within(cell, device, folder):
    base = cell.base().to(device)
    with device:
        model = cell.fresh(ADAPTERS, base=base)
    return disturb(model)


def on_cpu_by_default(cell, device, folder):
    base = cell.base()
    with device:
        model = cell.fresh(ADAPTERS, base=base)
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    return disturb(model).to(device)


def loaded(cell, device, folder, **options):
    """From the CPU's files."""
    moved(cell, "cpu", None).save_pretrained(folder)
    base = cell.base().to(device)
    model = graft.PeftModel.from_pretrained(base, folder, is_trainable=True, **options)
    model.load_adapter(folder / "other", "other", **options)
    return cell.sample.called(model)


def loaded_there(cell, device, folder):
    return loaded(cell, device, folder, torch_device=str(device))


def loaded_light(cell, device, folder):
    return loaded(cell, device, folder, low_cpu_mem_usage=True)


def loaded_from_it(cell, device, folder):
    """Made and saved on the device, loaded on the CPU."""
    made(cell, device, None).save_pretrained(folder)
    model = graft.PeftModel.from_pretrained(cell.base(), folder, is_trainable=True)
    model.load_adapter(folder / "other", "other")
    return cell.sample.called(model)


def put_in(cell, device, folder):
    """Tensors of the CPU, put into adapters that are there."""
    there, model = cell.trained(ADAPTERS), cell.fresh(ADAPTERS, base=cell.base().to(device))
    for name in ADAPTERS:
        graft.set_peft_model_state_dict(model, graft.get_peft_model_state_dict(there, adapter_name=name), name)
    return model


WAYS = [
    made,
    moved,
    made_by_default,
    made_within,
    on_cpu_by_default,
    loaded,
    loaded_there,
    loaded_light,
    loaded_from_it,
    put_in,
]
ACT_BY_DEFAULT = (made_by_default, loaded_from_it)  # with the device as the default for what is done, too


# what is done with it; each returns what must be equal


def forward(cell, model, x):
    yield model(x)
    model.set_adapter("other")
    yield model(x)
    with model.disable_adapter():
        yield model(x)
    model.delete_adapter("other")
    model.set_adapter("default")
    yield model(x)


def together(cell, model, x):
    if cell.sample.together:
        model.base_model.set_adapter(list(ADAPTERS))
        yield model(x)


def tensors(cell, model, x):
    for name in ADAPTERS:
        yield from graft.get_peft_model_state_dict(model, adapter_name=name).values()


def train(cell, model, x):
    model.train(not cell.sample.draws)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    yield from (p for p in model.parameters() if p.requires_grad)


def recompute(cell, model, x):
    model.train(not cell.sample.draws)
    for reentrant in (False, True):
        y = checkpoint(model, x if cell.layer.ids else x.clone().requires_grad_(), use_reentrant=reentrant)
        if y.requires_grad:
            y.square().mean().backward()
        yield from (p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)
        model.zero_grad()


def merge(cell, model, x):
    if cell.unmergeable is None:
        model.merge_adapter()
        yield model(x)
        model.unmerge_adapter()
        yield model(x)
        yield model.merge_and_unload()(x)


def rows(cell, model, x):
    model.eval()
    yield model(x, adapter_names=NAMES)
    model.set_requires_grad(ADAPTERS)
    model.train(not cell.sample.draws)
    model(x, adapter_names=NAMES).square().mean().backward()
    yield from (p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)


def autocast(cell, model, x):
    model.train(not cell.sample.draws)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = model(x)
    yield y.float()
    y.float().square().mean().backward()
    yield from (p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)


ACTS = [forward, together, tensors, train, recompute, merge, rows, autocast]
TOLERANCE = {autocast: 0.05}

FITTING = [cell for cell in CELLS + CALLED_CELLS if cell.layer.name != "norm" or cell.sample.method == "LN_TUNING"]


class Way(Case):
    def __str__(self) -> str:
        cell, way, act = self
        return f"{cell}-{way.__name__}-{act.__name__}"


CASES = [Way((cell, way, act)) for cell in FITTING for way in WAYS for act in ACTS]


def features(case: Way) -> list:
    cell, way, act = case
    sample = str(cell.sample)
    return [
        ("way", way.__name__, act.__name__),
        ("sample", sample, way.__name__),
        Sometimes(("sample", sample, act.__name__), 2),
        ("layer", cell.layer.name, way.__name__),
        ("store", cell.store.name, act.__name__),
    ]


_HERE: dict = {}


def here(cell: Cell, act: Callable) -> list[torch.Tensor]:
    """What it is on the CPU, computed once."""
    if (cell, act) not in _HERE:
        model = made(cell, torch.device("cpu"), None)
        _HERE[cell, act] = [t.detach().clone() for t in act(cell, model, cell.inputs())]
    return _HERE[cell, act]


@law("case", CASES, features)
def test_a_device_computes_what_the_cpu_computes(case, tmp_path):
    cell, way, act = case
    model = way(cell, DEVICE, tmp_path)
    device = torch.device("cpu") if way is loaded_from_it else DEVICE
    assert {t.device.type for t in model.state_dict().values()} == {device.type}
    with DEVICE if way in ACT_BY_DEFAULT else contextlib.nullcontext():
        got = list(act(cell, model, cell.inputs().to(device)))
    wanted = here(cell, act)
    assert len(got) == len(wanted)
    tolerance = TOLERANCE.get(act, max(cell.store.tolerance, 1e-5))
    for ours, theirs in zip(got, wanted):
        assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


def test_layers_are_away_from_the_cpu():
    net = Net(nn.Linear(3, 3), False).to(DEVICE)
    assert {p.device for p in net.parameters()} == {DEVICE}
