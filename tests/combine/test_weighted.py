# SPDX-License-Identifier: Apache-2.0
"""What a combination must be, whatever PEFT gives: sums in what a layer computes, best truncations, all or nothing."""

import peft
import pytest
import torch
from torch.testing import assert_close

import graft
from graft.combine import rules
from tests import models
from tests.combine.several import LAYERS, UNGROUPED, base, batch, build, delta, factors, layer, lora, loras, snapshot
from tests.models import seeded
from tests.raised import refuses

NAMES, WEIGHTS = ["x", "y", "z"], [1.3, -0.5, 0.7]
INPUTS = {"lin": (4, 10), "out": (4, 12), "c1d": (4, 9), "conv": (2, 3, 5, 4), "point": (2, 5, 4, 3)}


def given(key):
    with seeded(3):
        if key == "emb":
            return torch.randint(0, 13, (3, 5))
        return torch.randn(INPUTS.get(key, (2, 6, 4, 3)))


def added(model, key, name):
    """What an adapter adds to the output of a layer."""
    x = given(key)
    model.set_adapter(name)
    with torch.no_grad():
        return layer(model, key)(x) - layer(model, key).base_layer(x)


def total(model, key):
    """ΣΔ of the combination, in float64. (out, fan_in)"""
    return sum(w * delta(model, key, n).double().flatten(1) for n, w in zip(NAMES, WEIGHTS))


@pytest.mark.parametrize("kind", ["exact", "cat"])
@pytest.mark.parametrize("key", LAYERS)
def test_the_layer_adds_the_weighted_sum(kind, key):
    model = loras(graft, targets=[key])
    wanted = sum(w * added(model, key, n) for n, w in zip(NAMES, WEIGHTS))
    report = model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=kind)
    assert_close(added(model, key, "new"), wanted, rtol=1e-4, atol=1e-4)
    assert report.energy[key] == 1.0


@pytest.mark.differs("`add_weighted_adapter`")
@pytest.mark.parametrize("kind", ["exact", "svd"])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("key", UNGROUPED)
def test_no_adapter_of_that_rank_comes_closer(kind, rank, key):
    model = loras(graft)
    report = model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=kind, svd_rank=rank)
    full = total(model, key)
    U, S, Vh = torch.linalg.svd(full, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    made = delta(model, key, "new").double().flatten(1)
    scale = float(full.norm())
    assert abs(float((made - full).norm()) - float((best - full).norm())) < 1e-5 * scale
    assert abs(report.energy[key] - float(S[:rank].square().sum() / S.square().sum())) < 1e-5
    assert len(factors(model, key, "new")[0]) == min(rank, *full.shape) == report.ranks[key]


@pytest.mark.differs("combining: `svd`, `cat` on a convolution with groups")
def test_grouped_convolutions_are_truncated_group_by_group():
    model = loras(graft, targets=["grouped"])
    full = [[f.flatten(1) for f in factors(model, "grouped", n)] for n in NAMES]
    model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type="svd", svd_rank=4)
    A, B = (f.flatten(1) for f in factors(model, "grouped", "new"))
    scalings = [layer(model, "grouped").scaling[n] for n in NAMES]
    for group, outputs in enumerate((slice(0, 2), slice(2, 4))):
        sums = sum(w * s * b[outputs] @ a[group : group + 1] for (a, b), w, s in zip(full, WEIGHTS, scalings))
        made = B[outputs] @ A[2 * group : 2 * group + 2]
        U, S, Vh = torch.linalg.svd(sums, full_matrices=False)
        assert_close(made, (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.differs("combining: `svd`")
@pytest.mark.parametrize("kind", ["exact", "svd"])
def test_no_matrix_of_a_layers_size_is_decomposed(kind, monkeypatch):
    model, seen, svd = loras(graft, targets=["lin", "out", "conv"]), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda M, *a, **k: seen.append(M.shape[-2:]) or svd(M, *a, **k))
    model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=kind, svd_rank=2)
    assert len(seen) == 3 and all(max(shape) <= 3 * 2 for shape in seen)  # three adapters of rank 2


