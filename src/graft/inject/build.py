# SPDX-License-Identifier: Apache-2.0
"""Build the carriers of an adapter, apart from the model, and give them their values; and the size of that, counted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graft.core.call import Call
from graft.core.containers import Transient
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.finite import largest
from graft.core.layer import AdapterLayer, Host, layer_for
from graft.core.merging import lifted
from graft.core.method import Layers, Method, Use, placeholders
from graft.core.ops import META
from graft.core.random import made_on
from graft.core.site import Site
from graft.inject.beside import Head, HeadConfig, ModulesToSaveWrapper, RowsLayer
from graft.inject.parts import Parts
from graft.inject.report import Matched
from graft.inject.stage import agree, check_alone, draw
from graft.inject.survey import site_of
from graft.methods.trainable_tokens import TrainableTokens, TrainableTokensConfig
from graft.storage import hold_bias, place_of
from graft.storage.offload import hooks_of, offloaded_in


def made_early(job: Any) -> float:
    """Count the numbers that `build` makes for good before it asks a checkpoint for values."""
    total = 0.0
    if job.method.shares and job.sites:
        layers = Layers(job.model, list(job.sites.values()), job.cfg, job.shared.containers, job.others)
        total += size(lambda: job.method.share(layers).values())
    early = [job.methods[key] for key in job.sites if Use.READS in job.methods[key].uses_weight()]
    total += sum(size(lambda m=method: placeholders(m, {}).values()) for method in early)  # type: ignore[misc]
    for key, indices in job.tokens.items():
        weight = getattr(job.tree.modules[key], "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            total += len(indices) * weight.shape[1]
    return total


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that code makes, also of those that it drops."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def size(make: Callable[[], Iterable[Any]]) -> float:
    """Count the numbers that `make` needs room for: in what it returns, or in its largest tensor. Run it on meta."""
    try:
        with META, Largest() as largest, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when it is made for good
            return max(sum(numbers(value) for value in make()), largest.numbers)
    except (RuntimeError, OverflowError):  # shapes that no tensor can have
        return math.inf


def numbers(value: Any) -> int:
    if isinstance(value, Transient):
        value = value.tensor
    if isinstance(value, nn.Module):
        return sum(t.numel() for t in (*value.parameters(), *value.buffers()))
    return value.numel() if isinstance(value, Tensor) else 0


def build(job: Any) -> None:
    """Build the carriers of an Injection after its `find`; on an error leave nothing behind."""
    heads = choose_heads(job)
    if job.values is not None:
        job.values.check_room(made_early(job))
    if job.call is None:
        existing = next(iter((*job.tree.layers.values(), *job.tree.wrappers.values())), None)
        job.call = existing.call if existing is not None else Call()
    before = list(job.shared.containers)
    orient(job.cfg, job.sites.values())
    try:
        for module in job.loose:
            bias, release = hold_bias(module)
            job.biases.append(bias)
            job.released.append(release)
        share(job)
        check_alone(job)
        add_layers(job)
        warn_of_offloaded(job)
        add_saved(job, heads)
        add_tokens(job)
        follow(job)
        if job.values is not None:
            put(job.parts, job.adapter, job.values.of(job.parts, job.adapter))
        else:
            join(job.layers.values(), job.adapter)
        agree(job)
        for tied, source in job.ties:
            tied.tie(source)
    except BaseException:
        job.undo(before)
        raise


def put(parts: Parts, adapter: str, values: Any) -> None:
    """Assign values to an adapter's entries; make initial ones for tensors that the checkpoint does not hold.

    An adapter that is merged stays so, with the new values.
    """
    related = [layer for layer in parts.layers.values() if layer.methods[adapter].lenders]
    part(related, adapter)
    with ExitStack() as stack:
        for carrier in (*parts.layers.values(), *parts.wrappers.values()):
            if adapter in carrier.merged_adapters:
                stack.enter_context(lifted(carrier))
        for entry, value in values:
            entry.assign(value)
    for layer in parts.layers.values():
        if layer.site.on_meta or not any([slot.tensor.is_meta for slot in layer.slots(adapter)]):
            continue
        empty = [s for s, t in layer.tensors(adapter, transient=True) if t.is_meta and not hooks_of(s.owner)]
        if not empty:
            continue
        spare, method = layer_for(layer.site, layer.call), layer.methods[adapter]
        shared = {} if parts.shared is None else parts.shared.attached()
        add_adapter(spare, type(method)(layer.site, method.cfg, adapter), shared, on_meta=False, upcast=True)
        made = {(slot.container, slot.path): t for slot, t in spare.tensors(adapter, transient=True)}
        for slot in empty:
            slot.assign(made[slot.container, slot.path], layer.store.where(layer.base_layer)[0])
        spare.rollback()  # the base weight changes by what the layer itself holds
    for layer in parts.layers.values():
        layer.methods[adapter].loaded()
    join(related, adapter, only_equal=True)


def part(layers: Iterable[AdapterLayer], adapter: str) -> None:
    """Give each layer tensors of its own in place of those that it has from others."""
    for layer in layers:
        for slot in layer.slots(adapter):
            if slot.container in layer.methods[adapter].lenders and not slot.tensor.is_meta:
                slot.where[slot.attribute] = nn.Parameter(slot.tensor.detach().clone(), slot.tensor.requires_grad)


def join(layers: Iterable[AdapterLayer], adapter: str, only_equal: bool = False) -> None:
    """Give each layer the tensors that it has from others; with `only_equal`, where it has the same values."""
    apart = []
    for layer in layers:
        for container, lender in layer.methods[adapter].lenders.items():
            own, others = (
                [s for s in held.slots(adapter) if s.container == container] for held in (layer, lender.layer)
            )
            for mine, theirs in zip(own, others):
                a, b = mine.tensor, theirs.tensor
                if not only_equal or a.is_meta or b.is_meta or torch.equal(a, b.to(a.device)):
                    mine.where[mine.attribute] = b
                else:
                    apart.append(f"{layer.key}.{container}")
    if apart:
        warn(
            f"Layers of adapter '{adapter}' share tensors, and the checkpoint has other values for {len(apart)}, "
            f"such as '{apart[0]}', as PEFT trains an adapter that is not a model's first: these stay apart.",
            PeftWarning,
        )


def trainable_from_others(layer: AdapterLayer, adapter: str) -> int:
    """Count the numbers that train in tensors of other layers."""
    borrowed = layer.methods[adapter].lenders
    own = layer.slots(adapter) if borrowed else ()
    return sum(s.tensor.numel() for s in own if s.trains and s.container in borrowed)


def add_adapter(
    layer: Host,
    method: Method,
    shared: dict[str, Any],
    *,
    on_meta: bool,
    upcast: bool,
    default: torch.device | None = None,  # as `made_on` has it
) -> int:
    """Put an adapter on a host, frozen. Return how many of its numbers can train."""
    method.layer = layer  # which has the weight
    where = layer.where
    try:
        if on_meta:
            layer.add(method, placeholders(method, shared))
        else:
            with made_on(where[0], default):
                layer.add(method, method.build(shared))
                method.init()
    except torch.linalg.LinAlgError as e:
        raise torch.linalg.LinAlgError(
            f"Adapter '{method.name}' cannot start from the weight of layer '{layer.site.key}': {e} Look for NaN or "
            "infinite numbers in the base model, or choose a start that decomposes nothing."
        ) from e
    return layer.place(method.name, where, upcast)


def check_starts(layers: Iterable[AdapterLayer], adapter: str) -> None:
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


def share(job: Any) -> None:
    """Make the tensors that all layers share."""
    if not job.method.shares:
        return
    sites: list[Site] = [(job.methods.get(key) or job.remote_sites[key]).site for key in job.order]
    if not sites and job.absent:
        return
    if not sites:
        raise ConfigError(
            f"No layers types compatible with {job.method.__name__} were found: it needs some to size what they share."
        )
    layers = Layers(job.model, sites, job.cfg, job.shared.containers, job.others)
    layers.agree(job.method)
    with ExitStack() as stack:
        reads = any(Use.READS in method.uses_weight() for method in job.methods.values())
        for layer in job.tree.layers.values() if reads else ():
            if layer.merged_adapters:
                stack.enter_context(lifted(layer))
        where = sites[0].store.where(sites[0].module)
        stack.enter_context(made_on(where[0]))
        values = job.method.share(layers)
    method = job.method
    job.report.other_trainable += job.shared.hold(
        job.adapter, values, where, job.upcast, method.files, method.keeps_base_dtype
    )


def add_layers(job: Any) -> None:
    shared, loads, adapter = job.shared.attached(), job.values is not None, job.adapter
    default = torch.get_default_device()
    nothing, started = [], []
    for key in job.order:
        if key in job.remote_sites:
            if not (loads or job.on_meta):
                draw(job.remote_sites[key], shared, job.call)
            continue
        site = job.sites[key]
        layer = job.tree.layers.get(key) or layer_for(site, job.call)
        job.layers[key] = layer
        method = job.methods[key]
        use = method.uses_weight()
        if loads:
            nowhere = Use.AGAIN not in use
        else:
            nowhere = Use.CHANGES not in use if site.on_meta else job.on_meta and Use.READS not in use
        size = add_adapter(layer, method, shared, on_meta=nowhere, upcast=job.upcast, default=default)
        if not nowhere and Use.TAKES in use:
            started.append(layer)
        size -= trainable_from_others(layer, adapter)
        job.report.matched.append(Matched(key, site.type_name, size))
        if layer.scaling_at_start.get(adapter) == 0:
            nothing.append(key)
    check_starts(started, adapter)
    if nothing:
        warn(
            f"Adapter '{adapter}' has a scaling of 0 on {len(nothing)} of {len(job.layers)} layers, such as "
            f"'{nothing[0]}': it does nothing there and cannot train. Give it an alpha or alpha_pattern other than 0.",
            PeftWarning,
        )


def warn_of_offloaded(job: Any) -> None:
    """Warn of biases that are to train, and that accelerate's hooks take from where no optimizer writes to."""
    away = offloaded_in(job.model) if job.values is None and any(b.is_meta for b in job.biases) else {}
    lost = [b for b in job.biases if id(b) in away]
    if lost:
        warn(
            f"Adapter '{job.adapter}' trains biases of the base (bias='{job.cfg.bias}'), and {len(lost)} of them are "
            "offloaded, where they stay as they are: have the model on real devices first, or set bias='none'.",
            PeftWarning,
        )


