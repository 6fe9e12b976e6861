# SPDX-License-Identifier: Apache-2.0
"""KaSA beyond the matrix and the comparison of samples: the truncated base, the loss, combinations, refusals."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import graft
from graft.serving import AdapterSlots
from tests.models import adapted, nudged, seeded
from tests.raised import refuses

LIBS = (graft, peft)
R = 3


def net(dtype=torch.float32) -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8, bias=False)).to(dtype)


def config(lib=graft, r=R, **options):
    return lib.LoraConfig(
        r=r, lora_alpha=5, target_modules=["0", "2"], kasa_config=lib.KasaConfig(beta=0.1, gamma=0.3), **options
    )


def with_kasa(lib=graft, base=None, adapters=("default",), ranks=(R, R), **options):
    configs = {name: config(lib, r) for name, r in zip(adapters, ranks)}
    return nudged(adapted(net() if base is None else base, configs, lib=lib, scale=0, **options))


def inputs(dtype=torch.float32):
    with seeded(2):
        return torch.randn(70, 10).to(dtype)


def truncated(W: torch.Tensor, r: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return (U[:, :-r] * S[:-r]) @ Vh[:-r]


# the base weight


def test_the_base_loses_its_smallest_components_and_keeps_the_others():
    base = net()
    before = [base[i].weight.clone() for i in (0, 2)]
    model = with_kasa(base=base)
    for W, layer in zip(before, (model.base_model.model[0], model.base_model.model[2])):
        assert_close(layer.base_layer.weight.double(), truncated(W, R), rtol=1e-5, atol=1e-6)
    plain = model.unload()
    assert torch.linalg.matrix_rank(plain[0].weight, rtol=1e-5) == 10 - R, "for good"


@pytest.mark.differs("KaSA: a second adapter of the same or a lower rank")
def test_a_second_adapter_of_the_rank_leaves_the_base_as_the_first_has_it():
    """Rounding makes small components anew, which must not be taken out again."""
    model = with_kasa(base=net(torch.bfloat16))
    weight = model.base_model.model[0].base_layer.weight.clone()
    y = model(inputs(torch.bfloat16))
    with seeded(4):
        model.add_adapter("b", config())
    assert torch.equal(model.base_model.model[0].base_layer.weight, weight)
    assert torch.equal(model(inputs(torch.bfloat16)), y)


@pytest.mark.parametrize("merged", [False, True])
def test_a_second_adapter_of_higher_rank_takes_out_more(merged):
    base = net()
    W = base[0].weight.clone()
    model = with_kasa(base=base)
    if merged:
        model.merge_adapter()
    with seeded(4):
        model.add_adapter("b", config(r=5))
    if merged:
        assert model.base_model.model[0].merged_adapters == ["default"]
        model.unmerge_adapter()
    assert_close(model.base_model.model[0].base_layer.weight.double(), truncated(W, 5), rtol=1e-5, atol=1e-5)


def test_a_failure_gives_the_base_back(tmp_path):
    base = net()
    before = {name: p.clone() for name, p in base.state_dict().items()}
    with pytest.raises(graft.ConfigError, match=r"`r` \(8\) to be smaller than min\(in_features, out_features\) \(8\)"):
        graft.get_peft_model(base, config(r=8))
    with_kasa().save_pretrained(tmp_path)
    weights = graft.load_peft_weights(tmp_path)
    torch.save({k: v for k, v in weights.items() if "lora_diag" not in k}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    refuses(graft.AdapterKeyError, "lora_diag", graft.PeftModel.from_pretrained, base, tmp_path)
    assert type(base[0]) is nn.Linear
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())


@pytest.mark.parametrize("writer", LIBS)
@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_loaded_adapter_has_the_truncated_base(writer, light, merge, tmp_path):
    """PEFT defers it with low_cpu_mem_usage, to the first forward pass or merge."""
    model = with_kasa(writer)
    model.save_pretrained(tmp_path)
    for lib in LIBS:
        loaded = lib.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=light)
        if merge:
            loaded.merge_adapter()
        for _ in range(2):
            assert_close(loaded(inputs()), model(inputs()), rtol=1e-5, atol=1e-5)
        if merge:
            loaded.unmerge_adapter()
        weights = (m.base_model.model[0].base_layer.weight for m in (loaded, model))
        assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.differs("KaSA on a base on the meta device")
def test_a_base_without_values_says_that_something_is_missing():
    with torch.device("meta"):
        base = net()
    with pytest.warns(graft.PeftWarning, match="changes base weights that are on the meta device"):
        model = graft.get_peft_model(base, config())
    assert all(p.is_meta for p in model.parameters())
    whole = with_kasa()
    model.load_state_dict(whole.state_dict(), assign=True)
    assert_close(model.eval()(inputs()), whole(inputs()))


@pytest.mark.differs("KaSA on Conv1D")
def test_a_transposed_weight():
    with seeded(0):
        base = nn.Sequential(Conv1D(12, 10))
        nn.init.normal_(base[0].weight)
    W = base[0].weight.detach().T.clone()
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = graft.get_peft_model(base, graft.LoraConfig(r=R, target_modules=["0"], kasa_config={}))
    assert_close(base[0].base_layer.weight.detach().T.double(), truncated(W, R), rtol=1e-5, atol=1e-5)
    y = nudged(model)(inputs())
    model.merge_adapter()
    assert_close(model(inputs()), y, rtol=1e-5, atol=1e-5)


# training


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_with_its_loss_gives_pefts_parameters(optimizer):
    trained = []
    for lib in LIBS:
        model = with_kasa(lib).train()
        steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for i in range(5):
            with seeded(i):
                x, target = torch.randn(70, 10), torch.randn(70, 8)
            loss = (model(x) - target).square().mean() + model._get_kasa_loss()
            steps.zero_grad()
            loss.backward()
            steps.step()
        trained.append({name: p for name, p in model.named_parameters()})
        assert model.base_model._get_kasa_loss(["default"]) == model._get_kasa_loss("default") > 0
    assert trained[0].keys() == trained[1].keys()
    for name, p in trained[1].items():
        assert_close(trained[0][name], p, rtol=1e-4, atol=1e-5)


def test_the_loss_is_of_the_adapters_that_are_asked_for():
    model = with_kasa(adapters=("default", "b"))
    one, other = model._get_kasa_loss(), model._get_kasa_loss("b")
    assert one != other
    assert_close(model._get_kasa_loss(["default", "b"]), one + other)
    refuses(ValueError, "zz", model._get_kasa_loss, "zz")
    plain = graft.get_peft_model(net(), graft.LoraConfig(target_modules=["0"]))
    assert plain._get_kasa_loss() == 0.0


# the config


def test_the_config_in_a_file(tmp_path):
    config().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values["kasa_config"] == {"beta": 0.1, "gamma": 0.3}
    for lib in LIBS:
        assert lib.PeftConfig.from_pretrained(tmp_path).kasa_config == lib.KasaConfig(beta=0.1, gamma=0.3)
    path.write_text(json.dumps(values | {"kasa_config": {"beta": 0.1, "delta": 3}}))
    with pytest.warns(UserWarning, match=r"\['delta'\] for class KasaConfig"):
        assert graft.PeftConfig.from_pretrained(tmp_path).kasa_config == graft.KasaConfig(beta=0.1)


# combinations


def deltas(model, *names):
    layer = model.base_model.model[0]
    return [layer.get_delta_weight(name).detach() for name in names]


@pytest.mark.differs("combining: KaSA")
def test_a_combination_counts_the_singular_values_in(tmp_path):
    """PEFT adds up B A without them."""
    model = with_kasa(adapters=("default", "b"))
    weights = model.base_model.model[0].base_layer.weight.clone()
    model.add_weighted_adapter(["default"], [-0.7], "scaled")
    a, b, scaled = deltas(model, "default", "b", "scaled")
    assert_close(scaled, -0.7 * a, rtol=1e-5, atol=1e-6)
    model.add_weighted_adapter(["default", "b"], [0.6, -0.8], "sum", "svd")
    (found,) = deltas(model, "sum")
    U, S, Vh = torch.linalg.svd(0.6 * a - 0.8 * b)
    assert_close(found, (U[:, :R] * S[:R]) @ Vh[:R], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.base_model.model[0].base_layer.weight, weights)
    assert (model.base_model.model[0].lora_diag["sum"] == 1).all()
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = graft.PeftModel.from_pretrained(net(), tmp_path / "sum")
    assert_close(loaded(inputs()), model.eval()(inputs()), rtol=1e-5, atol=1e-5)


def test_factors_apart_are_combined_with_the_values_in_a():
    model = with_kasa(adapters=("default", "b"))
    layer = model.base_model.model[0]
    model.add_weighted_adapter(["default", "b"], [0.6, 0.8], "sum", "linear")
    A, B = (
        sum(w**0.5 * f for w, f in zip((0.6 * 5 / 3, 0.8 * 5 / 3), pair))
        for pair in zip(
            *((layer.lora_diag[n][:, None] * layer.lora_A[n].weight, layer.lora_B[n].weight) for n in ("default", "b"))
        )
    )
    assert_close(deltas(model, "sum")[0], (B @ A).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cat", "exact"])
def test_a_combination_of_higher_rank_is_refused(kind):
    """Its config would take more out of the base, now and when it is loaded."""
    model = with_kasa(adapters=("default", "b"))
    weights = model.base_model.model[0].base_layer.weight.clone()
    with pytest.raises(graft.ConfigError, match=r"on layer '0'.*would be 6"):
        model.add_weighted_adapter(["default", "b"], [0.6, -0.8], "sum", kind)
    assert list(model.peft_config) == ["default", "b"]
    assert torch.equal(model.base_model.model[0].base_layer.weight, weights)


# refusals


def test_what_belongs_to_a_truncated_base_is_not_put_on_another(tmp_path):
    model = with_kasa()
    model.save_pretrained(tmp_path)
    plain = graft.get_peft_model(net(), graft.LoraConfig(r=R, target_modules=["0", "2"]))
    for carrier in (plain, model):
        with pytest.raises(graft.ConfigError, match="belongs to base weights that kasa_config changed"):
            graft.hotswap_adapter(carrier, str(tmp_path), "default")
    with pytest.raises(graft.ConfigError, match="belongs to base weights that kasa_config changed"):
        graft.prepare_model_for_compiled_hotswap(model, target_rank=8)
    refuses(graft.ConfigError, "kasa_config", AdapterSlots(net(), 2, 4, ["0", "2"]).load, "a", tmp_path)
    with pytest.raises(graft.ConfigError, match="no form for the base weights as they were"):
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path))
    assert not (tmp_path / "converted" / "adapter_config.json").exists()
