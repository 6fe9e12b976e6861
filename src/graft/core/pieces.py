# SPDX-License-Identifier: Apache-2.0
"""Adapters on a layer that several processes compute together, each a piece, such as some of the output's features.

An adapter is defined on the full weight. Each process has all of its parameters and of their gradients. So initial
values, optimizers, clipping, files and merging are those of one process, and saving gathers nothing. An effect is
computed with whole inputs and outputs, joined before and cut after it. Products and ΔW, which most methods are, have a
shorter way: each process computes with the rows or columns that its piece of the weight has.

PEFT shards LoRA's parameters as the weight is. That saves memory of about the size of one adapter. But then each method
needs its own rules for values, gradients and files.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from graft.core.effect import Effect, Factors, Rewrite, Update
from graft.core.errors import UnsupportedLayerError
from graft.core.folding import evaluate_delta
from graft.core.fused import factor_tensors
from graft.core.lean import find_dropout_rate
from graft.core.method import Layer, Method
from graft.core.plan import ChainPlan, LayerPlan, Step, SumPlan, apply_delta, compute_part, find_step_input
from graft.core.random import read_generator_states
from graft.kernels.cuts import Cut, cut_tensor, join_pieces, sum_gradient, sum_partial_results
from graft.kernels.low_rank import dropout


@dataclass(frozen=True)
class LayerPiece:
    """The piece of a layer's work that one process does.

    Args:
        style: the layout's name for it, for errors.
        group: the processes that share the layer; None: the default process group.
        inputs: the cut of the inputs, if the module takes a piece of them; None if it takes all.
        outputs: the cut of the outputs, if the module returns a piece of them; None if it returns all.
        left_out: function from the module to the values after the output in the tuple that it returns. The first is a
            bias that the caller adds. None: the module returns a tensor.
    """

    style: str
    group: dist.ProcessGroup | None  # None: the default process group
    inputs: Cut | None = None
    outputs: Cut | None = None
    left_out: Callable[[nn.Module], tuple[object, ...]] | None = None

    def leaves_bias(self, module: nn.Module) -> bool:
        """Return True if the output comes without the layer's bias, which the caller adds."""
        return self.left_out is not None and self.left_out(module)[0] is not None

    @property
    def plans(self) -> dict[type, type]:
        """Return the plan classes for layers in pieces, by the classes that they replace: PieceSumPlan for SumPlan,
        PieceChainPlan for ChainPlan.
        """
        return {SumPlan: PieceSumPlan, ChainPlan: PieceChainPlan}

    def check(self, x: Tensor, y: Tensor, key: str) -> None:
        """Raise UnsupportedLayerError unless x and y are plain tensors of the same tokens, and y has the features of
        this piece.

        Plain is exactly `Tensor`, for x also `nn.Parameter`; a subclass is refused. x may be ids, without a dimension
        of features. If outputs are not cut, y may have any number of features, but has at least one dimension. `key`
        names the layer in the error.
        """
        features = None if self.outputs is None else self.outputs.length(self.outputs.rank) * self.outputs.stripes
        right = type(y) is Tensor and y.dim() and (features is None or y.shape[-1] == features)
        if (
            not right
            or type(x) not in (Tensor, nn.Parameter)
            or not (x.shape == y.shape[:-1] or x.shape[:-1] == y.shape[:-1])
        ):
            raise UnsupportedLayerError(
                f"Layer '{key}', parallel by the style '{self.style}', maps {show_type(x)} to {show_type(y)}: adapters "
                "need plain tensors of all tokens on each process. Take sequence parallelism out of the model's plan, "
                "or the layer out of target_modules."
            )

    def check_draws(self, key: str) -> None:
        """Raise RuntimeError if the processes have different random states, so that dropout would differ between them.

        All processes of the group have to call it: it gathers checksums of their generators.
        """
        checksums = [zlib.crc32(bytes(state.tolist())) for state in read_generator_states()]
        gathered: list[object] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, checksums, group=self.group)
        if any(of_process != checksums for of_process in gathered):
            raise RuntimeError(
                f"The processes that share layer '{key}' have different random states, so that dropout would drop "
                "other inputs on each and their adapters drift apart. Call torch.manual_seed with one seed on all of "
                "them, after draws on some only."
            )


def show_type(t: Tensor) -> str:
    """Return "a Tensor(2, 3)", with type and shape of a tensor, or "a list", the type of another object, for
    an error.
    """
    return f"a {type(t).__name__}{tuple(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"


