# SPDX-License-Identifier: Apache-2.0
"""`add_weighted_adapter` in PEFT and in graft: tensors, configs, files, errors."""

import inspect
from functools import cache

import peft
import pytest
import torch

import graft
from graft.combine.rules import SVD, TYPES
from tests import models
from tests.combine.several import (
    LAYERS,
    UNGROUPED,
    base,
    batch,
    build,
    delta,
    factors,
    layer,
    lora,
    loras,
    randomize,
)  # fmt: skip
from tests.pair import LIBS, close, outcome, trainable

CLOSE = 5e-5  # updates are of order ten
NAMES, WEIGHTS = ["x", "y", "z"], [1.3, -0.5, 0.7]
TYPES_OF_PEFT = [t for t in TYPES if t != "exact"]


def options(kind):
    return {} if kind in ("linear", "cat", "svd") else {"density": 0.6}


@cache
def pair():
    """The same three adapters in both libraries; combinations get names of their own."""
    return loras(graft), loras(peft)


def both(name, kind, **more):
    """Both with this combination in them."""
    for model in pair():
        if name not in model.peft_config:
            model.add_weighted_adapter(NAMES, WEIGHTS, name, combination_type=kind, **{**options(kind), **more})
    return pair()


@pytest.mark.parametrize("kind", [t for t in TYPES_OF_PEFT if "dare" not in t])
@pytest.mark.parametrize("key", UNGROUPED)
def test_tensors(kind, key):
    ours, theirs = both(kind, kind)
    if kind != "svd":  # signs of singular vectors are free; those of a dense matrix come out alike
        for a, b in zip(factors(ours, key, kind), factors(theirs, key, kind)):
            close(a, b, 1e-5)
    close(delta(ours, key, kind), delta(theirs, key, kind), CLOSE)


@pytest.mark.parametrize("kind", ["ties", "ties_svd"])
def test_votes_by_frequency(kind):
    ours, theirs = both(f"{kind}_f", kind, majority_sign_method="frequency")
    for key in UNGROUPED:
        close(delta(ours, key, f"{kind}_f"), delta(theirs, key, f"{kind}_f"), CLOSE)
        assert not torch.allclose(delta(ours, key, f"{kind}_f"), delta(both(kind, kind)[0], key, kind))


@pytest.mark.parametrize("kind", [t for t in TYPES if "dare" in t])
def test_random_masks(kind):
    """Both draw initial values for the new adapter first, and then the same masks."""
    name = f"{kind}_masked"
    for model in pair():
        with models.seeded(11):
            model.add_weighted_adapter(NAMES, WEIGHTS, name, combination_type=kind, density=0.6)
    ours, theirs = pair()
    for key in UNGROUPED:
        close(delta(ours, key, name), delta(theirs, key, name), CLOSE)


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune_svd"])
def test_a_density_that_prunes_nothing(kind, density=1.5):
    ours, theirs = both(f"{kind}_all", kind, density=density)
    for key in UNGROUPED:
        close(delta(ours, key, f"{kind}_all"), delta(theirs, key, f"{kind}_all"), CLOSE)
    again = outcome(lambda: ours.add_weighted_adapter(NAMES, WEIGHTS, "again", combination_type=kind, density=density))
    ours.delete_adapter("again")
    assert len(again.warned(f"The density {density} is greater than or equal to 1, no pruning will be performed")) == 1


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_rank_of_truncation(kind, rank):
    ours, theirs = both(f"{kind}_{rank}", kind, svd_rank=rank)
    for key in UNGROUPED:
        close(delta(ours, key, f"{kind}_{rank}"), delta(theirs, key, f"{kind}_{rank}"), CLOSE)
        assert [t.shape for t in factors(ours, key, f"{kind}_{rank}")] == [
            t.shape for t in factors(theirs, key, f"{kind}_{rank}")
        ]


def test_clamping():
    """On a dense matrix, where the singular vectors come out alike."""
    ours, theirs = both("clamped", "magnitude_prune_svd", svd_clamp=0.8)
    for key in UNGROUPED:
        for a, b in zip(factors(ours, key, "clamped"), factors(theirs, key, "clamped")):
            close(a, b, 1e-5)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_grouped_convolution(kind):
    """PEFT cannot form ΔW there, and puts cat's channels into the wrong groups: test_weighted.py."""
    if kind in ("cat", "svd"):
        assert outcome(lambda: loras(peft, targets=["grouped"]).merge_adapter(["x"])).kind is NotImplementedError
        return
    made = [loras(lib, targets=["grouped"]) for lib in LIBS]
    for model in made:
        model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=kind, density=0.6)
    for a, b in zip(*(factors(m, "grouped", "new") for m in made)):
        close(a, b, 1e-6)


# what else the call does


