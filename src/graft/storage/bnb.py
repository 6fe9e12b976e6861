# SPDX-License-Identifier: Apache-2.0
"""The stores of bitsandbytes' layers and embeddings: codes of 4 bits with a scale for each block, of 8 bits with one
for each row."""

from __future__ import annotations

import copy
import math
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.ops import Embedding
from graft.storage.dense import Dense
from graft.storage.quantized import Quantized, move_snapshot

REARRANGES = "_graft_held_in_order"  # mark on layers after graft has switched off the layout
BLOCK = 32  # rows that the layout for AVX512-BF16 interleaves


def functional() -> ModuleType:
    """Import `bitsandbytes.functional` and return it."""
    return import_module("bitsandbytes.functional")


class Four(Quantized):
    """Linear4bit, LinearNF4 and LinearFP4: `weight` has two codes in a byte, `quant_state` their scales and type."""

    name = "bnb 4bit"  # as in PEFT
    parts = ("weight", "quant_state")

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight (out, in), dequantized to the dtype of its quant_state; a rearrangement for AVX512-BF16 is
        undone first, in a copy.
        """
        return functional().dequantize_4bit(*undo_rearrangement(m.weight.data, find_quant_state(m)))

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        """Return a new Params4bit with the values W, quantized on the device of W, and its quant_state: `weight` and
        `quant_state`.

        Block size, quantization type, storage dtype and double quantization are those of the old weight, which does not
        change. The new weight has no gradient, and refers to the same module as the old one.
        """
        old, state = m.weight, find_quant_state(m)
        data, _ = undo_rearrangement(old.data, state)
        parameter = import_module("bitsandbytes.nn").Params4bit(
            W.contiguous(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=getattr(old, "compress_statistics", state.nested),
            quant_type=state.quant_type,
            quant_storage=data.dtype,
        )
        parameter = parameter.to(W.device)  # quantizes
        parameter.module = getattr(old, "module", None)
        return {"weight": parameter, "quant_state": parameter.quant_state}

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> dict[str, object]:
        """Return the present weight and quant_state themselves, without a copy, as `weight` and `quant_state`."""
        return {"weight": m.weight, "quant_state": find_quant_state(m)}

    def restore(self, m: nn.Module, name: str, state: dict[str, object]) -> None:
        """Put weight and quant_state of a snapshot back into the module, moved to the device where the module computes.

        The quant_state is that of the moved weight; that of the snapshot if the moved weight has none.
        """
        weight = move_snapshot(state["weight"], self.where(m)[0])  # with its quant_state
        self.put(m, {"weight": weight, "quant_state": getattr(weight, "quant_state", None) or state["quant_state"]})

    def compute_dtype(self, m: nn.Module) -> torch.dtype | None:
        """Return the dtype that the weight decodes to: the quant_state's, or for an interleaved layout its original
        dtype.

        Without a quant_state return the weight's dtype if that is a floating-point one, else None.
        """
        state = find_quant_state(m)
        if state is not None:
            return getattr(state, "original_dtype", state.dtype) if is_interleaved(state) else state.dtype
        return m.weight.dtype if m.weight.is_floating_point() else None

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return why the codes cannot be decoded, or None if they can.

        The first of three reasons: no quant_state (not quantized yet); codes with another dtype than their storage,
        unless interleaved (cast); fewer codes, two in each byte, than the shape in the quant_state has numbers
        (sharded).
        """
        weight, state = m.weight, find_quant_state(m)
        if state is None:
            return "its weight is not quantized yet: bitsandbytes does so in .to(device), also in .to('cpu')"
        size, wanted = weight.numel() * weight.element_size() * 2, math.prod(state.shape)
        storage = getattr(weight, "quant_storage", weight.dtype)
        if weight.dtype != storage and not is_interleaved(state):
            return f"its codes were cast from {storage} to {weight.dtype}, which destroys them: load the model again"
        if size < wanted:
            return f"its codes are {size} of {wanted}: they are sharded"
        return None

    def ready(self, m: nn.Module) -> str | None:
        """Switch off bitsandbytes' layout for AVX512-BF16, which has no backward pass, and undo it if the weight has it
        already.

        A layer with `support_avx512bf16_for_cpu` gets it set to False and a mark, so that `release` allows the layout
        again. A rearranged weight gets its earlier codes and quant_state in place, and the module gets this
        quant_state. Return a warning for the user then, as the scales stay rounded to bfloat16. Return None otherwise,
        also for a weight on the meta device or without quant_state.
        """
        if getattr(m, "support_avx512bf16_for_cpu", False):
            m.__dict__.update({"support_avx512bf16_for_cpu": False, REARRANGES: True})
        weight, state = m.weight, find_quant_state(m)
        if weight.is_meta or state is None or not (is_interleaved(state) or is_transposed(state)):
            return None
        weight.data, weight.quant_state = undo_rearrangement(weight.data, state)
        m.quant_state = weight.quant_state
        return (
            "bitsandbytes has rearranged weights of 4 bits for AVX512-BF16; graft puts them back so that adapters get "
            "gradients, but their scales stay rounded to bfloat16. Adapt a model before its first forward pass."
        )

    def release(self, m: nn.Module) -> None:
        """Allow bitsandbytes' layout for AVX512-BF16 again, if `ready` switched it off; the mark on the layer goes."""
        if m.__dict__.pop(REARRANGES, False):
            m.__dict__["support_avx512bf16_for_cpu"] = True


