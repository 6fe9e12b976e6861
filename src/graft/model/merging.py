# SPDX-License-Identifier: Apache-2.0
"""Merges of the adapters of all layers, all or nothing; and the removal of adapter layers from a model.

First come the checks: each layer can merge, and the adapters' tensors are finite. Then each layer's weight is written
(`core/merging.py`), with the layer in eval mode, so that nothing random is merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set

import torch
from torch import nn

from graft.core import merging
from graft.core.base_config import count_tokens, input_embeddings, output_embeddings, text_config
from graft.core.carrier import carrier_of
from graft.core.errors import warn
from graft.core.layer import AdapterLayer
from graft.inject.parts import check_no_foreign_adapters, get_registry, unwrap_model
from graft.inject.survey import is_block, list_nested_layers, survey_model
from graft.storage.codes import release_packed
from graft.storage.find import innermost


def unique_names(names: Iterable[list[str]]) -> list[str]:
    """Return all names in the lists, each once, in order."""
    return list(dict.fromkeys(name for some in names for name in some))


def merge_layers(
    layers: list[AdapterLayer], choice: list[str] | None, safe_merge: bool, undoable: bool, progress: bool
) -> Mapping[str, float] | None:
    """Write adapters into the base weights of layers, all or nothing, and return {key of the layer: share of the update
    that its weight holds}.

    Adapters that are merged already are left out, with a warning; return None if none is left. Active adapters that
    stay unmerged warn, too: on the merged layers, with `undoable=False` on all. So does a layer that holds less than 90
    % of its update. The result has all layers with a merged adapter. Before any write each layer is checked, and all
    adapters must be finite.

    Layers with a `merge` or `get_delta_weight` that a client replaced are merged by that, first. On an error every
    layer that has changed is merged as before. With `undoable=False` this holds only for the replaced ones: graft's own
    merges come last, and were checked.

    Args:
        choice: names of adapters; a layer without one of them skips it. None: those active on each layer.
        safe_merge: compute each merged weight and check that it is finite, before one is written.
        undoable: keep the data to unmerge.
        progress: show a progress bar.

    Raises:
        ValueError: values are not finite, or adapters are disabled.
        NotImplementedError: some layer cannot hold them merged.
    """
    from tqdm import tqdm

    done = unique_names(layer.state.merged for layer in layers)
    active = {layer: [n for n in layer.active_adapters if n in layer.methods] for layer in layers}
    wanted = active if choice is None else {layer: [n for n in choice if n in layer.methods] for layer in layers}
    chosen = {layer: [n for n in names if n not in layer.merged_adapters] for layer, names in wanted.items()}
    chosen = {layer: names for layer, names in chosen.items() if names}
    names = unique_names(chosen.values())
    replaces = any(merging.includes_replacement(layer, names_here) for layer, names_here in chosen.items())
    merging.warn_merged(done, unique_names(wanted.values()), names, replaces)
    if not names:
        return None
    asked: merging.CheckedKinds = set()
    replaced = {layer: f for layer in chosen if (f := merging.find_patched_method(layer, "merge")) is not None}
    graft_merges = {layer: names_here for layer, names_here in chosen.items() if layer not in replaced}
    for layer, names_here in graft_merges.items():
        merging.check_merge(layer, names_here, safe_merge, undoable, asked)
    merging.check_adapters_finite(graft_merges)
    left = {
        layer: [n for n in active[layer] if n not in chosen.get(layer, ()) and n not in layer.merged_adapters]
        for layer in (chosen if undoable else layers)
    }
    if silent := unique_names(left.values()):
        until = "the merged model is without them"
        if undoable:
            until = f"in layers that carry {', '.join(names)}, they have no effect until unmerge_adapter()"
        warn(f"Active adapters {silent} are not merged: {until}.")
    patched = [layer for layer in graft_merges if merging.find_patched_method(layer, merging.DELTA) is not None]
    by_delta = {layer: graft_merges.pop(layer) for layer in patched}
    before = {layer: list(layer.state.merged) for layer in (*replaced, *by_delta, *(graft_merges if undoable else ()))}
    try:  # first a client's `merge`, which may raise: the merges after it may keep no undo
        for layer, merge in replaced.items():
            merge(safe_merge=safe_merge, adapter_names=chosen[layer])
        for layer, names_here in by_delta.items():
            layer.merge_checked(names_here, True)
        for layer, names_here in tqdm(graft_merges.items(), desc="Merging", unit="layer", disable=not progress):
            layer.merge_checked(names_here, undoable)
    except BaseException:
        for layer, merged in before.items():
            if layer.state.merged != merged:
                merging.unmerge(layer)
                layer.merge_checked(merged, True) if merged else layer.refresh_plan()
        raise
    return merging.warn_lost(layers)


def merge_report(model: nn.Module) -> dict[str, float]:
    """Return {path of the layer: share of the merged update that its weight holds}; {} if nothing is merged.

    1.0: nothing was lost to rounding; 0.0: the weight has not changed. `AdapterLayer.share_kept` has the formula. A
    PeftModel returns a copy of the report of its last merge, also after `merge_and_unload`, and {} after unmerging. For
    other models the shares are measured now.
    """
    registry = get_registry(unwrap_model(model))
    if registry is not None:
        return dict(getattr(registry, "shares_kept", {}))
    check_no_foreign_adapters(model)
    merged = {key: layer for key, layer in survey_model(model).layers.items() if layer.merged_adapters}
    return dict(zip(merged, merging.measure_shares_kept(list(merged.values()))))


def unload_adapters(model: nn.Module, frozen: Set[str] | None) -> None:
    """Put the modules of adapter layers and wrappers back into a model, in place, and delete its `peft_config`, if that
    is in the model's `__dict__`.

    Packed weights are released, the config's vocabulary size follows the embeddings, and tied embeddings are tied
    again. Floating-point parameters then require gradients, except `frozen` ones.

    Args:
        frozen: names of parameters; None: leave requires_grad as it is.
    """
    before = vocabulary_sizes(model)
    restore_modules(model)
    release_packed(model.modules())
    if "peft_config" in model.__dict__:
        del model.peft_config
    update_vocabulary_size(model, before)
    retie_embeddings(model)
    if frozen is not None:
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.is_floating_point():
                p.requires_grad_(name not in frozen)


def restore_modules(model: nn.Module) -> None:
    """Replace each adapter layer and wrapper by the module that remains, also within blocks and layers of parameters.

    A layer leaves its base module, a wrapper of a head the active adapter's copy. The model is changed in place; the
    root module itself is not replaced.
    """
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        """Replace the carriers among a module's children by the modules that remain, then visit the remaining children,
        each once.

        Of nested layers and of layers around a block, the innermost module remains, and its children are visited as
        well. The remainder of a single carrier (`remainder`) is not visited, unless the carrier is around a block.
        """
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            carrier, nested = carrier_of(child), list_nested_layers(child)
            if carrier is not None:
                module._modules[name] = innermost(child) if nested else carrier.remainder
            if nested or is_block(carrier):
                child = innermost(child)
            if id(child) not in seen and carrier_of(child) is None:
                seen.add(id(child))
                visit(child)

    visit(model)


def find_tied_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with a weight that a transformers model or a part of it declares as tied
    (`_tied_weights_keys`).

    Patterns, missing parts, other parameters than "weight" and modules without one are skipped. A module that two parts
    declare comes twice.
    """
    for part in model.modules():
        for key in getattr(part, "_tied_weights_keys", None) or ():
            name, _, parameter = key.rpartition(".")
            try:
                module = part.get_submodule(name)
            except AttributeError:  # a pattern, or a part that this model lacks
                continue
            if parameter == "weight" and module._parameters.get("weight") is not None:
                yield module


