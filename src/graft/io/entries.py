# SPDX-License-Identifier: Apache-2.0
"""One map between an adapter's tensors, their names in memory and their names in a file.

Names follow from the place of a tensor. No code searches a key for an adapter's name: an adapter may be called "0" or
"mlp".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graft.config.reading import compile_pattern
from graft.core.containers import parameter_dict
from graft.core.errors import AdapterKeyError, ConfigError, PeftWarning, warn
from graft.core.layer import AdapterLayer
from graft.core.wrappers import find_offload_hooks
from graft.inject.beside import TrainableTokensWrapper
from graft.inject.parts import AdapterCarriers, ParameterLayerPaths
from graft.prompts.base import Prompt
from graft.storage.offload import write_offloaded
from graft.storage.parallel import (
    copy_unwrapped,
    find_parameters_below,
    find_whole_shape,
    layout_of,
    shard_like,
    strip_inner_wrappers,
    write_whole,
)

T = TypeVar("T")
WRAPPED, PROMPT_WRAPPED = "base_model.model.", "base_model."  # prefixes of a PeftModel's keys


@dataclass(slots=True)
class Entry:
    """One tensor of an adapter, with its names in memory and in a file, and the module that holds it."""

    memory: str  # its name in the model's state dict
    file: str  # its name in a checkpoint
    also: tuple[str, ...]  # other file names it may have: PEFT leaves the adapter's name in deep ones
    owner: nn.Module
    attribute: str
    tensor: Tensor
    stem: str = ""  # path of its container
    layer: AdapterLayer | None = None
    container: str = ""
    path: str = ""  # below the adapter's name

    @property
    def label(self) -> str:
        """The name in reports: that in memory."""
        return self.memory

    @property
    def where(self) -> dict[str, Any]:
        """The dict that holds the tensor: the owner's buffers, else its parameters."""
        buffers = self.owner._buffers
        return buffers if self.attribute in buffers else parameter_dict(self.owner, self.attribute)

    def refresh(self) -> None:
        """Set `tensor` to the one that the owner holds now; it may have been replaced since the entry was made.

        Raises KeyError if the owner no longer has it.
        """
        self.tensor = self.where[self.attribute]

    def assign(self, value: Tensor) -> None:
        """Write `value` into the tensor that the owner has now.

        An existing tensor is overwritten in place, since an optimizer may hold it. An offloaded one is written into its
        offload store.

        Any other tensor on the meta device is replaced by a new one, sharded alike, on the layer's device (that of
        `value` without a layer). A parameter keeps its `requires_grad`; the dtype is the entry's. `tensor` is read anew
        first (`refresh`), and becomes the new one after a replacement.
        """
        self.refresh()
        if not self.tensor.is_meta:
            write_whole(self.tensor, value)
            return
        if find_offload_hooks(self.owner):
            write_offloaded(self.owner, self.attribute, value)
            return
        value = shard_like(value, self.tensor)
        device = None if self.layer is None else self.layer.where[0]
        if value.device != device or value.dtype != self.tensor.dtype:
            value = value.to(device=device, dtype=self.tensor.dtype)
        where = self.where
        if where is not self.owner._buffers:
            value = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
        where[self.attribute] = self.tensor = value


class PromptEntry(Entry):
    """The prompt that a prompt method computes, or one of its parameters: see `Prompt.to_file_tensors`."""

    @property
    def label(self) -> str:
        """The name in reports: the prompt's path and the attribute."""
        return f"{self.memory}.{self.attribute}"

    def assign(self, value: Tensor) -> None:
        """Call `owner.restore(attribute, value)`, which writes the value into the prompt."""
        self.owner.restore(self.attribute, value)


def list_entries(parts: AdapterCarriers, adapter: str, prefix: str) -> Iterator[Entry]:
    """Yield an entry for each tensor of `adapter` that a checkpoint holds: prompt, layers, token rows, heads, then
    shared tensors.

    Names in memory contain the adapter's name and the layers of all adapters; names in a file neither, but the layers
    of this one, without wrappers. A path with a dot below a container keeps the adapter's name in a file, as in PEFT;
    `files` of the method may say other names. An entry's `also` lists other names under which files may hold the
    tensor. Slots that are not saved get no entry, nor do token rows borrowed from another adapter.

    Args:
        prefix: that of the model's keys.
    """
    if parts.prompt is not None:
        for name, tensor in get_prompt_tensors(parts.prompt).items():
            yield PromptEntry(f"{parts.prompt.prefix}.{adapter}", name, (), parts.prompt, name, tensor)
    in_model = ParameterLayerPaths((parts.layers if parts.all_layers is None else parts.all_layers).values())
    in_file = ParameterLayerPaths(parts.layers.values())
    named = TrainableTokensWrapper.inner_name
    tokens: dict[str, Any] = {f"{key}.{named}": layer for key, layer in parts.wrappers.items() if layer.takes_rows}
    rows = {key: layer for key, layer in tokens.items() if not layer.methods[adapter].lenders}
    for key, layer in {**parts.layers, **rows}.items():
        method = layer.methods[adapter]
        files = method.files
        stem_in_memory = f"{prefix}{in_model.path(key, layer)}."
        stem_in_file = f"{prefix}{strip_inner_wrappers(in_file.path(key, layer))}."
        for slot in layer.slots(adapter):
            if not slot.saved:
                continue
            container, path = slot.container, slot.path
            stem = stem_in_file + container
            below = f".{path}" if path else ""
            memory, file = f"{stem_in_memory}{container}.{adapter}{below}", stem + below
            also: tuple[str, ...] = ()
            if container in files:
                file, also = files[container].format(stem, below), (file, f"{stem}.{adapter}{below}")
            elif "." in path:
                file, also = f"{stem}.{adapter}{below}", (file,)
            yield Entry(memory, file, also, slot.owner, slot.attribute, slot.tensor, stem, layer, container, path)
    for key, wrapper in parts.wrappers.items():
        if wrapper.takes_rows:
            continue
        for slot in wrapper.slots(adapter):
            if slot.saved:
                memory = f"{prefix}{in_model.path(key)}.{slot.container}.{adapter}.{slot.path}"
                stem = f"{prefix}{strip_inner_wrappers(in_file.path(key))}"
                # files with embeddings hold a head on an embedding twice
                also = (f"{stem}.{slot.container}.{slot.path}",)
                yield Entry(memory, f"{stem}.{slot.path}", also, slot.owner, slot.attribute, slot.tensor)
    shared = parts.shared
    if shared is None:
        return
    for slot in shared.slots(adapter):
        if slot.saved:
            below = f".{slot.path}" if slot.path else ""
            file = shared.files.get(slot.container, "{0}{1}").format(f"base_model.{slot.container}", below)
            memory = f"base_model.{slot.container}.{adapter}{below}" if shared.keyed else file
            # some of PEFT's files have copies below layers
            attached = (key for key, layer in parts.layers.items() if slot.container in layer.attached)
            also = tuple(f"{prefix}{key}.{slot.container}{below}" for key in attached)
            where = slot.owner, slot.attribute, slot.tensor
            yield Entry(memory, file, also, *where, container=slot.container, path=slot.path)


