# SPDX-License-Identifier: Apache-2.0
"""The state of a training in one file: safetensors, with a note in JSON of everything but tensors.

It is written whole or not at all, and nothing in it is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from graft import CheckpointError, ConfigError
from graft.config.reading import Json, parse_json
from graft.core.errors import shorten_text
from graft.inject.parts import get_registry
from graft.io.files import read_safetensors, write_sealed

DEEPEST = 100  # lists and dicts inside each other
TENSOR, PAIRS, TUPLE = "__tensor__", "__pairs__", "__tuple__"  # marks of values that JSON lacks


def write_state_file(
    path: str, note_name: str, note: object, tensors: dict[str, Tensor], readable: bool = False
) -> None:
    """Write tensors and a note, as `pack` makes it, to a safetensors file, with a digest of both.

    The note becomes a tensor of bytes named `note_name`. With `readable` it is first written to a file of that name in
    the same folder, too, as indented JSON.
    """
    text = json.dumps(note).encode()
    texts = {note_name: json.dumps(note, indent=1)} if readable else {}
    write_sealed(path, tensors | {note_name: torch.frombuffer(bytearray(text), dtype=torch.uint8)}, texts)


def read_state_file(path: str, note_name: str, what: str) -> tuple[Json, dict[str, Tensor]]:
    """Return the note of a file, unpacked, and its tensors without the note.

    Args:
        what: the kind of file and who writes it, for the error.

    Raises:
        CheckpointError: it is damaged, or another kind of file.
    """
    tensors = read_safetensors(path, may_differ=False).tensors
    text = tensors.pop(note_name, None)
    if text is None or text.dtype is not torch.uint8:
        raise CheckpointError(f"{path} is not {what}.")
    note = unpack(parse_json(text.numpy().tobytes(), f"The note in {path}"), tensors, path)
    if not isinstance(note, dict):
        raise CheckpointError(f"{path} is not {what}: its note is a {type(note).__name__}.")
    return note, tensors


def iterate_slots(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, slot) for all tensors of an adapter, parameters and buffers. The key is "carrier.container.path"."""
    for carrier in get_registry(model).parts_of(adapter).carriers():
        for slot in carrier.slots(adapter):
            yield f"{carrier.key}.{slot.container}.{slot.path}", slot


def pack(value: object, tensors: dict[str, Tensor], where: str, key: str | None = None, stem: str = "t") -> object:
    """Return a value as JSON can hold it.

    Tensors are put into `tensors`, without a copy, and replaced by their keys; tuples and dicts with other keys than
    strings are marked.

    Subclasses of numbers and texts become plain ones, and objects with `item()` and no shape its number.

    Args:
        where: the place of the value, for the error.
        key: the key for the value, if it is a tensor and the key is free.
        stem: the keys of other tensors begin with it.

    Raises:
        ConfigError: it holds an object that is neither a number, a text, a tensor nor made of these.
    """
    if isinstance(value, Tensor):
        if key is None or key in tensors:
            key = f"{stem}{len(tensors)}"
        tensors[key] = value
        return {TENSOR: key}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {TUPLE: [pack(v, tensors, where, stem=stem) for v in value]}
    if isinstance(value, list):
        return [pack(v, tensors, where, stem=stem) for v in value]
    if isinstance(value, dict):
        pack_item = partial(pack, stem=stem)
        pairs = [(pack_item(k, tensors, where), pack_item(v, tensors, f"{where}, '{k}'")) for k, v in value.items()]
        if value.keys() & {TENSOR, PAIRS, TUPLE} or not all(type(k) is str for k in value):
            return {PAIRS: [list(pair) for pair in pairs]}
        return dict(pairs)
    if isinstance(value, (bool, int, float, str)):  # subclasses: enums, numpy's numbers
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        return value.item()
    raise ConfigError(f"{where}: {type(value).__name__} cannot be written to a file without pickle. Leave it out.")


def simulate_read(value: object) -> Any:
    """Return a value as `read_state_file` would give it back: NumPy's numbers and enums are Python's. Tensors stay."""
    tensors = dict[str, Tensor]()
    return unpack(json.loads(json.dumps(pack(value, tensors, ""))), tensors)


def unpack(value: object, tensors: dict[str, Tensor], path: str = "", depth: int = 0) -> Any:
    """Return the value that `pack` was given, with its tensors.

    Lists and dicts are unpacked recursively; the tensors are those of `tensors`, without a copy.

    A dict with the mark of a tensor, a tuple or pairs becomes that, and its other keys are ignored. Other values are
    returned as they are.

    Args:
        path: of the file, for the error.
        depth: the number of levels above this value.

    Raises:
        CheckpointError: `pack` makes no such value: a tensor is not there, a key is invalid, or it is more than 100
            levels deep.
    """
    if depth > DEEPEST:
        raise CheckpointError(f"The note in {path} nests lists and dicts more than {DEEPEST} deep. It is damaged.")
    inner = partial(unpack, tensors=tensors, path=path, depth=depth + 1)
    if isinstance(value, list):
        return [inner(v) for v in value]
    if not isinstance(value, dict):
        return value
    try:
        if TENSOR in value:
            return tensors[value[TENSOR]]
        if TUPLE in value:
            return tuple([inner(v) for v in value[TUPLE]])
        if PAIRS in value:
            return {inner(k): inner(v) for k, v in value[PAIRS]}
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"The note in {path} is damaged: {shorten_text(repr(e))}.") from None
    return {k: inner(v) for k, v in value.items()}


def find_generators(data: object) -> list[Generator]:
    """Return the generators in a loader's attribute `generator`, and in those of its sampler, batch sampler and that
    one's sampler, each once.
    """
    sampler = getattr(data, "batch_sampler", None)
    holders = [data, getattr(data, "sampler", None), sampler, getattr(sampler, "sampler", None)]
    generators = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), Generator)}
    return list(generators.values())
