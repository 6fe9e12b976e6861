# SPDX-License-Identifier: Apache-2.0
"""`graft convert`: an adapter in another library's format."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from graft.command import show
from graft.command.app import CHANGE, Result, verb
from graft.files.errors import OptionError
from graft.files.formats import WRITTEN


@verb(CHANGE)
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
    """Write an adapter in the format of another library. What that cannot hold is an error that lists it.

    Example: graft convert out/adapter --to gguf --base models/llama

    Or: graft convert style.safetensors --to peft --base models/sd -o out/style

    Args:
        output: A file or folder; next to the adapter if not given.
        lossy: Leave out what the format cannot hold, and list it.
    """
    from graft.files.convert import convert as run
    from graft.files.sources import local, with_base

    source = local(adapter)
    if source != adapter and output is None:
        raise OptionError(f"{adapter} is of the hub: say where the result goes (--output).")
    done = with_base(source, base, lambda model: run(source, to, output, model, lossy, force, dry_run))

    def report() -> None:
        show.say(f"{done.of} → {done.to}: {done.modules} modules, {'would be ' * dry_run}in {place(done.path)}")
        if done.rounding:
            show.say(f"Scales are folded into B, which rounds its entries by {done.rounding:.1e} at most.")
        for line in done.lost:
            show.say(f"lost: {line}")

    return Result(asdict(done), report)


def place(path: str) -> str:
    """Return a path as people here would write it."""
    here = os.path.relpath(path)
    return path if here.startswith("..") else here
