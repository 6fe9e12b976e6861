# SPDX-License-Identifier: Apache-2.0
"""The stores of torchao's tensors, which a plain module holds in place of its weight.

A tensor knows all its settings, so that a new one is made as the old one was, whatever the model's config says of
other layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from graft.storage.quantized import Quantized, copy_with
from graft.storage.straight import go_straight

Again = Callable[[Any, Tensor], Tensor]  # (the old tensor, new values) → a tensor like the old one


class TorchAO(Quantized):
    """The store of a plain module with a tensor of torchao as weight.

    Args:
        again: quantizes anew; None where graft does not know how the class does that.
    """

    name = "torchao"
    typed = "weight"

    def __init__(self, again: Again | None = None):
        """Keep the function that quantizes anew. `writes` tells whether there is one."""
        self.again, self.writes = again, again is not None

    def values(self, m: nn.Module) -> Tensor:
        """Return the dequantized weight in the module's orientation, times the scales of its inputs if it has such."""
        return dequantize_weight(m.weight)

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        """Return W quantized like the old weight, as the parameter `weight` without gradient.

        If the old weight has scales of inputs, W is divided by them first. `again`, the function that quantizes anew,
        has to be known: the call fails with TypeError otherwise.
        """
        old = m.weight
        if (scale := pre_scale(old)) is not None:
            W = W / scale
        return {"weight": nn.Parameter(self.again(old, W), requires_grad=False)}  # type: ignore[misc]

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return a reason if the weight's class does not override `dequantize`, so that only kernels can unpack it;
        else None.
        """
        kind = type(m.weight)
        if kind.dequantize is Tensor.dequantize:
            return f"its weight is torchao's {kind.__name__}, which only its kernels can unpack"
        return None

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why merging cannot write: the reason of all quantized stores, or graft cannot quantize the class anew.

        None if it can.

        The class only counts for the parameter "weight".
        """
        why = super().why_unwritable(m, name)
        if why is None and name == "weight" and self.again is None:
            return f"its weight is torchao's {type(m.weight).__name__}, which graft cannot quantize anew"
        return why

    def dense(self, m: nn.Module, dtype: torch.dtype | None = None) -> Any:
        """Return a copy of the module, such as an embedding, with the same values as a plain tensor without gradient.

        Weight and bias are in `dtype`, or keep their dtypes; the bias is copied. Replaced forwards and accelerate's
        hook are left out.
        """
        W = self.read(m)
        values = {"weight": nn.Parameter(W.to(dtype or W.dtype), requires_grad=False)}
        if isinstance(bias := m._parameters.get("bias"), Tensor):
            values["bias"] = nn.Parameter(bias.detach().to(dtype or bias.dtype, copy=True), bias.requires_grad)
        clone = copy_with(m, values)
        # torchao and accelerate have bound these to m
        for name in ("extra_repr", "forward", "_old_forward", "_hf_hook"):
            clone.__dict__.pop(name, None)
        return clone

    def ready(self, m: nn.Module) -> None:
        """Give layers that round their inputs a gradient: torchao's rounding passes none on.

        The `__torch_function__` of the weight's class is replaced, once per class. Does nothing for other layers, nor
        for a weight that cannot be decoded. Returns None.
        """
        kind = type(m.weight)
        if rounds_inputs(m.weight) and self.why_undecodable(m) is None:
            go_straight(kind, linear, rounds_inputs, dequantize_weight)


def rounds_inputs(weight: object) -> bool:
    """Return True if a weight has settings for the rounding of its layer's inputs: `act_quant_kwargs` or
    `activation_quantization` is not None.
    """
    of = ("act_quant_kwargs", "activation_quantization")
    return any(getattr(weight, name, None) is not None for name in of)


def dequantize_weight(weight: Tensor) -> Tensor:
    """Return the values of a weight, from `get_original_weight` if it has that, else from `dequantize`.

    They are multiplied by the scales of the inputs, if the weight has such.
    """
    W: Tensor = weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()
    scale = pre_scale(weight)
    return W if scale is None else W * scale


def pre_scale(weight: Tensor) -> Tensor | None:
    """Return the scales of the inputs (in,) that AWQ and SmoothQuant have taken out of a weight (`act_pre_scale`); None
    for other weights.
    """
    return getattr(weight, "act_pre_scale", None)


def granularity(old: Any) -> Any:
    """Return torchao's object for the numbers that share a scale, by the old weight's block size.

    PerTensor without a block or for one of the whole shape, PerRow for one whole row, PerGroup for a part of one row,
    else PerBlock.
    """
    from torchao import quantization as ao

    block, shape = tuple(old.block_size or ()), tuple(old.shape)
    if block in ((), shape):
        return ao.PerTensor()
    if block == (1, shape[1]):
        return ao.PerRow()
    return ao.PerGroup(block[1]) if block[0] == 1 else ao.PerBlock(block)


def mapping(old: Any) -> Any:
    """Return torchao's MappingType: ASYMMETRIC if the old weight has a zero point other than 0, else SYMMETRIC."""
    from torchao.quantization import MappingType

    shifted = old.zero_point is not None and bool(old.zero_point.any())
    return MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC


def int8(old: Any, W: Tensor) -> Tensor:
    """Return an Int8Tensor of W with the granularity and mapping of the old weight.

    Its `reduce_range`, `act_pre_scale`, and `act_quant_kwargs`, `act_quant_scale` and `act_quant_zero_point` are the
    old weight's, too.
    """
    names = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    settings = {name: getattr(old, name) for name in names}
    return type(old).from_hp(W, granularity(old), mapping(old), **settings)


def float8(old: Any, W: Tensor) -> Tensor:
    """Return a Float8Tensor of W with the float dtype and granularity of the old weight.

    Its `mm_config`, `kernel_preference` and `act_quant_kwargs` are the old weight's, too.
    """
    settings = {name: getattr(old, name) for name in ("mm_config", "kernel_preference", "act_quant_kwargs")}
    return type(old).from_hp(W, old.qdata.dtype, granularity(old), **settings)


def intx(old: Any, W: Tensor) -> Tensor:
    """Return an IntxUnpackedToInt8Tensor of W with the old weight's block size, `target_dtype`, mapping and
    `activation_quantization`.

    If the old scales have another dtype than the new ones, W is quantized again with the new scales rounded to that
    dtype and the new zero points.
    """
    settings = dict(mapping_type=mapping(old), activation_quantization=old.activation_quantization)
    make = partial(type(old).from_hp, W, tuple(old.block_size), old.target_dtype, **settings)
    packed = make()
    if packed.scale.dtype != old.scale.dtype:  # then the codes follow from the rounded scales
        scale = packed.scale.to(old.scale.dtype)
        packed = make(intx_choose_qparams_algorithm=None, custom_scale=scale, custom_zero_point=packed.zero_point)
    return packed


def nf4(old: Any, W: Tensor) -> Tensor:
    """Return an NF4Tensor of W, made contiguous, with `block_size` and `scaler_block_size` of the old weight."""
    return type(old).from_tensor(W.contiguous(), old.block_size, old.scaler_block_size)


TENSORS = {
    "torchao.quantization.Int8Tensor": TorchAO(int8),
    "torchao.quantization.Float8Tensor": TorchAO(float8),
    "torchao.quantization.IntxUnpackedToInt8Tensor": TorchAO(intx),
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor": TorchAO(nf4),
    "torchao.utils.TorchAOBaseTensor": TorchAO(),  # Int4Tensor and its like, which have no `dequantize`, and others
}
