# SPDX-License-Identifier: Apache-2.0
"""Effects: the kinds of change that an adapter makes to its layer. The core derives every path from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graft.kernels.one_product import Call, InputGradient

HALF = (torch.float16, torch.bfloat16)


class Map(Protocol):
    """A product with a matrix, computed in its own way."""

    @property
    def weight(self) -> Tensor: ...  # the matrix
    def __call__(self, x: Tensor, /) -> Tensor: ...


Factor = Tensor | nn.Module | Map


class Factors(NamedTuple):
    """The parts of a low-rank effect, made for one call: W' = gain ⊙ (W + scale · outer ⊙ B (inner ⊙ A)).

    A and B are tensors, or callables with a `weight`: modules, a sum in place of a product with ones, a `Compact` or a
    `Product`. A bias of B shifts the layer's.
    """

    A: Factor  # (r, fan_in)
    B: Factor  # (out, r)
    scale: Tensor | float | None = None  # None: 1
    dropout: nn.Module | None = None  # acts on the input of A; with a gain, on W's, too
    inner: Tensor | None = None  # (r,)
    outer: Tensor | None = None  # (out,)
    gain: Tensor | None = None  # (out,)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, fan_in) and B (out, r) whose product B A is the whole update, with scale and vectors."""
        A, B = self.matrices_without_scale()
        return A, B if self.scale is None else B * self.scale

    def matrices_without_scale(self) -> tuple[Tensor, Tensor]:
        """Return A (r, fan_in) and B (out, r) without the scale."""
        A, B = factor_matrix(self.A).flatten(1), factor_matrix(self.B).flatten(1)
        if self.inner is not None:
            A = self.inner[:, None] * A
        if self.outer is not None:
            B = self.outer[:, None] * B
        return A, B

    def times(self, weight: float) -> Factors:
        """Return factors whose product counts `weight` times."""
        return self._replace(scale=weight if self.scale is None else self.scale * weight)

    def with_gain(self, gain: Tensor) -> Factors:
        """Return factors with a gain; not by `_replace`, into which the compiler of torch 2.6 does not look."""
        return Factors(self.A, self.B, self.scale, self.dropout, self.inner, self.outer, gain)

    def shift(self) -> Tensor | None:
        """Return the update of the layer's bias, (out,); None if B has no bias."""
        bias: Tensor | None = getattr(self.B, "bias", None)
        if bias is None:
            return None
        bias = bias if self.outer is None else bias * self.outer
        return bias if self.scale is None else bias * self.scale


class Compact(NamedTuple):
    """A factor whose module holds fewer numbers than its matrix. Kernels take the matrix, or call the module if it has
    hooks."""

    module: nn.Module  # its forward is the product
    expand: Callable[[Tensor], Tensor]  # from its weight to the matrix

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out

    @property
    def weight(self) -> Tensor:
        return self.expand(self.module.weight)


class Product(NamedTuple):
    """A factor whose product is computed in its own way, such as with another backward pass."""

    call: Callable[[Tensor], Tensor]  # casts its input
    weight: Tensor  # what else is said of the factor follows from the plain matrix

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)


class Deferred(Protocol):
    """A ΔW that is not formed yet."""

    def dense(self) -> Tensor: ...  # the tensor


class Unformed(Deferred, Protocol):
    """The same with ways to products (`Hadamard`, `Modulated`)."""

    def columns(self, ids: Tensor) -> Tensor: ...  # the part that an embedding looks up
    def product(self, x: Tensor) -> Tensor | None: ...  # x ΔWᵀ for few rows; None if forming ΔW pays

    # a cheaper way to x (W + ΔW)ᵀ + bias, or None
    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None: ...


Delta = Tensor | Deferred  # ΔW


def factor_matrix(factor: Factor) -> Tensor:
    """Return the tensor of a factor: itself, or its `weight`."""
    return factor if isinstance(factor, Tensor) else factor.weight


