# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Hosts: modules that replace a module of the base model and hold its methods. The main one is AdapterLayer.

Rows of a mixed batch run by `core/mixed.py`. Every other call runs the layer's plan (`core/plan.py`), or the base layer
alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from graft.core import merging
from graft.core.call import Call
from graft.core.carrier import Carrier, CarrierState, check_not_merged
from graft.core.errors import ConfigError, PeftWarning, RoutingError, UnsupportedLayerError, warn
from graft.core.folding import WeightChange, compute_change, why_not_in_weight
from graft.core.gate import ForkSafeLock, all_adapters, changes
from graft.core.holding import Holding, Where
from graft.core.lean import init_lean, make_lean
from graft.core.method import Method, WeightUse
from graft.core.mixed import MixedPlan
from graft.core.ops import Op
from graft.core.peft_names import PeftNames
from graft.core.plan import FoldedPlan, LayerPlan, ParallelPlan, check_no_gates, plan_adapters, put_input_first
from graft.core.rows import OFF, Rows
from graft.core.site import Site, Store, Weight
from graft.core.wrappers import HOOK, end_offloading, move_inputs
from graft.kernels.cuts import Cut
from graft.kernels.eager import eager, has_no_hooks
from graft.kernels.withheld import Withheld


class LayerState(CarrierState):
    """The state of a layer: active and merged adapters, and the plans that follow from them."""

    def __init__(self, call: Call) -> None:
        """Begin without active or merged adapters, without plans, and without functions for a rollback (`takebacks` is
        None).
        """
        super().__init__(call)
        self.takebacks: list[Callable[[], None]] | None = None  # functions that undo steps of an injection
        self.plan: LayerPlan | None = None  # the plan that `forward` runs; None: the base layer
        self.plans: dict[tuple[str, ...], LayerPlan | None] = {}  # by the names of their adapters
        self.mixed_plan: MixedPlan | None = None  # the plan of the last mixed batch

    def drop_plans(self, adapter: str) -> None:
        """Drop the cached plans with `adapter` from `plans`, and set `mixed_plan`, the plan of the last mixed batch, to
        None.
        """
        self.plans = {names: plan for names, plan in self.plans.items() if adapter not in names}
        self.mixed_plan = None


SWAP_LOCK = ForkSafeLock()


