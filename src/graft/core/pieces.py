# SPDX-License-Identifier: Apache-2.0
"""Adapters on a layer of which each process computes a piece, such as some of the output's features.

An adapter is defined on the full weight. Its parameters are whole on every process, and so are their gradients: initial
values, optimizers, clipping, files and merging are those of one process, and saving gathers nothing. What an effect
says is computed with whole inputs and outputs, joined before it and cut after it. Products and ΔW, which most methods
are, have a shorter way: each process computes with the rows or columns that its piece of the weight has.

PEFT shards LoRA's parameters as the weight is. That saves memory of about the size of one adapter, and then each method
needs rules of its own for values, gradients and files.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from graft.core.effect import Effect, Factors, Rewrite, Update
from graft.core.errors import UnsupportedLayerError
from graft.core.folding import evaluate_delta
from graft.core.fused import factor_tensors
from graft.core.lean import find_dropout_rate
from graft.core.method import Method
from graft.core.plan import ChainPlan, LayerPlan, Step, SumPlan, apply_delta, compute_part, find_step_input
from graft.core.protocols import Layer
from graft.core.random import read_generator_states
from graft.core.site import Site
from graft.kernels.cuts import Cut, cut_tensor, join_pieces, sum_gradient, sum_partial_results
from graft.kernels.low_rank import dropout


@dataclass(frozen=True)
class LayerPiece:
    """The piece of a layer's work that one process does.

    Args:
        style: what the layout calls it, for errors.
        group: the processes that do the work together.
        inputs: the cut of the inputs of which the module takes a piece; None if it takes all.
        outputs: the cut of the outputs of which the module returns a piece; None if it returns all.
        left_out: module → what follows the output in the tuple that it returns; the first is a bias that the caller
            adds. None: the module returns a tensor.
    """

    style: str
    group: dist.ProcessGroup | None  # None: the default one
    inputs: Cut | None = None
    outputs: Cut | None = None
    left_out: Callable[[nn.Module], tuple[object, ...]] | None = None

    def leaves_bias(self, module: nn.Module) -> bool:
        """Return True if the output comes without the layer's bias, which the caller adds."""
        return self.left_out is not None and self.left_out(module)[0] is not None

    @property
    def plans(self) -> dict[type, type]:
        """The plans for layers of this kind, by those of other layers."""
        return {SumPlan: PieceSumPlan, ChainPlan: PieceChainPlan}

    def check(self, x: Tensor, y: Tensor, key: str) -> None:
        """Raise UnsupportedLayerError unless the module gives the piece that its style says."""
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
        """Raise RuntimeError if the processes would draw different random numbers for tensors that are equal."""
        checksums = [zlib.crc32(bytes(state.tolist())) for state in read_generator_states()]
        gathered: list[object] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, checksums, group=self.group)
        if any(of_process != checksums for of_process in gathered):
            raise RuntimeError(
                f"The processes that share layer '{key}' have different random states, so that dropout would take "
                "different inputs out on each and their adapters drift apart: call torch.manual_seed with one seed on "
                "all of them, after whatever draws on some only."
            )


def check_no_pieces(sites: Iterable[tuple[str, Site]], what: str) -> None:
    """Raise UnsupportedLayerError if a process has only a piece of one of these sites (path, site)."""
    cut = [(key, p.style) for key, s in sites if (p := s.piece) is not None and (p.inputs or p.outputs or p.left_out)]
    if cut:
        raise UnsupportedLayerError(
            f"{what} of whole layers, and layer '{cut[0][0]}' is parallel by the style '{cut[0][1]}' ({len(cut)} "
            "layers are): load the model without tp_plan for this."
        )


def show_type(t: Tensor) -> str:
    return f"a {type(t).__name__}{tuple(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"


