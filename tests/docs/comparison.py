# SPDX-License-Identifier: Apache-2.0
"""The measured parts of docs/reference/measurements.md, printed from runs of the comparisons.

`python -m tests.docs.comparison FILE …` takes the `out/compare.json` that `make compare` wrote, or the `out/texts.json`
of `make compare-texts`, as the run to show, and draws the page's picture of it anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

from examples.compare.__main__ import HELD_OUT, STEPS, markdown
from examples.compare.choices import CHOICES, DTYPE
from examples.compare.fields import NOT_IN_BERT
from examples.compare.picture import deviation, draw, front
from examples.compare.texts import WHAT
from graft.model.rates import best_lr, read_searches
from tests.docs.marks import put

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "reference" / "measurements.md", DOCS / "compare.png"
RESULTS = Path(__file__).parents[2] / "examples" / "compare" / "results.json"
TEXTS, TEXTS_PICTURE = RESULTS.with_name("texts.json"), DOCS / "compare-texts.png"
SHOWN = "topics"  # the task of the picture


def read(file: Path) -> dict[str, Any]:
    """Return the results by method, those of `CHOICES` in its order."""
    run = json.loads(file.read_text())
    settings = {"steps": STEPS, "seed": 0, "held_out": HELD_OUT, "dtype": str(DTYPE)}
    if run["settings"] != settings:
        sys.exit(f"{file} comes from {run['settings']}; the page shows {settings}")
    return {name: run["methods"][name] for name in CHOICES if name in run["methods"]}


def digest(file: Path = RESULTS) -> str:
    """What the picture says that it was drawn from."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def measured(results: dict[str, Any]) -> str:
    parts = [markdown(results, HELD_OUT).rstrip(), f"{beside_lora(results)} {unbeaten(results)}"]
    missing = [name for name in CHOICES if name not in results]
    if missing:
        parts.append(f"This run lacks: {', '.join(missing)}.")
    return "\n\n".join(parts)


def beside_lora(results: dict[str, Any]) -> str:
    """Say which methods differ from LoRA by more than two standard errors of the difference."""
    p = results["LoRA"]["exact"]
    apart = {True: [], False: []}
    for name, m in results.items():
        q = m["exact"]
        error = math.hypot(
            *(deviation(one, HELD_OUT) / len(one.get("runs", "1")) ** 0.5 for one in (results["LoRA"], m))
        )
        if abs(q - p) > 2 * error:
            apart[q > p].append(name)
    said = [f"{'above' if up else 'below'}: {', '.join(names) or 'none'}" for up, names in apart.items()]
    return f"More than two standard errors of the difference from LoRA's {p:.2f}, {'; '.join(said)}."


def standard_error(m: dict[str, Any]) -> float:
    return deviation(m, HELD_OUT) / len(m.get("runs", "1")) ** 0.5


def unbeaten(results: dict[str, Any]) -> str:
    best = front(results)
    return f"No other is both better and cheaper than {' or '.join(name for name in results if name in best)}."


def texts(results: dict[str, dict[str, Any]]) -> str:
    """Return what texts have shown: what is no noise, and a table."""
    head = ["method", "", *(f"{task} (lr)" for task in results), "step", "file", "parameters"]
    lines = [head, ["---"] * len(head)]
    for name in CHOICES:
        found = {task: m[name] for task, m in results.items() if name in m}
        if found:
            scores = [score(found[task]) if task in found else "" for task in results]
            first = next(iter(found.values()))
            cost = f"{first['cpu_seconds'] / first['steps'] * 1e3:.0f} ms"
            lines.append(
                [name, first["note"], *scores, cost, f"{first['bytes'] / 1e3:.0f} kB", f"{first['parameters']:,}"]
            )
    said = [
        apart(WHAT[task], {name: (m["exact"], m["spread"]) for name, m in found.items()}, len(found["LoRA"]["seeds"]))
        for task, found in results.items()
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    absent = "; ".join(f"{name}: {why}" for name, why in NOT_IN_BERT.items())
    return "\n\n".join(["\n".join(said), table, f"No place in a BERT: {absent}."])


def score(m: dict[str, Any]) -> str:
    return f"{m['exact']:.3f} ± {m['spread']:.3f} ({m['lr']:g})"


def apart(what: str, found: dict[str, tuple[float, float]], seeds: int) -> str:
    """Say which methods differ from LoRA by more than two standard errors of the difference.

    found: mean and standard deviation over seeds. One of three seeds says little: below the median of all, it counts as
        the median.
    """
    usual = median(spread for _, spread in found.values())
    own, noise = found["LoRA"]
    sides: dict[str, list[str]] = {"above": [], "below": []}
    for name, (value, spread) in found.items():
        if abs(value - own) > 2 * math.hypot(max(noise, usual), max(spread, usual)) / math.sqrt(seeds):
            sides["above" if value > own else "below"].append(name)
    equal = len(found) - sum(map(len, sides.values()))
    return (
        f"- {what}: {equal} of {len(found)} methods are LoRA's equal within noise ({own:.3f} ± {noise:.3f}; two "
        f"standard errors of a difference are {2 * usual * math.sqrt(2 / seeds):.3f} as a rule). Above: "
        f"{', '.join(sides['above']) or 'none'}; below: {', '.join(sides['below']) or 'none'}."
    )


def losses(task: str) -> str:
    """Return what the search of learning rates says of a task: the loss of each method at its best rate, in order."""
    own = [row for row in read_searches() if row["task"] == task and best_lr([row])]
    at = {row["method"]: row["rates"].index(best_lr([row])) for row in own}
    found = {row["method"]: (row["means"][at[row["method"]]], row["spreads"][at[row["method"]]]) for row in own}
    lines = [["method", "", f"loss, {task}", "lr"], ["---"] * 4]
    for row in sorted(own, key=lambda row: found[row["method"]]):
        mean, spread = found[row["method"]]
        note = CHOICES[row["method"]].note
        lines.append([row["method"], note, f"{mean:.3f} ± {spread:.3f}", f"{best_lr([row]):g}"])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{apart(f'loss on {task}', found, own[0]['seeds'])}\n\n{table}"


def page() -> str:
    text = put(PAGE.read_text(), "measured", measured(read(RESULTS)))
    text = put(text, "texts", texts(json.loads(TEXTS.read_text())))
    return put(text, "losses", losses("dates"))


def main(*files: str) -> None:
    for file in map(Path, files):
        where = TEXTS if file.name == TEXTS.name else RESULTS
        where.write_text(file.read_text())
    PAGE.write_text(page())
    draw(read(RESULTS), HELD_OUT, PICTURE, digest())
    shown = json.loads(TEXTS.read_text())[SHOWN]
    draw(shown, 0, TEXTS_PICTURE, digest(TEXTS), what=WHAT[SHOWN])


if __name__ == "__main__":
    main(*sys.argv[1:])
