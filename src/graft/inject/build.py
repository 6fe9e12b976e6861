# SPDX-License-Identifier: Apache-2.0
"""Build the carriers of an adapter, apart from the model, and give them their values; and the size of that, counted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graft.core.containers import Transient
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.finite import largest
from graft.core.layer import AdapterLayer, Host, make_adapter_layer
from graft.core.merging import lift_merged
from graft.core.method import AdaptedLayers, Method, Use, build_placeholders
from graft.core.ops import META
from graft.core.random import build_on
from graft.core.shared import SharedTensors
from graft.core.site import Site
from graft.core.wrappers import find_offload_hooks
from graft.inject.beside import Head, ModulesToSaveWrapper, RowsLayer
from graft.inject.job import InjectionJob, Receiver
from graft.inject.parts import AdapterCarriers
from graft.inject.report import Matched
from graft.inject.stage import check_stage_independence, discard_initial_values, synchronize_tensors
from graft.methods.trainable_tokens import TrainableTokens
from graft.storage import find_device_and_dtype, make_bias_parameter
from graft.storage.offload import find_offloaded

if TYPE_CHECKING:
    from graft.config.base import PeftConfig


def count_early_numbers(job: InjectionJob) -> float:
    """Count the numbers that `build` makes for good before it asks a checkpoint for values."""
    total, local_methods = 0.0, job.local_methods.values()
    if job.method.shares and local_methods:
        layers = AdaptedLayers(
            job.model, [m.alone.site for m in local_methods], job.cfg, job.shared.containers, job.others
        )
        total += count_needed_numbers(lambda: job.method.share(layers))
    rows = [m for m in job.beside.values() if isinstance(m, TrainableTokens)]
    early = [*(m for m in local_methods if Use.READS in m.uses_weight()), *rows]
    return total + sum(count_needed_numbers(partial(build_placeholders, method, {})) for method in early)


class LargestTensorMode(TorchDispatchMode):
    """Notes the size of the largest tensor that code makes, also of those that it drops."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.numbers = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def count_needed_numbers(make: Callable[[], Mapping[str, object]]) -> float:
    """Count the numbers that `make` needs room for: in what it returns, or in its largest tensor. Run it on meta."""
    largest = LargestTensorMode()
    try:
        with META, largest, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when it is made for good
            return max(sum(count_value_numbers(value) for value in make().values()), largest.numbers)
    except (RuntimeError, OverflowError):  # shapes that no tensor can have
        return math.inf


def count_value_numbers(value: object) -> int:
    if isinstance(value, Transient):
        value = value.tensor
    if isinstance(value, nn.Module):
        return sum(t.numel() for t in (*value.parameters(), *value.buffers()))
    return value.numel() if isinstance(value, Tensor) else 0


def build_carriers(job: InjectionJob) -> None:
    """Build the carriers of an injection after its `find`; on an error leave nothing behind."""
    values = job.options.values
    if values is not None:
        values.check_room(count_early_numbers(job))
    before = set(job.shared.containers)
    job.takebacks.append(lambda: job.shared.remove_containers(set(job.shared.containers) - before))
    set_fan_in_fan_out(job.cfg, [method.site for method in job.local_methods.values()])
    try:
        for i, bias in enumerate(job.biases):
            if isinstance(bias, nn.Module):
                job.biases[i], release = make_bias_parameter(bias)
                job.takebacks.append(release)
        if job.method.shares:
            make_shared_tensors(job)
        if job.tree.absent:
            trains = [slot.container for slot in job.shared.slots(job.adapter) if slot.trains]
            check_stage_independence(job.method, job.methods, job.order, trains, job.tree.absent, job.adapter)
        add_layers(job)
        if job.biases and values is None:
            warn_of_offloaded_biases(job.biases, job.model, job.adapter, job.cfg.bias)
        if job.beside:
            add_heads_and_rows(job)
        if job.targets.tied:
            adapt_tied_modules(job)
        if values is not None:
            assign_values(job.parts, job.adapter, values.match_entries(job.parts, job.adapter))
        elif related := [layer for layer in job.layers.values() if layer.methods[job.adapter].lenders]:
            share_lent_tensors(related, job.adapter)
        if job.group is not None:
            synchronize_tensors(job.parts, job.adapter, job.group, values is not None)
        for method in job.methods.values():
            if method.source is not None:
                method.tie(method.source)
    except BaseException:
        job.undo()
        raise


