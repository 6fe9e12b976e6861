# SPDX-License-Identifier: Apache-2.0
"""Notes in a weights file, next to its tensors, {name: text}: the adapter's config, and facts about its base model.

Safetensors files have them in their header, torch files in a record `RECORD` of the zip archive.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any

from graft.config.reading import LARGEST_HEADER, Json, open_file, parse_json, read_record
from graft.core.errors import CheckpointError

CONFIG = "graft_config"  # the note that holds the text of adapter_config.json
START = b'{"__metadata__":'  # the beginning of a safetensors header that holds notes
RECORD = "graft.json"  # file with the notes in a torch file, which is a zip archive
LFS = b"version https://git-lfs"  # the beginning of a pointer that git puts in the place of a file not yet fetched
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
Stamp = tuple[int, int, int]


@dataclass
class WeightsFile:
    """The path of a weights file, its notes, and its stamp."""

    path: str
    texts: dict[str, str]  # all notes
    stamp: Stamp | None

    @property
    def config(self) -> str | None:
        """The text of adapter_config.json; None if graft did not write the file."""
        return self.texts.get(CONFIG)


def read_notes(path: str) -> WeightsFile | None:
    """Return the path, the notes and the stamp (of the open file) of a weights file, without reading its tensors.

    A path that ends in ".bin" is read as a torch file, any other as safetensors; a file without notes has {}.

    Returns None if the file is missing, cannot be read, or is a folder, pipe or device.
    """
    try:
        with open_file(path) as f:
            notes = read_torch_notes(f) if path.endswith(".bin") else read_safetensors_notes(f)
            return WeightsFile(path, notes, read_stamp(f.fileno()))
    except (OSError, CheckpointError):
        return None


def read_stamp(file: str | int) -> Stamp | None:
    """Return (inode, bytes, time of the last change in ns) of a file, by path or descriptor.

    A file that replaces it has another stamp.

    Links are followed. Return None if there is no such file, also for a folder on the way that is missing or a loop of
    links. Raises OSError for other failures.
    """
    try:
        facts = os.stat(file)
    except OSError as e:
        if e.errno in NOWHERE:
            return None
        raise
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def read_safetensors_notes(f: IO[bytes]) -> dict[str, str]:
    """Return the notes in the header of an open safetensors file; {} if it has none, does not begin with them, or is
    damaged. Values that are no texts are left out.

    Its tensors are not read.
    """
    size = int.from_bytes(f.read(8), "little")
    header = f.read(min(size, LARGEST_HEADER))
    if not header.startswith(START):
        return {}
    try:
        return select_texts(json.JSONDecoder().raw_decode(header[len(START) :].decode())[0])
    except (ValueError, RecursionError):
        return {}  # reading the tensors will report the damage


def make_header(tensors: Iterable[Sequence[Any]], notes: Mapping[str, str]) -> bytes:
    """Return the beginning of a safetensors file, up to the first tensor: its size, the notes sorted by name, and the
    tensors in the order of the file. Spaces fill it up to a multiple of 8 bytes; without notes it has no entry for
    them.

    Args:
        tensors: name, dtype, shape and bytes of a number of each, in that order; more items are ignored.
    """
    header: Json = {"__metadata__": dict(sorted(notes.items()))} if notes else {}
    end = 0
    for name, dtype, shape, width, *_ in tensors:
        begin, end = end, end + prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse_header(data: bytes) -> tuple[Json, int]:
    """Return the header in the bytes of a safetensors file, and the offset of its first tensor.

    Raises CheckpointError if the header is no valid JSON. A JSON value other than an object passes.
    """
    begin = 8 + int.from_bytes(data[:8], "little")
    header: Json = parse_json(data[8:begin], "The header of a safetensors file")
    return header, begin


def add_notes(f: IO[bytes], notes: dict[str, str]) -> None:
    """Append notes as the record "archive/graft.json" to a torch file that is open for reading and writing.

    `torch.load` ignores them.
    """
    from zipfile import ZipFile, ZipInfo

    with ZipFile(f, "a") as archive:
        archive.writestr(ZipInfo(f"archive/{RECORD}"), json.dumps(notes, sort_keys=True))


def read_torch_notes(f: IO[bytes]) -> dict[str, str]:
    """Return the notes in an open torch file, from the record `RECORD` of its archive.

    Returns {} if it has none, is no archive, or the notes are damaged.

    Its tensors are not read, and values that are no texts are left out.
    """
    text = read_record(f, f"/{RECORD}", LARGEST_HEADER)
    try:
        return {} if text is None else select_texts(parse_json(text, RECORD))
    except CheckpointError:
        return {}  # as of a file that graft did not write


def select_texts(notes: object) -> dict[str, str]:
    """Return the entries of a dict that have a text as value; {} for a value that is no dict."""
    return {k: v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}
