# SPDX-License-Identifier: Apache-2.0
"""torchao's rows on stand-ins: tensors of those names, with the published layouts, whose arithmetic is here."""

import sys
import warnings
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import graft
from graft.core.errors import UnsupportedLayerError
from graft.storage.find import FOREIGN, find_store
from tests.models import disturb
from tests.raised import refuses
from tests.storage.cells import FEW, IN, OUT, Kind, cells, identity, linear

NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
NF4 = torch.tensor([*NF4, 0.7230, 1.0])


@dataclass(frozen=True)
class PerRow:
    pass


@dataclass(frozen=True)
class PerTensor:
    pass


@dataclass(frozen=True)
class PerGroup:
    size: int


@pytest.fixture(autouse=True)
def package(monkeypatch):
    made, inner = ModuleType("torchao"), ModuleType("torchao.quantization")
    inner.PerRow, inner.PerTensor, inner.PerGroup = PerRow, PerTensor, PerGroup
    inner.MappingType = Enum("MappingType", "SYMMETRIC ASYMMETRIC")
    made.quantization = inner
    monkeypatch.setitem(sys.modules, "torchao", made)
    monkeypatch.setitem(sys.modules, "torchao.quantization", inner)


class Base(Tensor):
    inner: tuple[str, ...] = ("qdata", "scale")

    @staticmethod
    def __new__(cls, shape, **held):
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        made.__dict__.update(held)
        return made

    def __tensor_flatten__(self):
        return [name for name in self.inner if getattr(self, name) is not None], None

    __tensor_unflatten__ = None  # is never called: nothing compiles here

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return args[1].linear(args[0], *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].shape, **args[0].__dict__)
        raise NotImplementedError(f"{func} of {cls.__name__}")

    def linear(self, x, bias=None):
        return F.linear(x, self.dequantize(), bias)