@make_lean
class Host(Holding, Carrier, nn.Module):
    """A module that replaces a module of the base model, and runs it with the active ones of its methods."""

    op: Op
    call: Call
    state: LayerState

    def __init__(self, site: Site, call: Call):
        """Hold the site's module under `inner_name`, without any adapter. The mode (train or eval) is the module's."""
        init_lean(
            self,
            site=site,
            op=site.op,
            store=site.store,
            call=call,
            state=LayerState(call),
            methods={},
            kinds=[],
            containers=[],
            holders=[],
            attached=set(),
            scaling_at_start={},
            training=site.module.training,
        )
        self._modules[self.inner_name] = site.module

    @property
    def base_module(self) -> nn.Module:  # type: ignore[override]
        """Return the module that this host replaces: its child named `inner_name`."""
        return self._modules[self.inner_name]  # type: ignore[no-any-return]

    @cached_property
    def argument_names(self) -> tuple[str, ...]:
        """Return the names of the arguments of the base module's forward. Read once."""
        return tuple(inspect.signature(self.base_module.forward).parameters)

    remainder = base_module

    @property
    def base_weight(self) -> Weight:
        """Return a Weight of the innermost base module, where hosts of several parameters surround one module.

        Made anew at each call, as `replace_base_layer` may exchange the module.
        """
        module, site = self._modules[self.inner_name], self.site
        while isinstance(module, Host):  # a host of another parameter
            module = module.base_module
        return Weight(module, site.parameter, self.op, self.store, site.shared)

    @property
    def key(self) -> str:  # type: ignore[override]
        """Return the site's path in the model."""
        return self.site.key

    @property
    def adapters(self) -> list[str]:
        """Return the names of the adapters on this module."""
        return list(self.methods)

    def add(self, method: Method, values: dict[str, object]) -> None:
        """Add an adapter: its method, and the values that the method's `build` returned, over those of
        `build_declared`.

        Sets `method.layer`, puts the values into containers and drops plans that name the adapter. A config class that
        is new here is appended to `kinds`. It does not activate it. Methods are only compared where one of the two has
        `checks_compatibility`. If storing the values fails, they are removed again, and the error of `hold` continues.

        Raises:
            ConfigError: the method and one on the layer are incompatible (`why_incompatible`). Nothing has changed
                then.
        """
        for present in self.methods.values():
            if not (method.checks_compatibility or present.checks_compatibility):
                continue
            why = method.why_incompatible(present.cfg) or present.why_incompatible(method.cfg)
            if why is not None:
                raise ConfigError(f"{why}: '{method.name}' next to '{present.name}', on layer '{self.site.key}'.")
        method.layer = self
        try:
            self.hold(method, method.build_declared() | values)
        except BaseException:
            self.drop_values(method.name)
            raise
        self.methods[method.name] = method
        if method.config not in self.kinds:
            self.kinds.append(method.config)
        self.state.drop_plans(method.name)

    def drop(self, adapter: str) -> None:
        """Delete an adapter's method and values, and all cached plans that run it.

        The plan of the last mixed batch is dropped, too. A config class without other adapters leaves `kinds`. A name
        that the layer lacks is no error.

        The active plan stays until refreshed.

        Raises:
            ValueError: the adapter is merged. Nothing is deleted then.
        """
        state, methods = self.state, self.methods
        check_not_merged([adapter], state.merged)
        self.drop_values(adapter)
        methods.pop(adapter, None)
        if not methods or len(self.kinds) > 1:
            used_kinds = {m.config for m in methods.values()}
            self.kinds[:] = [kind for kind in self.kinds if kind in used_kinds]
        state.drop_plans(adapter)

    def refresh_plan(self) -> None:
        """Set the plan that `forward` runs, after a change of active or merged adapters.

        The plan is None (the base module alone) if adapters are disabled, or if any is merged. If adapters in parallel
        are active, one of them here, the plan raises unless the call names rows. Else it is the cached plan of the
        active adapters, or a new one from `plan_for`, with their weights.
        """
        state = self.state
        if state.disabled or state.merged:
            state.plan = None
            return
        names = tuple(state.active)
        if state.apart and any(name in self.methods for name in names):
            state.plan = ParallelPlan(self, ())
        elif state.weights is None and names in state.plans:
            state.plan = state.plans[names]
        else:
            state.plan = self.plan_for(names, state.weights)

    def plan_for(self, names: tuple[str, ...], weights: tuple[float, ...] | None = None) -> LayerPlan | None:
        """Return the plan that runs these adapters; None if the layer carries none of them.

        Plans without `weights` are cached by their names. `weights` are those of an average; without, each adapter acts
        on the output of those before it.
        """
        if weights is not None:
            return plan_adapters(self, names, weights)  # not kept: a caller may have other weights each time
        plans = self.state.plans
        if names not in plans:
            plans[names] = plan_adapters(self, names)  # a head has the attributes that its plan reads
        return plans[names]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the base module with the plan for this call.

        A call with rows runs a mixed plan, or the base module alone if the call disables adapters. Else the active plan
        runs, or the base module alone if there is none. If accelerate dispatched the module, inputs are moved to its
        device and the output back. Then, and on modules of unknown type, offloaded tensors of adapters are loaded for
        good. A plan that takes one input gets it as a positional argument, also if the call named it.
        """
        base, plan, back = self._modules[self.inner_name], self.state.plan, None
        if HOOK in base.__dict__:
            args, kwargs, back = move_inputs(base, args, kwargs)
            self.end_offloading()
        elif not self.op.known and not is_dynamo_compiling():  # a block: hooks are on the modules in it
            self.end_offloading()
        if self.call.open and (rows := self.call.current_rows()) is not None:
            y = base(*args, **kwargs) if rows is OFF else self.find_mixed_plan(rows).run(rows, *args, **kwargs)
        elif plan is None:
            y = base(*args, **kwargs)
        else:
            if not args and plan.takes_one_input:
                args, kwargs = put_input_first(self.argument_names, kwargs)
            y = plan.run(*args, **kwargs)
        return y if back is None else back(y)

    def end_offloading(self) -> None:
        """Load the tensors of the adapters that accelerate offloaded for good, shared ones included; not those of the
        base module.
        """
        for name, module in list(self._modules.items()):  # another thread may add some
            if name != self.inner_name and module is not None:
                end_offloading(module)

    def find_mixed_plan(self, rows: Rows) -> MixedPlan:
        """Return the MixedPlan for the keys of these rows; without keys if adapters are disabled.

        The last one is kept, and returned again for equal keys.
        """
        state = self.state
        keys = () if state.disabled else rows.keys
        mix = state.mixed_plan
        if mix is None or mix.keys != keys:
            mix = state.mixed_plan = MixedPlan(self, keys)
        return mix


class AdapterLayer(PeftNames, Host):
    """The host that runs `base_layer` with the active adapters.

    Containers such as `lora_A` have one entry per adapter, so that names in memory are PEFT's:
    `…q_proj.lora_A.default.weight`, `…q_proj.base_layer.weight`.
    """

    in_features: int
    out_features: int
    fan_in: int
    output_is_new: bool  # adapters may overwrite the base layer's output
    inner_name, claim = "base_layer", "carries"
    cast_input_dtype_enabled: bool = True  # cast the input of an adapter to the adapter's dtype

    def __init__(self, site: Site, call: Call):
        """Hold the site's module as `base_layer`, and store its sizes.

        `output_is_new` is True if the module runs a known forward with a plain weight, so that adapters may overwrite
        its output.
        """
        super().__init__(site, call)
        self.__dict__.update(
            in_features=site.in_features,
            out_features=site.out_features,
            fan_in=site.fan_in,
            output_is_new=site.output_is_new and site.piece is None,
        )

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base layer if its type is opaque or unknown, as modules around it may read it.

        Raises:
            AttributeError: for a layer type that graft knows, for dunder names, and if the base layer has none.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            attributes = self.__dict__
            stands_in = "op" in attributes and (attributes["op"].opaque or not attributes["op"].known)
            if name.startswith("__") or not stands_in or "base_layer" not in attributes["_modules"]:
                raise
            return getattr(attributes["_modules"]["base_layer"], name)  # modules around it may read the module's own

    @property
    def base_layer(self) -> nn.Module:
        """Return the base layer; `nn.Module.__getattr__` finds it as well, but slower."""
        return self._modules["base_layer"]  # type: ignore[no-any-return]

    @property
    def adapter_layer(self) -> AdapterLayer:
        """Return the layer itself: shells around a layer have this attribute, too."""
        return self

    _graft_forward = Host.forward  # graft's own, even if another package replaces `forward`

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ValueError, or a method's error, if those of `names` that the layer carries cannot be active
        together.
        """
        merging.check_together(self, [self.methods[n] for n in names if n in self.methods])

    def end_merge(self, names: list[str]) -> None:
        """Warn and unmerge, if adapters are merged, unless `names` are the active ones in the same order and exactly
        these are merged.
        """
        if self.state.merged and not (names == self.state.active and self.is_exactly_merged(names)):
            warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            self.unmerge()

    def is_exactly_merged(self, names: list[str]) -> bool:
        """Return True if the merged adapters are those of `names` that the layer carries, in this order."""
        return self.state.merged == [n for n in names if n in self.methods]

    @changes(all_adapters)
    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters (`disabled` of the state), and refresh the plan.

        Disabling while adapters are merged unmerges them.

        Waits until no call of the model runs; raises InUseError if that takes too long.
        """
        if not enabled and self.state.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    # the base weight

    @property
    def weight_now(self) -> Tensor:
        """Return the canonical weight, with all merged adapters in it."""
        return self.base_weight.canon()

    @property
    def bias_now(self) -> Tensor | None:
        """Return the bias, with all merged adapters in it; None if the layer has none.

        Returns the parameter itself, or a tensor that the store reads if the bias is in pieces or on the meta device
        (offloaded).
        """
        bias = getattr(self.base_layer, "bias", None)
        cut = self.store.in_parts or self.site.piece is not None
        as_it_is = bias is None or not (cut or bias.is_meta)  # False: in pieces, or offloaded
        return bias if as_it_is else self.store.read(self.base_layer, "bias")

    def write_bias(self, bias: Tensor) -> None:
        """Overwrite the values of the base layer's bias: by the store if each process has a piece, else in place."""
        if self.site.piece is None and not self.store.in_parts:
            self.base_layer.bias.data.copy_(bias)
        else:
            self.store.write(self.base_layer, "bias", bias, False)

    @property
    def W0(self) -> Tensor:
        """Return the canonical weight without any adapter: the present one, or computed from it at each access if a
        merge changed it.
        """
        return self.op.canon(merging.compute_unmerged_weight(self)) if self.state.undo else self.weight_now

    @property
    def local_W0(self) -> tuple[Tensor, Cut | None, Cut | None]:
        """Return this process's piece of `W0`, and the cuts of its rows and columns.

        Returns all of `W0` and None, None if the layer is not cut, or if adapters are merged.
        """
        if self.site.piece is None or self.state.undo:
            return self.W0, None, None
        return self.store.piece(self.base_layer, self.op)  # type: ignore[attr-defined,no-any-return]

    @property
    def b0(self) -> Tensor | None:
        """Return the bias without any adapter; None if the layer has none."""
        return merging.find_unmerged_bias(self)

    def compute_change(self, adapter: str) -> WeightChange:
        """Return ΔW, as factors where the method has them, and Δb of an adapter without others (`compute_change`).

        KeyError for one that the layer lacks.
        """
        return compute_change(self.methods[adapter])

    def why_unmergeable(self, adapter: str) -> str | None:
        """Return why merging cannot write this adapter into the layer, as the end of an error; None if it can.

        KeyError for one that the layer lacks.
        """
        return merging.why_unmergeable(self, [self.methods[adapter]])

    def lift_merged(self) -> AbstractContextManager[None]:
        """Return a context manager: within it the weight has no merged adapters, and afterwards they are
        merged again.
        """
        return merging.lift_merged(self)

    def recompute_values(self, adapter: str, where: Where) -> None:
        """Compute from the present weight the tensors that an adapter's file lacks, for an adapter that was loaded on
        another weight.

        A method that reads the weight before a load is initialised anew, without a change of torch's random state. It
        is then moved to `where` and gets the tensors of the file back. Then, for every method, `finish_load` runs.
        `where`: device and dtype for the adapter.
        """
        m = self.methods[adapter]
        if WeightUse.BEFORE_LOAD in m.uses_weight():
            saved = [(slot, t.clone()) for slot, t in self.tensors(adapter)]
            with torch.random.fork_rng(devices=[]):
                m.init_values()
            self.place_adapter(adapter, where)
            for slot, t in saved:
                slot.tensor.copy_(t)
        m.finish_load()

    @property
    def base_trains(self) -> bool:
        """Return True if the base layer's weight or bias requires gradients. A missing bias does not count.

        A weight or bias that is no registered parameter is read as an attribute; AttributeError without a weight.
        """
        base = self._modules["base_layer"]
        W = base._parameters.get("weight")  # the attribute is slower, and only for a weight that is no parameter now
        b = base._parameters["bias"] if "bias" in base._parameters else getattr(base, "bias", None)
        return (base.weight if W is None else W).requires_grad or (b is not None and b.requires_grad)

    def find_reader_plan(self) -> LayerPlan | None:
        """Return the plan of the adapters that act now, for modules that read the weight; None for the base alone.

        It has no weights of gates.

        In an open call, its routing decides: the base for all rows gives None, rows of one adapter give that adapter's
        plan. Outside of a call or without routing it is the layer's present plan.

        Raises:
            RoutingError: only in an open call: its rows use different adapters; or it has no routing, but gates, which
                cannot weigh the plan.
            UnsupportedLayerError: an adapter of the plan acts where the layer is called, and not through its weight.
        """
        plan = self.state.plan
        if self.call.open:
            rows = self.call.current_rows()
            if rows is OFF:
                return None
            if rows is not None:
                plan = self.find_mixed_plan(rows).find_single_plan(rows)
            else:
                check_no_gates(self)
        for m, _ in () if plan is None else plan.steps:
            if (why := why_not_in_weight(m)) is not None:
                raise UnsupportedLayerError(
                    f"Layer '{self.site.key}' ({self.site.type_name}): {why}. Deactivate adapter '{m.name}', or make "
                    "one that leaves this layer out: exclude_modules."
                )
        return plan

    def effective_weight(self) -> Tensor:
        """Return the weight with the adapters of this call folded in, in the base layer's orientation; gradients flow.

        Without acting adapters, returns the base weight. If rows have different adapters, or gates cannot weigh them,
        returns a tensor that has shape and dtype, and raises RoutingError where an operation uses it. Raises
        UnsupportedLayerError as `find_reader_plan`.
        """
        try:
            plan = self.find_reader_plan()
        except RoutingError as e:
            text = str(e)
            return Withheld(self.base_weight.read(), lambda: RoutingError(text))
        if plan is None:
            return self.base_weight.read()
        return self.op.uncanon(plan.fold(self.weight_now, self.bias_now)[0])

    def rewrite_base(self, W: Tensor) -> None:
        """Overwrite the base weight without adapters by W (canonical).

        Merged adapters are taken out meanwhile and merged again.

        `rollback` restores the weight, until `drop_rollback`. A tied module keeps the former weight. On the meta device
        it only gives a PeftWarning. Waits until no call of the model runs, and brings an offloaded or sharded weight
        in.

        Raises:
            UnsupportedLayerError: the store cannot read or write the weight.
            InUseError: calls of the model do not end in time.
        """
        if self.site.on_meta:
            warn(
                "The initialisation changes base weights that are on the meta device. Load them from a model that was "
                "adapted in the same way, or adapt the model after its weights are loaded.",
                PeftWarning,
            )
            return
        weight = replace(self.base_weight, shared=False)
        why = weight.why_unreadable() or weight.why_unwritable()
        if why is not None:
            raise UnsupportedLayerError(
                f"An adapter cannot be initialised from the weight of layer '{self.site.key}', which it would change: "
                f"{why}. Or choose another initialisation."
            )

        def restore() -> None:
            """Write the values of the snapshot from before into the base weight, which is brought in for that if it is
            offloaded or sharded.
            """
            with weight.bring_in(self, writes=True):
                weight.restore(before)

        rewriting = self.call.gate.change(f"rewriting the weight of layer '{self.key}'")
        with rewriting, merging.lift_merged(self), weight.bring_in(self, writes=True):
            before = weight.snapshot()
            self.on_rollback(restore)
            weight.write(W)

    def replace_base_layer(self, module: nn.Module, op: Op, store: Store) -> None:
        """Replace the base layer by another module with the same values, its Op and its Store, here and in the site.

        Nothing may be merged.

        The site reads its sizes again, and `output_is_new` is set again. Drops all cached plans and the mixed one, and
        plans anew for the active adapters.
        """
        site, self.op, self.store = self.site, op, store
        site.module, site.op, site.store = module, op, store
        site.__post_init__()
        self.output_is_new = site.output_is_new and site.piece is None
        self._modules["base_layer"] = module
        self.state.plans.clear()
        self.state.mixed_plan = None
        self.refresh_plan()

    def on_rollback(self, takeback: Callable[[], None]) -> None:
        """Add a function that `rollback` calls while nothing is merged. `drop_rollback` removes all."""
        self.state.takebacks = [*(self.state.takebacks or ()), takeback]

    def rollback(self) -> None:
        """Take the functions of `on_rollback` out of the state, and call them, the last one first.

        A second call does nothing, also after an error.

        Merged adapters are taken out meanwhile. Without functions does nothing else.
        """
        takebacks, self.state.takebacks = self.state.takebacks, None
        if takebacks:
            with merging.lift_merged(self):
                for takeback in reversed(takebacks):
                    takeback()

    def drop_rollback(self) -> None:
        """Remove the functions of `on_rollback` without calling them: the injection is final."""
        self.state.takebacks = None

    @property
    def may_fuse(self) -> bool:
        """Return True if a kernel may now overwrite the base layer's output, and use its weight without calling the
        module.

        That needs `output_is_new`, eager execution and a base layer without hooks.
        """
        return self.output_is_new and eager() and has_no_hooks(self._modules["base_layer"])

    # merging

    @changes(all_adapters)
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, undoable: bool = True) -> None:
        """Write adapters into the base weight, and run the base layer alone from then on.

        Adapters that are merged already are skipped with a warning, those not on this layer silently. If none is left,
        nothing happens. Also warns if rounding lost a part of the update. Waits until no call of the model runs.

        Args:
            safe_merge: compute the result first and check that it is finite; else check the adapters' own tensors.
            adapter_names: which ones; the active ones if None.
            undoable: keep the data that `unmerge` needs.

        Raises:
            ValueError: a value is not finite, adapters cannot act together, or they are disabled and the merge is
                undoable.
            NotImplementedError: the method, or the way the weight is stored, has no merged form.
            InUseError: calls of the model do not end in time.
        """
        names = [n for n in merging.select_unmerged(self, adapter_names) if n in self.methods]
        if names:
            merging.check_merge(self, names, safe_merge, undoable)
            merging.check_adapters_finite({self: names})
            self.merge_checked(names, undoable)
            merging.warn_lost([self])

    def merge_checked(self, names: list[str], undoable: bool) -> None:
        """Merge adapters that are on this layer and passed the checks of `merge`, and refresh the plan."""
        merging.merge_adapters(self, names, undoable)
        self.refresh_plan()

    @property
    def share_kept(self) -> float:
        """Return the share of the merged update that the base weight holds: 1.0 if nothing was lost to rounding.

        That is <W' - W, ΔW> / <ΔW, ΔW>, in float32. W is the weight before the merge and W' the weight after it, both
        as they are stored (dequantized). ΔW is the update of the adapters. 0.0 means that all of it vanished; rounding
        noise without a direction leaves 1.0. For several merges, both products are sums.
        """
        return merging.measure_shares_kept([self])[0]

    @changes(all_adapters)
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight, and refresh the plan.

        Warns, and does no more, if none is merged.

        Subtracts the updates where that is exact enough, else restores a snapshot. Waits until no call of the model
        runs; raises InUseError if that takes too long.
        """
        if not self.state.merged:
            warn("Already unmerged. Nothing to do.")
            return
        merging.unmerge(self)
        self.refresh_plan()


class ParamWrapper(AdapterLayer):
    """The layer of a parameter that its module uses in ways that graft does not know.

    While the module runs, another tensor replaces the parameter, so threads run such modules one at a time.
    """

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the layer under the lock of all threads. While torch.compile traces, no lock is taken."""
        if is_dynamo_compiling():
            return super()._graft_forward(*args, **kwargs)
        with SWAP_LOCK.lock:
            return super()._graft_forward(*args, **kwargs)

    _graft_forward = forward

    where = property(lambda self: self.base_weight.where())  # the parameter's

    def run_with_delta_weight(self, plan: LayerPlan, *args: object, **kwargs: object) -> object:
        """Run the layer on its weight plus the updates that a replaced `get_delta_weight` returns, for a plan.

        Takes the lock of all threads, except while torch.compile traces.

        Raises:
            UnsupportedLayerError: an adapter of the plan has no delta weight.
        """
        if (why := merging.why_no_delta_weight(self, [m for m, _ in plan.steps])) is not None:
            raise UnsupportedLayerError(f"Layer '{self.site.key}' cannot run: {why}. Put the original back.")
        with nullcontext() if is_dynamo_compiling() else SWAP_LOCK.lock:
            return FoldedPlan(self, merging.use_patched_delta_weight(self, plan.steps)).run(*args, **kwargs)

    def get_param(self) -> nn.Parameter:
        """Return the parameter itself, without adapters that are not merged."""
        return getattr(self.get_base_layer(), self.site.parameter)  # type: ignore[no-any-return]

    @property
    def num_experts(self) -> int:
        """Return the number of matrices of the stack; 1 if the parameter has fewer than three dimensions."""
        return self.site.shape[0] if self.site.is_stack else 1

    @property
    def _did_swap_in_out_features(self) -> bool:
        """Return True for a stack that the module stores as (n, out, in) and not (n, in, out).

        PEFT's name: clients read it, as the shape of square matrices does not tell.
        """
        return self.site.is_stack and not self.op.transposed

    def __getattr__(self, name: str) -> Any:
        """Return the effective weight for the name of the parameter, which modules around this one read; else as
        AdapterLayer.
        """
        site = self.__dict__.get("site")
        if site is not None and name == site.parameter:
            return self.effective_weight()
        return super().__getattr__(name)


def make_adapter_layer(site: Site, call: Call) -> AdapterLayer:
    """Return a new layer for a site: a ParamWrapper if its Op is opaque, else an AdapterLayer."""
    return ParamWrapper(site, call) if site.op.opaque else AdapterLayer(site, call)
