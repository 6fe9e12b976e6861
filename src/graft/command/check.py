# SPDX-License-Identifier: Apache-2.0
"""`graft check`: what servers would do with an adapter, before one is started."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from graft.command import show
from graft.command.app import SERVE, Result, verb
from graft.core.errors import escape_controls
from graft.files.errors import OptionError
from graft.files.serving import Finding, Options, servers


def by_commas(incomplete: str) -> list[str]:
    """Return what a list of servers may go on with, for the shell."""
    before, comma, _ = incomplete.rpartition(",")
    return [before + comma + name for name in servers() if name not in before.split(",")]


COLOURS = {"refused": "yellow", "wrong": "red", "ignored": "red", "ok": "green"}


@verb(SERVE)
def check(
    adapter: str,
    *,
    servers_: Annotated[str, typer.Option("--for", autocompletion=by_commas)],
    base: str | None = None,
    max_rank: Annotated[int | None, typer.Option(min=1)] = None,
    targets: Annotated[str | None, typer.Option("--lora-target-modules")] = None,
) -> Result:
    """Say what servers would do with an adapter: refuse it, compute something else, ignore it.

    A server that ignores an adapter answers as its base, without a word. What is known of each stands in a file of
    data, with the version that was run or read and the date. Exit code 1 if one would not apply the adapter as it is.

    Example: graft check out/adapter --for vllm,sglang --base models/llama

    Args:
        servers_: Servers, by commas: vllm,sglang,llama.cpp,lorax,mlx,diffusers,…
        max_rank: --max-lora-rank of the server.
        targets: The server's option of that name, by commas.
    """
    from graft.files import serving
    from graft.files.bases import base_of
    from graft.files.sources import adapter_at, find_base, local, own_names

    options = Options(max_rank, None if targets is None else tuple(show.listed(targets)))
    names = show.listed(servers_)
    if not names:
        raise OptionError(f"--for names no server; there are {', '.join(servers())}.")
    source = local(adapter)
    model = own_names(source) if base is None else base_of(find_base(base))
    found = serving.check(adapter_at(source, model), names, model, options)
    document = {"adapter": adapter, "servers": names, "findings": [asdict(f) for f in found]}
    return Result(document, partial(report, names, found, model is not None), not all(f.ok for f in found))


def report(names: list[str], found: list[Finding], compared: bool) -> None:
    """Print the findings by server."""
    known = servers()
    for name in names:
        typer.echo(f"{typer.style(name, bold=True)} {known[name].version}, as of {known[name].date}")
        findings = [f for f in found if f.server == name]
        for f in findings:
            note = "" if f.evidence == "run" else f" ({f.evidence})"
            line = escape_controls(f": {name} {f.does}{note}: {f.what}")
            typer.echo(f"  {typer.style(f.verdict, fg=COLOURS[f.verdict])}{line}")
            if f.remedy:
                show.say(f"    → {f.remedy}")
        if not findings:
            typer.echo(f"  {typer.style('ok', fg='green')}: nothing is known that it would not do")
    if not compared:
        show.say("Names of modules were not compared: give the model with --base.")
