# SPDX-License-Identifier: Apache-2.0
"""LoftQ: quantization in plain torch, and replacing the values of an adapter on a quantized model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.methods.lora.loftq import BLOCK, NF4, loftq_init, round_to_bits
from tests import models
from tests.conformance.stores import Rounded, held
from tests.looks import layers
from tests.raised import refuses


def weight(out=24, fan_in=40):
    with models.seeded(0):
        return torch.randn(out, fan_in)


@pytest.mark.differs("LoftQ")
def test_four_bits_are_the_nearest_of_sixteen_values():
    W = weight()
    Q = round_to_bits(W, 4)
    blocks = W.flatten().split(BLOCK)
    for w, q in zip(blocks, Q.flatten().split(BLOCK)):
        scale = w.abs().max()
        values = torch.tensor(NF4) * scale
        assert_close(q, values[(w[:, None] - values).abs().argmin(1)])
    assert torch.equal(round_to_bits(Q, 4), Q)  # a quantized weight stays
    assert len(blocks[-1]) == BLOCK and len(round_to_bits(weight(3, 5), 4).flatten()) == 15


def test_eight_bits_are_steps_of_a_row():
    W = weight()
    step = W.abs().amax(1, keepdim=True) / 127
    assert ((round_to_bits(W, 8) - W).abs() <= step / 2 + 1e-7).all()
    assert_close(round_to_bits(W, 8) / step, (round_to_bits(W, 8) / step).round())
    assert not round_to_bits(torch.zeros(2, 3), 8).any() and not round_to_bits(torch.zeros(2, 3), 4).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_product_and_quantized_weight_are_near(bits):
    W, r = weight(), 6
    errors = []
    for rounds in (1, 2, 5):
        Q, A, B = loftq_init(W, bits, r, rounds)
        errors.append(float((W - Q - B @ A).norm()))
        assert_close(B @ A, torch.linalg.svd(W - Q)[0][:, :r] @ torch.linalg.svd(W - Q)[0][:, :r].T @ (W - Q))
    assert max(errors) < 0.95 * (W - round_to_bits(W, bits)).norm()
    assert bits == 8 or errors[0] > errors[1] > errors[2]  # more rounds come nearer
    for narrow in (weight(3, 40), weight(40, 3)):  # of a rank below r: nothing is lost
        Q, A, B = loftq_init(narrow, bits, r)
        assert_close(Q + B @ A, narrow)
    refuses(ValueError, "`loftq_bits` must be one of 4, 8", loftq_init, W, 3, r)
    refuses(ValueError, "`loftq_iter` must be at least 1", loftq_init, W, 4, r, 0)


@pytest.mark.differs("LoftQ with a scaling other than 1")
@pytest.mark.parametrize("name", ["mlp", "conv1D"])
@pytest.mark.parametrize("alpha", [6, 15])
def test_the_adapter_makes_up_for_what_is_lost(name, alpha):
    """For any scaling; PEFT leaves it out of A and B."""
    target = {"mlp": "lin0", "conv1D": "c_fc"}[name]
    options = dict(r=6, lora_alpha=alpha, target_modules=[target], init_lora_weights="loftq")
    model = graft.get_peft_model(models.make(name), graft.LoraConfig(**options, loftq_config=dict(loftq_iter=2)))
    layer = layers(model)[target]
    W = layer.op.canon(dict(models.make(name).named_parameters())[f"{target}.weight"])
    Q, A, B = loftq_init(W, 4, 6, 2)
    assert_close(layer.W0, Q)
    assert_close(layer.op.canon(layer.get_delta_weight("default")), B @ A, atol=1e-5, rtol=1e-4)


def test_the_config():
    refuses(ValueError, "`loftq_config` must be specified", graft.LoraConfig, init_lora_weights="loftq")
    cfg = graft.LoraConfig(init_lora_weights="loftq", loftq_config=graft.LoftQConfig(loftq_bits=8))
    assert cfg.loftq_config == dict(loftq_bits=8, loftq_iter=1)
    with pytest.warns(UserWarning, match="`loftq_config` specified but will be ignored"):
        assert graft.LoraConfig(loftq_config=dict(loftq_bits=8)).loftq_config == {}


def test_a_quantized_base_is_refused():
    base = nn.Sequential(held(nn.Linear(8, 6)))
    cfg = graft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq", loftq_config=dict(loftq_bits=4))
    refuses(graft.ConfigError, "'0' is quantized already", graft.get_peft_model, base, cfg)


# replacing


class Coarse(Rounded):
    """Few steps: much is lost."""

    def hold(self, W):
        super().hold((W / W.abs().max() * 7).round() / 7 * W.abs().max())


def coarse(out=16, alpha=12):
    with models.seeded(0):
        base = nn.ModuleDict({name: nn.Linear(20, out) for name in ("lin", "other", "plain")})
    tensors = {k: v.clone() for k, v in base.state_dict().items()}
    for name in ("lin", "other"):
        base[name] = held(base[name], Coarse)
    cfg = graft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["lin", "other", "plain"])
    return graft.get_peft_model(base, cfg), tensors


@pytest.fixture(autouse=True)
def stores():
    from graft.core.ops import OPS
    from graft.storage.find import STORES

    name = f"{Coarse.__module__}.{Coarse.__qualname__}"
    STORES.add(name, STORES.find(Rounded))
    OPS.add(name, OPS.find(nn.Linear))


@pytest.mark.parametrize("sharded", [False, True])
def test_values_are_replaced_by_what_was_lost(sharded, tmp_path):
    model, tensors = coarse()
    if sharded:
        files = {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}
        for name, file in files.items():
            save_file({name: tensors[name]}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    plain = layers(model)["plain"].lora_A["default"].weight.clone()
    graft.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors" if not sharded else tmp_path))
    for name in ("lin", "other"):
        layer, W = layers(model)[name], tensors[f"{name}.weight"]
        lost = W - layer.W0
        best = torch.linalg.svdvals(lost)[4:].norm()
        assert_close((lost - layer.get_delta_weight("default")).norm(), best, atol=1e-4, rtol=1e-4)
    assert torch.equal(layers(model)["plain"].lora_A["default"].weight, plain)


@pytest.mark.parametrize("out", [1, 3, 16])
@pytest.mark.parametrize("alpha", [-12, 12])
def test_values_for_any_scaling_and_for_layers_narrower_than_the_rank(out, alpha, tmp_path):
    model, tensors = coarse(out, alpha)
    save_file(tensors, tmp_path / "model.safetensors")
    graft.replace_lora_weights_loftq(model, str(tmp_path))
    layer = layers(model)["lin"]
    lost = tensors["lin.weight"] - layer.W0
    best = torch.linalg.svdvals(lost)[4:].norm()
    assert_close((lost - layer.get_delta_weight("default")).norm(), best, atol=1e-4, rtol=1e-4)


def test_a_scaling_of_zero_is_refused(tmp_path):
    model, tensors = coarse()
    layers(model)["other"].scaling["default"] = 0.0
    save_file(tensors, tmp_path / "model.safetensors")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    refuses(graft.ConfigError, "'other' has a scaling of 0", graft.replace_lora_weights_loftq, model, str(tmp_path))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Merging has lost a part")
def test_what_is_merged_holds_the_values_that_came(tmp_path):
    (model, tensors), (first, _) = coarse(), coarse()
    save_file(tensors, tmp_path / "model.safetensors")
    first.load_state_dict(model.state_dict())  # A begins with other numbers
    first.merge_adapter()
    graft.replace_lora_weights_loftq(first, str(tmp_path))
    graft.replace_lora_weights_loftq(model, str(tmp_path))
    model.merge_adapter()
    assert layers(model)["lin"].merged_adapters == layers(first)["lin"].merged_adapters == ["default"]
    wanted = model.state_dict()
    assert all(torch.equal(t, wanted[key]) for key, t in first.state_dict().items())
    tensors["other.weight"] = tensors["other.weight"].T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    refuses(RuntimeError, "size of tensor", graft.replace_lora_weights_loftq, first, str(tmp_path))
    assert all(torch.equal(t, wanted[key]) for key, t in first.state_dict().items())


def test_a_callback_decides(tmp_path):
    model, tensors = coarse()
    save_file(tensors, tmp_path / "model.safetensors")
    asked = []

    def callback(m, name):
        assert m is model and layers(model)[name].lora_B["default"].weight.any()
        asked.append(name)
        return name == "lin"

    graft.replace_lora_weights_loftq(model, str(tmp_path), callback=callback)
    assert asked == ["lin", "other"]
    assert layers(model)["lin"].lora_B["default"].weight.any()
    assert not layers(model)["other"].lora_B["default"].weight.any()


def test_an_error_on_the_way_leaves_all_as_it_was(tmp_path):
    model, tensors = coarse()
    tensors["other.weight"] = tensors["other.weight"].T.contiguous()  # of the same numbers of rows and columns
    save_file(tensors, tmp_path / "model.safetensors")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    refuses(RuntimeError, "size of tensor", graft.replace_lora_weights_loftq, model, str(tmp_path))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.differs("`replace_lora_weights_loftq`")
def test_what_cannot_be_replaced(tmp_path):
    model, tensors = coarse()
    refuses(TypeError, "valid PeftModel", graft.replace_lora_weights_loftq, nn.Linear(2, 2))
    refuses(ValueError, "pass the model_path argument", graft.replace_lora_weights_loftq, model)
    refuses(FileNotFoundError, "Could not find file", graft.replace_lora_weights_loftq, model, str(tmp_path))
    plain = graft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), graft.LoraConfig(target_modules=["0"]))
    refuses(ValueError, "No bnb LoRA module found", graft.replace_lora_weights_loftq, plain, str(tmp_path))
    for wrong, text in ((tensors["lin.weight"][:3].clone(), "is \\(3, 20\\)"), (None, "no weight for layer 'other'")):
        kept = {k: v for k, v in tensors.items() if k != "other.weight"} | (
            {} if wrong is None else {"other.weight": wrong}
        )
        save_file(kept, tmp_path / "model.safetensors")
        refuses(graft.CheckpointError, text, graft.replace_lora_weights_loftq, model, str(tmp_path))
        assert not layers(model)["lin"].lora_B["default"].weight.any()
