# SPDX-License-Identifier: Apache-2.0
"""`graft resize`: smaller ranks for a LoRA adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from graft.command import show
from graft.command.app import CHANGE, Result, verb

if TYPE_CHECKING:
    from graft.files.base import Known
    from graft.files.resize import Resized


@verb(CHANGE)
def resize(
    adapter: str,
    *,
    output: str,
    base: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    max_mb: float | None = None,
    max_rank: int | None = None,
    uniform: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Result:
    """Give a LoRA adapter smaller ranks, by rank, energy, ratio or size; show what each module keeps.

    Example: graft resize my-adapter -o smaller --energy 0.95

    Args:
        rank: The rank of all modules.
        energy: Part of Σσ² that each module keeps, of 1.
        ratio: Keep σ above the largest / ratio.
        max_mb: Megabytes of the file; least loss.
        max_rank: Highest rank of a module, beside any other limit.
        uniform: One rank for all modules.
    """
    from graft.files.formats import peft
    from graft.files.output import appearing, check_output
    from graft.files.resize import resize as resized
    from graft.files.sources import adapter_at, local, with_base

    source = local(adapter)

    def run(model: Known | None) -> list[Resized]:
        check_output(output, [source, *([] if model is None else [model.path])], force)
        made, rows = resized(adapter_at(source, model), rank, energy, ratio, max_mb, max_rank, uniform)
        with appearing(output, not dry_run) as out:
            peft.write(made, out, model)
        return rows

    rows = with_base(source, base, run)
    whole = sum(r.size**2 for r in rows)
    share = sum(r.energy * r.size**2 for r in rows) / whole if whole else 1.0
    document = {
        "adapter": adapter, "output": None if dry_run else output, "modules": [asdict(r) for r in rows],
        "energy": share,
    }  # fmt: skip

    def report() -> None:
        show.table(
            "", ["module", "rank before", "after", "energy left", "‖ΔW‖ before"],
            [(r.module, r.before, r.after, f"{r.energy:.2%}", r.size) for r in rows],
        )  # fmt: skip
        before, after = (sum(getattr(r, name) for r in rows) for name in ("before", "after"))
        show.say(
            f"{before} → {after} ranks in all, {share:.2%} of the energy" + (" (dry run)" if dry_run else f": {output}")
        )

    return Result(document, report)
