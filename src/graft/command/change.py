# SPDX-License-Identifier: Apache-2.0
"""`graft resize`, `extract`, `merge`, `convert`: smaller ranks, adapters of models, merged models, other formats."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.command import show
from graft.command.app import Result, add_verb
from graft.config.reading import Json
from graft.files.errors import OptionError
from graft.files.formats import WRITTEN

if TYPE_CHECKING:
    from graft.files.base import BaseDescription
    from graft.files.resize import ResizedModule


@add_verb
def resize(
    adapter: str,
    *,
    output: str,
    base: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    max_mb: float | None = None,
    max_rank: int | None = None,
    uniform: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Result:
    """Reduce the ranks of a LoRA adapter, by rank, energy, ratio or size; show the loss of each module.

    Example: graft resize my-adapter -o smaller --energy 0.95

    Args:
        rank: The rank of all modules.
        energy: Share of Σσ² that each module keeps, in (0, 1].
        ratio: Keep σ above the largest / ratio.
        max_mb: Megabytes of the file; least loss.
        max_rank: Highest rank of a module, in addition to any other limit.
        uniform: One rank for all modules.

    Returns:
        The document has adapter, output (None in a dry run), modules, and energy: the share left over all modules,
        weighted by ‖ΔW‖², 1 if all are 0. The base is only read if the adapter needs one, or `base` is given.
    """
    from graft.files.formats import peft
    from graft.files.resize import resize_adapter as resized
    from graft.files.sources import check_output, open_adapter, place_when_done, resolve_adapter, run_with_base

    source = resolve_adapter(adapter)

    def run(model: BaseDescription | None) -> list[ResizedModule]:
        """Check the output path, read the adapter with the base `model`, resize it, and write it in PEFT's format.

        Return the account of each module.

        In a dry run the result is written to a temporary folder and deleted; the output path is checked all the same.
        """
        check_output(output, [source, *([] if model is None else [model.path])], force)
        smaller, rows = resized(open_adapter(source, model), rank, energy, ratio, max_mb, max_rank, uniform)
        with place_when_done(output, not dry_run) as out:
            peft.write(smaller, out, model)
        return rows

    rows = run_with_base(source, base, run)
    whole = sum(r.size**2 for r in rows)
    share = sum(r.energy * r.size**2 for r in rows) / whole if whole else 1.0
    document = {
        "adapter": adapter, "output": None if dry_run else output, "modules": [asdict(r) for r in rows],
        "energy": share,
    }  # fmt: skip

    def report() -> None:
        """Print a table with the ranks before and after, the energy left and ‖ΔW‖ of each module.

        A line follows with the sums of ranks, the share of energy left over all modules, weighted by ‖ΔW‖², and the
        output, or "(dry run)".
        """
        show.print_table(
            "", ["module", "rank before", "after", "energy left", "‖ΔW‖ before"],
            [(r.module, r.before, r.after, f"{r.energy:.2%}", r.size) for r in rows],
        )  # fmt: skip
        before, after = (sum(getattr(r, name) for r in rows) for name in ("before", "after"))
        show.print_line(
            f"{before} → {after} ranks in all, {share:.2%} of the energy" + (" (dry run)" if dry_run else f": {output}")
        )

    return Result(document, report)


@add_verb
def extract(
    tuned: str,
    base: str,
    *,
    output: str,
    rank: int | None = None,
    energy: float | None = None,
    max_mb: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    embed: str = "full",
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Result:
    """Make a LoRA adapter of the difference between two checkpoints, one matrix at a time.

    Example: graft extract my-tuned-model my-base -o adapter --rank 64

    Args:
        tuned: Folder or hub id of the fine-tuned model.
        base: Folder or hub id of its base.
        rank: Highest rank of a module; 32 if no option limits it.
        energy: Share of ‖Δ‖² that each module keeps, in (0, 1].
        max_mb: Megabytes of the file; least loss.
        include: Names to take, as in a shell: `*.mlp.*`.
        exclude: Names to leave out.
        embed: How to keep embeddings and heads: lora or full.

    Returns:
        The document has output (None in a dry run), the changed tensors, and the number of unchanged ones. The output
        path is checked first. Names of tensors are shown as progress, unless `quiet`.
    """
    from graft.files.base import read_base_files
    from graft.files.extract import extract_adapter as extracted
    from graft.files.formats import peft
    from graft.files.sources import check_output, find_base, place_when_done

    folders = find_base(tuned), find_base(base)
    check_output(output, [*folders], force)
    models = read_base_files(folders[0]), read_base_files(folders[1])
    done = extracted(
        *models, rank, energy, max_mb, include, exclude, embed, lambda name: show.print_progress(name, quiet)
    )
    with place_when_done(output, not dry_run) as out:
        peft.write(done.adapter, out)
    document = {
        "output": None if dry_run else output, "tensors": [asdict(r) for r in done.rows], "unchanged": done.same,
    }  # fmt: skip

    def report() -> None:
        """Print a table of the changed tensors, then a line with the numbers of changed and unchanged ones, and the
        output or "(dry run)".
        """
        show.print_table(
            "", ["tensor", "kept as", "rank", "energy kept", "‖Δ‖", "‖Δ‖/‖W‖"],
            [(r.name, r.how, r.rank or None, f"{r.energy:.2%}", r.size, r.relative) for r in done.rows],
        )  # fmt: skip
        show.print_line(
            f"{len(done.rows)} tensors, {done.same} unchanged" + (" (dry run)" if dry_run else f": {output}")
        )

    return Result(document, report)


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@add_verb
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

    Only one weight in float32 and its written form are in memory, never the model. After a kill, the same command
    continues the run.

    Example: graft merge models/llama out/adapter -o models/llama-merged --certificate

    Args:
        base: Folder or hub id of the base model: config.json and safetensors files.
        adapters: Adapters, merged in this order: folders, files, hub ids.
        output: Folder to write.
        weights: A weight for each adapter, by commas: 0.7,0.3
        dtype: float32, float16 or bfloat16 for all; default: unchanged.
        shard_size: Largest file: 5GB. Default: the base's files.
        certificate: Write merge.json.
        keep_quantized: Keep a quantized base quantized.

    Returns:
        The document has output, written (False in a dry run), shards, tensors, notes and resumed, as `Merged`.
    """
    from graft.files.merging.merge import merge_files
    from graft.files.sources import find_base, resolve_adapter

    sources = [resolve_adapter(adapter) for adapter in adapters]
    account = merge_files(
        find_base(base), sources, output, weights=None if weights is None else parse_weights(weights), dtype=dtype,
        shard_size=None if shard_size is None else parse_size(shard_size), certificate=certificate,
        keep_quantized=keep_quantized, force=force, dry_run=dry_run,
    )  # fmt: skip
    document: Json = {**vars(account), "written": not dry_run}
    return Result(document, partial(print_merge, document))


