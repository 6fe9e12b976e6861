# SPDX-License-Identifier: Apache-2.0
"""`graft convert`: an adapter in another library's format."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from graft.command import show
from graft.command.app import CHANGE, app, print_json
from graft.files.errors import OptionError
from graft.files.formats import WRITTEN


@app.command(rich_help_panel=CHANGE)
def convert(
    adapter: show.Adapter,
    to: Annotated[
        str, typer.Option(autocompletion=lambda: [*WRITTEN], help=f"{', '.join(WRITTEN[:-1])} or {WRITTEN[-1]}.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A file or folder; next to the adapter if not given.")
    ] = None,
    base: show.Base = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Leave out what the format cannot hold, and list it.")] = False,
    force: show.Force = False,
    dry_run: show.DryRun = False,
    as_json: show.Json = False,
    quiet: show.Quiet = False,
) -> None:
    """Write an adapter in the format of another library. What that cannot hold is an error that lists it.

    Example: graft convert out/adapter --to gguf --base models/llama

    Or: graft convert style.safetensors --to peft --base models/sd -o out/style
    """
    from graft.files.convert import convert as run
    from graft.files.sources import local, with_base

    source = local(adapter)
    if source != adapter and output is None:
        raise OptionError(f"{adapter} is of the hub: say where the result goes (--output).")
    done = with_base(source, base, lambda path: run(source, to, output, path, lossy, force, dry_run))
    if as_json:
        print_json(asdict(done))
    elif not quiet:
        show.say(f"{done.of} → {done.to}: {done.modules} modules, {'would be ' * dry_run}in {place(done.path)}")
        if done.rounding:
            show.say(f"Scales are folded into B, which rounds its entries by {done.rounding:.1e} at most.")
        for line in done.lost:
            show.say(f"lost: {line}")


def place(path: str) -> str:
    """Return a path as people here would write it."""
    here = os.path.relpath(path)
    return path if here.startswith("..") else here
