# SPDX-License-Identifier: Apache-2.0
"""What is derived from the hooks that a method overrides."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.effect import Factors, Replace, Rewrite, Update
from graft.core.method import Method
from graft.inject.survey import get_site, survey_model
from graft.methods import METHODS, method_of
from graft.methods.ln_tuning import LNTuning
from tests.looks import layers
from tests.raised import refuses


def site(layer: nn.Module):
    net = nn.Sequential(layer)
    return get_site("0", layer, survey_model(net))


def effect(peft_type: str, layer: nn.Module, **options):
    cfg = graft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](target_modules=["0"], **options)
    return method_of(peft_type).variant(cfg)(site(layer), cfg, "a").effect


LINEAR, CONV, EMBEDDING = nn.Linear(64, 48), nn.Conv2d(4, 8, 3), nn.Embedding(9, 6)
KINDS = [  # (method, options, layer, kind of effect, facts)
    ("LORA", {}, LINEAR, Update, dict(additive=True, of_weight=False, why_unmergeable=None, delta=None)),
    ("LORA", dict(use_dora=True), LINEAR, Update, dict(additive=False, of_weight=True, gains=True, product=None)),
    ("VERA", {}, LINEAR, Update, dict(additive=True, delta=None)),
    ("LOHA", dict(r=2), LINEAR, Update, dict(additive=True, delta=None)),  # of rank r²
    ("LOHA", dict(r=40), LINEAR, Update, dict(additive=True, draws=False, product=None)),
    ("LOHA", dict(r=40, module_dropout=0.5), LINEAR, Update, dict(draws=True)),
    ("IA3", dict(feedforward_modules=[]), LINEAR, Rewrite, dict(additive=False, pre=None, folds=False)),
    ("IA3", dict(feedforward_modules=["0"]), LINEAR, Rewrite, dict(post=None, folds=False)),
    ("OFT", {}, LINEAR, Rewrite, dict(inward=True, folds=False, reads=False)),
    ("OFT", dict(oft_block_size=4), CONV, Rewrite, dict(inward=True, folds=True, reads=True)),
    ("OFT", dict(oft_block_size=3), EMBEDDING, Rewrite, dict(inward=False, folds=False)),
    ("HRA", {}, LINEAR, Rewrite, dict(inward=False, folds=False)),
    ("HRA", {}, CONV, Rewrite, dict(folds=True)),
    ("LN_TUNING", {}, nn.LayerNorm(3), Replace, dict(whole=True, additive=False)),
]


def test_a_method_that_cannot_be_tied_to_an_embedding_says_so():
    cfg = graft.IA3Config(target_modules=["0"], feedforward_modules=[])
    method = method_of("IA3")(site(LINEAR), cfg, "a")
    refuses(
        NotImplementedError,
        "no implementation exists to tie the adapters of IA3: layer '0'",
        method.tie_to_embedding,
        method,
    )


@pytest.mark.parametrize("peft_type, options, layer, kind, facts", KINDS)
def test_the_effect_follows_from_site_and_config(peft_type, options, layer, kind, facts):
    if peft_type == "LN_TUNING":
        made = effect(peft_type, layer)
    else:
        made = effect(peft_type, layer, **options)
    assert type(made) is kind and {name: getattr(made, name) for name in facts} == facts


def test_the_hook_that_was_overridden_last_describes():
    class Products(Method):
        def factors(self):
            return Factors(None, None)

    class Dense(Products):
        def delta(self):
            return None

    class Beside(Method):
        def describe(self):
            return Update(branch=self.branch)

        def branch(self, x):
            return x

    made = [cls(site(LINEAR), None, "a").effect for cls in (Products, Dense, Beside)]
    assert [e.product is not None for e in made] == [True, False, False] and made[1].delta and made[2].why_unmergeable
    assert made[0] is not Products(site(LINEAR), None, "a").effect
    m = Products(site(LINEAR), None, "a")
    assert m.effect is m.effect


class Sum(LNTuning):
    """An update of the parts that `parts` names, made of one parameter."""

    ln_tuning_layers: nn.Parameter
    parts = ()

    check = Method.check

    def build(self, shared):
        return dict(ln_tuning_layers=nn.Parameter(torch.randn(3, 4, 4)))

    def describe(self):
        return Update(**{part: getattr(self, part) for part in self.parts})

    def delta(self):
        return self.ln_tuning_layers[0]

    def branch(self, x):
        return x @ self.ln_tuning_layers[0].T

    def factors(self):
        return Factors(self.ln_tuning_layers[1, :2], self.ln_tuning_layers[2, :, :2], 0.5)

    def bias(self):
        return self.ln_tuning_layers[2, :, 3]


@pytest.mark.parametrize("delta", ["", "delta", "branch", "delta branch"])
@pytest.mark.parametrize("beside", ["factors", "bias", "factors bias"])
def test_the_parts_of_an_update_add_up(monkeypatch, delta, beside):
    monkeypatch.setattr(LNTuning, "variant", classmethod(lambda cls, cfg: Sum))
    monkeypatch.setattr(Sum, "parts", [*delta.split(), *beside.split()])
    base, config = nn.Sequential(nn.Linear(4, 4)), graft.LNTuningConfig(target_modules=["0"])
    model = graft.get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("b", config)
    x = torch.randn(5, 4)

    def expected(name, weight=1.0):
        values = layers(model)["0"].ln_tuning_layers[name]
        W = values[0] if delta else 0
        W = W + 0.5 * values[2, :, :2] @ values[1, :2] if "factors" in beside else W * torch.ones(4, 4)
        return weight * (x @ W.T + (values[2, :, 3] if "bias" in beside else 0))

    assert_close(model(x), base(x) + expected("default"))
    names = ["b", "default", "__base__", "b", "default"]
    rows = [{"b": expected("b"), "default": expected("default"), "__base__": 0 * x}[n][i] for i, n in enumerate(names)]
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            assert_close(model(x, adapter_names=names), base(x) + torch.stack(rows))
    model.set_adapter(graft.Average("default", "b", weights=[0.25, -2.0]))
    assert_close(model(x), base(x) + expected("default", 0.25) + expected("b", -2.0))
    model.set_adapter("default")
    y = model(x)
    if delta == "branch":
        refuses(NotImplementedError, "no merged form", model.merge_adapter)
        return
    model.merge_adapter()
    assert_close(model(x), y)
    model.unmerge_adapter()
    assert_close(model(x), y)


def test_a_gain_has_nothing_beside_it():
    refuses(TypeError, "has no delta, branch or bias", Update, lambda: None, factors=lambda: None, gains=True)


def test_a_view_reads_the_tensors_of_its_adapter(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2))
    model = graft.get_peft_model(net, graft.LoraConfig(target_modules=["0"], r=2))
    model.add_adapter("b", graft.LoraConfig(target_modules=["0"], r=2, lora_alpha=6))
    layer = layers(model)["0"]
    assert layer.methods["b"].lora_A is layer.lora_A["b"] and layer.methods["b"].scaling == 3.0
    for missing in ("__deepcopy__", "__getstate__x__", "layer_"):
        refuses(AttributeError, None, getattr, layer.methods["b"], missing)
    bare = Method.__new__(method_of("LORA"))
    with pytest.raises(AttributeError):
        _ = bare.layer
    twin = copy.deepcopy(layer)
    assert twin.methods["b"].layer is twin and twin.methods["b"].lora_A is not layer.lora_A["b"]
    assert torch.equal(twin(torch.ones(1, 3)), layer(torch.ones(1, 3)))


def test_every_row_of_the_table_is_a_method_with_a_config_of_that_type():
    for peft_type in METHODS:
        method = method_of(peft_type)
        assert issubclass(method, Method) and method.config.peft_type == peft_type and method.prefix.endswith("_")


PLUG_IN = """
import torch
from torch import nn
from torch.testing import assert_close
from typing import ClassVar
import typing
import graft
from graft.core.effect import Rewrite
from graft.core.method import Method

