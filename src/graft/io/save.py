# SPDX-License-Identifier: Apache-2.0
"""Saving: from a model with adapters to a dict of tensors."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.config.reading import read_object
from graft.core.base_config import input_embeddings, output_embeddings, text_config
from graft.core.carrier import layer_in
from graft.core.errors import AdapterKeyError, warn
from graft.core.merging import compute_unmerged_weight, find_unmerged_bias
from graft.core.method import WeightUse
from graft.core.wrappers import (
    copy_offloaded,
    find_unsharded_class,
    is_bias,
    strip_all_wrappers,
    strip_outer_wrappers,
    walk_unwrapped,
)
from graft.inject.beside import TrainableTokensWrapper
from graft.inject.match import TargetNames
from graft.inject.parts import AdapterCarriers, ParameterLayerPaths, find_carriers, get_registry, unwrap_model
from graft.inject.stage import find_absent_in_model, find_model_group
from graft.inject.targets import EMBEDDING_NAMES
from graft.io.base import make_file_namer, remove_carrier_names
from graft.io.entries import Entry, list_entries
from graft.io.fingerprint import Fingerprint, digest_base_tensors, list_base_weights, make_fingerprint
from graft.io.rendezvous import check_entries, check_value, find_ranks, gather_tensors
from graft.prompts.base import Prompt
from graft.storage.fsdp2 import find_sharding
from graft.storage.offload import find_offloaded
from graft.storage.parallel import copy_unwrapped, find_parameters_below, has_no_layout, processes, strip_inner_wrappers


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """Return the tensors of one adapter by file key. If tensors are sharded, all processes must call this.

    Args:
        state_dict: take the values from here (gathered by FSDP or DeepSpeed), not from the model.
        unwrap_compiled: has no effect; compiled models are always unwrapped.
        save_embedding_layers: True, False, or "auto": if they are targets, or the vocabulary has another size.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        AdapterKeyError: `state_dict` lacks one of its tensors.
        CheckpointError: a tensor is one process's part, and has to be gathered first.
    """
    carriers = find_carriers(model, adapter_name)
    return collect_adapter_tensors(model, carriers, adapter_name, state_dict, save_embedding_layers)


def collect_adapter_tensors(
    model: nn.Module,
    carriers: tuple[AdapterCarriers, str, nn.Module, Any],
    adapter_name: str,
    state_dict: dict[str, Tensor] | None,
    save_embedding_layers: str | bool,
) -> dict[str, Tensor]:
    """Return the tensors of one adapter by file key, in their form for files.

    Includes trained biases and embeddings of the base. Values come from `state_dict` if it is passed, also under names
    with or without wrappers' parts. Exceptions are buffers that are not persistent, and base tensors that it lacks:
    these come from the model. Sharded tensors are gathered and offloaded ones are read. The model is not changed: a
    prompt with values of `state_dict` is a copy.

    Args:
        carriers: as `find_carriers` returns them.

    Raises:
        AdapterKeyError: `state_dict` lacks one of its tensors.
        CheckpointError: a value has another shape than the tensor.
    """
    (parts, prefix, base, config), state = carriers, state_dict
    if state is not None:  # also by names without the parts of wrappers, unless these are names of other tensors
        clean_names = {strip_all_wrappers(k): v for k, v in state.items()}
        state = clean_names | {strip_outer_wrappers(k): v for k, v in state.items()} | state
    more = {f"{prefix}{n}": t for n, t in collect_base_tensors(base, parts, config, save_embedding_layers).items()}
    if parts.prompt is not None and state is not None:
        parts, state = fill_with_values(parts, parts.prompt, state, adapter_name), None
    elif parts.prompt is not None and (whole_parameters := gather_tensors(find_parameters_below(parts.prompt))):
        parts = replace(parts, prompt=copy_unwrapped(parts.prompt, whole_parameters))
    all_entries = list(list_entries(parts, adapter_name, prefix))
    values = {
        e.file: e.tensor
        if state is None or e.attribute in e.owner._non_persistent_buffers_set
        else get_tensor(state, e.memory, adapter_name)
        for e in all_entries
    }
    values |= {k: t if state is None else state.get(k, state.get(strip_all_wrappers(k), t)) for k, t in more.items()}
    if any([t.is_meta for t in values.values()]):
        away = find_offloaded(model)
        values |= {key: copy_offloaded(*away[id(t)]) for key, t in values.items() if id(t) in away}
    if state is not None or not all([has_no_layout(t) and t.numel() for t in values.values()]):  # a quick test
        values |= gather_tensors(values)
        check_entries(all_entries, values, parts, adapter_name)
    if any([layer.methods[adapter_name].lenders for layer in parts.layers.values()]):
        copy_twins(all_entries, values, adapter_name)
    out = convert_for_file(parts, all_entries, values, adapter_name, config)
    for key, tensor in more.items():
        check_value(key, values[key], tensor, adapter_name)
        out[key.replace(f".modules_to_save.{adapter_name}.", ".modules_to_save.")] = values[key]  # a head's, as in PEFT
    return out


def describe_base(config: PeftConfig, base: nn.Module) -> None:
    """Fill in `base_model_name_or_path` of a config, in place, from the base's `name_or_path`, if it is None; it stays
    None if the base has none.

    Without a task type also set `auto_mapping`, the base's class (without FSDP's wrapper class) and module.
    """
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    if config.task_type is None:
        cls = find_unsharded_class(base)
        config.auto_mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def get_tensor(state: dict[str, Tensor], key: str, adapter: str) -> Tensor:
    """Return the tensor called `key` in a state dict, or called so without the parts of wrappers.

    Raises AdapterKeyError if there is none.
    """
    name = key if key in state else strip_all_wrappers(key)
    if name not in state:
        raise AdapterKeyError(f"The state dict lacks '{key}' of adapter '{adapter}'. Pass the whole state dict.")
    return state[name]


def find_adapter_ranks(model: nn.Module, adapters: list[str], save_embedding_layers: str | bool = "auto") -> list[int]:
    """Return the ranks of the processes that save these adapters together; [] if each process holds all.

    That is the group of processes that compute the model in pieces, such as pipeline stages; else those that share the
    sharded tensors of the adapters. For a prompt all tensors of the base count, too, since the fingerprint reads them.
    On a base that was sharded before its adapters, the group does not count, and of the base's tensors only those in
    files.
    """
    registry = get_registry(unwrap_model(model))
    averager = None if registry is None else registry.averager
    group = find_model_group(model.modules()) if processes() > 1 and averager is None else None
    if group is not None:
        return dist.get_process_group_ranks(group)
    tensors: list[Tensor] = []
    for adapter in adapters:
        parts, _, base, config = find_carriers(model, adapter)
        if averager is not None:
            tensors += list_sharded_base_tensors(base, config, save_embedding_layers)
        elif parts.prompt is not None:  # the fingerprint reads base weights, which may be sharded, too
            tensors += [*find_parameters_below(parts.prompt).values(), *find_parameters_below(base).values()]
        tensors += [slot.tensor for carrier in parts.carriers() for slot in carrier.slots(adapter) if slot.saved]
    return find_ranks(tensors)


def list_sharded_base_tensors(base: nn.Module, config: Any, save_embedding_layers: str | bool) -> list[Tensor]:
    """Return all sharded parameters that FSDP2 manages in `base`, if an adapter's file holds biases or embeddings of
    the base; else [].

    Also [] if FSDP2 has sharded nothing of it. May give the warnings of `will_save_embeddings`.
    """
    in_file = getattr(config, "bias", "none") != "none" or will_save_embeddings(base, config, save_embedding_layers)
    sharding = find_sharding(base.modules()) if in_file else None
    return [] if sharding is None else [p.sharded_param for g in sharding.parameter_groups for p in g.fsdp_params]


def copy_twins(all_entries: list[Entry], values: dict[str, Tensor], adapter: str) -> None:
    """Replace, in `values`, tensors that a layer borrows from an earlier one by copies, since a file has one for each
    layer.
    """
    seen: set[int] = set()
    for e in all_entries:
        if id(e.tensor) in seen and e.layer is not None and e.layer.methods[adapter].lenders:
            values[e.file] = values[e.file].detach().clone()
        seen.add(id(e.tensor))


def convert_for_file(
    parts: AdapterCarriers, all_entries: list[Entry], values: dict[str, Tensor], adapter: str, config: PeftConfig
) -> dict[str, Tensor]:
    """Return the tensors of an adapter in a file, by file key.

    `to_file_tensors` of a layer's method converts them, unless the method stores them unchanged. It may add tensors or
    leave some out; an added one gets its key from the layer's stem, container and path. Entries without a layer stay as
    they are.
    """
    out: dict[str, Tensor] = {}
    for layer, group in groupby(all_entries, attrgetter("layer")):
        method = None if layer is None else layer.methods[adapter]
        if method is None or method.is_stored_unchanged:
            for e in group:
                out[e.file] = values[e.file]
            continue
        layer_entries = list(group)
        places = {(e.container, e.path): e.file for e in layer_entries}
        file_tensors = method.to_file_tensors({place: values[file] for place, file in places.items()}, config)
        stem = layer_entries[0].stem.removesuffix(layer_entries[0].container)
        out |= {places.get(p) or f"{stem}{p[0]}" + (f".{p[1]}" if p[1] else ""): t for p, t in file_tensors.items()}
    return out


def fill_with_values(parts: AdapterCarriers, prompt: Prompt, state: dict[str, Tensor], adapter: str) -> AdapterCarriers:
    """Return a copy of `parts`, with a prompt and deep-copied modules to save that hold the values of `state`.

    Only tensors of `adapter` are filled. Layers are shared with `parts`; the model does not change.

    Raises:
        AdapterKeyError: `state` lacks one of them.
        CheckpointError: one has another shape.
    """
    stem = f"{prompt.prefix}.{adapter}"
    values = {n: get_checked_tensor(state, f"{stem}.{n}", t, adapter) for n, t in find_parameters_below(prompt).items()}
    filled = replace(parts, wrappers=copy.deepcopy(parts.wrappers), prompt=copy_unwrapped(prompt, values))
    for key, wrapper in filled.wrappers.items():
        for name, tensor in wrapper.state_dict(keep_vars=True).items():
            if f".{adapter}." in f".{name}.":
                tensor.data = get_checked_tensor(state, f"{filled.prefix}{key}.{name}", tensor, adapter).detach()
    return filled


def get_checked_tensor(state: dict[str, Tensor], key: str, tensor: Tensor, adapter: str) -> Tensor:
    """Return the tensor called `key` in a state dict, or called so without the parts of wrappers.

    Raises AdapterKeyError if it is missing, CheckpointError if its shape is not that of `tensor`.
    """
    value = get_tensor(state, key, adapter)
    check_value(key, value, tensor, adapter)
    return value


def collect_base_tensors(
    base: nn.Module, parts: AdapterCarriers, config: PeftConfig, save_embedding_layers: str | bool
) -> dict[str, Tensor]:
    """Return the base model's tensors in an adapter's file: trained biases and changed embeddings.

    With `bias="all"` these are all biases of the base except adapters' own; with another kind except "none" those of
    the adapted layers. Biases of merged layers come without the adapters. Embeddings are those of `collect_embeddings`,
    with its warnings.
    """
    out: dict[str, Tensor] = {}
    bias = getattr(config, "bias", "none")
    if bias == "all":
        in_file, is_added = make_file_namer(parts), make_adapter_name_test(parts)
        biases = {name: p for name, p in find_parameters_below(base).items() if is_bias(name) and not is_added(name)}
        out |= {in_file(name): p for name, p in biases.items()}
        out |= {name: b for name, b in _collect_biases(parts).items() if name in out}
    elif bias != "none":
        out |= _collect_biases(parts)
    return out | collect_embeddings(base, config, save_embedding_layers)


def _collect_biases(parts: AdapterCarriers) -> dict[str, Tensor]:
    """Return the biases of the adapted layers by their names in a file, with nothing merged.

    Opaque layers and layers without bias are left out.
    """
    in_file = make_file_namer(parts)
    layers = {strip_inner_wrappers(key): layer for key, layer in parts.layers.items() if not layer.op.opaque}
    biases = {in_file(f"{key}.bias"): find_unmerged_bias(layer) for key, layer in layers.items()}
    return {name: b for name, b in biases.items() if b is not None}


def make_adapter_name_test(parts: AdapterCarriers) -> Callable[[str], bool]:
    """Return a function that tests whether a name is that of a tensor in an adapter layer, of any adapter on the model,
    but not in its `base_layer`.
    """
    layers = parts.layers if parts.all_layers is None else parts.all_layers
    nests = ParameterLayerPaths(layers.values())
    keys = [strip_inner_wrappers(nests.path(key, layer)) for key, layer in layers.items()]
    return lambda name: any(name.startswith(f"{k}.") and not name.startswith(f"{k}.base_layer.") for k in keys)


def target_embeddings(base: nn.Module, config: object) -> bool:
    """Return True if `target_modules` of a config names embeddings of the base: "embed_tokens" or "lm_head".

    "all-linear" and no targets give False. Another text is a pattern, tried on the paths of modules that end so. In a
    collection one of the two names must stand exactly.
    """
    targets: Any = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != "all-linear":
        named = TargetNames(targets)
        return any(k.endswith(EMBEDDING_NAMES) and bool(named.find(k)) for k, _ in base.named_modules())
    return not isinstance(targets, str) and any(name in (targets or ()) for name in EMBEDDING_NAMES)


def will_save_embeddings(base: nn.Module, config: object, save: str | bool) -> bool:
    """Return whether an adapter's file holds the base's embeddings: `save` as a bool, unless it is "auto".

    With "auto" it does, with a warning, if `target_modules` names them while `trainable_token_indices` and
    `token_indices` are None, or if the vocabulary was resized. The latter is decided from the base's original config in
    a local folder or the hub's cache; without one it is False.
    """
    if save != "auto":
        return bool(save)
    tokens = any(getattr(config, f, None) is not None for f in ("trainable_token_indices", "token_indices"))
    if target_embeddings(base, config) and not tokens:
        warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.")
        return True
    origin: Any = getattr(config, "base_model_name_or_path", None) or base.__dict__.get("name_or_path")
    return bool(origin) and is_vocabulary_resized(base, origin)


def collect_embeddings(base: nn.Module, config: object, save: str | bool) -> dict[str, Tensor]:
    """Return the base's input and output embeddings by their names, with nothing merged; {} if they are not to be
    saved.

    If `target_modules` names embeddings, only those with adapter layers are saved. An adapted one has `.base_layer` in
    its names, and so has one with trainable token rows. A module with several names is saved under the first. A merged
    weight is computed without its adapters, unless it cannot be read. `will_save_embeddings` decides first, and warns.
    Then a base without the function `get_input_embeddings` gives {} with a warning.
    """
    targeted, save = target_embeddings(base, config), will_save_embeddings(base, config, save)
    if not save:
        return {}
    if not hasattr(base, "get_input_embeddings"):
        warn("Could not identify embedding layer(s) because the model is not a 🤗 transformers model.")
        return {}
    layers = [m for m in (input_embeddings(base), output_embeddings(base)) if m is not None]
    out: dict[str, Tensor] = {}
    seen = set()  # one module may have several names
    for key, module in walk_unwrapped(base):
        if module in seen:
            continue
        seen.add(module)
        if layer_in(module) is module:
            if any(module is m or module.base_layer is m for m in layers):
                out |= {f"{key}.base_layer.{n}": p for n, p in find_parameters_below(module.base_layer).items()}
                if module.base_weight.why_unreadable() is None:
                    out[f"{key}.base_layer.weight"] = compute_unmerged_weight(module)
        elif not targeted and any(module is m for m in layers):
            rows = module.inner_host if isinstance(module, TrainableTokensWrapper) else None
            stem, table = (key, module) if rows is None else (f"{key}.{module.inner_name}.base_layer", rows.base_layer)
            out |= {f"{stem}.{n}": p for n, p in find_parameters_below(table).items()}
            if rows is not None and rows.base_weight.why_unreadable() is None:
                out[f"{stem}.weight"] = compute_unmerged_weight(rows)
    return out


def is_vocabulary_resized(base: nn.Module, origin: str) -> bool:
    """Return True, with a warning, if the base's vocabulary has another size than the config at `origin`.

    That config is read from a local folder or the hub's cache (at the `_commit_hash` of the base's config), never from
    the network. False if there is none, or one of the sizes is not known. The size is `vocab_size` of the config or of
    its text_config.
    """
    base_config: Any = getattr(base, "config", None)
    size = getattr(text_config(base), "vocab_size", None)
    path = None if size is None else find_local_config(origin, getattr(base_config, "_commit_hash", None))
    if path is None:
        return False
    facts = read_object(path, finite=False)
    before = facts.get("vocab_size", (facts.get("text_config") or {}).get("vocab_size"))
    if before is None or before == size:
        return False
    warn("Setting `save_embedding_layers` to `True`: the vocabulary has another size than the base model's had.")
    return True


def find_local_config(origin: str, revision: str | None) -> str | None:
    """Return the path of a model's config.json in the folder `origin`, else in the hub's cache at `revision`; None if
    it is in neither.

    The network is not used. A name that cannot be a repository gives None.
    """
    path = os.path.join(origin, "config.json")
    if os.path.isfile(path):
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached_path = try_to_load_from_cache(origin, "config.json", revision=revision)
    except HFValidationError:  # a path that no longer exists
        return None
    return cached_path if isinstance(cached_path, str) else None


def fingerprint_base(model: nn.Module, adapter: str, full: bool = False, together: bool = False) -> Fingerprint:
    """Return the fingerprint of an adapter's base, with the sample that a sharded model's registry has noted for it, if
    any.

    Args:
        full: with digests of all tensors that the adapter leaves alone.
        together: all processes call this, so that sharded values can be read.
    """
    parts, _, base, config = find_carriers(model, adapter)
    registry = get_registry(unwrap_model(model))
    sample = None if registry is None else registry.samples.get(adapter)
    return fingerprint_carriers(parts, base, adapter, config, full, together, sample)


def fingerprint_carriers(
    parts: AdapterCarriers,
    base: nn.Module,
    adapter: str,
    config: Any,
    full: bool,
    together: bool,
    sample: dict[str, list[float]] | None = None,
) -> Fingerprint:
    """Return the fingerprint of the base of these carriers, with the values in `sample` if it is passed.

    It has no values if the adapter changes base weights, even with `sample`. On a pipeline stage it names all weights.
    With `full` it has digests of the base's tensors, except those that the adapter trains or changes.

    Args:
        together: all processes call this, so that sharded weights can be read.
    """
    changes = changes_base(parts, adapter)
    stage = processes() > 1 and bool(find_absent_in_model(base))
    note = make_fingerprint(list_base_weights(parts, base), not changes and sample is None, together, part=stage)
    if sample is not None and not changes:
        note["sample"] = sample
    if full:
        trained_names = set(collect_base_tensors(base, parts, config, False))
        trained_names |= {f"{key}.{layer.site.parameter}" for key, layer in parts.layers.items()} if changes else set()
        note["full"] = digest_base_tensors(base, without={remove_carrier_names(name) for name in trained_names})
    return note


def changes_base(parts: AdapterCarriers, adapter: str) -> bool:
    """Return True if the adapter's method changes the base weight (`WeightUse.CHANGES`) on one of its layers."""
    methods = [layer.methods.get(adapter) for layer in parts.layers.values()]
    return any(m is not None and WeightUse.CHANGES in m.uses_weight() for m in methods)
