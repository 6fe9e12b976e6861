# SPDX-License-Identifier: Apache-2.0
"""Methods that clients replace on PEFT's layer classes, or on single layers: graft's layers run them, as PEFT's do."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.layer import AdapterLayer, ParamWrapper
from tests.compat.test_steps import GRAFT, LINEAR, PEFT, STACKS, TARGETS, X, base
from tests.leaves_out import WHOLE_GRAPHS
from tests.models import nudged
from tests.raised import warns

NAMES = ("forward", "merge", "unmerge", "get_delta_weight")
BEFORE = {(kind, name): getattr(kind, name) for kind in (AdapterLayer, ParamWrapper) for name in NAMES}
BOTH = {"theirs": PEFT, "ours": GRAFT}
close = partial(assert_close, rtol=2e-4, atol=1e-3)  # outputs are in the hundreds
ALL = {"target_modules": ["linear", "k", "v"], "init_lora_weights": False}


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert {place: getattr(*place) for place in BEFORE} == BEFORE


def layer_of(lib: Any, name: str) -> Any:
    return lib.get("peft.tuners.lora.layer", name)


def pair(config: dict, build: Any = base) -> tuple[Any, Any]:
    """Models of both libraries with the same values."""
    models = [lib.wrap(build(), config).eval() for lib in (PEFT, GRAFT)]
    nudged(models[0])
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


def by_hand(seen: list) -> Any:
    """A forward in the form of those that clients write."""

    def forward(self, x, *args, **kwargs):
        self._check_forward_args(x, *args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        seen.append((len(self.active_adapters), names))
        variants = {key: kwargs.pop(key, None) for key in ("alora_offsets",)}
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=names, **variants, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            A, B, dropout, scaling = (getattr(self, n)[name] for n in ("lora_A", "lora_B", "lora_dropout", "scaling"))
            x = self._cast_input_dtype(x, A.weight.dtype)
            if name in self.lora_variant:
                options = {"active_adapter": name, "x": x, "result": result}
                result = self.lora_variant[name].forward(self, **options, **variants, **kwargs)
            else:
                result = result + B(A(dropout(x))) * scaling
        return result.to(dtype)

    return forward


VARIANTS: dict[str, dict] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.4},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.4},
    "KaSA": {"kasa_config": graft.KasaConfig(), "r": 2},
    "MiCA": {"init_lora_weights": "mica", "r": 2},
    "BdLoRA": {"target_modules": ["k"], "use_bdlora": graft.BdLoraConfig(target_modules_bd_a=["k"], nblocks=2), "r": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("train", [False, True])
def test_a_forward_written_by_hand(variant, train, monkeypatch):
    """It runs for the layers of that class, and gives what the own one does."""
    config = graft.LoraConfig(**ALL | VARIANTS[variant])
    model = nudged(graft.get_peft_model(base(), config)).train(train)
    seen: list = []
    torch.manual_seed(3)
    expected = model(X)
    with monkeypatch.context() as within:
        within.setattr(layer_of(GRAFT, "Linear"), "forward", by_hand(seen))
        torch.manual_seed(3)
        close(model(X), expected)
        layers = len(model._registry.layers)
        assert len(seen) == layers
        with model.disable_adapter():
            plain = model(X)
        assert len(seen) == 2 * layers
    close(plain, model.unload()(X))
    assert not torch.allclose(plain, expected)
    assert len(seen) == 2 * layers


def test_the_same_forward_in_both_libraries(monkeypatch):
    theirs, ours = pair(ALL | {"use_dora": True})
    seen: dict = {"theirs": [], "ours": []}
    expected = theirs(X)
    for name, lib in BOTH.items():
        monkeypatch.setattr(layer_of(lib, "Linear"), "forward", by_hand(seen[name]))
    close(theirs(X), expected)
    close(ours(X), expected)
    for model, lib in ((theirs, PEFT), (ours, GRAFT)):
        model.add_adapter("other", lib.api.LoraConfig(**ALL))
        model.base_model.set_adapter(["default", "other"])
    ours.load_state_dict(nudged(theirs).state_dict())
    close(ours(X), theirs(X))
    names = ["other", "__base__", "other", "other"]  # PEFT has no rows with DoRA
    close(ours(X, adapter_names=names), theirs(X, adapter_names=names))
    assert seen["ours"] == seen["theirs"] and seen["ours"][-1][1] == names
    theirs.merge_adapter(), ours.merge_adapter()
    close(ours(X), theirs(X))


def test_gradients(monkeypatch):
    model = nudged(GRAFT.wrap(base(), ALL | {"use_dora": True})).train()
    model(X).square().sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(layer_of(GRAFT, "Linear"), "forward", by_hand([]))
    model(X).square().sum().backward()
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


@WHOLE_GRAPHS
def test_a_replaced_forward_compiles_without_a_break(monkeypatch):
    model = nudged(GRAFT.wrap(base(), STACKS)).eval()
    expected, origin = model(X), layer_of(GRAFT, "ParamWrapper").forward
    calls = []

    def forward(self, x, *args, **kwargs):
        calls.append(self.parameter_name)
        return origin(self, x, *args, **kwargs)

    monkeypatch.setattr(layer_of(GRAFT, "ParamWrapper"), "forward", forward)
    torch.compiler.reset()
    close(torch.compile(model, backend="eager", fullgraph=True)(X), expected)
    assert sorted(set(calls)) == ["down", "up"]


def test_only_layers_of_the_class_and_wrapping_twice(monkeypatch):
    """Each wrapper calls what it found; other layers run as before."""
    model = nudged(GRAFT.wrap(base(), STACKS | ALL | {"target_parameters": ["experts.up"]}))
    linear, param, expected = layer_of(GRAFT, "Linear"), layer_of(GRAFT, "ParamWrapper"), model(X)
    seen = []

    def around(cls, mark):
        original = cls.forward

        def forward(self, x, *args, **kwargs):
            seen.append((mark, isinstance(self, cls)))
            return original(self, x, *args, **kwargs)

        return forward

    monkeypatch.setattr(linear, "forward", around(linear, "inner"))
    close(model(X), expected)
    assert seen == [("inner", True)] * 6
    monkeypatch.setattr(linear, "forward", around(linear, "outer"))
    monkeypatch.setattr(param, "forward", around(param, "experts"))
    seen.clear()
    close(model(X), expected)
    assert seen[:2] == [("outer", True), ("inner", True)] and len(seen) == 14
    assert seen.count(("experts", True)) == 2
    linear.forward = param.forward = layer_of(GRAFT, "LoraLayer").forward  # the original
    seen.clear()
    close(model(X), expected)
    assert not seen


def test_the_originals_stand_in_the_classes_that_have_them_in_peft():
    """Clients read `Linear.__dict__["forward"]`, and leave a class alone that has none of its own."""
    for name in ("Linear", "Embedding", "Conv2d", "ParamWrapper"):
        for method in ("forward", "merge", "unmerge"):
            ours, theirs = (vars(layer_of(lib, name)).get(method) for lib in (GRAFT, PEFT))
            assert callable(ours) or not callable(theirs), (name, method)


def test_a_param_wrapper_that_goes_its_own_way(monkeypatch):
    """In the form of clients' kernels: the outermost finds all, and runs the module itself."""
    theirs, ours = pair(STACKS)

    def forward(self, x, *args, **kwargs):
        found, inner = {}, self
        while hasattr(inner, "base_layer") and hasattr(inner, "lora_A"):
            assert not (inner.disable_adapters or inner.merged) and len(inner.active_adapters) == 1
            found[inner.parameter_name], inner = inner, inner.base_layer
        full = {n: getattr(inner, n) + layer.get_delta_weight("default") for n, layer in found.items()}
        return (x @ full["up"] @ full["down"]).sum(0)

    expected = theirs(X)
    close(ours(X), expected)
    for lib in BOTH.values():
        monkeypatch.setattr(layer_of(lib, "ParamWrapper"), "forward", forward)
    close(theirs(X), expected)
    close(ours(X), expected)


