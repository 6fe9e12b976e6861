# SPDX-License-Identifier: Apache-2.0
"""Learning rates as data: the rates that searches found for a method, and those of the method's source."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypedDict

from torch import nn

from graft.config.base import PeftConfig, check_config
from graft.config.reading import Json
from graft.core.base_config import model_type
from graft.core.method import Method, PublishedRate
from graft.methods import method_of
from graft.prompts.base import Prompt

FILE = Path(__file__).with_name("rates.json")  # one RateSearch for each search by `make rates`
NUMBER = re.compile(r"_niter_\d+$")
# fields that do not change the method or size of an adapter
COMMON = {
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "progressbar",
    "target_modules", "exclude_modules", "layers_pattern",
}  # fmt: skip


class RateSearch(TypedDict):
    """The result of a search of learning rates: one method with one config, on one task of one model."""

    method: str
    adapter: str  # as of `class_name_of`
    config: Json  # as of `find_settings`
    task: str
    model: str
    model_type: str
    steps: int
    batch: int
    seeds: int
    date: str
    rates: list[float]
    means: list[float | None]  # of the validation loss over the seeds, at each rate; None: some seed diverged
    spreads: list[float | None]  # its standard deviation


@dataclass(frozen=True)
class Suggestion:
    """Learning rates for an adapter, for Adam and its like. `str` prints all of it.

    Attributes:
        adapter: the class that the config selects, as "LoRA".
        lr: the best rate that was tested; or the source's, if that is one number. None: no such rate is known.
        low, high: between these the loss was within a standard deviation of the best; or the source's range.
        tested: the least and the largest rate that were tested; None: none was.
        steps: optimizer steps of the shortest and the longest of these searches. Much longer runs want lower rates.
        found_on: a line for each search: task, model, size, result. If nothing was tested on models of this type,
            searches on other models.
        by_size: the best rate for each other size that was tested, as {"r 16, lora_alpha 64": 1e-3}.
        published: the range of the method's source.
    """

    adapter: str
    lr: float | None = None
    low: float | None = None
    high: float | None = None
    tested: tuple[float, float] | None = None
    found_on: tuple[str, ...] = ()
    by_size: dict[str, float] = field(default_factory=dict)
    published: PublishedRate | None = None
    steps: tuple[int, int] | None = None

    def __str__(self) -> str:
        """Return the suggestion as lines of text.

        After searches the first line has the best rate and the good and tested ranges. Lines for each search and each
        other size follow, then the source's rates and the lengths of the runs, with advice for thousands of steps. If
        nothing was measured on this type of model, the source's rates come first, then the searches on other types.
        Without any rate, the text advises a sweep over 1e-4 to 0.3.
        """
        lines = []
        if self.tested is not None:
            lines.append(
                f"{self.adapter}: {self.lr:g}; as good within noise: {self.low:g} to {self.high:g}; "
                f"tested: {self.tested[0]:g} to {self.tested[1]:g}."
            )
            lines += [f"- found on {line}" for line in self.found_on]
            lines += [f"- {size}: {rate:g}" for size, rate in self.by_size.items()]
        if self.published is not None:
            low, high, source = self.published
            lr_range = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            lines.append(
                f"{'- ' if lines else f'{self.adapter}, not measured here; '}its source: {lr_range} ({source})."
            )
            if self.tested is None:
                lines += [f"- on a model of another type: {line}" for line in self.found_on]
        if self.steps is not None:
            least, most = self.steps
            length = f"{least:d}" if least == most else f"{least:d} to {most:d}"
            begin = "below the least of these rates" if self.published is None else "with its source's rates"
            lines.append(f"- these are rates of runs of {length} steps; for thousands of steps begin {begin}.")
        return "\n".join(lines) or f"{self.adapter}: no rate is known; sweep over 1e-4 to 0.3 (graft.sweep)."


def suggest_lr(config: PeftConfig, model: nn.Module | None = None) -> Suggestion:
    """Return a suggested learning rate: from the searches of the most similar config, else from the method's source.

    The source's rates also count if it has rates and the closest search was not on a model of this type. A range in the
    source gives no single rate, only `low` and `high`. Without similar searches and rates, all fields but the adapter
    are empty. A suggestion from searches also holds their rates, numbers of steps, best rates at other sizes, and the
    source's rates.

    Args:
        config: of the adapter.
        model: the base. Searches on models of its type come first, others count only if there are none; None: all
            count.

    Raises:
        TypeError: `config` is no config of graft.
    """
    check_config(config)
    adapter, published = class_name_of(config), find_class(config).published_lr
    similar, kind = find_similar(config), None if model is None else model_type(model)
    near = [row for row in similar if row["model_type"] == kind] or similar
    closest_rows = find_closest(near, config) if near else []
    found_on = tuple(map(describe_search, closest_rows))
    of_other_models = model is not None and kind not in [row["model_type"] for row in near]
    if published is not None and (of_other_models or not near):
        low, high, _ = published
        return Suggestion(adapter, low if low == high else None, low, high, found_on=found_on, published=published)
    if not near:
        return Suggestion(adapter)
    low, high = good_range(closest_rows)
    sizes = {size_of(row): [r for r in near if size_of(r) == size_of(row)] for row in near}
    return Suggestion(
        adapter,
        best_lr(closest_rows),
        low,
        high,
        (min(min(row["rates"]) for row in closest_rows), max(max(row["rates"]) for row in closest_rows)),
        found_on,
        {size: best_lr(rows) for size, rows in sizes.items() if size != size_of(closest_rows[0])},
        published,
        (min(row["steps"] for row in closest_rows), max(row["steps"] for row in closest_rows)),
    )


def find_known_range(config: PeftConfig) -> tuple[float, float] | None:
    """Return (least, largest) of all rates that similar searches, on models of any type, found good or the method's
    source has; None if there are none.
    """
    ends = [*published[:2]] if (published := find_class(config).published_lr) else []
    for row in find_similar(config):
        ends += good_range([row])
    return (min(ends), max(ends)) if ends else None


# searches and sources for an adapter


@cache
def read_searches() -> tuple[RateSearch, ...]:
    """Return all searches in the package's rates.json. The file is read once; the result is cached."""
    return tuple(json.loads(FILE.read_text()))


