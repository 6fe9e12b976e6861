# SPDX-License-Identifier: Apache-2.0
"""Effects: the kinds of change that an adapter makes to its layer. Forward, merge and routing all follow from them.

A rewrite of a whole block (`block=True`) acts before and after a module with several inputs: `pre` gets the first
input, `post` the output. In a mixed batch such a module runs once, for all rows. Values that one block passes to the
next are facts of the call (SHADOW's states). A tap keeps a layer's input for a layer that runs later in the same block,
of all rows, by thread; under checkpointing both run again together. A replacement may call the module that it replaces,
and pass a value to layers inside it (MixLoRA); in a mixed batch it runs for its rows alone.
"""

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
    """A product with a matrix: a callable x → x Wᵀ that has the matrix as `weight`."""

    @property
    def weight(self) -> Tensor:
        """The matrix. A declaration only."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


Factor = Tensor | nn.Module | Map


class Factors(NamedTuple):
    """The parts of a low-rank effect, made for one call: W' = gain ⊙ (W + scale · outer ⊙ B (inner ⊙ A)).

    A and B are tensors, or callables with a `weight`: modules, a `Compact` or a `Product`. A bias of B is added to the
    layer's bias.
    """

    A: Factor  # (r, fan_in)
    B: Factor  # (out, r)
    scale: Tensor | float | None = None  # None: 1
    dropout: nn.Module | None = None  # acts on the input of A; with a gain, on the input of W, too
    inner: Tensor | None = None  # (r,)
    outer: Tensor | None = None  # (out,)
    gain: Tensor | None = None  # (out,)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, fan_in) and B (out, r).

        Their product B A is the whole update without the gain: `inner` is in A, `outer` and `scale` are in B. Dropout
        is ignored.
        """
        A, B = self.matrices_without_scale()
        return A, B if self.scale is None else B * self.scale

    def matrices_without_scale(self) -> tuple[Tensor, Tensor]:
        """Return A (r, fan_in) and B (out, r), flattened to matrices, with `inner` in A and `outer` in B, but without
        `scale` and gain.
        """
        A, B = factor_matrix(self.A).flatten(1), factor_matrix(self.B).flatten(1)
        if self.inner is not None:
            A = self.inner[:, None] * A
        if self.outer is not None:
            B = self.outer[:, None] * B
        return A, B

    def times(self, weight: float) -> Factors:
        """Return factors with `scale` multiplied by `weight` (None counts as 1)."""
        return self._replace(scale=weight if self.scale is None else self.scale * weight)

    def with_gain(self, gain: Tensor) -> Factors:
        """Return the factors with this gain, (out,).

        It calls the class: the compiler of torch 2.6 does not trace `_replace`.
        """
        return Factors(self.A, self.B, self.scale, self.dropout, self.inner, self.outer, gain)

    def shift(self) -> Tensor | None:
        """Return the update of the layer's bias, (out,): the bias of B, times `outer` and `scale`.

        None if B has no bias.
        """
        bias: Tensor | None = getattr(self.B, "bias", None)
        if bias is None:
            return None
        bias = bias if self.outer is None else bias * self.outer
        return bias if self.scale is None else bias * self.scale


class Compact(NamedTuple):
    """A factor with a module that holds fewer numbers than its matrix.

    Kernels use the expanded matrix; if the module has hooks, they call it instead.
    """

    module: nn.Module  # its forward is the product
    expand: Callable[[Tensor], Tensor]  # from its weight to the matrix

    def __call__(self, x: Tensor) -> Tensor:
        """Return x times the matrix, by the module's forward."""
        out: Tensor = self.module(x)
        return out

    @property
    def weight(self) -> Tensor:
        """The matrix, `expand` of the module's weight, computed at each access."""
        return self.expand(self.module.weight)


