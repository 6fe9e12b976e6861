# SPDX-License-Identifier: Apache-2.0
"""AdapterLayer: activation, scaling, and merging beyond the laws of the matrix."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.errors import ConfigError
from graft.model import functional
from tests.conformance.samples import SAMPLES
from tests.looks import layers, merged
from tests.models import adapted, disturb, seeded
from tests.raised import refuses, warns
from tests.samples import BY_THEMSELVES

X = torch.linspace(-1, 1, 30).view(5, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


CONFIGS = {
    "LORA": dict(r=2, lora_alpha=6),
    "LOHA": dict(r=2, alpha=3),
    "IA3": dict(feedforward_modules=["two"]),
    "OFT": dict(oft_block_size=2),
    "HRA": dict(r=2),
}


def config(method="LORA", targets=("one", "two"), **options):
    options = {**CONFIGS.get(method, {}), **options}
    return graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=list(targets), **options)


def net_with(*adapters, method="LORA", base=None, **options):
    """A net with disturbed adapters of these names."""
    return adapted(Net if base is None else base, dict.fromkeys(adapters, config(method, **options)), seed=0)


def weights(model):
    return {name: t.clone() for name, t in graft.get_base_model_state_dict(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# activation


def test_activating_decides_who_runs_and_who_trains():
    model = net_with("a", "b")
    layer = layers(model)["one"]
    assert model.active_adapters == layer.active_adapters == layer.active_adapter == ["a"]
    model.set_adapter("b")
    assert all(p.requires_grad for p in layer.parameters_of("b"))
    assert not any(p.requires_grad for p in layer.parameters_of("a"))
    model.base_model.set_adapter(["b", "a"])
    assert layer.active_adapter == ["b", "a"] and all(p.requires_grad for p in layer.parameters_of("a"))
    model.set_adapter("a", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_layer_without_the_active_adapter_is_the_base():
    model = net_with("a")
    with seeded(1):
        model.add_adapter("b", config(targets=["two"]))
    disturb(model)
    model.set_adapter("b")
    one, two = layers(model).values()
    h = torch.tanh(one.base_layer(X))
    assert torch.equal(torch.tanh(one(X)), h)
    assert not torch.equal(two(h), two.base_layer(h))


def test_an_adapter_that_comes_again_under_its_name_acts_in_its_new_way():
    model = net_with("a", "b", targets=["two"])
    layer, h = layers(model)["two"], torch.randn(5, 8)
    layer(h)  # the plan is kept from here on
    model.set_adapter("b")
    model.delete_adapter("a")
    with seeded(7):
        model.add_adapter("a", config(targets=["two"], use_dora=True))
    model.set_adapter("a")
    expected = disturb(model)(X)
    model.merge_adapter()
    assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_adapter_is_refused_and_nothing_changes():
    model = net_with("a")
    for call in (model.set_adapter, model.delete_adapter, model.set_requires_grad):
        refuses(graft.AdapterNotFoundError, r"zz.*Loaded adapters: a", call, "zz")
    assert model.active_adapters == ["a"]


@pytest.mark.parametrize("method", ["OFT", "HRA"])
def test_the_order_of_activation_is_the_order_of_action(method):
    options = dict(oft_block_size=3) if method == "OFT" else {}  # plane rotations would commute
    model = net_with("a", "b", method=method, targets=["one"], **options)
    model.base_model.set_adapter(["a", "b"])
    ab = model(X)
    model.base_model.set_adapter(["b", "a"])
    ba = model(X)
    assert (ab - ba).abs().max() > 1e-4
    model.merge_adapter()
    assert_close(model(X), ba, rtol=1e-5, atol=1e-5)


# scaling


@pytest.mark.parametrize("method", ["LORA", "LOHA"])
def test_scaling(method):
    model = net_with("a", "b", method=method)
    layer = layers(model)["one"]
    start = layer.scaling["a"]
    layer.set_scale("a", 2)
    layer.set_scale("a", 3)
    assert layer.scaling == {"a": 3 * start, "b": start}, "relative to the configured scaling"
    layer.scale_layer(0.5)
    layer.scale_layer(4)
    assert layer.scaling == {"a": pytest.approx(6 * start), "b": start}, "of the active ones, relative to now"
    layer.unscale_layer(4)
    assert layer.scaling["a"] == pytest.approx(1.5 * start)
    layer.unscale_layer()
    assert layer.scaling["a"] == start


def test_a_scaled_adapter_adds_as_much_more():
    model = net_with("a", targets=["two"])
    layer = layers(model)["two"]
    x = torch.randn(2, 8)
    update = layer(x) - layer.base_layer(x)
    layer.set_scale("a", 2)
    assert_close(layer(x) - layer.base_layer(x), 2 * update, rtol=1e-4, atol=1e-6)
    layer.set_scale("a", 0)
    assert_close(layer(x), layer.base_layer(x))
    layer.unscale_layer()
    layer.merge()
    W = layer.base_layer.weight.clone()
    layer.unmerge()
    layer.set_scale("a", 2)
    layer.merge()
    assert_close(layer.base_layer.weight - W, W - layers(net_with("a", targets=["two"]))["two"].weight)


def test_scaling_by_no_number():
    layer = layers(net_with("a"))["one"]
    start = layer.scaling["a"]
    for bad in (float("nan"), float("inf"), -float("inf")):
        for call in (lambda v: layer.set_scale("a", v), layer.scale_layer, layer.unscale_layer):
            refuses(ConfigError, "'one' cannot scale an adapter by", call, bad)
    refuses(ConfigError, "by 0", layer.unscale_layer, 0)
    assert layer.scaling == {"a": start}


def test_scaling_of_an_unknown_adapter_does_nothing():
    layer = layers(net_with("a"))["one"]
    layer.set_scale("zz", 2)
    assert set(layer.scaling) == {"a"}


@pytest.mark.parametrize("method", ["IA3", "OFT", "HRA"])
def test_what_has_no_scaling_says_so(method):
    model = net_with("a", method=method)
    layer, before = layers(model)["one"], model(X)
    for call in (lambda: layer.set_scale("a", 2), lambda: layer.scale_layer(2), lambda: layer.unscale_layer(2)):
        warns(graft.PeftWarning, r"Scaling has no meaning.*one", call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.scale_layer(1)
        layer.unscale_layer()
    assert torch.equal(model(X), before)


# merging some of several


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("steps", [[["a"], ["b"]], [["b"], ["a"]], [["a", "b"]], [["b"]], [[]]], ids=str)
def test_merging_in_steps(method, steps):
    model = net_with("a", "b", method=method)
    before = weights(model)
    names = [name for step in steps for name in step]
    model.base_model.set_adapter(names)
    expected = model(X)
    for step in steps:
        model.merge_adapter(step)
    assert merged(model) == names
    assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    if not names:
        return
    model.unmerge_adapter()
    assert merged(model) == []
    for name, t in weights(model).items():
        assert_close(t, before[name], rtol=1e-6, atol=1e-6)
    assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_merging_twice_says_so_and_does_nothing():
    model = net_with("a", "b")
    model.merge_adapter()
    once = weights(model)
    warns(UserWarning, "All adapters are already merged", model.merge_adapter)
    with pytest.warns(UserWarning, match=r"Already following adapters were merged a. .*additionally merging b"):
        model.merge_adapter(["a", "b"])
    assert not same(weights(model), once) and merged(model) == ["a", "b"]
    model.unmerge_adapter()
    warns(UserWarning, "Already unmerged", model.unmerge_adapter)


def test_merging_takes_a_list_of_known_names():
    model = net_with("a")
    refuses(TypeError, r"list of strings.*\['a'\]", model.merge_adapter, "a")
    refuses(graft.AdapterNotFoundError, "zz", model.merge_adapter, ["a", "zz"])
    assert merged(model) == []


@pytest.mark.differs("unmerging after more training")
def test_unmerging_takes_out_what_was_merged_though_it_has_been_trained_since():
    model = net_with("a")
    before = weights(model)
    model.merge_adapter()
    disturb(model)
    layers(model)["one"].set_scale("a", 5)
    model.unmerge_adapter()
    for name, t in weights(model).items():
        assert_close(t, before[name], rtol=1e-6, atol=1e-6)


@pytest.mark.differs("disabling while merged")
def test_switching_or_disabling_while_merged_unmerges_at_once():
    model = net_with("a", "b")
    before, a = weights(model), model(X)
    model.set_adapter("b")
    b = model(X)
    model.merge_adapter()
    warns(UserWarning, "Unmerging the model first", model.set_adapter, "a")
    assert merged(model) == []
    assert_close(model(X), a)
    model.merge_adapter()
    with model.disable_adapter():
        assert merged(model) == []
        assert_close(model(X), Net.forward(model.get_base_model(), X))
    assert_close(model(X), a)
    assert (a - b).abs().max() > 1e-3
    for name, t in weights(model).items():
        assert_close(t, before[name], rtol=1e-6, atol=1e-6)


def test_a_merged_adapter_cannot_be_deleted():
    model = net_with("a", "b")
    model.merge_adapter()
    refuses(ValueError, r"Cannot delete adapter.*'a'.*merged", model.delete_adapter, "a")
    assert "a" in model.peft_config
    model.delete_adapter("b")
    model.unmerge_adapter()
    model.delete_adapter("a")
    assert model.peft_config == {} and torch.equal(model(X), Net.forward(model.get_base_model(), X))


def spoil(model, adapter, layer="two"):
    p = next(layers(model)[layer].parameters_of(adapter))
    with torch.no_grad():
        p.view(-1)[0] = torch.nan


@pytest.mark.parametrize("method", CONFIGS)
def test_a_merge_that_fails_half_way_leaves_nothing_merged(method):
    model = net_with("a", method=method)
    spoil(model, "a")  # the second of two layers
    before = weights(model)
    refuses(ValueError, r"NaNs detected.*'two'", model.merge_adapter, safe_merge=True)
    assert merged(model) == []
    now = weights(model)
    for name, t in before.items():
        assert_close(now[name], t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_second_merge_that_fails_leaves_the_first(method):
    model = net_with("a", "b", method=method)
    spoil(model, "b")
    model.merge_adapter(["a"])
    expected = model(X)
    refuses(ValueError, "NaNs detected", model.merge_adapter, ["b"], safe_merge=True)
    assert merged(model) == ["a"]
    assert all(layer.merged_adapters == ["a"] for layer in layers(model).values())
    assert_close(model(X), expected, rtol=1e-6, atol=1e-6)


def test_a_failed_merge_and_unload_leaves_the_model():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Conv1d(8, 4, 1, groups=2)

        def forward(self, x):
            return self.two(self.one(x)[..., None])

    model = net_with("a", base=Grouped())
    expected = model(X)
    refuses(NotImplementedError, r"'two': Merging is not supported .* groups > 1", model.merge_and_unload)
    assert_close(model(X), expected)
    assert merged(model) == []


def test_unloading_gives_the_base_back():
    base = Net().eval()
    expected, names = base(X), base.state_dict().keys()
    model = net_with("a", base=base)
    assert model.unload() is base
    assert torch.equal(base(X), expected) and base.state_dict().keys() == names
    again = net_with("a", base=base)
    assert (again(X) - expected).abs().max() > 1e-3, "it can be adapted anew"


# replaced layers


def normed(**options):
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
    with seeded(0):
        net[0].weight.data.normal_()
        model = graft.get_peft_model(net, graft.LNTuningConfig(target_modules=["0"], **options), "a")
        model.add_adapter("b", graft.LNTuningConfig(target_modules=["0"]))
    return disturb(model).eval()


def test_a_replacement_is_swapped_in_and_out():
    model = normed()
    layer = layers(model)["0"]
    base, own, expected = layer.base_layer, dict(layer.ln_tuning_layers), model(X)
    model.merge_adapter()
    assert layer.base_layer is own["a"] and torch.equal(model(X), expected)
    warns(UserWarning, r"Unmerging \['a'\] first", model.merge_adapter, ["b"])
    assert layer.base_layer is own["b"] and layer.merged_adapters == ["b"]
    model.unmerge_adapter()
    assert layer.base_layer is base and dict(layer.ln_tuning_layers) == own and torch.equal(model(X), expected)


def test_two_replacements_cannot_stand_in_for_one_layer():
    model = normed()
    refuses(ValueError, "activate one", model.base_model.set_adapter, ["a", "b"])
    refuses(ValueError, r"merge one|activate one", model.merge_adapter, ["a", "b"])
    assert model.active_adapters == ["a"] and merged(model) == []


def test_a_merged_replacement_moves_and_trains_with_the_model():
    model = normed()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(X.double()).dtype == torch.float64


def test_a_merged_and_unloaded_replacement_is_the_layer():
    model = normed()
    expected, own = model(X), layers(model)["0"].ln_tuning_layers["a"]
    plain = model.merge_and_unload()
    assert plain[0] is own and torch.equal(plain(X), expected)


# what is easily overlooked


@pytest.mark.differs("merging in half precision")
def test_a_merge_rounds_once():
    """In half precision the sum is made in float32."""
    for method in ("LORA", "LOHA"):
        model = net_with("a", method=method, base=Net().bfloat16().eval())
        layer = layers(model)["one"]
        expected = (layer.weight.float() + layer.get_delta_weight("a").float()).bfloat16()
        model.merge_adapter()
        assert torch.equal(layer.weight, expected)


def test_adding_an_adapter_leaves_what_trains():
    model = net_with("a")
    model.get_base_model().two.base_layer.bias.requires_grad_(True)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("b", config())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert any(name.endswith("two.base_layer.bias") for name in before)


@pytest.mark.parametrize("training", [True, False])
def test_adapters_are_in_the_mode_of_the_model(training):
    model = net_with("a", lora_dropout=0.5, base=Net().train(training)).train(training)
    model.add_adapter("b", config(lora_dropout=0.5))
    acts = [m for name, m in model.base_model.model.named_modules() if "lora_A." not in name and "lora_B." not in name]
    assert {m.training for m in acts} == {training}


def test_a_model_can_be_adapted_in_inference_mode():
    model = net_with("a")
    expected = model(X)
    with torch.inference_mode():
        assert_close(model(X), expected)
        model.merge_adapter()
        assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
    assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


class Standardized(nn.Conv2d):
    """A subclass with a forward of its own, as in timm."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x)[0]


