# SPDX-License-Identifier: Apache-2.0
"""`graft convert`: an adapter in another library's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.command.app import app, print_json


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="A file or folder with an adapter, of any format.")],
    to: Annotated[
        str, typer.Option("--to", help="gguf, torchtune, litgpt, peft, mlx, adapterhub, kohya or diffusers.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A file or folder; next to the adapter if not given.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base model: its names and sizes; a config.json is enough.")
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Leave out what the format cannot hold, and say what.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but leave a result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One document for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Write an adapter in the format of another library. What that cannot hold is an error that lists it.

    Example: graft convert out/adapter --to gguf --base models/llama
    Or: graft convert style.safetensors --to peft --base models/sd -o out/style
    """
    from graft.files.convert import convert as run

    done = run(adapter, to, out, base, lossy, force, dry_run)
    if as_json:
        print_json(done.as_dict())
    elif not quiet:
        print(f"{done.of} → {done.to}: {done.modules} modules, {'would be ' * dry_run}in {done.path}")
        if done.rounding:
            print(f"Scales are folded into B, which rounds its entries by {done.rounding:.1e} at most.")
        for line in done.lost:
            print(f"lost: {line}")
