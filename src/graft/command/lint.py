# SPDX-License-Identifier: Apache-2.0
"""`graft lint`: what looks wrong in an adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from graft.command import show
from graft.command.app import FOUND, LOOK, app, print_json


@app.command("lint", rich_help_panel=LOOK)
def lint(
    adapter: show.Adapter,
    base: show.Base = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as problems.")] = False,
    as_json: show.Json = False,
    quiet: show.Quiet = False,
) -> None:
    """Look for what is wrong with an adapter: numbers, scales, keys, the config, the card. Exit code 1: a problem.

    Example: graft lint my-adapter --base my-model --strict
    """
    from graft.files.bases import base_of
    from graft.files.lint import lint as findings_of
    from graft.files.sources import adapter_at, find_base, local, own_names

    source = local(adapter)
    model = own_names(source) if base is None else base_of(find_base(base))
    found = findings_of(adapter_at(source, model), model)
    bad = [f for f in found if f.severity == "error" or (strict and f.severity == "warning")]
    if as_json:
        print_json({"adapter": adapter, "findings": [asdict(f) for f in found], "problems": len(bad)})
    elif not quiet:
        for f in found:
            show.say(f"{f.severity:<8} {f.rule:<15} {f.text}")
            show.say(f"{'':<24} {f.remedy}")
        show.say(f"{len(bad)} problems, {len(found) - len(bad)} remarks")
    if bad:
        raise typer.Exit(FOUND)