def blocks(W, block):
    """Return the largest number of each block, (rows, columns) of blocks, and what spreads such numbers over W."""
    rows, columns = block
    peaks = W.view(len(W) // rows, rows, -1, columns).abs().amax((1, 3))
    return peaks, lambda t: t.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def shape_of(granularity, W):
    sizes = {PerRow: (1, W.shape[1]), PerTensor: tuple(W.shape)}
    return sizes.get(type(granularity)) or (1, granularity.size)


class Int8Tensor(Base):
    @classmethod
    def from_hp(cls, W, granularity, mapping_type=None, *, act_quant_kwargs=None, act_pre_scale=None, **others):
        assert mapping_type is None or mapping_type.name == "SYMMETRIC"
        block = shape_of(granularity, W)
        peaks, spread = blocks(W, block)
        codes = (W / spread(peaks / 127)).round().to(torch.int8)
        held = dict(dict.fromkeys(("act_quant_scale", "act_quant_zero_point", "reduce_range")), **others)
        held |= dict(act_quant_kwargs=act_quant_kwargs, act_pre_scale=act_pre_scale)
        return cls(W.shape, qdata=codes, scale=peaks / 127, zero_point=0 * peaks, block_size=list(block), **held)

    def dequantize(self):
        return self.qdata * blocks(self.qdata, self.block_size)[1](self.scale)

    def linear(self, x, bias=None):
        x = x if self.act_pre_scale is None else x * self.act_pre_scale
        if self.act_quant_kwargs is not None:  # rounding passes no gradient on
            size = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
            x = (x.detach() / size).round() * size
        return F.linear(x, self.dequantize(), bias)


class Float8Tensor(Base):
    @classmethod
    def from_hp(cls, W, float8_dtype, granularity, **others):
        block = shape_of(granularity, W)
        peaks, spread = blocks(W, block)
        scale = peaks / torch.finfo(float8_dtype).max
        settings = dict(dict.fromkeys(("mm_config", "kernel_preference", "act_quant_kwargs")), **others)
        return cls(W.shape, qdata=(W / spread(scale)).to(float8_dtype), scale=scale, block_size=block, **settings)

    def dequantize(self):
        return self.qdata.float() * blocks(self.qdata.float(), self.block_size)[1](self.scale)


class IntxUnpackedToInt8Tensor(Base):
    inner = ("qdata", "scale", "zero_point")

    @classmethod
    def from_hp(cls, W, block_size, target_dtype, *, mapping_type, activation_quantization=None):
        assert mapping_type.name == "ASYMMETRIC" and target_dtype == torch.int4
        low, high = (f(W.view(len(W), -1, block_size[1]), -1) for f in (torch.amin, torch.amax))
        scale = (high - low) / 15
        zero = (-8 - low / scale).round()
        codes = (W / spread(scale, block_size) + spread(zero, block_size)).round().clamp(-8, 7).to(torch.int8)
        held = dict(target_dtype=target_dtype, block_size=block_size, activation_quantization=activation_quantization)
        return cls(W.shape, qdata=codes, scale=scale, zero_point=zero.to(torch.int8), **held)

    def dequantize(self):
        return (self.qdata - spread(self.zero_point, self.block_size)) * spread(self.scale, self.block_size)

    def linear(self, x, bias=None):
        return F.linear(x if self.activation_quantization is None else x.detach(), self.dequantize(), bias)


def spread(t, block):
    return t.repeat_interleave(block[1], 1)


class NF4Tensor(Base):
    """Two codes in a byte, high one first; scales in bytes as well, around their mean."""

    inner = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean")

    @classmethod
    def from_tensor(cls, W, block_size, scaler_block_size):
        rows = W.reshape(-1, block_size)
        peaks = rows.abs().amax(1)
        codes = (rows / peaks[:, None]).reshape(-1, 1).sub(NF4).abs().argmin(1).to(torch.uint8).view(-1, 2)
        centred = (peaks - peaks.mean()).view(-1, scaler_block_size)
        factor = 128 / centred.abs().amax(1)
        held = dict(quantized_data=codes[:, 0] << 4 | codes[:, 1], quantization_factor=factor)
        held |= dict(quantized_scalers=(centred * factor[:, None]).round().clamp(-128, 127).to(torch.int8))
        sizes = dict(block_size=block_size, scaler_block_size=scaler_block_size)
        return cls(W.shape, scaler_mean=peaks.mean(), **held, **sizes)

    def get_original_weight(self):
        scales = (self.quantized_scalers / self.quantization_factor[:, None] + self.scaler_mean).view(-1, 1)
        codes = torch.stack((self.quantized_data >> 4, self.quantized_data & 15), 1).int()
        return (NF4[codes].view(-1, self.block_size) * scales).view(self.shape)

    def dequantize(self, value, nf4):
        raise AssertionError("this looks codes up, and does no more")

    def linear(self, x, bias=None):
        return F.linear(x, self.get_original_weight(), bias)


class Int4Tensor(Base):
    """Packed for kernels, so that its class has no `dequantize`."""

    def linear(self, x, bias=None):
        return F.linear(x, self.qdata * self.scale, bias)


QUANTIZATION = (Int8Tensor, Float8Tensor, IntxUnpackedToInt8Tensor, Int4Tensor)
for kind in QUANTIZATION:
    kind.__module__ = "torchao.quantization"
NF4Tensor.__module__ = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
Base.__module__, Base.__qualname__ = "torchao.utils", "TorchAOBaseTensor"


def with_weight(make):
    def hold(layer):
        made = nn.Linear(IN, OUT, layer.bias is not None, device="meta")
        made.bias = layer.bias
        made.weight = nn.Parameter(make(layer.weight.data), requires_grad=False)
        return made

    return hold


def intx(W, **rounding):
    symmetric = Enum("MappingType", "ASYMMETRIC").ASYMMETRIC
    return IntxUnpackedToInt8Tensor.from_hp(W, (1, 32), torch.int4, mapping_type=symmetric, **rounding)


PRE = torch.linspace(0.5, 2, IN)
INT8 = {
    "int8": lambda W: Int8Tensor.from_hp(W, PerRow()),
    "int8-groups": lambda W: Int8Tensor.from_hp(W, PerGroup(64)),
    "int8-smoothed": lambda W: Int8Tensor.from_hp(W / PRE, PerTensor(), act_pre_scale=PRE),
}
E4M3 = torch.float8_e4m3fn
dynamic = with_weight(lambda W: Int8Tensor.from_hp(W, PerRow(), act_quant_kwargs="rows"))
int4 = with_weight(lambda W: Int4Tensor(W.shape, qdata=(W * 100).round(), scale=torch.tensor(0.01), block_size=[1, 32]))
KINDS = [
    *(Kind(name, with_weight(make)) for name, make in INT8.items()),
    Kind("int8-dynamic", dynamic, 2e-2, rounds_inputs=True),
    Kind("float8", with_weight(lambda W: Float8Tensor.from_hp(W, E4M3, PerRow()))),
    Kind("intx", with_weight(intx)),
    Kind("nf4", with_weight(lambda W: NF4Tensor.from_tensor(W, 64, 160))),
]
globals().update(cells(KINDS, FEW))


@pytest.mark.differs("torchao's dynamic activations; float8, Gemma's and BitNet's layers without a backward pass")
@pytest.mark.parametrize(
    "hold", [dynamic, with_weight(lambda W: intx(W, activation_quantization="tokens"))], ids=["int8", "intx"]
)
def test_layers_that_round_their_inputs_pass_gradients_on(hold):
    x = torch.linspace(-1, 1, 3 * IN).view(3, IN).requires_grad_()
    model = nn.Sequential(hold(linear()), nn.Linear(OUT, 4))
    y = model[0](x)
    model = graft.get_peft_model(model, graft.LoraConfig(r=2, target_modules=["1"])).unload()
    assert_close(model[0](x), y)
    assert_close(torch.autograd.grad(model[0](x).sum(), x)[0], find_store(model[0]).read(model[0]).sum(0).expand_as(x))


def test_a_dense_layer_is_not_bound_to_the_packed_one():
    layer = KINDS[0].hold(linear())
    layer.forward = partial(type(layer).forward, layer)  # as accelerate does
    model = disturb(graft.get_peft_model(nn.Sequential(layer), graft.LoraConfig(r=2, target_modules=["0"])))
    x = torch.ones(2, IN)
    expected = model(x)
    left = model.merge_and_unload(dequantize=True)
    assert_close(left(x), expected, rtol=1e-5, atol=1e-5)
    assert left[0] is not layer and left[0].bias is not layer.bias and isinstance(layer.weight, Int8Tensor)


def test_what_only_kernels_unpack_runs_and_is_refused_where_its_values_are_needed(tmp_path):
    why = "its weight is torchao's Int4Tensor, which only its kernels can unpack"
    base = nn.Sequential(int4(linear()))
    with pytest.raises(UnsupportedLayerError, match=f"needs its weight, and {why}"):
        graft.get_peft_model(base, graft.HiraConfig(r=2, target_modules=["0"]))
    model = disturb(graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"])))
    W, x = identity(base[0].base_layer), torch.ones(2, IN)
    assert_close(model(x), x @ (W + base[0].get_delta_weight("default")).T + base[0].base_layer.bias)
    for options in ({}, {"dequantize": True}):
        refuses(NotImplementedError, why, model.merge_and_unload, **options)
    for fingerprint in ("sampled", "full"):
        model.save_pretrained(tmp_path, fingerprint=fingerprint)


@pytest.mark.parametrize("changed", [False, True])
def test_a_full_fingerprint_sees_codes(changed, tmp_path):
    def base():
        return nn.Sequential(KINDS[0].hold(linear()), KINDS[0].hold(linear()))

    config = graft.LoraConfig(r=2, target_modules=["1"])
    graft.get_peft_model(base(), config).save_pretrained(tmp_path, fingerprint="full")
    other = base()
    other[0].weight.qdata[0, 0] += int(changed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        graft.PeftModel.from_pretrained(other, tmp_path)
    assert ["1 of 4 tensors differ: [0.weight]" in str(w.message) for w in said] == [True] * changed


class Other(Base):
    pass


class Stranger(Tensor):
    __torch_function__ = Base.__dict__["__torch_function__"]
    __torch_dispatch__ = Base.__dict__["__torch_dispatch__"]
    __new__ = Base.__new__
    linear = Int4Tensor.linear


@pytest.mark.parametrize("kind", [Other, Stranger])
def test_tensors_that_nobody_knows_are_never_dense_and_can_be_saved(kind, tmp_path):
    held = dict(qdata=torch.ones(OUT, IN), scale=torch.ones(()))
    layer = nn.Sequential(with_weight(lambda W: kind(W.shape, **held))(linear()))
    assert find_store(layer[0]) is FOREIGN or kind is Other
    model = graft.get_peft_model(layer, graft.LoraConfig(r=2, target_modules=["0"]))
    refuses(NotImplementedError, f"{kind.__name__}, which", model.merge_adapter)
    for fingerprint in ("sampled", "full"):
        model.save_pretrained(tmp_path, fingerprint=fingerprint)
