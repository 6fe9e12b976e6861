# SPDX-License-Identifier: Apache-2.0
"""Merging the adapters of all layers, all or nothing; for a while, or for good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from types import MappingProxyType

import torch
from torch import nn

from graft.core import merging
from graft.core.base_config import input_embeddings, output_embeddings, text_config, tokens_of
from graft.core.carrier import carrier_of
from graft.core.errors import warn
from graft.core.gate import changes, everything
from graft.core.layer import AdapterLayer
from graft.core.names import several
from graft.core.ops import find_op
from graft.inject.beside import RowsLayer
from graft.inject.parts import check_foreign, registry_of, unwrapped
from graft.inject.survey import is_block, nest_of, survey
from graft.model.registry import Registry
from graft.storage import DENSE, Quantized, holds_codes, innermost, release
from graft.storage.codes import dtype_beside, mark_plain, unmark


def union(names: Iterable[list[str]]) -> list[str]:
    """Return all names, each once, in order."""
    return list(dict.fromkeys(name for some in names for name in some))


class MergingRegistry(Registry):
    """The registry of adapters that the weights of the base model can take over."""

    frozen_before: set[str] | None = None  # names of the base's parameters; None: leave all as they are
    shares_kept: Mapping[str, float] = MappingProxyType({})  # by key of a layer, of what the last merge wrote

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The adapters merged into some layer."""
        return list(dict.fromkeys(name for layer in self.mergeable_layers() for name in layer.state.merged))

    def mergeable_layers(self) -> list[AdapterLayer]:
        return [*self.layers.values(), *(w for w in self.wrappers.values() if isinstance(w, RowsLayer))]

    @changes(everything)
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (None: those active on each layer) into the base weights; `unmerge_adapter` takes them out.

        Args:
            safe_merge: compute every merged weight first and check that it is finite, which takes as long as merging.
                Without it only the adapters' own tensors are checked, not whether a sum overflows half precision.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: values are not finite, a name is there twice, or adapters are disabled. Nothing is merged then.
            NotImplementedError: some layer cannot hold them merged. Nothing is merged then.
        """
        self._merge(adapter_names, safe_merge, undoable=True)

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, undoable: bool, progress: bool = False) -> None:
        from tqdm import tqdm

        choice = None if adapter_names is None else several(adapter_names, "adapter_names")
        self.check_known(choice or ())
        layers, done = self.mergeable_layers(), self.merged_adapters
        active = {layer: [n for n in layer.active_adapters if n in layer.methods] for layer in layers}
        wanted = active if choice is None else {layer: [n for n in choice if n in layer.methods] for layer in layers}
        chosen = {layer: [n for n in names if n not in layer.merged_adapters] for layer, names in wanted.items()}
        chosen = {layer: names for layer, names in chosen.items() if names}
        names = union(chosen.values())
        replaces = any(merging.replaces(layer, here) for layer, here in chosen.items())
        merging.warn_merged(done, union(wanted.values()), names, replaces)
        if not names:
            return
        asked: merging.Asked = set()
        replaced = {layer: f for layer in chosen if (f := merging.theirs(layer, "merge")) is not None}
        own = {layer: here for layer, here in chosen.items() if layer not in replaced}
        for layer, here in own.items():
            merging.check(layer, here, safe_merge, undoable, asked)
        merging.check_finite(own)
        left = {
            layer: [n for n in active[layer] if n not in chosen.get(layer, ()) and n not in layer.merged_adapters]
            for layer in (chosen if undoable else layers)
        }
        if silent := union(left.values()):
            until = "the merged model is without them"
            if undoable:
                until = f"in layers that carry {', '.join(names)}, they have no effect until unmerge_adapter()"
            warn(f"Active adapters {silent} are not merged: {until}.")
        by_delta = {layer: own.pop(layer) for layer in [*own] if merging.theirs(layer, merging.DELTA) is not None}
        before = {layer: list(layer.state.merged) for layer in (*replaced, *by_delta, *(own if undoable else ()))}
        try:  # first a client's `merge`, which may raise: the merges after it may keep no undo
            for layer, merge in replaced.items():
                merge(safe_merge=safe_merge, adapter_names=chosen[layer])
            for layer, here in by_delta.items():
                layer.merge_checked(here, True)
            if undoable:
                for layer, here in tqdm(own.items(), desc="Merging", unit="layer", disable=not progress):
                    layer.merge_checked(here, True)
        except BaseException:
            for layer, merged in before.items():
                if layer.state.merged != merged:
                    merging.unmerge(layer)
                    layer.merge_checked(merged, True) if merged else layer.changed()
            raise
        if not undoable:
            for layer, here in tqdm(own.items(), desc="Merging", unit="layer", disable=not progress):
                layer.merge_checked(here, False)
        self.shares_kept = merging.warn_lost(self.mergeable_layers())

    @changes(everything)
    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again."""
        if not self.merged_adapters:
            warn("Already unmerged. Nothing to do.")
        for layer in self.mergeable_layers():
            if layer.merged_adapters:
                layer.unmerge()
        self.shares_kept = {}

    @changes(everything)
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge for good and return the plain model.

        Args:
            dequantize: hold the weights of adapted layers as plain tensors from then on, where they are packed (4-bit
                codes and the like). Merging is then exact, also into weights that cannot be quantized anew.
        """
        with self._dequantized(adapter_names) if dequantize else nullcontext(False) as some:
            self._merge(adapter_names, safe_merge, undoable=False, progress=progressbar)
        plain = self.unload()
        if dequantize and not any(map(holds_codes, plain.modules())):
            unmark(plain)
        elif some:
            mark_plain(plain)
        return plain

    @contextmanager
    def _dequantized(self, adapter_names: list[str] | None) -> Iterator[bool]:
        """Hold packed weights of the layers of these adapters as plain tensors, and tell whether there are any; as
        before if the block raises."""
        done = self.merged_adapters
        choice = None if adapter_names is None else several(adapter_names, "adapter_names")
        layers = [
            layer
            for layer in self.mergeable_layers()
            if not layer.methods.keys().isdisjoint([*done, *(layer.active_adapters if choice is None else choice)])
        ]
        packed = [(layer, layer.store) for layer in layers if isinstance(layer.store, Quantized)]
        for layer, store in packed:
            if (why := store.unread(layer.base_layer)) is not None:
                raise NotImplementedError(f"Cannot dequantize layer '{layer.site.key}': {why}.")
        for layer in layers:
            if layer.op.packed is not None:
                raise NotImplementedError(
                    f"Cannot dequantize layer '{layer.site.key}': its module understands nothing but codes. Load the "
                    "base dequantized (in transformers: dequantize=True in its quantization_config) and merge there."
                )
        if done:
            self.unmerge_adapter()
        before = [(layer, layer.base_layer, layer.op, store) for layer, store in packed]
        dtype = dtype_beside(survey(self.model).owners)
        try:
            for layer, store in packed:
                plain = store.dense(layer.base_layer, dtype)
                layer.move(plain, find_op(plain), DENSE)
            if done:
                self._merge(done, False, undoable=True)
            yield bool(packed)
        except BaseException:
            if self.merged_adapters:
                self.unmerge_adapter()
            for layer, module, op, store in before:
                layer.move(module, op, store)
            if done:
                self._merge(done, False, undoable=True)
            raise

    @changes(everything)
    def unload(self, keep_modules: bool = True) -> nn.Module:
        """Return the model without adapter layers, of which the parameters train that did before the first adapter.

        A base that had adapters before it came here stays frozen. Modules in `modules_to_save` keep the active
        adapter's values, also while adapters are disabled.

        Args:
            keep_modules: False: the base's own modules come back in their place, and merged adapters are unmerged.
        """
        if not keep_modules:
            if self.merged_adapters:
                self.unmerge_adapter()
            for part in self.carriers():
                part.state.active = []
        unload(self.model, self.frozen_before)
        self.layers, self.wrappers = {}, {}
        return self.model

    @contextmanager
    def provisional(self, adapter_name: str, then_keep: bool = True) -> Iterator[None]:
        """Take an adapter that was injected with `Options.provisional` off again if the block raises.

        then_keep: it may stay afterwards; else who asked for this may still take it off.
        """
        try:
            yield
        except BaseException:
            for layer in self.parts_of(adapter_name).layers.values():
                layer.rollback()
            self.delete_adapter(adapter_name)
            if not self.peft_config:
                self.unload()
            raise
        for layer in self.layers.values() if then_keep else ():
            layer.keep()


def merge_report(model: nn.Module) -> dict[str, float]:
    """Return the share of the merged update that each layer's weight holds, by the layer's path in the base model.

    1.0: nothing was lost to rounding; 0.0: the weight is what it was. `AdapterLayer.share_kept` has the formula. The
    PeftModel whose `merge_and_unload` made a plain model still has that merge's report. {} if nothing is merged.
    """
    registry = registry_of(unwrapped(model))
    if registry is not None:
        return dict(getattr(registry, "shares_kept", {}))
    check_foreign(model)
    merged = {key: layer for key, layer in survey(model).layers.items() if layer.merged_adapters}
    return dict(zip(merged, merging.shares_kept(list(merged.values()))))


def unload(model: nn.Module, frozen: Set[str] | None) -> None:
    """Take the adapter layers and wrappers out of a model, and let its parameters train but for `frozen` ones.

    Args:
        frozen: names of parameters; None: leave all as they are.
    """
    before = vocabulary(model)
    restore(model)
    release(model.modules())
    if "peft_config" in model.__dict__:
        del model.peft_config
    resize(model, before)
    retie(model)
    if frozen is not None:
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.is_floating_point():
                p.requires_grad_(name not in frozen)


def restore(model: nn.Module) -> None:
    """Put what adapter layers and wrappers hold in their places, also in blocks and where parameters are adapted."""
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            carrier, nested = carrier_of(child), nest_of(child)
            if carrier is not None:
                module._modules[name] = innermost(child) if nested else carrier.remainder
            if nested or is_block(carrier):
                child = innermost(child)
            if id(child) not in seen and carrier_of(child) is None:
                seen.add(id(child))
                visit(child)

    visit(model)


def declared_tied(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose weights a transformers model says are tied to others."""
    for part in model.modules():
        for key in getattr(part, "_tied_weights_keys", None) or ():
            name, _, parameter = key.rpartition(".")
            try:
                module = part.get_submodule(name)
            except AttributeError:  # a pattern, or a part that this model lacks
                continue
            if parameter == "weight" and module._parameters.get("weight") is not None:
                yield module