FOLDING = ("OFT", "HRA")  # on convolutions they run the layer's function with another weight


@pytest.mark.parametrize("method", CONFIGS)
def test_a_layer_with_a_forward_of_its_own_keeps_it_or_is_refused(method):
    base, x = nn.Sequential(Standardized(2, 3, 3)).eval(), torch.linspace(-1, 1, 50).view(1, 2, 5, 5)
    expected = base(x)
    cfg = config(method, ["0"], **({"feedforward_modules": []} if method == "IA3" else {}))
    if method in FOLDING:
        refuses(graft.UnsupportedLayerError, "Standardized", graft.get_peft_model, base, cfg)
    else:
        assert_close(graft.get_peft_model(base, cfg)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_whose_parent_reads_its_weight_in_eval_mode_is_called(training):
    x = X.view(1, 5, 6)
    with seeded(0):
        base = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).train(training)
    model = disturb(graft.get_peft_model(base, config(targets=["linear1"])))
    with seeded(1):
        adapted_to = model(x)
    with model.disable_adapter(), seeded(1):
        assert (model(x) - adapted_to).abs().max() > 1e-4


# what other libraries look at


def test_the_attributes_of_a_layer():
    layer = layers(net_with("a", "b"))["one"]
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (6, 8)
    assert layer.get_base_layer() is layer.base_layer and not layer.merged
    assert layer.adapter_layer_names == tuple(
        f"lora_{x}" for x in ("A", "B", "embedding_A", "embedding_B", "magnitude_vector")
    )
    assert {"r", "lora_alpha", "scaling", "lora_dropout"} <= set(layer.other_param_names)
    assert "lora" in repr(layer) and "active=['a']" in repr(layer)