def test_the_class_of_a_layer_in_few_bits():
    """By the type of the base layer: a replacement for another class does not reach it."""
    from graft.compat.peft.layers import OWN, REPLACED, find_replacement, layer_class

    four, plain = layer_class("LORA", "Linear4bit"), layer_class("LORA", "Linear")
    fake = type("Linear4bit", (nn.Linear,), {})
    models = [GRAFT.wrap(nn.ModuleDict({"k": kind(3, 4)}), {"target_modules": ["k"]}) for kind in (fake, nn.Linear)]
    layers = [m._registry.layers["k"] for m in models]
    four.forward = f = lambda self, x: x
    try:
        assert find_replacement("forward", layers[0]) is f and find_replacement("forward", layers[1]) is None
        plain.forward = g = lambda self, x: x + 1
        assert find_replacement("forward", layers[0]) is f and find_replacement("forward", layers[1]) is g
        close(layers[0](X), X)
        close(layers[1](X[:, :3]), X[:, :3] + 1)
    finally:
        four.forward = plain.forward = OWN["forward"]  # not deleted: a later test looks for it there
    assert REPLACED["forward"] == []


@pytest.mark.differs("`forward`, `merge` or `unmerge` replaced on a layer class, `merge` or `unmerge` on a layer")
def test_gates_pass_by(monkeypatch):
    """Mixtures of adapters weigh parts that a replaced forward does not show: PEFT's do not call it either."""
    model = nudged(GRAFT.wrap(base(), ALL))

    class Half:
        def apply(self, layer, adapter, part):
            return part / 2

    with model._registry.call.extend_context(gates=Half()):
        expected = model(X)
        monkeypatch.setattr(layer_of(GRAFT, "Linear"), "forward", by_hand([]))
        close(model(X), expected)


