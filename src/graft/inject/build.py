# SPDX-License-Identifier: Apache-2.0
"""The second step of an injection: make the carriers of an adapter, apart from the model, and give them their values.

`count_early_numbers` counts in advance how much memory that takes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graft.config.base import PeftConfig
from graft.core.carrier import SharedTensors
from graft.core.containers import Transient
from graft.core.errors import ConfigError, PeftWarning, UnsupportedLayerError, warn
from graft.core.finite import max_magnitudes
from graft.core.layer import AdapterLayer, Host, make_adapter_layer
from graft.core.merging import lift_merged
from graft.core.method import AdaptedLayers, Method, WeightUse, build_placeholders
from graft.core.ops import META
from graft.core.random import build_on
from graft.core.site import Site
from graft.core.wrappers import find_offload_hooks
from graft.inject.beside import Head, ModulesToSaveWrapper, RowsLayer
from graft.inject.job import InjectionJob, TensorWriter
from graft.inject.parts import AdapterCarriers
from graft.inject.report import Matched
from graft.inject.stage import discard_initial_values, synchronize_tensors
from graft.methods.trainable_tokens import TrainableTokens
from graft.storage.codes import make_bias_parameter
from graft.storage.find import find_device_and_dtype
from graft.storage.offload import find_offloaded


def count_early_numbers(job: InjectionJob) -> float:
    """Return the count of numbers that `build_carriers` allocates before it reads a checkpoint's values.

    These are the tensors that all layers share, of layers that read base weights, and of token rows. Nothing is
    allocated: all is made on the meta device. Returns infinity for shapes that no tensor can have.
    """
    total, local_methods = 0.0, job.local_methods.values()
    if job.method.shares and local_methods:
        sites = [m.matrix_method.site for m in local_methods]
        layers = AdaptedLayers(job.model, sites, job.cfg, job.shared.containers, job.other_configs)
        total += count_needed_numbers(lambda: job.method.share(layers))
    rows = [m for m in job.beside.values() if isinstance(m, TrainableTokens)]
    early = [*(m for m in local_methods if WeightUse.READS in m.uses_weight()), *rows]
    return total + sum(count_needed_numbers(partial(build_placeholders, method, {})) for method in early)


class LargestTensorMode(TorchDispatchMode):
    """A dispatch mode that records the size of the largest tensor made within it, also of temporary ones.

    `numbers` is its count of elements.
    """

    numbers = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run the operation and return its result. If that is one tensor, raises `numbers` to its count of elements."""
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def count_needed_numbers(make: Callable[[], Mapping[str, object]]) -> float:
    """Return the larger of two counts: the numbers in all values that `make` returns, and those of the largest tensor
    that it makes on the way.

    `make` runs on the meta device, and its warnings are dropped. Returns infinity if it raises RuntimeError or
    OverflowError, as torch does for an impossible shape.
    """
    largest = LargestTensorMode()  # type: ignore[no-untyped-call]
    try:
        with META, largest, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real build gives the same warnings
            return max(sum(count_value_numbers(value) for value in make().values()), largest.numbers)
    except (RuntimeError, OverflowError):  # shapes that no tensor can have
        return math.inf


def count_value_numbers(value: object) -> int:
    """Return the count of elements of a tensor, of the tensor in a `Transient`, or of all parameters and buffers of a
    module. Any other value counts as 0.
    """
    if isinstance(value, Transient):
        value = value.tensor
    if isinstance(value, nn.Module):
        return sum(t.numel() for t in (*value.parameters(), *value.buffers()))
    return value.numel() if isinstance(value, Tensor) else 0


def build_carriers(job: InjectionJob) -> None:
    """Make the layers, wrappers and shared tensors of an adapter in `job`, with initial values or those of a
    checkpoint. Call it after `resolve_job`. The model stays as it is, except that packed biases become Parameters.
    Corrects `fan_in_fan_out` in the config, with a warning. Warns if an offloaded bias trains from the start.

    With a team of processes that hold one model together, all of them get equal values, or compare those of a
    checkpoint. Methods of tied modules take the tensors of the embedding's method. After an error the
    caller has to call `job.undo()`. A checkpoint that asks for too much is refused before anything is made.

    Raises:
        CheckpointError: the checkpoint does not fit, or its config asks for far more numbers than it holds.
        UnsupportedLayerError: on a stage of a pipeline the adapter needs tensors of another stage.
    """
    values = job.options.values
    if values is not None:
        values.check_room(count_early_numbers(job))
    before = set(job.shared.containers)
    job.takebacks.append(lambda: job.shared.remove_containers(set(job.shared.containers) - before))
    set_fan_in_fan_out(job.cfg, [method.site for method in job.local_methods.values()])
    for i, bias in enumerate(job.biases):
        if isinstance(bias, nn.Module):
            job.biases[i], release = make_bias_parameter(bias)
            job.takebacks.append(release)
    if job.method.shares:
        make_shared_tensors(job)
    if job.tree.absent:
        check_stage_independence(job)
    add_layers(job)
    if job.biases and values is None:
        warn_of_offloaded_biases(job.biases, job.model, job.adapter, job.cfg.bias)
    if job.beside:
        add_heads_and_rows(job)
    if values is not None:
        match = partial(values.match_entries, job.parts, job.adapter)
        assign_values(job.parts, job.adapter, match() if job.team is None else job.team.run_on_all(match))
    elif related := [layer for layer in job.layers.values() if layer.methods[job.adapter].lenders]:
        share_lent_tensors(related, job.adapter)
    if job.team is not None:
        synchronize_tensors(job.parts, job.adapter, job.team, values is not None)
    for method in job.methods.values():
        if method.source is not None:
            method.tie_to_embedding(method.source)