def list_tied_row_keys(parts: AdapterCarriers, adapter: str, prefix: str) -> Iterator[str]:
    """Yield the file keys of token rows that a tied module borrows from another; modules with rows of their adapter are
    skipped. PEFT's files with embeddings hold these twice.
    """
    nests = ParameterLayerPaths(parts.layers.values())
    for key, layer in parts.wrappers.items():
        if layer.takes_rows and layer.methods[adapter].lenders:
            stem = f"{prefix}{strip_inner_wrappers(nests.path(key))}.{TrainableTokensWrapper.inner_name}"
            yield from (f"{stem}.{slot.container}" for slot in layer.slots(adapter) if slot.saved)


def get_prompt_tensors(prompt: Prompt) -> dict[str, Tensor]:
    """Return the tensors of a prompt that a file holds, by its `to_file_tensors`.

    If any parameter is spread over processes, all are empty ones on the meta device, of the whole shapes.
    """
    tensors = find_parameters_below(prompt)
    if all([layout_of(t) is None for t in tensors.values()]):
        return prompt.to_file_tensors()
    empty = {name: torch.empty(find_whole_shape(t), dtype=t.dtype, device="meta") for name, t in tensors.items()}
    return copy_unwrapped(prompt, empty).to_file_tensors()


def find_key(entry: Entry, names: set[str]) -> str | None:
    """Return the one of `names` that holds an entry; None if none does.

    Tries the file name, then the other names in `also`. Last tries each of `also` with one more part, any adapter's
    name, after the stem; this counts only if exactly one name fits.
    """
    for name in (entry.file, *entry.also):
        if name in names:
            return name
    for plain in entry.also:  # PEFT leaves the saved adapter's name, whatever it was, before a deep path
        stem, below = entry.stem, plain[len(entry.stem) :]
        named = [n for n in names if n.startswith(f"{stem}.") and n.endswith(below)]
        if len(named) == 1 and "." not in named[0][len(stem) + 1 : -len(below)]:
            return named[0]
    return None


def rename_keys(tensors: dict[str, T], mapping: dict[str, str], must_fit: bool = False) -> dict[str, T]:
    """Return the tensors with each key renamed, after its prefix "base_model.model." or "base_model.", by the first
    regex of `mapping` that fits.

    All patterns and replacements are checked first. A regex may fit anywhere in the rest, and all its matches are
    replaced. Keys that none fits stay; the order stays.

    Args:
        must_fit: warn if no regex fits any key at all.

    Raises:
        ConfigError: a pattern is no regular expression, or its replacement is not valid.
        AdapterKeyError: two keys get one name.
    """
    patterns = []
    for text, replacement in mapping.items():
        patterns.append((compile_pattern(text, "key_mapping"), replacement))
        try:
            re.sub(text, replacement, "")
        except (re.error, IndexError) as e:
            raise ConfigError(f"{replacement!r} of key_mapping cannot replace {text!r}: {e}.") from e
    out: dict[str, T] = {}
    has_match = False
    for key, tensor in tensors.items():
        prefix = next((p for p in (WRAPPED, PROMPT_WRAPPED) if key.startswith(p)), "")
        new_name = key[len(prefix) :]
        for wanted, replacement in patterns:
            new, n = wanted.subn(replacement, new_name)
            if n:
                new_name, has_match = new, True
                break
        if prefix + new_name in out:
            raise AdapterKeyError(
                f"Two keys of the checkpoint become '{prefix + new_name}' by key_mapping, one is '{key}'. Pass a "
                "mapping that tells them apart."
            )
        out[prefix + new_name] = tensor
    if must_fit and not has_match:
        warn(f"key_mapping={mapping} fits none of the checkpoint's keys, such as '{next(iter(out), '')}'.", PeftWarning)
    return out