def assign_values(parts: AdapterCarriers, adapter: str, values: Iterable[tuple[Receiver, Tensor]]) -> None:
    """Assign values to an adapter's entries; make initial ones for tensors that the checkpoint does not hold.

    An adapter that is merged stays so, with the new values.
    """
    related = [layer for layer in parts.layers.values() if layer.methods[adapter].lenders]
    if related:
        copy_borrowed_tensors(related, adapter)
    parted = [] if parts.shared is None else parts.shared.separate_buffers(adapter)
    with ExitStack() as stack:
        for carrier in (*parts.layers.values(), *parts.wrappers.values()):
            if adapter in carrier.state.merged:
                stack.enter_context(lift_merged(carrier))
        for entry, value in values:
            entry.assign(value)
        SharedTensors.rejoin_buffers(parted)
    for layer in parts.layers.values():
        if layer.site.on_meta or not any([slot.tensor.is_meta for slot in layer.slots(adapter)]):
            continue
        empty = [s for s, t in layer.tensors(adapter, transient=True) if t.is_meta and not find_offload_hooks(s.owner)]
        if not empty:
            continue
        spare, method = make_adapter_layer(layer.site, layer.call), layer.methods[adapter]
        shared = {} if parts.shared is None else parts.shared.wrap_containers()
        add_adapter(spare, type(method)(layer.site, method.cfg, adapter), shared, on_meta=False, upcast=True)
        initial_values = {(slot.container, slot.path): t for slot, t in spare.tensors(adapter, transient=True)}
        for slot in empty:
            slot.assign(initial_values[slot.container, slot.path], layer.where[0])
        spare.rollback()  # the base weight changes by what the layer itself holds
    for layer in parts.layers.values():
        layer.methods[adapter].finish_load()
    if related:
        share_lent_tensors(related, adapter, only_equal=True)


def copy_borrowed_tensors(layers: Iterable[AdapterLayer], adapter: str) -> None:
    """Give each layer its own tensors in place of those that it has from others."""
    for layer in layers:
        for slot in layer.slots(adapter):
            if slot.container in layer.methods[adapter].lenders and not slot.tensor.is_meta:
                slot.where[slot.attribute] = nn.Parameter(slot.tensor.detach().clone(), slot.tensor.requires_grad)


def share_lent_tensors(layers: Iterable[AdapterLayer], adapter: str, only_equal: bool = False) -> None:
    """Give each layer the tensors that it has from others; with `only_equal`, where it has the same values."""
    differing = []
    for layer in layers:
        for container, lender in layer.methods[adapter].lenders.items():
            layer_slots, lender_slots = (
                [s for s in side.slots(adapter) if s.container == container] for side in (layer, lender.layer)
            )
            for slot, lender_slot in zip(layer_slots, lender_slots):
                a, b = slot.tensor, lender_slot.tensor
                if not only_equal or a.is_meta or b.is_meta or torch.equal(a, b.to(a.device)):
                    slot.where[slot.attribute] = b
                else:
                    differing.append(f"{layer.key}.{container}")
    if differing:
        warn(
            f"Layers of adapter '{adapter}' share tensors, and the checkpoint has other values for {len(differing)}, "
            f"such as '{differing[0]}', as PEFT trains an adapter that is not a model's first: these stay apart.",
            PeftWarning,
        )


def add_adapter(
    layer: Host,
    method: Method,
    shared: dict[str, object],
    *,
    on_meta: bool,
    upcast: bool,
    default: torch.device | None = None,  # as `build_on` has it
) -> int:
    """Put an adapter on a host, frozen. Return how many of its numbers can train."""
    method.layer = layer  # which has the weight
    where = layer.where
    try:
        if on_meta:
            layer.add(method, build_placeholders(method, shared))
        else:
            with build_on(where[0], default):
                layer.add(method, method.build(shared))
                method.init()
    except torch.linalg.LinAlgError as e:
        raise torch.linalg.LinAlgError(
            f"Adapter '{method.name}' cannot start from the weight of layer '{layer.site.key}': {e} Look for NaN or "
            "infinite numbers in the base model, or choose a start that decomposes nothing."
        ) from e
    return layer.place(method.name, where, upcast)


def check_initial_values(layers: Iterable[AdapterLayer], adapter: str) -> None:
    """Raise LinAlgError if an adapter that starts from base weights starts with numbers that are not finite.

    Not every decomposition complains of such weights.
    """
    started = [(layer, t) for layer in layers for _, t in layer.tensors(adapter, transient=True)]
    sizes = largest([t for _, t in started])
    broken = list(dict.fromkeys(layer.site.key for (layer, _), x in zip(started, sizes) if not math.isfinite(x)))
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise torch.linalg.LinAlgError(
            f"Adapter '{adapter}' cannot start from the weight of layer '{broken[0]}'{more}: its values would not be "
            "finite. Look for NaN or infinite numbers in the base model, or choose a start that does not read it."
        )


def make_shared_tensors(job: InjectionJob) -> None:
    """Make the tensors that all layers share."""
    sites = [method.alone.site for method in job.order.values()]
    if not sites and job.tree.absent:
        return
    if not sites:
        raise ConfigError(
            f"No layers types compatible with {job.method.__name__} were found: it needs some to size what they share."
        )
    layers = AdaptedLayers(job.model, sites, job.cfg, job.shared.containers, job.others)
    layers.check_agreement(job.method)
    with ExitStack() as stack:
        reads = any(Use.READS in method.uses_weight() for method in job.methods.values())
        for layer in job.tree.layers.values() if reads else ():
            if layer.merged_adapters:
                stack.enter_context(lift_merged(layer))
        where = sites[0].weight.where()
        stack.enter_context(build_on(where[0]))
        values = job.method.share(layers)
    method = job.method
    job.report.other_trainable += job.shared.hold(
        job.adapter, values, where, job.options.upcast, method.files, method.keeps_base_dtype
    )