@pytest.mark.differs('`combination_type="exact"`')
@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_linear_rules_have_cross_terms(kind):
    """A and B are combined apart, as in PEFT, so their product is not the sum. `exact` is."""
    model = loras(graft)
    options = {} if kind == "linear" else {"density": 0.9}
    model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=kind, **options)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="exact")
    for key in UNGROUPED:
        full = total(model, key).float()
        assert float((delta(model, key, "new").flatten(1) - full).norm() / full.norm()) > 0.05
        assert_close(delta(model, key, "sum").flatten(1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.differs("a combination whose rank is above the dimensions of a layer")
@pytest.mark.parametrize("kind", ["exact", "cat", "svd"])
def test_ranks_by_layer_survive_a_file(kind, tmp_path):
    configs = {n: lora(graft, ["lin", "out", "conv"], r=2 + i, rank_pattern={"out": 1}) for i, n in enumerate("xy")}
    model = build(graft, configs)
    model.add_weighted_adapter(["x", "y"], [0.7, -1.1], "new", combination_type=kind)
    ranks = {key: len(factors(model, key, "new")[0]) for key in ("lin", "out", "conv")}
    assert ranks == ({"lin": 3, "out": 3, "conv": 3} if kind == "svd" else {"lin": 5, "out": 2, "conv": 5})
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = graft.PeftModel.from_pretrained(base(), tmp_path / "new").eval()
    model.set_adapter("new")
    assert_close(loaded(**batch()), model(**batch()), rtol=1e-6, atol=1e-6)


@pytest.mark.differs("combining: a call that fails on the way")
@pytest.mark.parametrize("kind", ["exact", "ties", "dare_linear_svd"])
def test_a_combination_that_fails_changes_nothing(kind, monkeypatch):
    model = loras(graft)
    before, keys = snapshot(model), list(model.peft_config)

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    calls = {"exact": "truncate_product", "ties": "add_agreeing", "dare_linear_svd": "truncate_matrix"}
    monkeypatch.setattr(rules, calls[kind], broken)
    options = {"svd_rank": 2} if kind == "exact" else {"density": 0.5}
    with pytest.raises(RuntimeError, match="out of memory"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=kind, **options)
    after = snapshot(model)
    assert list(model.peft_config) == keys and after.keys() == before.keys()
    assert all(torch.equal(after[k], t) for k, t in before.items())


@pytest.mark.differs("combining: other methods")
@pytest.mark.parametrize("name", ["VeraConfig", "HRAConfig"])
def test_methods_that_cannot_hold_a_sum_say_so(name):
    cfg = lambda: getattr(graft, name)(r=2, target_modules=["lin"])
    model = graft.get_peft_model(base(), cfg(), "x")
    model.add_adapter("y", cfg())
    with pytest.raises(
        NotImplementedError, match=r"combined into one.*set_adapter\(\[…\]\), or merge them.*PeftMixedModel"
    ):
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new")
    assert list(model.peft_config) == ["x", "y"]


OF_ANY = {  # methods with a ΔW whose parameters hold no sum, and others that have a form of their own
    "v": ("VeraConfig", dict(r=5)),
    "h": ("HiraConfig", dict(r=2)),
    "m": ("MissConfig", dict(r=3)),
    "d": ("LoraConfig", dict(r=2, lora_alpha=5, use_dora=True)),
    "o": ("LoHaConfig", dict(r=2)),
}
WEIGHT = {"v": 0.7, "h": -0.4, "m": 1.3, "d": 0.5, "o": -1.1}


def mixture(targets, names=tuple(OF_ANY), **more):
    model = None
    for name in names:
        kind, values = {**OF_ANY, **more}[name]
        config = getattr(graft, kind)(target_modules=list(targets), **values)
        if model is None:
            model = graft.get_peft_model(base(), config, name, mixed=True)
        else:
            model.add_adapter(name, config)
    with torch.no_grad(), seeded(5):
        for p_name, p in model.named_parameters():
            if any(f".{name}." in f"{p_name}." for name in names):
                p.add_(torch.randn(p.shape), alpha=0.3)
    return model.eval()


@pytest.mark.differs("combining: `PeftMixedModel`")
@pytest.mark.parametrize("key", ["lin", "c1d", "emb", "conv"])
def test_a_lora_adapter_holds_the_sum_of_others_of_any_methods(key):
    model = mixture([key])
    wanted = sum(w * added(model, key, n) for n, w in WEIGHT.items())
    report = model.add_weighted_adapter([*WEIGHT], [*WEIGHT.values()], "new", combination_type="exact")
    assert model.peft_config["new"].peft_type == "LORA" and model.active_adapters == ["o"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".new" in n)
    assert_close(added(model, key, "new"), wanted, rtol=1e-3, atol=1e-3)
    assert report.energy[key] > 0.99999


@pytest.mark.parametrize("key", ["lin", "c1d", "conv"])
def test_truncated_as_well_as_can_be(key):
    model = mixture([key], "vho")
    report = model.add_weighted_adapter(["v", "h", "o"], [0.7, -0.4, 1.2], "new", svd_rank=2)
    full = sum(w * delta(model, key, n).double() for n, w in zip("vho", (0.7, -0.4, 1.2)))
    full = layer(model, key).op.canon(full).flatten(1)
    lost = torch.linalg.svdvals(full)[2:].square().sum()
    made = layer(model, key).op.canon(delta(model, key, "new")).double().flatten(1)
    assert_close((made - full).square().sum(), lost, rtol=1e-3, atol=1e-6)
    assert report.ranks == {key: 2} and abs(report.energy[key] - float(1 - lost / full.square().sum())) < 1e-4


def test_groups_of_a_convolution_stay_apart():
    model = mixture(["grouped"], "hmol", l=("LoraConfig", dict(r=4, lora_alpha=3)))
    weights = [0.7, -0.4, 1.2, -0.9]
    wanted = sum(w * added(model, "grouped", n) for n, w in zip("hmol", weights))
    model.add_weighted_adapter([*"hmol"], weights, "new", combination_type="exact")
    assert_close(added(model, "grouped", "new"), wanted, rtol=1e-3, atol=1e-3)


def test_a_combination_of_any_methods_survives_a_file(tmp_path):
    model = mixture(["lin", "out", "conv"], "vhm")
    model.add_weighted_adapter(["v", "h", "m"], [1.0, 0.5, -0.5], "new", combination_type="exact")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = graft.PeftModel.from_pretrained(base(), tmp_path / "new").eval()
    model.set_adapter("new")
    assert_close(loaded(**batch()), model(**batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, options", [("linear", {}), ("svd", {"svd_rank": 3}), ("ties", {"density": 0.6})])
def test_adapters_of_one_method_combine_in_a_mixed_model_as_in_their_own(kind, options):
    more = {n: ("LoraConfig", dict(r=2, lora_alpha=a)) for n, a in (("x", 2.74), ("y", 5.5))}
    model = mixture(["lin", "conv"], "xyv", **more)
    alone = graft.get_peft_model(base(), model.peft_config["x"], "x")
    alone.add_adapter("y", model.peft_config["y"])
    alone.load_state_dict(model.state_dict(), strict=False)
    for m in (model, alone):
        m.add_weighted_adapter(["x", "y"], [0.7, -0.3], "new", combination_type=kind, **options)
    for key in ("lin", "conv"):
        for a, b in zip(factors(model, key, "new"), factors(alone, key, "new")):
            assert_close(a, b)


def test_ia3_in_a_mixed_model_adds_its_vectors():
    more = {n: ("IA3Config", dict(feedforward_modules=[])) for n in "xy"}
    model = mixture(["lin"], "xyv", **more)
    model.add_weighted_adapter(["x", "y"], [0.7, 0.3], "new")
    l = layer(model, "lin").ia3_l
    assert_close(l["new"], 0.7 * l["x"] + 0.3 * l["y"])


@pytest.mark.parametrize(
    "kind, text", [("svd", "Lily does not add to the weight"), ("linear", "acts on LoRA's factors separately")]
)
def test_what_has_no_sum_in_a_mixed_model_changes_nothing(kind, text):
    model = mixture(["lin"], "via", i=("LilyConfig", dict(r=2, num_B=2, stride_A=1)), a=("VeraConfig", dict(r=5)))
    before = snapshot(model)
    names = ["v", "i"] if kind == "svd" else ["v", "a"]
    refuses(NotImplementedError, text, model.add_weighted_adapter, names, [1.0, 1.0], "new", combination_type=kind)
    after = snapshot(model)
    assert list(model.peft_config) == ["v", "i", "a"] and after.keys() == before.keys()
    refuses(graft.AdapterNotFoundError, "zz", model.add_weighted_adapter, ["v", "zz"], [1.0, 1.0], "new")
    with pytest.raises(TypeError, match=r"weights should be a list, one for each of \['v', 'a'\], got 0.5"):
        model.add_weighted_adapter(["v", "a"], 0.5, "new")


def lohas(targets, **options):
    cfg = lambda alpha: graft.LoHaConfig(r=2, alpha=alpha, target_modules=list(targets), **options)
    return build(graft, {name: cfg(alpha) for name, alpha in (("x", 2.74), ("y", 5.5), ("z", 1.1))})


@pytest.mark.differs("combining: LoHa")
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("key", LAYERS)
def test_a_loha_adapter_holds_the_sum_of_others(key, effective):
    model = lohas([key], use_effective_conv2d=effective)
    report = model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type="exact")
    assert_close(delta(model, key, "new").double().flatten(1), total(model, key), rtol=1e-4, atol=1e-4)
    assert_close(
        added(model, key, "new"), sum(w * added(model, key, n) for n, w in zip(NAMES, WEIGHTS)), rtol=1e-4, atol=1e-4
    )
    assert report.energy[key] > 0.9999


def test_loha_truncates_as_well_as_can_be_and_survives_a_file(tmp_path):
    model = lohas(["lin", "conv", "point"])
    report = model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type="svd", svd_rank=3)
    for key in ("lin", "conv", "point"):
        full = total(model, key)
        lost = torch.linalg.svdvals(full)[3:].square().sum()
        made = delta(model, key, "new").double().flatten(1)
        assert_close((made - full).square().sum(), lost, rtol=1e-3, atol=1e-6)
        assert abs(report.energy[key] - float(1 - lost / full.square().sum())) < 1e-4
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = graft.PeftModel.from_pretrained(base(), tmp_path / "new").eval()
    model.set_adapter("new")
    assert_close(loaded(**batch()), model(**batch()), rtol=1e-6, atol=1e-6)


def test_rules_on_factors_mean_nothing_for_loha():
    with pytest.raises(NotImplementedError, match=r"LOHA adapters do not have\. Use cat, svd or exact"):
        lohas(["lin"]).add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type="linear")


# token rows

ROWS = {
    "one": ([3, 5], None),
    "lists": ([3, 5], [5, 7]),
    "by name": ({"wte": [3, 5]}, {"transformer.wte": [7, 5]}),
    "a list and a name": ([3, 5], {"wte": [5, 7]}),
    "embedding and head": ({"wte": [3, 5], "lm_head": [2]}, {"wte": [5]}),
    "several times": ([3, 5, 3], [3, 5, 3]),
}


def with_rows(lib, a, b, net=None):
    configs = {n: lora(lib, ["c_attn"], trainable_token_indices=t) for n, t in (("x", a), ("y", b))}
    return build(lib, configs, models.make("gpt2") if net is None else net)


def table(model, name, module="transformer.wte"):
    """The weight of a module with the rows of an adapter in it."""
    model.set_adapter(name)
    return model.base_model.model.get_submodule(module).weight.detach().clone()


@pytest.mark.differs("`add_weighted_adapter` of adapters with trainable token rows")
@pytest.mark.parametrize("kind", ["linear", "exact", "dare_ties_svd"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_token_rows_add_up_by_weight(rows, kind):
    model = with_rows(graft, *rows)
    plain = models.make("gpt2")
    density = 0.6 if "dare" in kind else None
    model.add_weighted_adapter(["x", "y"], [1.3, -0.5], "new", kind, density=density)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "new" in n)
    for module in ("transformer.wte", "lm_head"):
        W = plain.get_submodule(module).weight.detach()
        wanted = W + 1.3 * (table(model, "x", module) - W) - 0.5 * (table(model, "y", module) - W)
        assert_close(table(model, "new", module), wanted)


def test_rows_of_one_adapter_at_full_weight_are_its_own():
    model = with_rows(graft, [3, 5], [5, 7])
    model.add_weighted_adapter(["x"], [1.0], "new")
    assert torch.equal(table(model, "new"), table(model, "x"))


@pytest.mark.parametrize("lib", [graft, peft], ids=["graft", "peft"])
@pytest.mark.parametrize("rows", list(ROWS.values())[1:], ids=list(ROWS)[1:])
def test_added_rows_survive_a_file(rows, lib, tmp_path):
    model, ids = with_rows(graft, *rows), torch.tensor([[1, 3, 5, 7, 2]])
    model.add_weighted_adapter(["x", "y"], [0.7, 0.6], "new", "cat")
    model.set_adapter("new")
    wanted = model(ids).logits
    model.save_pretrained(str(tmp_path), selected_adapters=["new"])
    loaded = lib.PeftModel.from_pretrained(models.make("gpt2"), str(tmp_path / "new")).eval()
    assert_close(loaded(ids).logits, wanted)


def test_rows_that_the_head_would_share_with_the_embedding_and_cannot():
    """Each trains one token of both, the sum would train both tokens of both, tied."""
    model = with_rows(graft, {"wte": [3], "lm_head": [5]}, {"wte": [5], "lm_head": [3]})
    before = snapshot(model)
    with pytest.raises(graft.ConfigError, match="'lm_head' shares its weight with the embedding"):
        model.add_weighted_adapter(["x", "y"], [0.7, 0.6], "new")
    assert before.keys() == model.state_dict().keys() and "new" not in model.peft_config


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(combination_type="svd", svd_rank=2.0), "svd_rank must be an int, got 2.0"),
        (dict(combination_type="svd", svd_clamp="x"), "`svd_clamp` is a quantile, between 0 and 1, got x"),
        (dict(combination_type="ties", density="x"), "Density should be >= 0, got x"),
    ],
)
def test_numbers_that_are_none(options, text):
    model = graft.get_peft_model(models.make("mlp"), graft.LoraConfig(target_modules=["fc1"]))
    model.add_adapter("b", graft.LoraConfig(target_modules=["fc1"]))
    with pytest.raises((graft.ConfigError, graft.ConfigTypeError), match=text):
        model.add_weighted_adapter(["default", "b"], [1, 1], "c", **options)
    refuses(graft.ConfigTypeError, r"top_k must be an int, got 2\.5", graft.reduce_intruder_dimension, model, top_k=2.5)
    assert set(model.peft_config) == {"default", "b"}


