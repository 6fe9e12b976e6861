# SPDX-License-Identifier: Apache-2.0
"""`graft export`: an adapter in the one form that servers read right."""

from __future__ import annotations

from typing import Annotated

import typer

from graft.command import show
from graft.command.app import SERVE, Result, verb
from graft.files.errors import OptionError
from graft.files.serving import server_named, servers


@verb(SERVE)
def export(
    adapter: str,
    *,
    server: Annotated[str, typer.Option("--for", autocompletion=lambda: [*servers()])],
    output: str,
    base: str | None = None,
    rank: str | None = None,
    lossy: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Result:
    """Write an adapter so that a server reads it right: plain LoRA, which adds the same to the same base.

    The scale stands in B, all modules have one rank, target_modules are suffixes; PiSSA, OLoRA and KaSA get twice the
    rank, for the base as it was. Any other method that has a ΔW becomes a product of factors, of the lowest rank that
    holds it. What plain LoRA cannot hold (DoRA, modules_to_save) is refused with exit code 5: merge it.

    Example: graft export out/adapter --for vllm --base models/llama -o out/for_vllm

    Args:
        server: The server: vllm, sglang, llama.cpp, mlx, …
        rank: Of a method that is no LoRA: a rank, or the part of ‖ΔW‖² to keep. Else the lowest that holds it.
        lossy: Write a rank that leaves out much of ‖ΔW‖.
    """
    from graft.files import export as files
    from graft.files.base import base_files
    from graft.files.formats import read
    from graft.files.output import appearing, check_output
    from graft.files.sources import local, need_base

    server_named(server)
    rank_or_share = None if rank is None else number(rank)
    source = local(adapter)
    folder = need_base(source, base)
    check_output(output, [source, folder], force)
    model = base_files(folder)
    file = read(source, model)
    with appearing(output, not dry_run) as out:
        if rank_or_share is None and (file.method in ("LORA", "ADALORA") and file.changed_base is None):
            report = files.export(file, server, model, out)
        else:
            from graft.command.models import load_base, on
            from graft.files.export_model import export as of_model

            report = of_model(on(load_base(folder), source), "default", server, out, rank_or_share, lossy)

    def print_report() -> None:
        where = "(dry run)" if dry_run else output
        show.say(f"{where}: rank {report.rank} on {report.modules} modules, for {server}")
        for note in report.notes:
            show.say(f"  {note}")
        if report.rounding:
            show.say(f"  the dtype of the file rounds B by {report.rounding:.1g} of it")

    return Result({"output": None if dry_run else output, **vars(report)}, print_report)


def number(text: str) -> int | float:
    """Return a rank, or a part of the energy."""
    try:
        found: int | float = int(text) if text.isdigit() else float(text)
    except ValueError:
        found = 0
    if not (found >= 1 if isinstance(found, int) else 0 < found < 1):
        raise OptionError(f"--rank {text}: a rank, such as 16, or a part of ‖ΔW‖², such as 0.99.")
    return found