@pytest.mark.differs("`get_delta_weight`")
@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.method in ("LORA", "VERA", "LOHA") and s.label != "dora"], ids=str
)
def test_the_delta_weight_is_what_merging_adds(sample):
    from tests.conformance.samples import LAYERS, REFUSED, STORES, Cell, find

    for place in LAYERS:
        cell = Cell(sample, place, STORES[0])
        if place.name not in ("linear", "Conv1D", "conv2d") or find(REFUSED, sample, place) or cell.unmergeable:
            continue
        model = cell.trained()
        layer = layers(model)["layer"]
        before, delta = layer.weight.clone(), layer.get_delta_weight("default")
        model.merge_adapter()
        assert_close(layer.weight - before, delta, rtol=1e-4, atol=1e-5)
    refuses(graft.AdapterNotFoundError, "zz", layer.get_delta_weight, "zz")


@pytest.mark.differs("aLoRA: `get_delta_weight`, weighted sums")
@pytest.mark.parametrize("method", ["IA3", "ALoRA"])
def test_an_adapter_without_a_delta_says_so(method):
    options = (
        dict(feedforward_modules=[]) if method == "IA3" else dict(alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    )
    config = graft.IA3Config if method == "IA3" else graft.LoraConfig
    model = graft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), config(target_modules=["0"], **options))
    with pytest.raises(NotImplementedError, match=f"'default' has no ΔW on layer '0': {method} does not add"):
        layers(model)["0"].get_delta_weight("default")


