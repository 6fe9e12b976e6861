# SPDX-License-Identifier: Apache-2.0
"""The use of the weight in each layer type.

Only this file knows orientations and calls `F.linear` and similar functions.

Everywhere else a weight is canonical: `(out, in, *kernel)`.

An op also states facts: whether the layer is linear, holds its weight transposed, takes ids, makes a new output that
may be overwritten, and which modules can be its low-rank product.
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
    """Return a new `nn.Linear` (a `LeanLinear`) with the values that its constructor would draw, in a quarter of the
    time.

    On the meta device nothing is drawn. With `fill=False` the generator advances as if, and the values are undefined.
    Without input features the bias is 0. Without `bias` that parameter is None.
    """
    m = new_lean(LeanLinear)
    m.__dict__.update(in_features=in_features, out_features=out_features)
    weight = torch.empty(out_features, in_features, device=device)
    b = torch.empty(out_features, device=device) if bias else None
    if device == META or weight.is_meta:
        pass
    elif not fill:
        skip_draws(weight) if b is None else skip_draws(weight, b)
    else:
        bound = kaiming_bound(in_features)
        weight.uniform_(-bound, bound)
        if b is not None:
            limit = 1 / math.sqrt(in_features) if in_features else 0.0
            b.uniform_(-limit, limit)
    m._parameters["weight"] = nn.Parameter(weight)
    m._parameters["bias"] = None if b is None else nn.Parameter(b)
    return m


class Op:
    """One layer type. A subclass overrides the functions that differ from `nn.Linear`."""

    known = True
    linear = False  # target_modules="all-linear" includes it
    transposed = False  # the module stores (in, out)
    output_is_new = False  # its output is new memory that its backward pass does not read
    takes_ids = False  # the input holds indices, which have no dtype to cast and no gradient
    opaque = False  # the layer gives nothing but its output with another weight
    packed_shape: tuple[int, ...] | None = None  # the canonical shape of a stack that the module holds as codes

    def variant(self, m: nn.Module) -> Op:
        """Return the Op for this module: another one if an attribute changes the module's function; here `self`."""
        return self

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (out, in): features or channels of the module, here its `out_features` and `in_features`."""
        return m.out_features, m.in_features

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        """Return the shape of the canonical weight, also if the weight is packed or on the meta device.

        Here it is `dims`.
        """
        return self.dims(m)

    def canon(self, W: Tensor) -> Tensor:
        """Return a stored weight in canonical orientation: with its last two dimensions swapped if the module stores it
        transposed, else unchanged. `uncanon` undoes that.
        """
        return W.mT if self.transposed else W

    uncanon = canon

    def call(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return the module's own function of x with another (canonical) weight and bias: here F.linear, without the
        module.
        """
        return F.linear(x, W, b)

    def product(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the canonical weight B A of this shape. A (r, fan_in), B (out, r).

        Raises:
            NotImplementedError: the ranks differ, as in a grouped convolution with an A that mixes the groups.
        """
        if A.shape[0] != B.shape[1]:
            raise NotImplementedError(
                f"A of rank {A.shape[0]} and B of rank {B.shape[1]} have no product: A mixes the groups of a "
                "convolution with groups > 1."
            )
        return (B @ A).view(shape)

    def pair_matrices(self, W: Tensor, A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each matrix of W with the factors (A, B) of its product; here W itself with both."""
        yield W, A, B

    def input_gradient(self, g: Tensor, W: Tensor) -> Tensor:
        """Return the gradient of a linear layer's input (rows, in) from that of its output (rows, out): g W."""
        return g @ W

    def factorable(self, m: nn.Module) -> bool:
        """Return True if `down` and then `up` compute the same as the product of two factors used as weight.

        Here True.
        """
        return True

    def down(self, m: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Return F.linear(x, A), the r channels of the input x.

        A (r, in). Convolutions, where A is (r, in · kernel), and embeddings override this.
        """
        return F.linear(x, A)

    def up(self, m: nn.Module, z: Tensor, B: Tensor) -> Tensor:
        """Return F.linear(z, B), the output of r channels z. B (out, r)."""
        return F.linear(z, B)

    def channels(self, v: Tensor) -> Tensor:
        """Return a vector over features or channels in a shape that broadcasts over this layer's activations.

        Here v itself.
        """
        return v

    def scale_rows(self, m: nn.Module, rows: Tensor) -> Tensor:
        """Return rows of a table as the module would output them: scaled, if it scales its output. Here unchanged."""
        return rows

    def why_unfoldable(self, m: nn.Module) -> str | None:
        """Return why the module with a folded weight cannot replace the module and its adapters; None (here)
        if it can.
        """
        return None

    def count_groups(self, m: nn.Module) -> int:
        """Return the number of groups of channels that do not mix: 1 here."""
        return 1

    def count_matrices(self, m: nn.Module) -> int:
        """Return the number of matrices in the weight: 1 here, more for a stack."""
        return 1

    def factor_modules(
        self, m: nn.Module, r: int, bias: bool, fill: bool = True, device: torch.device | None = None
    ) -> tuple[nn.Module, nn.Module] | None:
        """Return two new modules with a composition that is a rank-r update of this layer; None for types without such
        modules. Here they are linear layers, in → r without a bias, and r → out. For a stack they hold A and B of all
        matrices, with r times their number as inner size.

        Args:
            bias: the second module has a bias.
            fill: draw the values that torch's constructors draw; else they may be undefined.
        """
        out_features, in_features = self.dims(m)
        r *= self.count_matrices(m)
        return make_linear(in_features, r, False, fill, device), make_linear(r, out_features, bias, fill, device)


class Unknown(Op):
    """A layer type that the table does not have: only methods that replace or surround whole modules accept it."""

    known = False

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (0, 0), as sizes are not known."""
        return 0, 0

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        """Return (), as the shape is not known."""
        return ()


class Linear(Op):
    """`nn.Linear` and classes with the same function."""

    linear = True
    output_is_new = True


class MegatronLinear(Linear):
    """A linear layer with a piece of the weight in each process. Its sizes are those of the whole."""

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (out, in) of the whole layer, its `output_size` and `input_size`."""
        return m.output_size, m.input_size


class Conv1D(Op):
    """transformers' Conv1D: a linear layer that stores its weight as (in, out)."""

    linear = True
    output_is_new = True
    transposed = True

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (out, in) from the weight, which is stored as (in, out)."""
        in_features, out_features = m.weight.shape
        return out_features, in_features


class Embedding(Op):
    """A linear layer on one-hot inputs: in = vocabulary, out = embedding dim. The module stores (in, out)."""

    transposed = True
    takes_ids = True

    def variant(self, m: nn.Module) -> Op:
        """Return `SCALED_EMBEDDING` if the module has an `embed_scale` that is a number or a tensor of one element,
        else `self`.
        """
        scale = getattr(m, "embed_scale", None)
        is_one = isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)
        return SCALED_EMBEDDING if is_one else self

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (embedding_dim, num_embeddings)."""
        return m.embedding_dim, m.num_embeddings

    def call(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return the rows of the table W.T at the ids x, by F.embedding with the module's padding index, norm limits
        and `scale_grad_by_freq`, but not its `sparse`. `b` is ignored.
        """
        return F.embedding(x, W.T, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq)

    def down(self, m: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Return the columns of A (r, vocabulary) at the ids x, scaled as the module scales.

        The module's `max_norm` does not count: torch would shrink rows of A in place. `sparse` does not count: the
        gradient of A is dense.
        """
        return self.scale_rows(m, F.embedding(x, A.T, m.padding_idx, None, m.norm_type, m.scale_grad_by_freq))

    def factor_modules(self, *args: object, **kwargs: object) -> None:
        """Return None: embeddings have no such modules."""
        return None

    def why_unfoldable(self, m: nn.Module) -> str | None:
        """Return a reason if the module has a `max_norm` that is not None, since it shrinks the rows that it looks up;
        else None.
        """
        if getattr(m, "max_norm", None) is None:
            return None
        return f"it shrinks rows that it looks up to max_norm={m.max_norm}, and the adapter acts on what comes of that"

    def lookup(self, m: nn.Module, places: Tensor, rows: Tensor) -> Tensor:
        """Return the rows of a table (n, embedding_dim) at `places`, as the module would output them.

        With `max_norm` the looked-up rows are shrunk; the table itself is not changed. The module's `padding_idx` does
        not count.
        """
        rows = rows if m.max_norm is None else rows.clone()  # torch renormalises them in place
        return F.embedding(places, rows, None, m.max_norm, m.norm_type)


class ScaledEmbedding(Embedding):
    """An embedding that multiplies its output by `embed_scale` (Gemma)."""

    def scale_rows(self, m: nn.Module, rows: Tensor) -> Tensor:
        """Return the rows times the module's `embed_scale`."""
        out: Tensor = rows * m.embed_scale
        return out

    def call(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return the looked-up rows times `embed_scale`."""
        return self.scale_rows(m, super().call(m, x, W, b))

    def lookup(self, m: nn.Module, places: Tensor, rows: Tensor) -> Tensor:
        """Return the rows at `places` times `embed_scale`."""
        return self.scale_rows(m, super().lookup(m, places, rows))


SCALED_EMBEDDING = ScaledEmbedding()


class Conv(Op):
    """A convolution of one, two or three spatial dimensions."""

    def __init__(self, conv: Callable[..., Tensor], module: type[nn.Module], spatial: int):
        self.conv, self.module, self.spatial = conv, module, spatial

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (out, in) channels of the module."""
        return m.out_channels, m.in_channels

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        """Return (out, in / groups, *kernel)."""
        return m.out_channels, m.in_channels // m.groups, *m.kernel_size

    def _convolve(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, groups: int) -> Tensor:
        """Return the convolution of x with W and b, with the module's stride, padding and dilation, and this number of
        groups.

        A padding mode other than "zeros" pads x first.
        """
        padding = m.padding
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            padding = 0
        return self.conv(x, W, b, m.stride, padding, m.dilation, groups)

    def call(self, m: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return the module's convolution of x with another weight and bias, in the module's number of groups."""
        return self._convolve(m, x, W, b, m.groups)

    def factorable(self, m: nn.Module) -> bool:
        """Return True if the convolution has one group."""
        return bool(m.groups == 1)

    def down(self, m: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Return the module's convolution of x to r channels, by A as a weight (r, in, *kernel), without groups and
        bias.
        """
        return self._convolve(m, x, A.view(A.shape[0], m.in_channels, *m.kernel_size), None, 1)

    def up(self, m: nn.Module, z: Tensor, B: Tensor) -> Tensor:
        """Return the 1 × 1 convolution of z by B, in one group and without the module's options."""
        return self.conv(z, B.view(*B.shape, *[1] * self.spatial))

    def channels(self, v: Tensor) -> Tensor:
        """Return v as (channels, 1, …), which broadcasts over the spatial dimensions."""
        return v.view(-1, *[1] * self.spatial)

    def count_groups(self, m: nn.Module) -> int:
        """Return the module's number of groups."""
        return int(m.groups)

    def factor_modules(
        self, m: nn.Module, r: int, bias: bool, fill: bool = True, device: torch.device | None = None
    ) -> tuple[nn.Module, nn.Module]:
        """Return a convolution to r channels and a 1 × 1 one to the output, with the module's groups.

        The first has its kernel size, stride, padding, dilation and padding mode, in one group.

        The first has no bias, the second one if `bias`. `fill` is not used: both have torch's initial values.
        """
        options: Any = dict(stride=m.stride, padding=m.padding, dilation=m.dilation, padding_mode=m.padding_mode)
        down = self.module(m.in_channels, r, m.kernel_size, **options, bias=False, device=device)
        up = self.module(r, m.out_channels, 1, groups=m.groups, bias=bias, device=device)
        return down, up


class Opaque(Op):
    """A parameter of a module that uses it in its own ways: a matrix, or a stack of matrices, such as those of experts.

    A stack is canonical as (n, out, in). Its A (n·r, in) holds the rows of one matrix after the other. Its B (out, r·n)
    holds the columns of all matrices in turn, which is PEFT's layout. `transposed`: the module stores (n, in, out).
    """

    opaque = True

    def __init__(self, parameter: str, transposed: bool = False, packed_shape: tuple[int, ...] | None = None):
        """Set the name of the parameter.

        `packed_shape`: the canonical shape of a stack that the module holds as codes.
        """
        self.parameter, self.transposed = parameter, transposed
        self.packed_shape = packed_shape

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        """Return the canonical shape: that of the packed stack, or the parameter's, with the last two swapped if
        transposed.
        """
        if self.packed_shape is not None:
            return self.packed_shape
        shape = tuple(getattr(m, self.parameter).shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (out, in) of each matrix; (n, 1) for a vector."""
        shape = self.shape(m)
        return (shape[-2], shape[-1]) if len(shape) > 1 else (shape[0], 1)

    def count_matrices(self, m: nn.Module) -> int:
        """Return the number of matrices of a stack; 1 for a matrix or a vector."""
        shape = self.shape(m)
        return shape[0] if len(shape) > 2 else 1

    def product(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the canonical B A: for a stack, the products of all its matrices, (n, out, in)."""
        if len(shape) < 3:
            return super().product(A, B, shape)
        A, B = self.split_matrices(A, B, shape[0])
        return B @ A

    def pair_matrices(self, W: Tensor, A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each matrix of a stack W with its own factors; a matrix W itself with A and B."""
        if W.dim() < 3:
            yield W, A, B
        else:
            yield from zip(W, *self.split_matrices(A, B, len(W)))

    @staticmethod
    def split_matrices(A: Tensor, B: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return the factors of each of n matrices, (n, r, in) and (n, out, r), from A (n·r, in) and B (out, r·n)."""
        return A.view(n, -1, A.shape[1]), B.view(B.shape[0], -1, n).permute(2, 0, 1)

    @staticmethod
    def join_matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (n·r, in) and B (out, r·n) from the factors of each matrix: the inverse of `split_matrices`."""
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)

    def apply(self, base: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], W: Tensor) -> object:
        """Return the output of a layer's base module, with W in place of the parameter of the innermost module, below
        layers of other parameters.

        The parameter is replaced in each dictionary of the module that has it, and put back afterwards, on an error as
        well. Under torch.compile, `functional_call` does it.
        """
        name = path = self.parameter
        owner = base
        while (inner := carrier_of(owner)) is not None:  # a layer of another parameter is between
            owner, path = inner.base_module, f"{inner.inner_name}.{path}"
        if compiling():
            return functional_call(base, {path: W}, args, kwargs)
        # FSDP1 has its views in both
        places: list[dict[str, Any]] = [home for home in (owner._parameters, owner.__dict__) if name in home]
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
    """A map from `"package.module.Class"` to an entry, so that packages need not be imported.

    `find` uses the first class of the MRO that has an entry.
    """

    def __init__(self, rows: Mapping[str, T]):
        """Copy the rows, {qualified name: entry}. No search is cached yet."""
        self._rows = dict(rows)
        # by id, as a WeakKeyDictionary takes three times as long: (type, index in its MRO or -1 for none, entry)
        self._found: dict[int, tuple[ref[type], int, T | None]] = {}

    def add(self, qualified_name: str, entry: T) -> None:
        """Set the entry of a class by its qualified name, also over an older one, and forget all cached searches.

        The name is not checked.
        """
        self._rows[qualified_name] = entry
        self._found.clear()

    def entry(self, qualified_name: str) -> T:
        """Return the entry of exactly this qualified name. Raises KeyError if there is none."""
        return self._rows[qualified_name]

    def names(self) -> list[str]:
        """Return all qualified names of the table as a new list, in the order of their entry."""
        return list(self._rows)

    def find(self, cls: type) -> T | None:
        """Return the entry of the class, or of its nearest base class that has one; None if none has."""
        return self._search(cls)[2]

    def origin(self, cls: type[C]) -> type[C] | None:
        """Return the first class of the MRO that has an entry; None if none has."""
        place = self._search(cls)[1]
        return cls.__mro__[place] if place >= 0 else None

    def _search(self, cls: type) -> tuple[ref[type], int, T | None]:
        """Return a weak reference to the class, the index in its MRO of the class with an entry (-1: none), and the
        entry.

        Results are cached by the class's id until `add`.
        """
        match = self._found.get(id(cls))
        if match is None or match[0]() is not cls:
            places = (i for i, base in enumerate(cls.__mro__) if class_path(base) in self._rows)
            place = next(places, -1)
            entry = None if place < 0 else self._rows[class_path(cls.__mro__[place])]
            match = self._found[id(cls)] = (ref(cls), place, entry)
        return match


def class_path(cls: type) -> str:
    """Return `"package.module.Class"` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


OPS: TypeTable[Op] = TypeTable(
    {
        "torch.nn.modules.linear.Linear": Linear(),
        "transformers.models.falcon.modeling_falcon.FalconLinear": Linear(),  # computes the same as nn.Linear
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
    """Return True if a module's class has the same forward as the class of the table that it derives from.

    False if it derives from none.
    """
    kind = type(module)
    known = OPS.origin(kind)
    return known is not None and kind.forward is known.forward


def find_replaced_forward(module: nn.Module) -> type | None:
    """Return the class of the table with a forward that the class of `module` overrides.

    Returns None if it does not override it, has no class in the table, or has an Op made for it (a `variant`, or an
    entry for the class itself).
    """
    kind = type(module)
    known = OPS.origin(kind)
    if known is None or kind.forward is known.forward or find_op(module) is not OPS.find(kind):
        return None
    return known


def find_op(module: nn.Module) -> Op:
    """Return the Op of a module, by the first class of its type's MRO in the table; `UNKNOWN` if none is there.

    The Op's `variant` may replace it for this module.
    """
    return (OPS.find(type(module)) or UNKNOWN).variant(module)