def facts(config):
    left_out = {"runtime_config", *getattr(config, "beyond", ())}
    values = {k: v for k, v in config.to_dict().items() if k not in left_out}
    return {k: sorted(v) if isinstance(v, (set, list)) else v for k, v in values.items()}


@pytest.mark.parametrize("kind", TYPES_OF_PEFT)
def test_config_and_state(kind):
    ours, theirs = both(kind, kind)
    assert facts(ours.peft_config[kind]) == facts(theirs.peft_config[kind])
    assert ours.active_adapters == theirs.active_adapters == ["x"]
    assert trainable(ours) == trainable(theirs)
    assert {k for k in ours.state_dict() if k.split(".")[-1] == kind or f".{kind}." in k} == {
        k for k in theirs.state_dict() if k.split(".")[-1] == kind or f".{kind}." in k
    }


TARGETS = {
    "same": (["lin", "out"], ["lin", "out"]),
    "overlapping": (["lin"], ["lin", "out"]),
    "disjoint": (["lin", "emb"], ["out"]),
    "patterns": ("lin|emb", "lin|out"),
}


@pytest.mark.parametrize("kind", ["linear", "ties", "svd", "ties_svd"])
@pytest.mark.parametrize("targets", TARGETS)
def test_different_targets(targets, kind):
    made = [build(lib, {n: lora(lib, t) for n, t in zip("xy", TARGETS[targets])}) for lib in LIBS]
    for model in made:
        model.add_weighted_adapter(["x", "y"], [0.7, -0.4], "new", combination_type=kind, **options(kind))
    assert facts(made[0].peft_config["new"]) == facts(made[1].peft_config["new"])
    for key in {"same": "lin out", "overlapping": "lin out"}.get(targets, "lin out emb").split():
        close(delta(made[0], key, "new"), delta(made[1], key, "new"), CLOSE)


@pytest.mark.parametrize("kind", TYPES)
def test_a_single_adapter_is_scaled(kind):
    if kind == "exact":  # graft's own: as the others
        ours = loras(graft)
        ours.add_weighted_adapter(["y"], [-0.3], "single", combination_type=kind)
        close(delta(ours, "lin", "single"), -0.3 * delta(ours, "lin", "y"), CLOSE)
        return
    for model in pair():
        model.add_weighted_adapter(["y"], [-0.3], f"single_{kind}", combination_type=kind)
    ours, theirs = pair()
    for key in UNGROUPED:
        for a, b in zip(factors(ours, key, f"single_{kind}"), factors(theirs, key, f"single_{kind}")):
            close(a, b, 1e-6)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties_svd"])
def test_files_go_both_ways(kind, tmp_path):
    ours, theirs = both(kind, kind)
    x = batch()
    for lib, model, other in ((graft, ours, peft), (peft, theirs, graft)):
        folder = tmp_path / lib.__name__
        model.save_pretrained(folder, selected_adapters=[kind])
        loaded = [l.PeftModel.from_pretrained(base(), folder / kind) for l in (lib, other)]
        model.set_adapter(kind)
        for m in loaded:
            close(m(**x), model(**x), 1e-5)
        model.set_adapter("x")


@pytest.mark.parametrize("kind", ["linear", "cat", "exact"])
def test_peft_loads_rank_patterns(kind, tmp_path):
    ranks = {"lin": 3, "out": 2, "emb": 3, "conv": 1}
    configs = {n: lora(graft, r=2, rank_pattern={k: r for k, r in ranks.items() if r != 2}) for n in "xy"}
    ours = build(graft, configs)
    ours.add_weighted_adapter(["x", "y"], [0.7, -0.4], "new", combination_type=kind)
    ours.save_pretrained(tmp_path, selected_adapters=["new"])
    ours.set_adapter("new")
    for lib in LIBS:
        loaded = lib.PeftModel.from_pretrained(base(), tmp_path / "new")
        close(loaded(**batch()), ours(**batch()), 1e-5)
        assert len(factors(loaded, "conv", "default")[0]) == (1 if kind == "linear" else 2)


# errors

X, XY = ["x"], ["x", "y"]
ERRORS = {
    "unknown": (["x", "nope"], [1, 1], {}, "Adapter nope does not exist"),
    "type": (XY, [1, 1], dict(combination_type="foo"), "Invalid combination_type: foo"),
    "ranks": (["x", "r3"], [1, 1], dict(combination_type="linear"), "All adapters must have the same r value"),
    "ranks of ties": (["x", "r3"], [1, 1], dict(combination_type="ties", density=0.5), "All adapters must have the"),
    "types of targets": (
        ["x", "pattern"],
        [1, 1],
        {},
        "all adapter configs should follow the same target modules type",
    ),
    "density": (XY, [1, 1], dict(combination_type="ties", density=-1.0), "Density should be >= 0, got -1.0"),
    "no adapter": ([], [], {}, ""),
    "no density": (XY, [1, 1], dict(combination_type="ties"), ""),
    "heads": (["saved", "saved2"], [1, 1], {}, "Cannot add weighted adapters if they target the same module with"),
}


