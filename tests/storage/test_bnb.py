# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' layers by stand-ins in plain torch, so that no package is needed; tests/packages has the real ones."""

import copy
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import graft
from graft.methods.lora.loftq import NF4
from graft.storage.find import find_store
from tests.storage.cells import FEW, Kind, Net, cells, identity, linear, near

# 4 bits: two codes in a byte, the first in the high half; a scale for each block of 64


class QuantState:
    def __init__(self, absmax, shape, dtype, blocksize=64, quant_type="nf4"):
        self.absmax, self.shape, self.dtype = absmax, shape, dtype
        self.blocksize, self.quant_type, self.nested, self.state2, self.offset = (
            blocksize,
            quant_type,
            False,
            None,
            None,
        )


def quantize_4bit(W, blocksize, storage):
    blocks = W.reshape(-1, blocksize).float()
    scales = blocks.abs().amax(1)
    codes = (blocks / scales[:, None]).unsqueeze(-1).sub(torch.tensor(NF4)).abs().argmin(-1).flatten().to(torch.uint8)
    packed = (codes[::2] * 16 + codes[1::2]).view(-1, 1)
    return packed.view(-1).view(storage).view(-1, 1), QuantState(scales, W.shape, W.dtype, blocksize)


def dequantize_4bit(data, state):
    data = data.view(-1).view(torch.uint8)
    values = torch.tensor(NF4)[torch.stack([data // 16, data % 16], 1).flatten().long()]
    return (values.view(-1, state.blocksize) * state.absmax[:, None]).view(state.shape).to(state.dtype)


class Params4bit(nn.Parameter):
    def __new__(
        cls,
        data,
        requires_grad=False,
        quant_state=None,
        blocksize=64,
        compress_statistics=False,
        quant_type="nf4",
        quant_storage=torch.uint8,
        module=None,
    ):
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.quant_state, self.blocksize, self.compress_statistics = quant_state, blocksize, compress_statistics
        self.quant_type, self.quant_storage, self.module = quant_type, quant_storage, module
        return self

    def to(self, device):
        self.data, self.quant_state = quantize_4bit(self.data, self.blocksize, self.quant_storage)
        return self


class Linear4bit(nn.Linear):
    support_avx512bf16_for_cpu = True

    def forward(self, x):
        return F.linear(x, dequantize_4bit(self.weight.data, self.weight.quant_state).to(x.dtype), self.bias)


class LinearNF4(Linear4bit):
    pass


def four(layer, storage=torch.uint8):
    m = LinearNF4(layer.in_features, layer.out_features, layer.bias is not None)
    m.weight = Params4bit(layer.weight.data.clone(), quant_storage=storage).to("cpu")
    m.quant_state, m.bias = m.weight.quant_state, layer.bias
    return m


def rearranged(m, saved=False):
    """As a forward pass leaves a layer on a CPU with AVX512-BF16; saved: as `state_dict()` leaves that."""
    state, (rows, columns) = m.quant_state, m.quant_state.shape
    state.absmax = state.absmax.view(rows, -1).T.bfloat16().contiguous()
    if saved:
        return m
    data = m.weight.data.view(-1).view(torch.uint8)
    pairs = torch.stack([data // 16, data % 16], 1).view(rows // 32, 32, columns // 2, 2)
    runs = pairs.transpose(1, 2).reshape(-1, 2, 32)  # of 64 codes, 32 low halves and 32 high ones
    state.original_qshape, state.original_dtype = m.weight.data.view(torch.uint8).shape, state.dtype
    state.original_storage_type = None if m.weight.dtype == torch.uint8 else m.weight.dtype
    state.dtype, state.packing_format_for_cpu = torch.bfloat16, True
    m.weight.data = (runs[:, 0] + 16 * runs[:, 1]).view(rows, columns // 2)
    return m


# 8 bits: a scale for each row


def int8_vectorwise_quant(W):
    assert W.dtype == torch.float16
    scales = W.float().abs().amax(1)
    return (W.float() * 127 / scales[:, None]).round().to(torch.int8), scales, None


class Int8Params(nn.Parameter):
    def __new__(cls, data, requires_grad=True, has_fp16_weights=False, CB=None, SCB=None):
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.CB, self.SCB, self.has_fp16_weights = CB, SCB, has_fp16_weights
        return self


class State:
    CB = SCB = None

    def reset_grads(self):
        self.CB = self.SCB = None


class Linear8bitLt(nn.Linear):
    def forward(self, x):
        if self.weight.CB is not None:
            self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
            self.weight.CB = self.weight.SCB = None
        return F.linear(x, self.state.CB.to(x.dtype) * (self.state.SCB[:, None] / 127).to(x.dtype), self.bias)


def eight(layer):
    m = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None)
    codes, scales, _ = int8_vectorwise_quant(layer.weight.data.half())
    m.weight, m.bias, m.state = Int8Params(codes, False, False, codes, scales), layer.bias, State()
    return m


CLASSES = (Params4bit, Linear4bit, LinearNF4, Int8Params, Linear8bitLt)
for kind in CLASSES:
    kind.__module__ = "bitsandbytes.nn.modules"


@pytest.fixture(autouse=True)
def package(monkeypatch):
    names = {
        "bitsandbytes": {"__version__": "0.50.2"},
        "bitsandbytes.functional": dict(dequantize_4bit=dequantize_4bit, int8_vectorwise_quant=int8_vectorwise_quant),
        "bitsandbytes.nn": {kind.__name__: kind for kind in CLASSES},
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


globals().update(cells([Kind("nf4", partial(four, storage=torch.bfloat16)), Kind("int8", eight)], FEW))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("saved", [False, True])
def test_a_rearranged_weight_is_read_and_put_back(saved, storage):
    held, fresh = rearranged(four(linear(), storage), saved), four(linear(), storage)
    before = bits(held.weight).clone()
    W = find_store(held).read(held, "weight")
    near(W, identity(fresh), 4e-3)  # scales in bfloat16
    assert torch.equal(bits(held.weight), before)
    with pytest.warns(graft.PeftWarning, match="rearranged weights of 4 bits") as said:
        base = Net(held)
        base.twin = rearranged(four(linear()), saved)
        model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    assert len([w for w in said if "rearranged" in str(w.message)]) == 1
    assert torch.equal(bits(held.weight), bits(fresh.weight)) and held.weight.dtype == storage
    assert held.quant_state is held.weight.quant_state and not held.support_avx512bf16_for_cpu
    near(identity(held), W, 1e-5)
    near(identity(base.twin), W, 1e-5)
    model.merge_and_unload()


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("may", [True, False])
def test_bitsandbytes_may_rearrange_weights_again_without_adapters(leave, may):
    base = Net(four(linear()))
    base.layer.support_avx512bf16_for_cpu = may
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["layer"]))
    model.add_adapter("second", graft.LoraConfig(r=2, target_modules=["layer"]))
    model = copy.deepcopy(model)
    assert not model.get_base_model().layer.base_layer.support_avx512bf16_for_cpu
    assert getattr(model, leave)().layer.support_avx512bf16_for_cpu == may


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_written_weight_is_packed_as_the_old_one(storage):
    held = four(linear(), storage)
    held.weight = Params4bit(linear().weight.bfloat16(), False, None, 32, True, "nf4", storage, held).to("cpu")
    held.quant_state, before = held.weight.quant_state, held.weight
    find_store(held).write(held, "weight", identity(held), False)
    assert held.weight is not before and held.quant_state is held.weight.quant_state
    assert (
        held.weight.dtype == storage and held.quant_state.dtype == torch.bfloat16 and held.quant_state.blocksize == 32
    )
    kept = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    assert all(getattr(held.weight, name) is getattr(before, name) for name in kept)


def test_codes_that_were_cast():
    held = four(linear(), torch.bfloat16)
    assert find_store(held).why_unreadable(held, "weight") is None
    assert "its codes were cast from torch.bfloat16 to torch.float32" in find_store(held).why_unreadable(
        held.float(), "weight"
    )


def bits(t):
    return t.detach().reshape(-1).view(torch.uint8)


def test_a_weight_that_fsdp_has_made_a_plain_parameter_of():
    held = four(linear())
    W = identity(held)
    held.weight = nn.Parameter(held.weight.data, requires_grad=False)
    store = find_store(held)
    near(store.read(held, "weight"), W, 1e-6)
    assert store.name == "bnb 4bit"
    store.write(held, "weight", 2 * W, False)
    assert_close(identity(held), 2 * W)
    held.weight = nn.Parameter(held.weight.data[:100], requires_grad=False)
    assert "its codes are 200 of 30720: they are sharded" in store.why_unreadable(held, "weight")


@pytest.mark.differs("quantized bases: merging two adapters one after the other")
@pytest.mark.parametrize("hold", [four, eight])
def test_what_is_merged_one_by_one_is_rounded_once(hold):
    model = graft.get_peft_model(Net(hold(linear())), CONFIG(), "a")
    model.add_adapter("b", graft.LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False, use_dora=True))
    model.set_adapter("a")
    merged = []
    for calls in ([["a"], ["b"]], [["a", "b"]]):
        for names in calls:
            model.merge_adapter(names)
        merged.append(identity(model.base_model.model.layer))
        model.unmerge_adapter()
    assert torch.equal(*merged)


def CONFIG(**options):
    return graft.LoraConfig(r=2, target_modules=["layer"], **{"init_lora_weights": False, **options})


@pytest.mark.parametrize("hold", [four, eight])
def test_a_start_that_changes_the_base_comes_back(hold, tmp_path):
    model = graft.get_peft_model(Net(hold(linear())), CONFIG(init_lora_weights="olora"))
    changed = identity(model)
    model.save_pretrained(tmp_path)
    again = graft.PeftModel.from_pretrained(Net(hold(linear())), tmp_path)
    assert torch.equal(identity(again), changed)
    with pytest.warns(graft.PeftWarning, match="has been changed already"):
        third = graft.PeftModel.from_pretrained(again.unload(), tmp_path)
    assert torch.equal(identity(third), changed)


# models


@pytest.mark.differs("`prepare_model_for_kbit_training` on AWQ, quanto, fp8, or a model without marks")
def test_k_bit_preparation_goes_by_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(320), four(linear().bfloat16(), torch.bfloat16)
            self.other = eight(linear().bfloat16())

        def enable_input_require_grads(self):
            self.asked = True

        def gradient_checkpointing_enable(self):
            self.checkpoints = True

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    plain = nn.Sequential(Own(4, 4)).bfloat16()  # which nobody has quantized, for all that graft cannot write it
    graft.prepare_model_for_kbit_training(plain)
    assert plain[0].weight.dtype == torch.float32
    model = Model().bfloat16()
    codes = bits(model.layer.weight).clone()
    graft.prepare_model_for_kbit_training(model)  # without marks
    assert model.asked and model.checkpoints and not any(p.requires_grad for p in model.parameters())
    assert model.norm.weight.dtype == model.layer.bias.dtype == model.other.bias.dtype == torch.float32
    assert model.layer.weight.dtype == torch.bfloat16 and torch.equal(bits(model.layer.weight), codes)


def test_a_model_without_packed_weights_has_no_marks():
    base = Net(four(linear()))
    base.is_loaded_in_4bit = True
    base.other = four(linear())
    config = graft.LoraConfig(r=2, target_modules=["layer"])
    part = graft.get_peft_model(base, config).merge_and_unload(dequantize=True)
    assert part.is_loaded_in_4bit, "another layer is packed"
    config = graft.LoraConfig(r=2, target_modules=["layer", "other"])
    assert not graft.get_peft_model(part, config).merge_and_unload(dequantize=True).is_loaded_in_4bit


def test_numbers_of_parameters():
    for storage in (torch.uint8, torch.bfloat16):
        config = graft.LoraConfig(r=2, target_modules=["layer"])
        model = graft.get_peft_model(Net(four(linear(), storage)), config)
        assert graft.plan(Net(four(linear(), storage)), config).base_parameters == 320 * 96 + 96
        assert model.get_nb_trainable_parameters() == (2 * (320 + 96), 320 * 96 + 96 + 2 * (320 + 96))
