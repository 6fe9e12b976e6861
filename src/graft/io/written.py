# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The layout of expert stacks' factors in a file, as far as its config says it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from graft.config.base import FORMAT_VERSION
from graft.config.reading import Json
from graft.core.errors import ConfigError, PeftWarning, warn

MARK = "lora_B_layout"  # Unsloth's field in configs: one of the last two names below
TRAINING_ONLY = ("lora_velora_", "lora_monteclora_")  # prefixes of tensors that act in training only
NAMES: dict[str, Json] = {
    "peft": dict(exchanged=False, by_expert=False),
    "exchanged": dict(exchanged=True),
    "rank_major": dict(by_expert=False),
    "grouped_by_expert": dict(by_expert=True),
}


@dataclass(frozen=True)
class StackLayout:
    """The facts about how a file holds the factors of stacks, before its shapes are seen. None: not known."""

    version: str | None = FORMAT_VERSION  # of the PEFT that wrote it
    exchanged: bool | None = None  # A and B of square stacks are exchanged
    by_expert: bool | None = False  # columns of B: those of an expert are next to each other
    left_to: str | None = None  # the code that replaced PeftModel.load_adapter, and may reorder the columns of B itself

    @classmethod
    def from_config(cls, fields: Json) -> StackLayout:
        """Return the layout that the fields of a file's config say: `peft_version` (None if missing), and Unsloth's
        mark for the columns of B, "lora_B_layout".

        `by_expert` is True for the mark "grouped_by_expert" and False for the other known one. Without a known mark it
        is None for a file of Unsloth ("unsloth_fixed" in `auto_mapping`), otherwise False.
        """
        version, mark, mapping = fields.get("peft_version"), fields.get(MARK), fields.get("auto_mapping")
        unsloth = isinstance(mapping, dict) and mapping.get("unsloth_fixed", False)
        by_expert = mark == "grouped_by_expert" if mark in NAMES else None if unsloth else False
        return cls(version, by_expert=by_expert)

    def for_replacement(self, replacement: str) -> StackLayout:
        """Return this layout for a load that `replacement` does instead of PEFT.

        Columns by expert become an open question, as the replacement may put them in order itself.
        """
        return replace(self, left_to=replacement, by_expert=None if self.by_expert else self.by_expert)

    def with_names(self, names: str | Collection[str]) -> StackLayout:
        """Return this layout with the caller's `expert_layout`: one name or several; later ones win.

        Raises:
            ConfigError: there is no layout of such a name.
        """
        out = self
        for name in [names] if isinstance(names, str) else names:
            if name not in NAMES:
                raise ConfigError(f"expert_layout={names!r}: '{name}' is none of {', '.join(NAMES)}.")
            out = replace(out, **NAMES[name])
        return out

    def find_exchanges(
        self, stacks: Mapping[str, tuple[bool | None, bool]], doubts: set[str]
    ) -> dict[str, tuple[bool, bool]]:
        """Return {stack: (exchanged, by_version)}: whether A and B of a stack are exchanged in a file, and whether only
        PEFT's version says so.

        The stack's shape decides first, for a square stack this layout. Then the shapes of other stacks in modules of
        the same orientation decide, if they agree; last PEFT's version.

        Args:
            stacks: {stack: (verdict of its shapes, None if square; whether its module holds (in, out))}.
            doubts: gets "exchanged" if nothing tells.
        """
        by_shape = {kind: {s for s, t in stacks.values() if s is not None and t == kind} for kind in (False, True)}
        verdicts = {}
        for key, (shape, transposed) in stacks.items():
            exchanged, by_version = self.exchanged if shape is None else shape, False
            if exchanged is None and len(by_shape[transposed]) == 1:
                (exchanged,) = by_shape[transposed]
            if exchanged is None:
                exchanged, by_version = decide_exchange(self.version, transposed)
                doubts |= set() if by_version else {"exchanged"}
            verdicts[key] = exchanged, by_version
        return verdicts

    def warn_of_doubts(self, doubts: set[str], what: str) -> None:
        """Give one PeftWarning for each of the `doubts` "exchanged", "twice" and "by_expert", which names the
        `expert_layout` option that settles it.

        Each text begins with the given clause, which names adapter and file. Texts differ with the version of
        PEFT and with a package that replaced `load_adapter`.
        """
        if "exchanged" in doubts:
            read = "exchanged, as PEFT before 0.18 wrote them" if self.version is None else "as PEFT 0.19.1 writes them"
            warn(
                f"{what} has square stacks of experts, and does not tell whether A and B are exchanged: they were "
                f"read {read}. Pass expert_layout='exchanged' if PEFT before 0.19.1 trained it, 'peft' if a later one "
                "did.",
                PeftWarning,
            )
        if "twice" in doubts:
            warn(
                f"{what}: expert_layout='grouped_by_expert' has put the columns of B in order. PeftModel.load_adapter "
                f"was replaced by {self.left_to}: if that does so as well, leave expert_layout out.",
                PeftWarning,
            )
        if "by_expert" in doubts:
            read = "they were read as PEFT writes them"
            if self.left_to is not None:
                read = f"that is left to {self.left_to}, which has replaced PeftModel.load_adapter"
            warn(
                f"{what} was trained by Unsloth and does not tell the order of the columns of B of stacks of experts: "
                f"{read}. Pass expert_layout='grouped_by_expert' if Unsloth before September 2026 trained it"
                + (", 'rank_major' if a later one did." if self.left_to is None else " and that leaves it alone."),
                PeftWarning,
            )


TODAY = StackLayout()


def decide_exchange(version: str | None, transposed: bool) -> tuple[bool, bool]:
    """Return (exchanged, sure): whether a PEFT of this version wrote A of a stack as B and B as A, and whether that is
    sure.

    Without a version the result is (True, False), and (False, True) if `transposed`. 0.19.0 exchanged all stacks,
    earlier versions those that are not transposed, 0.19.1 and later none. Development versions around 0.19.0, and
    unreadable ones, give (False, False).

    Args:
        version: None: the file names none, as before 0.18.
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