def call_piece(layer: Layer, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """Return the module's output with another (whole, canonical) weight and bias."""
    op, base, piece = layer.op, layer.base_layer, layer.site.piece
    if piece.outputs is not None:
        x, W = sum_gradient(x, piece.outputs), cut_tensor(W, piece.outputs, 0)
        b = None if b is None else cut_tensor(b, piece.outputs, 0)
    if piece.inputs is None:
        return op.call(base, x, W, b)
    y = sum_partial_results(op.call(base, x, cut_tensor(W, piece.inputs, 1), None), piece.inputs)
    return y if b is None else y + b


def drops_inputs(layer: Layer, module: nn.Module | None) -> bool:
    return module is not None and not layer.op.takes_ids and find_dropout_rate(module) != 0


def drop_piece_inputs(layer: Layer, module: nn.Module, x: Tensor) -> Tensor:
    """Return the piece of an input with the same inputs taken out on all processes, those that one would take out."""
    piece = layer.site.piece
    p, whole = find_dropout_rate(module), join_pieces(x, piece.inputs)
    return cut_tensor(module(whole) if p is None else dropout(whole, p), piece.inputs)


def low_rank_piece(layer: Layer, m: Method, f: Factors, x: Tensor) -> Tensor:
    """Return this process's piece of scale · outer ⊙ B (inner ⊙ A dropout(x)). Modules with hooks see whole tensors."""
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
    """Return this process's piece of what an adapter adds to y, the output for x."""
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
    """The share of both plans: each calls the module with its piece of the input."""

    checked = False  # draws of a training pass

    def run(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """Return an output in the form in which the module returns it."""
        y, left_out = super().run(x, *args, **kwargs), self.layer.site.piece.left_out
        return y if left_out is None else (y, *left_out(self.layer.base_layer))

    def run_base(self, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the base layer's output, a piece of it if that is what the module returns."""
        layer = self.layer
        out = layer.base_layer(x, *args, **kwargs)
        y: Tensor = out if layer.site.piece.left_out is None else out[0]
        layer.site.piece.check(x, y, layer.site.key)
        if layer.training and not self.checked:
            self.checked = True
            if any(may_draw(m) for m, _ in self.steps):
                layer.site.piece.check_draws(layer.site.key)
        return y

    def compute_part(self, m: Method, effect: Effect, x: Tensor, y: Tensor) -> Tensor:
        return compute_part_piece(self.layer, m, effect, x, y)


def may_draw(m: Method) -> bool:
    """Return True if an adapter may draw random numbers in training."""
    return any(
        isinstance(value, float) and value > 0 for name, value in vars(m.cfg).items() if "dropout" in name
    ) or bool(getattr(m.effect, "draws", False))


class PieceSumPlan(PiecePlan, SumPlan):
    def add(self, x: Tensor, y: Tensor, fuse: bool, first: int = 0) -> Tensor:
        dtype = y.dtype
        for m, effect in self.steps[first:]:
            y = y + compute_part_piece(self.layer, m, effect, x, y)
        return y.to(dtype)


class PieceChainPlan(PiecePlan, ChainPlan):
    def __init__(self, layer: Layer, steps: Sequence[Step]):
        super().__init__(layer, steps)
        self.only_adds_on_top = False

    def bias(self, n: int | None = None) -> Tensor | None:
        return None if self.layer.site.piece.leaves_bias(self.layer.base_layer) else super().bias(n)

    def run_steps(self, n: int, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        m, effect = self.steps[n - 1]
        if n and isinstance(effect, Rewrite) and not effect.folds:
            return self.run_rewrite(n - 1, m, effect, x, args, kwargs)
        return super().run_steps(n, x, args, kwargs)

    def run_rewrite(
        self, n: int, m: Method, effect: Rewrite, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor:
        piece = self.layer.site.piece
        whole = join_pieces(x, piece.inputs)
        inner = x if effect.pre is None else cut_tensor(effect.pre(whole).to(x.dtype), piece.inputs)
        return self.apply_post(
            n, m, effect, find_step_input(self.layer, m, effect, whole), self.run_steps(n, inner, args, kwargs)
        )

    def apply_post(self, n: int, m: Method, effect: Rewrite, x: Tensor, y: Tensor) -> Tensor:
        if effect.post is None:
            return y
        piece = self.layer.site.piece
        out = join_pieces(y, piece.outputs)
        b = self.bias(n) if effect.apart else None
        out = effect.post(x, out) if b is None else effect.post(x, out - b) + b
        return cut_tensor(out.to(y.dtype), piece.outputs)

    def low_rank(self, m: Method, f: Factors, x: Tensor) -> Tensor:
        return low_rank_piece(self.layer, m, f, x)

    def call(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return call_piece(self.layer, x, W, b)

    def channels(self, v: Tensor) -> Tensor:
        return cut_tensor(v, self.layer.site.piece.outputs, 0)

    def apply_dropout(self, module: nn.Module, x: Tensor) -> Tensor:
        return drop_piece_inputs(self.layer, module, x)
