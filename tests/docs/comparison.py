# SPDX-License-Identifier: Apache-2.0
"""The measured part of docs/methods.md, printed from a run of the comparison.

`python -m tests.docs.comparison FILE` takes the `out/compare.json` that `make compare` wrote as the run to show, and
draws the page's picture anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from examples.compare.__main__ import HELD_OUT, STEPS, markdown
from examples.compare.choices import CHOICES
from examples.compare.picture import deviation, draw, front
from tests.docs.marks import put

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
PICTURE = PAGE.with_name("compare.png")
RESULTS = Path(__file__).parents[2] / "examples" / "compare" / "results.json"


def read(file: Path) -> dict[str, Any]:
    """Return the results by method, those of `CHOICES` in its order."""
    run = json.loads(file.read_text())
    settings = {"steps": STEPS, "seed": 0, "held_out": HELD_OUT}
    if run["settings"] != settings:
        sys.exit(f"{file} comes from {run['settings']}; the page shows {settings}")
    return {name: run["methods"][name] for name in CHOICES if name in run["methods"]}


def digest() -> str:
    """What the picture says that it was drawn from."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()


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


def page() -> str:
    return put(PAGE.read_text(), "measured", measured(read(RESULTS)))


def main(file: str) -> None:
    results = read(Path(file))
    RESULTS.write_text(Path(file).read_text())
    PAGE.write_text(page())
    draw(results, HELD_OUT, PICTURE, digest())


if __name__ == "__main__":
    main(*sys.argv[1:])
