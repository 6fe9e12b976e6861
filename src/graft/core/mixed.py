# SPDX-License-Identifier: Apache-2.0
"""A layer in a batch with rows of different adapters: one plan for each adapter, in training as well.

Rows are grouped by adapter once per call. If all adapters add, the base runs once. Under gradient checkpointing the
rows are set again when the backward pass begins. Two forward passes in one backward pass are refused, and so is
recomputing when no tensor in the model's output told that the backward pass begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase

from graft.core import fused
from graft.core.effect import Factors, factor_matrix
from graft.core.errors import RoutingError
from graft.core.fused import LINEARS
from graft.core.lean import find_dropout_rate
from graft.core.method import Layer, Method, return_unchanged
from graft.core.ops import find_op
from graft.core.plan import (
    BlockPlan,
    FoldedPlan,
    InputOutputPlan,
    LayerPlan,
    ReplacementPlan,
    SumPlan,
    TappedPlan,
    change_first_output,
    check_no_gates,
    find_first_input,
    put_input_first,
    run_tapped,
)
from graft.core.random import AdapterGenerators
from graft.core.rows import CallContext, JointAdapters, Key, Rows, adapters_in
from graft.kernels.eager import autocast_dtype, eager, has_no_hooks
from graft.kernels.experts import StackUpdate
from graft.kernels.low_rank import FUSED_FROM, new_seed
from graft.kernels.mixed import add_groups, can_add_groups
from graft.kernels.segments import LINE, Group, Segment, Stacks, align, group_segments, is_at_line, segments_linear


def group_runs(segments: Sequence[Segment | None]) -> list[slice]:
    """Return slices of segments that run together: neighbours that are not None, and each None separately."""
    runs: list[slice] = []
    for i, segment in enumerate(segments):
        if segment is not None and runs and runs[-1].stop == i and segments[i - 1] is not None:
            runs[-1] = slice(runs[-1].start, i + 1)
        else:
            runs.append(slice(i, i + 1))
    return runs


class BatchGroups(NamedTuple):
    """The segment groups of a batch, and all values that they depend on."""

    stacks: Stacks
    sizes: list[int]
    shape: torch.Size  # shape of one row of the input
    dtype: torch.dtype
    unchanged: FactorSnapshot
    computed: list[tuple[Callable[[], Factors], Factors, Segment]]  # factors that `unchanged` cannot record
    groups: Sequence[Group]


class MixedPlan:
    """The plans of a layer for the rows of a batch.

    keys: one for each group of rows; None for rows without an adapter.
    """

    def __init__(self, layer: Layer, keys: tuple[Key, ...]):
        """Get the layer's plan for each key (None for rows without adapters), and note how a batch can run.

        A `TappedPlan` is replaced by the plan in it, and its taps are collected. The flags: `adds` (all plans add to
        the output), `products` (all are one plain product), `sums` (one has a product), `routes` (all can run experts),
        `is_idle` (no plan), `acts_elsewhere` (a replacement does). `whole_base`: some keys have no plan and the base is
        a childless module of no known type, no norm. No groups are cached yet.
        """
        self.layer, self.keys = layer, keys
        self.plans: dict[Key, LayerPlan | None] = {}
        for key in keys:
            weights = key.weights if isinstance(key, JointAdapters) else None
            self.plans[key] = None if key is None else layer.plan_for(adapters_in(key), weights)
        self.taps: list[tuple[str, str]] = []  # (adapter, path of the later layer) of inputs to keep
        self.tapped = False
        for n, plan in self.plans.items():
            if isinstance(plan, TappedPlan):
                self.taps += plan.taps
                self.plans[n], self.tapped = plan.plan, True
        plans = [plan for plan in self.plans.values() if plan is not None]
        self.input_plan = next((plan for plan in plans if isinstance(plan, InputOutputPlan)), None)
        self.block_plans = {n: plan for n, plan in self.plans.items() if isinstance(plan, BlockPlan)}
        self.adds = all(plan.only_adds_on_top for plan in plans)
        self.products = all(isinstance(p, SumPlan) and p.single and p.product is not None for p in plans)
        self.folded_plans = [(i, plan) for i, n in enumerate(keys) if isinstance(plan := self.plans[n], FoldedPlan)]
        # experts that graft can run itself
        self.routes = all(isinstance(plan, FoldedPlan) and plan.routes for plan in plans)
        self.acts_elsewhere = any(isinstance(plan, ReplacementPlan) and plan.acts_elsewhere for plan in plans)
        self.is_idle = not plans
        self.sums = any(type(p) is SumPlan and p.product is not None for p in plans)
        self.cached_groups: BatchGroups | None = None
        # A norm uses its input several times. Gradients of rows that no adapter changes are summed with those of other
        # uses one by one, as where no adapter acts; a part of the input would sum its own first.
        base = layer.base_module
        op = find_op(base) if self.acts_elsewhere else layer.op
        leaf = not op.known and not [*base.children()] and not isinstance(base, _NormBase)  # a norm may mix rows
        self.whole_base = leaf and len(plans) < len(keys)
        self.has_own_factors: dict[str | None, bool] = {}  # adapter → whether its factors are its own leaf tensors

    def run(self, rows: Rows, *args: object, **kwargs: object) -> object:
        """Return the layer's output for a batch.

        A batch like the last one, with one positional argument and rows in order, uses the groups of that batch at
        once, after `run_alone` if the plan has one key. It does not if the call has gates or adapters tap inputs. If
        adapters tap inputs, the input is kept for them first. Kept inputs are dropped afterwards, also on errors. The
        rest is `run_plans`.
        """
        if self.cached_groups is not None and rows.in_order and len(args) == 1 and not (kwargs or self.tapped):
            x: Any = args[0]
            context = self.layer.call.current_context()
            if context.gates is None and len(x) == rows.batch and self.may_share(x):
                if len(self.keys) == 1 and (y := self.run_alone(x)) is not None:
                    return y
                groups = None if context.stacks is None else self.find_cached_groups(context.stacks, rows, x)
                if groups is not None:
                    return self.run_shared_base(x, groups)
        if not self.tapped:
            return self.run_plans(rows, *args, **kwargs)
        x = None
        if self.taps:
            x = rows.expand_to_batch(find_first_input(self.layer.argument_names, args, kwargs), self.layer.site.key)
        return run_tapped(self.layer, self.taps, x, partial(self.run_plans, rows, *args, **kwargs))

    def run_alone(self, x: Tensor) -> Tensor | None:
        """Return the output for few rows x by the only key's adapter, from `fused.run_with_factors`, as in a call
        without names of rows.

        The bits are the same, and it costs less. The gradients of its factors, which are leaf tensors, go to `grad`,
        not to sinks.

        Return None for `FUSED_FROM` rows or more, if its dropout drops inputs, since that has to draw from the
        adapter's generator, or if no kernel fits. A layer has to decide alike when checkpointing runs it again.
        """
        f = self.plans[self.keys[0]].product()  # type: ignore[union-attr]
        if x.numel() >= FUSED_FROM * x.shape[-1] or (f.dropout is not None and find_dropout_rate(f.dropout) != 0):
            return None
        return fused.run_with_factors(self.layer, f, x)

    def run_plans(self, rows: Rows, *args: Any, **kwargs: Any) -> object:
        """Return the layer's output for a batch, each group of rows with its plan.

        The first case that holds decides:

        - The layer is a stack of dispatched experts, and there are keys: `run_dispatched`.
        - No key has a plan: the base runs alone.
        - Plans fold an opaque weight: graft runs experts with the update of each group, if it can and there are several
          groups or generators. Else all rows must have one plan, which runs, or the base if it is None.
        - Adapters read an input of a module with several: it runs once, and parts are added to its first output.
        - Adapters change the first input or the output of a module with several: `run_block`.
        - One group of rows, and no generators: its plan runs.
        - All adapters only add, without gradients and generators: the base runs once, and parts are added.
        - All else: `run_groups`.

        A single row of ids, on a layer that takes ids, is expanded to the batch.

        Raises:
            RoutingError: gates that cannot weigh the plans, an input that is not one row per sample, an opaque weight
                with several plans.
        """
        layer = self.layer
        if self.keys and layer.site.experts is not None and layer.site.experts.dispatch is not None:
            return self.run_dispatched(rows, args, kwargs)
        if self.is_idle:
            return layer.base_module(*args, **kwargs)
        if self.folded_plans:
            if self.routes and (len(rows.segments) > 1 or layer.call.current_context().draws is not None):
                if not all(plan.adds for _, plan in self.folded_plans):
                    check_no_gates(layer)
                make = partial(make_stack_updates, self.folded_plans)
                return layer.site.experts.run_updated(layer, args, kwargs, make, rows)
            one = self.find_single_plan(rows)
            return layer.base_module(*args, **kwargs) if one is None else one.run(*args, **kwargs)
        if self.input_plan is not None:
            output = layer.base_module(*args, **kwargs)
            with self.hide_idle_adapters(rows):
                x = rows.expand_to_batch(self.input_plan.read_input(args, kwargs), layer.site.key)
            return change_first_output(output, lambda y: self.add(rows.to_device(x.device), x, y))
        if self.block_plans:
            return self.run_block(rows, args, kwargs)
        if not args:
            args, kwargs = put_input_first(layer.argument_names, kwargs)
        x, args = args[0], args[1:]
        x = rows.expand_to_batch(x, layer.site.key, layer.op.takes_ids)
        rows = rows.to_device(x.device)
        context = layer.call.current_context()
        if len(rows.segments) == 1 and context.draws is None:
            return self.run_one(rows.segments[0][0], x, args, kwargs)
        if self.adds and context.draws is None and not torch.is_grad_enabled():
            return self.add(rows, x, layer.store.protect(layer.base_module(x, *args, **kwargs)))
        if not (self.adds or self.acts_elsewhere):
            check_no_gates(layer)
        return self.run_groups(rows, x, context, args, kwargs)

    def run_dispatched(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Return the output of dispatched experts, with all adapters of the layer that have a FoldedPlan: tokens of
        other processes may use those that no row here uses. Each has its number among these, in the order of
        `layer.methods`, as its group.

        Raises:
            RoutingError: the call has generators or a row several adapters; the experts refuse a call with gates.
        """
        layer, context = self.layer, self.layer.call.current_context()
        if context.draws is not None or any(isinstance(key, JointAdapters) for key in rows.groups):
            layer.site.experts.refuse_rows(layer.site.key)
        plans = {name: plan for name in layer.methods if isinstance(plan := layer.plan_for((name,)), FoldedPlan)}
        make = partial(make_stack_updates, [*enumerate(plans.values())])
        return layer.site.experts.run_updated(layer, args, kwargs, make, rows, [*plans])

    def run_groups(
        self, rows: Rows, x: Tensor, context: CallContext, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor:
        """Run each adapter on its rows, with the same bits, also in the backward pass, as in a batch of these rows
        alone.

        Neighbouring adapters that add to the base's output share its call where that gives the same bits (`may_share`;
        without gates and further arguments). If nothing changed since the last batch, its groups are used again. If all
        adapters can share, the new groups are kept for the next batch.

        Other adapters run one after another, each with the facts and the context of its rows. In training, they draw
        from their generators, if the call has some; all share one ticket, drawn at the first use. A childless module of
        no known type, other than a norm, runs once for the whole batch, and rows without adapters get its output.
        Outputs of heads are padded to one width. Returns rows in the batch's order.
        """
        layer = self.layer
        drawing = partial(self.draw_for, device=x.device, draws=context.draws, tickets=[])
        x, stacks = rows.sort_by_adapter(x), context.stacks
        may_share = context.gates is None and not (args or kwargs) and self.may_share(x)
        if may_share and stacks is not None and (groups := self.find_cached_groups(stacks, rows, x)) is not None:
            return rows.restore_order(self.run_shared_base(x, groups))
        segments = self.make_segments(rows, x, drawing) if may_share else None
        if segments is not None and None not in segments:
            groups = group_segments(segments, stacks, x.dtype)  # type: ignore[arg-type]
            if stacks is not None:
                self.cache_groups(stacks, rows, x, segments, groups)  # type: ignore[arg-type]
            return rows.restore_order(self.run_shared_base(x, groups))
        runs = group_runs(segments or [None] * len(rows.sizes))
        run_inputs = x.split([sum(rows.sizes[run]) for run in runs])
        bases = layer.base_module(x, *args, **kwargs).split(rows.sizes) if self.whole_base else ()
        outputs = []
        for run, run_input in zip(runs, run_inputs):
            if bases and self.plans[rows.keys[run.start]] is None:
                outputs.append(bases[run.start])
                continue
            if segments is not None and segments[run.start] is not None:
                outputs.append(self.run_shared_base(run_input, group_segments(segments[run], stacks, x.dtype)))  # type: ignore[arg-type]
                continue
            key, index = rows.segments[run.start]
            with self.narrow_facts(index) if layer.op.known else self.narrow_to_rows(index, key), drawing(key):
                outputs.append(self.run_one(key, align(run_input), args, kwargs))
        outputs = pad_outputs(outputs, layer.site.key) if self.acts_elsewhere else outputs
        return rows.restore_order(torch.cat([align(y) for y in outputs]))

    def may_share(self, x: Tensor) -> bool:
        """Return True if adapters may share the call of the base, as far as the layer and its input decide:

        - Gradients are on, a plan has a product, and the layer is linear and may fuse.
        - The base does not train, and autocast is off on x's device.
        - x begins at a memory line.
        """
        layer = self.layer
        if not (self.sums and layer.may_fuse and torch.is_grad_enabled()) or layer.base_trains or not layer.op.linear:
            return False
        return autocast_dtype(x.device) is None and is_at_line(x)

    def make_segments(
        self, rows: Rows, x: Tensor, drawing: Callable[[Key], AbstractContextManager[object]]
    ) -> list[Segment | None]:
        """Return one segment for each group of rows of x; None for a group that cannot share the base's call.

        Rows without an adapter give a segment without factors. None is for JointAdapters, rows that do not begin at a
        memory line, a plan that is no single product of the adapter's own tensors, and factors that
        `fused.make_segment` refuses. A segment with dropout gets a seed, drawn from the adapter's generator.
        """
        layer = self.layer
        W, tokens, segments = layer.weight_now, x.numel() // (x.shape[-1] * len(x)), []
        starts = accumulate(rows.sizes, initial=0)
        for name, size, start in zip(rows.keys, rows.sizes, starts):
            plan, segment = self.plans[name], None
            if isinstance(name, JointAdapters) or not all(
                start * tokens * n * x.element_size() % LINE == 0 for n in W.shape
            ):
                pass
            elif plan is None:
                segment = Segment(size * tokens, None, None)
            elif self.has_own_factors.get(name, True) and type(plan) is SumPlan and plan.product is not None:
                f = self.find_own_factors(name, plan.product)
                segment = None if f is None else fused.make_segment(W, f, x, size * tokens)
                if segment is not None and segment.p:
                    with drawing(name):
                        segment = segment._replace(seed=new_seed())
            segments.append(segment)
        return segments

    def find_own_factors(self, name: str | None, product: Callable[[], Factors]) -> Factors | None:
        """Return an adapter's factors if A and B are leaf tensors without vectors; else None.

        The first call for a name computes the factors and stores that answer in `has_own_factors`. Then it restores
        torch's generator, as computed factors may draw and will be computed again. Later calls return `product()`
        without a check.
        """
        if name in self.has_own_factors:
            return product()
        before = torch.get_rng_state()
        # without these hooks a checkpointed block would count the tensors saved here
        with saved_tensors_hooks(return_unchanged, return_unchanged):
            f = product()
            self.has_own_factors[name] = (
                f.inner is None and f.outer is None and all(factor_matrix(m).is_leaf for m in (f.A, f.B))
            )
        torch.set_rng_state(before)
        return f if self.has_own_factors[name] else None

    def cache_groups(
        self, stacks: Stacks, rows: Rows, x: Tensor, segments: Sequence[Segment], groups: Sequence[Group]
    ) -> None:
        """Keep the groups and all values that they depend on in `cached_groups`, for the next batch like this one.

        They replace those kept before. They are `stacks`, the sizes of the groups, shape and dtype of a row of x, and
        the factors. With dropout in a segment nothing is kept, and the old groups are dropped.

        Factors that the snapshot can record are compared by it. The others are kept with the function that computes
        them.
        """
        self.cached_groups = None
        if not any(s.p for s in segments):
            plans: list[Any] = [self.plans[name] for name in rows.keys]
            unchanged, computed = FactorSnapshot(), []
            for plan, segment in ((plan, s) for plan, s in zip(plans, segments) if plan is not None):
                f = plan.product()
                if not unchanged.record(plan.steps[0][0], f):
                    computed.append((plan.product, f, segment))
            self.cached_groups = BatchGroups(stacks, rows.sizes, x.shape[1:], x.dtype, unchanged, computed, groups)

    def find_cached_groups(self, stacks: Stacks, rows: Rows, x: Tensor) -> Sequence[Group] | None:
        """Return the groups of the last batch if they are valid for this one, else None.

        They are if `stacks` is the same object, the groups' sizes, the shape of one row and the dtype are equal, and no
        adapter's factors have changed. Factors that the snapshot cannot record are computed again and compared.
        """
        last = self.cached_groups
        if last is None or last.stacks is not stacks or last.sizes != rows.sizes:
            return None
        if last.shape != x.shape[1:] or last.dtype != x.dtype or not last.unchanged.is_unchanged():
            return None
        same = all([fused.is_unchanged(factors(), was, segment) for factors, was, segment in last.computed])
        return last.groups if same else None

    def run_shared_base(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """Return the output for x (rows, …), sorted by group, with one call of the base for all groups.

        If the plan has one key, however many groups there are, `run_alone` is tried first. Its result is returned
        unless it is None.
        """
        layer = self.layer
        if len(self.keys) == 1 and (y := self.run_alone(x)) is not None:
            return y
        return segments_linear(layer.base_layer, layer.op.input_gradient, layer.weight_now, x, groups)

    def find_single_plan(self, rows: Rows) -> LayerPlan | None:
        """Return the plan that all rows use, of a weight that its module uses in its own ways.

        None if no key has a plan, or if the rows use the base model.

        Raises:
            RoutingError: the batch has more than one group of rows, and one has a plan.
        """
        if self.is_idle:
            return None
        if len(rows.segments) > 1:
            site = self.layer.site
            raise RoutingError(
                f"Layer '{site.key}': {self.layer._get_name()} does not support mixed adapter batches yet. "
                "Modules around it use its weight and do not tell the row of each input. Give all rows of a batch one "
                "adapter, or make adapters that leave this layer out."
            )
        return self.plans[rows.segments[0][0]]

    def run_one(self, name: Key, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """Return the output for x by the plan of `name`; by the base module if the plan is None."""
        plan = self.plans[name]
        return self.layer.base_module(x, *args, **kwargs) if plan is None else plan.run(x, *args, **kwargs)

    def run_block(self, rows: Rows, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Run a module with several inputs once, with each adapter's change on its rows before and after it.

        Return its output, with the first tensor changed.

        Before the call, rows of the input are replaced in a copy, only where an adapter changes them. After it, each
        adapter's `post` gets the inputs that its steps had seen. Rows without a plan stay. Both times, an adapter sees
        the facts of its rows, and draws from its generator.

        Raises:
            RoutingError: the first input has not one row per sample.
        """
        x, call = next(iter(self.block_plans.values())).read_input(args, kwargs)
        x = rows.expand_to_batch(x, self.layer.site.key)
        adapted = [
            (n, self.block_plans[n], index)
            for n, index in rows.to_device(x.device).segments
            if self.plans[n] is not None
        ]
        inner, inputs, draws = x, [], self.layer.call.current_context().draws
        for name, plan, index in adapted:
            with self.narrow_facts(index), self.draw_for(name, x.device, draws, []):
                adapter_input, seen = plan.apply_pre(x.index_select(0, index))
            inputs.append(seen)
            if adapter_input is not seen[-1]:
                inner = inner.index_copy(0, index, adapter_input)

        def after(y: Tensor) -> Tensor:
            """Return a copy of y with each adapter's output in the rows of that adapter.

            Facts are those of the rows, draws those of the adapter's generator.
            """
            for (name, plan, index), seen in zip(adapted, inputs):
                with self.narrow_facts(index), self.draw_for(name, x.device, draws, []):
                    adapter_output = plan.apply_post(seen, y.index_select(0, index))
                y = y.index_copy(0, index, adapter_output)
            return y

        return change_first_output(call(inner), after)

    def narrow_facts(self, index: Tensor) -> AbstractContextManager[object]:
        """Return a context where the layer sees gates and facts of the rows at `index` alone."""
        call = self.layer.call
        return call.set_in_block("narrow", call.current_context().narrow(index))

    def draw_for(
        self, key: Key, device: torch.device, draws: AdapterGenerators | None, tickets: list[int]
    ) -> AbstractContextManager[object]:
        """Return a context where the adapter draws from its own generator of `draws` on `device`.

        A no-op for JointAdapters, if the layer is in eval mode, and if `draws` is None. The block must not contain
        calls of other layers.

        tickets: holds the ticket of this run, or nothing; then a new ticket is drawn into it.
        """
        if draws is None or not self.layer.training or isinstance(key, JointAdapters):
            return nullcontext()
        if not tickets:
            tickets.append(draws.ticket())
        return draws.use_generator(key, tickets[0], device)

    def narrow_to_rows(self, index: Tensor, key: Key) -> AbstractContextManager[object]:
        """Return a context where layers within the module see a batch of the rows at `index`, which all use `key`.

        Adapters draw from torch's generator within it.
        """
        call, n = self.layer.call, len(index)
        rows = Rows.from_groups(n, {key: list(range(n))}, index.device)
        return call.set_in_block("narrow", call.current_context().narrow(index)._replace(rows=rows, draws=None))

    def hide_idle_adapters(self, rows: Rows) -> AbstractContextManager[object]:
        """Return a context where rows of adapters without a plan on this layer count as rows of the base model.

        So a part of the model that runs once more for this layer's adapters draws no random numbers for others. A no-op
        if all keys have a plan.
        """
        if None not in self.plans.values():
            return nullcontext()
        groups: dict[Key, list[int]] = {}
        for key, group_rows in rows.groups.items():
            groups.setdefault(None if self.plans[key] is None else key, []).extend(group_rows)
        call, rows = self.layer.call, Rows.from_groups(rows.batch, groups, rows.order.device)
        return call.set_in_block("narrow", call.current_context()._replace(rows=rows))

    def add(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        """Return y, the base's output for x, with each adapter's part added to its rows.

        Rows without an adapter stay.

        Overwrites y if kernels may fuse, or if the layer type is known, has no hooks and runs eagerly. Else it
        overwrites a clone of y, which others may have kept. Uses grouped kernels where all adapters are plain products,
        the call has no gates, and kernels may fuse; if they refuse, the loop runs. In the loop each adapter runs on its
        rows, sees their gates and facts, and draws from its generator; its part is cast to y's dtype.
        """
        layer, context = self.layer, self.layer.call.current_context()
        gates, facts = context.gates, context.facts
        fuse = layer.may_fuse
        if not (fuse or (layer.op.known and eager() and has_no_hooks(layer.base_module))):
            y = y.clone()  # hooks, or a block, may have kept it, or made it a leaf, which takes no addition in place
        if fuse and self.products and gates is None:
            out = self.add_products(rows, x, y)
            if out is not None:
                return out
        for name, index in rows.segments:
            plan = self.plans[name]
            if plan is None:
                continue
            adapter_input, adapter_output = x.index_select(0, index), y.index_select(0, index)
            with self.draw_for(name, x.device, context.draws, []):
                if gates is None and not facts and not self.tapped and self.input_plan is None:
                    adapter_output = plan.add(adapter_input, adapter_output, fuse)
                else:
                    with self.narrow_facts(index) if self.input_plan is None else self.narrow_to_rows(index, name):
                        if gates is None:
                            adapter_output = plan.add(adapter_input, adapter_output, fuse)
                        else:
                            adapter_output = plan.add_gated(adapter_input, adapter_output)
            y.index_copy_(0, index, adapter_output.to(y.dtype))
        return y

    def add_products(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor | None:
        """Return y with all adapters' products added by grouped kernels, in the memory of y.

        Returns None, with y unchanged, if fewer than two groups have adapters, or one group has no plan. Also if
        factors have an `outer`, a dropout that drops now or parts that are no plain matrices, or if the kernels cannot
        take the tensors.
        """
        if rows.adapter_groups is None:
            return None
        names, order, sizes, in_order = rows.adapter_groups
        factors = []
        for name in names:
            plan = self.plans[name]
            if plan is None:
                return None
            f = plan.product()  # type: ignore[attr-defined]
            plain = None if f.outer is not None else fused.plain_factors(f)
            if plain is None or plain[3]:
                return None
            factors.append((*fused.absorb_vectors(plain[0], plain[1], f), plain[2]))
        return add_groups(y, x, factors, order, sizes, in_order) if can_add_groups(factors, sizes) else None


def make_stack_updates(plans: Sequence[tuple[int, FoldedPlan]], tokens: int) -> list[StackUpdate]:
    """Return the updates of a stack by all plans, pairs of the number of a group of rows and its plan, for a batch of
    so many tokens.
    """
    return [update for group, plan in plans for update in plan.make_stack_updates(tokens, group)]


def pad_outputs(outputs: list[Any], key: str) -> list[Tensor]:
    """Return the outputs of heads with -inf appended to the last dimension up to the widest.

    So labels that a row's adapter does not have get no probability. `key` is the layer's path. Raises TypeError if an
    output is no tensor.
    """
    type_name = next((type(part).__name__ for part in outputs if not isinstance(part, Tensor)), None)
    if type_name is not None:
        raise TypeError(
            f"Mixed batches need a tensor from '{key}', which returns a {type_name}. Run one adapter at a time."
        )
    width = max(p.shape[-1] for p in outputs)
    return [nn.functional.pad(p, (0, width - p.shape[-1]), value=float("-inf")) for p in outputs]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # run when a module runs


class FactorSnapshot:
    """Containers of adapters, modules with their tensors, and hooks, as they were when recorded.

    A layer compares them at each batch, so that this is done by few calls for all adapters.
    """

    def __init__(self) -> None:
        """Begin with nothing recorded."""
        self._containers: dict[int, tuple[dict[str, object], dict[str, object]]] = {}  # by id: it, and a copy
        self._dicts: list[dict[str, object]] = []
        self._keys: list[str] = []
        self._values: list[object] = []
        self._hooks: list[Sized] = []
        self._attributes: list[Sized] = []
        self._sizes: list[int] = []

    def is_unchanged(self) -> bool:
        """Return True if the containers have the same entries, recorded entries hold the same objects, modules have as
        many attributes, and no module has a hook.
        """
        return (
            all([now == before for now, before in self._containers.values()])
            and all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
            and not any(self._hooks)
            and list(map(len, self._attributes)) == self._sizes
        )

    def record(self, method: Method, f: Factors) -> bool:
        """Record the objects that the factors of a method consist of, with copies of their containers and their hooks.

        Return True if all could be recorded.

        Returns False, and records nothing, unless A and B are linear modules of plain classes without hooks, and
        dropout drops nothing now. Also A, B, scale and dropout (those that are not None) must be values of the adapter
        in the layer's containers. Of a dropout, its mode and rate are recorded, too.
        """
        parts = [part for part in (f.A, f.B, f.scale, f.dropout) if part is not None]
        places = [place for part in parts for place in find_entries(method, part)]
        if {id(d[key]) for d, key in places} != {id(part) for part in parts}:
            return False
        if f.dropout is not None and find_dropout_rate(f.dropout) != 0:
            return False
        modules = [m for m in (f.A, f.B) if isinstance(m, nn.Linear) and type(m) in LINEARS]
        if len(modules) < 2 or not has_no_hooks(*modules):
            return False
        for d, _ in places:
            self._containers.setdefault(id(d), (d, dict(d)))
        for m in modules if f.dropout is None else (*modules, f.dropout):
            attributes = m.__dict__
            for key in attributes["_parameters"]:
                self._record_entry(attributes["_parameters"], key)
            self._hooks += [hooks for key in HOOKS if (hooks := attributes.get(key)) is not None]
            self._attributes.append(attributes)
            self._sizes.append(len(attributes))
        for key in () if f.dropout is None else ("training", "p"):
            self._record_entry(f.dropout.__dict__, key)
        return True

    def _record_entry(self, d: dict[str, object], key: str) -> None:
        """Record the value of `d[key]`; None if the key is missing."""
        self._dicts.append(d)
        self._keys.append(key)
        self._values.append(d.get(key))


def find_entries(method: Method, part: object) -> list[tuple[dict[str, object], str]]:
    """Return (dictionary, key) of each container of the layer that holds `part` as the value of the method's adapter.

    Only names in `computes_with` are searched, each container that is no dict by its `_modules`; [] if none has the
    same object.
    """
    attributes = method.layer.__dict__
    entries = []
    for name in method.computes_with:
        above = attributes if name in attributes else attributes["_modules"]
        container = above.get(name)
        d = container if isinstance(container, dict) else getattr(container, "_modules", {})
        if d.get(method.name) is part:
            entries.append((d, method.name))
    return entries
