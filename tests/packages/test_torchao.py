# SPDX-License-Identifier: Apache-2.0
"""torchao: the matrix of methods and its tensors, and the traps of layers that round their inputs."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int4Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
from torchao.utils import TorchAOBaseTensor
from transformers import LlamaForCausalLM, TorchAoConfig

import graft
from graft.core.errors import UnsupportedLayerError
from graft.storage import straight
from graft.storage.find import find_store
from tests.models import disturb, seeded
from tests.packages.llama import model_tests
from tests.storage.cells import IN, Kind, cells, identity, linear


def by(config):
    def hold(layer):
        made = copy.deepcopy(layer)
        quantize_(made, config)
        return made

    return hold


def nf4(layer):
    made = copy.deepcopy(layer)
    made.weight = nn.Parameter(to_nf4(layer.weight.data, 64, 160), requires_grad=False)
    return made


GROUPS = dict(weight_dtype=torch.int4, granularity=PerGroup(32))
DYNAMIC = Int8DynamicActivationInt8WeightConfig()
KINDS = [
    Kind("int8", by(Int8WeightOnlyConfig())),
    Kind("int8-dynamic", by(DYNAMIC), 2e-2, rounds_inputs=True),
    Kind("float8", by(Float8WeightOnlyConfig())),
    Kind("intx4", by(IntxWeightOnlyConfig(**GROUPS))),
    Kind("nf4", nf4),
]

globals().update(cells(KINDS))


def by_transformers(config):
    return lambda folder: LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=TorchAoConfig(config)
    )


BASES = {"int8": by_transformers(Int8WeightOnlyConfig()), "int8-dynamic": by_transformers(DYNAMIC)}
for _test in model_tests(BASES, rounding=("int8-dynamic",)):
    globals()[_test.__name__] = _test


# one layer: settings, traps, refusals


X = torch.linspace(-1, 1, 5 * IN).view(5, IN).sin()
INT4 = dict(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
DYNAMIC_INTX = Int8DynamicActivationIntxWeightConfig(**INT4)
SETTINGS = {
    "groups": Int8WeightOnlyConfig(granularity=PerGroup(64)),
    "whole": Float8WeightOnlyConfig(granularity=PerTensor()),
    "e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    "asymmetric": IntxWeightOnlyConfig(**GROUPS, mapping_type=MappingType.ASYMMETRIC),
    "scales": IntxWeightOnlyConfig(**GROUPS, scale_dtype=torch.bfloat16),
    "dynamic": DYNAMIC,
    "dynamic-intx": DYNAMIC_INTX,
}


def same_settings(a, b):
    return all(str(x) == str(y) for x, y in zip(a.__tensor_flatten__()[1].values(), b.__tensor_flatten__()[1].values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_new_weight_is_made_as_the_old_one_was(setting, dtype):
    old, new = (by(SETTINGS[setting])(linear().to(dtype)), linear().to(dtype))
    new.weight.data *= 1.25
    goal = by(SETTINGS[setting])(new).weight
    made = find_store(old).pack(old, new.weight.data)["weight"]
    assert isinstance(made, nn.Parameter) and not made.requires_grad and same_settings(made, goal)
    for name in goal.__tensor_flatten__()[0]:
        ours, theirs = getattr(made, name), getattr(goal, name)
        assert ours.dtype == theirs.dtype
        assert (ours.float() != theirs.float()).float().mean() < 0.01, name


def test_scales_of_inputs_that_smoothing_took_out_of_the_weight():
    layer, scale = linear(), torch.linspace(0.5, 2, IN)
    held = copy.deepcopy(layer)
    made = Int8Tensor.from_hp(layer.weight.data / scale, PerRow(), act_pre_scale=scale)
    held.weight = nn.Parameter(made, requires_grad=False)
    store, W = find_store(held), identity(held)
    assert_close(store.read(held), W)
    assert (W - layer.weight).norm() < 0.01 * W.norm()
    store.write(held, "weight", 2 * W, False)
    assert torch.equal(held.weight.act_pre_scale, scale)
    assert (identity(held) - 2 * W).norm() < 0.01 * W.norm()


@pytest.fixture
def untouched(monkeypatch):
    """torchao's classes as they are before an adapter comes."""
    monkeypatch.setattr(straight, "MENDED", set())
    for kind in (Int8Tensor, IntxUnpackedToInt8Tensor):
        monkeypatch.setattr(kind, "__torch_function__", classmethod(TorchAOBaseTensor.__torch_function__.__func__))