def add_layers(job: InjectionJob) -> None:
    shared, adapter, call, options = job.shared.wrap_containers(), job.adapter, job.call, job.options
    loads, on_meta = options.values is not None, options.on_meta
    default = torch.get_default_device()
    nothing, started = [], []
    for key, method in job.order.items():
        site = method.site
        if key not in job.methods:
            if not (loads or on_meta):
                discard_initial_values(method, shared, call)
            continue
        layer = job.layers[key] = job.tree.layers.get(key) or make_adapter_layer(site, call)
        use = method.uses_weight()
        if loads:
            nowhere = Use.AGAIN not in use
        else:
            nowhere = Use.CHANGES not in use if site.on_meta else on_meta and Use.READS not in use
        size = add_adapter(layer, method, shared, on_meta=nowhere, upcast=options.upcast, default=default)
        if not nowhere and Use.TAKES in use:
            started.append(layer)
        if method.lenders:  # their tensors count on another layer
            size -= sum(s.tensor.numel() for s in layer.slots(adapter) if s.trains and s.container in method.lenders)
        job.report.matched.append(Matched(key, site.type_name, size))
        if layer.scaling_at_start.get(adapter) == 0:
            nothing.append(key)
    if started:
        check_initial_values(started, adapter)
    if nothing:
        warn(
            f"Adapter '{adapter}' has a scaling of 0 on {len(nothing)} of {len(job.layers)} layers, such as "
            f"'{nothing[0]}': it does nothing there and cannot train. Give it an alpha or alpha_pattern other than 0.",
            PeftWarning,
        )


def warn_of_offloaded_biases(biases: list[Any], model: nn.Module, adapter: str, bias: str) -> None:
    """Warn of biases that are to train, and that accelerate's hooks take from where no optimizer writes to."""
    away = find_offloaded(model) if any(b.is_meta for b in biases) else {}
    lost = [b for b in biases if id(b) in away]
    if lost:
        warn(
            f"Adapter '{adapter}' trains biases of the base (bias='{bias}'), and {len(lost)} of them are "
            "offloaded, where they stay as they are: have the model on real devices first, or set bias='none'.",
            PeftWarning,
        )


def add_heads_and_rows(job: InjectionJob) -> None:
    """Give the adapter its heads, and its rows of embeddings."""
    values = job.options.values
    for key, method in job.beside.items():
        kind = ModulesToSaveWrapper if isinstance(method, Head) else RowsLayer
        host = job.wrappers[key] = job.tree.wrappers.get(key) or kind(method.site, job.call)
        if isinstance(method, Head):
            if method.source is not None:
                check_one_device(method, method.source)
            elif values is not None and method.cfg.module is None:
                method.cfg.module = values.make_head(key, method.site.module)
        add_adapter(host, method, {}, on_meta=False, upcast=job.options.upcast)
        if method.source is not None:
            method.tie(method.source)
    job.report_heads_and_rows()


def check_one_device(method: Method, source: Method) -> None:
    """Raise ConfigError unless a module and the embedding that it is tied to can share an adapter's memory."""
    device, source_device = find_device_and_dtype(method.site.module)[0], find_device_and_dtype(source.site.module)[0]
    if device != source_device:
        raise ConfigError(
            f"Layer '{method.site.key}' is on {device}, and '{source.site.key}', to which it is tied, on "
            f"{source_device}: adapter '{method.name}' cannot share memory between them. Put both on one device, or "
            "leave ensure_weight_tying off."
        )


def adapt_tied_modules(job: InjectionJob) -> None:
    """Adapt the modules tied to the embedding. `build` ties the adapters once they have values."""
    for key, method in job.methods.items():
        source = method.source
        if source is None:
            continue
        if not job.method.always_tied:
            check_one_device(method, source)
        layer = job.layers[key] = job.tree.layers.get(key) or AdapterLayer(method.site, job.call)
        size = add_adapter(layer, method, job.shared.wrap_containers(), on_meta=False, upcast=job.options.upcast)
        job.report.matched.append(Matched(key, method.site.type_name, 0 if method.always_tied else size))


def set_fan_in_fan_out(cfg: PeftConfig, sites: Iterable[Site]) -> None:
    """Set `fan_in_fan_out` as the layer type has it, with a warning if the config differs."""
    if not hasattr(cfg, "fan_in_fan_out"):
        return
    for site in sites:
        if (
            not site.op.known
            or site.op.opaque
            or site.op.takes_ids
            or len(site.shape) != 2
            or cfg.fan_in_fan_out == site.op.transposed
        ):
            continue
        kind = "Conv1D" if site.op.transposed else "torch.nn.Linear"
        warn(
            f"fan_in_fan_out is set to {cfg.fan_in_fan_out} but the target module is `{kind}`. "
            f"Setting fan_in_fan_out to {site.op.transposed}."
        )
        cfg.fan_in_fan_out = site.op.transposed
