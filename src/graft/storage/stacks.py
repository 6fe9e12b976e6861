# SPDX-License-Identifier: Apache-2.0
"""Packed stacks of matrices, such as the experts of a block: codes and scales, dequantized matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from graft.core.finite import measure_survival
from graft.core.ops import TypeTable
from graft.storage.float8 import FP4, decode, encode, unpack_pairs

S = TypeVar("S", bound="PackedMatrices")
Fold = Callable[[int, Tensor], Tensor]  # expert, its matrix (out, in) in at least float32 → the matrix with all updates


@dataclass(frozen=True)
class PackedMatrices:
    """A packed stack, canonical: (experts, out, in)."""

    shape: tuple[int, int, int]
    weight: Any  # the codes of all matrices

    name: ClassVar[str]
    why_unwritable: ClassVar[str | None] = None  # why graft cannot write it

    @classmethod
    def of(cls, m: nn.Module, name: str) -> PackedMatrices:
        """Raise NotImplementedError here.

        A format returns the packed stack `name` of a module, which shares its tensors.
        """
        raise NotImplementedError

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Raise NotImplementedError here. A format returns one matrix (out, in), decoded, in `dtype`."""
        raise NotImplementedError

    def dense(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the matrices of some experts, decoded from `in_rows()` one at a time into new memory: (n, out, in) in
        `dtype`.
        """
        stack, out = self.in_rows(), torch.empty(len(experts), *self.shape[1:], dtype=dtype, device=self.device)
        for W, expert in zip(out, experts):
            W.copy_(stack.matrix(expert, dtype))
        return out

    def in_rows(self: S) -> S:
        """Return the stack itself: its layout is that of the file, so that single matrices can be read.

        A format that may be in a kernel's order overrides this.
        """
        return self

    @property
    def device(self) -> torch.device:
        """The device of `weight`."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the dense stack; None if nothing tells, as here."""
        return None

    @property
    def why_unreadable(self) -> str | None:
        """Why the stack cannot be read: it is on the meta device. None if it can."""
        on_meta = self.device.type == "meta"
        return "it is on the meta device, not loaded: have the model on real devices first" if on_meta else None

    def remake(self, matrix: Callable[[int], Tensor]) -> PackedMatrices:
        """Raise NotImplementedError here.

        A format returns a new stack with other values and the settings of this one.

        This one does not change.

        Args:
            matrix: returns the new matrix (out, in) of an expert. It may be called twice for one expert; results are
                not kept.
        """
        raise NotImplementedError

    def fold_one(self, fold: Fold, expert: int) -> tuple[Tensor, Tensor]:
        """Return an expert's matrix (out, in) and the result of `fold` for it.

        The first is in the stack's dtype, float32 if that is unknown; `fold` gets it in at least float32.
        """
        W = self.matrix(expert, self.dtype or torch.float32)
        return W, fold(expert, W.to(torch.promote_types(W.dtype, torch.float32)))

    def fold(self, fold: Fold) -> tuple[PackedMatrices, Tensor]:
        """Return a new stack with all matrices folded, and the sum over experts of `measure_survival` of the updates,
        (2,).

        First the new stack is made by `remake` of `in_rows()`, from folded matrices rounded to the stack's dtype. Then
        each matrix is folded again, to compare it with that of the new stack, read in that dtype. `fold` is so called
        at least twice for each expert. This stack does not change.
        """
        stack = self.in_rows()

        def matrix(expert: int) -> Tensor:
            """Return the folded matrix (out, in) of an expert, rounded to the stack's dtype."""
            W, wide = stack.fold_one(fold, expert)
            return wide.to(W.dtype)

        new, shares = stack.remake(matrix), []
        for expert in range(self.shape[0]):
            W, wide = stack.fold_one(fold, expert)
            shares.append(measure_survival(W, wide, new.matrix(expert, W.dtype)))
        return new, torch.stack(shares).sum(0)

    def folds_finite(self, fold: Fold) -> bool:
        """Return True if all numbers of the folded matrices are finite in the stack's dtype. Nothing is stored."""
        pairs = map(partial(self.in_rows().fold_one, fold), range(self.shape[0]))
        return bool(torch.stack([wide.to(W.dtype).isfinite().all() for W, wide in pairs]).all())

    def put(self, m: nn.Module, name: str) -> None:
        """Replace the parameter `name` of a module by `weight`, without gradient."""
        m._parameters[name] = nn.Parameter(self.weight, requires_grad=False)

    def to(self, device: torch.device) -> PackedMatrices:
        """Return a stack with `weight` on a device."""
        return replace(self, weight=self.weight.to(device))

    def runs(self, m: nn.Module, x: Tensor, trains: bool) -> bool:
        """Raise NotImplementedError here.

        A format returns True if the module's forward can run x, with gradients if `trains`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FineFP8(PackedMatrices):
    """transformers' FP8Experts: 8-bit floats with a scale for each block, or 4-bit ones with one for 32 of a row."""

    # weight: (experts, out, in), or in bytes of two codes (experts, out, in/2)
    scale: Any
    block: tuple[int, int] | None = None

    name = "fp8"

    @classmethod
    def of(cls, m: nn.Module, name: str) -> FineFP8:
        """Return the stack of an FP8Experts module, with its scales `<name>_scale_inv` and the module's `block_size`;
        gradients do not flow.

        An int8 weight holds two 4-bit codes in a byte, so that `in` is twice its last size.
        """
        weight, scale = getattr(m, name), getattr(m, f"{name}_scale_inv")
        n, out_features, in_features = weight.shape
        shape = n, out_features, in_features * (2 if weight.dtype == torch.int8 else 1)
        return cls(shape, weight.data, scale.data, m.block_size)

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return one matrix (out, in), decoded in float32 and cast to `dtype`."""
        return decode(self.weight[expert], self.scale[expert], self.block).to(dtype)

    def remake(self, matrix: Callable[[int], Tensor]) -> FineFP8:
        """Return a new stack of `matrix(expert)` by `in_rows()`, in the dtypes and block size of this one.

        Scales of 8-bit floats are chosen anew; those of 4-bit floats only grow. This stack does not change.
        """
        stack = self.in_rows()
        weight, scale = stack.weight.clone(), stack.scale.clone()
        for e in range(len(weight)):
            weight[e], scale[e] = encode(matrix(e), weight[e], scale[e], self.block)
        return replace(self, weight=weight, scale=scale)

    def put(self, m: nn.Module, name: str) -> None:
        """Replace the module's weight and scales by new parameters without gradient."""
        super().put(m, name)
        m._parameters[f"{name}_scale_inv"] = nn.Parameter(self.scale, requires_grad=False)

    def to(self, device: torch.device) -> FineFP8:
        """Return the stack with weight and scales on a device, by `in_rows()`; itself if it is there already."""
        if self.device == device:
            return self
        stack = self.in_rows()
        return replace(self, weight=stack.weight.to(device), scale=stack.scale.to(device))

    def runs(self, m: nn.Module, x: Tensor, trains: bool) -> bool:
        """Return True on a device other than the CPU, if no gradient is wanted or the module has a backward pass.

        It has one for 8-bit floats, if `_experts_implementation` of its config is "eager", "grouped_mm" or not set.
        """
        how = getattr(m.config, "_experts_implementation", None)
        has_backward = self.weight.dtype != torch.int8 and how in (None, "eager", "grouped_mm")
        return x.device.type != "cpu" and (has_backward or not trains)


@dataclass(frozen=True)
class MXFP4(FineFP8):
    """transformers' experts of gpt-oss: 4-bit floats, with a power of two for each 32 of a row.

    On a GPU the tensors are Triton's, in an order of its kernels. Else `weight` is codes (experts, out, in/2), low half
    first, and `scale` exponents (experts, out, in/32), from -127. Without `block`.
    """

    name = "mxfp4"

    @classmethod
    def of(cls, m: nn.Module, name: str) -> MXFP4:
        """Return the stack of a gpt-oss block: `gate_up_proj` (experts, 2 · inner, width), else (experts, width,
        inner).

        The sizes are `num_experts`, `intermediate_size` and `hidden_size` of the block. Scales are the `weight_scale`
        of `<name>_precision_config`, None without one.
        """
        n, inner, width = m.num_experts, m.intermediate_size, m.hidden_size
        shape = (n, 2 * inner, width) if name == "gate_up_proj" else (n, width, inner)
        config = getattr(m, f"{name}_precision_config")
        return cls(shape, getattr(m, name), getattr(config, "weight_scale", None))

    @property
    def device(self) -> torch.device:
        """The device of the codes, or of the data of Triton's tensor."""
        t: Tensor = self.weight if isinstance(self.weight, Tensor) else self.weight.storage.data
        return t.device

    @property
    def why_unreadable(self) -> str | None:
        """Why the stack cannot be read: it is on the meta device, or has no scales. None if it can."""
        return super().why_unreadable or ("it has no scales: load the model again" if self.scale is None else None)

    def in_rows(self) -> MXFP4:
        """Return the stack with codes and scales in the layout of the file; itself if they are plain tensors
        already.
        """
        if isinstance(self.weight, Tensor):
            return self
        return replace(self, weight=in_rows(self.weight), scale=in_rows(self.scale))

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return one matrix (out, in), decoded, in `dtype`.

        The codes must be in the layout of the file: see `in_rows`.

        Values are multiplied by 2 to the power of their scale's byte less 127. Products are computed in `dtype` if that
        is float32 or bfloat16, else in float32.
        """
        exact = dtype if dtype.itemsize == 4 or dtype == torch.bfloat16 else torch.float32
        values = unpack_pairs(self.weight[expert], FP4, True, exact).unflatten(1, (-1, 32))
        return torch.ldexp(values, self.scale[expert].int()[..., None] - 127).flatten(1).to(dtype)

    def put(self, m: nn.Module, name: str) -> None:
        """Put codes and scales into the module.

        There are three cases. Plain tensors in a module of Triton kernels are converted by transformers to their
        layout. Plain tensors in another module become a parameter without gradient, and the scale of its precision
        config. Triton's tensors are set as attribute and scale.
        """
        config = getattr(m, f"{name}_precision_config")
        if isinstance(self.weight, Tensor) and not isinstance(getattr(m, name), Tensor):
            integration = import_module("transformers.integrations.mxfp4")
            integration.swizzle_mxfp4_convertops(
                self.weight, self.scale, m, name, self.weight.device, integration.triton_kernels_hub
            )
        elif isinstance(self.weight, Tensor):
            m._parameters[name] = nn.Parameter(self.weight, requires_grad=False)
            config.weight_scale = self.scale
        else:
            setattr(m, name, self.weight)
            config.weight_scale = self.scale

    def runs(self, m: nn.Module, x: Tensor, trains: bool) -> bool:
        """Return True if the input is on no CPU and `trains` is False: the kernels have no backward pass."""
        return x.device.type != "cpu" and not trains


def in_rows(t: Tensor) -> Tensor:
    """Return the data of Triton's tensor in the layout of the file; a plain tensor unchanged."""
    return t if isinstance(t, Tensor) else t.storage.layout.unswizzle_data(t.storage.data).mT


@dataclass(frozen=True)
class Bnb4(PackedMatrices):
    """bitsandbytes' parametrization: 4-bit codes, high half first, with a scale for each block of a stack."""

    state: Any  # QuantState
    flipped: bool  # the module stores (experts, in, out)

    name = "bnb 4bit"

    @classmethod
    def of(cls, m: nn.Module, name: str) -> Bnb4:
        """Return the stack of a parametrized module: the original codes, and the quant_state of the first
        parametrization.

        The shape is (n, rows, columns) of the quant_state; a module with `is_transposed` has the last two exchanged,
        and the stack is flipped.
        """
        parametrization = m.parametrizations[name]
        state, flipped = parametrization[0].quant_state, bool(getattr(m, "is_transposed", False))
        n, rows, columns = state.shape
        return cls((n, columns, rows) if flipped else (n, rows, columns), parametrization.original.data, state, flipped)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the quant_state: matrices are decoded to it."""
        return self.state.dtype

    @property
    def why_unreadable(self) -> str | None:
        """Why the stack cannot be read: a matrix is no multiple of the block size, or it is on the meta device.

        None if it can.
        """
        _, out_features, in_features = self.shape
        if out_features * in_features % self.state.blocksize:
            return (
                f"a matrix of {out_features} × {in_features} is no multiple of the {self.state.blocksize} numbers that "
                "share a scale, so that blocks reach from one matrix to the next: quantize with another blocksize"
            )
        return super().why_unreadable

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return one matrix (out, in), decoded in float32, rounded to the stack's dtype and cast to `dtype`.

        On a GPU the table of codes is read once for each quantization type. A flipped matrix is a transposed view.
        """
        _, out_features, in_features = self.shape
        size, block = out_features * in_features, self.state.blocksize
        codes = self.weight.view(torch.uint8).flatten()[expert * size // 2 : (expert + 1) * size // 2]
        table = tuple(self.state.code.tolist()) if self.state.code.device.type == "cpu" else read_code_table(self.state)
        values = unpack_pairs(codes, table, False).view(-1, block)
        values.mul_(self._scales(expert * size // block, (expert + 1) * size // block)[:, None])
        W = values.to(self.state.dtype).to(dtype)
        return W.view(in_features, out_features).T if self.flipped else W.view(out_features, in_features)

    def _scales(self, first: int, last: int) -> Tensor:
        """Return the scales of the blocks from `first` to before `last`, in float32.

        Nested ones are decoded: the outer code of each times the outer scale of its block, plus the offset.
        """
        state, scales = self.state, self.state.absmax[first:last]
        if not state.nested:
            return scales.float()
        outer = state.state2
        places = torch.arange(first, last, device=scales.device) // outer.blocksize
        return outer.code[scales.int()] * outer.absmax[places] + state.offset

    def remake(self, matrix: Callable[[int], Tensor]) -> Bnb4:
        """Return a new stack of `matrix(expert)`, each quantized with the old settings; this stack does not change.

        Nested scales are quantized again together, after their mean is subtracted; it becomes the new offset. The codes
        keep their shape.
        """
        old, functional = self.state, import_module("bitsandbytes.functional")
        settings = dict(blocksize=old.blocksize, quant_type=old.quant_type, quant_storage=self.weight.dtype)
        layouts = (self._in_layout(matrix(e)) for e in range(self.shape[0]))
        codes, states = zip(*(functional.quantize_4bit(W, **settings) for W in layouts))
        scales, nested = torch.cat([state.absmax for state in states]), {}
        if old.nested:
            offset = nested["offset"] = scales.mean()
            scales, nested["state2"] = functional.quantize_blockwise(scales - offset, blocksize=old.state2.blocksize)
        state = type(old)(scales, old.shape, states[0].code, old.blocksize, old.quant_type, old.dtype, **nested)
        return replace(self, weight=torch.cat(codes).view(self.weight.shape), state=state)

    def _in_layout(self, W: Tensor) -> Tensor:
        """Return W (out, in) as the module stores it: transposed if `flipped`, in the stack's dtype, contiguous."""
        return (W.T if self.flipped else W).to(self.dtype).contiguous()

    def put(self, m: nn.Module, name: str) -> None:
        """Replace the original of the module's parametrization by the codes, without gradient, and its quant_state by
        this one.
        """
        parametrization = m.parametrizations[name]
        parametrization._parameters["original"] = nn.Parameter(self.weight, requires_grad=False)
        parametrization[0].quant_state = self.state

    def to(self, device: torch.device) -> Bnb4:
        """Return a stack with its codes on a device. If they are elsewhere, the quant_state is moved too, in place."""
        if self.weight.device != device:
            self.state.to(device)
        return replace(self, weight=self.weight.to(device))

    def runs(self, m: nn.Module, x: Tensor, trains: bool) -> bool:
        """Return True if no gradient is wanted."""
        return not trains


CODES: dict[str, tuple[float, ...]] = {}


def read_code_table(state: Any) -> tuple[float, ...]:
    """Return the values of the codes of a quantization type.

    They are read from the device once for each type and cached.
    """
    if state.quant_type not in CODES:
        CODES[state.quant_type] = tuple(state.code.tolist())
    return CODES[state.quant_type]


@dataclass(frozen=True)
class TorchAO(PackedMatrices):
    """torchao's stacks of 4-bit floats (NVFP4), with single matrices selectable."""

    flipped: bool

    name = "torchao"

    @classmethod
    def of(cls, m: nn.Module, name: str) -> TorchAO:
        """Return the stack of a module's NVFP4 parameter, with the canonical shape.

        `flipped` is the module's `is_transposed`: it then stores (experts, in, out).
        """
        weight, flipped = getattr(m, name), bool(getattr(m, "is_transposed", False))
        n, rows, columns = weight.shape
        return cls((n, columns, rows) if flipped else (n, rows, columns), weight.data, flipped)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight, which it dequantizes to."""
        return self.weight.dtype

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return one matrix (out, in), dequantized to `dtype`; a transposed view if the module is transposed."""
        W: Tensor = self.weight[expert].dequantize(dtype)
        return W.T if self.flipped else W

    def remake(self, matrix: Callable[[int], Tensor]) -> TorchAO:
        """Return a new stack of `matrix(expert)`, each quantized with the old settings; this stack does not change.

        With an outer scale, for all experts or for each, `matrix` is first called for the maxima. The outer scale grows
        where a new number exceeds it, and never shrinks. Matrices are converted to the original dtype, and transposed
        if the stack is flipped.
        """
        old, module, experts = self.weight, import_module(type(self.weight).__module__), range(self.shape[0])
        outer = old.per_tensor_scale  # (), or (experts, 1, 1)
        if outer is not None:  # a larger one changes all numbers, so it grows only where it must
            tops = torch.stack([matrix(e).abs().amax() for e in experts])
            tops = tops.view_as(outer) if outer.dim() else tops.amax()
            outer = torch.maximum(outer, module.per_tensor_amax_to_scale(tops).to(outer))
        names = ("block_size", "act_per_tensor_scale", "is_swizzled_scales", "use_triton_kernel", "act_quant_kwargs")
        settings = {name: getattr(old, name) for name in names}
        parts = []  # codes and scales of each
        for e in experts:
            W = matrix(e).to(old.orig_dtype)
            W = (W.T if self.flipped else W).contiguous()
            outer_scale = outer[e].squeeze() if outer is not None and outer.dim() else outer
            packed = type(old).to_nvfp4(W, per_tensor_scale=outer_scale, **settings)
            parts.append((packed.qdata, packed.scale))
        codes, scales = (torch.stack(some) for some in zip(*parts))
        weight = type(old)(codes, scales, orig_dtype=old.orig_dtype, per_tensor_scale=outer, **settings)
        return replace(self, weight=weight)

    def runs(self, m: nn.Module, x: Tensor, trains: bool) -> bool:
        """Return True if no gradient is wanted and `_experts_implementation` of the module's config is "eager"."""
        return not trains and getattr(m.config, "_experts_implementation", None) == "eager"


MODULES: TypeTable[type[PackedMatrices]] = TypeTable(  # by the module's type
    {
        "transformers.integrations.mxfp4.Mxfp4GptOssExperts": MXFP4,
        "transformers.integrations.finegrained_fp8.FP8Experts": FineFP8,
    }
)
PARAMETRIZATIONS: TypeTable[type[PackedMatrices]] = TypeTable(
    {"bitsandbytes.nn.parametrize.Bnb4bitParametrization": Bnb4}
)
TENSORS: TypeTable[type[PackedMatrices]] = TypeTable({"torchao.prototype.mx_formats.nvfp4_tensor.NVFP4Tensor": TorchAO})
NAMES = ("gate_up_proj", "up_proj", "down_proj")


def find_stack_class(m: nn.Module, name: str) -> type[PackedMatrices] | None:
    """Return the class that reads one stack of a module; None if the parameter is no packed stack.

    A module type in `MODULES` decides alone: its stacks are those of gate_up_proj, up_proj and down_proj that it has.
    Else a parametrization of the name decides: it must be a single one of a known type (bitsandbytes), with a
    quant_state of three dimensions. Last the type of a parameter with three dimensions.
    """
    kind = MODULES.find(type(m))
    if kind is not None:
        return kind if name in NAMES and getattr(m, name, None) is not None else None
    lists = m._modules.get("parametrizations")
    if isinstance(lists, nn.ModuleDict) and name in lists:
        chain: Any = lists[name]
        parametrized = PARAMETRIZATIONS.find(type(chain[0])) if len(chain) == 1 else None
        return parametrized if parametrized is None or len(chain[0].quant_state.shape) == 3 else None
    t = m._parameters.get(name)
    return None if t is None or t.dim() != 3 else TENSORS.find(type(t))


def find_matrices(m: nn.Module, name: str) -> PackedMatrices | None:
    """Return the packed stack with parameter `name` of a module, read anew; None if this parameter is no
    packed stack.
    """
    kind = find_stack_class(m, name)
    return None if kind is None else kind.of(m, name)


def list_packed_names(m: nn.Module) -> list[str]:
    """Return the names of a module's packed stacks, in the order gate_up_proj, up_proj, down_proj; [] for other
    modules.
    """
    if (
        MODULES.find(type(m)) is None
        and "parametrizations" not in m._modules
        and m._parameters.keys().isdisjoint(NAMES)
    ):
        return []  # the quick answer for nearly all modules
    return [name for name in NAMES if find_stack_class(m, name) is not None]
