# SPDX-License-Identifier: Apache-2.0
"""Several methods on one layer: each acts on what those before it made, and merging agrees with the forward pass."""

import copy

import pytest
import torch
from torch.testing import assert_close

import graft
from graft.core.call import Call
from graft.core.carrier import SharedTensors
from graft.core.layer import AdapterLayer
from graft.core.method import AdaptedLayers
from graft.core.rows import Constant, Rows
from graft.inject.build import add_adapter
from graft.inject.survey import get_site, survey_model
from graft.methods.lora.dylora import DRAWN
from tests.conformance.samples import LAYERS, REFUSED, SAMPLES, UNMERGEABLE, Layer, Sample, find
from tests.covering import Case, Sometimes, law
from tests.models import seeded, trainable

ON = {layer.name: layer for layer in LAYERS}
WHOLE = {"LN_TUNING"}  # stands in for the layer, alone


def fitting(layer: Layer) -> list[Sample]:
    """The samples that act on a layer, can be merged there, leave room for others and need no model to begin."""
    return [
        s
        for s in SAMPLES
        if s.method not in WHOLE
        and not s.prepare
        and find(REFUSED, s, layer) is None
        and find(UNMERGEABLE, s, layer) is None
    ]


def pairs(name: str, first: bool = False) -> list[tuple[Sample, Sample, Layer]]:
    """All ordered pairs on a layer, or those of one sample for each method."""
    layer = ON[name]
    found = fitting(layer)
    if first:
        found = list({s.method: s for s in reversed(found)}.values())
    return [(a, b, layer) for a in found for b in found if a.rewrites == b.rewrites]


CASES = [*pairs("linear"), *pairs("conv2d", True), *pairs("embedding", True), *pairs("Conv1D", True)]


def features(case: tuple[Sample, Sample, Layer]) -> list[tuple]:
    """What a law should meet: each sample first and second, each method on each layer; each pair of methods in this
    order is met by some law."""
    a, b, on = case
    return [
        Sometimes((a.method, b.method), 8),
        (1, str(a)),
        (2, str(b)),
        Sometimes((1, a.method, on.name), 3),
        Sometimes((2, b.method, on.name), 3),
    ]


every_pair = law("a, b, on", [Case(c) for c in CASES], features)


def carried(on: Layer, *samples: Sample) -> AdapterLayer:
    """A layer that carries an adapter of each sample, "a", "b", …, each of which does something."""
    with seeded(0):
        module = torch.nn.ModuleDict({"layer": on.make()})
    layer = AdapterLayer(get_site("layer", module["layer"], survey_model(module)), Call())
    module.requires_grad_(False)
    layer.shared = shared = SharedTensors()  # for adapters that a test adds
    with seeded(1):
        for name, sample in zip("abc", samples):
            cfg = sample.make("default" if name == "a" else "other")
            method = graft.method_of(cfg.peft_type).variant(cfg)(layer.site, cfg, name)
            place(method, layer, cfg, shared)
    with seeded(2), torch.no_grad():
        for name in layer.adapters:
            for p in trainable(layer, name):
                p.add_(torch.randn(p.shape) * 0.3)
    return layer.eval()


def place(method, layer: AdapterLayer, cfg, shared: SharedTensors) -> None:
    if type(method).shares:
        shared.hold(method.name, method.share(AdaptedLayers(layer, [layer.site], cfg)), (None, torch.float32), True)
    add_adapter(layer, method, shared.wrap_containers(), on_meta=False, upcast=True)


def inputs(on: Layer, rows: int = 4) -> torch.Tensor:
    with seeded(3):
        return torch.randint(0, on.ids, (rows, *on.shape)) if on.ids else torch.randn(rows, *on.shape)


def close(ours, theirs, tolerance=2e-5):
    assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@every_pair
def test_forward_is_merged_at_once_and_one_by_one_in_any_order(a, b, on):
    layer, x = carried(on, a, b), inputs(on)
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        for active in (["a", "b"], ["b", "a"]):
            layer.set_adapter(active)
            expected = layer(x)
            for steps in ([["a", "b"]], [["a"], ["b"]], [["b"], ["a"]]):
                if a.method == b.method and len(steps) > 1 and [n for (n,) in steps] != active:
                    continue  # adapters of one method stand in the order in which they are named
                for names in steps:
                    layer.merge(adapter_names=[n for n in active if n in names])
                close(layer(x), expected)
                assert sorted(layer.merged_adapters) == ["a", "b"]
                layer.unmerge()
                close(layer.base_layer.weight, before, 1e-6)
            close(layer(x), expected)


