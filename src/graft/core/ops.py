# SPDX-License-Identifier: Apache-2.0
"""The use of the weight in each layer type. Only this file knows orientations and calls `F.linear` and its like.

Everywhere else a weight is canonical: `(out, in, *kernel)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as compiling
from torch.func import functional_call

from graft.core.carrier import carrier_of
from graft.core.lean import Linear as LeanLinear
from graft.core.lean import new_lean
from graft.core.random import kaiming_bound, skip_draws

META = torch.device("meta")


def make_linear(
    in_features: int, out_features: int, bias: bool, fill: bool = True, device: torch.device | None = None
) -> nn.Linear:
    """Make an `nn.Linear` with the values that its constructor would draw, in a quarter of the time; none on meta.

    Without `fill` the generator advances as if to draw them, and the values are undefined.
    """
    m = new_lean(LeanLinear)
    m.__dict__.update(in_features=in_features, out_features=out_features)
    weight = torch.empty(out_features, in_features, device=device)
    b = torch.empty(out_features, device=device) if bias else None
    if device == META or weight.is_meta:
        pass
    elif not fill:
        skip_draws(weight) if b is None else skip_draws(weight, b)
    elif in_features:
        bound = kaiming_bound(in_features)
        weight.uniform_(-bound, bound)
        if b is not None:
            b.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
    m._parameters["weight"] = nn.Parameter(weight)
    m._parameters["bias"] = None if b is None else nn.Parameter(b)
    return m


class Op:
    """One layer type. A new one overrides what differs from `nn.Linear`."""

    known = True
    linear = False  # target_modules="all-linear" names it
    transposed = False  # the module stores (in, out)
    output_is_new = False  # its output is new memory, whose values its backward pass does not need
    takes_ids = False  # the input holds indices, which have no dtype to cast and no gradient
    opaque = False  # the layer gives nothing but its output with another weight
    packed_shape: tuple[int, ...] | None = None  # the canonical shape of a stack of which the module has codes

    def variant(self, m: nn.Module) -> Op:
        """Return the Op for this module: another one if an attribute changes the module's function."""
        return self

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (out, in): features or channels."""
        return m.out_features, m.in_features

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        """Return the shape of the canonical weight, also if the weight itself is packed or on meta."""
        return self.dims(m)

    def canon(self, W: Tensor) -> Tensor:
        return W

    def uncanon(self, W: Tensor) -> Tensor:
        return W

    def call(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Run the layer's own function with another (canonical) weight and bias."""
        return F.linear(x, W, b)

    def product(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the canonical weight B A. A (r, fan_in), B (out, r).

        Raises:
            NotImplementedError: the ranks differ, as in a grouped convolution whose A mixes the groups.
        """
        if A.shape[0] != B.shape[1]:
            raise NotImplementedError(
                f"A of rank {A.shape[0]} and B of rank {B.shape[1]} have no product: A mixes the groups of a "
                "convolution with groups > 1."
            )
        return (B @ A).view(shape)

    def pair_matrices(self, W: Tensor, A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the parts of W that are matrices, each with the factors of its product."""
        yield W, A, B

    def input_gradient(self, g: Tensor, W: Tensor) -> Tensor:
        """Return the gradient of a linear layer's input (rows, in) from that of its output (rows, out)."""
        return g @ W

    def factorable(self, m: nn.Module) -> bool:
        """Return True if `down` and `up` together can do the work of a low-rank weight."""
        return True

    def down(self, m: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Map the input to r channels. A (r, in·kernel)."""
        return F.linear(x, A)

    def up(self, m: nn.Module, z: Tensor, B: Tensor) -> Tensor:
        """Map r channels to the output. B (out, r)."""
        return F.linear(z, B)

    def channels(self, v: Tensor) -> Tensor:
        """Shape a vector over features or channels so that it broadcasts over this layer's activations."""
        return v

    def scale_rows(self, m: nn.Module, rows: Tensor) -> Tensor:
        """Return rows of another table as the module, which takes ids, would output them."""
        return rows

    def why_unfoldable(self, m: nn.Module) -> str | None:
        """Return why the module with another weight cannot do what it and an adapter beside it do; None if it can."""
        return None

    def count_groups(self, m: nn.Module) -> int:
        """Return the number of groups of channels that do not mix."""
        return 1

    def count_matrices(self, m: nn.Module) -> int:
        """Return the number of matrices that the weight is a stack of."""
        return 1

    def factor_modules(
        self, m: nn.Module, r: int, bias: bool, fill: bool = True, device: torch.device | None = None
    ) -> tuple[nn.Module, nn.Module] | None:
        """Make two modules whose composition is a rank-r update of this layer; None where there are none.

        Args:
            fill: with the values that torch's constructors draw; else they may be undefined.
        """
        out_features, in_features = self.dims(m)
        return make_linear(in_features, r, False, fill, device), make_linear(r, out_features, bias, fill, device)


class Unknown(Op):
    """A layer type that no row of the table covers: only methods that replace whole modules take it."""

    known = False

    def dims(self, m: nn.Module) -> tuple[int, int]:
        return 0, 0

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        return ()


class Linear(Op):
    linear = True
    output_is_new = True


class MegatronLinear(Linear):
    """A linear layer of which a process may have a piece; its sizes are those of the whole."""

    def dims(self, m: nn.Module) -> tuple[int, int]:
        return m.output_size, m.input_size


class Conv1D(Op):
    """transformers' Conv1D: a linear layer that stores its weight as (in, out)."""

    linear = True
    output_is_new = True
    transposed = True

    def dims(self, m: nn.Module) -> tuple[int, int]:
        in_features, out_features = m.weight.shape
        return out_features, in_features

    def canon(self, W: Tensor) -> Tensor:
        return W.T

    def uncanon(self, W: Tensor) -> Tensor:
        return W.T


class Embedding(Op):
    """A linear layer on one-hot inputs: in = vocabulary, out = embedding dim; the module stores (in, out)."""

    transposed = True
    takes_ids = True

    def variant(self, m: nn.Module) -> Op:
        scale = getattr(m, "embed_scale", None)
        is_one = isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)
        return SCALED_EMBEDDING if is_one else self

    def dims(self, m: nn.Module) -> tuple[int, int]:
        return m.embedding_dim, m.num_embeddings

    def canon(self, W: Tensor) -> Tensor:
        return W.T

    def uncanon(self, W: Tensor) -> Tensor:
        return W.T

    def call(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.embedding(x, W.T, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq)

    def down(self, m: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Look rows of A up. `max_norm` is for the weight: torch would shrink the rows of any table, in place."""
        return self.scale_rows(m, F.embedding(x, A.T, m.padding_idx, None, m.norm_type, m.scale_grad_by_freq))

    def factor_modules(self, *args: object, **kwargs: object) -> None:
        return None

    def why_unfoldable(self, m: nn.Module) -> str | None:
        if getattr(m, "max_norm", None) is None:
            return None
        return f"it shrinks rows that it looks up to max_norm={m.max_norm}, and the adapter acts on what comes of that"

    def lookup(self, m: nn.Module, places: Tensor, rows: Tensor) -> Tensor:
        """Return those of the rows (n, embedding_dim) at `places`, as the module would output them."""
        rows = rows if m.max_norm is None else rows.clone()  # torch renormalises them in place
        return F.embedding(places, rows, None, m.max_norm, m.norm_type)


class ScaledEmbedding(Embedding):
    """An embedding that multiplies its output by `embed_scale` (Gemma)."""

    def scale_rows(self, m: nn.Module, rows: Tensor) -> Tensor:
        out: Tensor = rows * m.embed_scale
        return out

    def call(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self.scale_rows(m, super().call(m, x, W, b))

    def lookup(self, m: nn.Module, places: Tensor, rows: Tensor) -> Tensor:
        return self.scale_rows(m, super().lookup(m, places, rows))


SCALED_EMBEDDING = ScaledEmbedding()


class Conv(Op):
    def __init__(self, conv: Callable[..., Tensor], module: type[nn.Module], spatial: int):
        self.conv, self.module, self.spatial = conv, module, spatial

    def dims(self, m: nn.Module) -> tuple[int, int]:
        return m.out_channels, m.in_channels

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        return m.out_channels, m.in_channels // m.groups, *m.kernel_size

    def _convolve(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, groups: int) -> Tensor:
        padding = m.padding
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            padding = 0
        return self.conv(x, W, b, m.stride, padding, m.dilation, groups)

    def call(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self._convolve(m, x, W, b, m.groups)

    def factorable(self, m: nn.Module) -> bool:
        return bool(m.groups == 1)

    def down(self, m: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return self._convolve(m, x, A.view(A.shape[0], m.in_channels, *m.kernel_size), None, 1)

    def up(self, m: nn.Module, z: Tensor, B: Tensor) -> Tensor:
        return self.conv(z, B.view(*B.shape, *[1] * self.spatial))

    def channels(self, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * self.spatial)

    def count_groups(self, m: nn.Module) -> int:
        return int(m.groups)

    def factor_modules(
        self, m: nn.Module, r: int, bias: bool, fill: bool = True, device: torch.device | None = None
    ) -> tuple[nn.Module, nn.Module]:
        down = self.module(
            m.in_channels,
            r,
            m.kernel_size,
            stride=m.stride,
            padding=m.padding,
            dilation=m.dilation,
            padding_mode=m.padding_mode,
            bias=False,
            device=device,
        )
        up = self.module(r, m.out_channels, 1, groups=m.groups, bias=bias, device=device)
        return down, up


class Opaque(Op):
    """A parameter of a module that uses it in its own ways: a matrix, or a stack of them, such as those of experts.

    Of a stack, canonical (n, out, in), A (n·r, in) holds the rows of one matrix after the other and B (out, r·n) the
    columns of all matrices in turn: PEFT's layout. `transposed`: the module stores (n, in, out).
    """

    opaque = True

    def __init__(self, parameter: str, transposed: bool = False, packed_shape: tuple[int, ...] | None = None):
        self.parameter, self.transposed = parameter, transposed
        self.packed_shape = packed_shape

    def canon(self, W: Tensor) -> Tensor:
        return W.mT if self.transposed else W

    uncanon = canon

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        if self.packed_shape is not None:
            return self.packed_shape
        shape = tuple(getattr(m, self.parameter).shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def dims(self, m: nn.Module) -> tuple[int, int]:
        shape = self.shape(m)
        return (shape[-2], shape[-1]) if len(shape) > 1 else (shape[0], 1)

    def count_matrices(self, m: nn.Module) -> int:
        shape = self.shape(m)
        return shape[0] if len(shape) > 2 else 1

    def product(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
        if len(shape) < 3:
            return super().product(A, B, shape)
        A, B = self.split_matrices(A, B, shape[0])
        return B @ A

    def pair_matrices(self, W: Tensor, A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if W.dim() < 3:
            yield W, A, B
        else:
            yield from zip(W, *self.split_matrices(A, B, len(W)))

    @staticmethod
    def split_matrices(A: Tensor, B: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return the factors of each matrix of a stack, (n, r, in) and (n, out, r), from those of all."""
        return A.view(n, -1, A.shape[1]), B.view(B.shape[0], -1, n).permute(2, 0, 1)

    @staticmethod
    def join_matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of a stack, (n·r, in) and (out, r·n), from those of each matrix."""
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)

    def factor_modules(
        self, m: nn.Module, r: int, bias: bool, fill: bool = True, device: torch.device | None = None
    ) -> tuple[nn.Module, nn.Module]:
        out_features, in_features = self.dims(m)
        r *= self.count_matrices(m)
        return make_linear(in_features, r, False, fill, device), make_linear(r, out_features, bias, fill, device)

    def apply(self, base: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], W: Tensor) -> object:
        """Return the output of a layer's base with W in place of the parameter."""
        name = path = self.parameter
        owner = base
        while (inner := carrier_of(owner)) is not None:  # a layer of another parameter stands between
            owner, path = inner.base_module, f"{inner.inner_name}.{path}"
        if compiling():
            return functional_call(base, {path: W}, args, kwargs)
        places: list[dict[str, Any]] = [
            home for home in (owner._parameters, owner.__dict__) if name in home
        ]  # FSDP1 has its views in both
        real = [home[name] for home in places]
        try:
            for home in places:
                home[name] = W
            return base(*args, **kwargs)
        finally:
            for home, before in zip(places, real):
                home[name] = before


T = TypeVar("T")
C = TypeVar("C")


class TypeTable(Generic[T]):
    """A map from `"package.module.Class"` to an entry, so that packages need not be imported. `find` takes the first
    class of the MRO that has one."""

    def __init__(self, rows: Mapping[str, T]):
        self._rows = dict(rows)
        # by id, as a WeakKeyDictionary takes three times as long: (type, index in its MRO or -1 for none, entry)
        self._found: dict[int, tuple[ref[type], int, T | None]] = {}

    def add(self, qualified_name: str, entry: T) -> None:
        self._rows[qualified_name] = entry
        self._found.clear()

    def entry(self, qualified_name: str) -> T:
        return self._rows[qualified_name]

    def names(self) -> list[str]:
        return list(self._rows)

    def find(self, cls: type) -> T | None:
        return self._search(cls)[2]

    def origin(self, cls: type[C]) -> type[C] | None:
        """Return the first class of the MRO that has an entry; None if none has."""
        place = self._search(cls)[1]
        return cls.__mro__[place] if place >= 0 else None

    def _search(self, cls: type) -> tuple[ref[type], int, T | None]:
        match = self._found.get(id(cls))
        if match is None or match[0]() is not cls:
            places = (i for i, base in enumerate(cls.__mro__) if class_path(base) in self._rows)
            place = next(places, -1)
            entry = None if place < 0 else self._rows[class_path(cls.__mro__[place])]
            match = self._found[id(cls)] = (ref(cls), place, entry)
        return match


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


OPS: TypeTable[Op] = TypeTable(
    {
        "torch.nn.modules.linear.Linear": Linear(),
        "transformers.models.falcon.modeling_falcon.FalconLinear": Linear(),  # writes out what nn.Linear does
        "megatron.core.tensor_parallel.layers.ColumnParallelLinear": MegatronLinear(),
        "megatron.core.tensor_parallel.layers.RowParallelLinear": MegatronLinear(),
        "transformer_engine.pytorch.module.linear.Linear": Linear(),
        "transformers.pytorch_utils.Conv1D": Conv1D(),
        "torch.nn.modules.sparse.Embedding": Embedding(),
        "torch.nn.modules.conv.Conv1d": Conv(F.conv1d, nn.Conv1d, 1),
        "torch.nn.modules.conv.Conv2d": Conv(F.conv2d, nn.Conv2d, 2),
        "torch.nn.modules.conv.Conv3d": Conv(F.conv3d, nn.Conv3d, 3),
    }
)
UNKNOWN = Unknown()


def is_stock(module: nn.Module) -> bool:
    """Return True if a module runs the forward of its row in the table, and nothing of its own."""
    kind = type(module)
    known = OPS.origin(kind)
    return known is not None and kind.forward is known.forward


def find_replaced_forward(module: nn.Module) -> type | None:
    """Return the class of the table whose forward a module's class has replaced; None if its Op knows the new one."""
    kind = type(module)
    known = OPS.origin(kind)
    if known is None or kind.forward is known.forward or find_op(module) is not OPS.find(kind):
        return None
    return known


def find_op(module: nn.Module) -> Op:
    """Return the Op of a module; `UNKNOWN` if no row of the table covers its type."""
    return (OPS.find(type(module)) or UNKNOWN).variant(module)
