# SPDX-License-Identifier: Apache-2.0
"""What a config tells of how its file holds the factors of stacks of matrices (experts)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from graft.config.base import FORMAT_VERSION
from graft.config.reading import Json
from graft.core.errors import ConfigError, PeftWarning, warn

MARK = "lora_B_layout"  # what Unsloth notes in configs: one of the last two names below
TRAINING_ONLY = ("lora_velora_", "lora_monteclora_")  # beginnings of names: tensors that count in training only
NAMES: dict[str, Json] = {
    "peft": dict(exchanged=False, by_expert=False),
    "exchanged": dict(exchanged=True),
    "rank_major": dict(by_expert=False),
    "grouped_by_expert": dict(by_expert=True),
}


@dataclass(frozen=True)
class StackLayout:
    """What is known of how a file holds the factors of stacks, before its shapes are seen. None: nothing."""

    version: str | None = FORMAT_VERSION  # of the PEFT that wrote it
    exchanged: bool | None = None  # A and B of square stacks stand for each other
    by_expert: bool | None = False  # columns of B: those of an expert are next to each other
    left_to: str | None = None  # who has replaced PeftModel.load_adapter, and may see to the columns of B itself

    @classmethod
    def from_config(cls, fields: Json) -> StackLayout:
        """Return what the fields of a file's config tell."""
        version, mark, mapping = fields.get("peft_version"), fields.get(MARK), fields.get("auto_mapping")
        unsloth = isinstance(mapping, dict) and mapping.get("unsloth_fixed", False)
        by_expert = mark == "grouped_by_expert" if mark in NAMES else None if unsloth else False
        return cls(version, by_expert=by_expert)

    def for_replacement(self, replacement: str) -> StackLayout:
        """Return this as PEFT reads it, which knows no order of columns: a replacement loads, which may."""
        return replace(self, left_to=replacement, by_expert=None if self.by_expert else self.by_expert)

    def with_names(self, names: str | Collection[str]) -> StackLayout:
        """Return this with what the caller says by `expert_layout`.

        Raises:
            ConfigError: there is no layout of such a name.
        """
        out = self
        for name in [names] if isinstance(names, str) else names:
            if name not in NAMES:
                raise ConfigError(f"expert_layout={names!r}: '{name}' is none of {', '.join(NAMES)}.")
            out = replace(out, **NAMES[name])
        return out


TODAY = StackLayout()


def decide_exchange(version: str | None, transposed: bool) -> tuple[bool, bool]:
    """Return whether a PEFT of this version wrote A and B of a stack for each other, and whether that is sure.

    Args:
        version: None: it noted none, as before 0.18.
        transposed: the module says that it holds its matrices as (in, out).
    """
    if version is None:
        return not transposed, transposed
    numbers = re.match(r"(\d+)\.(\d+)\.?(\d*)", version)
    if numbers is None:
        return False, False
    release = int(numbers[1]), int(numbers[2]), int(numbers[3] or 0)
    if ".dev" in version and (0, 18, 0) < release <= (0, 19, 1):  # the changes came between releases
        return False, False
    return release < (0, 19, 1) and (release >= (0, 19, 0) or not transposed), True


def find_exchanges(
    stacks: Mapping[str, tuple[bool | None, bool]], layout: StackLayout, doubts: set[str]
) -> dict[str, tuple[bool, bool]]:
    """Return for each stack of a file whether A and B stand for each other, and whether only PEFT's version says so.

    Args:
        stacks: → the verdict of its shapes, None if they do not tell; and if its module holds matrices as (in, out).
            Shapes of other stacks tell for those of equal modules.
        doubts: gets "exchanged" if nothing tells.
    """
    by_shape = {kind: {s for s, t in stacks.values() if s is not None and t == kind} for kind in (False, True)}
    verdicts = {}
    for key, (shape, transposed) in stacks.items():
        exchanged, by_version = layout.exchanged if shape is None else shape, False
        if exchanged is None and len(by_shape[transposed]) == 1:
            (exchanged,) = by_shape[transposed]
        if exchanged is None:
            exchanged, by_version = decide_exchange(layout.version, transposed)
            doubts |= set() if by_version else {"exchanged"}
        verdicts[key] = exchanged, by_version
    return verdicts


def warn_of_doubts(doubts: set[str], layout: StackLayout, what: str) -> None:
    """Warn of what nothing tells, and name the option that does."""
    if "exchanged" in doubts:
        read = "exchanged, as PEFT before 0.18 wrote them" if layout.version is None else "as PEFT 0.19.1 writes them"
        warn(
            f"{what} has square stacks of experts, and does not tell whether A and B stand for each other: they were "
            f"read {read}. Pass expert_layout='exchanged' if PEFT before 0.19.1 trained it, 'peft' if a later one did.",
            PeftWarning,
        )
    if "twice" in doubts:
        warn(
            f"{what}: expert_layout='grouped_by_expert' has put the columns of B in order. PeftModel.load_adapter was "
            f"replaced by {layout.left_to}: if that does so as well, leave expert_layout out.",
            PeftWarning,
        )
    if "by_expert" in doubts:
        read = "they were read as PEFT writes them"
        if layout.left_to is not None:
            read = f"that is left to {layout.left_to}, which has replaced PeftModel.load_adapter"
        warn(
            f"{what} was trained by Unsloth and does not tell the order of the columns of B of stacks of experts: "
            f"{read}. Pass expert_layout='grouped_by_expert' if Unsloth before September 2026 trained it"
            + (", 'rank_major' if a later one did." if layout.left_to is None else " and that leaves it alone."),
            PeftWarning,
        )
