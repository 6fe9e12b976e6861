# SPDX-License-Identifier: Apache-2.0
"""What a layer holds for its adapters: which values of `build` it takes, what of it can be set, and by whom."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.call import Call
from graft.core.containers import Attached, CheckpointOnly, Transient
from graft.core.layer import make_adapter_layer
from graft.inject.survey import get_site, survey_model
from tests.raised import refuses


def made(build, name="a", layer=None, prefix="thing_"):
    """A layer with one more adapter, whose method builds these values."""

    class Thing(graft.Method):
        config: ClassVar = graft.LoraConfig
        thing_A: nn.Parameter
        thing_size: int

        def build(self, shared):
            return build()

        def delta(self):
            return self.thing_A

    Thing.prefix = prefix
    base = nn.Sequential(nn.Linear(4, 4))
    layer = layer or make_adapter_layer(get_site("0", base[0], survey_model(base)), Call())
    method = Thing(layer.site, graft.LoraConfig(), name)
    layer.add(method, method.build({}))
    return layer


def parameter():
    return nn.Parameter(torch.zeros(4, 4))


WRONG = {
    "a name without the prefix": (lambda: {"other_A": parameter()}, "'other_A'.*begin with 'thing_'"),
    "no tensor": (lambda: {"thing_size": 3}, "returns no tensor. Return one at least"),
    "an integer first": (lambda: {"thing_ids": torch.arange(3), "thing_A": parameter()}, "'thing_ids' of torch.int64"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_layer_refuses_what_it_cannot_hold(what):
    build, words = WRONG[what]
    refuses(TypeError, rf"Thing .*adapter 'a' on layer '0'.*{words}", made, build)
    layer = made(lambda: {"thing_A": parameter()}, "b")
    refuses(TypeError, words, made, build, "a", layer)
    assert layer.adapters == ["b"] and "a" not in layer.state.slots
    assert not any("a" in layer._modules[key] for key in layer.holders)


@pytest.mark.parametrize("first", [3, None])
def test_a_fact_and_a_tensor_cannot_share_a_name(first):
    one, other = (first, torch.zeros(2)) if first else (torch.zeros(2), 3)
    layer = made(lambda: {"thing_A": parameter(), "thing_size": one}, "a")
    words = r"'thing_size' of Thing adapter 'b' on layer '0'.*\('a'\).*under another"
    refuses(TypeError, words, made, lambda: {"thing_A": parameter(), "thing_size": other}, "b", layer)
    assert layer.adapters == ["a"]


def test_reading_what_was_not_built_names_it():
    layer = made(lambda: {"thing_B": parameter()})
    with pytest.raises(TypeError, match=r"Thing declares 'thing_A'.*adapter 'a' on layer '0'.*build"):
        layer.methods["a"].thing_A  # noqa: B018


KINDS = {
    "saved": lambda: torch.ones(2),
    "not saved": lambda: Transient(torch.ones(2)),
    "in files": lambda: CheckpointOnly(torch.ones(2)),
    "trained": lambda: nn.Parameter(torch.ones(2)),
    "drawn again": lambda: Transient(nn.Parameter(torch.ones(2))),
    "a module": lambda: nn.Linear(2, 1),
    "never trained": lambda: nn.Parameter(torch.ones(2), requires_grad=False),
}
TRAINED = ("trained", "drawn again", "a module")
IN_FILES = ("saved", "in files", "trained", "a module", "never trained")
IN_STATE = ("saved", "never trained", *TRAINED)


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_each_adapter_keeps_the_kind_of_its_tensors(one, other):
    layer = made(lambda: {"thing_A": parameter(), "thing_B": KINDS[one]()}, "a")
    made(lambda: {"thing_A": parameter(), "thing_B": KINDS[other]()}, "b", layer)
    for name, kind in (("a", one), ("b", other)):
        assert any(s.container == "thing_B" for s, _ in layer.tensors(name)) == (kind in IN_FILES)
        assert any(key.startswith(f"thing_B.{name}") for key in layer.state_dict()) == (kind in IN_STATE)
        layer.set_requires_grad(name)
        trained = {n for n, p in layer.named_parameters() if p.requires_grad and n.startswith(f"thing_B.{name}")}
        assert bool(trained) == (kind in TRAINED)
    layer.drop("a")
    made(lambda: {"thing_A": parameter(), "thing_B": KINDS[other]()}, "a", layer)
    assert any(s.container == "thing_B" for s, _ in layer.tensors("a")) == (other in IN_FILES)


# what can be set


def lora():
    model = graft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), graft.LoraConfig(target_modules=["0"], r=2))
    return model, model.base_model.model[0]


def test_facts_that_nothing_computes_with_cannot_be_set():
    _, layer = lora()
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        facts = getattr(layer, name)
        before = dict(facts)
        for change in (
            lambda f: f.__setitem__("default", 64),
            lambda f: f.update(default=64),
            lambda f: f.pop("default"),
            lambda f: f.setdefault("x", 1),
            lambda f: f.clear(),
        ):
            refuses(AttributeError, rf"layer\.{name}\[…\] cannot be set.*layer\.scaling", change, facts)
        assert facts == before
        for same in (copy.deepcopy(facts), copy.copy(facts), pickle.loads(pickle.dumps(facts))):
            assert same == before
            with pytest.raises(AttributeError, match=name):
                same["default"] = 64


def test_facts_that_the_layer_computes_with_act():
    model, layer = lora()
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1.0)
    x = torch.randn(2, 4)
    once = model(x) - layer.base_layer(x)
    layer.scaling["default"] *= 2
    assert_close(model(x) - layer.base_layer(x), 2 * once)


@pytest.mark.differs(
    "changing `layer.merged_adapters` in place (`layer.active_adapters` is a copy); setting `layer.r[…]`, "
    "`layer.lora_alpha[…]` and other facts that graft computes nothing with"
)
def test_lists_of_adapters_that_a_layer_shows_cannot_be_changed():
    model, layer = lora()
    model.merge_adapter()
    for name in ("merged_adapters", "_active_adapter"):
        shown = getattr(layer, name)
        assert shown == ["default"] and isinstance(shown, list)
        for change in (lambda s: s.append("x"), lambda s: s.remove("default"), lambda s: s.clear()):
            refuses(AttributeError, rf"{name} cannot be changed: .*(merge|set_adapter)\(\)", change, shown)
        assert type(copy.deepcopy(shown)) is list and pickle.loads(pickle.dumps(shown)) == ["default"]
    layer.active_adapters.append("x")  # a copy: other packages hand it on, and pickle it
    assert type(layer.active_adapters) is list and layer.active_adapters == layer.active_adapter == ["default"]
    model.unmerge_adapter()
    assert layer.merged_adapters == []


def test_a_shared_container_of_a_group_is_no_child_of_the_layer():
    shared, of_group = nn.ParameterDict(), nn.ParameterDict()
    layer = made(lambda: {"thing_A": parameter(), "thing_s": Attached(shared), "thing_s.group": Attached(of_group)})
    assert layer.thing_s is shared and layer.attached == {"thing_s"}
    assert of_group not in list(layer.modules())
