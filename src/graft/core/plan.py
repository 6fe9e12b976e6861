# SPDX-License-Identifier: Apache-2.0
"""Plans: the computation of a layer with its active adapters. It is planned when they change, and run at each call.

The part of an adapter is the tensor that it adds to the output. A plan sums parts, or chains changes of input and
output.

Each adapter acts on the layer that the ones before it made: y = mₙ(… m₁(base)). Methods act in the order of their first
adapters on the layer, adapters of one method in the order of `active_adapters` (OFT's in reverse). Inputs pass from the
outermost to the innermost adapter, outputs come back, and weights fold from the inside out, so that forward and merged
layer agree for every mixture. Parts that gates weigh do not nest: each is a part of the base's output. Updates that
only add commute. An update reads the weight without adapters, W₀, so that merging a, then b, equals both at once. A
step that reads a packed weight runs again in the backward pass, so that no dense copy outlives its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graft.core import fused
from graft.core.each import MatrixUpdate, pieces_of
from graft.core.effect import Effect, Factors, Replace, Rewrite, Tap, Unformed, Update, form_delta
from graft.core.errors import RoutingError, UnsupportedLayerError
from graft.core.folding import drop_inputs_of_A, evaluate_delta, fold_effect, weigh_steps
from graft.core.lean import find_dropout_rate
from graft.core.method import Layer, Method
from graft.core.ops import Opaque
from graft.kernels.eager import cast, eager, once, watched
from graft.kernels.experts import FormedUpdate, LowRankUpdate, StackUpdate
from graft.kernels.low_rank import dropout
from graft.kernels.summed import make_sum


def recompute_in_backward(layer: Layer, run: Callable[..., Tensor], *args: object) -> Tensor:
    """Return run(*args), and compute it again in the backward pass instead of keeping its intermediate tensors.

    Torch's random state is restored for that if the layer is in training mode. Without gradients, or under a compiler
    or tracer, it is a plain call.
    """
    if not (torch.is_grad_enabled() and eager()):
        return run(*args)
    out: Tensor = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=layer.training)
    return out


def compute_low_rank_part(layer: Layer, m: Method, f: Factors, x: Tensor) -> Tensor:
    """Return scale · outer ⊙ B (inner ⊙ A dropout(x)) for x cast to the adapter's dtype, without the base's output.

    Vectors and scale that are None are left out.

    Ids have no dropout. A and B that are modules are called, in turn; tensors are applied by the layer's Op. If the Op
    has no two factors (a grouped convolution) and A is a tensor, returns the layer's function of x with the weight B A
    and B's bias.
    """
    op, base, A, B = layer.op, layer.base_layer, f.A, f.B
    x = m.cast(x)
    if f.dropout is not None and not op.takes_ids:
        x = f.dropout(x)
    if not isinstance(A, Tensor):
        z = A(x)
    elif op.factorable(base):
        z = op.down(base, x, A)
    else:
        return op.call(base, x, op.product(*f.matrices(), layer.site.shape), f.shift())
    if f.inner is not None:
        z = z * op.channels(f.inner)
    z = op.up(base, z, B) if isinstance(B, Tensor) else B(z)
    if f.outer is not None:
        z = z * op.channels(f.outer)
    return z if f.scale is None else z * f.scale


def compute_update_part(layer: Layer, m: Method, effect: Update, x: Tensor) -> Tensor:
    """Return ΔW dropout(x) + Δb of an Update, plus the part of its factors if it has both.

    x is cast to the adapter's dtype; ids have no dropout. An Update that is one product runs as factors alone. One with
    a `branch` calls it with x in place of ΔW.
    """
    if effect.product is not None:
        return compute_low_rank_part(layer, m, effect.product(), x)
    op = layer.op
    x = m.cast(x)
    if effect.dropout is not None and not op.takes_ids:
        x = effect.dropout()(x)
    bias = None if effect.bias is None else effect.bias()
    if effect.branch is None:
        y = apply_delta(layer, m, evaluate_delta(layer, effect), bias, x)
    else:
        y = effect.branch(x) if bias is None else effect.branch(x) + op.channels(bias)
    return y if effect.factors is None else y + compute_low_rank_part(layer, m, effect.factors(), x)


def apply_delta(layer: Layer, m: Method, delta: Tensor | Unformed | None, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return ΔW x + Δb. If `delta` is None, returns the bias alone, in a shape that broadcasts.

    If ΔW is not formed yet: on an embedding only the columns of the ids are formed, and on a linear layer its own
    product is used if that is cheaper. Else, as for a tensor, ΔW is formed if need be, cast to the adapter's dtype, and
    used as the layer's weight. An embedding ignores Δb.
    """
    op, base = layer.op, layer.base_layer
    if delta is None:
        assert bias is not None  # an Update has a delta or a bias
        return op.channels(bias)
    if not isinstance(delta, Tensor):
        if op.takes_ids:
            return op.scale_rows(base, delta.columns(x).to(m.dtype))
        y = delta.product(x) if op.linear else None
        if y is not None:
            return y if bias is None else y + bias
    delta = cast(form_delta(delta), m.dtype)
    return op.down(base, x, delta) if op.takes_ids else op.call(base, x, delta, bias)


