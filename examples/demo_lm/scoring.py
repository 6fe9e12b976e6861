# SPDX-License-Identifier: Apache-2.0
"""How answers are judged: exactly, and leniently."""

import re
from collections.abc import Sequence
from datetime import date
from statistics import mean, mode

# year, month, day or day, month, year, with one to three other characters between them
NUMBERS = re.compile(
    r"(?<!\d)(?:(\d{4})\D{1,3}(\d{1,2})\D{1,3}(\d{1,2})|(\d{1,2})\D{1,3}(\d{1,2})\D{1,3}(\d{4}))(?!\d)"
)


def exact(answer: str, truth: str) -> bool:
    """Whether an answer is the truth and nothing else, up to white space around it."""
    return answer.strip() == truth


def lenient_date(answer: str) -> str | None:
    """The first date in numbers anywhere in an answer, as ISO 8601: year first or last, any separators.

    With the year last the day comes first; day and month change places where only that is a date. Months in words are
    not read: who repeats the question has not answered it.
    """
    for match in NUMBERS.finditer(answer):
        year, month, day, *reverse = match.groups()
        if year is None:
            day, month, year = reverse
        for m, d in ((month, day), (day, month)):
            try:
                return date(int(year), int(m), int(d)).isoformat()
            except ValueError:
                continue
    return None


def lenient_topic(answer: str, topics: Sequence[str]) -> str | None:
    """The topic that an answer names first: in any case, in the plural or not, as a whole word."""
    found = {t: re.search(rf"\b{re.escape(t.removesuffix('s'))}s?\b", answer, re.IGNORECASE) for t in topics}
    places = {topic: match.start() for topic, match in found.items() if match}
    return min(places, key=places.__getitem__, default=None)


def share(hits: Sequence[bool]) -> float:
    return mean(map(float, hits))


def by_group(hits: Sequence[bool], groups: Sequence[str]) -> dict[str, float]:
    """The share of each group, in alphabetical order."""
    return {g: share([hit for hit, own in zip(hits, groups, strict=True) if own == g]) for g in sorted(set(groups))}


def majority(train: Sequence[str], test: Sequence[str]) -> float:
    """Share of the most frequent answer of training among those of the test set."""
    guess = mode(train)
    return share([truth == guess for truth in test])
