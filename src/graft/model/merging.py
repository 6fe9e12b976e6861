# SPDX-License-Identifier: Apache-2.0
"""Merging the adapters of all layers, all or nothing; for a while, or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from graft.core import merging
from graft.core.errors import warn
from graft.core.layer import AdapterLayer
from graft.core.names import several
from graft.core.ops import find_op
from graft.inject.survey import survey
from graft.model.registry import Registry
from graft.model.unloading import unload
from graft.storage import DENSE, Quantized, holds_codes
from graft.storage.packed import dtype_beside, unmark


class MergingRegistry(Registry):
    """The registry of adapters that the weights of the base model can take over."""

    frozen_before: set[str] | None = None  # names of the base's parameters; None: leave all as they are

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The adapters merged into some layer."""
        return list(dict.fromkeys(name for layer in self.mergeable_layers() for name in layer.merged_adapters))

    def mergeable_layers(self) -> list[AdapterLayer]:
        rows = [w.adapter_layer for w in self.wrappers.values() if w.adapter_layer is not None]
        return [*self.layers.values(), *rows]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (the active ones if None) into the base weights: see `Tuner.merge_adapter`."""
        self._merge(adapter_names, safe_merge, undoable=True)

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, undoable: bool, progress: bool = False) -> None:
        names = self.active_adapters if adapter_names is None else several(adapter_names, "adapter_names")
        self.check_known(names)
        done = self.merged_adapters
        wanted, names = names, [n for n in names if n not in done]
        layers: Any = self.mergeable_layers()
        merging.say_merged(done, wanted, names, any(merging.replaces(layer, names) for layer in layers))
        if not names:
            return
        for layer in layers:
            merging.check(layer, names, safe_merge, undoable)
        merging.check_finite(layers, names)
        left = [n for n in self.active_adapters if n not in names and n not in done]
        if not undoable:
            silent = left
            until = "the merged model is without them"
        else:
            hosts = [layer for layer in layers if not layer.methods.keys().isdisjoint(names)]
            silent = [n for n in left if any(n in layer.methods for layer in hosts)]
            until = f"in layers that carry {', '.join(names)}, they have no effect until unmerge_adapter()"
        if silent:
            warn(f"Active adapters {silent} are not merged: {until}.")
        if progress:
            from tqdm import tqdm

            layers = tqdm(layers, desc="Merging", unit="layer")
        for layer in layers:
            here = [n for n in names if n in layer.methods]
            if here:
                layer.merge_checked(here, undoable)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again."""
        if not self.merged_adapters:
            warn("Already unmerged. Nothing to do.")
        for layer in self.mergeable_layers():
            if layer.merged_adapters:
                layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge for good and return the plain model: see `Tuner.merge_and_unload`."""
        with self._dequantized(adapter_names) if dequantize else nullcontext():
            self._merge(adapter_names, safe_merge, undoable=False, progress=progressbar)
        plain = self.unload()
        if dequantize and not any(map(holds_codes, plain.modules())):
            unmark(plain)
        return plain

    @contextmanager
    def _dequantized(self, adapter_names: list[str] | None) -> Iterator[None]:
        """Hold packed weights of the layers of these adapters as plain tensors; as before if the block raises."""
        done = self.merged_adapters
        wanted = self.active_adapters if adapter_names is None else several(adapter_names, "adapter_names")
        layers = [layer for layer in self.mergeable_layers() if not layer.methods.keys().isdisjoint([*done, *wanted])]
        packed = [(layer, layer.store) for layer in layers if isinstance(layer.store, Quantized)]
        for layer, store in packed:
            if (why := store.unread(layer.base_layer)) is not None:
                raise NotImplementedError(f"Cannot dequantize layer '{layer.site.key}': {why}.")
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
            yield
        except BaseException:
            if self.merged_adapters:
                self.unmerge_adapter()
            for layer, *held in before:
                layer.move(*held)
            if done:
                self._merge(done, False, undoable=True)
            raise

    def unload(self) -> nn.Module:
        """Return the model without adapter layers: see `Tuner.unload`.

        A base that had adapters before this registry was made stays frozen.
        """
        unload(self.model, self.frozen_before)
        self.layers, self.wrappers = {}, {}
        return self.model