def vocabulary_sizes(model: nn.Module) -> list[int | None]:
    """Return the rows of the input embeddings and of the head, each None where unknown or absent; [] if the model's
    config has no vocab_size.
    """
    if getattr(text_config(model), "vocab_size", None) is None:
        return []
    return [count_tokens(m and innermost(m)) for m in (input_embeddings(model), output_embeddings(model))]


def update_vocabulary_size(model: nn.Module, before: list[int | None]) -> None:
    """Set `vocab_size` in the config, and on the model, if the embeddings got another number of rows from an adapter.

    Nothing happens if no size changed, or if the config's was none of the old ones. If embeddings and head now differ
    in size, warn instead: the saved model could not be loaded. The model's attribute is set only if it had the config's
    old value. `before` are the sizes with adapters.
    """
    after, config = vocabulary_sizes(model), text_config(model)
    if after == before or config.vocab_size not in before:
        return
    old, sizes = config.vocab_size, {n for n in after if n is not None}
    if len(sizes) > 1:
        warn(
            f"The embeddings have {after[0]} tokens now and the head {after[1]}, since the adapter resized only one of "
            f"them. Call resize_token_embeddings({max(sizes)}) before saving: such a model cannot be loaded."
        )
        return
    config.vocab_size = sizes.pop()
    if getattr(model, "vocab_size", None) == old:
        model.vocab_size = config.vocab_size


def retie_embeddings(model: nn.Module) -> None:
    """Make modules of a tied model share the input embeddings' weight again, where the values are equal.

    Candidates are the modules of `_tied_weights_keys` and the output embeddings. If the output embeddings have other
    values, set `config.tie_word_embeddings` to False, with a warning. Nothing happens if the config ties nothing, or
    the input embeddings have no weight or one on the meta device.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    table = getattr(input_embeddings(model), "weight", None)
    if table is None or table.is_meta:  # CSM's have tables inside
        return
    for module in find_tied_modules(model):  # those of an encoder and a decoder
        weight = module.weight
        if weight is not table and not weight.is_meta and torch.equal(weight, table):
            module.weight = table
    outputs = output_embeddings(model)
    head = getattr(outputs, "weight", None)
    if outputs is None or head is None or head is table:
        return
    if torch.equal(table, head):
        outputs.weight = table
        return
    warn("Setting `config.tie_word_embeddings` to False: merging gave the tied embeddings different weights.")
    model.config.tie_word_embeddings = False
