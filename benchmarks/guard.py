# SPDX-License-Identifier: Apache-2.0
"""Which goals were met once, so that losing one is noticed."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.measure import Row

RECORD = Path(__file__).with_name("met.json")
LEAST_NOISE = 0.08  # of a ratio, on a quiet machine


def noise(row: Row) -> float:
    """How far a ratio of this row may be off: the spreads of its values, together."""
    return max(LEAST_NOISE, sum(row.spread(who) for who in row.values if len(row.values[who]) > 2))


def met_once() -> dict[str, str]:
    """Row → its goal, of those that some run met."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def record(rows: list[Row]) -> None:
    """Note the rows whose goal is met, beside those noted before: one that is lost stays noted, to be found."""
    known = met_once()
    for row in rows:
        if row.goal.met(row):
            known[row.what] = str(row.goal)
    RECORD.write_text(json.dumps(known, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def lost(rows: list[Row]) -> list[str]:
    """What was met and now falls short by more than the noise."""
    known = met_once()
    out = []
    for row in rows:
        goal, slack = row.goal, 1 + noise(row)
        slow = goal.faster is not None and row.faster is not None and row.faster * slack < goal.faster
        far = goal.over_floor is not None and row.over_floor is not None and row.over_floor > goal.over_floor * slack
        if row.what in known and (slow or far):
            ratios = f"PEFT / graft {row.faster or 0:.2f}, graft / floor {row.over_floor or 0:.2f}"
            out.append(f"{row.what}: {ratios}, goal {goal}, beyond {100 * (slack - 1):.0f} % of noise")
    return out