def add_saved(job: Any, heads: dict[str, nn.Module]) -> None:
    """Give the adapter its heads."""
    for key in job.saved:
        own = heads.get(key)
        if own is None and job.values is not None:
            own = job.values.head(key, job.tree.modules[key])
        size = add_head(job, key, own)
        kind = type(job.wrappers[key].modules_to_save[job.adapter]).__name__
        job.report.modules_to_save.append(Matched(key, kind, size))


def add_head(job: Any, key: str, module: nn.Module | None = None) -> int:
    """Give the adapter a head: a module, or a copy of the base's. Return how many of its numbers train."""
    wrapper = job.tree.wrappers.get(key) or ModulesToSaveWrapper(job.tree.modules[key], key, job.call)
    job.wrappers[key] = wrapper
    return add_adapter(wrapper, Head(wrapper.site, HeadConfig(module), job.adapter), {}, on_meta=False, upcast=False)


def add_tokens(job: Any) -> None:
    """Put layers on the embeddings whose single rows train, and on the heads tied to them."""
    tied_modules, tree, adapter = job.tied_rows, job.tree, job.adapter
    for key in [*(k for k in job.tokens if k not in tied_modules), *tied_modules]:
        layer = tree.wrappers.get(key) or RowsLayer(site_of(key, tree.modules[key], tree), job.call)
        job.wrappers[key] = layer
        indices = job.tokens[tied_modules.get(key, key)]
        method = TrainableTokens(layer.site, TrainableTokensConfig(token_indices=indices), adapter)
        size = add_adapter(layer, method, {}, on_meta=False, upcast=job.upcast)
        if key in tied_modules:
            source = job.wrappers[tied_modules[key]].methods[adapter]
            method.tie(source)
            method.lenders = dict.fromkeys(method.layer_names, source)
        else:
            job.report.modules_to_save.append(Matched(key, f"{len(indices)} tokens", size))


