# SPDX-License-Identifier: Apache-2.0
"""Layers of codes that were calibrated, or that only their kernels can read."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.compat.peft.modules import names_in, resolve
from graft.core.errors import ConfigError, UnsupportedLayerError
from graft.storage.find import find_store
from tests.looks import layers
from tests.models import disturb, seeded
from tests.storage.cells import IN, Kind, Net, cells, identity, linear
from tests.storage.standins import Aqlm, AwqModel, Eetq, Gptq, OldAwq, OldGptq

FEW = ("LORA", "LORA-dora", "LOHA", "OFT", "HIRA")
CODES = "codes that were calibrated, and merging would quantize them anew"
KINDS = [
    Kind("gptq", Gptq, fixed=f"GPTQ {CODES}"),
    Kind("gptq by auto-gptq", OldGptq, fixed=f"GPTQ {CODES}", bias=False, only=FEW),
    Kind("awq", AwqModel, fixed=f"AWQ {CODES}", only=FEW),
    Kind("awq by autoawq", OldAwq, fixed=f"AWQ {CODES}", bias=False, only=FEW),
    Kind("aqlm", Aqlm, fixed=f"AQLM {CODES}", only=FEW),
    Kind("eetq", Eetq, fixed="EETQ codes, and graft does not know how to write it", only=FEW),
]
globals().update(cells(KINDS))


class Model(nn.Module):
    """Layers of several storages, with biases that are no parameters; a head that is dense."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        with seeded(0):
            self.q = Gptq(linear(), dtype)
            self.v = AwqModel(linear(), dtype)
            self.e = Eetq(linear().to(dtype))
            self.head = nn.Linear(3 * 96, 8, dtype=dtype)

    def forward(self, x):
        return self.head(torch.cat([self.q(x), self.v(x), self.e(x)], -1))


def lora(**options):
    return graft.LoraConfig(**(dict(r=4, target_modules=["q", "v", "e"]) | options))


X = torch.linspace(-1, 1, 5 * IN).view(5, IN)


@pytest.mark.differs("transformers' `EetqLinear`")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_two_adapters_files(dtype, tmp_path):
    model = graft.get_peft_model(Model(dtype), lora(use_dora=True), "a")
    model.add_adapter("b", lora())
    disturb(model.eval())
    layer = model.base_model.model.q
    assert layer.lora_A["a"].weight.dtype == torch.float32 and layer.get_base_weight().dtype == dtype
    x = X.to(dtype)
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = model(x)
    model.disable_adapter_layers()
    alone["__base__"] = Model(dtype)(x)
    assert torch.equal(model(x), alone["__base__"])
    model.enable_adapter_layers()
    names = ["a", "__base__", "b", "a", "b"]
    mixed = model(x, adapter_names=names)
    for i, name in enumerate(names):
        assert_close(mixed[i], alone[name][i], rtol=2e-2, atol=2e-2)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = graft.PeftModel.from_pretrained(Model(dtype), tmp_path / "a", adapter_name="a", **options).eval()
        assert_close(loaded(x), alone["a"])
    model.set_adapter("b")
    model.delete_adapter("a")
    assert_close(model(x), alone["b"])
    plain = model.merge_and_unload(dequantize=True)
    assert {type(getattr(plain, name)) for name in "qve"} == {nn.Linear} and plain.q.weight.dtype == dtype
    assert_close(plain(x), alone["b"], rtol=2e-2, atol=2e-2)


@pytest.mark.differs('`target_modules="all-linear"` on HQQ, GPTQ, AWQ, AQLM')
def test_all_linear_layers_are_found():
    model = graft.get_peft_model(nn.ModuleDict({"body": Model()}), lora(target_modules="all-linear"))
    assert set(layers(model)) == {"body.q", "body.v", "body.e", "body.head"}


class Ids(Gptq):
    """An embedding in the shape of a linear layer, as gptqmodel derives it."""

    __module__, __qualname__ = "gptqmodel.nn_modules.qlinear.torch", "TorchQuantEmbeddings"

    def forward(self, ids):
        return self.dense()[ids]