# merge


def selective(seen: list) -> Any:
    def merge(self, safe_merge=False, adapter_names=None):
        seen.append(self.name)
        if "blocks.0" in self.name:
            return self.merge_origin(safe_merge, adapter_names)
        return None

    return merge


@pytest.mark.parametrize("name", BOTH)
def test_merge_replaced_on_layers(name):
    """Only some layers are merged, as a trainer does that hands weights on group by group."""
    lib, seen = BOTH[name], []
    model = nudged(lib.wrap(base(), ALL))
    expected = model(X)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, layer_of(lib, "LoraLayer"))}
    for key, layer in layers.items():
        layer.name, layer.merge_origin = key, layer.merge
        layer.merge = MethodType(selective(seen), layer)
    model.merge_adapter()
    assert seen == list(layers)
    assert {n for n, layer in layers.items() if layer.merged} == {n for n in layers if "blocks.0" in n}
    close(model(X), expected)
    model.unmerge_adapter()
    for layer in layers.values():
        layer.merge = layer.merge_origin
        del layer.merge_origin
    model.merge_adapter()
    assert all(layer.merged for layer in layers.values()) and len(seen) == len(layers)
    close(model(X), expected)


def test_merge_and_unmerge_replaced_on_the_class(monkeypatch):
    linear, seen = layer_of(GRAFT, "Linear"), []
    model = nudged(GRAFT.wrap(base(), ALL))
    expected = model(X)
    for name in ("merge", "unmerge"):
        original = getattr(linear, name)

        def changed(self, *args, _original=original, _name=name, **kwargs):
            seen.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(linear, name, changed)
    model.merge_adapter(safe_merge=True)
    assert seen == ["merge"] * 6 and all(layer.merged for layer in model._registry.layers.values())
    close(model(X), expected)
    model.unmerge_adapter()
    assert seen == ["merge"] * 6 + ["unmerge"] * 6
    close(copy.deepcopy(model).merge_and_unload()(X), expected)