@pytest.mark.parametrize("kind", ["linear", "cat", "exact", "svd", "ties_svd"])
@pytest.mark.parametrize("weight", [1e39, 3e38, float("nan")])
def test_weights_that_float32_does_not_hold(kind, weight):
    """1e39 is a number in Python; 3e38 is one in float32, and its products are none."""
    model = loras(graft, targets=["lin"])
    before = snapshot(model)
    with torch.no_grad():
        for p in layer(model, "lin").lora_B["x"].parameters():
            p.mul_(1e25)
    options = {"density": 0.5} if kind == "ties_svd" else {}
    with pytest.raises(graft.ConfigError, match=r"not finite on layer 'lin'|finite in float32, got"):
        model.add_weighted_adapter(["x", "y"], [weight, 1.0], "new", kind, **options)
    assert before.keys() == model.state_dict().keys() and "new" not in model.peft_config


def test_weights_of_vectors_that_float32_does_not_hold():
    model = graft.get_peft_model(models.make("mlp"), graft.IA3Config(target_modules=["fc1"], feedforward_modules=[]))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.constant_(p, 10.0)
    for weight in (1e39, 3e38):
        with pytest.raises(graft.ConfigError, match=r"not finite on layer|finite in float32, got"):
            model.add_weighted_adapter(["default"], [weight], "new")
    assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize("scale", [1e39, float("inf"), float("nan")])
def test_scales_that_float32_does_not_hold(scale):
    model = loras(graft, targets=["lin"])
    refuses(graft.ConfigError, "cannot scale an adapter by", layer(model, "lin").set_scale, "x", scale)