def find_class(config: PeftConfig) -> type[Method] | type[Prompt]:
    """Return the class that a config selects: the method's variant, or the prompt's class."""
    method: type[Method] | type[Prompt] = method_of(config.peft_type)
    return method.variant(config) if issubclass(method, Method) else method


def class_name_of(config: PeftConfig) -> str:
    """Return the name of the class that a config selects: "LoRA", "DoRA"."""
    return find_class(config).__name__


def find_settings(config: PeftConfig) -> Json:
    """Return the fields of a config that are numbers, texts or bools and differ from their defaults.

    Fields that change neither method nor size are left out: names of modules, task, base model, versions.
    """
    kinds, defaults = (bool, int, float, str), type(config).__dataclass_fields__
    values = config.to_file_dict().items()
    return {k: v for k, v in values if k not in COMMON and isinstance(v, kinds) and v != defaults[k].default}


def find_similar(config: PeftConfig) -> list[RateSearch]:
    """Return the searches of the same class that are most similar in texts and flags; [] if there are none with a
    result.

    First the number of entries that differ counts, then the number that the config lacks. All searches with the least
    pair of these are returned, in the file's order.
    """
    same = [row for row in read_searches() if row["adapter"] == class_name_of(config) and best_lr([row])]
    marks_of_config = words_and_flags(find_settings(config))
    marks = (words_and_flags(row["config"]) for row in same)
    apart = [(count_differences(m, marks_of_config), len(m.items() - marks_of_config.items())) for m in marks]
    return [row for row, n in zip(same, apart) if n == min(apart)]


def count_differences(one: Json, other: Json) -> int:
    """Return the number of keys with different values in two mappings. A missing key counts as None."""
    return sum(one.get(key) != other.get(key) for key in one.keys() | other)