def assign_values(parts: AdapterCarriers, adapter: str, values: Iterable[tuple[TensorWriter, Tensor]]) -> None:
    """Write `values`, pairs of a writer and its value, into an adapter's tensors.

    First copies tensors that a layer borrows, and separates buffers that layers share. Afterwards the buffers, and lent
    tensors with equal values, are shared again. Where the adapter is merged, it is taken out of the weight for the
    write and merged again with the new values.

    Meta tensors that got no value get the method's initial values, on the layer's device, from a layer made for that.
    Tensors of an offloaded module, and layers planned for the meta device, stay as they are. Calls each method's
    `finish_load`.
    """
    related = [layer for layer in parts.layers.values() if layer.methods[adapter].lenders]
    for layer in related:
        for slot in layer.slots(adapter):
            if slot.container in layer.methods[adapter].lenders and not slot.tensor.is_meta:
                slot.where[slot.attribute] = nn.Parameter(slot.tensor.detach().clone(), slot.tensor.requires_grad)
    parted = [] if parts.shared is None else parts.shared.separate_buffers(adapter)
    with ExitStack() as stack:
        for carrier in (*parts.layers.values(), *parts.wrappers.values()):
            if adapter in carrier.state.merged:
                stack.enter_context(lift_merged(carrier))
        for write, value in values:
            write(value)
        SharedTensors.rejoin_buffers(parted)
    for layer in parts.layers.values():
        if layer.site.on_meta or not any([slot.tensor.is_meta for slot in layer.slots(adapter)]):
            continue
        empty = [s for s, t in layer.tensors(adapter, transient=True) if t.is_meta and not find_offload_hooks(s.owner)]
        if not empty:
            continue
        spare = make_spare_layer(layer, parts, adapter, on_meta=False)
        initial_values = {(slot.container, slot.path): t for slot, t in spare.tensors(adapter, transient=True)}
        for slot in empty:
            slot.assign(initial_values[slot.container, slot.path], layer.where[0])
        spare.rollback()  # the layer's own tensors, not these, change the base weight
    for layer in parts.layers.values():
        layer.methods[adapter].finish_load()
    if related:
        share_lent_tensors(related, adapter, only_equal=True)


def share_lent_tensors(layers: Iterable[AdapterLayer], adapter: str, only_equal: bool = False) -> None:
    """Replace tensors of each layer by those of its lender, in place, for the containers that `lenders` names.

    Args:
        only_equal: keep a layer's tensor if its values differ from the lender's. One warning then names the count and
            the first such layer. Tensors on the meta device are always replaced.
    """
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
            f"Layers of adapter '{adapter}' share tensors, but the checkpoint has different values for "
            f"{len(differing)}, such as '{differing[0]}', as PEFT trains a model's second adapter: these stay apart.",
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
    """Make an adapter's tensors on a host and put them in place, frozen. Return how many of its numbers can train.

    Sets `method.layer` first. The tensors take device and dtype of the base weight.

    Args:
        on_meta: make placeholders on the meta device instead of calling the method's `build` and `init_values`.
        upcast: hold half-precision tensors in float32.
        default: torch's default device, if the caller has read it.

    Raises:
        LinAlgError: a decomposition of the base weight failed. The text names the adapter and the layer.
    """
    method.layer = layer  # `build` and `init_values` read its weight
    where = layer.where
    try:
        if on_meta:
            layer.add(method, build_placeholders(method, shared))
        else:
            with build_on(where[0], default):
                layer.add(method, method.build(shared))
                method.init_values()
    except torch.linalg.LinAlgError as e:
        raise torch.linalg.LinAlgError(
            f"Adapter '{method.name}' cannot start from the weight of layer '{layer.site.key}': {e} Look for NaN or "
            "infinite numbers in the base model, or choose a start that decomposes nothing."
        ) from e
    return layer.place_adapter(method.name, where, upcast)