class Product(NamedTuple):
    """A factor with a product of a special kind, such as one with another backward pass."""

    call: Callable[[Tensor], Tensor]  # x → product; it casts x
    matrix: Tensor | Callable[[], Tensor]  # or a function that makes it: a forward pass does not need it

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product of x with the factor, by `call`."""
        return self.call(x)

    @property
    def weight(self) -> Tensor:
        """The matrix, or the result of the function that makes it, called at each access.

        Norms, merges and files are computed from it.
        """
        return self.matrix if isinstance(self.matrix, Tensor) else self.matrix()


class Deferred(Protocol):
    """A ΔW that is not formed yet. `dense()` returns the tensor."""

    def dense(self) -> Tensor:
        """Return ΔW as a tensor. A declaration only."""


class Unformed(Deferred, Protocol):
    """A ΔW that is not formed yet, with ways to compute products without forming it (`Hadamard`, `Modulated`)."""

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that an embedding looks up for `ids`. A declaration only."""

    def product(self, x: Tensor) -> Tensor | None:
        """Return x ΔWᵀ for few rows; None if forming ΔW pays. A declaration only."""

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias, (…, out), if there is a faster way than with ΔW formed; else None.

        A declaration only.
        """


Delta = Tensor | Deferred  # ΔW


def factor_matrix(factor: Factor) -> Tensor:
    """Return the matrix of a factor: the tensor itself, or its `weight`."""
    return factor if isinstance(factor, Tensor) else factor.weight


def form_delta(delta: Delta) -> Tensor:
    """Return ΔW as a tensor: `delta` itself, or the result of its `dense()`."""
    return delta if isinstance(delta, Tensor) else delta.dense()


class ScaledDelta(NamedTuple):
    """An `Unformed` ΔW times a number."""

    delta: Unformed
    weight: float

    def dense(self) -> Tensor:
        """Return the scaled ΔW as a tensor."""
        return self.delta.dense() * self.weight

    def columns(self, ids: Tensor) -> Tensor:
        """Return the scaled columns of ΔW that an embedding looks up for `ids`."""
        return self.delta.columns(ids) * self.weight

    def product(self, x: Tensor) -> Tensor | None:
        """Return x ΔWᵀ, scaled; None if forming ΔW is faster."""
        y = self.delta.product(x)
        return None if y is None else y * self.weight

    def linear_with(self, *_: object) -> None:
        """Return None: a scaled ΔW has no faster way to x (W + ΔW)ᵀ + b."""
        return None


def scale_result(function: Callable[..., Any], weight: float, *args: object) -> Any:
    """Call a function with `args`, and return its result times `weight`: a tensor, `Factors` or `Pieces`.

    Any other result is a ΔW that is not formed, and becomes a `ScaledDelta`.
    """
    value = function(*args)
    if isinstance(value, Tensor):
        return value * weight
    return value.times(weight) if isinstance(value, (Factors, Pieces)) else ScaledDelta(value, weight)


class Pieces(NamedTuple):
    """The changes that an adapter makes to single matrices of a stack, so that the changes of all are never in memory
    together.

    `change(expert, tensors, W0, W, trains)` returns the change of one matrix: ΔW (out, in), or A (r, in) and B (out,
    r). `tensors` are those of the matrix. W0 is the matrix without any adapter; if None, `change` reads it from the
    layer if needed. W is the matrix after the adapters before this one. In training mode (`trains`) dropout may act.
    """

    tensors: Sequence[Tensor]  # (n, …): `change` reads them, and gradients flow to them
    change: Callable[[int, Sequence[Tensor], Tensor | None, Tensor | None, bool], tuple[Tensor, ...]]
    common_parameters: Sequence[Tensor] = ()  # parameters that the changes of all matrices read
    reads: bool = False  # `change` needs the matrix

    def times(self, weight: float) -> Pieces:
        """Return pieces with `weight` times these changes: ΔW, or B of the factors. The tensors stay."""

        def change(*args: Any) -> tuple[Tensor, ...]:
            """Return the result of the original `change`, with its last tensor (ΔW, or B) times `weight`."""
            *A, B = self.change(*args)
            return *A, B * weight

        return self._replace(change=change)


InputOf = Callable[[nn.Module, dict[str, object]], Tensor]  # a module and its arguments by name → x, (batch, …)


@dataclass(frozen=True, eq=False, kw_only=True)
class Effect:
    """Base of the kinds of effect.

    The site and config determine the kind once; the effect's functions run at each call.
    """

    of_weight: bool = False  # it depends on W₀, the weight without any adapter
    why_unmergeable: str | None = None  # why it has no merged form; None: it has one
    pieces: Callable[[], Pieces] | None = None  # of a stack: changes of single matrices; None: those of its factors

    whole: ClassVar[bool] = False  # it replaces the layer
    inward: bool = False  # of several adapters of its method, a later one acts closer to the base layer

    @property
    def additive(self) -> bool:
        """True if y = base(x) + part(x): the effect only adds to the output. True here; subclasses override it."""
        return True

    @property
    def only_adds_on_top(self) -> bool:
        """True if the effect needs only the layer's input and output, with earlier adapters in them.

        Here: if it is additive.
        """
        return self.additive

    @property
    def weighable(self) -> bool:
        """True if gates can weigh the part that it adds to the output. Here: if it is additive."""
        return self.additive

    @property
    def product(self) -> Callable[[], Factors] | None:
        """The function that returns the factors, if the effect only adds their product; else None. None here."""
        return None

    @property
    def input_of(self) -> InputOf | None:
        """The function that finds the effect's input among a module's several inputs.

        None here: the module has one input.
        """
        return None

    @property
    def adapts_any_module(self) -> bool:
        """True if it adapts modules that no `Op` knows. Here: if it runs in place of the layer (`whole`)."""
        return self.whole

    @property
    def weightless(self) -> bool:
        """True if no change of a weight has its effect: it needs a call of the layer.

        Here: if it takes any module but does not replace it.
        """
        return self.adapts_any_module and not self.whole

    @property
    def reads(self) -> bool:
        """True if a forward pass needs the values of the weight. Here: if the effect depends on W₀."""
        return self.of_weight

    @property
    def keeps_weight(self) -> bool:
        """True if its merged form changes the bias alone. False here."""
        return False

    @property
    def forms_delta(self) -> bool:
        """True if the part that it adds to an output is computed from a tensor as large as the weight. False here."""
        return False

    @property
    def runs_module_on_values(self) -> bool:
        """True if a forward pass runs the module's operation on values of the adapter, as with the weight.

        False here.
        """
        return False

    def shift(self, f: Factors | None = None) -> Tensor | None:
        """Return the update Δb of the bias, (out,), of an effect that adds to the weight; None if it leaves the bias.

        None here.

        f: its factors, if they are computed already.
        """
        return None

    def times(self, weight: float) -> Effect | None:
        """Return an effect that adds `weight` times the part of this one; None if it does more than add. None here."""
        return None


@dataclass(frozen=True, eq=False)
class Update(Effect):
    """An update of weight and bias: W' = W + ΔW, b' = b + Δb. ΔW is the sum of `delta` and the product of `factors`.

    Args:
        delta: () → ΔW, or W₀ → ΔW if `of_weight`; both canonical, (out, in, *kernel). A tensor, or a value that is not
            formed yet: an `Unformed`, or next to a `branch` any value with `dense()`.
        factors: the factors of a product B A, with a separate dropout.
        branch: x → the part that is added to the output. With `delta`: a faster x ΔWᵀ; without it: a part that no
            weight can give.
        bias: Δb, (out,).
        dropout: acts on the input of `delta`.
        gains: the factors have a gain, W' = gain ⊙ (W + B A); then no other field is set.
        draws: ΔW is random in training, so that a call must compute it only once.
        input_of: for a branch next to a module with several inputs. If the module returns a tuple, the branch adds to
            the first item.
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
        """Check the fields, and set `why_unmergeable` for a branch without a weight.

        Raises:
            TypeError: factors with a gain come together with `delta`, `branch` or `bias`.
        """
        if self.gains and (self.delta or self.branch or self.bias):
            raise TypeError("An Update with a gain has no delta, branch or bias. Leave them out.")
        if self.weightless and self.why_unmergeable is None:
            object.__setattr__(self, "why_unmergeable", "a branch next to the layer has no merged form")

    @property
    def weightless(self) -> bool:
        """True if it has a branch and no `delta`: no change of a weight can do the same.

        Factors next to the branch do not matter.
        """
        return self.delta is None and self.branch is not None

    @property
    def product(self) -> Callable[[], Factors] | None:
        """The function `factors`, if the update has no `delta`, branch, bias or gain; else None."""
        only_factors = self.delta is None and self.branch is None and self.bias is None and not self.gains
        return self.factors if only_factors else None

    @property
    def additive(self) -> bool:
        """True unless the factors have a gain."""
        return not self.gains

    @property
    def adapts_any_module(self) -> bool:
        """True if it has an `input_of`: then it adapts modules that no `Op` knows."""
        return self.input_of is not None

    @property
    def keeps_weight(self) -> bool:
        """True if it has neither `delta` nor factors."""
        return self.delta is None and self.factors is None

    @property
    def forms_delta(self) -> bool:
        """True if the output is computed from a ΔW as large as the weight.

        With a gain it is False. With `delta`, it is true unless there is a branch. With factors alone, it is true if
        they depend on W₀.
        """
        return not self.gains and (self.of_weight if self.delta is None else self.branch is None)

    def shift(self, f: Factors | None = None) -> Tensor | None:
        """Return Δb, (out,): the sum of `bias()` and the bias of the factors; None if there is neither.

        f: the factors, if they are computed already; else they are computed here.
        """
        bias = None if self.bias is None else self.bias()
        factor_bias = None if self.factors is None else (f or self.factors()).shift()
        return factor_bias if bias is None else bias if factor_bias is None else bias + factor_bias

    def times(self, weight: float) -> Effect | None:
        """Return a copy of the update with `weight` times its delta, factors, branch, bias and pieces, each scaled when
        it is computed. Those that are None stay None. Returns None with a gain.
        """
        if self.gains:
            return None
        functions = self.delta, self.factors, self.branch, self.bias, self.pieces
        delta, factors, branch, bias, pieces = (part and partial(scale_result, part, weight) for part in functions)
        return replace(self, delta=delta, factors=factors, branch=branch, bias=bias, pieces=pieces)