def words_and_flags(values: dict[str, object]) -> Json:
    """Return the texts and bools of a config's values; others are left out.

    The number at the end of "pissa_niter_4" is cut off.
    """
    words = {k: NUMBER.sub("", v) if isinstance(v, str) else v for k, v in values.items()}
    return {k: v for k, v in words.items() if isinstance(v, (bool, str))}


def number_fields(values: Json) -> dict[str, float]:
    """Return the values of a config that are neither bools nor texts."""
    return {k: v for k, v in values.items() if not isinstance(v, (bool, str))}


def find_closest(similar: Sequence[RateSearch], config: PeftConfig) -> list[RateSearch]:
    """Return the searches of the size (rank, alpha, …) closest to that of a config, by Σ |log ratio| of the positive
    numbers that both have.

    Missing numbers have the config's defaults. Of several sizes equally near, that of the first search counts.
    `similar` must not be empty.
    """
    fields = type(config).__dataclass_fields__.items()
    defaults = {k: float(f.default) for k, f in fields if type(f.default) in (int, float)}  # type: ignore[arg-type]
    sizes = defaults | number_fields(find_settings(config))

    def distance(row: RateSearch) -> float:
        """Return Σ |log(config's number / search's number)| over the numbers that both have and that are positive; 0
        without any.
        """
        row_sizes = defaults | number_fields(row["config"])
        common = [k for k in sizes.keys() & row_sizes if sizes[k] > 0 and row_sizes[k] > 0]
        return sum(abs(math.log(sizes[k] / row_sizes[k])) for k in common)

    size = size_of(min(similar, key=distance))
    return [row for row in similar if size_of(row) == size]


# results of searches


def size_of(row: RateSearch) -> str:
    """Return the numbers of a search's config as text: "r 4, lora_alpha 16", or "default size"."""
    return ", ".join(f"{k} {v:g}" for k, v in number_fields(row["config"]).items()) or "default size"


def describe_search(row: RateSearch) -> str:
    """Return one line for a search: task, model, size, flags, best rate, number of rates, seeds, steps, batch size and
    date.

    The flags are all entries of its config that are bools (False, too) or texts, as name and value.
    """
    words = "".join(f", {k} {v}" for k, v in row["config"].items() if isinstance(v, (bool, str)))
    return (
        f"{row['task']} ({row['model']}), {size_of(row)}{words}: {best_lr([row]):g}, of {len(row['rates'])} rates and "
        f"{row['seeds']} seeds, {row['steps']} steps of {row['batch']}, {row['date']}"
    )


def best_lr(searches: Sequence[RateSearch]) -> float:
    """Return the rate with the least loss, averaged over searches; 0.0 if there is none.

    Of equal rates the one tested first.

    The losses of a search are divided by its least loss, or taken as they are if that is 0. Only rates count that all
    searches tested, without divergence (a mean of None) in one of them.
    """
    shares: dict[float, list[float]] = {}
    for row in searches:
        least = min((mean for mean in row["means"] if mean is not None), default=0.0)
        for rate, mean in zip(row["rates"], row["means"]):
            shares.setdefault(rate, []).append(math.inf if mean is None else mean / least if least else mean)
    ranked = {rate: sum(values) / len(values) for rate, values in shares.items() if len(values) == len(searches)}
    ranked = {rate: share for rate, share in ranked.items() if math.isfinite(share)}
    return min(ranked, key=ranked.__getitem__) if ranked else 0.0


def good_range(searches: Iterable[RateSearch]) -> tuple[float, float]:
    """Return the least and the largest rate with a loss within a standard deviation of a search's best, over all
    searches.

    The standard deviation is that of the best rate, 0 if unknown. Rates that diverged (a mean of None) do not count.
    """
    rates = []
    for row in searches:
        known = [(r, m, s or 0.0) for r, m, s in zip(row["rates"], row["means"], row["spreads"]) if m is not None]
        _, least, spread = min(known, key=lambda item: item[1])
        rates += [rate for rate, mean, _ in known if mean <= least + spread]
    return min(rates), max(rates)
