# SPDX-License-Identifier: Apache-2.0
"""quanto's row on a stand-in: a layer of that name with a scale for each row, whose arithmetic is here."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import graft
from graft.storage.find import find_store
from tests.models import disturb
from tests.raised import refuses
from tests.storage.cells import FEW, IN, OUT, Kind, cells, linear


class QBytes(Tensor):
    @staticmethod
    def __new__(cls, codes, scale):
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def of(cls, W):
        scale = W.abs().amax(1, keepdim=True) / 127
        return cls((W / scale).round().to(torch.int8), scale)

    def dequantize(self):
        return self.codes * self.scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    __tensor_unflatten__ = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return Product.apply(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of quanto's tensor")


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        y = x.reshape(-1, IN) @ weight.dequantize().T
        return (y if bias is None else y + bias).view(*x.shape[:-1], OUT)

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.weight.dequantize(), None, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class QLinear(nn.Linear):
    weight_qtype = "qint8"

    @property
    def frozen(self):
        return isinstance(self.weight, QBytes)

    @property
    def qweight(self):
        return self.weight if self.frozen else QBytes.of(self.weight.detach())

    def forward(self, x):
        return F.linear(x, self.qweight, self.bias)


QLinear.__module__ = "optimum.quanto.nn.qlinear"


def hold(layer, frozen=True):
    made = QLinear(IN, OUT, layer.bias is not None).requires_grad_(False)
    made.weight.data, made.bias = layer.weight.data.clone(), layer.bias
    if frozen:
        made.weight = nn.Parameter(made.qweight, requires_grad=False)
    return made


KINDS = [Kind("quanto", hold), Kind("quanto-thawed", lambda layer: hold(layer, False))]
globals().update(cells(KINDS, FEW))


def test_a_view_that_its_function_has_made_is_not_written_to():
    layer, x = hold(linear()), torch.ones(2, 3, IN, requires_grad=True)
    refuses(RuntimeError, "view", layer(x)[0].add_, 1)
    y = find_store(layer).protect(layer(x))
    y[0] += 1
    y.sum().backward()
    assert_close(x.grad, layer.weight.dequantize().sum(0).expand_as(x))


def test_mixed_batches():
    base = nn.Sequential(hold(linear()))
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", graft.LoraConfig(r=2, target_modules=["0"]))
    model, x = disturb(model), torch.linspace(-1, 1, 3 * IN).view(3, IN)
    expected = [model(x[:1])]
    model.set_adapter("b")
    expected += [model(x[1:2]), hold(linear())(x[2:])]
    mixed = model(x.requires_grad_(), adapter_names=["a", "b", "__base__"])
    assert_close(mixed, torch.cat(expected))
    mixed.sum().backward()
    assert x.grad.abs().sum(1).min() > 0


def test_a_layer_that_rounds_inputs_alone_has_no_packed_weight():
    layer = hold(linear(), frozen=False)
    layer.weight_qtype = None
    assert find_store(layer).why_unreadable(layer) == "it has no quantized weight"