def form_delta(delta: Delta) -> Tensor:
    """Return ΔW as a tensor."""
    return delta if isinstance(delta, Tensor) else delta.dense()


class ScaledDelta(NamedTuple):
    """A ΔW that is not formed yet, times a number (`Unformed`)."""

    delta: Unformed
    weight: float

    def dense(self) -> Tensor:
        return self.delta.dense() * self.weight

    def columns(self, ids: Tensor) -> Tensor:
        return self.delta.columns(ids) * self.weight

    def product(self, x: Tensor) -> Tensor | None:
        y = self.delta.product(x)
        return None if y is None else y * self.weight

    def linear_with(self, *_: object) -> None:
        return None


def scale_result(function: Callable[..., Any], weight: float, *args: object) -> Any:
    """Return a function's tensor, factors, pieces, or ΔW not formed yet, which then count `weight` times."""
    value = function(*args)
    if isinstance(value, Tensor):
        return value * weight
    return value.times(weight) if isinstance(value, (Factors, Pieces)) else ScaledDelta(value, weight)


class Pieces(NamedTuple):
    """The changes that an adapter makes to single matrices of a stack, which are never all formed at once.

    `change` takes the expert, its tensors, the matrix W0 without any adapter, the matrix as the adapters before have
    changed it, and whether the layer trains, so that inputs may be dropped. If W0 is None, `change` reads it from the
    layer, if at all. It returns ΔW (out, in), or A (r, in) and B (out, r).
    """

    tensors: Sequence[Tensor]  # (n, …): the changes are made of them, and gradients flow to them
    change: Callable[[int, Sequence[Tensor], Tensor | None, Tensor | None, bool], tuple[Tensor, ...]]
    common_parameters: Sequence[Tensor] = ()  # of all matrices
    reads: bool = False  # `change` needs the matrix

    def times(self, weight: float) -> Pieces:
        """Return pieces whose changes count `weight` times."""

        def change(*args: Any) -> tuple[Tensor, ...]:
            """Return ΔW, or A and B, with the last tensor times `weight`."""
            *A, B = self.change(*args)
            return *A, B * weight

        return self._replace(change=change)


InputOf = Callable[[nn.Module, dict[str, object]], Tensor]  # a module and its arguments by name → x, (batch, …)


@dataclass(frozen=True, eq=False, kw_only=True)
class Effect:
    """Base of the kinds. The site and the config decide the kind once; its functions run at each call."""

    of_weight: bool = False  # it reads W₀, the weight as it is without any adapter
    why_unmergeable: str | None = None  # the reason why it has no merged form; None if it has one
    pieces: Callable[[], Pieces] | None = None  # of a stack of matrices; None: those of its factors

    whole: ClassVar[bool] = False  # it runs in place of the layer
    inward: bool = False  # of several active adapters, each acts on the layer that those after it made

    @property
    def additive(self) -> bool:
        """Return True if y = base(x) + part(x)."""
        return True

    @property
    def only_adds_on_top(self) -> bool:
        """Return True if it needs no more than input and output of the layer as those before it made it."""
        return self.additive

    @property
    def weighable(self) -> bool:
        """Return True if gates can weigh what it adds to the output."""
        return self.additive

    @property
    def product(self) -> Callable[[], Factors] | None:
        """The function that gives its factors, if it does no more than add their product."""
        return None

    @property
    def input_of(self) -> InputOf | None:
        """The function that finds its input among those of a module that has several."""
        return None

    @property
    def adapts_any_module(self) -> bool:
        """Return True if it adapts modules that no `Op` knows."""
        return self.whole

    @property
    def weightless(self) -> bool:
        """Return True if a call of the layer alone can do what it does: nothing in it is a change of a weight."""
        return self.adapts_any_module and not self.whole

    @property
    def reads(self) -> bool:
        """Return True if a forward pass needs the values of the weight."""
        return self.of_weight

    @property
    def keeps_weight(self) -> bool:
        """Return True if its merged form changes the bias alone."""
        return False

    @property
    def forms_delta(self) -> bool:
        """Return True if what it adds to an output is computed from a tensor as large as the weight."""
        return False

    @property
    def runs_module_on_values(self) -> bool:
        """True if a forward pass, too, has the module do to the adapter's values what it does to its weight."""
        return False

    def shift(self, f: Factors | None = None) -> Tensor | None:
        """Return Δb, (out,), of one that adds to the weight; None if it does not shift the bias.

        f: its factors, if they are made already.
        """
        return None

    def times(self, weight: float) -> Effect | None:
        """Return an effect that adds `weight` times what this one adds; None if it does more than add."""
        return None


