# SPDX-License-Identifier: Apache-2.0
"""Which goals were met once, and how near to the floor the other rows came, so that losing this is noticed."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.measure import Row

RECORD = Path(__file__).with_name("met.json")
LEAST_NOISE = 0.08  # of a ratio, on a quiet machine


def noise(row: Row) -> float:
    """How far a ratio of this row may be off: the spreads of its values, together."""
    return max(LEAST_NOISE, sum(row.spread(who) for who in row.values if len(row.values[who]) > 2))


def known() -> dict[str, str | float]:
    """Row → the goal that some run met; or graft / floor, which some run reached, short of the goal."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def met_once() -> dict[str, str]:
    """Row → its goal, of those that some run met."""
    return {what: goal for what, goal in known().items() if isinstance(goal, str)}


def record(rows: list[Row]) -> None:
    """Note the rows whose goal is met, beside those noted before: one that is lost stays noted, to be found, as long as
    its goal is the same. Of others note how near to the floor they came."""
    held = known()
    for row in rows:
        if row.goal.met(row):
            held[row.what] = str(row.goal)
        elif held.get(row.what) != str(row.goal):
            before = held.pop(row.what, None)
            if row.goal.over_floor is not None and row.over_floor is not None:
                reached = round(row.over_floor, 2)
                held[row.what] = min(before, reached) if isinstance(before, float) else reached
    RECORD.write_text(json.dumps(held, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def lost(rows: list[Row]) -> list[str]:
    """What was met, or reached short of the goal, and now falls short of that by more than the noise."""
    held = known()
    out = []
    for row in rows:
        if row.what not in held:
            continue
        reached, goal, slack = held[row.what], row.goal, 1 + noise(row)
        least, most = (goal.faster, goal.over_floor) if isinstance(reached, str) else (None, reached)
        slow = least is not None and row.faster is not None and row.faster * slack < least
        far = most is not None and row.over_floor is not None and row.over_floor > most * slack
        off = goal.within is not None and goal.met(row) is False
        if slow or far or off:
            ratios = f"PEFT / graft {row.faster or 0:.2f}, graft / floor {row.over_floor or 0:.2f}"
            was = f"goal {goal}" if isinstance(reached, str) else f"once {reached} × floor"
            out.append(f"{row.what}: {ratios}, {was}, beyond {100 * (slack - 1):.0f} % of noise")
    return out