class Gate(Method):
    prefix: ClassVar[str] = "gate_"
    upcast: typing.ClassVar[bool] = False
    always_tied: bool = False
    config = graft.IA3Config

    gate_scale: nn.Parameter
    gate_mask: torch.Tensor
    eps: float | None
    names: "list[str] | None"

    def describe(self):
        return Rewrite(self.fold, post=self.post)

    def build(self, shared):
        return dict(
            gate_scale=nn.Parameter(torch.full((self.site.out_features,), 2.0)),
            gate_mask=torch.ones(self.site.out_features),
            eps=0.5,
            names=None,
        )

    def post(self, x, y):
        return y * self.gate_scale * self.gate_mask + self.eps

    def fold(self, W, b):
        return W * self.gate_scale[:, None] * self.gate_mask[:, None], b * self.gate_scale * self.gate_mask + self.eps
"""


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("module", ["plug_in", "plug_in.methods.gate", "__main__"])
def test_declarations_are_read_however_they_are_written(future, module):
    """Without `from __future__ import annotations` they are types, with it texts; and no module of graft's."""
    from graft.core.call import Call
    from graft.core.layer import AdapterLayer

    space = {"__name__": module}
    exec("from __future__ import annotations\n" * future + PLUG_IN, space)
    Gate = space["Gate"]
    assert (Gate.prefix, Gate.upcast, Gate.always_tied) == ("gate_", False, False)
    model = nn.Sequential(nn.Linear(4, 3))
    place = get_site("0", model[0], survey_model(model))
    layer, made = AdapterLayer(place, Call()), Gate(place, None, "a")
    layer.add(made, made.build({}))
    layer.set_adapter("a")
    assert (made.eps, made.names) == (0.5, None)
    assert made.gate_scale is layer.gate_scale["a"] and made.gate_mask is layer.gate_mask["a"]
    x = torch.ones(2, 4)
    assert torch.equal(layer(x), layer.base_layer(x) * 2 + 0.5)
    assert layer._get_name().endswith(".Linear") and repr(layer)


def test_a_type_with_conv1d_in_its_name_keeps_it():
    class MyConv1D(nn.Linear):
        pass

    model = graft.get_peft_model(nn.Sequential(MyConv1D(4, 3)), graft.LoraConfig(target_modules=["0"]))
    assert model.base_model.model[0]._get_name() == "lora.MyConv1D"