@every_pair
def test_each_acts_on_the_layer_that_those_before_it_made(a, b, on):
    """Both are the second on a base with the first merged into it, unless the second gets the weight as it was."""
    layer, x = carried(on, a, b), inputs(on)
    layer.set_adapter(["a", "b"])
    with torch.no_grad():
        both = layer(x)
        layer.set_adapter(["a"])
        one = layer(x)
        if a.method != b.method:  # of one method, some act inwards
            twin = copy.deepcopy(layer)
            twin.set_adapter(["a"])
            twin.merge(undoable=False)
            twin.state.undo.clear()
            twin.state.merged.clear()
            twin.set_adapter(["b"])
            if not twin.methods["b"].effect.of_weight:
                close(twin(x), both)
        layer.set_adapter(["b"])
        other = layer(x)
    assert (both - one).abs().max() > 1e-3 and (both - other).abs().max() > 1e-3


@every_pair
def test_gradients_reach_both(a, b, on):
    layer, x = carried(on, a, b).train(), inputs(on)
    for carrier in (layer, layer.shared):
        carrier.set_adapter(["a", "b"])
    with (
        seeded(5),
        layer.call.extend_context(facts={(DRAWN, name): Constant(0.9) for name in "ab"}),
    ):  # as a model's call draws
        y = layer(x)
        (y * torch.randn_like(y)).sum().backward()
    for name in "ab":
        for p in trainable(layer, name):
            assert p.grad is not None and p.grad.abs().sum() > 0


@every_pair
def test_rows_of_a_batch_use_either(a, b, on):
    layer, x = carried(on, a, b), inputs(on, 5)
    names = ["b", "__base__", "a", "b", "a"]
    layer.set_adapter(["a", "b"])
    with torch.no_grad():
        with layer.call.use_rows(Rows.from_names(names)):
            mixed = layer(x)
        for row, name in enumerate(names):
            layer.set_adapter([] if name == "__base__" else [name])
            close(mixed[row : row + 1], layer(x[row : row + 1]))


def told_apart(case: tuple[Sample, Sample, Layer]) -> bool:
    """PiSSA leaves singular values of 0, and their vectors, among which SVFT's numbers stand, are rounding."""
    a, b, _ = case
    return not (a.label == "pissa" and b.method == "SVFT")


@law("a, b, on", [Case(c) for c in filter(told_apart, pairs("linear"))], features)
def test_an_adapter_made_while_another_is_merged_is_the_same(a, b, on):
    """W₀ is the weight without adapters, whatever is merged meanwhile."""

    def made(merged: bool) -> AdapterLayer:
        layer = carried(on, a)
        layer.set_adapter(["a"])
        if merged:
            layer.merge()
        cfg = b.make("other")
        with seeded(7):
            place(graft.method_of(cfg.peft_type).variant(cfg)(layer.site, cfg, "b"), layer, cfg, layer.shared)
        if merged:
            assert layer.merged_adapters == ["a"]
            layer.unmerge()
        layer.set_adapter(["b"])
        return layer

    x = inputs(on)
    with torch.no_grad():
        close(made(True)(x), made(False)(x))


@pytest.mark.parametrize("first", [True, False])
def test_what_changes_the_weight_stands_only_beside_its_like(first):
    plain, kasa = SAMPLES[0], next(s for s in SAMPLES if s.rewrites)
    layer = carried(ON["linear"], plain if first else kasa)
    weight = layer.base_layer.weight.clone()
    cfg = (kasa if first else plain).make("other")
    with pytest.raises(ValueError, match=r"KaSA cannot be combined with adapters that don't use KaSA.*'b' next to 'a'"):
        place(graft.method_of("LORA").variant(cfg)(layer.site, cfg, "b"), layer, cfg, layer.shared)
    assert layer.adapters == ["a"] and torch.equal(layer.base_layer.weight, weight)


def test_a_module_that_stands_in_for_the_layer_stands_alone():
    layer = carried(ON["linear"], SAMPLES[0], next(s for s in SAMPLES if s.method == "LN_TUNING"))
    with pytest.raises(ValueError, match=r"'b' replaces the whole layer: activate one"):
        layer.set_adapter(["a", "b"])