def test_a_merge_that_raises_leaves_nothing_merged(monkeypatch):
    linear = layer_of(GRAFT, "Linear")
    model = nudged(GRAFT.wrap(base(), ALL))
    model.add_adapter("other", graft.LoraConfig(**ALL))
    warns(UserWarning, "'default'. are not merged", model.merge_adapter, ["other"])
    before, merged = {n: p.clone() for n, p in model.named_parameters()}, linear.merge

    def merge(self, *args, **kwargs):
        if self.site.key.startswith("blocks.1"):
            raise LookupError("mine")
        merged(self, *args, **kwargs)

    monkeypatch.setattr(linear, "merge", merge)
    with pytest.raises(LookupError, match="mine"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["default"])
    assert {tuple(layer.merged_adapters) for layer in model._registry.layers.values()} == {("other",)}
    close(dict(model.named_parameters()), before)


# the update


def twice(original: Any, seen: list | None = None) -> Any:
    def get_delta_weight(self, adapter, *args, **kwargs):
        if seen is not None:
            seen.append(adapter)
        return 2 * original(self, adapter, *args, **kwargs)

    return get_delta_weight


@pytest.mark.parametrize("config, kind", [(ALL, "Linear"), (STACKS, "ParamWrapper")], ids=["Linear", "ParamWrapper"])
def test_get_delta_weight_replaced(config, kind, monkeypatch):
    """Merging writes what it gives; several adapters of a parameter run with it, too, whatever runs around that."""
    models = dict(zip(BOTH, pair(config)))
    before = models["ours"](X)
    for lib in BOTH.values():
        cls = layer_of(lib, kind)
        monkeypatch.setattr(cls, "get_delta_weight", twice(cls.get_delta_weight))
    close(models["ours"](X), models["theirs"](X))
    assert torch.equal(models["ours"](X), before)
    for name, model in models.items():
        model.add_adapter("other", BOTH[name].api.LoraConfig(**config))
        model.base_model.set_adapter(["default", "other"])
    models["ours"].load_state_dict(nudged(models["theirs"]).state_dict())
    close(models["ours"](X), models["theirs"](X))
    monkeypatch.undo()
    before = models["ours"](X)
    for lib in BOTH.values():
        cls = layer_of(lib, kind)
        monkeypatch.setattr(cls, "get_delta_weight", twice(cls.get_delta_weight))
    assert torch.equal(models["ours"](X), before) == (kind == "Linear")
    for lib in BOTH.values():
        cls = layer_of(lib, kind)
        monkeypatch.setattr(cls, "forward", lambda self, *a, _original=cls.forward, **k: _original(self, *a, **k))
    close(models["ours"](X), models["theirs"](X))
    for model in models.values():
        model.merge_adapter(safe_merge=True)
    close(models["ours"](X), models["theirs"](X))
    assert not torch.allclose(models["ours"](X), before, rtol=1e-3)
    models["ours"].unmerge_adapter()
    monkeypatch.undo()
    assert torch.equal(models["ours"](X), before)
    close(copy.deepcopy(models["ours"]).merge_and_unload()(X), before)


def test_a_replaced_update_trains(monkeypatch):
    theirs, ours = pair(STACKS)
    for model, lib in ((theirs, PEFT), (ours, GRAFT)):
        model.add_adapter("other", lib.api.LoraConfig(**STACKS))
        model.base_model.set_adapter(["default", "other"])
        cls = layer_of(lib, "ParamWrapper")
        monkeypatch.setattr(cls, "get_delta_weight", twice(cls.get_delta_weight))
    ours.load_state_dict(nudged(theirs).state_dict())
    grads = []
    for model in (theirs.train(), ours.train()):
        model(X).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    close(grads[1], grads[0], rtol=1e-3, atol=1e-2)
    assert any(g.abs().max() > 0 for g in grads[1].values())