def vocabulary(model: nn.Module) -> list[int | None]:
    """Return for how many tokens the base's embeddings, and its head, have rows; nothing if its config says no size."""
    if getattr(text_config(model), "vocab_size", None) is None:
        return []
    return [tokens_of(m and innermost(m)) for m in (input_embeddings(model), output_embeddings(model))]


def resize(model: nn.Module, before: list[int | None]) -> None:
    """Set the size of the vocabulary in the config, if embeddings with another came out of an adapter."""
    after, config = vocabulary(model), text_config(model)
    if after == before or config.vocab_size not in before:
        return
    old, sizes = config.vocab_size, {n for n in after if n is not None}
    if len(sizes) > 1:
        warn(
            f"The embeddings have {after[0]} tokens now, and the head {after[1]}, as the adapter had one of the two: "
            f"call resize_token_embeddings({max(sizes)}) before you save the model, which could not be loaded."
        )
        return
    config.vocab_size = sizes.pop()
    if getattr(model, "vocab_size", None) == old:
        model.vocab_size = config.vocab_size


def retie(model: nn.Module) -> None:
    """Tie the embeddings of a tied model again after merging, or say in its config that they now differ."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    table = getattr(input_embeddings(model), "weight", None)
    if table is None or table.is_meta:  # CSM's have tables inside
        return
    for module in declared_tied(model):  # those of an encoder and a decoder
        own = module.weight
        if own is not table and not own.is_meta and torch.equal(own, table):
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
