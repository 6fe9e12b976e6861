# SPDX-License-Identifier: Apache-2.0
"""Write several files so that either all of them are new or all are as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable


def write_all(writers: dict[str, Callable[[str], None]], remove: tuple[str, ...] = ()) -> None:
    """Write each file (path → function of a path) under a temporary name, sync, then rename them all.

    `remove`: files that the new ones make stale. On failure the old files are back in place.
    """
    temporary = {path: f"{path}.tmp" for path in writers}
    kept = {path: f"{path}.old" for path in writers}
    done: list[str] = []
    try:
        for path, write in writers.items():
            write(temporary[path])
            sync(temporary[path])
        for path in writers:
            if os.path.exists(path):
                keep(path, kept[path])
            done.append(path)
            os.replace(temporary[path], path)
        done = []
        for path in remove:
            if os.path.exists(path):
                os.remove(path)
        for folder in {os.path.dirname(path) or "." for path in writers}:
            sync(folder)
    finally:
        for path in done:  # only after a failure
            if os.path.exists(kept[path]):
                os.replace(kept[path], path)
            elif not os.path.exists(temporary[path]):
                os.remove(path)
        for path in (*temporary.values(), *kept.values()):
            if os.path.exists(path):
                os.remove(path)


def keep(path: str, copy: str) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    if os.path.exists(copy):
        os.remove(copy)
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


def write_text(text: str) -> Callable[[str], None]:
    def write(path: str) -> None:
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)

    return write


def sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