def make_spare_layer(layer: AdapterLayer, parts: AdapterCarriers, adapter: str, on_meta: bool) -> AdapterLayer:
    """Return a new layer of a layer's site that has its adapter with initial values, or with placeholders `on_meta`.

    Initial values are in float32 if half-precision, placeholders keep the dtype. The layer and the model stay as they
    are, except where the initial values change the base weight, until the new layer's `rollback`.
    """
    spare, method = make_adapter_layer(layer.site, layer.call), layer.methods[adapter]
    shared = {} if parts.shared is None else parts.shared.wrap_containers()
    add_adapter(spare, type(method)(layer.site, method.cfg, adapter), shared, on_meta=on_meta, upcast=not on_meta)
    return spare


def check_initial_values(layers: Iterable[AdapterLayer], adapter: str) -> None:
    """Raise LinAlgError if a tensor of `adapter` on one of the layers holds NaN or an infinite number.

    The text names the first such layer and counts the others. Some decompositions return such values without an error.
    """
    started = [(layer, t) for layer in layers for _, t in layer.tensors(adapter, transient=True)]
    sizes = max_magnitudes([t for _, t in started])
    broken = list(dict.fromkeys(layer.site.key for (layer, _), x in zip(started, sizes) if not math.isfinite(x)))
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise torch.linalg.LinAlgError(
            f"Adapter '{adapter}' cannot start from the weight of layer '{broken[0]}'{more}: its values would not be "
            "finite. Look for NaN or infinite numbers in the base model, or choose a start that does not read it."
        )


def check_stage_independence(job: InjectionJob) -> None:
    """Raise UnsupportedLayerError if the adapter, on a stage of a pipeline, needs tensors of other stages.

    The first cause is named: the method works over all layers, a new adapter begins with values made of all base
    weights, shared tensors train, or a layer here borrows tensors of a remote layer. The text also counts the absent
    modules.
    """
    kind, absent = job.method, job.tree.absent
    why = kind.over_layers or (kind.joins_weights if job.options.values is None else None)
    trains = [slot.container for slot in job.shared.slots(job.adapter) if slot.trains]
    if why is None and trains:
        why = f"trains '{trains[0]}', which all layers share"
    remote = {id(method) for key, method in job.order.items() if key not in job.methods}
    for method in job.methods.values():
        remote_lender = next((s for s in method.lenders.values() if id(s) in remote), None)
        if why is None and remote_lender is not None:
            why = f"uses tensors of layer '{remote_lender.site.key}' in layer '{method.site.key}'"
    if why is not None:
        raise UnsupportedLayerError(
            f"{kind.__name__} {why}, and this model is a stage of a pipeline, which lacks {len(absent)} modules, such "
            f"as '{next(iter(absent))}'. Adapter '{job.adapter}': use a method with "
            "independent layers, such as LORA, or tensor parallelism."
        )


def make_shared_tensors(job: InjectionJob) -> None:
    """Make the tensors that all layers of the adapter share, by the method's `share`, on the device of the first site.

    Put them into `job.shared`, next to those of other adapters. Adds their trainable numbers to the report. If a method
    reads base weights, merged adapters are taken out of all layers meanwhile. On a pipeline stage without sites does
    nothing.

    Raises:
        ConfigError: the adapter has no site at all, or its settings do not agree with those of adapters that share the
            tensors.
    """
    sites = [method.matrix_method.site for method in job.order.values()]
    if not sites and job.tree.absent:
        return
    if not sites:
        raise ConfigError(
            f"No layers types compatible with {job.method.__name__} were found: its shared tensors "
            "need them for their size."
        )
    layers = AdaptedLayers(job.model, sites, job.cfg, job.shared.containers, job.other_configs)
    layers.check_agreement(job.method)
    with ExitStack() as stack:
        reads = any(WeightUse.READS in method.uses_weight() for method in job.methods.values())
        for layer in job.tree.layers.values() if reads else ():
            if layer.merged_adapters:
                stack.enter_context(lift_merged(layer))
        where = sites[0].weight.where()
        stack.enter_context(build_on(where[0]))
        values = job.method.share(layers)
    method, upcast = job.method, job.options.upcast
    count = job.shared.hold(job.adapter, values, where, upcast, method.files, method.keeps_base_dtype)
    job.report.other_trainable += count