def compute_part(layer: Layer, m: Method, effect: Effect, x: Tensor, y: Tensor) -> Tensor:
    """Return the part that an adapter adds to y, the output for x: the `part` of a Rewrite, on the input of its step,
    or an Update applied to x. Other effects fail an assertion.

    On a store that rounds (`exact` is False), an Update that forms ΔW is computed again in the backward pass, to save
    memory.
    """
    if isinstance(effect, Rewrite):
        assert effect.part is not None
        return effect.part(find_step_input(layer, m, effect, x), y)
    assert isinstance(effect, Update)
    if not layer.store.exact and effect.forms_delta:
        return recompute_in_backward(layer, compute_update_part, layer, m, effect, x)
    return compute_update_part(layer, m, effect, x)


def add_product(layer: Layer, m: Method, f: Factors, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
    """Return y + the low-rank part for x.

    With `fuse`, a kernel may add it in the memory of y; else, or if none fits, the sum is a new tensor.
    """
    out = fused.add_factors(f, x, y) if fuse else None
    return y + compute_low_rank_part(layer, m, f, x) if out is None else out


def run_with_update(layer: Layer, m: Method, effect: Effect, x: Tensor) -> Tensor:
    """Return the output of the base layer for x with the Update added, in the output's dtype.

    Without branch and active dropout, a fused kernel applies weight and ΔW together, or else both are applied in turn;
    the factors are added after that. With branch or dropout, the base layer is called, and the part of the update
    added. Other effects fail an assertion.
    """
    assert isinstance(effect, Update)
    if effect.factors is not None:
        x = once(x)
    if effect.branch is None and (effect.dropout is None or find_dropout_rate(effect.dropout()) == 0):
        delta = evaluate_delta(layer, effect)
        bias = None if effect.bias is None else effect.bias()
        out = fused.run_with_update(layer, m, delta, bias, x)
        if out is None:
            x = once(x)
            y: Tensor = layer.base_layer(x)
            out = cast(y + apply_delta(layer, m, delta, bias, m.cast(x)), y.dtype)
        if effect.factors is not None:
            out = cast(add_product(layer, m, effect.factors(), x, out, True), out.dtype)
        return out
    x = once(x)
    y = layer.base_layer(x)
    return cast(y + compute_update_part(layer, m, effect, x), y.dtype)


Step = tuple[Method, Effect]  # (method, its effect)


class LayerPlan:
    """Base of the plans. steps: pairs of a method and its effect, the innermost first."""

    only_adds_on_top = False  # `add` needs only input and output of the base layer
    takes_one_input = False  # `run` needs the module's input as its first positional argument

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        """Keep the layer and a copy of the list of steps."""
        self.layer, self.steps = layer, list(steps)

    def run(self, *args: Any, **kwargs: Any) -> object:  # arguments of the module
        """Return the layer's output for the module's arguments.

        Raises NotImplementedError here; subclasses override it.
        """
        raise NotImplementedError

    def run_base(self, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the output of the base layer for x and the module's other arguments, protected against in-place
        changes by the store (`protect`).
        """
        return self.layer.store.protect(self.layer.base_layer(x, *args, **kwargs))

    part_of = staticmethod(compute_part)  # the part that a step adds; another one in a layer in pieces

    def add(self, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
        """Return y, the base layer's output for x, with the steps on it.

        Raises the error of `make_add_error` here; subclasses override it. fuse: a kernel may write to y.
        """
        raise self.make_add_error()

    def make_add_error(self) -> NotImplementedError:
        """Return the error for adapters that change more than the output, with the first adapter and the layer."""
        return NotImplementedError(
            f"Adapter '{self.steps[0][0].name}' of layer '{self.layer.site.key}' acts on more than an output. Call "
            "the original forward."
        )

    def add_gated(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the part of each step times its gate in this call, in the dtype of y.

        All parts are computed from y itself. The sum is cast to y's dtype once, at the end. The error names the layer.
        Other errors of an adapter pass on. The call must have gates.

        Raises:
            RoutingError: the call has gates, and a step does more than add to the output.
        """
        if not all([effect.weighable for _, effect in self.steps]):
            check_no_gates(self.layer)
        out, gates = y, self.layer.call.current_gates()
        assert gates is not None
        for m, effect in self.steps:
            out = out + gates.apply(self.layer, m.name, self.part_of(self.layer, m, effect, x, y))
        return out.to(y.dtype)

    def fold(self, W: Tensor, b: Tensor | None, drops: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return weight (canonical) and bias of a plain layer that computes the same as the base with all steps.

        Folds each step into W and b in turn (`fold_effect`), which do not change themselves. drops: as there.
        """
        for m, effect in self.steps:
            W, b = fold_effect(self.layer, m, effect, W, b, drops)
        return W, b

    def fold_current(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (canonical) and bias, with all steps folded in, for a module that uses them in its own ways.

        Dropout then drops the same inputs for all rows of a call. For an opaque layer the bias starts as None.
        """
        layer = self.layer
        return self.fold(layer.weight_now, None if layer.op.opaque else layer.bias_now, drops=True)

    def bias(self, n: int | None = None) -> Tensor | None:
        """Return the bias of the layer with its first n steps (all if n is None); None if there is none.

        A Rewrite that cannot be merged is left out. If another Rewrite does more than change the input (it has a
        `post`, or no `pre`), folds the steps into weight and bias, and returns that bias. Else adds the shift of each
        step to the base's bias; without a base bias the first shift takes its place.
        """
        b = self.layer.bias_now
        steps = [step for step in self.steps[:n] if step[1].why_unmergeable is None or not isinstance(step[1], Rewrite)]
        if any(isinstance(e, Rewrite) and not (e.pre and not e.post) for _, e in steps):
            W = self.layer.weight_now
            for m, effect in steps:
                W, b = fold_effect(self.layer, m, effect, W, b)
            return b
        for _, effect in steps:
            shift = effect.shift()
            if shift is not None:
                b = shift if b is None else b + shift
        return b


class SumPlan(LayerPlan):
    """Adapters that only add to the output."""

    only_adds_on_top = takes_one_input = True

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        """Note the first step's product function in `product`, and in `adds` each step with its product function.

        On a store that rounds, `adds` has None instead, so that ΔW is formed, and in a layer in pieces, so that
        `part_of` computes all parts. `single`: there is one step.
        """
        super().__init__(layer, steps)
        products = [effect.product for _, effect in self.steps]
        self.product = products[0]
        exact = layer.store.exact and layer.site.piece is None
        self.adds = [(*step, product if exact else None) for step, product in zip(self.steps, products)]
        self.single = len(self.steps) == 1

    def run(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """Return the base layer's output plus the parts of all steps.

        If the call has gates, each part is weighed. Base and first step run together if a kernel may fuse, the module
        got x alone, and the base does not train in this call. Then the other parts are added. If the kernels refuse the
        first step's factors, its part is added to the base's output and cast to the output's dtype. In all other cases
        the base layer is called, and each part added.
        """
        layer = self.layer
        if layer.call.open and layer.call.current_gates() is not None:
            x = once(x)
            return self.add_gated(x, self.run_base(x, args, kwargs))
        fuse = layer.may_fuse
        if fuse and not (args or kwargs) and not (torch.is_grad_enabled() and layer.base_trains):
            m, effect = self.steps[0]
            x = x if self.single else once(x)
            if self.product is None:
                y = run_with_update(layer, m, effect, x)
            elif (joined := fused.run_with_factors(layer, factors := self.product(), x)) is not None:
                y = joined
            else:
                inner = once(x)
                y = layer.base_layer(inner)
                y = (y + compute_low_rank_part(layer, m, factors, inner)).to(y.dtype)
            return y if self.single else self.add(x, y, True, 1)
        x = once(x)
        return self.add(x, self.run_base(x, args, kwargs), fuse)

    def add(self, x: Tensor, y: Tensor, fuse: bool, first: int = 0) -> Tensor:
        """Return y plus the parts of the steps from number `first` on, in the dtype of y.

        With `fuse`, kernels may write to y, and do not call the adapters' modules.
        """
        layer, dtype = self.layer, y.dtype
        for m, effect, product in self.adds[first:]:
            if product is None:
                y = y + self.part_of(layer, m, effect, x, y)
            else:
                y = add_product(layer, m, product(), x, y, fuse)
        return cast(y, dtype)


class ChainPlan(LayerPlan):
    """Adapters that each act on the layer with all those before them."""

    takes_one_input = True

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        """Choose the function that runs each step, and note whether all steps need only input and output of the base
        layer (`only_adds_on_top`).
        """
        super().__init__(layer, steps)
        kind, self.step_runners = type(self), list[Callable[..., Tensor]]()
        for _, effect in self.steps:
            if isinstance(effect, Rewrite):
                self.step_runners.append(kind.run_fold if effect.folds else kind.run_rewrite)
            else:
                self.step_runners.append(kind.run_added if effect.additive else kind.run_gain)
        self.only_adds_on_top = all([effect.only_adds_on_top for _, effect in self.steps])

    def run(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """Return the output with all steps; with gates in the call, the base output plus all weighed parts."""
        if self.layer.call.open and self.layer.call.current_gates() is not None:
            return self.add_gated(x, self.run_steps(0, x, args, kwargs))
        return self.run_steps(len(self.steps), x, args, kwargs)

    def add(self, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
        """Return y, the output of the base layer for x, with the steps on it, one after the other: each sees the output
        of those before it. `fuse` is not used.

        A single Update with a gain may run the base again, on other inputs. Raises NotImplementedError for other steps
        that need more than input and output of the base layer.
        """
        if not self.only_adds_on_top:
            if len(self.steps) > 1 or self.step_runners[0] is not ChainPlan.run_gain:
                raise self.make_add_error()
            return self.apply_gain(0, self.steps[0][1].factors(), x, y, False, (), {})  # type: ignore[attr-defined]
        for n in range(len(self.steps)):
            y = self.apply_step(n, x, y)
        return y

    def apply_step(self, n: int, x: Tensor, y: Tensor) -> Tensor:
        """Return the output with n + 1 steps for x, from y, the output with n steps.

        A Rewrite changes y by its `post`; its `pre` is not applied. Any other effect adds its part to y; the sum is
        cast to y's dtype.
        """
        m, effect = self.steps[n]
        if isinstance(effect, Rewrite):
            return self.apply_post(n, effect, find_step_input(self.layer, m, effect, x), y)
        return cast(y + self.part_of(self.layer, m, effect, x, y), y.dtype)

    def apply_post(self, n: int, effect: Rewrite, x: Tensor, y: Tensor) -> Tensor:
        """Return post(x, y) in the dtype of y, the output with n steps; y itself if the effect has no `post`.

        If the effect is `apart`, the bias is subtracted before `post` and added again after it.
        """
        if effect.post is None:
            return y
        b = self.bias(n) if effect.apart else None
        if b is None:
            return cast(effect.post(x, y), y.dtype)
        b = self.channels(b)
        return cast(effect.post(x, y - b) + b, y.dtype)

    def run_steps(self, n: int, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the output of the layer with the first n steps on it, for x, by the runner of step n - 1, which runs
        those before it. n = 0 is the base layer.
        """
        return self.step_runners[n - 1](self, n - 1, x, args, kwargs) if n else self.run_base(x, args, kwargs)

    def run_rewrite(self, n: int, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the output with step n, a Rewrite, in three parts.

        `pre`, if it has one, changes the input, in x's dtype. The steps before run on that. `apply_step` changes the
        output by `post`, which sees the original x.
        """
        x, effect = once(x), self.steps[n][1]
        inner = x if effect.pre is None else cast(effect.pre(x), x.dtype)  # type: ignore[attr-defined]
        return self.apply_step(n, x, self.run_steps(n, inner, args, kwargs))

    def run_fold(self, n: int, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the output with step n, by the layer's own function with the folded weight of all steps up to n.

        Other steps' hooks and kernels do not run. On a store that rounds, it is computed again in the backward pass.
        """
        if not self.layer.store.exact:
            return recompute_in_backward(self.layer, self.call_folded, n, x)
        return self.call_folded(n, x)

    def call_folded(self, n: int, x: Tensor) -> Tensor:
        """Return the module's output for x with steps 0 to n folded into weight and bias.

        Each step is folded in its adapter's dtype, and the module runs in the dtype of the last one. The output is cast
        back to the dtype of x (of the weight, if x are ids). If autocast chose the output's dtype, that stays.
        """
        layer, op = self.layer, self.layer.op
        W, b = layer.weight_now, layer.bias_now
        out = W.dtype if op.takes_ids else x.dtype
        for m, effect in self.steps[: n + 1]:
            W, b = fold_effect(layer, m, effect, W.to(m.dtype), None if b is None else b.to(m.dtype))
        y = self.call(x if op.takes_ids else x.to(W.dtype), W, b)
        return y.to(out) if y.dtype == W.dtype else y  # autocast chose another

    def run_added(self, n: int, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the output of the steps before n, plus the part of step n, by `apply_step`, in the output's dtype."""
        x = once(x)
        return self.apply_step(n, x, self.run_steps(n, x, args, kwargs))

    def run_gain(self, n: int, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the output of the steps before n, and step n, an Update with a gain, on it.

        For n = 0 one kernel is tried, which also runs the base layer. It needs that kernels may fuse, the module got x
        alone, and the base does not train in this call. Otherwise, or if no kernel fits, the steps before run first and
        `apply_gain` adds this one.
        """
        layer, f = self.layer, self.steps[n][1].factors()  # type: ignore[attr-defined]
        fuse = n == 0 and layer.may_fuse
        if fuse and not (args or kwargs) and not (torch.is_grad_enabled() and layer.base_trains):
            joined = fused.run_with_factors(layer, f, x)
            if joined is not None:
                return joined
        x = once(x)
        return self.apply_gain(n, f, x, self.run_steps(n, x, args, kwargs), fuse, args, kwargs)

    def apply_gain(
        self, n: int, f: Factors, x: Tensor, y: Tensor, fuse: bool, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor:
        """Return b + gain ⊙ (y - b + ΔW x) in the dtype of y, the output of n steps for x, where b is their bias.

        With active dropout, the n steps run again on the dropped x, with `args` and `kwargs`. Their output and ΔW of
        the dropped x are scaled by the gain, and the difference of y from that output is added unscaled. An op that
        takes ids never has active dropout here. Without it, and if `fuse` and y has the adapter's dtype, a kernel may
        add ΔW x in the memory of y.
        """
        m, gain = self.steps[n][0], self.channels(f.gain)  # type: ignore[arg-type]
        untouched = None
        if f.dropout is None or self.layer.op.takes_ids or find_dropout_rate(f.dropout) == 0:
            added = fused.add_factors(f, x, y) if fuse and y.dtype == m.dtype else None
            z = y + self.low_rank(self.layer, m, f, x) if added is None else added  # rounds once, at the end
        else:
            masked_x = self.apply_dropout(f.dropout, x)
            product = self.run_steps(n, masked_x, args, kwargs)
            untouched = y - product
            z = product + self.low_rank(self.layer, m, f._replace(dropout=None), masked_x)
        out, b = z * gain, self.bias(n)
        if b is not None:
            out = out + self.channels(b) * (1 - gain)
        return cast(out if untouched is None else out + untouched, y.dtype)

    # a layer in pieces (`core/pieces.py`) overrides these

    low_rank = staticmethod(compute_low_rank_part)

    def call(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return the module's own function (`op.call`) of x with another canonical weight and bias.

        No step and no hook runs.

        A process with a piece of the layer overrides it.
        """
        return self.layer.op.call(self.layer.base_layer, x, W, b)

    def channels(self, v: Tensor) -> Tensor:
        """Return a vector over output features in a shape that broadcasts over the output."""
        return self.layer.op.channels(v)

    def apply_dropout(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return x with dropped inputs: by graft's kernel if `find_dropout_rate` knows the rate, else by calling the
        module.
        """
        p = find_dropout_rate(module)
        return module(x) if p is None else dropout(x, p)


def find_step_input(layer: Layer, m: Method, effect: Rewrite, x: Tensor) -> Tensor:
    """Return x; for an effect that is `tapped`, the input that an earlier layer kept for this layer and adapter
    instead. Gradients of that input are summed before they flow on. Raises the error of `input_of_tap` if none was
    kept.
    """
    if not effect.tapped:
        return x
    return once(layer.call.input_of_tap(m.name, layer.site.key))


def sum_first_gradient(args: tuple[object, ...]) -> tuple[object, ...]:
    """Return the positional arguments. If the first is a tensor, all gradients of it are summed before they flow on."""
    if args and isinstance(args[0], Tensor):
        return once(args[0]), *args[1:]
    return args


def check_no_gates(layer: Layer) -> None:
    """Raise RoutingError if the call has gates, as steps of this layer do more than add to its output.

    Without gates does nothing; the steps are not looked at.
    """
    if layer.call.current_gates() is None:
        return
    raise RoutingError(
        f"Adapters of layer '{layer.site.key}' do more than add to its output, so that gates (of a mixture) cannot "
        "weigh them. Leave them out of the mixture, or deactivate them."
    )


class FoldedPlan(LayerPlan):
    """A weight that only its module knows how to use: call the module with the folded weight in place of the parameter.

    A sum of products is not formed: the module gets a lazy tensor, so that of a stack only the matrices in use cost
    anything. If a stack of experts is packed, if the call has gates, or if adapters change it by more than products,
    graft runs the module instead. Then only the matrices in use are formed.
    """

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        """Note how the steps change the opaque weight: `products` has the function of each product effect.

        `routes`: graft can run these experts, and each step has pieces or a product. `adds`: all are additive.
        `forms_delta`: one is no product.
        """
        super().__init__(layer, steps)
        assert isinstance(layer.op, Opaque)
        self.op = layer.op
        self.products = [effect.product for _, effect in self.steps if effect.product is not None]
        self.routes = layer.site.experts is not None and all(
            effect.pieces is not None or effect.product is not None for _, effect in self.steps
        )
        self.adds = all(effect.additive for _, effect in self.steps)
        self.forms_delta = len(self.products) < len(self.steps)

    def run(self, *args: object, **kwargs: object) -> object:
        """Return the module's output with the adapted weight.

        `routes` means that graft can run these experts itself.

        Graft does so if their stack is packed or dispatched to processes, or if the call has gates. It also does so if
        updates must be formed for a plain frozen weight. Else the module runs with another tensor in place of its
        parameter. That is a lazy sum if all steps are products and the weight is plain with two or more dimensions, or
        the folded weight. The parameter is put back afterwards.

        Raises:
            RoutingError: the call has gates, and steps do more than add, or graft cannot run the module.
            UnsupportedLayerError: the stack is packed, and graft cannot run its module with these adapters.
        """
        layer, op = self.layer, self.op
        gated, packed = layer.call.current_gates() is not None, op.packed_shape is not None
        if gated and not (self.routes and self.adds):
            check_no_gates(layer)
        runs = packed or (self.routes and layer.site.experts.dispatch is not None)
        W = None if gated or runs else self.find_plain_weight()
        if self.routes and (gated or runs or (self.forms_delta and W is not None and not W.requires_grad)):
            return layer.site.experts.run_updated(layer, args, kwargs, self.make_stack_updates, None)
        if packed:
            self.raise_packed()
        if self.forms_delta or W is None or W.dim() < 2:
            W = op.uncanon(self.fold_current()[0])
        else:
            factors = (drop_inputs_of_A(product()).matrices() for product in self.products)
            n = len(W) if W.dim() > 2 else None
            W = make_sum(W, [(*(AB if n is None else op.split_matrices(*AB, n)), 1.0) for AB in factors], op.transposed)
        return op.apply(layer.base_layer, args, kwargs, W)

    def raise_packed(self) -> NoReturn:
        """Raise UnsupportedLayerError with the layer and its adapters: no folded weight can replace the codes of a
        packed stack.
        """
        raise UnsupportedLayerError(
            f"The stack of layer '{self.layer.site.key}' is packed, and adapters {[m.name for m, _ in self.steps]} are "
            "not products alone. Deactivate the others, or load the base dequantized."
        )

    def find_plain_weight(self) -> Tensor | None:
        """Return the weight with all merged adapters, if it is a plain tensor and operations run as written; else None.

        Operations do not run as written under a compiler, a tracer or a watching dispatch mode.
        """
        if not eager() or watched():
            return None
        W = self.layer.weight_now
        return W if type(W) in fused.PLAIN else None

    def make_stack_updates(self, tokens: int, group: int | None = None) -> list[StackUpdate]:
        """Return the update of the stack by each step, with its gate for each of `tokens` tokens, if the call has
        gates.

        If a step does more than add, all steps together give one update, without gate. Pieces give a `FormedUpdate`, a
        product a `LowRankUpdate` with A and B per matrix; a step with neither gives none. With `group`, the updates act
        on the tokens of that group of rows alone.
        """
        layer, updates = self.layer, list[StackUpdate]()
        gates = layer.call.current_gates()
        if not self.adds:  # a step changes the result of those before it
            all_pieces = [pieces for _, effect in self.steps if (pieces := pieces_of(layer, effect)) is not None]
            return [FormedUpdate(MatrixUpdate(all_pieces, layer.training), group)]
        for m, effect in self.steps:
            gate = None if gates is None else gates.of_tokens(layer, m.name, tokens)
            if effect.pieces is not None:
                updates.append(FormedUpdate(MatrixUpdate([effect.pieces()], layer.training), group, gate))
            elif effect.product is not None:
                A, B = drop_inputs_of_A(effect.product()).matrices()
                A, B = self.op.split_matrices(A, B, layer.site.shape[0])
                updates.append(LowRankUpdate(A, B, group, gate))
        return updates


class InputOutputPlan(LayerPlan):
    """A module with several inputs; adapters read one of them and add to the output."""

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        """Note the names of the module's arguments, and the function of the first step that has an `input_of`."""
        super().__init__(layer, steps)
        self.names = layer.argument_names  # before a compiler asks
        self.input_of = next(e.input_of for _, e in self.steps if e.input_of is not None)

    def run(self, *args: object, **kwargs: object) -> object:
        """Call the base layer, and return its output with the parts added to its first tensor; weighed, if the call has
        gates.
        """
        output = self.layer.base_layer(*args, **kwargs)
        x, gates = self.read_input(args, kwargs), self.layer.call.current_gates() is not None
        return change_first_output(output, lambda y: self.add_gated(x, y) if gates else self.add(x, y))

    def read_input(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return the tensor that the adapters read: `input_of` of the base layer and its arguments by name.

        Keywords win over positional arguments.
        """
        return self.input_of(self.layer.base_layer, {**dict(zip(self.names, args)), **kwargs})

    def add(self, x: Tensor, y: Tensor, fuse: bool = False) -> Tensor:
        """Return y plus the part of each step, each computed from the sum so far. `fuse` is not used."""
        for m, effect in self.steps:
            y = y + self.part_of(self.layer, m, effect, x, y)
        return y


class BlockPlan(LayerPlan):
    """A module with several inputs; adapters change its first input, its output, or both."""

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        """Note the names of the module's arguments."""
        super().__init__(layer, steps)
        self.names = layer.argument_names  # before a compiler asks

    def run(self, *args: object, **kwargs: object) -> object:
        """Return the module's output for the changed first input, with its first tensor changed by the steps."""
        x, call = self.read_input(args, kwargs)
        inner, inputs = self.apply_pre(x)
        return change_first_output(call(inner), lambda y: self.apply_post(inputs, y))

    def read_input(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[Tensor, Callable[[Tensor], object]]:
        """Return the first input, and a function of one tensor that calls the base layer with it in place of the first
        input.

        The first input is the first positional argument, or the keyword argument with the first argument's name.
        """
        layer, x = self.layer, find_first_input(self.names, args, kwargs)
        if args:
            return x, lambda x: layer.base_layer(x, *args[1:], **kwargs)
        name = self.names[0]
        return x, lambda x: layer.base_layer(**{**kwargs, name: x})

    def apply_pre(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return x after the `pre` of each step that has one, the last step first, each result in x's dtype.

        Also return a list of the inputs that the steps got, in the order of the steps.
        """
        inputs = []
        for _, effect in reversed(self.steps):
            inputs.append(x)
            if effect.pre is not None:  # type: ignore[attr-defined]
                x = effect.pre(x).to(x.dtype)  # type: ignore[attr-defined]
        return x, inputs[::-1]

    def apply_post(self, inputs: list[Tensor], y: Tensor) -> Tensor:
        """Return y, the module's output, after the `post` of each step that has one, the first one first.

        Each gets the input that its step had seen, and y in y's dtype.

        If the call has gates, returns instead y plus the weighed parts of all steps.
        """
        if self.layer.call.current_gates() is not None:
            return self.add_gated(inputs[0], y)  # no step changed the input: gates refuse such steps
        for (m, effect), x in zip(self.steps, inputs):
            if effect.post is not None:  # type: ignore[attr-defined]
                y = effect.post(find_step_input(self.layer, m, effect, x), y).to(y.dtype)  # type: ignore[attr-defined, arg-type]
        return y


class AveragePlan(ChainPlan):
    """A weighted average of adapters: all their parts are computed from one output."""

    only_adds_on_top = True

    def run(self, x: Tensor, *args: object, **kwargs: object) -> object:
        """Return the base layer's output plus the parts of all steps, each computed from that output.

        If the call has gates, each part is weighed by its gate.
        """
        y = self.run_steps(0, x, args, kwargs)
        return self.add_gated(x, y) if self.layer.call.current_gates() is not None else add_all_parts(self, x, y)

    def add(self, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
        """Return y plus the part of each step, each computed from x and y itself, in y's dtype. `fuse` is not used."""
        return add_all_parts(self, x, y)


class AverageBlockPlan(BlockPlan):
    """A weighted average of adapters on a module with several inputs.

    All changes of the input are computed from one input.
    """

    def apply_pre(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return x plus the change (`ahead`) of each Rewrite, in the dtype of x; and x once for each step."""
        inner = x
        for _, effect in self.steps:
            if isinstance(effect, Rewrite) and effect.ahead is not None:
                inner = inner + effect.ahead(x)
        return inner.to(x.dtype), [x] * len(self.steps)

    def apply_post(self, inputs: list[Tensor], y: Tensor) -> Tensor:
        """Return y plus the part of each step, all computed from the first input and from y itself.

        With gates in the call, each part is weighed.
        """
        if self.layer.call.current_gates() is not None:
            return self.add_gated(inputs[0], y)
        return add_all_parts(self, inputs[0], y)


def add_all_parts(plan: LayerPlan, x: Tensor, y: Tensor) -> Tensor:
    """Return y plus the parts of all steps, each computed from y itself, in the dtype of y.

    A Rewrite without `part` adds none.
    """
    out = y
    for m, effect in plan.steps:
        if not isinstance(effect, Rewrite) or effect.part is not None:
            out = out + plan.part_of(plan.layer, m, effect, x, y)
    return out.to(y.dtype)


class ParallelPlan(LayerPlan):
    """Adapters in parallel, each for its own rows, in a call that names no rows: every use raises."""

    def run(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise RoutingError, as the call gives the adapters no rows. The base layer does not run."""
        raise self.make_no_rows_error()

    def make_no_rows_error(self) -> RoutingError:
        """Return the RoutingError for a call without rows, with the active adapters and the layer."""
        return RoutingError(
            f"Adapters {self.layer.state.active} are active in parallel, and layer '{self.layer.site.key}' runs in a "
            "call that gives them no rows. Call the PeftModel itself, or set_adapter() to one of them."
        )

    def fold(self, W: Tensor, b: Tensor | None, drops: bool = False) -> NoReturn:
        """Raise RoutingError, as `run` does: adapters in parallel have no common weight."""
        self.run()


class TappedPlan(LayerPlan):
    """A plan of adapters that keep this layer's input for a later layer of the block, or read that of an earlier one.

    Attributes:
        taps: pairs of an adapter and the path of the layer that will read this layer's input.
        plan: of the other effects on this layer; None if there are none.
    """

    def __init__(self, layer: Layer, steps: Sequence[Step], one_output: bool = False):
        """Split the steps: the readers of `Tap` effects become `taps`, (adapter, reader) pairs; the others are the plan
        in `plan`, None without any. `takes_one_input` is that plan's, else False.

        one_output: all parts are computed from one output (an average).
        """
        self.taps = [(m.name, reader) for m, effect in steps if isinstance(effect, Tap) for reader in effect.readers]
        super().__init__(layer, [step for step in steps if not isinstance(step[1], Tap)])
        self.plan = make_plan(layer, self.steps, one_output) if self.steps else None
        self.takes_one_input = self.plan is not None and self.plan.takes_one_input
        self.names = layer.argument_names  # before a compiler asks

    def run(self, *args: object, **kwargs: object) -> object:
        """Keep the first input for the later layers, run the inner plan or the base layer, and drop inputs kept for
        this layer (`run_tapped`).
        """
        x = find_first_input(self.names, args, kwargs) if self.taps else None
        run = self.layer.base_layer if self.plan is None else self.plan.run
        return run_tapped(self.layer, self.taps, x, partial(run, *args, **kwargs))


def run_tapped(layer: Layer, taps: Iterable[tuple[str, str]], x: Any, run: Callable[[], object]) -> object:
    """Return run(), after x, the input of all rows, was stored in this thread's call for each (adapter, path of a
    layer) in `taps`.

    Afterwards, also on an error, deletes the inputs that were stored for this layer.
    """
    inputs, key = layer.call.thread_state.tapped, layer.site.key
    inputs.update(dict.fromkeys(taps, x))
    try:
        return run()
    finally:
        for tap in [tap for tap in inputs if tap[1] == key]:
            del inputs[tap]


def find_first_input(names: Sequence[str], args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    """Return the first positional argument; without one, the keyword argument with the first of `names`.

    Raises TypeError if that is missing.
    """
    return (args or put_input_first(names, kwargs)[0])[0]


def put_input_first(names: Sequence[str], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) for a call without positional arguments: the keyword argument with the first of `names`
    becomes positional, in a new dict of the others.

    Raises TypeError if that is missing, with Python's text for a missing argument.
    """
    name = names[0]
    if name not in kwargs:
        raise TypeError(f"forward() missing 1 required positional argument: '{name}'")
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def change_first_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a module's output with `change` applied to it, if it is a tensor, or to its first item.

    A mapping, such as a ModelOutput, tuple or list keeps its class and its other items. An output of another type
    fails.
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        first = next(iter(output))
        return type(output)(**{**output, first: change(output[first])})
    items = (change(output[0]), *output[1:])
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


class ReplacementPlan(LayerPlan):
    """An adapter with a module that runs in place of the base layer."""

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        """Note the effect of the first step, which must be a `Replace`, and its `acts_elsewhere`.

        Other steps are ignored.
        """
        super().__init__(layer, steps)
        effect = self.steps[0][1]
        assert isinstance(effect, Replace)
        self.effect, self.acts_elsewhere = effect, effect.acts_elsewhere

    def run(self, *args: object, **kwargs: object) -> object:
        """Return the output of the adapter's module. The base layer does not run.

        Raises:
            RoutingError: the call has gates, unless the effect `acts_elsewhere` (a head).
        """
        if not self.acts_elsewhere:
            check_no_gates(self.layer)
        return self.module(*sum_first_gradient(args), **kwargs)

    @property
    def module(self) -> Any:
        """Return the module that runs in place of the base layer."""
        return self.effect.module()

    def fold_current(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight (canonical) of the adapter's module, and its bias."""
        module = self.module
        return self.layer.op.canon(module.weight), self.bias()

    def bias(self, n: int | None = None) -> Tensor | None:
        """Return the bias of the adapter's module, whatever n is; None if it has none."""
        return getattr(self.module, "bias", None)


def order_steps(layer: Layer, methods: Iterable[Method]) -> list[Step]:
    """Return (method, effect) of each method, the innermost first.

    Methods of a config class that the layer got earlier come first. Within a class, the order of `methods` holds,
    except that an `inward` effect goes before all others of the class, so that the last of several comes first.
    """
    kinds = layer.kinds
    rank = {kind: i for i, kind in enumerate(kinds)}
    by_kind: dict[int, list[Step]] = {}
    for m in methods:
        effect = m.effect
        steps = by_kind.setdefault(rank[m.config], [])
        if effect.inward:
            steps.insert(0, (m, effect))
        else:
            steps.append((m, effect))
    return [step for i in sorted(by_kind) for step in by_kind[i]]


def plan_adapters(layer: Layer, names: Sequence[str], weights: Sequence[float] | None = None) -> LayerPlan | None:
    """Return a new plan for those of `names` that the layer carries; None if it carries none.

    With `weights`, one for each name, it is the plan of their average. If an effect keeps or reads inputs of other
    layers (`Tap`, or a `Rewrite` with `tapped`), it is a TappedPlan. Steps are ordered by `order_steps`.
    """
    methods = [layer.methods[n] for n in names if n in layer.methods]
    if not methods:
        return None
    steps = order_steps(layer, methods)
    if weights is not None:
        steps = weigh_steps(layer, steps, dict(zip(names, weights)))
    if any([isinstance(e, Tap) or (isinstance(e, Rewrite) and e.tapped) for _, e in steps]):
        return TappedPlan(layer, steps, weights is not None)
    return make_plan(layer, steps, weights is not None)


def make_plan(layer: Layer, steps: Sequence[Step], one_output: bool = False) -> LayerPlan:
    """Return a new plan of steps without taps, by the layer's Op and the effects. The first that fits decides:

    - an opaque Op: FoldedPlan;
    - an effect that replaces the layer: ReplacementPlan;
    - an effect with `input_of`: InputOutputPlan;
    - an effect for any module: BlockPlan, or AverageBlockPlan if `one_output`;
    - all effects only add: SumPlan; else AveragePlan if `one_output`, or ChainPlan.

    A layer in pieces replaces these classes by those in `piece.plans`. one_output: all parts are computed from one
    output (an average).
    """
    effects = [effect for _, effect in steps]
    kind: type[LayerPlan]
    if layer.op.opaque:
        kind = FoldedPlan
    elif any(e.whole for e in effects):
        kind = ReplacementPlan
    elif any(e.input_of for e in effects):
        kind = InputOutputPlan
    elif any(e.adapts_any_module for e in effects):
        kind = AverageBlockPlan if one_output else BlockPlan
    else:
        kind = SumPlan if all(e.additive for e in effects) else AveragePlan if one_output else ChainPlan
    if layer.site.piece is not None:
        kind = layer.site.piece.plans.get(kind, kind)
    return kind(layer, steps)