def follow(job: Any) -> None:
    """Adapt the modules tied to the embedding. `build` ties the adapters once they have values."""
    tree, adapter = job.tree, job.adapter
    for key, source in job.tied_modules.items():
        module = tree.modules[key]
        here, there = place_of(module)[0], place_of(tree.modules[source])[0]
        if here != there and not job.method.always_tied:
            raise ConfigError(
                f"Layer '{key}' is on {here}, and '{source}', to which it is tied, on {there}: adapter '{adapter}' "
                "cannot share memory between them. Put both on one device, or leave ensure_weight_tying off."
            )
        if source in job.layers:
            method = job.methods[key]
            layer = tree.layers.get(key) or AdapterLayer(method.site, job.call)
            job.layers[key] = layer
            size = add_adapter(layer, method, job.shared.attached(), on_meta=False, upcast=job.upcast)
            job.report.matched.append(Matched(key, method.site.type_name, 0 if method.always_tied else size))
            job.ties.append((method, job.layers[source].methods[adapter]))
        if source in job.wrappers:
            add_head(job, key)
            job.wrappers[key].methods[adapter].tie(job.wrappers[source].methods[adapter])


def orient(cfg: Any, sites: Iterable[Site]) -> None:
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


def choose_heads(job: Any) -> dict[str, nn.Module]:
    """Return the modules that the caller gave for `modules_to_save`, by full path."""
    chosen: dict[str, nn.Module] = {}
    for name, module in (job.heads or {}).items():
        paths = [key for key in job.saved if key == name or key.endswith(f".{name}")]
        if len(paths) != 1:
            raise ConfigError(
                f"heads['{name}'] must name one of the modules in modules_to_save, which are {job.saved or 'none'}."
            )
        if not isinstance(module, nn.Module):
            raise ConfigError(f"heads['{name}'] must be an nn.Module, got {type(module).__name__}.")
        chosen[paths[0]] = module
    return chosen
