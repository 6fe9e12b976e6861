# SPDX-License-Identifier: Apache-2.0
"""Choose tests for `make quick` by the record of lines, next to those that tests/quick.py draws.

python -m tests.drawn.choosing 12        write tests that take 12 seconds of the processor into tests/quick_with.txt
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Collection, Iterator

import numpy as np

from tests.drawn.__main__ import FOLDERS, OUT
from tests.drawn.mapping import PACKAGE, ROOT, Record
from tests.quick import LONG, WITH, draw_names

OFTEN = 8  # tests of a line beyond which another counts for nothing
SLOW = 0.5  # seconds of a test that is never chosen


def choose_tests(
    lines_by_test: dict[str, Collection[int]], times: dict[str, float], drawn: Collection[str], budget: float
) -> Iterator[str]:
    """Yield tests that take `budget` seconds together, again and again the one that adds most per second.

    A test adds 1 / (1 + n) for each of its lines that n chosen or `drawn` tests run, if n is below OFTEN. Lines are
    numbers from 0.
    """
    names = [name for name in lines_by_test if name not in drawn and times[name] < SLOW]
    lines = [np.fromiter(lines_by_test[name], int) for name in names]
    counts = np.zeros(1 + max((max(some) for some in lines_by_test.values() if some), default=0), int)
    for name in drawn:
        counts[list(lines_by_test.get(name, ()))] += 1

    def gain(i: int) -> float:
        n = counts[lines[i]]
        return float((1 / (1 + n[n < OFTEN])).sum()) / (times[names[i]] + 0.003)  # and what pytest itself takes

    heap = [(-gain(i), i) for i in range(len(names))]
    heapq.heapify(heap)
    while heap and budget > 0 and heap[0][0] < 0:
        said, i = heap[0]
        if (now := -gain(i)) > said:
            heapq.heapreplace(heap, (now, i))
            continue
        heapq.heappop(heap)
        counts[lines[i]] += 1
        budget -= times[names[i]]
        yield names[i]


def number_lines(record: Record, tests: Collection[str]) -> dict[str, set[int]]:
    """Return the lines of the folders that drawn changes are of which each test runs, as numbers from 0."""
    numbers: dict[tuple[str, int], int] = {}
    lines: dict[str, set[int]] = {test: set() for test in tests}
    for folder in FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            file = path.relative_to(PACKAGE).as_posix()
            for test, ran in record.lines_by_test(file).items():
                if test in lines:
                    lines[test].update(numbers.setdefault((file, line), len(numbers)) for line in ran)
    return lines


def is_defined(test: str) -> bool:
    """Return True if a test's file has its function; False for a law that the file imports."""
    file, *names = test.partition("[")[0].split("::")
    return f"def {names[-1]}(" in (ROOT / file).read_text()


def main() -> None:
    record = Record(OUT)
    usable = [test for test in record.times if test.partition("[")[0] not in LONG and is_defined(test)]
    chosen = choose_tests(number_lines(record, usable), record.times, draw_names(usable), float(sys.argv[1]))
    WITH.write_text("\n".join(sorted(chosen)) + "\n")


if __name__ == "__main__":
    main()
