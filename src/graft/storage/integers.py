# SPDX-License-Identifier: Apache-2.0
"""The stores of transformers' layers that hold small integers: Gemma's of 8, 4 and 2 bits, BitNet's of three values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.storage.quantized import OwnModule


def unpack_integers(packed: Tensor, bits: int) -> Tensor:
    """Return the numbers packed into bytes as int32, the first in the lowest bits: (…, bytes) → (…, bytes · 8 / bits).

    `packed` is cast to uint8 first.
    """
    byte = packed.to(torch.uint8).int()
    return torch.stack([byte >> shift & 2**bits - 1 for shift in range(0, 8, bits)], -1).flatten(-2)


def pack_integers(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers from 0 to 2**bits - 1 into bytes, the reverse of `unpack_integers`: (…, n) → uint8 (…, n · bits /
    8).

    Zeros fill the last byte.
    """
    per = 8 // bits
    numbers = nn.functional.pad(numbers, (0, -numbers.shape[-1] % per)).unflatten(-1, (-1, per))
    shifts = torch.arange(0, 8, bits, device=numbers.device)
    return (numbers.int() << shifts).sum(-1).to(torch.uint8)


class Gemma(OwnModule):
    """The store of Gemma's layers: integers of 8, 4 or 2 bits, with a scale for each row."""

    name = "gemma"
    parts: tuple[str, ...] = ("weight", "weight_scale")

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight (out, in): codes times the scale of their row, in the dtype of the scales.

        Codes of less than 8 bits are unpacked, cut to in_features and shifted by half their range.
        """
        codes = m.weight
        if m.num_bits < 8:
            codes = unpack_integers(codes, m.num_bits)[:, : m.in_features] - 2 ** (m.num_bits - 1)
        return codes * m.weight_scale

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        """Return new codes and scales of W as parameters, by name, in the bits of the old weight.

        The scale of a row is its largest magnitude, at least 1e-12, divided by the largest code. Codes are int8 with 8
        bits, otherwise packed. The weight requires no gradient; scales keep dtype and requires_grad.
        """
        half = 2 ** (m.num_bits - 1)
        scale = W.abs().amax(1, keepdim=True).clamp_min(1e-12) / max(half - 1, 1)
        codes = (W / scale).round().clamp(-half, half - 1)
        weight = codes.to(torch.int8) if m.num_bits == 8 else pack_integers(codes + half, m.num_bits)
        old = m.weight_scale
        return {
            "weight": nn.Parameter(weight, requires_grad=False),
            "weight_scale": nn.Parameter(scale.to(old.dtype), requires_grad=old.requires_grad),
        }

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why merging cannot write the weight: scales of inputs or outputs were calibrated for it, as one of
        both is not 0.

        Scales on the meta device do not count. Otherwise, and for another tensor than `weight`, it is the reason of all
        quantized stores, or None.
        """
        scales = (m.input_activation_scale, m.output_activation_scale)
        if name == "weight" and any(not s.is_meta and s.item() != 0 for s in scales):
            return "the scales of its inputs and outputs were calibrated for its weight, and would be wrong for another"
        return super().why_unwritable(m, name)

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return True: rounded activations give a gradient of zero, and reading their scales would wait for the GPU."""
        return True


class Bits(OwnModule):
    """The store of BitNet's layers: weights of -1, 0 and 1, four in a byte; a scale divides them.

    Merging is refused, as they were trained as they are.
    """

    name = "bitnet"
    parts: tuple[str, ...] = ("weight", "weight_scale")
    calibrated = "its weight is ternary codes that the model was trained with"
    typed = "weight_scale"

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return a reason if the layer has a norm before its weight, so that it is not linear; None otherwise."""
        return None if m.rms_norm is None else "the layer has a norm before its weight, so that it is not linear"

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight (out, in): (codes - 1) divided by the scale in float32, then cast to the scale's dtype.

        Byte n holds rows n, n + N/4, n + N/2 and n + 3 N/4.
        """
        # a byte has rows n, n + N/4, n + N/2 and n + 3 N/4
        codes = unpack_integers(m.weight.T, 2).unflatten(-1, (-1, 4))
        W = codes.permute(2, 1, 0).reshape(m.out_features, m.in_features)
        return ((W - 1) / m.weight_scale.float()).to(m.weight_scale.dtype)

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return True: the layer rounds its inputs, and its own backward pass is never used."""
        return True


class AutoBits(Bits):
    """The store of BitNet's layers that are unpacked when loaded, where a scale multiplies the output; or rounded at
    each call (`online_quant`).
    """

    parts = ("weight",)
    typed = "weight"

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return a reason if the layer has a norm before its weight, or a bias that its scale multiplies as well; None
        otherwise.

        With `online_quant` the scale does not multiply the bias.
        """
        why = super().why_undecodable(m)
        if why is None and m.bias is not None and not m.online_quant:
            return "its scale multiplies its bias as well, which graft does not know how to fold"
        return why

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight times its scale; with `online_quant` the weight rounded to -1, 0 and 1 times its mean
        magnitude.

        The mean is taken in float32 over the whole weight, at least 1e-5; the result has the weight's dtype.
        """
        if not m.online_quant:
            return m.weight.detach() * m.weight_scale
        W = m.weight.detach().float()
        scale = W.abs().mean().clamp_min(1e-5)
        return ((W / scale).round().clamp(-1, 1) * scale).to(m.weight.dtype)

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return False: the layer has a backward pass, so that only a missing gradient is replaced."""
        return False


TRANSFORMERS = "transformers.integrations"
MODULES = {
    f"{TRANSFORMERS}.gemma_quant.QuantizedLinear": Gemma(),
    f"{TRANSFORMERS}.bitnet.BitLinear": Bits(),
    f"{TRANSFORMERS}.bitnet.AutoBitLinear": AutoBits(),
}