@pytest.mark.parametrize("config", [DYNAMIC, DYNAMIC_INTX], ids=["int8", "intx"])
def test_layers_that_round_their_inputs_pass_gradients_on(config, untouched):
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(96, 8))
    quantize_(model, config, lambda m, name: name == "0")
    model.requires_grad_(False)
    names, expected = list(model.state_dict()), model(X)
    assert not model(X.clone().requires_grad_()).requires_grad, "torchao does"
    adapted = graft.get_peft_model(model, graft.LoraConfig(r=2, target_modules=["2"]))  # elsewhere
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    copied, left = copy.deepcopy(model), adapted.unload()
    for m in (copied[0], left[0]):
        x = X.clone().requires_grad_()
        y = m(x)
        g = torch.ones_like(y)
        assert_close(torch.autograd.grad(y, x, g)[0], g @ find_store(m).read(m))
        with torch.autocast("cpu", torch.bfloat16):
            m(x).float().square().sum().backward()
        assert x.grad.abs().sum() > 0
        assert not m(X).requires_grad
        m.bias.requires_grad_()
        assert_close(torch.autograd.grad(m(X[None]).sum(), m.bias)[0], torch.full((96,), 5.0))
    assert torch.equal(left(X), expected) and list(left.state_dict()) == names
    assert type(left[0]) is nn.Linear and "forward" not in left[0].__dict__
    buffer.seek(0)
    left.load_state_dict(torch.load(buffer, weights_only=False), strict=False)
    assert torch.equal(left[0](X), copied[0](X))


@pytest.mark.parametrize("config", [DYNAMIC, DYNAMIC_INTX], ids=["int8", "intx"])
def test_functional_transforms_pass_through(config, untouched):
    model = nn.Sequential(linear(), nn.Tanh()).requires_grad_(False)
    quantize_(model, config)
    model = graft.get_peft_model(model, graft.LoraConfig(r=2, target_modules=["0"]))
    loss = lambda x: model(x).square().sum()
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(loss(x), x)[0]
    assert expected.abs().sum() > 0
    assert_close(torch.func.grad(loss)(X), expected)
    assert_close(torch.func.vmap(torch.func.grad(loss))(X[:, None])[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_a_compiler_sees_no_break(untouched, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    model = nn.Sequential(linear(), nn.Tanh())
    quantize_(model, DYNAMIC)
    model = disturb(graft.get_peft_model(model, graft.LoraConfig(r=2, target_modules=["0"])))
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch._dynamo.config.patch(disable=False):
        torch._dynamo.utils.counters.clear()
        y, compiled = model(x), torch.compile(model, backend="aot_eager", fullgraph=True)(z)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_close(compiled, y)
    y.sum().backward()
    compiled.sum().backward()
    assert_close(z.grad, x.grad)


def int4(layer):
    """A weight of four bits, which only kernels for other devices unpack."""
    groups = torch.ones(IN // 32, 96)
    codes = torch.zeros(96, IN // 2, dtype=torch.int8)
    layer.weight = nn.Parameter(Int4Tensor(codes, groups, 0 * groups, [1, 32], torch.Size((96, IN))), False)
    return layer


def mx(layer):
    layer.weight = nn.Parameter(MXTensor.to_mx(layer.weight.data, torch.float8_e4m3fn, 32), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "hold, reads, why",
    [
        (int4, False, "its weight is torchao's Int4Tensor, which only its kernels can unpack"),
        (mx, True, "its weight is torchao's MXTensor, which graft cannot quantize anew"),
    ],
)
def test_other_tensors_are_refused_with_the_reason(hold, reads, why, tmp_path):
    base = nn.Sequential(hold(linear()))
    names = [name for name, _ in base.named_modules()]
    dora = graft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    if reads:
        model = graft.get_peft_model(base, dora)
        assert type(model.merge_and_unload(dequantize=True)[0]) is nn.Linear
        return
    with pytest.raises(UnsupportedLayerError, match=f"needs its weight, and {why}"):
        graft.get_peft_model(base, dora)
    assert [name for name, _ in base.named_modules()] == names
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"]))
    for options in ({}, {"dequantize": True}):
        with pytest.raises(NotImplementedError, match=why):
            model.merge_and_unload(**options)
    model.save_pretrained(tmp_path, fingerprint="full")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.Conv2d])
def test_modules_of_other_types(kind, dora, tmp_path):
    with seeded(0):
        layer = nn.Embedding(40, 64) if kind is nn.Embedding else nn.Conv2d(32, 64, 3)
        x = torch.arange(6).view(2, 3) if kind is nn.Embedding else torch.randn(2, 32, 5, 5)
    quantize_(layer.requires_grad_(False), IntxWeightOnlyConfig(**GROUPS), lambda m, name: True)
    base = nn.Sequential(layer)
    assert find_store(layer).name == "torchao"
    model = disturb(graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"], use_dora=dora))).eval()
    y = model(x)
    model.merge_adapter()
    assert (model(x) - y).norm() < 0.2 * y.norm() and not torch.equal(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    model.save_pretrained(tmp_path, fingerprint="full")
    left = model.merge_and_unload(dequantize=True)
    assert type(left[0]) is kind and type(left[0].weight) is nn.Parameter
    assert_close(left(x), y, rtol=1e-4, atol=1e-4)
