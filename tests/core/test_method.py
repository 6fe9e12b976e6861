# SPDX-License-Identifier: Apache-2.0
"""What is derived from the hooks that a method overrides."""

import copy

import pytest

import graft
from graft.core.method import Method
from graft.methods import METHODS, method_of

# additive: y = base(x) + branch(x); folds: the forward pass needs the dense weight
FACTS = {
    "LORA": dict(additive=True, low_rank=True, mergeable=True, folds=False, replaces=False, rewrites_input=False),
    "IA3": dict(additive=False, low_rank=False, mergeable=True, folds=False, replaces=False, rewrites_input=True),
    "VERA": dict(additive=True, low_rank=True, mergeable=True, folds=False, replaces=False, rewrites_input=False),
    "LOHA": dict(additive=True, low_rank=False, mergeable=True, folds=False, replaces=False, rewrites_input=False),
    "OFT": dict(additive=False, low_rank=False, mergeable=True, folds=False, replaces=False, rewrites_input=True),
    "HRA": dict(additive=False, low_rank=False, mergeable=True, folds=False, replaces=False, rewrites_input=True),
    "LN_TUNING": dict(additive=False, low_rank=False, mergeable=True, folds=False, replaces=True, rewrites_input=False),
}


@pytest.mark.parametrize("name", FACTS)
def test_capabilities_of_the_methods(name):
    method = method_of(name)
    assert {fact: getattr(method, fact) for fact in FACTS[name]} == FACTS[name]


def test_capabilities_follow_from_the_hooks():
    class Nothing(Method):
        pass

    class Factors(Method):
        def factors(self):
            return None

    class Fold(Method):
        def fold(self, W, b):
            return W, b

    class Post(Method):
        def post(self, x, y):
            return y

    class FactorsAndFold(Factors):
        def fold(self, W, b):
            return W, b

    assert not Nothing.mergeable and not Nothing.additive and not Nothing.adds_output
    assert Factors.additive and Factors.low_rank and Factors.mergeable and Factors.adds_output and not Factors.folds
    assert Fold.folds and Fold.mergeable and not Fold.additive and not Fold.adds_output
    assert Post.adds_output and not Post.mergeable and not Post.additive
    assert FactorsAndFold.low_rank and not FactorsAndFold.additive and not FactorsAndFold.folds


def test_a_view_reads_the_tensors_of_its_adapter(tmp_path):
    import torch
    from torch import nn

    net = nn.Sequential(nn.Linear(3, 2))
    model = graft.get_peft_model(net, graft.LoraConfig(target_modules=["0"], r=2))
    model.add_adapter("b", graft.LoraConfig(target_modules=["0"], r=2, lora_alpha=6))
    layer = model.base_model.layers["0"]
    assert layer.methods["b"].lora_A is layer.lora_A["b"] and layer.methods["b"].scaling == 3.0
    for missing in ("__deepcopy__", "__getstate__x__", "layer_"):
        with pytest.raises(AttributeError):
            getattr(layer.methods["b"], missing)
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
from typing import ClassVar
import typing
import graft
from graft.core.method import Method

class Gate(Method):
    prefix: ClassVar[str] = "gate_"
    upcast: typing.ClassVar[bool] = False
    single_trainable: bool = False
    config = graft.IA3Config

    gate_scale: nn.Parameter
    gate_mask: torch.Tensor
    eps: float | None
    names: "list[str] | None"

    @classmethod
    def build(cls, site, cfg, shared):
        return dict(
            gate_scale=nn.Parameter(torch.full((site.out_features,), 2.0)),
            gate_mask=torch.ones(site.out_features),
            eps=0.5,
            names=None,
        )

    def post(self, x, y):
        return y * self.gate_scale * self.gate_mask + self.eps
"""


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("module", ["plug_in", "plug_in.methods.gate", "__main__"])
def test_declarations_are_read_however_they_are_written(future, module):
    """Without `from __future__ import annotations` they are types, with it texts; and no module of graft's."""
    import torch
    from torch import nn

    from graft.core.call import Call
    from graft.core.layer import AdapterLayer
    from graft.inject.survey import site_of, survey

    space = {"__name__": module}
    exec("from __future__ import annotations\n" * future + PLUG_IN, space)
    Gate = space["Gate"]
    assert (Gate.prefix, Gate.upcast, Gate.single_trainable) == ("gate_", False, False)
    model = nn.Sequential(nn.Linear(4, 3))
    site = site_of("0", model[0], survey(model))
    layer = AdapterLayer(site, Gate, Call())
    made = layer.add("a", Gate.build(site, None, {}))
    layer.set_adapter("a")
    assert (made.eps, made.names) == (0.5, None)
    assert made.gate_scale is layer.gate_scale["a"] and made.gate_mask is layer.gate_mask["a"]
    x = torch.ones(2, 4)
    assert torch.equal(layer(x), layer.base_layer(x) * 2 + 0.5)
    assert layer._get_name().endswith(".Linear") and repr(layer)