def add_layers(job: InjectionJob) -> None:
    """Make a layer with the adapter's tensors for each site in `job.order`, then for each module tied to the embedding.

    Note it in `job.layers` and in the report's `matched`.

    A site that has a layer already gets the adapter on that one; a takeback would remove its new containers. A site of
    another pipeline stage only draws its initial values and drops them, unless values come from a checkpoint or
    `on_meta` is set.

    Tensors are placeholders on the meta device if values of a checkpoint follow, unless the method must run
    `init_values` first. Also if the base weight is on meta, unless `init_values` changes it; or if `on_meta` is set,
    unless `init_values` reads the weight. Those of tied modules are never placeholders; `build_carriers` ties them
    later. Borrowed tensors count on the lender, and those of always tied methods on the source. One warning names
    layers with a scaling of 0.

    Raises:
        ConfigError: a tied module is on another device than its source, and the method is not always tied.
        LinAlgError: initial values computed from base weights are not finite.
    """
    shared, adapter, call, options = job.shared.wrap_containers(), job.adapter, job.call, job.options
    loads, on_meta = options.values is not None, options.on_meta
    default = torch.empty(0).device
    nothing, started = [], []
    tied = {key: method for key, method in job.methods.items() if method.source is not None}
    for key, method in (job.order | tied).items():
        site = method.site
        if key not in job.methods:
            if not (loads or on_meta):
                discard_initial_values(method, shared, call)
            continue
        layer = job.tree.layers.get(key)
        if method.source is not None and not method.always_tied:
            check_one_device(method, method.source)
        if layer is None:
            layer = make_adapter_layer(site, call)
        else:
            job.takebacks.append(partial(layer.close_containers, len(layer.containers)))
        job.layers[key] = layer
        use = method.uses_weight()
        if method.source is not None:
            nowhere = False
        elif loads:
            nowhere = WeightUse.BEFORE_LOAD not in use
        else:
            nowhere = WeightUse.CHANGES not in use if site.on_meta else on_meta and WeightUse.READS not in use
        size = add_adapter(layer, method, shared, on_meta=nowhere, upcast=options.upcast, default=default)
        if not nowhere and WeightUse.TAKES in use:
            started.append(layer)
        if method.lenders:  # borrowed tensors count on the lender
            size -= sum(s.tensor.numel() for s in layer.slots(adapter) if s.trains and s.container in method.lenders)
        elif method.source is not None and method.always_tied:
            size = 0
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
    """Warn (PeftWarning), with their number, if accelerate offloads some of the biases that are to train, since an
    optimizer cannot change those.

    Without biases on the meta device does nothing.
    """
    away = find_offloaded(model) if any(b.is_meta for b in biases) else {}
    lost = [b for b in biases if id(b) in away]
    if lost:
        warn(
            f"Adapter '{adapter}' trains biases of the base (bias='{bias}'), and {len(lost)} of them are "
            "offloaded, where they cannot change. Move the model to real devices first, or set bias='none'.",
            PeftWarning,
        )


def add_heads_and_rows(job: InjectionJob) -> None:
    """Make the adapter's heads and token rows and put them into `job.wrappers`; then count them in the report.

    A host that is there already gets one more method. A head without a module of the caller takes its shape from the
    checkpoint, if there is one. A head or rows tied to an embedding get the tensors of their source.

    Raises:
        ConfigError: a head and its tied embedding are on two devices.
    """
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
            method.tie_to_embedding(method.source)
    job.report_heads_and_rows()


def check_one_device(method: Method, source: Method) -> None:
    """Raise ConfigError if the modules of `method` and of its tied `source` are on different devices."""
    device, source_device = find_device_and_dtype(method.site.module)[0], find_device_and_dtype(source.site.module)[0]
    if device != source_device:
        raise ConfigError(
            f"Layer '{method.site.key}' is on {device}, but it is tied to '{source.site.key}' on "
            f"{source_device}. Adapter '{method.name}': put both on one device, or leave ensure_weight_tying off."
        )


def set_fan_in_fan_out(cfg: PeftConfig, sites: Iterable[Site]) -> None:
    """Set `cfg.fan_in_fan_out` to the value for the layer type of the sites: True for Conv1D, False for Linear.

    Warns for each change. Ignores embeddings, unknown layer types, parameters, and weights that have not two
    dimensions. A config without the field stays as it is.
    """
    if not hasattr(cfg, "fan_in_fan_out"):
        return
    for site in sites:
        is_matrix = site.op.known and not site.op.opaque and not site.op.takes_ids and len(site.shape) == 2
        if not is_matrix or cfg.fan_in_fan_out == site.op.transposed:
            continue
        kind = "Conv1D" if site.op.transposed else "torch.nn.Linear"
        warn(
            f"fan_in_fan_out is set to {cfg.fan_in_fan_out} but the target module is `{kind}`. "
            f"Setting fan_in_fan_out to {site.op.transposed}."
        )
        cfg.fan_in_fan_out = site.op.transposed