# dtypes


@pytest.mark.parametrize(
    "sample", [s for s in BY_THEMSELVES if s.method not in ("TRAINABLE_TOKENS", "LN_TUNING")], ids=str
)
def test_under_autocast(sample):
    net = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 30))  # each sample's groups and blocks fit
    with seeded(0):
        x = torch.randn(4, 30)
        options = {**sample.config, "feedforward_modules": ["2"]} if sample.method == "IA3" else sample.config
        model = graft.get_peft_model(
            net, graft.PEFT_TYPE_TO_CONFIG_MAPPING[sample.method](target_modules=["0", "2"], **options)
        )
    disturb(model)
    with seeded(1):  # of what is random in training
        expected = model(x)
    with torch.autocast("cpu", torch.bfloat16), seeded(1):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() / expected.abs().max() < 0.05
    y.float().square().sum().backward()
    for p in model.parameters():
        assert (p.grad is not None) == p.requires_grad
        assert p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all())


# deleting from one layer


@pytest.mark.parametrize("kind", ["layer", "saved", "tokens"])
def test_deleting_the_active_adapter_of_one_part_chooses_the_next(kind):
    with seeded(0):
        base = nn.Sequential(nn.Embedding(5, 6), Net())
    options = dict(modules_to_save=["two"]) if kind == "saved" else {}
    options |= dict(trainable_token_indices={"0": [1]}) if kind == "tokens" else {}
    model = net_with("x", "y", "z", base=base, targets=["one"], **options)
    net = model.base_model.model[1]
    part = {"layer": net.one, "saved": net.two, "tokens": model.base_model.model[0]}[kind]
    model.set_adapter("z")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part.delete_adapter("y")
    assert part.active_adapters == ["z"]
    warns(UserWarning, "z was active which is now deleted. Setting active adapter to x", part.delete_adapter, "z")
    assert part.active_adapters == part.adapters == ["x"]
    own = {n for n, p in part.named_parameters() if p.requires_grad}
    assert own and all("x" in n.split(".") for n in own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part.delete_adapter("x")
    assert part.active_adapters == part.adapters == []


def test_deleting_from_one_layer_runs_what_is_chosen():
    model = net_with("x", "y")
    layer = model.base_model.model.one
    model.set_adapter("x")
    y = layer(X)
    model.set_adapter("y")
    warns(UserWarning, "Setting active adapter to x", layer.delete_adapter, "y")
    assert torch.equal(layer(X), y)
    model.base_model.model.two.delete_adapter("y", ["x"])  # without a word: the caller chose
    assert model.base_model.model.two.active_adapters == ["x"]


@pytest.mark.parametrize("wrapped", [True, False])
def test_deleting_from_a_model_says_once_who_is_next(wrapped):
    model = net_with("x", "y", "z", targets=["one"], modules_to_save=["two"])
    model.set_adapter("z")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if wrapped:
            model.delete_adapter("z")
        else:
            functional.delete_adapter(model.base_model.model, "z")
    assert [str(w.message) for w in record] == [
        "Adapter z was active which is now deleted. Setting active adapter to x."
    ]
