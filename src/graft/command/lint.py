# SPDX-License-Identifier: Apache-2.0
"""`graft lint`: what looks wrong in an adapter."""

from __future__ import annotations

from dataclasses import asdict

from graft.command import show
from graft.command.app import LOOK, Result, verb


@verb(LOOK)
def lint(adapter: str, *, base: str | None = None, strict: bool = False) -> Result:
    """Look for what is wrong with an adapter: numbers, scales, keys, the config, the card. Exit code 1: a problem.

    Example: graft lint my-adapter --base my-model --strict

    Args:
        strict: Warnings count as problems.
    """
    from graft.files.bases import base_of
    from graft.files.lint import lint as findings_of
    from graft.files.sources import adapter_at, find_base, local, own_names

    source = local(adapter)
    model = own_names(source) if base is None else base_of(find_base(base))
    found = findings_of(adapter_at(source, model), model)
    bad = [f for f in found if f.severity == "error" or (strict and f.severity == "warning")]

    def report() -> None:
        for f in found:
            show.say(f"{f.severity:<8} {f.rule:<15} {f.text}")
            show.say(f"{'':<24} {f.remedy}")
        show.say(f"{len(bad)} problems, {len(found) - len(bad)} remarks")

    document = {"adapter": adapter, "findings": [asdict(f) for f in found], "problems": len(bad)}
    return Result(document, report, bool(bad))
