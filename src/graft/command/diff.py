# SPDX-License-Identifier: Apache-2.0
"""`graft diff`: what tells two adapters apart."""

from __future__ import annotations

from graft.command import show
from graft.command.app import LOOK, Result, verb


@verb(LOOK)
def diff(a: str, b: str, *, base: str | None = None, tol: float = 1e-6) -> Result:
    """Compare two adapters by what they do to each weight, whatever their format and ranks. Exit code 1: unequal.

    Example: graft diff before after --tol 1e-3

    Args:
        a: Folder, file, or hub id (user/repo@revision).
        b: Folder, file, or hub id (user/repo@revision).
        tol: Relative ‖ΔW_a - ΔW_b‖ that counts as equal.
    """
    if base is None:
        show.one_thread()
    from graft.files.diff import difference
    from graft.files.sources import adapter_at, local, with_base

    one, two = local(a), local(b)
    found = with_base(one, base, lambda model: difference(adapter_at(one, model), adapter_at(two, model), tol))

    def report() -> None:
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

    return Result(found, report, not found["equal"])


def degrees(angle: float | None) -> str | None:
    return None if angle is None else f"{angle:.2f}°"
