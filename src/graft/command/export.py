# SPDX-License-Identifier: Apache-2.0
"""`graft export`: an adapter in the one form that servers read right."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from graft.command.app import app, print_json
from graft.core.errors import ConfigError


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="A folder or file with an adapter.")],
    server: Annotated[str, typer.Option("--for", help="The server: vllm, sglang, llama.cpp, mlx, …")],
    base: Annotated[Path, typer.Option(help="Folder of the model that it serves.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder, or file, to write.")],
    rank: Annotated[
        str | None,
        typer.Option(help="Of a method that is no LoRA: a rank, or the part of ‖ΔW‖² to keep, such as 0.99."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Write over what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One document for programs.")] = False,
) -> None:
    """Write an adapter so that a server reads it right: plain LoRA, which adds the same to the same base.

    The scale stands in B, all modules have one rank, target_modules are suffixes; PiSSA and OLoRA get twice the rank,
    for the base as it was. Any other method that has a ΔW becomes a product of factors, and the error is printed.
    What plain LoRA cannot hold (DoRA, modules_to_save) is refused with exit code 5: merge it.

    Example: graft export out/adapter --for vllm --base models/llama -o out/for_vllm
    """
    from graft.files import export as files
    from graft.files import formats
    from graft.files.base import base_files
    from graft.files.errors import OutputExistsError

    if out.exists() and not force and (out.is_file() or any(out.iterdir())):
        raise OutputExistsError(f"{out} is there already: --force writes over it.")
    if out.exists() and adapter.exists() and os.path.samefile(out, adapter):
        raise OutputExistsError(f"{out} is the adapter itself: sources stay as they are.")
    given = None if rank is None else number(rank)
    model = base_files(base)
    held = formats.read(adapter, model)
    if given is None and (held.method == "LORA" and held.changed_base is None):
        report = files.export(held, server, model, str(out))
    else:
        from graft.command.models import load_base, on
        from graft.model.export import export as of_model

        files.server_named(server)
        report = of_model(on(load_base(base), adapter), "default", server, str(out), given)
    if as_json:
        print_json({"out": str(out), **vars(report)})
    elif not quiet:
        print(f"{out}: rank {report.rank} on {report.modules} modules, for {server}")
        for note in report.notes:
            print(f"  {note}")
        if report.rounding:
            print(f"  the dtype of the file rounds B by {report.rounding:.1g} of it")
        sys.stdout.flush()


def number(text: str) -> int | float:
    """Return a rank, or a part of the energy."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ConfigError(f"--rank {text}: a rank, such as 16, or a part of ‖ΔW‖², such as 0.99.") from None
