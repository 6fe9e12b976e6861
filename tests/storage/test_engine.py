# SPDX-License-Identifier: Apache-2.0
"""Linear layers of Transformer Engine, by stand-ins: their names, attributes and 8-bit tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import graft
from graft.core.errors import UnsupportedLayerError
from graft.core.ops import find_op
from graft.storage.shared_work import why_no_adapter
from tests.models import disturb, seeded
from tests.raised import refuses

PYTORCH = "transformer_engine.pytorch"


class Float8Tensor(Tensor):
    """Codes and a scale, which look like a tensor of the values."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.to(self.dtype) * self.scale

    def __repr__(self, **_: Any) -> str:
        return "Float8Tensor"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            t = args[0]
            return Float8Tensor(t.codes, t.scale, t.dtype)
        raise NotImplementedError(f"{function} of packed values")


Float8Tensor.__module__ = f"{PYTORCH}.tensor.float8_tensor"


class Linear(nn.Module):
    """Takes and returns what nn.Linear does; `return_bias` and `parallel_mode` change that."""

    def __init__(self, W: Tensor, b: Tensor | None, packed: bool, **options: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.return_bias, self.parallel_mode, self.tp_size = False, None, 1
        self.__dict__.update(options)
        scale = W.abs().max() / 127
        codes = (W / scale).round().to(torch.int8)
        self.weight = nn.Parameter(Float8Tensor(codes, scale, W.dtype) if packed else codes * scale)
        self.bias = None if b is None else nn.Parameter(b.clone())

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        W = self.weight
        return nn.functional.linear(inp, W.dequantize() if isinstance(W, Float8Tensor) else W, self.bias)


Linear.__module__ = f"{PYTORCH}.module.linear"


class Net(nn.Module):
    def __init__(self, packed: bool, **options: Any) -> None:
        super().__init__()
        with seeded(0):
            W, b = torch.randn(6, 10), torch.randn(6)
        self.layer = Linear(W, b, packed, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Dense(nn.Module):
    """The same with a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        held = Net(False).layer
        self.layer = nn.Linear(10, 6)
        self.layer.load_state_dict(held.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


CONFIGS = {
    "LORA": lambda: graft.LoraConfig(r=2, target_modules=["layer"]),
    "DORA": lambda: graft.LoraConfig(r=2, use_dora=True, target_modules=["layer"]),
    "LOHA": lambda: graft.LoHaConfig(r=2, target_modules=["layer"]),
    "OFT": lambda: graft.OFTConfig(r=0, oft_block_size=5, target_modules=["layer"]),
    "IA3": lambda: graft.IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "HIRA": lambda: graft.HiraConfig(r=2, target_modules=["layer"]),
}


def trained(base: nn.Module, name: str) -> tuple[Any, Tensor]:
    with seeded(1):
        model = graft.get_peft_model(base, CONFIGS[name]())
    disturb(model)
    with seeded(2):
        x = torch.randn(5, 10)
    loss = model(x).square().sum()
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return model, torch.cat([model(x).detach().flatten(), gradients])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "float8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_a_plain_layer(name, packed):
    assert_close(trained(Net(packed), name)[1], trained(Dense(), name)[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_weights_merge_and_8_bit_ones_say_why_not(name):
    x = torch.randn(4, 10)
    model, _ = trained(Net(False), name)
    expected = model(x)
    model.merge_adapter()
    assert_close(model(x), expected)
    model.unmerge_adapter()
    assert_close(model(x), expected)
    model, _ = trained(Net(True), name)
    expected = model(x)
    refuses(NotImplementedError, r"8-bit floats.*bfloat16", model.merge_adapter)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "options, why",
    [(dict(return_bias=True), "returns its bias"), (dict(tp_size=2, parallel_mode="column"), "parallel_mode 'column'")],
)
def test_what_a_layer_does_in_another_way_is_refused(options, why):
    net = Net(False, **options)
    refuses(UnsupportedLayerError, why, graft.get_peft_model, net, CONFIGS["LORA"]())
    assert type(net.layer) is Linear


def test_a_parametrized_layer_of_a_package_is_still_that_packages():
    """Its class is torch's, made for it, below which the package's stands."""
    kind = type("ColumnParallelLinear", (nn.Linear,), {"__module__": "megatron.core.tensor_parallel.layers"})
    module = kind(4, 4)
    module.sequence_parallel = True
    parametrize.register_parametrization(module, "bias", nn.Identity())
    assert type(module).__module__.startswith("torch.")
    assert "sequence parallel" in str(why_no_adapter(module, find_op(module), False))
    module = Net(False, return_bias=True).layer
    parametrize.register_parametrization(module, "bias", nn.Identity())
    assert type(module).__module__.startswith("torch.")
    assert "returns its bias" in str(why_no_adapter(module, find_op(module), False))