def parse_weights(text: str) -> list[float]:
    """Return the numbers in a text with commas between them, as floats. Raises OptionError if one is no number."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--weights {text!r} is no list of numbers. Give one for each adapter: 0.7,0.3.") from None


def parse_size(text: str) -> int:
    """Return a size in bytes, rounded down: "5GB", "5 gb" and "5G" are 5 · 10⁹, "5" is 5.

    Units are KB, MB and GB, powers of 1000, and B.

    Raises OptionError for other texts and for less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    unit = None if match is None else UNITS.get(match[2] if match[2].endswith("B") or not match[2] else f"{match[2]}B")
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise OptionError(f"The size {text!r} is no number with KB, MB or GB. Give one such as 5GB.")
    return int(float(match[1]) * unit)


def print_merge(document: Json) -> None:
    """Print a merge's result: the number of tensors, the output, its size in MB, or in GB from 10^8 bytes on, the
    number of files, and tensors of an earlier run. The line begins with "Merged", or for a dry run with "Would merge".

    If any tensor has an update, a line follows with the median of update / weight, and the least share that rounding
    kept. Each note is a line.
    """
    changed, total = document["tensors"], sum(document["shards"].values())
    done = "Merged" if document["written"] else "Would merge"
    resumed = f", {document['resumed']} of them from an earlier run" if document["resumed"] else ""
    size, files = f"{total / 1e9:.2f} GB" if total >= 1e8 else f"{total / 1e6:.2f} MB", len(document["shards"])
    show.print_line(
        f"{done} into {len(changed)} tensors: {document['output']}, {size} in {files} file{'s'[: files > 1]}{resumed}."
    )
    rows = [row for row in changed.values() if "update" in row]
    if rows:
        shares = sorted(row["update"] / row["weight"] for row in rows if row["weight"])
        middle = shares[len(shares) // 2] if shares else 0.0
        show.print_line(f"The update is {middle:.2%} of the weight in the median; rounding kept "
              f"{min(row['kept'] for row in rows):.1%} of it or more.")  # fmt: skip
    for note in document["notes"]:
        show.print_line(note)


@add_verb
def convert(
    adapter: str,
    *,
    to: Annotated[
        str, typer.Option(autocompletion=lambda: [*WRITTEN], help=f"{', '.join(WRITTEN[:-1])} or {WRITTEN[-1]}.")
    ],
    output: str | None = None,
    base: str | None = None,
    lossy: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Result:
    """Write an adapter in the format of another library.

    Parts that the format cannot hold are an error that lists them.

    Example: graft convert out/adapter --to gguf --base models/llama

    Or: graft convert style.safetensors --to peft --base models/sd -o out/style

    Args:
        output: A file or folder; default: next to the adapter.
        lossy: Leave those parts out, and list them.

    Returns:
        The document has the fields of `Conversion`. The report is a line with formats, path and counts, one for a
            rounding, and one for each lost part. The base is only read if a format needs one, or `base` is given.

    Raises:
        OptionError: the adapter is a hub id, and there is no `output`. It comes after `resolve_adapter`, which
            downloads the adapter.
    """
    from graft.files.convert import convert_adapter_file as run
    from graft.files.sources import resolve_adapter, run_with_base

    source = resolve_adapter(adapter)
    if source != adapter and output is None:
        raise OptionError(f"{adapter} is from the hub. Give a path for the result (--output).")
    done = run_with_base(source, base, lambda model: run(source, to, output, model, lossy, force, dry_run))

    def report() -> None:
        """Print a line with formats, path, and the numbers of modules and of other tensors, each unless 0.

        A line with the rounding follows unless it is 0, then one for each lost part.
        """
        counts = {"modules": done.modules, "tensors outside of modules": done.tensors}
        parts = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        show.print_line(f"{done.of} → {done.to}: {parts}, {'would be ' * dry_run}in {shorten_path(done.path)}")
        if done.rounding:
            show.print_line(f"Scales are folded into B, which rounds its entries by {done.rounding:.1e} at most.")
        for line in done.lost:
            show.print_line(f"lost: {line}")

    return Result(asdict(done), report)


def shorten_path(path: str) -> str:
    """Return a path relative to the working directory; `path` itself if the relative one begins with ".."."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
