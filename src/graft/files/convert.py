# SPDX-License-Identifier: Apache-2.0
"""Conversion of an adapter file from any format to any other, through the neutral form AdapterFile."""

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

# format → file ending, for formats of one file
ENDS = {"kohya": ".safetensors", "gguf": ".gguf", "diffusers": ".safetensors"}


@dataclass
class Conversion:
    """The account of a conversion.

    Attributes:
        source: path of the adapter that was read.
        path: of the output; with `dry_run` where it would be.
        of: the source's format.
        to: the output's format.
        modules: the number of modules in the output.
        tensors: the number of tensors outside of modules in the output, such as whole weights and rows of embeddings.
        lost: descriptions of the parts that the output lacks.
        rounding: the largest relative error of an entry of B, from folding a scale into it.
    """

    source: str
    path: str
    of: str
    to: str
    modules: int
    lost: list[str]
    rounding: float
    tensors: int = 0


def convert_adapter_file(
    source: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | BaseDescription | None = None,
    lossy: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Write an adapter in another format, and return an account. The source is never changed.

    The output appears whole or not at all. For kohya a missing ".safetensors" is appended. If `out` is an existing
    folder and the format is one file, the output is `adapter` in it, unless `force` is given or the folder is a model.
    To "peft" the modules get the names of the base's model.

    Args:
        source: a file or folder of any format that graft reads.
        to: the name of a format that graft writes.
        out: a file or folder; None: next to the source, with the format in its name.
        base: the base model, or its path. It gives names and shapes, and values where the conversion needs them.
        lossy: drop the parts that the format cannot hold.
        force: replace an existing output.
        dry_run: do everything, and delete the output again.

    Raises:
        LossError: the format cannot hold all of the adapter, and `lossy` is False; or it can hold nothing.
        BaseNeededError: one of the formats needs a base.
        BaseModelMismatchError: the adapter does not fit the base.
        CheckpointError: the source is damaged, incomplete, or no adapter.
        OutputExistsError: the output exists, and `force` is False or must not replace it.
        OptionError: the format is unknown, or `out` overlaps the source or the base.
    """
    source = os.fspath(source)
    form, of = writer_of(to), recognise(source)
    target = os.path.abspath(choose_output_path(source, to) if out is None else os.fspath(out))
    if to in ENDS and out is not None and os.path.isdir(target) and not force and not is_model(target):
        target = os.path.join(target, f"adapter{ENDS[to]}")
    elif to == "kohya" and not target.endswith(ENDS[to]) and not os.path.lexists(target):
        target += ENDS[to]  # readers recognize kohya's files by it
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
    tensors = len(adapter.loose_tensors) if to == "peft" else 0  # no other format holds any
    return Conversion(source, target, of, to, written, lost + losses, rounding, tensors)


def choose_output_path(source: str, to: str) -> str:
    """Return the default output path: the source's absolute path without a file's ending, plus "-" and the format, plus
    the format's ending.
    """
    stem = os.path.abspath(source)
    if os.path.isfile(stem):
        stem = os.path.splitext(stem)[0]
    return f"{stem}-{to}{ENDS.get(to, '')}"
