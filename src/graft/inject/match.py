# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The choice of modules by a config: pure functions on names, and a matcher that is compiled once."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from graft.config.reading import compile_pattern

Outcome = Literal["matched", "excluded", "saved", "layer", "tied", "left", "untargeted"]
MOST_HINTS, LONGEST_NAME = 100, 100  # the most entries that get similar names, a slow search; characters
LAYER_INDEX = compile_pattern("", "layers_pattern", r".*?\.[^.]*\.(\d+)\.")
WHY = {
    "excluded": "named by exclude_modules",
    "saved": "trained whole, through modules_to_save",
    "layer": "its layer index is not in layers_to_transform",
    "tied": "adapted along with the embedding whose weight it shares",
    "left": "left out by the tuner's _check_target_module_exists, which was replaced",
    "untargeted": "not named by target_modules",
}


@dataclass(frozen=True)
class Verdict:
    """The decision about one path: its outcome, and the entry of target_modules that names it."""

    outcome: Outcome
    entry: str | None = None  # the entry of target_modules that named it

    @property
    def why(self) -> str:
        """The reason that a report shows for the outcome; '' for "matched"."""
        return WHY.get(self.outcome, "")


class TargetNames:
    """A set of names, or one regex.

    A name matches a path that equals it or ends with it after a dot; a regex matches whole paths.
    """

    def __init__(self, names: Iterable[str] | str | None, field: str = "target_modules"):
        """Compile `names` if it is a string, the regex.

        `field` names the config's field in the error for an invalid one.
        """
        self.regex = compile_pattern(names, field) if isinstance(names, str) else None
        self.names = frozenset(names) if names and not isinstance(names, str) else frozenset()

    def find(self, path: str) -> str | None:
        """Return the name that matches `path`: the whole path first, then its longest end after a dot.

        For a regex, returns its text if it fits the whole path. None if nothing matches, or there are no names and no
        regex.

        Raises:
            ConfigError: a slow regex has used up its time.
        """
        if self.names:
            names, suffix = self.names, path
            while suffix not in names:
                _, dot, suffix = suffix.partition(".")
                if not dot:
                    return None
            return suffix
        if self.regex is not None:
            return self.regex.text if self.regex.fullmatch(path) else None
        return None


def list_suffixes(path: str) -> Iterator[str]:
    """Yield the rest of a dotted path after each dot, the longest first. The path itself is not among them."""
    dot = path.find(".")
    while dot >= 0:
        yield path[dot + 1 :]
        dot = path.find(".", dot + 1)


class Matcher:
    """The decision of a config about paths: called with a path, it returns a `Verdict`."""

    def __init__(self, cfg: Any, parameters: bool = False):
        """Compile the config's targets, exclusions, modules_to_save and layer indices.

        Fields that are missing or None match nothing.

        The targets are `target_paths` if `Method.prepare` has set them, else `target_modules`. A single int or text in
        `layers_to_transform` or `layers_pattern` counts as a list. Without `layers_pattern` the index is the first
        number that is a whole part of the path with two parts before it and one after it.

        Args:
            parameters: decide about the paths of parameters, by `target_parameters`.

        Raises:
            ConfigError: a text is no regular expression that `Pattern` takes.
        """
        chosen = getattr(cfg, "target_paths", None)  # set by `Method.prepare`
        self.targets = TargetNames(cfg.target_parameters if parameters else chosen or cfg.target_modules)
        self.excluded = TargetNames(getattr(cfg, "exclude_modules", None), "exclude_modules")
        saved = getattr(cfg, "modules_to_save", None) or ()
        self.saved = [compile_pattern(m, "modules_to_save", rf"(^|.*\.){m}($|\..*)") for m in saved]
        indices = getattr(cfg, "layers_to_transform", None)
        self.indices = {indices} if isinstance(indices, int) else set(indices or ())
        lists = getattr(cfg, "layers_pattern", None) or ()
        lists = [lists] if isinstance(lists, str) else list(lists)
        self.index_patterns = [compile_pattern(n, "layers_pattern", rf"(?:^|.*?\.){n}\.(\d+)\.") for n in lists]
        self.index_patterns = self.index_patterns or [LAYER_INDEX]

    def __call__(self, path: str) -> Verdict:
        """Return the verdict about a path, by the first rule that applies.

        "excluded": exclude_modules names it. "saved": it is in modules_to_save, or inside one of these. "untargeted":
        no target names it. "layer": its index is not in `layers_to_transform`, unless the target is the whole path.
        Else "matched".
        """
        if self.excluded.find(path) is not None:
            return Verdict("excluded", self.targets.find(path))
        if self.saved and any(saved.match(path) for saved in self.saved):
            return Verdict("saved", self.targets.find(path))
        entry = self.targets.find(path)
        if entry is None:
            return Verdict("untargeted")
        if self.indices and entry != path and self.layer_of(path) not in self.indices:
            return Verdict("layer", entry)
        return Verdict("matched", entry)

    def layer_of(self, path: str) -> int | None:
        """Return the block index in a path, as `layers_to_transform` counts.

        The first of `layers_pattern` that matches gives it; None if none does.

        Without such patterns it is the first number that has two names or more before it and a name below it.
        """
        for within in self.index_patterns:
            if match := within.match(path):
                return int(match[1])
        return None