@dataclass(frozen=True, eq=False)
class Update(Effect):
    """An update of weight and bias: W' = W + ΔW, b' = b + Δb. ΔW is the sum of what `delta` and `factors` say.

    Args:
        delta: () → ΔW, or W₀ → ΔW if `of_weight`; both canonical, (out, in, *kernel). A tensor, or a value that is not
            formed yet: an `Unformed`, or beside a `branch` whatever has `dense()`.
        factors: those of a product B A, with a dropout of their own.
        branch: x → delta x, where that is cheaper; without `delta`, what no weight does.
        bias: Δb, (out,).
        dropout: acts on the input of `delta`.
        gains: the factors have a gain, W' = gain ⊙ (W + B A); then they are all there is.
        draws: ΔW is random in training, so that a call must not compute it twice.
        input_of: of a branch beside a module with several inputs. Of a tuple that the module returns, it adds to the
            first item.
    """

    delta: Callable[..., Delta] | None = None
    factors: Callable[[], Factors] | None = None
    branch: Callable[[Tensor], Tensor] | None = None
    bias: Callable[[], Tensor] | None = None
    dropout: Callable[[], nn.Module] | None = None
    gains: bool = False
    draws: bool = False
    input_of: InputOf | None = None

    def __post_init__(self) -> None:
        if self.gains and (self.delta or self.branch or self.bias):
            raise TypeError("an Update whose factors have a gain has nothing beside them")
        if self.weightless and self.why_unmergeable is None:
            object.__setattr__(self, "why_unmergeable", "a branch beside the layer has no merged form")

    @property
    def weightless(self) -> bool:
        return self.delta is None and self.branch is not None

    @property
    def product(self) -> Callable[[], Factors] | None:
        only_factors = self.delta is None and self.branch is None and self.bias is None and not self.gains
        return self.factors if only_factors else None

    @property
    def additive(self) -> bool:
        return not self.gains

    @property
    def adapts_any_module(self) -> bool:
        return self.input_of is not None

    @property
    def keeps_weight(self) -> bool:
        return self.delta is None and self.factors is None

    @property
    def forms_delta(self) -> bool:
        return not self.gains and (self.of_weight if self.delta is None else self.branch is None)

    def shift(self, f: Factors | None = None) -> Tensor | None:
        bias = None if self.bias is None else self.bias()
        factor_bias = None if self.factors is None else (f or self.factors()).shift()
        return factor_bias if bias is None else bias if factor_bias is None else bias + factor_bias

    def times(self, weight: float) -> Effect | None:
        if self.gains:
            return None
        functions = self.delta, self.factors, self.branch, self.bias, self.pieces
        delta, factors, branch, bias, pieces = (part and partial(scale_result, part, weight) for part in functions)
        return replace(self, delta=delta, factors=factors, branch=branch, bias=bias, pieces=pieces)


