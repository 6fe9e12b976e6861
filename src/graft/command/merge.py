# SPDX-License-Identifier: Apache-2.0
"""`graft merge`: adapters into the files of their base, without the model in memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from graft.command import show
from graft.command.app import CHANGE, app, print_json
from graft.config.reading import Json
from graft.files.errors import OptionError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@app.command(rich_help_panel=CHANGE)
def merge(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the base model: config.json and safetensors files.")],
    adapters: Annotated[list[str], typer.Argument(help="Adapters, merged in this order: folders, files, hub ids.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    weights: Annotated[str | None, typer.Option(help="A weight for each adapter, by commas: 0.7,0.3")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16 for all; else each its own.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Largest file: 5GB. Else the base's files.")] = None,
    certificate: Annotated[bool, typer.Option("--certificate", help="Write merge.json.")] = False,
    keep_quantized: Annotated[bool, typer.Option("--keep-quantized", help="A quantized base stays so.")] = False,
    force: show.Force = False,
    dry_run: show.DryRun = False,
    quiet: show.Quiet = False,
    as_json: show.Json = False,
) -> None:
    """Merge adapters into the files of their base model, one weight at a time.

    The model is never in memory: one weight in float32 is, and what it is written as. A run that was
    killed goes on when the same command runs again.

    Example: graft merge models/llama out/adapter -o models/llama-merged --certificate
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
    if as_json:
        print_json(found)
    elif not quiet:
        report(found)


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