def is_targeted(config: Any, key: str) -> bool:
    """Return True if a config targets the module at path `key`, its exclusions and layer numbers considered."""
    return Matcher(config)(key).outcome == "matched"


def find_unmatched(
    entries: Iterable[str], used: Collection[str | None], paths: Iterable[str]
) -> dict[str, list[tuple[str, int]]]:
    """Return the entries that are not in `used`, and no path or end of one, sorted, each with up to two similar last
    names among `paths` and their counts.

    Names are compared with the first 100 characters of the entry's last name (difflib, 0.6). Only the first 100 entries
    get similar names. {} if none is left.
    """
    missing = sorted(e for e in entries if e not in used and not any(f".{path}".endswith(f".{e}") for path in paths))
    if not missing:
        return {}
    name_counts = Counter(path.rpartition(".")[2] for path in paths)
    sought = {e: e.rpartition(".")[2] if i < MOST_HINTS else "" for i, e in enumerate(missing)}
    close = {e: difflib.get_close_matches(s[:LONGEST_NAME], name_counts, n=2, cutoff=0.6) for e, s in sought.items()}
    return {entry: [(name, name_counts[name]) for name in names] for entry, names in close.items()}


def format_hint(similar: list[tuple[str, int]]) -> str:
    """Return "; did you mean 'name' (n modules)?" for the similar names, joined by "or". '' if there is none."""
    if not similar:
        return ""
    names = " or ".join(f"'{name}' ({n} module{'s' * (n != 1)})" for name, n in similar)
    return f"; did you mean {names}?"


COMPRESS_FROM = 20


def minimize_names(targets: Iterable[str], other_paths: Iterable[str], least: int = 1) -> set[str]:
    """Return few, short suffixes that select all of `targets` and none of `other_paths`.

    Targets are taken in sorted order. Each gets its shortest suffix that no other path has, or its whole path; one that
    a chosen suffix selects already gets none.

    Raises:
        ValueError: `targets` is a text or empty, a name is empty, or one is in both.

    Args:
        least: the least number of parts of a suffix; a target with fewer parts gets its whole path.
    """
    if isinstance(targets, (str, bytes)) or not targets:
        raise ValueError("target_modules should be a list or set of strings.")
    targets, other_paths = set(targets), set(other_paths)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if common := targets & other_paths:
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not happen, "
            f"please open an issue with the code that led to it: {sorted(common)[:3]}."
        )
    other_suffixes = {s for path in other_paths for s in (path, *list_suffixes(path))}
    chosen: set[str] = set()
    for path in sorted(targets):
        candidates = [*reversed([*list_suffixes(path)]), path][least - 1 :] or [path]  # shortest first
        if chosen.isdisjoint(candidates):
            chosen.add(next((s for s in candidates if s not in other_suffixes), path))
    return chosen
