# SPDX-License-Identifier: Apache-2.0
"""transformers' layers of 8-bit floats: the real classes, with their kernels replaced by plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers.integrations import compressed_tensors, fbgemm_fp8, finegrained_fp8

import graft
from graft.core.errors import UnsupportedLayerError
from graft.storage.find import find_store
from tests.models import disturb
from tests.storage.cells import IN, Kind, Net, cells, linear

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_linear)
    rows = lambda x, **_: (x, torch.ones(len(x)))  # activations stay as they are
    monkeypatch.setattr(compressed_tensors, "quantize_fp8_per_row", rows)
    monkeypatch.setattr(compressed_tensors, "_scaled_mm_rowwise", scaled_mm)


def fp8_linear(x, weight, scale, block_size, bias, *_):
    if weight.dtype == torch.int8:
        byte = weight.view(torch.uint8)
        code = torch.stack([byte % 16, byte // 16], -1).flatten(1).long()
        W = E2M1[code % 8] * (1 - 2 * (code // 8))
        rows, columns = 1, 32
    else:
        W, (rows, columns) = weight.float(), block_size or weight.shape
    spread = torch.kron(scale.float().reshape(1, -1) if scale.dim() < 2 else scale.float(), torch.ones(rows, columns))
    return F.linear(x, (W * spread[: W.shape[0], : W.shape[1]]).to(x.dtype), bias)


def scaled_mm(x, weight, scale_a, scale_b, out_dtype, bias):
    with torch.no_grad():  # it has no backward pass
        return F.linear(x.float(), (weight.float() * scale_b).T, bias).to(out_dtype)


def fp8(block=(32, 64), scales=torch.float32):
    def hold(layer):
        W, (rows, columns) = layer.weight.data, block or layer.weight.shape
        made = finegrained_fp8.FP8Linear(layer.in_features, layer.out_features, block_size=block, has_bias=True)
        largest = torch.stack([torch.stack([b.abs().max() for b in r.split(columns, 1)]) for r in W.split(rows)])
        scale = (largest / 448) if scales == torch.float32 else (largest / 448).log2().ceil().exp2()
        spread = torch.kron(scale, torch.ones(rows, columns))[: W.shape[0], : W.shape[1]]
        made.weight = nn.Parameter((W / spread).to(E4M3), requires_grad=False)
        made.weight_scale_inv = nn.Parameter((scale if block else scale[0, 0]).to(scales), requires_grad=False)
        made.bias = layer.bias
        return made.eval()

    return hold


def fp4(layer):
    W = layer.weight.data.unflatten(1, (-1, 32))
    scale = (W.abs().amax(-1) / 6).log2().ceil().exp2()
    nearest = (W / scale[..., None]).abs()[..., None].sub(E2M1).abs().argmin(-1)
    code = (nearest + 8 * (W < 0)).flatten(1).to(torch.uint8)
    made = finegrained_fp8.FP8Linear(layer.in_features, layer.out_features, has_bias=True)
    made.weight = nn.Parameter((code[:, ::2] + 16 * code[:, 1::2]).view(torch.int8), requires_grad=False)
    made.weight_scale_inv = nn.Parameter(scale.to(torch.float8_e8m0fnu), requires_grad=False)
    made.bias = layer.bias
    return made


def rowwise(layer):
    made = compressed_tensors.CompressedTensorsFP8Linear(layer.in_features, layer.out_features, has_bias=True)
    scale = layer.weight.data.abs().amax(1) / 448
    made.weight = nn.Parameter((layer.weight.data / scale[:, None]).to(E4M3), requires_grad=False)
    made.weight_scale = nn.Parameter(scale[None], requires_grad=False)
    made.bias = layer.bias
    return made


FEW = ("LORA", "LORA-dora", "LOHA", "OFT", "BEFT")
KINDS = [
    Kind("fp8", fp8()),
    Kind("fp8, powers of two", fp8((128, 128), torch.float8_e8m0fnu), only=FEW),
    Kind("fp8, one scale", fp8(None), only=FEW),
    Kind("fp4", fp4, fixed="4-bit floats, which graft does not know how to write", only=FEW),
    Kind("compressed-tensors", rowwise, only=FEW),
]
globals().update(cells(KINDS))


def test_blocks_at_the_border():
    layer = nn.Linear(100, 70).requires_grad_(False)
    held = fp8((32, 48))(layer)
    store = find_store(held)
    W = store.read(held, "weight")
    assert_close(W, layer.weight, rtol=0.07, atol=1e-3)
    x = torch.eye(100)
    assert_close(held(x) - held.bias, W.T)
    before = held.weight_scale_inv
    store.write(held, "weight", 3 * W, False)
    assert held.weight_scale_inv is not before and held.weight_scale_inv.shape == before.shape == (3, 3)
    assert_close(held(x) - held.bias, 3 * W.T)


def test_scales_that_are_bytes_of_exponents_are_read_and_written():
    layer = nn.Linear(64, 96).requires_grad_(False)
    held = fp8((32, 32), torch.float8_e8m0fnu)(layer)
    store = find_store(held)
    W = store.read(held, "weight")
    held.weight_scale_inv = nn.Parameter(held.weight_scale_inv.data.view(torch.uint8), requires_grad=False)
    assert torch.equal(store.read(held, "weight"), W)
    store.write(held, "weight", 3 * W, False)
    assert held.weight_scale_inv.dtype == torch.uint8
    assert_close(store.read(held, "weight"), 3 * W, rtol=0.07, atol=1e-3)


def test_a_layer_that_holds_plain_floats_is_read_and_written_as_it_is():
    layer = linear()
    held = finegrained_fp8.FP8Linear(IN, 96, block_size=(32, 64), has_bias=True)
    held.weight, held.bias = layer.weight, layer.bias
    model = disturb(graft.get_peft_model(Net(held), graft.LoraConfig(target_modules=["layer"]))).eval()
    x = torch.randn(3, IN)
    before, y = held.weight.data.clone(), model(x)
    model.merge_adapter()
    assert_close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(held.weight, before)


def test_fbgemm():
    layer = linear()
    held = fbgemm_fp8.FbgemmFp8Linear(IN, 96, True)
    scale = layer.weight.data.abs().amax(1, keepdim=True) / 448
    held.weight.data, held.weight_scale.data, held.bias = (layer.weight.data / scale).to(E4M3), scale, layer.bias
    store = find_store(held)
    assert_close(store.read(held, "weight"), held.weight.float() * scale)
    store.write(held, "weight", 2 * store.read(held, "weight"), False)
    assert_close(held.weight_scale, 2 * scale)


def test_bfloat16_models_become_dense_in_bfloat16():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.layer = nn.Embedding(5, IN, dtype=torch.bfloat16), fp8()(linear())
            self.layer.bias = nn.Parameter(self.layer.bias.to(torch.bfloat16), requires_grad=False)

        def forward(self, ids):
            return self.layer(self.tokens(ids))

    model = disturb(graft.get_peft_model(Tokens(), graft.LoraConfig(target_modules=["layer"]))).eval()
    ids = torch.arange(5)
    y = model(ids)
    plain = model.merge_and_unload(dequantize=True)
    assert plain.layer.weight.dtype == y.dtype == torch.bfloat16
    assert_close(plain(ids), y, rtol=0, atol=0.02 * y.abs().max().item())  # where terms cancel, their rounding stays


@pytest.mark.differs("`FP8GroupedLinear`, gptqmodel's quantized embeddings")
def test_a_stack_of_groups_is_refused():
    base = nn.Sequential(finegrained_fp8.FP8GroupedLinear(32, 96, 2, block_size=(32, 32)))
    with pytest.raises(ValueError, match="only the following modules are supported"):
        graft.get_peft_model(base, graft.LoraConfig(target_modules=["0"]))


def test_packed_experts_that_graft_cannot_run_are_refused():
    """Those of a module that it does not know, or that are not loaded."""
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=2)
    unknown = nn.Module()
    unknown.gate_up_proj = nn.Parameter(torch.zeros(2, 128, 32, dtype=torch.uint8), requires_grad=False)
    for experts, text in (
        (Mxfp4GptOssExperts(config), r"it has no scales"),
        (unknown, r"gate_up_proj holds uint8.*load the base model dequantized"),
    ):
        base = nn.ModuleDict({"experts": experts})
        adapter = graft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"])
        with pytest.raises(UnsupportedLayerError, match=text):
            graft.get_peft_model(base, adapter)
        assert type(base["experts"]) is type(experts) and "forward" not in experts.__dict__
