# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: initialisations that read the packed weight, or change it."""

import copy
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.layer import AdapterLayer
from graft.storage.find import find_store
from tests import samples
from tests.looks import layers
from tests.models import disturb, seeded
from tests.packages.bnb_layers import eight, four, pair
from tests.storage.cells import flat, same

HOLDS = {"nf4": four, "nested": partial(four, nested=True), "int8": partial(eight, trains=True)}
TARGETS = ["0", "2"]
INITS = {
    "pissa": dict(init_lora_weights="pissa"),
    "pissa_niter": dict(init_lora_weights="pissa_niter_4"),
    "olora": dict(init_lora_weights="olora"),
    "corda": dict(init_lora_weights="corda", corda_config=graft.CordaConfig()),
    "kasa": dict(kasa_config={}),
    "mica": dict(init_lora_weights="mica"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "eva": dict(init_lora_weights="eva", eva_config=graft.EvaConfig()),
}
CHANGES = ("pissa", "pissa_niter", "olora", "corda", "kasa")
with seeded(5):
    X = torch.randn(40, 64)


def start(base, how, name="default"):
    config = graft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **copy.deepcopy(INITS[how]))
    if how == "corda":
        graft.preprocess_corda(base, config, run_model=lambda: base(X))
    with seeded(3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = graft.get_peft_model(base, config, name)
    if how == "eva":
        graft.initialize_lora_eva_weights(
            model,
            [X, X + 1],
            forward_fn=lambda net, x: net(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    return model.eval()


def state(base):
    return [t.clone() for i in TARGETS for t in flat(snapshot(base[int(i)]))]


def snapshot(m):
    m = getattr(m, "base_layer", m)
    return find_store(m).snapshot(m, "weight", False)


def ready(hold):
    base = pair(hold)
    for m in (base[0], base[2]):
        m.support_avx512bf16_for_cpu = False
    return base


@pytest.mark.differs("VeLoRA, MonteCLoRA, MiCA, BD-LoRA on a 4-bit or 8-bit base")
@pytest.mark.differs("PiSSA, CorDA, orthogonal on a 4-bit or 8-bit base")
@pytest.mark.differs("PiSSA, CorDA, MiCA on a packed base")
@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@pytest.mark.parametrize("how", INITS)
def test_an_initialisation_is_that_of_the_dense_weight_and_comes_back_exactly(how, hold, tmp_path):
    fresh = ready(hold)
    model = start(ready(hold), how)
    dense = copy.deepcopy(fresh)
    for i in (0, 2):
        dense[i] = find_store(dense[i]).dense(dense[i])
    theirs = start(dense, how)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            assert_close(p, theirs.get_parameter(name), rtol=1e-4, atol=1e-4)
    assert same(state(fresh), state(model.get_base_model())) == (how not in CHANGES)
    assert (model(X) - theirs(X)).norm() < 0.15 * theirs(X).norm()  # the weight is rounded anew
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01)
    model.save_pretrained(tmp_path)
    again = graft.PeftModel.from_pretrained(ready(hold), tmp_path).eval()
    assert same(state(again.get_base_model()), state(model.get_base_model()))
    assert torch.equal(again(X), model(X))
    if how in CHANGES and how != "kasa":
        with pytest.warns(UserWarning, match="has been changed already"):
            third = graft.PeftModel.from_pretrained(again.unload(), tmp_path).eval()
        assert torch.equal(third(X), model(X))


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@pytest.mark.parametrize("how", CHANGES)
def test_an_error_takes_the_change_back(how, hold, monkeypatch):
    base = ready(hold)
    before, y = state(base), base(X)
    rewrite, calls = AdapterLayer.rewrite_base, []

    def second_fails(self, W):
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("of the second layer")
        rewrite(self, W)

    monkeypatch.setattr(AdapterLayer, "rewrite_base", second_fails)
    with pytest.raises(RuntimeError, match="of the second layer"):
        start(base, how)
    assert len(calls) == 2 and same(before, state(base)) and torch.equal(base(X), y)
    monkeypatch.undo()
    assert same(state(start(base, how).get_base_model()), state(start(ready(hold), how).get_base_model()))


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_second_start_on_a_base_that_is_merged_into(hold):
    found = []
    for merged in (False, True):
        with seeded(1):
            config = graft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False)
            model = graft.get_peft_model(ready(hold), config, "first")
        if merged:
            model.merge_adapter()
        with seeded(2), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter("second", graft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"))
        found.append(model)
    alone, model = found
    model.unmerge_adapter()
    assert same(state(alone.get_base_model()), state(model.get_base_model()))
    assert torch.equal(alone.eval()(X), model.eval()(X))


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_loftq_is_refused_and_values_of_another_start_too(hold, tmp_path):
    loftq = dict(init_lora_weights="loftq", loftq_config=graft.LoftQConfig(loftq_bits=4))
    with pytest.raises(graft.ConfigError, match=r"'0' is quantized already.*replace_lora_weights_loftq"):
        graft.get_peft_model(ready(hold), graft.LoraConfig(r=2, target_modules=TARGETS, **loftq))
    model = start(ready(hold), "pissa")
    start(pair(lambda m: hold(nn.Linear(m.in_features, m.out_features))), "olora").save_pretrained(tmp_path)
    before, y = state(model.get_base_model()), model(X)
    values = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(graft.ConfigError, match="PiSSA has quantized another weight, which cannot be undone"):
        graft.set_peft_model_state_dict(model, values)
    assert same(before, state(model.get_base_model())) and torch.equal(model(X), y)


REWRITING = [s for s in samples.LAWS if s.rewrites or s.reads]


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@pytest.mark.parametrize("sample", REWRITING, ids=str)
def test_methods_that_start_from_the_weight_come_back(sample, hold, tmp_path):
    def make():
        config = sample.make()
        config.target_modules = {"0"}
        with seeded(0):
            return disturb(graft.get_peft_model(nn.Sequential(hold(nn.Linear(320, 96))), config)).eval()

    x = X.repeat(1, 5)
    model = make()
    model.save_pretrained(tmp_path)
    with seeded(0):
        fresh = nn.Sequential(hold(nn.Linear(320, 96)))
    again = graft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again(x), model(x))
    assert len(layers(model)) == 1


def test_a_conversion_to_plain_lora_says_that_it_is_not_exact(tmp_path):
    model = start(ready(four), "pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.warns(graft.PeftWarning, match="not exact: the initialisation has rounded"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "start")
    again = graft.PeftModel.from_pretrained(ready(four), tmp_path).eval()
    error = (again(X) - model(X)).norm() / model(X).norm()
    assert 0.01 < error < 0.2