def add_part(part: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Return the last value plus `part(*values)`."""
    return values[-1] + part(*values)


ONE_OUTPUT = "in an average its part is computed from the output that other adapters get too, and no weight can do that"
NO_WEIGHT = "it changes activations in a way that no weight can"


def refuse_merge(W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Raise NotImplementedError: the effect has no merged form. Default of `Rewrite.merged`."""
    raise NotImplementedError(NO_WEIGHT)


@dataclass(frozen=True, eq=False)
class Rewrite(Effect):
    """A function of weight and bias: (W', b') = merged(W, b).

    Forward is pre → layer → post, or the layer with W' if both are missing.

    Args:
        merged: left out if the change of inputs and outputs has no merged form.
        pre: x → x', where W' x = W x'.
        post: (x, y) → y', from the input before `pre` and the output.
        part: (x, y) → Δy; it replaces `post`, which is then y + Δy. Gates can weigh it; all parts that they weigh use
            the same y.
        ahead: x → Δx, of a block; it replaces `pre`, which is then x + Δx. All parts that an average weighs use the
            same x.
        apart: `post` acts on the output without its bias.
        looks_up: `post` returns rows of another table as the module, which takes ids, would output them.
        block: the site is a module with several inputs; `pre` gets the first one. `post` gets its output, or the first
            item of a tuple. It has no weight, and so no merged form.
        tapped: `post` and `part` get the input that a `Tap` of the same adapter stored, in place of the layer's input.
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

    additive: ClassVar[bool] = False  # it does more than add to the output

    def __post_init__(self) -> None:
        """Check the fields, make `post` from `part` and `pre` from `ahead`.

        Set `why_unmergeable`, unless it is set, if `merged` is the function that refuses.

        Raises:
            TypeError: `part` comes with `post` or `apart`; or `ahead` with `pre`, or without `block`.
        """
        if (part := self.part) is not None:
            if self.post is not None or self.apart:
                raise TypeError("A Rewrite with `part` has no `post`, and is not `apart`. Leave them out.")
            object.__setattr__(self, "post", partial(add_part, part))
        if (ahead := self.ahead) is not None:
            if self.pre is not None or not self.block:
                raise TypeError("A Rewrite with `ahead` has no `pre`, and needs block=True.")
            object.__setattr__(self, "pre", partial(add_part, ahead))
        if self.merged is refuse_merge and self.why_unmergeable is None:
            object.__setattr__(self, "why_unmergeable", NO_WEIGHT)

    @property
    def only_adds_on_top(self) -> bool:
        """True if it has `post` (which `part` sets) and no `pre`: it needs only input and output of the base layer."""
        return self.pre is None and self.post is not None

    @property
    def weighable(self) -> bool:
        """True if it has a `part` and changes no input."""
        return self.pre is None and self.part is not None

    @property
    def adapts_any_module(self) -> bool:
        """True if the site is a block."""
        return self.block

    @property
    def folds(self) -> bool:
        """True if forward needs the rewritten weight, since there is neither `pre` nor `post`."""
        return self.pre is None and self.post is None

    @property
    def reads(self) -> bool:
        """True if it depends on W₀, or if forward needs the rewritten weight."""
        return self.of_weight or self.folds

    @property
    def runs_module_on_values(self) -> bool:
        """True if forward runs the module with the rewritten weight, or looks rows up in another table."""
        return self.folds or self.looks_up

    def times(self, weight: float) -> Effect | None:
        """Return the rewrite with `weight` times `part` and `ahead`.

        It has no merged form: `why_unmergeable` stays, or is set to `ONE_OUTPUT`.

        Returns None if it has a `pre` that is no `ahead`, a `post` that is no `part`, or neither `pre` nor `post`.
        """
        if (self.pre is not None and self.ahead is None) or (self.post is not None and self.part is None) or self.folds:
            return None
        part, ahead = (f and partial(scale_result, f, weight) for f in (self.part, self.ahead))
        fixed = self.why_unmergeable or ONE_OUTPUT
        return replace(self, part=part, ahead=ahead, pre=None, post=None, merged=refuse_merge, why_unmergeable=fixed)


@dataclass(frozen=True, eq=False)
class Tap(Effect):
    """Leaves its layer unchanged, and stores the layer's input for layers that run later in the same block
    (`Rewrite.tapped`).

    readers: the paths of those layers.
    """

    readers: tuple[str, ...]
    why_unmergeable: str | None = field(default="a layer that runs later reads its input", kw_only=True)

    adapts_any_module: ClassVar[bool] = True  # any module has an input to store

    def times(self, weight: float) -> Effect:
        """Return the tap itself: it adds nothing to weigh."""
        return self


@dataclass(frozen=True, eq=False)
class Replace(Effect):
    """A module that runs in place of the layer, or a function that may call the layer.

    aside: it was added with an adapter that acts elsewhere (a head). Then gates leave it out, and in a mixed batch its
    output may be narrower than the outputs of others.
    """

    module: Callable[[], Any]
    acts_elsewhere: bool = field(default=False, kw_only=True)

    whole: ClassVar[bool] = True
    additive: ClassVar[bool] = False  # it replaces the layer's output

    def times(self, weight: float) -> Effect | None:
        """Return the effect itself if it `acts_elsewhere`, so that no weight applies; else None."""
        return self if self.acts_elsewhere else None
