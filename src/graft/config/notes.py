# SPDX-License-Identifier: Apache-2.0
"""Notes that a weights file carries beside its tensors, by name: the adapter's config, facts on its base model."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any

from graft.config.archives import read_record
from graft.config.reading import Json, open_file, parse_json
from graft.core.errors import CheckpointError

CONFIG = "graft_config"  # the note that holds the text of adapter_config.json
START = b'{"__metadata__":'  # the beginning of a safetensors header that holds notes
RECORD = "graft.json"  # what holds them in a torch file, which is a zip archive
LFS = b"version https://git-lfs"  # the beginning of a pointer that stands for a file which has not been fetched
LARGEST = 100_000_000  # bytes: safetensors reads no longer header
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
BUFFER = 2**20  # bytes: many tensors are small
Stamp = tuple[int, int, int]
See = Callable[[Any], object]  # is passed bytes
Source = tuple[str, str, Sequence[int], int, Callable[[], Any]]  # name, dtype, shape, bytes of a number, memory


@dataclass
class WeightsFile:
    """A weights file, and what it says of itself."""

    path: str
    config: str | None  # the text of adapter_config.json, if graft wrote the file
    stamp: Stamp | None


def read_notes(path: str) -> WeightsFile | None:
    """Return what a weights file says of itself, without its tensors; None if there is no such file."""
    try:
        with open_file(path) as f:
            notes = read_torch_notes(f) if path.endswith(".bin") else read_safetensors_notes(f)
            return WeightsFile(path, notes.get(CONFIG), read_stamp(f.fileno()))
    except (OSError, CheckpointError):
        return None


def read_stamp(file: str | int) -> Stamp | None:
    """Return what tells one file from those that replace it at its path; None if there is none."""
    try:
        facts = os.stat(file)
    except OSError as e:
        if e.errno in NOWHERE:
            return None
        raise
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def read_safetensors_notes(f: IO[bytes]) -> dict[str, str]:
    size = int.from_bytes(f.read(8), "little")
    header = f.read(min(size, LARGEST))
    if not header.startswith(START):
        return {}
    try:
        return select_texts(json.JSONDecoder().raw_decode(header[len(START) :].decode())[0])
    except (ValueError, RecursionError):
        return {}  # a damaged file, of which reading its tensors tells


def write_tensors(path: str, tensors: Iterable[Source], notes: Mapping[str, str], see: See = len) -> None:
    """Write a safetensors file: its notes, in order, then the tensors, the widest first so that all are aligned.

    Args:
        see: gets the bytes of the file, piece by piece.
    """
    order = sorted(tensors, key=lambda source: (-source[3], source[0]))
    header: Json = {"__metadata__": dict(sorted(notes.items()))} if notes else {}
    end = 0
    for name, dtype, shape, width, _ in order:
        begin, end = end, end + prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", BUFFER) as f:
        for load in (lambda: len(text).to_bytes(8, "little") + text, *(source[-1] for source in order)):
            data = load()
            f.write(data)
            see(data)
            del data  # before the next one comes


def parse_header(data: bytes) -> tuple[Json, int]:
    """Return the header of the bytes of a safetensors file, which must be valid, and where its tensors begin."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header: Json = parse_json(data[8:begin], "The header of a safetensors file")
    return header, begin


def add_notes(f: IO[bytes], notes: dict[str, str]) -> None:
    """Add notes to a torch file, open for reading and writing. Its readers pass by what they do not know."""
    from zipfile import ZipFile, ZipInfo

    with ZipFile(f, "a") as archive:
        archive.writestr(ZipInfo(f"archive/{RECORD}"), json.dumps(notes, sort_keys=True))


def read_torch_notes(f: IO[bytes]) -> dict[str, str]:
    text = read_record(f, f"/{RECORD}", LARGEST)
    try:
        return {} if text is None else select_texts(parse_json(text, RECORD))
    except CheckpointError:
        return {}  # as of a file that graft did not write


def select_texts(notes: object) -> dict[str, str]:
    return {k: v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}
