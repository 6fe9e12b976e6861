# SPDX-License-Identifier: Apache-2.0
"""`graft extract`: an adapter from a fine-tuned model and its base."""

from __future__ import annotations

from dataclasses import asdict

from graft.command import show
from graft.command.app import CHANGE, Result, verb


@verb(CHANGE)
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
    """Make a LoRA adapter of the difference between two checkpoints, a matrix at a time.

    Example: graft extract my-tuned-model my-base -o adapter --rank 64

    Args:
        tuned: Folder or hub id of the fine-tuned model.
        base: Folder or hub id of its base.
        rank: Highest rank of a module; 32 if no option limits it.
        energy: Part of ‖Δ‖² that each module keeps, of 1.
        max_mb: Megabytes of the file; least loss.
        include: Names to take, as in a shell: `*.mlp.*`.
        exclude: Names to leave out.
        embed: How to keep embeddings and heads: lora or full.
    """
    from graft.files.base import base_files
    from graft.files.extract import extract as extracted
    from graft.files.formats import peft
    from graft.files.output import appearing, check_output
    from graft.files.sources import find_base

    folders = find_base(tuned), find_base(base)
    check_output(output, [*folders], force)
    models = base_files(folders[0]), base_files(folders[1])
    made = extracted(*models, rank, energy, max_mb, include, exclude, embed, lambda name: show.log(name, quiet))
    with appearing(output, not dry_run) as out:
        peft.write(made.adapter, out)
    document = {
        "output": None if dry_run else output, "tensors": [asdict(r) for r in made.rows], "unchanged": made.same,
    }  # fmt: skip

    def report() -> None:
        show.table(
            "", ["tensor", "kept as", "rank", "energy kept", "‖Δ‖", "‖Δ‖/‖W‖"],
            [(r.name, r.how, r.rank or None, f"{r.energy:.2%}", r.size, r.relative) for r in made.rows],
        )  # fmt: skip
        show.say(f"{len(made.rows)} tensors, {made.same} unchanged" + (" (dry run)" if dry_run else f": {output}"))

    return Result(document, report)
