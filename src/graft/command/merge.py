# SPDX-License-Identifier: Apache-2.0
"""`graft merge`: adapters into the files of their base, without the model in memory."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from graft.command import show
from graft.command.app import CHANGE, Result, verb
from graft.config.reading import Json
from graft.files.errors import OptionError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@verb(CHANGE)
def merge(
    base: str,
    adapters: list[str],
    *,
    output: Path,
    weights: str | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    certificate: bool = False,
    keep_quantized: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Result:
    """Merge adapters into the files of their base model, one weight at a time.

    The model is never in memory: one weight in float32 is, and what it is written as. A run that was
    killed goes on when the same command runs again.

    Example: graft merge models/llama out/adapter -o models/llama-merged --certificate

    Args:
        base: Folder or hub id of the base model: config.json and safetensors files.
        adapters: Adapters, merged in this order: folders, files, hub ids.
        output: Folder to write.
        weights: A weight for each adapter, by commas: 0.7,0.3
        dtype: float32, float16 or bfloat16 for all; else each its own.
        shard_size: Largest file: 5GB. Else the base's files.
        certificate: Write merge.json.
        keep_quantized: A quantized base stays so.
    """
    from graft.files.merging.methods import merge_files
    from graft.files.sources import find_base, local

    sources = [local(adapter) for adapter in adapters]
    account = merge_files(
        find_base(base), sources, output, weights=None if weights is None else numbers(weights), dtype=dtype,
        shard_size=None if shard_size is None else size(shard_size), certificate=certificate,
        keep_quantized=keep_quantized, force=force, dry_run=dry_run,
    )  # fmt: skip
    found: Json = {
        "output": str(output), "written": not dry_run, "shards": account.shards, "tensors": account.tensors,
        "notes": account.notes, "resumed": account.resumed,
    }  # fmt: skip
    return Result(found, partial(report, found))


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--weights takes numbers, by commas, not {text!r}.") from None


def size(text: str) -> int:
    """Return a size in bytes: "5GB" is five thousand million."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    unit = None if found is None else UNITS.get(found[2] if found[2].endswith("B") or not found[2] else f"{found[2]}B")
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise OptionError(f"A size is a number with KB, MB or GB behind it, not {text!r}.")
    return int(float(found[1]) * unit)


def report(found: Json) -> None:
    """Print what was done, in a few lines."""
    changed, total = found["tensors"], sum(found["shards"].values())
    done = "Merged" if found["written"] else "Would merge"
    resumed = f", {found['resumed']} of them from an earlier run" if found["resumed"] else ""
    size, files = f"{total / 1e9:.2f} GB" if total >= 1e8 else f"{total / 1e6:.2f} MB", len(found["shards"])
    show.say(
        f"{done} into {len(changed)} tensors: {found['output']}, {size} in {files} file{'s'[: files > 1]}{resumed}."
    )
    rows = [row for row in changed.values() if "update" in row]
    if rows:
        shares = sorted(row["update"] / row["weight"] for row in rows if row["weight"])
        middle = shares[len(shares) // 2] if shares else 0.0
        show.say(f"The update is {middle:.2%} of the weight in the median; rounding kept "
              f"{min(row['kept'] for row in rows):.1%} of it or more.")  # fmt: skip
    for note in found["notes"]:
        show.say(note)
