# SPDX-License-Identifier: Apache-2.0
"""What is left to each method where the weight cannot be written, or not even read. (Rounded weights: the matrix.)"""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.effect import NO_WEIGHT, Rewrite
from graft.core.errors import UnsupportedLayerError
from tests.conformance.stores import Coded, Opaque, ReadOnly, Rounded, RoundedStore, held
from tests.looks import layers
from tests.models import disturb, seeded
from tests.raised import refuses
from tests.samples import BY_THEMSELVES

X = torch.linspace(-1, 1, 700).view(70, 10)
FIT = [s for s in BY_THEMSELVES if s.method != "LN_TUNING"]  # a copy of the layer


def net(kind):
    with seeded(0):
        return nn.Sequential(held(nn.Linear(10, 6), kind)).eval()


def make_for(sample, target):
    config = sample.make("default")
    config.target_modules = {target}
    if getattr(config, "feedforward_modules", None):
        config.feedforward_modules = {target}
    return config


def build(sample, kind):
    with seeded(1):
        return disturb(graft.get_peft_model(net(kind), make_for(sample, "0"))).eval()


def refusal(model, why):
    """What a merge is refused with: by the store, or by a method that has no merged form anywhere."""
    (m,) = layers(model)["0"].methods.values()
    return f"layer '0': ({why}|.*{re.escape(m.effect.why_unmergeable or NO_WEIGHT)})"


UNWRITABLE = {
    ReadOnly: "read-only weights cannot be rewritten",
    Coded: "its weight holds int16, not plain floating-point numbers, and graft does not know how to write it",
}


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("sample", FIT, ids=str)
def test_a_weight_that_cannot_be_written_runs_and_refuses_merging(sample, kind):
    why = UNWRITABLE[kind]
    if sample.rewrites:
        base = net(kind)
        with pytest.raises(UnsupportedLayerError, match=f"layer '0', which it would change: {why}"):
            graft.get_peft_model(base, make_for(sample, "0"))
        assert type(base[0]) is kind
        return
    expected = build(sample, Rounded)(X)
    model = build(sample, kind)
    assert_close(model(X), expected)
    for merge in (model.merge_adapter, model.merge_and_unload):
        refuses(NotImplementedError, refusal(model, why), merge, safe_merge=True)
    assert_close(model(X), expected)
    assert type(model.unload()[0]) is kind


@pytest.mark.parametrize("sample", FIT, ids=str)
def test_a_weight_that_cannot_be_read_runs_or_is_refused_at_once(sample, monkeypatch):
    kind, why = Opaque, "opaque weights cannot be read"
    reads, read = [], RoundedStore.read
    monkeypatch.setattr(RoundedStore, "read", lambda *args: reads.append(args) or read(*args))
    expected = build(sample, Rounded)(X)
    if reads:  # to begin with, or in the forward pass
        base = net(kind)
        with pytest.raises(UnsupportedLayerError, match=rf"0 \({kind.__name__}\).*needs its weight, and {why}"):
            graft.get_peft_model(base, make_for(sample, "0"))
        assert type(base[0]) is kind
        return
    model = build(sample, kind)
    assert_close(model(X), expected)
    loss = model(X).pow(2).sum()
    loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    refuses(NotImplementedError, refusal(model, why), model.merge_adapter)


def test_a_method_that_folds_is_refused_where_nothing_can_be_read():
    class Folds(graft.Method):
        prefix = "folds_"
        config = graft.IA3Config

        def describe(self):
            return Rewrite(self.fold)

        def fold(self, W, b):
            return 2 * W, b

    from graft.inject.survey import get_site, survey_model

    for kind, why in ((Opaque, "Folds needs its weight, and opaque weights cannot be read"), (ReadOnly, None)):
        base = net(kind)
        site = get_site("0", base[0], survey_model(base))
        assert Folds(site, graft.IA3Config(target_modules=["0"]), "a").check() == why


@pytest.mark.differs("KaSA on a 4-bit or 8-bit base")
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_asks_whether_it_may(how):
    def make(kind):
        base = net(kind)
        graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=how))
        return base

    assert_close(make(Rounded)(X), net(Rounded)(X), atol=1e-3, rtol=1e-3)
    refuses(UnsupportedLayerError, "layer '0', which it would change: read-only weights cannot", make, ReadOnly)
    refuses(UnsupportedLayerError, "needs its weight, and opaque weights cannot be read", make, Opaque)