def call_piece(layer: Layer, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """Return the module's output for x with another (whole, canonical) weight and bias: this process's piece of it.

    Cut outputs use the rows of W of this process, and gradients of x are summed over processes. Cut inputs use the
    columns, and partial results are summed; the bias is added after that.
    """
    op, base, piece = layer.op, layer.base_layer, layer.site.piece
    if piece.outputs is not None:
        x, W = sum_gradient(x, piece.outputs), cut_tensor(W, piece.outputs, 0)
        b = None if b is None else cut_tensor(b, piece.outputs, 0)
    if piece.inputs is None:
        return op.call(base, x, W, b)
    y = sum_partial_results(op.call(base, x, cut_tensor(W, piece.inputs, 1), None), piece.inputs)
    return y if b is None else y + b


def drops_inputs(layer: Layer, module: nn.Module | None) -> bool:
    """Return True if a dropout module may drop inputs now: not for None, ids, Identity, eval mode or p = 0."""
    return module is not None and not layer.op.takes_ids and find_dropout_rate(module) != 0


def drop_piece_inputs(layer: Layer, module: nn.Module, x: Tensor) -> Tensor:
    """Return this process's piece of an input with the same inputs dropped on all processes as one process would drop.

    Joins the input, drops, and cuts it again. A module without a known rate is run on the joined input.
    """
    piece = layer.site.piece
    p, whole = find_dropout_rate(module), join_pieces(x, piece.inputs)
    return cut_tensor(module(whole) if p is None else dropout(whole, p), piece.inputs)


def low_rank_piece(layer: Layer, m: Method, f: Factors, x: Tensor) -> Tensor:
    """Return this process's piece of scale · outer ⊙ B (inner ⊙ A dropout(x)), for x cast to the adapter's dtype.

    Factors are cut as the weight is. With cut inputs, A's columns are used and the partial results summed. With cut
    outputs, B's rows are used, and the gradient of A's output is summed over the processes. `inner` is never cut; it
    acts on the whole output of A. The scale acts before B, and `outer` on B's rows.

    A factor without a plain matrix (a module with hooks) is called. A gets the whole input, and its output is not cut.
    B's output is multiplied by `outer` and scale, then cut. A dropout that drops nothing is passed over.
    """
    op, base, piece = layer.op, layer.base_layer, layer.site.piece
    x = m.cast(x)
    if f.dropout is not None and drops_inputs(layer, f.dropout):
        x = drop_piece_inputs(layer, f.dropout, x)
    A, B = factor_tensors(f.A, f.B)
    if A is None:
        z = f.A(join_pieces(x, piece.inputs))  # type: ignore[operator]
    elif piece.inputs is None:
        z = op.down(base, x, A)
    else:
        z = sum_partial_results(op.down(base, x, cut_tensor(A, piece.inputs, 1)), piece.inputs)
    z = z if f.inner is None else z * f.inner
    if B is None:
        y = f.B(z)  # type: ignore[operator]
        for factor in (f.outer, f.scale):
            y = y if factor is None else y * factor
        return cut_tensor(y, piece.outputs)
    z = z if f.scale is None else z * f.scale  # a whole tensor, so that the scale's gradient is whole
    B = B if f.outer is None else f.outer[:, None] * B
    if piece.outputs is None:
        return op.up(base, z, B)
    return op.up(base, sum_gradient(z, piece.outputs), cut_tensor(B, piece.outputs, 0))


def compute_part_piece(layer: Layer, m: Method, effect: Effect, x: Tensor, y: Tensor) -> Tensor:
    """Return this process's piece of the part that an adapter adds to y, the output for x.

    The input is cast to the adapter's dtype. A product is computed with pieces. So is an Update without active dropout
    and branch, if its ΔW is formed. Any other effect gets whole inputs (a Rewrite also the whole output), and its part
    is cut. Factors next to ΔW are added as pieces.
    """
    piece = layer.site.piece
    if effect.product is not None:
        return low_rank_piece(layer, m, effect.product(), x)
    if (
        isinstance(effect, Update)
        and not drops_inputs(layer, effect.dropout and effect.dropout())
        and effect.branch is None
    ):
        delta, bias = evaluate_delta(layer, effect), None if effect.bias is None else effect.bias()
        if isinstance(delta, Tensor):
            y = call_piece(layer, m.cast(x), delta.to(m.dtype), bias)
        else:
            y = cut_tensor(apply_delta(layer, m, delta, bias, m.cast(join_pieces(x, piece.inputs))), piece.outputs)
        return y if effect.factors is None else y + low_rank_piece(layer, m, effect.factors(), x)
    if isinstance(effect, Rewrite):
        y = join_pieces(y, piece.outputs)
    return cut_tensor(compute_part(layer, m, effect, join_pieces(x, piece.inputs), y), piece.outputs)


class PiecePlan(LayerPlan):
    """The common part of both plans: each calls the module with its piece of the input."""

    checked = False  # a pass in training has compared the processes' random states

    def run(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """Return the output with adapters in the form of the module's own: a tensor, or a tuple of it and the values
        that the module leaves to its caller, such as its bias. The parent class computes the tensor.
        """
        y, left_out = super().run(x, *args, **kwargs), self.layer.site.piece.left_out
        return y if left_out is None else (y, *left_out(self.layer.base_layer))

    def run_base(self, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the base layer's output, this process's piece of it if the module returns one.

        If the module leaves its bias out, that is the first item of its output.

        Checks types and shapes each time. In the first pass in training, which is noted in `checked`, also checks that
        all processes have equal random states, if an adapter may draw. Raises the errors of these checks (`check`,
        `check_draws`).
        """
        layer = self.layer
        out = layer.base_layer(x, *args, **kwargs)
        y: Tensor = out if layer.site.piece.left_out is None else out[0]
        layer.site.piece.check(x, y, layer.site.key)
        if layer.training and not self.checked:
            self.checked = True
            if any(may_draw(m) for m, _ in self.steps):
                layer.site.piece.check_draws(layer.site.key)
        return y

    part_of = staticmethod(compute_part_piece)


def may_draw(m: Method) -> bool:
    """Return True if an adapter may draw random numbers in training: a float field with "dropout" in its name is above
    0 in the config, or its effect draws.
    """
    rates = [value for name, value in vars(m.cfg).items() if "dropout" in name]
    return any(isinstance(rate, float) and rate > 0 for rate in rates) or bool(getattr(m.effect, "draws", False))


class PieceSumPlan(PiecePlan, SumPlan):
    """Adapters that only add to the output of a layer in pieces."""


class PieceChainPlan(PiecePlan, ChainPlan):
    """Adapters in a chain on a layer in pieces."""

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        """Make a chain that needs more than the base's input and output, since whole tensors are joined."""
        super().__init__(layer, steps)
        self.only_adds_on_top = False

    def bias(self, n: int | None = None) -> Tensor | None:
        """Return the layer's bias with n steps; None if the module leaves its bias to the caller."""
        return None if self.layer.site.piece.leaves_bias(self.layer.base_layer) else super().bias(n)

    low_rank = staticmethod(low_rank_piece)

    def run_rewrite(self, n: int, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the output with step n, a Rewrite: `pre` gets the whole input, and its result, in x's dtype, is cut
        for the steps before. `apply_post` then gets the whole input, or the one that a tap kept.
        """
        m, effect = self.steps[n]
        assert isinstance(effect, Rewrite)
        piece = self.layer.site.piece
        whole = join_pieces(x, piece.inputs)
        inner = x if effect.pre is None else cut_tensor(effect.pre(whole).to(x.dtype), piece.inputs)
        step_input = find_step_input(self.layer, m, effect, whole)
        return self.apply_post(n, effect, step_input, self.run_steps(n, inner, args, kwargs))

    def apply_post(self, n: int, effect: Rewrite, x: Tensor, y: Tensor) -> Tensor:
        """Return this process's piece of post(x, y), computed on the whole output, in y's dtype; y itself if the effect
        has no `post`.

        x is the whole input. If the effect is `apart`, the bias with the first n steps is subtracted before `post` and
        added again.
        """
        if effect.post is None:
            return y
        piece = self.layer.site.piece
        out = join_pieces(y, piece.outputs)
        b = self.bias(n) if effect.apart else None
        out = effect.post(x, out) if b is None else effect.post(x, out - b) + b
        return cut_tensor(out.to(y.dtype), piece.outputs)

    def call(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return this process's piece of the output with another (whole, canonical) weight and bias."""
        return call_piece(self.layer, x, W, b)

    def channels(self, v: Tensor) -> Tensor:
        """Return this process's piece of a vector over output features."""
        return cut_tensor(v, self.layer.site.piece.outputs, 0)

    def apply_dropout(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return this process's piece of x, with the same inputs dropped on all processes."""
        return drop_piece_inputs(self.layer, module, x)
