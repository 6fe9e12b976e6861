# SPDX-License-Identifier: Apache-2.0
"""`graft diff`: what tells two adapters apart."""

from __future__ import annotations

from typing import Annotated

import typer

from graft.command import show
from graft.command.app import FOUND, LOOK, app, print_json
from graft.config.reading import Json


@app.command("diff", rich_help_panel=LOOK)
def diff(
    a: show.Adapter,
    b: show.Adapter,
    base: show.Base = None,
    tol: Annotated[float, typer.Option(help="Relative ‖ΔW_a - ΔW_b‖ that counts as equal.")] = 1e-6,
    as_json: show.Json = False,
    quiet: show.Quiet = False,
) -> None:
    """Compare two adapters by what they do to each weight, whatever their format and ranks. Exit code 1: unequal.

    Example: graft diff before after --tol 1e-3
    """
    if base is None:
        show.one_thread()
    from graft.files.bases import base_of
    from graft.files.diff import difference
    from graft.files.sources import adapter_at, local, with_base

    sources = local(a), local(b)

    def run(path: str | None) -> Json:
        known = None if path is None else base_of(path)
        return difference(adapter_at(sources[0], known), adapter_at(sources[1], known), tol)

    found = with_base(sources[0], base, run)
    if as_json:
        print_json(found)
    elif not quiet:
        show.table("Settings", ["field", "a", "b"], [(name, *map(repr, two)) for name, two in found["config"].items()])
        show.facts([("only in a", found["only_a"]), ("only in b", found["only_b"])])
        show.table(
            "Modules", ["module", "ranks", "cosine", "relative difference", "largest angle"],
            [
                (m["module"], m.get("ranks"), m.get("cosine"), m["relative"], degrees(m.get("angle")))
                for m in found["modules"]
            ],
        )  # fmt: skip
        show.table("Tensors", ["tensor", "relative difference"], [t.values() for t in found["tensors"]])
        more = "".join(f", another {name}" for name in found["acts_otherwise"])
        show.say("equal" if found["equal"] else f"not equal: largest relative difference {found['largest']:.4g}{more}")
    if not found["equal"]:
        raise typer.Exit(FOUND)


def degrees(angle: float | None) -> str | None:
    return None if angle is None else f"{angle:.2f}°"
