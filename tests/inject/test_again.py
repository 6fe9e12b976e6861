# SPDX-License-Identifier: Apache-2.0
"""One module that stands in several places of a model is adapted in all of them."""

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.serving import AdapterSlots
from tests.models import seeded

X = torch.linspace(-1, 1, 12).view(3, 4)
CONFIGS = {
    "LORA": dict(target_modules=["fc"]),
    "HRA": dict(target_modules=["fc"]),
    "of a parameter": dict(target_parameters=["fc.weight"]),
    "beside": dict(target_modules=["last"], modules_to_save=["fc"]),
}


class Again(nn.Module):
    """Calls `fc` by its other names only."""

    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.net = nn.Sequential(self.fc, nn.Tanh(), self.fc)

    def forward(self, x):
        return self.last(self.net(x))


def base():
    with seeded(0):
        return Again()


def places(model):
    return model.fc, model.net[0], model.net[2]


def with_adapter(case, net=None, lib=graft):
    config = (lib.HRAConfig if case == "HRA" else lib.LoraConfig)(r=2, **CONFIGS[case])
    model = lib.get_peft_model(net or base(), config)
    with seeded(1), torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape)
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_forward_is_merged_and_all_is_as_before_afterwards(case):
    net = base()
    plain = net(X)
    model = with_adapter(case, net)
    y = model(X)
    assert len(set(places(net))) == 1 and not torch.equal(y, plain)
    with model.disable_adapter():
        assert torch.equal(model(X), plain)
    y.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert_close(model(X), y)
    model.unmerge_adapter()
    assert_close(model(X), y)
    plain = model.merge_and_unload()
    assert plain is net and len(set(places(net))) == 1 and isinstance(net.fc, nn.Linear)
    assert_close(net(X), y)


def test_a_place_that_is_left_and_taken_again():
    net = base()
    model = with_adapter("LORA", net)
    y = model(X)
    model.delete_adapter("default")
    model.add_adapter("default", graft.LoraConfig(r=2, target_modules=["last"]))
    model.add_adapter("b", graft.LoraConfig(r=2, **CONFIGS["LORA"]))
    model.set_adapter("b")
    assert len(set(places(net))) == 1 and torch.equal(model(X), base()(X))
    with seeded(1):
        torch.nn.init.normal_(net.fc.lora_B["b"].weight)
    assert not torch.equal(model(X), base()(X)) and not torch.equal(model(X), y)
    assert torch.equal(model.unload()(X), base()(X)) and isinstance(net.net[2], nn.Linear)


def test_slots_stand_in_all_places(tmp_path):
    model = with_adapter("LORA")
    model.save_pretrained(tmp_path)
    net = base()
    fc, slots = net.fc, AdapterSlots(net, 1, 2, ["fc"])
    slots.load("a", str(tmp_path))
    with slots.using("a"):
        assert_close(net(X), model(X))
    assert slots.remove() is net and set(places(net)) == {fc}


@pytest.mark.differs("a module that stands in several places of the model, as the embedding of a T5 in transformers 4")
def test_peft_adapts_the_first_place():
    model = with_adapter("LORA", lib=peft)
    y = model(X)
    assert torch.equal(y, base()(X))
    assert not torch.allclose(model.merge_and_unload()(X), y)