@cache
def troubled(lib):
    configs = {n: lora(lib, ["lin", "out"]) for n in "xy"}
    configs["r3"] = lora(lib, ["lin", "out"], r=3)
    configs["pattern"] = lora(lib, "lin|out")
    configs["saved"] = lora(lib, ["lin"], modules_to_save=["head"])
    configs["saved2"] = lora(lib, ["lin"], modules_to_save=["head"])
    return build(lib, configs)


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    names, weights, more, text = ERRORS[case]
    ours, theirs = (outcome(lambda l=l: troubled(l).add_weighted_adapter(names, weights, case, **more)) for l in LIBS)
    assert isinstance(ours.error, graft.PeftError) and isinstance(ours.error, theirs.kind)
    assert text in str(theirs.error) and text in str(ours.error)
    assert case not in troubled(graft).peft_config  # PEFT keeps the half-made adapter


def test_signatures():
    for name in ("LoraModel", "IA3Model"):
        ours, theirs = (
            [
                (p.name, p.default)
                for p in inspect.signature(getattr(lib, name).add_weighted_adapter).parameters.values()
            ]
            for lib in LIBS
        )
        assert ours[1:] == theirs[1:], name


# IA3


def ia3(lib, targets=("lin", "out", "conv"), inner=("out",), **more):
    inner = inner if isinstance(inner, str) else list(inner)
    targets = targets if isinstance(targets, str) else list(targets)
    return lib.IA3Config(target_modules=targets, feedforward_modules=inner, **more)


def vectors(model, key):
    return layer(model, key).ia3_l


def test_ia3():
    made = [build(lib, {n: ia3(lib) for n in "xyz"}) for lib in LIBS]
    for model in made:
        model.add_weighted_adapter(NAMES, WEIGHTS, "new")
    ours, theirs = made
    for key in ("lin", "out", "conv"):
        close(vectors(ours, key)["new"], vectors(theirs, key)["new"], 1e-6)
    assert facts(ours.peft_config["new"]) == facts(theirs.peft_config["new"])
    assert trainable(ours) == trainable(theirs) and ours.active_adapters == theirs.active_adapters


def test_ia3_with_patterns():
    made = [build(lib, {"x": ia3(lib, "lin", "none"), "y": ia3(lib, "lin|out", "out")}) for lib in LIBS]
    for model in made:
        model.add_weighted_adapter(["x", "y"], [0.7, 0.3], "new")
    assert facts(made[0].peft_config["new"]) == facts(made[1].peft_config["new"])
    close(vectors(made[0], "lin")["new"], vectors(made[1], "lin")["new"], 1e-6)


IA3_ERRORS = {
    "unknown": (["x", "nope"], "Adapter nope does not exist"),
    "mixed": (["x", "pattern"], "All adapter configs should have the same type for target and feedforward modules."),
    "heads": (["saved", "saved2"], "Cannot add weighted adapters"),
}


@pytest.mark.parametrize("case", IA3_ERRORS)
def test_ia3_errors(case):
    names, text = IA3_ERRORS[case]
    results = []
    for lib in LIBS:
        configs = {
            "x": ia3(lib),
            "pattern": ia3(lib, "lin", "out"),
            **{h: ia3(lib, modules_to_save=["head"]) for h in ("saved", "saved2")},
        }
        model = build(lib, configs)
        results.append(outcome(lambda m=model: m.add_weighted_adapter(names, [1, 1], "new")))
    ours, theirs = results
    assert ours.kind is theirs.kind is ValueError and text in str(ours.error) and text in str(theirs.error)


assert set(SVD) <= set(TYPES) and set(UNGROUPED) < set(LAYERS) and randomize


@pytest.mark.parametrize("kind", [t for t in TYPES_OF_PEFT if "dare" in t])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_pruning_draws_what_peft_draws(kind, dtype):
    """The new adapter's initial values come first, and what is drawn afterwards is the same, too."""
    found = []
    for lib in LIBS:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)).to(dtype)
        config = lib.LoraConfig(target_modules=["0", "1", "2"], r=4, init_lora_weights=False)
        model = lib.get_peft_model(net, config, "x")
        model.add_adapter("y", config)
        g = torch.Generator().manual_seed(3)
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.data.copy_(torch.randn(p.shape, generator=g))
        torch.manual_seed(7)
        model.add_weighted_adapter(["x", "y"], [0.7, 0.6], "z", combination_type=kind, density=0.5)
        after = torch.rand(1)
        found.append([after, *(m.get_delta_weight("z").detach() for m in model.base_model.model)])
    for a, b in zip(*found):
        close(a, b, CLOSE)