def find_quant_state(m: nn.Module) -> Any:
    """Return the quant_state of the weight, or that of the module if the weight has none; None if neither has one.

    The weight has none after FSDP has replaced it by a plain parameter.
    """
    state = getattr(m.weight, "quant_state", None)
    return getattr(m, "quant_state", None) if state is None else state


def is_interleaved(state: object) -> bool:
    """Return True if a quant_state says by `packing_format_for_cpu` that its codes are in bitsandbytes' layout for
    AVX512-BF16.
    """
    return bool(getattr(state, "packing_format_for_cpu", False))


def is_transposed(state: Any) -> bool:
    """Return True if the scales have two dimensions.

    bitsandbytes has then put the codes back in order, for `state_dict()`, but left the scales transposed.
    """
    return state.absmax.dim() == 2


def undo_rearrangement(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return codes and quant_state as they were before bitsandbytes rearranged them for AVX512-BF16.

    That layout has a block of 32 rows, (32, K/2, 2) codes, as (K/2, 32, 2): each 64 codes are 32 low and 32 high halves
    of bytes. The scales (N, K/blocksize) are transposed there, in bfloat16, and no longer quantized.

    The new quant_state is a shallow copy. Its `absmax` is flat float32. If only the scales are transposed, the codes
    are returned as they are, and nothing else changes in it. Else it also gets its `original_dtype`, no nested
    quantization, and `packing_format_for_cpu` False. Weights without the layout are returned unchanged, with the same
    quant_state; the arguments never change.
    """
    if not (is_interleaved(state) or is_transposed(state)):
        return data, state
    state = copy.copy(state)
    state.absmax = state.absmax.T.reshape(-1).float()
    if not is_interleaved(state):
        return data, state
    rows, columns = state.shape
    halves = data.reshape(-1, BLOCK)
    codes = torch.cat([halves & 15, halves >> 4], 1).view(rows // BLOCK, columns // 2, BLOCK, 2).transpose(1, 2)
    packed = (codes[..., 0] << 4 | codes[..., 1]).reshape(state.original_qshape)
    state.dtype, state.packing_format_for_cpu = state.original_dtype, False
    state.nested, state.state2, state.offset = False, None, None
    return packed.view(getattr(state, "original_storage_type", None) or packed.dtype), state


class Eight(Quantized):
    """Linear8bitLt: `weight` holds codes; a scale for each row is with it or, after a forward pass, in `state`."""

    name = "bnb 8bit"
    typed = "weight"

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight (out, in): float32 for codes; a weight of floats is rounded to 8 bits, in its own dtype."""
        return dequantize_rows(m.weight.data, scales_of(m))

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        """Return int8 codes and float32 scales of W, as `codes` and `scales`.

        For a weight that the module rounds at each call (`has_fp16_weights`) the codes are W itself, and the scales are
        None.
        """
        codes, scales = (W, None) if m.weight.has_fp16_weights else quantize_rows(W)
        return {"codes": codes, "scales": scales}

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> dict[str, object]:
        """Return the weight's present data and scales, without a copy, as `codes` and `scales`; scales are None for
        floats.
        """
        return {"codes": m.weight.data, "scales": scales_of(m)}

    def snapshot_values(self, m: nn.Module, name: str, state: dict[str, Any]) -> Tensor:
        """Return the values of a snapshot: codes · scales / 127 in float32, or floats rounded to 8 bits and back in
        their dtype.

        The module is not read.
        """
        return dequantize_rows(**state)

    def trains(self, m: nn.Module) -> bool:
        """Return True if the weight holds floats and has `has_fp16_weights` set: the module rounds them at each call.

        The flag is the weight's attribute; AttributeError if the weight lacks it.
        """
        return bool(m.weight.is_floating_point() and m.weight.has_fp16_weights)

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return an error text if the weight holds codes without scales (SCB); None otherwise, also for a weight of
        floats that is not quantized yet.
        """
        scaled = m.weight.is_floating_point() or scales_of(m) is not None
        return None if scaled else "its weight has no scales (SCB): load the model again"

    def put(self, m: nn.Module, values: dict[str, object]) -> None:
        """Replace the weight by a new one of the same class, with `codes` and `scales` from `values`, and reset the
        module's state.

        The next forward pass then takes codes and scales from the weight. `requires_grad` and `has_fp16_weights` stay.
        """
        old, codes, scales = m.weight, values["codes"], values["scales"]
        rounds = dict(requires_grad=old.requires_grad, has_fp16_weights=old.has_fp16_weights)
        m._parameters["weight"] = type(old)(codes, CB=None if scales is None else codes, SCB=scales, **rounds)
        if hasattr(m, "state"):
            m.state.reset_grads()  # the next forward pass takes codes and scales from the weight


def scales_of(m: nn.Module) -> Tensor | None:
    """Return the scales of codes (N,), from the weight's `SCB`, or else from the module's `state`.

    None if the weight holds floats, which the module rounds at each call, or if neither place has scales.
    """
    if m.weight.is_floating_point():
        return None
    scales = getattr(m.weight, "SCB", None)
    return scales if scales is not None else getattr(getattr(m, "state", None), "SCB", None)


def quantize_rows(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (N, K) and float32 scales (N,) of W, which bitsandbytes' kernel rounds from float16."""
    codes, scales, *_ = functional().int8_vectorwise_quant(W.contiguous().half())
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor | None) -> Tensor:
    """Return codes · scales / 127, (N, K), in float32.

    Without scales `codes` are floats: they are rounded to 8 bits and back as the module does, and returned in their
    dtype.
    """
    dtype = None
    if scales is None:
        dtype, (codes, scales) = codes.dtype, quantize_rows(codes)
    return (codes * (scales * (1 / 127))[:, None]).to(dtype)


class Table(Quantized):
    """The base of the stores of bitsandbytes' embeddings."""

    def dense(self, m: nn.Module, dtype: torch.dtype | None = None) -> nn.Embedding:  # type: ignore[override]
        """Return a new plain embedding with the dequantized table, in `dtype` or the module's dtype.

        Padding index, norm limits, `scale_grad_by_freq` and `sparse` are the module's. The table has no gradient; the
        mode is the module's.
        """
        W = self.read(m)
        options = (m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)
        return nn.Embedding.from_pretrained(W.to(dtype or m.dtype), True, *options).train(m.training)


class Table4(Table, Four):
    pass


class Table8(Table, Eight):
    pass


TABLES: dict[str, Dense] = {
    "bitsandbytes.nn.modules.Embedding4bit": Table4(),
    "bitsandbytes.nn.modules.Embedding8bit": Table8(),
    "bitsandbytes.nn.modules.Embedding": Dense(),  # the same computation as nn.Embedding
}
LINEAR: dict[str, Dense] = {
    "bitsandbytes.nn.modules.Linear4bit": Four(),
    "bitsandbytes.nn.modules.Linear8bitLt": Eight(),
}
MODULES = LINEAR | TABLES
OPS = dict.fromkeys(TABLES, Embedding())
