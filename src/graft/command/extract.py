# SPDX-License-Identifier: Apache-2.0
"""`graft extract`: an adapter from a fine-tuned model and its base."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from graft.command import show
from graft.command.app import CHANGE, app, print_json


@app.command("extract", rich_help_panel=CHANGE)
def extract(
    tuned: Annotated[str, typer.Argument(help="Folder or hub id of the fine-tuned model.")],
    base: Annotated[str, typer.Argument(help="Folder or hub id of its base.")],
    output: show.Output,
    rank: Annotated[int | None, typer.Option(help="Highest rank of a module; 32 if no option limits it.")] = None,
    energy: Annotated[float | None, typer.Option(help="Part of ‖Δ‖² that each module keeps, of 1.")] = None,
    max_mb: Annotated[float | None, typer.Option(help="Megabytes of the file; least loss.")] = None,
    include: Annotated[str | None, typer.Option(help="Names to take, as in a shell: `*.mlp.*`.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Names to leave out.")] = None,
    embed: Annotated[str, typer.Option(help="How to keep embeddings and heads: lora or full.")] = "full",
    force: show.Force = False,
    dry_run: show.DryRun = False,
    as_json: show.Json = False,
    quiet: show.Quiet = False,
) -> None:
    """Make a LoRA adapter of the difference between two checkpoints, a matrix at a time.

    Example: graft extract my-tuned-model my-base -o adapter --rank 64
    """
    from graft.files.base import base_files
    from graft.files.extract import extract as extracted
    from graft.files.formats import peft
    from graft.files.output import appearing, check_output
    from graft.files.sources import find_base

    folders = find_base(tuned), find_base(base)
    check_output(output, [*folders], force)
    models = base_files(folders[0]), base_files(folders[1])
    made = extracted(
        *models, rank, energy, max_mb, include, exclude, embed, lambda name: show.log(name, quiet or as_json)
    )
    with appearing(output, not dry_run) as out:
        peft.write(made.adapter, out)
    if as_json:
        print_json({
            "output": None if dry_run else output, "tensors": [asdict(r) for r in made.rows], "unchanged": made.same,
        })  # fmt: skip
    elif not quiet:
        show.table(
            "", ["tensor", "kept as", "rank", "energy kept", "‖Δ‖", "‖Δ‖/‖W‖"],
            [(r.name, r.how, r.rank or None, f"{r.energy:.2%}", r.size, r.relative) for r in made.rows],
        )  # fmt: skip
        show.say(f"{len(made.rows)} tensors, {made.same} unchanged" + (" (dry run)" if dry_run else f": {output}"))
