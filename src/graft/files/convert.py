# SPDX-License-Identifier: Apache-2.0
"""From any format of adapter files to any other, by the neutral form."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from graft.files import names
from graft.files.base import BaseDescription
from graft.files.bases import open_base
from graft.files.formats import is_model, read, recognise, writer_of
from graft.files.holding import PEFT, fit_to_format, unify_scales_and_ranks
from graft.files.lint import check_whole
from graft.files.lycoris import lycoris_to_peft
from graft.files.neutral import LostModule
from graft.files.sources import check_output, place_when_done

ENDS = {"kohya": ".safetensors", "gguf": ".gguf", "diffusers": ".safetensors"}  # of formats that are one file


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        path: of what was written; where it would be, if nothing was.
        modules: how many were written.
        lost: what was not.
        rounding: the largest relative error of an entry of B, into which a scale was folded.
    """

    source: str
    path: str
    of: str
    to: str
    modules: int
    lost: list[str]
    rounding: float


def convert_adapter_file(
    source: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | BaseDescription | None = None,
    lossy: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Write an adapter in another format. The source is never changed.

    Args:
        source: a file or folder of any format that graft reads.
        to: the name of a format.
        out: a file or folder; beside the source if None.
        base: the base model, or what `graft.files.bases.open_base` takes: names, sizes, and values where ΔW depends on
            them.
        lossy: leave out what the format cannot hold.
        force: replace what is at `out`.
        dry_run: write nothing that stays.

    Raises:
        LossError: the format cannot hold all of it, and `lossy` is False.
        BaseNeededError: one of the formats needs a base.
        BaseModelMismatchError: the adapter does not fit the base.
        CheckpointError: the source is damaged, or no adapter.
        OutputExistsError: there is something at `out`.
        OptionError: `out` is the source or the base, or lies in one of them.
    """
    source = os.fspath(source)
    form, of = writer_of(to), recognise(source)
    target = os.path.abspath(choose_output_path(source, to) if out is None else os.fspath(out))
    if to in ENDS and out is not None and os.path.isdir(target) and not force and not is_model(target):
        target = os.path.join(target, f"adapter{ENDS[to]}")
    elif to == "kohya" and not target.endswith(ENDS[to]) and not os.path.lexists(target):
        target += ENDS[to]  # by which its readers know it
    known = open_base(base) if isinstance(base, (str, os.PathLike)) else base
    check_output(target, [source, *([] if known is None else [known.path])], force)
    adapter = read(source, known)
    if known is not None and not adapter.has_flat_names:
        known = names.check_modules(adapter, known)
        if to == "peft":
            adapter, known = names.to_model_names(adapter, known)
    check_whole(adapter, known)
    lost: list[str] = []
    if to == "peft":
        adapter, lost = fit_to_format(lycoris_to_peft(adapter, known), PEFT, to, lossy, known)
    rounding = (
        unify_scales_and_ranks(replace(adapter, modules=dict(adapter.modules)), form.HOLDS) if to != "peft" else 0.0
    )
    with place_when_done(target, not dry_run) as temporary:
        losses = form.write(adapter, temporary, known, lossy)
    written = len(adapter.modules) - sum(isinstance(line, LostModule) for line in losses)
    return Conversion(source, target, of, to, written, lost + losses, rounding)


def choose_output_path(source: str, to: str) -> str:
    """Return where a conversion goes by itself: next to its source, with the format in its name."""
    stem = os.path.abspath(source)
    if os.path.isfile(stem):
        stem = os.path.splitext(stem)[0]
    return f"{stem}-{to}{ENDS.get(to, '')}"