@pytest.mark.differs("`get_delta_weight` replaced on a layer class or a layer")
@pytest.mark.parametrize("why", ["DoRA", "shape", "raises"])
def test_an_update_that_cannot_be_taken_leaves_nothing_merged(why, monkeypatch):
    linear = layer_of(GRAFT, "Linear")
    model = nudged(GRAFT.wrap(base(), ALL | {"use_dora": why == "DoRA"}))
    expected, before = model(X), {n: p.clone() for n, p in model.named_parameters()}
    original = linear.get_delta_weight

    def get_delta_weight(self, adapter):
        if not self.site.key.startswith("blocks.1") or why == "DoRA":
            return original(self, adapter)
        if why == "raises":
            raise LookupError("mine")
        return original(self, adapter)[:2]

    monkeypatch.setattr(linear, "get_delta_weight", get_delta_weight)
    kind, text = {
        "DoRA": (NotImplementedError, "replaced by tests.compat.test_replaced.*does more than add"),
        "shape": (graft.UnsupportedLayerError, r"blocks.1.*it returned \(2, "),
        "raises": (LookupError, "mine"),
    }[why]
    for merge in (model.merge_adapter, partial(model.merge_adapter, safe_merge=True)):
        with pytest.raises(kind, match=text):
            merge()
        assert not any(layer.merged for layer in model._registry.layers.values())
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(X), expected)


@pytest.mark.differs(
    "replacing another method of a layer class, or of a tuner where it makes layers (`_create_new_module`, …); a "
    "class body that overrides any of these"
)
@pytest.mark.parametrize("name", ["update_layer", "_activate_lora", "forward_of_mine"])
def test_other_methods_are_refused(name):
    with pytest.raises(AttributeError, match=rf"setting Linear\.{name} would change nothing"):
        setattr(layer_of(GRAFT, "Linear"), name, lambda self: None)


def test_a_client_keeps_the_original_on_the_class(monkeypatch):
    """SimpleTuner's mark of its work, by which it also puts things back."""
    kind, (_, model) = layer_of(GRAFT, "Linear"), pair(ALL)
    expected, original = model(X), kind.forward
    monkeypatch.setattr(kind, "_their_original_forward", original, raising=False)
    monkeypatch.setattr(kind, "forward", lambda self, x, *args, **kwargs: original(self, x, *args, **kwargs) + 1)
    assert not torch.equal(model(X), expected)
    kind.forward = kind._their_original_forward
    assert kind.forward is original and torch.equal(model(X), expected)


def test_classes_without_layers_say_so(monkeypatch):
    with pytest.warns(graft.PeftWarning, match="_LoraParameterProxy.forward was replaced: graft has no such layers"):
        monkeypatch.setattr(layer_of(GRAFT, "_LoraParameterProxy"), "forward", lambda self, W: W)
    warns(graft.PeftWarning, None, monkeypatch.undo)


def test_adapter_names_for_one_layer():
    model = GRAFT.wrap(base(), LINEAR)
    with pytest.raises(graft.RoutingError, match="Pass them to the PeftModel"):
        model.base_model.model.blocks[0].k._mixed_batch_forward(X, adapter_names=["default"] * 4)


@pytest.mark.differs("`layer.lora_variant[…]`")
def test_variants_of_a_layer():
    model = GRAFT.wrap(base(), TARGETS | {"target_modules": ["k"]})
    model.add_adapter("dora", graft.LoraConfig(target_modules=["k"], use_dora=True))
    layer = model.base_model.model.blocks[0].k
    assert list(layer.lora_variant) == ["dora"]
    assert layer.lora_variant["dora"].supports_lora_conversion() == layer.supports_lora_conversion("dora")
    with pytest.raises(AttributeError, match=r"merge\(\) and unmerge\(\)"):
        layer.lora_variant["dora"].merge_unsafe(layer, "dora", layer.weight)
    assert not GRAFT.wrap(base(), LINEAR, "VeraConfig").base_model.model.blocks[0].k.lora_variant
    variants = layer.lora_variant
    assert len(variants) == 1 and "default" not in variants
    model.delete_adapter("dora")
    assert "dora" not in variants
