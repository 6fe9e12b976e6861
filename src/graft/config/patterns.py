# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of configs, matched in bounded time: a config may come from anywhere.

Python's `re` cannot be stopped. It matches patterns that are quick whatever the text; the `regex` package, whose
matches take a time limit, matches the others.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache, partial
from time import perf_counter
from typing import Any

from graft.core.errors import ConfigError, shortened

LONGEST = 100_000  # characters of a pattern
MOST_REPEATS = 10_000  # product of the counts in {…}; a compiled pattern may grow with it
QUICK_REPEATS = 2  # so many repetitions, none inside another, take a time that is quadratic in the text
SLOW = 0.001  # seconds; a match on a module's path takes some microseconds
BUDGET = 1.0  # seconds that all slow matches of one pattern may take together


class Pattern:
    """A regular expression of a config's field, as Python's `re` understands it.

    Args:
        text: the pattern as the field has it.
        whole: the pattern to match; None: `text`.

    Raises:
        ConfigError: it is no regular expression, or it takes too long to match.
    """

    __slots__ = ("field", "fullmatch", "left", "match", "subn", "text")

    def __init__(self, text: str, field: str, whole: str | None = None):
        self.text, self.field, self.left = text, field, BUDGET
        whole = text if whole is None else whole
        bare = unescaped(text)
        if len(text) > LONGEST or math.prod(counts(bare)) > MOST_REPEATS:
            raise ConfigError(f"{shortened(repr(text))} of {field} is too large for a regular expression of names.")
        try:
            plain = re.compile(whole)
            if is_quick(bare):
                self.match, self.fullmatch, self.subn = plain.match, plain.fullmatch, plain.subn
                return
            import regex  # not needed to import graft

            timed: Any = regex.compile(whole)
        except Exception as e:  # of many types: nesting, counts, syntax
            raise ConfigError(
                f"{shortened(repr(text))} of {field} is not a regular expression: {e or type(e).__name__}. Give a list "
                "to name modules plainly."
            ) from e
        self.match, self.fullmatch = partial(self._timed, timed.match), partial(self._timed, timed.fullmatch)
        self.subn = partial(self._timed, timed.subn)

    def _timed(self, function: Any, *args: Any) -> Any:
        start = perf_counter()
        try:
            found = function(*args, timeout=max(self.left, SLOW))
        except TimeoutError as e:
            self.left = 0.0
            raise ConfigError(
                f"{shortened(repr(self.text))} of {self.field} takes too long to match '{args[-1]}': it has "
                "repetitions inside repetitions, such as (a+)+. Write it without, or give a list of names."
            ) from e
        taken = perf_counter() - start
        if taken > SLOW:
            self.left -= taken
        return found


@lru_cache(maxsize=4096)
def pattern(text: str, field: str, whole: str | None = None) -> Pattern:
    """Return the compiled pattern of a config's field."""
    return Pattern(text, field, whole)


def ending(text: str, field: str) -> Pattern:
    """Return the pattern that matches a path whose end `text` matches, from the path's start or from a dot."""
    return pattern(text, field, rf"(.*\.)?({text})$")


def unescaped(text: str) -> str:
    """Return a pattern without what is escaped, and without the question marks that name a kind of group."""
    return re.sub(r"\(\?", "(", re.sub(r"\\.", "", text, flags=re.DOTALL))


def counts(bare: str) -> list[int]:
    """Return the numbers that stand in braces."""
    return [int(n[:9]) or 1 for braces in re.findall(r"\{[\d,\s]*\}", bare) for n in re.findall(r"[0-9]+", braces)]


def is_quick(bare: str) -> bool:
    """Say whether a pattern has few repetitions, and none of a group."""
    repeats = re.findall(r"[*+?{]", bare)
    return len(repeats) <= QUICK_REPEATS and not re.search(r"\)[*+{]", bare)
