# SPDX-License-Identifier: Apache-2.0
"""Two tasks for a language model: dates in ten languages to ISO 8601, and the topics of headlines."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial

from examples.demo.data import DATA, DemoError, Split, load_task, locate
from examples.demo_lm.scoring import lenient_date, lenient_topic

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "ja")
STYLES = ("full", "long", "medium")  # "short" does not tell 3/5 from 5/3, and has years of two digits
FIRST_DAY, DAYS = date(1950, 1, 1), 36_525  # to 2049-12-31


@dataclass(frozen=True)
class Pair:
    text: str
    answer: str
    group: str  # what results are also shown by: the language, the topic


@dataclass
class Task:
    name: str
    instruction: str
    train: list[Pair]
    validation: list[Pair]  # what the hyper-parameters were chosen on; a run does not read it
    test: list[Pair]
    read: Callable[[str], str | None]  # lenient: what an answer says, if anything
    unit: Callable[[Pair], str]  # what must not be in training and test both

    @property
    def leaks(self) -> int:
        """Number of test pairs that training or validation could have shown."""
        seen = {self.unit(pair) for pair in (*self.train, *self.validation)}
        return sum(self.unit(pair) in seen for pair in self.test)


def write_date(day: date, language: str, style: str) -> str:
    try:
        from babel.dates import format_date
    except ImportError:
        raise DemoError("The package babel, which writes the dates, is not installed. Run: make demo-lm") from None
    return format_date(day, style, locale=language)


def dates(
    seed: int, held_out: int = 100, train: int = 2000, write: Callable[[date, str, str], str] = write_date
) -> Task:
    """Days are drawn without replacement before they are written: no day of one split is in another in any language.

    Languages take turns, and so do the styles of each: a test set of 100 has 10 dates of each language.

    Args:
        held_out: size of the test set, and of the validation set.
        write: (day, language, style) -> text.
    """
    pairs = []
    for i, number in enumerate(random.Random(seed).sample(range(DAYS), 2 * held_out + train)):
        day, language = FIRST_DAY + timedelta(number), LANGUAGES[i % len(LANGUAGES)]
        style = STYLES[i // len(LANGUAGES) % len(STYLES)]
        pairs.append(Pair(write(day, language, style), day.isoformat(), language))
    test, validation, rest = pairs[:held_out], pairs[held_out : 2 * held_out], pairs[2 * held_out :]
    instruction = "Write the date in ISO 8601."
    return Task("dates", instruction, rest, validation, test, lenient_date, unit=lambda pair: pair.answer)


def topics(seed: int, held_out: int = 100) -> Task:
    """Headlines of the first demo: its training set, and parts of the fifth that it holds out.

    Headlines equal up to case, digits and punctuation count as one there, so none is in two splits.
    """
    source = locate(DATA["topics"]._replace(target="demo-lm"))
    task = load_task("topics", str(source), seed=seed)
    train, rest = (as_pairs(split, task.labels) for split in (task.train, task.test))
    *others, last = task.labels
    instruction = f"Name the topic of the headline: {', '.join(others)} or {last}."
    test, validation = rest[:held_out], rest[held_out : 2 * held_out]
    read = partial(lenient_topic, topics=task.labels)
    return Task("topics", instruction, train, validation, test, read, unit=lambda pair: pair.text)


def as_pairs(split: Split, labels: list[str]) -> list[Pair]:
    names = [labels[i] for i in split.labels.tolist()]
    return [Pair(text, name, name) for text, name in zip(split.texts, names, strict=True)]
