# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.house.budget` prints the counts of each room and its limits; `--tighten` lowers the limits to them.

The limits stand in budget.toml. A limit only shrinks, or the line above it says why it grew.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import tomllib

from tests.house.counts import SourceFile

PACKAGE = Path(__file__).parents[2] / "src" / "graft"
LIMITS = Path(__file__).with_name("budget.toml")
read_source = cache(SourceFile)  # a file counts for its room, the spine and the house
KINDS = ("lines", "files", "participles", "vague", "hard_turns")


def read_limits() -> dict[str, dict[str, object]]:
    return tomllib.loads(LIMITS.read_text())


def files_of_room(room: dict[str, object]) -> list[Path]:
    """Return the files of a room: those of its folders, without those of the folders that it leaves out."""
    paths = [path for name in room["holds"] for path in sorted(PACKAGE.glob(name))]  # type: ignore[attr-defined]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    without = [PACKAGE / name for name in room.get("without", [])]  # type: ignore[attr-defined]
    return [file for file in files if not any(folder in file.parents for folder in without)]


@cache
def count_file(path: Path) -> Counter[str]:
    """Return the counts of a file, in the order of `KINDS`."""
    file = read_source(path)
    return Counter(
        lines=file.count_lines(), files=1, participles=len(file.participles()), vague=len(file.vague_variables()),
        hard_turns=file.count_hard_turns(),
    )  # fmt: skip


def count_room(room: dict[str, object]) -> dict[str, int]:
    counts = [count_file(path) for path in files_of_room(room)]
    return {kind: sum(count[kind] for count in counts) for kind in KINDS}


def count_house() -> dict[str, int]:
    """Return the counts of all files together: names in three files or more, and hard turns in 1,000 words."""
    files = [read_source(path) for path in sorted(PACKAGE.rglob("*.py"))]
    names = Counter(name for file in files for name in file.module_names())
    turns, words = sum(count_file(f.path)["hard_turns"] for f in files), sum(f.count_words() for f in files)
    return {"names_in_three_files": sum(n > 2 for n in names.values()), "hard_turns_in_10000": 10_000 * turns // words}


def count_everything() -> dict[str, dict[str, int]]:
    """Return the counts of each room, and of the house."""
    limits = read_limits()
    return {name: count_house() if name == "house" else count_room(room) for name, room in limits.items()}


def excesses() -> list[str]:
    """Return a sentence for each count above its limit."""
    limits = read_limits()
    return [
        f"{room}: {kind} is {count}, its limit {limits[room][kind]}"
        for room, counts in count_everything().items()
        for kind, count in counts.items()
        if count > limits[room][kind]  # type: ignore[operator]
    ]


def print_table() -> None:
    limits = read_limits()
    print(f"{'room':12}" + "".join(f"{kind:>20}" for kind in KINDS))
    for room, counts in count_everything().items():
        cells = [f"{count} of {limits[room][kind]}" for kind, count in counts.items()]
        print(f"{room:12}" + "".join(f"{cell:>20}" for cell in cells))


def tighten() -> None:
    """Write each count that is below its limit into budget.toml as the new limit."""
    room, lines, counts = "", [], count_everything()
    for line in LIMITS.read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            room = header[1]
        if (field := re.match(r"(\w+) = (\d+)", line)) and counts[room][field[1]] < int(field[2]):
            line = f"{field[1]} = {counts[room][field[1]]}"
        lines.append(line)
    LIMITS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if "--tighten" in sys.argv:
        tighten()
    print_table()
    sys.exit("\n".join(excesses()) or None)