def add_part(part: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Return the last value with the part that a function makes of all of them."""
    return values[-1] + part(*values)


ONE_OUTPUT = "in an average its part comes from the output that the others get, too, which no weight does"
NO_WEIGHT = "it changes activations, in a way that no weight does"


def refuse_merge(W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    raise NotImplementedError(NO_WEIGHT)


@dataclass(frozen=True, eq=False)
class Rewrite(Effect):
    """A function of weight and bias: (W', b') = merged(W, b). Forward is pre → layer → post, or the layer with W'.

    Args:
        merged: left out where what it makes of inputs and outputs has no merged form.
        pre: x → x', where W' x = W x'.
        post: (x, y) → y', from the input before `pre` and the output.
        part: (x, y) → Δy, in place of `post`, which is then y + Δy. Gates can weigh it; all parts that they weigh come
            from one output.
        ahead: x → Δx, in place of `pre`, which is then x + Δx; of a block. All that an average weighs come from one
            input.
        apart: `post` acts on the output without its bias.
        looks_up: `post` gives rows of another table as the module, which takes ids, would output them.
        block: the site is a module with several inputs, of which `pre` gets the first; what `post` gets is its output,
            the first item if that is a tuple. It has no weight, and so no merged form.
        tapped: `post` and `part` get, in place of the layer's input, that of a `Tap` of the same adapter.
    """

    merged: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] = refuse_merge
    pre: Callable[[Tensor], Tensor] | None = None
    post: Callable[[Tensor, Tensor], Tensor] | None = None
    part: Callable[[Tensor, Tensor], Tensor] | None = None
    ahead: Callable[[Tensor], Tensor] | None = None
    apart: bool = False
    looks_up: bool = False
    block: bool = False
    tapped: bool = False

    def __post_init__(self) -> None:
        if (part := self.part) is not None:
            if self.post is not None or self.apart:
                raise TypeError("a Rewrite with `part` has no `post` of its own, and nothing apart")
            object.__setattr__(self, "post", partial(add_part, part))
        if (ahead := self.ahead) is not None:
            if self.pre is not None or not self.block:
                raise TypeError("a Rewrite with `ahead` has no `pre` of its own, and is of a block")
            object.__setattr__(self, "pre", partial(add_part, ahead))
        if self.merged is refuse_merge and self.why_unmergeable is None:
            object.__setattr__(self, "why_unmergeable", NO_WEIGHT)

    @property
    def additive(self) -> bool:
        return False

    @property
    def only_adds_on_top(self) -> bool:
        return self.pre is None and self.post is not None

    @property
    def weighable(self) -> bool:
        return self.pre is None and self.part is not None

    @property
    def adapts_any_module(self) -> bool:
        return self.block

    @property
    def folds(self) -> bool:
        return self.pre is None and self.post is None

    @property
    def reads(self) -> bool:
        return self.of_weight or self.folds

    @property
    def runs_module_on_values(self) -> bool:
        return self.folds or self.looks_up

    def times(self, weight: float) -> Effect | None:
        if (self.pre is not None and self.ahead is None) or (self.post is not None and self.part is None) or self.folds:
            return None
        part, ahead = (f and partial(scale_result, f, weight) for f in (self.part, self.ahead))
        fixed = self.why_unmergeable or ONE_OUTPUT
        return replace(self, part=part, ahead=ahead, pre=None, post=None, merged=refuse_merge, why_unmergeable=fixed)


@dataclass(frozen=True, eq=False)
class Tap(Effect):
    """Nothing done to the layer: a layer that runs later, in the same block, gets its input (`Rewrite.tapped`).

    `readers`: the paths of such layers.
    """

    readers: tuple[str, ...]
    why_unmergeable: str | None = field(default="a layer that runs later reads its input", kw_only=True)

    @property
    def adapts_any_module(self) -> bool:
        return True

    def times(self, weight: float) -> Effect:
        return self


@dataclass(frozen=True, eq=False)
class Replace(Effect):
    """A module that runs in place of the layer, or a function that may call it.

    aside: it came along with an adapter that acts elsewhere (a head). Then gates pass it by, and in a mixed batch its
    output may be narrower than those of others.
    """

    module: Callable[[], Any]
    acts_elsewhere: bool = field(default=False, kw_only=True)

    whole: ClassVar[bool] = True

    @property
    def additive(self) -> bool:
        return False

    def times(self, weight: float) -> Effect | None:
        return self if self.acts_elsewhere else None