def test_an_embedding_is_not_taken_for_a_linear_layer():
    model = nn.ModuleDict({"tokens": Ids(linear()), "q": Gptq(linear())})
    assert set(layers(graft.get_peft_model(model, lora(target_modules="all-linear")))) == {"q"}
    with pytest.raises(ValueError, match="only the following modules are supported: "):
        graft.get_peft_model(nn.ModuleDict({"tokens": Ids(linear())}), lora(target_modules=["tokens"]))


@pytest.mark.parametrize("bias, first", [("all", False), ("lora_only", False), ("all", True)])
def test_biases_that_are_no_parameters_train(bias, first, tmp_path):
    """first: nothing before these layers trains, so that their input has no gradient."""
    names = {f"base_model.model.{name}.base_layer.bias" for name in "qve"}
    model = graft.get_peft_model(Model(), lora(bias=bias))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert trained.keys() == names | ({"base_model.model.head.bias"} if bias == "all" else set())
    x = X.clone().requires_grad_(not first)
    model(x).sum().backward()
    summed = model.base_model.model.head.weight.sum(0) * len(X)
    for name, b in zip("qve", summed.split(96)):
        assert_close(trained[f"base_model.model.{name}.base_layer.bias"].grad, b)
    if not first:
        W = torch.cat([identity(Model().get_submodule(name)) for name in "qve"])
        assert_close(x.grad, (summed / len(X) @ W).expand(5, -1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for p in trained.values():
            p.add_(1)
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(Model(), tmp_path)
    assert_close(loaded(X), model(X))


@pytest.mark.differs("merging on GPTQ, AWQ, AQLM and others")
def test_merging_is_refused_in_the_words_of_peft_and_with_two_ways_out():
    model = graft.get_peft_model(Model(), lora())
    with pytest.raises(
        NotImplementedError,
        match=r"layer 'q': its weight is GPTQ codes .*Cannot merge LORA layers when the model is gptq quantized\)\. "
        r"Keep them unmerged, or merge_and_unload\(dequantize=True\)",
    ):
        model.merge_adapter()
    assert not model.base_model.model.e.merged


def test_what_changes_the_base_is_refused():
    base = Model()
    with pytest.raises(UnsupportedLayerError, match="layer 'q', which it would change: its weight is GPTQ codes"):
        graft.get_peft_model(base, lora(init_lora_weights="pissa"))
    assert type(base.q) is Gptq


@pytest.mark.parametrize("outputs, bits", [(96, 8), (IN // Aqlm.IN, 8), (96, 9)])
def test_codes_are_read_whatever_a_call_has_done_to_them(outputs, bits):
    with seeded(0):
        layer = Aqlm(nn.Linear(IN, outputs), bits)
    store, codes = find_store(layer), layer.codes.data.clone()
    W = store.read(layer, "weight")
    assert torch.equal(layer.codes, codes), "as before"
    assert_close(identity(layer), W)
    assert torch.equal(layer.codes, codes) == (bits != 8)
    assert torch.equal(store.read(layer, "weight"), W)


class W4A4(nn.Module):
    """Rounds inputs to 4 bits, runs in bfloat16 alone, passes no gradient on."""

    __module__, __qualname__ = "transformers.integrations.nvfp4", "NVFP4Linear"

    def __init__(self, layer):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.weight_global_scale = nn.Buffer(layer.weight.data.abs().max()[None] / 7)
        self.weight = nn.Buffer((layer.weight.data / self.weight_global_scale).round().to(torch.int8))

    def forward(self, x):
        with torch.no_grad():
            size = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7
            x8 = (x.float() / size).round() * size
            y = torch.ops.aten.mm(x8.to(torch.bfloat16), (self.weight * self.weight_global_scale).T.to(torch.bfloat16))
            if x.dtype != torch.bfloat16:
                raise TypeError("the kernel takes bfloat16")
            return y


def test_a_kernel_that_takes_one_dtype_and_rounds_its_input_is_read_and_has_a_gradient():
    layer = W4A4(linear(bias=False))
    W = (layer.weight * layer.weight_global_scale).to(torch.bfloat16)
    assert torch.equal(find_store(layer).read(layer, "weight"), W)
    model = disturb(graft.get_peft_model(Net(layer), lora(target_modules=["layer"], use_dora=True)).eval())
    x = X.to(torch.bfloat16).requires_grad_()
    model(x).sum().backward()
    dense = linear(bias=False).to(torch.bfloat16)
    dense.weight.data = W
    twin = graft.get_peft_model(Net(dense), lora(target_modules=["layer"], use_dora=True)).eval()
    graft.set_peft_model_state_dict(twin, graft.get_peft_model_state_dict(model))
    z = x.detach().clone().requires_grad_()
    twin(z).sum().backward()
    assert_close(x.grad, z.grad, rtol=2e-2, atol=2e-2)


def test_a_kernel_that_forgets_its_bias_is_refused():
    """transformers' HiggsLinear 5.24 holds a bias and does not add it."""
    Higgs = type("HiggsLinear", (nn.Linear,), {"__module__": "transformers.integrations.higgs"})
    Higgs.forward = lambda self, x: x @ self.weight.T
    base = nn.Sequential(Higgs(6, 4))
    with pytest.raises(
        UnsupportedLayerError, match="HIGGS codes, and its output for an input of zeros is not its bias"
    ):
        graft.get_peft_model(base, lora(target_modules=["0"], use_dora=True))
    graft.get_peft_model(base, lora(target_modules=["0"]))(X[:, :6])


@pytest.mark.parametrize("kind", [Gptq, AwqModel, OldGptq])
def test_qalora(kind):
    layer, g, r, s = kind(linear()), 32, 4, 2.0
    model = graft.get_peft_model(
        Net(layer), lora(target_modules=["layer"], use_qalora=True, qalora_group_size=g, lora_alpha=s * r)
    )
    disturb(model.eval())
    A, B = (getattr(model.base_model.model.layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    assert A.shape == (r, IN // g) and B.shape == (96, r)
    means = X.unflatten(-1, (-1, g)).mean(-1) * (IN // g)
    assert_close(model(X), layer(X) + s * (means @ A.T @ B.T))
    with pytest.raises(NotImplementedError, match=r"dequantize=True"):
        model.merge_adapter()
    y = model(X)
    assert_close(model.merge_and_unload(dequantize=True)(X), y)
    with pytest.raises(ConfigError, match="divisible"):
        graft.get_peft_model(Net(kind(linear())), lora(target_modules=["layer"], use_qalora=True, qalora_group_size=7))


def test_the_classes_of_peft():
    model = graft.get_peft_model(Model(), lora())
    classes = {
        name: resolve("peft.tuners.lora", name) for name in ("GPTQLoraLinear", "AwqLoraLinear", "EetqLoraLinear")
    }
    for layer, own in zip("qve", classes):
        assert [n for n, c in classes.items() if isinstance(getattr(model.base_model.model, layer), c)] == [own]
        assert isinstance(getattr(model.base_model.model, layer), resolve("peft.tuners.lora", "LoraLayer"))
    for path in ("gptq", "awq", "aqlm", "eetq", "hqq", "inc", "torchao"):
        (name,) = (n for n in names_in(f"peft.tuners.lora.{path}") if not n.startswith("dispatch_"))
        assert resolve(f"peft.tuners.lora.{path}", name) is resolve("peft.tuners.lora", name)
    assert not isinstance(model.base_model.model.q, resolve("peft.tuners.lora", "Linear"))
    for package in ("gptqmodel", "auto_awq", "aqlm", "eetq", "hqq", "inc", "optimum"):
        assert resolve("peft.import_utils", f"is_{package}_available")() in (True, False)
