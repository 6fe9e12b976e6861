# SPDX-License-Identifier: Apache-2.0
"""`graft resize`: smaller ranks for a LoRA adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from graft.command import show
from graft.command.app import CHANGE, app, print_json

if TYPE_CHECKING:
    from graft.files.resize import Resized


@app.command("resize", rich_help_panel=CHANGE)
def resize(
    adapter: show.Adapter,
    output: show.Output,
    base: show.Base = None,
    rank: Annotated[int | None, typer.Option(help="The rank of all modules.")] = None,
    energy: Annotated[float | None, typer.Option(help="Part of Σσ² that each module keeps, of 1.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Keep σ above the largest / ratio.")] = None,
    max_mb: Annotated[float | None, typer.Option(help="Megabytes of the file; least loss.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Highest rank of a module, beside any other limit.")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="One rank for all modules.")] = False,
    force: show.Force = False,
    dry_run: show.DryRun = False,
    as_json: show.Json = False,
    quiet: show.Quiet = False,
) -> None:
    """Give a LoRA adapter smaller ranks, by rank, energy, ratio or size; show what each module keeps.

    Example: graft resize my-adapter -o smaller --energy 0.95
    """
    from graft.files.bases import base_of
    from graft.files.formats import peft
    from graft.files.output import appearing, check_output
    from graft.files.resize import resize as resized
    from graft.files.sources import adapter_at, local, with_base

    source = local(adapter)

    def run(path: str | None) -> list[Resized]:
        check_output(output, [source, *([] if path is None else [path])], force)
        known = None if path is None else base_of(path)
        made, rows = resized(adapter_at(source, known), rank, energy, ratio, max_mb, max_rank, uniform)
        with appearing(output, not dry_run) as out:
            peft.write(made, out, known)
        return rows

    rows = with_base(source, base, run)
    whole = sum(r.size**2 for r in rows)
    share = sum(r.energy * r.size**2 for r in rows) / whole if whole else 1.0
    if as_json:
        print_json({
            "adapter": adapter, "output": None if dry_run else output, "modules": [asdict(r) for r in rows],
            "energy": share,
        })  # fmt: skip
    elif not quiet:
        show.table(
            "", ["module", "rank before", "after", "energy left", "‖ΔW‖ before"],
            [(r.module, r.before, r.after, f"{r.energy:.2%}", r.size) for r in rows],
        )  # fmt: skip
        before, after = (sum(getattr(r, name) for r in rows) for name in ("before", "after"))
        show.say(
            f"{before} → {after} ranks in all, {share:.2%} of the energy" + (" (dry run)" if dry_run else f": {output}")
        )
