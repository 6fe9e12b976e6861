# SPDX-License-Identifier: Apache-2.0
"""The digest of the tensors in a weights file, which stands in its metadata: a load sees that a byte has changed.

It is CRC-32, which sees every flipped byte, and of two damaged files all but one in four thousand million. It guards
against disks and transfers; who forges a file can forge its digest, of any kind. Of what Python's standard library
has, CRC-32 takes a half of the time of SHA-256 and a quarter of that of BLAKE2b (measured: 2.6, 1.1 and 0.6 GB/s).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

from graft.config.notes import parse_header
from graft.core.errors import CheckpointError, shorten_text

KEY = "graft_digest"  # key in the safetensors metadata
KIND = "crc32:"  # a digest of another kind is one of a later version

Part = tuple[str, str, Sequence[int], Any]  # name, dtype, shape and bytes of a tensor, or what returns them


def compute_digest(parts: Iterable[Part]) -> str:
    """Return the digest of tensors, whatever their order."""
    checksum = 0
    for name, dtype, shape, data in sorted(parts, key=lambda part: part[0]):
        data = data() if callable(data) else data
        checksum = crc32(data, crc32(json.dumps([name, dtype, list(shape)]).encode(), checksum))
    return f"{KIND}{checksum:08x}"


def digest_file(data: bytes) -> str:
    """Return the digest of the tensors in the bytes of a safetensors file, which must be valid."""
    header, begin = parse_header(data)
    body = memoryview(data)[begin:]
    header.pop("__metadata__", None)
    return compute_digest((key, t["dtype"], t["shape"], body[slice(*t["data_offsets"])]) for key, t in header.items())


def check_digest(saved: str, found: str, path: str, may_differ: bool = True) -> None:
    """Raise CheckpointError if the tensors of a file are not those that were saved.

    may_differ: the caller takes `check_digest=False`.
    """
    if not saved.startswith(KIND) and not may_differ:
        raise CheckpointError(
            f"{path} has the digest '{shorten_text(saved)}' of a later graft. Update graft to read it."
        )
    if saved.startswith(KIND) and saved != found:
        text = f"its tensors are not those that were saved (digest {found}, saved with {saved})"
        but = "; if you changed them yourself, check_digest=False loads them" if may_differ else ""
        raise CheckpointError(f"{path} is damaged: {text}. Save or download it again{but}.")
