# SPDX-License-Identifier: Apache-2.0
"""ReLoRA's restart: the model computes what it did, the adapter and its moments begin again."""

import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.errors import UnsupportedLayerError
from graft.train import restart
from tests.models import seeded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv, self.last = nn.Embedding(7, 6), nn.Conv1d(6, 5, 3), nn.Linear(4, 3)

    def forward(self, ids):
        return self.last(self.conv(self.emb(ids).mT))


IDS = torch.arange(12).view(2, 6) % 7


def trained(steps=3, base=None, **options):
    with seeded(0):
        options = dict(r=2, target_modules=["emb", "conv", "last"]) | options
        model = graft.get_peft_model(base or Net(), graft.LoraConfig(**options))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).sin().sum().backward()
        optimizer.step()


def test_rounds_have_more_rank_than_the_adapter():
    model, optimizer = trained()
    with seeded(0):
        first = Net().last.weight.clone()
    for _ in range(2):
        before = model(IDS)
        restart(model, optimizer)
        assert_close(model(IDS), before)
        with model.disable_adapter():
            assert_close(model(IDS), before)
        step(model, optimizer, 3)
        assert not torch.allclose(model(IDS), before)
    restart(model, optimizer)
    change = model.base_model.model.last.base_layer.weight - first
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3  # of 3, by rank 2


@pytest.mark.parametrize("keep, left", [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_moments_keep_their_largest(keep, left):
    model, optimizer = trained()
    A = model.base_model.model.last.lora_A["default"].weight
    before = optimizer.state[A]["exp_avg"].clone()
    restart(model, optimizer, keep)
    after = optimizer.state[A]["exp_avg"]
    assert after.count_nonzero() == left and torch.equal(after[after != 0], before[after != 0])
    assert before[after != 0].abs().min() >= before[after == 0].abs().max() if 0 < left < 8 else True
    assert optimizer.state[A]["step"] == 3


def test_a_call_of_another_thread_sees_one_round(monkeypatch):
    """Never a weight that has the update already, with the update."""
    model, optimizer = trained()
    before, module, found = model(IDS), sys.modules[restart.__module__], []

    def begin(m):
        found.append(other.submit(model, IDS))
        wait(found, 0.1)
        begin_of_restart(m)

    begin_of_restart = module.reset_factors
    monkeypatch.setattr(module, "reset_factors", begin)
    with ThreadPoolExecutor(1) as other:
        restart(model, optimizer)
        for y in found:
            assert_close(y.result(), before)
    assert len(found) == 3


def test_within_a_call_nothing_begins_again():
    model, optimizer = trained()
    before = model(IDS)
    with graft.calling(model), pytest.raises(graft.InUseError, match="restart"):
        restart(model, optimizer)
    assert torch.equal(model(IDS), before) and model.base_model.model.last.lora_B["default"].weight.any()


def test_the_adapter_alone_is_not_the_model(tmp_path):
    model, optimizer = trained()
    model.save_pretrained(tmp_path)  # which says nothing yet
    restart(model, optimizer)
    with pytest.warns(UserWarning, match=r"Adapters \['default'\] were restarted"):
        model.save_pretrained(tmp_path)
    with seeded(0):
        base = Net()
    with pytest.warns(UserWarning, match="weights"):
        graft.PeftModel.from_pretrained(base, tmp_path)


def tied():
    base = Net()
    base.other = nn.Linear(4, 3)
    base.other.weight = base.last.weight
    return base


def merged(model):
    model.merge_adapter()


def second(model):
    model.add_adapter("other", graft.LoraConfig(target_modules=["last"]))


@pytest.mark.parametrize("options, change, error, text", [
    (dict(use_dora=True), None, graft.ConfigError, "'default' is not plain LoRA"),
    (dict(init_lora_weights="pissa"), None, graft.ConfigError, "changed the base"),
    ({}, second, graft.ConfigError, r"the model has \['default', 'other'\]"),
    ({}, merged, graft.ConfigError, "is merged"),
    (dict(base=tied), None, UnsupportedLayerError, "'last'.*tied"),
])  # fmt: skip
def test_what_cannot_begin_again_is_as_it_was(options, change, error, text):
    options = dict(options)
    base = options.pop("base", Net)
    model, optimizer = trained(base=base(), target_modules=["last"], **options)
    if change is not None:
        change(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=text):
        restart(model, optimizer)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_bad_arguments():
    model, optimizer = trained()
    with pytest.raises(graft.ConfigError, match="between 0 and 1, got 2"):
        restart(model, optimizer, keep=2)
    with pytest.raises(graft.ConfigError, match=r"has \[\]"):
        restart(Net(), optimizer)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(graft.ConfigError, match=r"'default' on layer 'emb'.*the one that trains them"):
        restart(model, torch.optim.AdamW([p.detach().clone() for p in model.parameters()]))  # of copies
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
