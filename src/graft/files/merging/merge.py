# SPDX-License-Identifier: Apache-2.0
"""Merge adapter files into a model's folder, tensor by tensor: at most one weight is in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from graft import BaseModelMismatchError, CheckpointError, LossError, NonFiniteError
from graft.config.atomic import replace_file
from graft.config.pair import StackLayout
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.files.base import (
    CERTIFICATE,
    INDEX,
    BaseDescription,
    check_file_is_inside,
    list_needed_files,
    list_shards,
    read_base_files,
)
from graft.files.errors import OptionError
from graft.files.formats import read
from graft.files.lint import check_whole
from graft.files.lycoris import kasa_to_lora
from graft.files.merging.folds import MergeJob, TensorChange, list_changes
from graft.files.merging.stream import Out, Workplace, sha256_of
from graft.files.merging.ties import Tied, are_alike, find_tied_groups, name_architecture, resize_vocabulary
from graft.files.merging.weights import FLOATS, TORCH, BaseWeights, find_base_weights, measure_loss, to_bytes
from graft.files.neutral import AdapterFile, LowRank
from graft.files.places import CheckpointPlaces
from graft.files.skeleton import build_meta_model
from graft.files.sources import check_output
from graft.files.tensors import Bytes

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
KEPT = 0.9  # share of an update; less is worth a note


@dataclass
class Merged:
    """The account of a merge.

    Attributes:
        tensors: names of the changed tensors, with the certificate's entry for each, once they are written.
        notes: sentences for the user about losses, replaced results, tied tensors and files that are not copied.
        shards: file → bytes of its tensors.
    """

    output: str
    tensors: dict[str, Json] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shards: dict[str, int] = field(default_factory=dict)
    resumed: int = 0  # shards that an earlier run had written


def merge_files(base: str | os.PathLike[str], adapters: Any, output: str | os.PathLike[str], **options: Any) -> Merged:
    """Merge adapter files of any method with a merged form into a model's folder, tensor by tensor.

    `merge_adapters` has the options, result and errors. Values are computed on the CPU, whatever torch's default
    device.

    Args:
        adapters: one path, or a list.
    """
    adapters = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    on_cpu = torch.empty(0).device.type == "cpu"  # values come from files, whatever device is the default
    with nullcontext() if on_cpu else torch.device("cpu"):
        return merge_adapters(base, adapters, output, **options)


def merge_adapters(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    shard_size: int | None = None,
    certificate: bool = False,
    keep_quantized: bool = False,
    force: bool = False,
    dry_run: bool = False,
    step: Callable[[str], None] | None = None,
) -> Merged:
    """Write a model's folder with adapters merged into it, one after another: W ← W + weight · ΔW, rounded once.

    Peak memory is one weight in float32, plus the temporaries of the certificate's figures. The same call continues a
    run that was killed; an error deletes the unfinished output. Sources are never changed.

    Args:
        base: a folder with config.json and safetensors files.
        adapters: files or folders of any format that graft reads.
        weights: one for each adapter; None: 1. For an adapter that does not add, such as DoRA, W moves that part of the
            way to the adapter's result.
        dtype: "float32", "float16", "bfloat16" for all floating tensors; None: each keeps its own.
        shard_size: bytes; None: the base's shards.
        certificate: write merge.json.
        keep_quantized: a quantized checkpoint stays quantized; else it becomes a dense one.
        force: replace an output that exists.
        dry_run: check everything, write nothing, and return the account without measures.
        step: called with the name of each shard that is finished.

    Raises:
        OutputExistsError, CheckpointError, BaseModelMismatchError, LossError, OptionError, OSError: before anything has
            been written, except for faults of values.
        NonFiniteError: a merged weight holds NaN or is infinite, or does not fit float16.
    """
    files = read_base_files(base)
    output, paths = os.fspath(output), [os.fspath(a) for a in adapters]
    weights = [1.0] * len(paths) if weights is None else [float(w) for w in weights]
    key = digest_inputs([files.path, *paths], [weights, dtype, shard_size, keep_quantized])
    place = Workplace(output, key, force)
    check_output(output, [files.path, *paths], force, model=True)
    work = Work(files, paths, weights, dtype, keep_quantized)
    layout = work.layout(shard_size)
    sizes = {name: sum(out.nbytes for out in outs) for name, outs in layout.items()}
    account = Merged(output, {key: {} for key in work.changed}, work.notes, sizes)
    if dry_run:
        return account
    with place.lock(layout, work.changed):
        account.resumed = len(place.done)
        place.check_room(layout)
        place.write(layout, step)
        for row in (row for shard in place.done.values() for row in shard["rows"]):
            account.tensors[row["tensor"]] = {name: value for name, value in row.items() if name != "tensor"}
        note_losses(account)
        work.small_files(place.folder, layout)
        if certificate:
            text = json.dumps(make_certificate(work, place, account), indent=1)
            replace_file(os.path.join(place.folder, CERTIFICATE), text + "\n")
        place.finish()
    return account


def digest_inputs(paths: Iterable[str], options: list[object]) -> str:
    """Return a sha256 digest of the options and, in the order of `paths`, of each input file's real path, size and
    modification time in ns.

    Files of a folder count sorted, without subfolders and hidden files; a missing path adds nothing.
    """
    seen: list[object] = [options]
    for path in paths:
        for name in sorted(list_input_files(path)):
            stat = os.stat(name)
            seen.append([os.path.realpath(name), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def list_input_files(path: str) -> list[str]:
    """Return the paths of the files directly in a folder, unsorted and without hidden ones, or [path] for a file; [] if
    the path does not exist.
    """
    if not os.path.isdir(path):
        return [path] if os.path.exists(path) else []
    return [e.path for e in os.scandir(path) if e.is_file() and not e.name.startswith(".")]


class Work:
    """A merge that is checked and not yet written.

    Attributes:
        changed: name of an output tensor → its changes, in the order of the adapters.
        notes: sentences for the user.
    """

    def __init__(
        self, base: BaseDescription, adapters: list[str], weights: list[float], dtype: str | None, keep_quantized: bool
    ):
        """Read all adapters, list their changes, and check them against the base and each other.

        No weight is merged yet, and nothing is written.

        `notes` gets sentences for the user: files of the base that will not be copied, replaced results, and ties that
        end.

        Args:
            dtype: of the result; None: the base's.

        Raises:
            OptionError: there is no adapter, the number of weights differs, a weight is not finite, the dtype is
                unknown, `keep_quantized` for a plain base, or adapters exclude each other.
            LossError, BaseModelMismatchError, CheckpointError, UnsupportedLayerError: an adapter or the base cannot be
                merged.
        """
        if not adapters:
            raise OptionError("There is no adapter to merge. Give one.")
        if len(weights) != len(adapters):
            raise OptionError(f"{len(weights)} weights for {len(adapters)} adapters. Give one for each.")
        if not all(map(math.isfinite, weights)):
            raise OptionError(f"Weights are finite numbers, not {', '.join(map(str, weights))}.")
        if dtype is not None and dtype not in DTYPES:
            raise OptionError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
        self.beside, skipped = list_needed_files(base)
        self.base, self.notes = base, [f"Not copied from the base: {join_some(skipped)}."] if skipped else []
        self.paths, self.dtype = adapters, None if dtype is None else DTYPES[dtype]
        self.weights = weights
        self.base_weights: BaseWeights = find_base_weights(base)
        self.keep = keep_quantized and bool(self.base_weights.packed)
        if keep_quantized and not self.base_weights.packed:
            raise OptionError(f"{base.path} is not quantized. Leave --keep-quantized out.")
        self.model = cache(partial(build_meta_model, base.path))
        self.tied: Tied = Tied(
            self.base_weights.shapes, partial(find_tied_groups, self.model, base.config, self.base_weights.shapes)
        )
        self.places = CheckpointPlaces(self.tied.shapes, self.model)
        self.changed: dict[str, list[TensorChange]] = {}
        self.adapters = [self._read(path) for path in adapters]
        kinds: Any = {name: TORCH[t.dtype] for name, t in base.tensors.items() if t.dtype in FLOATS}
        for weight, adapter in zip(self.weights, self.adapters):
            job = MergeJob(adapter, weight, self.places, base.config, self._is_transposed, kinds, self._read_own)
            self._add(job)
        self.notes += self.tied.locate_all(self.changed)
        self._check_writable()

    def _read(self, path: str) -> AdapterFile:
        """Return the adapter at `path`, with KaSA converted to LoRA.

        Raises:
            LossError: it has tensors that graft does not know.
        """
        adapter = read(path, self.base)
        if adapter.unknown_keys:
            raise LossError(
                f"Nothing is known of {len(adapter.unknown_keys)} tensors of {path}, and merging would drop them: "
                f"{join_some(adapter.unknown_keys, 4)}. Remove them from the file."
            )
        return kasa_to_lora(adapter, self.base)

    def _add(self, job: MergeJob) -> None:
        """Add one adapter's changes to `changed`, with copies for tied tensors.

        Add a note to `notes` for each tensor where the adapter replaces another result of an earlier one.

        For modules that are not low rank, and shared tensors, `list_method_changes` builds the model. Changes before a
        failing one stay.

        Raises:
            LossError: a layer's effect is none on a weight.
            CheckpointError: it changes no weight, or its file is not whole.
            OptionError: it and an earlier adapter bring the same new tensor, give a tensor different shapes, or replace
                the same rows or a tensor that has one value.
        """
        adapter = job.adapter
        self.tied.look_at(adapter)
        new_changes = list_changes(job)
        check_whole(adapter, self.base)
        unusual = {path: module for path, module in adapter.modules.items() if not isinstance(module, LowRank)}
        if unusual or adapter.shared:
            from graft.files.merging.methods import list_method_changes  # which builds models

            new_changes += list_method_changes(job, self.base)
        if not new_changes:
            raise CheckpointError(f"{job.name} ({adapter.method}) changes no weight. Give another adapter.")
        together = self.tied.spread(new_changes, adapter)
        for change in together:
            before = self.changed.setdefault(change.key, [])
            if change.new and any(c.new for c in before):
                raise OptionError(f"Two adapters bring a new tensor '{change.key}'. Merge one of them.")
            if before and before[-1].shape not in (change.shape, self.tied.shapes.get(change.key)):
                raise OptionError(
                    f"{job.name} takes '{change.key}' for {change.shape}, and an adapter merged before it makes that "
                    f"{before[-1].shape}. Merge one of the two, or train this one on the merged model."
                )
            if any(change.alone or c.alone or change.rows & c.rows for c in before):
                what = f"rows of '{change.key}'" if change.rows else f"'{change.key}'"
                raise OptionError(
                    f"{job.name} and an adapter before it each replace {what}, which has one value. Merge one of them."
                )
            if before and change.replaces and not are_alike(before, [change]):
                self.notes.append(f"'{change.key}' is as {job.name} brings it: what came before changes nothing there.")
            before.append(change)

    def _is_transposed(self, path: str) -> bool:
        """Return True if the parameter's module in the base's model has `is_transposed`: its stacks are stored (in,
        out).

        False if the model or the module is unknown.
        """
        model = self.model()
        try:
            owner = None if model is None else model.get_submodule(path.rpartition(".")[0])
        except AttributeError:
            owner = None
        return bool(getattr(owner, "is_transposed", False))

    def _check_writable(self) -> None:
        """Raise BaseModelMismatchError if a changed tensor of the base is neither floating point nor packed in a known
        form.
        """
        for key in self.changed:
            kind = None if key not in self.base.tensors else self.base.tensors[key].dtype
            if key not in self.base_weights.packed and kind is not None and kind not in FLOATS:
                raise BaseModelMismatchError(
                    f"'{key}' of {self.base.path} is of dtype {kind} in an unknown form. Merge before quantization."
                )

    # the plan of the output

    def layout(self, shard_size: int | None) -> dict[str, list[Out]]:
        """Return file → its tensors for the output, in the order of the base's shards and their tensors.

        A packed weight becomes one dense tensor, unless it is kept quantized. Unchanged tensors are copied, in the
        output's dtype. New tensors go to the file of the tensor that they are tied to, else to the last. Files without
        tensors are left out. With `shard_size` in bytes the tensors are split anew.
        """
        parts = {part: name for name, names in self.base_weights.packed.items() for part in names}
        by_file: dict[str, list[Out]] = {name: [] for name in list_shards(self.base.path)}
        for key, file in self.base.files.items():
            if (name := parts.get(key)) is not None:
                by_file[file] += self._list_packed(name, key)
            elif key in self.changed:
                by_file[file].append(self._edit(key))
            else:
                by_file[file].append(self._copy(key))
        last = next(reversed(by_file))
        for key in self.changed:
            if key not in self.base.tensors and key not in self.base_weights.packed:
                by_file[self.base.files.get(self.tied.source(key), last)].append(self._edit(key))
        by_file = {name: outs for name, outs in by_file.items() if outs}
        return by_file if shard_size is None else split_shards(by_file, shard_size)

    def _list_packed(self, name: str, key: str) -> list[Out]:
        """Return the output's tensors for the tensor `key` of the packed weight `name`.

        Kept quantized: `key` itself, copied or packed anew. Else the dense weight, if `key` is the first of its
        tensors, and [] for the others.
        """
        if self.keep:
            if name not in self.changed:
                return [self._copy(key, cast=False)]
            old = self.base.tensors[key]
            return [Out(key, old.dtype, old.shape, partial(self._repack, name, key))]
        return [self._edit(name)] if key == self.base_weights.packed[name][0] else []

    def _copy(self, key: str, cast: bool = True) -> Out:
        """Return the output tensor that copies a base tensor; a floating one is cast to the output's dtype unless
        `cast` is False. It has no certificate entry.
        """
        tensor = self.base.tensors[key]
        if cast and self.dtype is not None and tensor.dtype in FLOATS and tensor.dtype != self.dtype:
            dtype = self.dtype
            load = lambda: (to_bytes(self._in_dtype(key, self.base_weights.read(key), dtype)), None)
            return Out(key, dtype, tensor.shape, load)
        return Out(key, tensor.dtype, tensor.shape, lambda: (tensor.load(), None))

    def _edit(self, key: str) -> Out:
        """Return the output tensor of a dense weight with its changes, if it has some, in the last change's shape."""
        folds = self.changed.get(key, [])
        shape = folds[-1].shape if folds else self.tied.shapes[key]
        dtype = self._dtype(key)
        return Out(key, dtype, shape, partial(self._fold, key, dtype))

    def _dtype(self, key: str) -> str:
        """Return safetensors' name of an output tensor's dtype: the option's dtype if there is one, else that of the
        tensor it comes from. A tied tensor that the base lacks comes from its twin, and a packed one has the dtype of
        unpacked weights.

        A new tensor gets the base's most frequent floating dtype, the first of several, "F32" without one.
        """
        if self.dtype is not None:
            return self.dtype
        source = self.tied.source(key)
        if source in self.base_weights.packed:
            return self.base_weights.dtype
        if source in self.base.tensors:
            return self.base.tensors[source].dtype
        kinds = [t.dtype for t in self.base.tensors.values() if t.dtype in FLOATS]
        return max(dict.fromkeys(kinds), key=kinds.count) if kinds else "F32"  # the first of several, in every process

    # values

    def _read_own(self, key: str) -> torch.Tensor:
        """Return a copy of the base's value of a tensor, or of the one that it is tied to, in float32 or float64."""
        W = self.base_weights.read(self.tied.source(key))
        return W.to(torch.promote_types(W.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def _exact(self, key: str) -> torch.Tensor:
        """Return a tensor with all its changes applied in their order, in at least float32; without changes it is the
        base's. A new tensor starts from an empty one.

        Each change also gets a function that returns the base's own values, without earlier changes: for the first a
        view of the current value, for later ones a new copy.

        Raises:
            NonFiniteError: a change leads to NaN or infinite values.
        """
        folds = self.changed.get(key, [])
        W = torch.empty(0) if folds and folds[0].new else self._read_own(key)
        for i, change in enumerate(folds):
            W = change.fold(W, partial(self._read_own, key) if i else partial(torch.Tensor.view_as, W, W))
            if not W.isfinite().all():
                raise NonFiniteError(
                    f"Merged, '{change.param}' holds NaN or infinite numbers. Train or download the adapter again."
                )
        return W

    def _fold(self, key: str, dtype: str) -> tuple[Bytes, Json | None]:
        """Return the bytes of a merged tensor in `dtype`, and its certificate entry."""
        exact = self._exact(key)
        after = self._in_dtype(key, exact, dtype)
        return to_bytes(after), self._row(key, exact, after)

    def _in_dtype(self, key: str, exact: torch.Tensor, dtype: str) -> torch.Tensor:
        """Return the values in `dtype` (safetensors' name).

        For "F16" raises NonFiniteError if one is beyond its range, infinite or NaN.
        """
        after = exact.to(TORCH[dtype])
        if dtype == "F16" and not after.isfinite().all():
            raise NonFiniteError(f"'{key}' holds numbers beyond float16's 65504. Use --dtype bfloat16 or float32.")
        return after

    def _row(self, key: str, exact: torch.Tensor, after: torch.Tensor) -> Json | None:
        """Return the certificate entry of a merged tensor: its losses (`measure_loss`), {"new": True}, or {"resized":
        [old, new shape]}.

        None for a key that is not in `changed`; with an empty list of changes there the losses are measured. A first
        change marked `new` gives {"new": True}.
        """
        if key not in self.changed:
            return None
        if self.changed[key] and self.changed[key][0].new:
            return {"new": True}
        before = self.base_weights.read(self.tied.source(key))
        if before.shape != exact.shape:
            return {"resized": [list(before.shape), list(exact.shape)]}
        return measure_loss(before, exact, after)

    @torch.no_grad()
    def _repack(self, name: str, key: str) -> tuple[Bytes, Json | None]:
        """Return the bytes of tensor `key` of the packed weight `name`, merged and packed anew, and a certificate
        entry.

        The entry, with the losses of rounding and packing and `name` as "tensor", is on the first of its tensors only;
        None on the others.
        """
        exact = self._exact(name)
        parts = self.base_weights.pack(name, exact)
        row = None
        if key == self.base_weights.packed[name][0]:
            row = measure_loss(self.base_weights.read(name), exact, self.base_weights.unpack(name, parts))
            row["tensor"] = name
        return parts[key].load(), row

    # the rest

    def small_files(self, folder: str, layout: dict[str, list[Out]]) -> None:
        """Write config.json and the index to `folder`, and copy the files that the model needs besides its weights.

        No config is written if the base has none, and no index if the only shard is model.safetensors.

        Raises:
            CheckpointError: a file leads out of the base's folder by now.
        """
        for name in self.beside:
            check_file_is_inside(self.base.path, name)  # once more, since the merge may have taken hours
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            replace_file(target, partial(shutil.copyfile, os.path.join(self.base.path, name)))
        if self.base.config:
            text = json.dumps(self.config(), indent=2, ensure_ascii=False)
            replace_file(os.path.join(folder, "config.json"), text + "\n")
        if [*layout] != ["model.safetensors"]:
            total = sum(out.nbytes for outs in layout.values() for out in outs)
            names = {out.name: file for file, outs in layout.items() for out in outs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            replace_file(os.path.join(folder, INDEX), json.dumps(index, indent=2) + "\n")

    def config(self) -> Json:
        """Return config.json of the output: a copy of the base's with the changes of the merge.

        - `quantization_config` and `compression_config` are removed if packed weights become dense.
        - `dtype` or `torch_dtype`, whichever is there, or else `dtype`, is set if the option has one.
        - `tie_word_embeddings` is False if tied tensors differ now; `vocab_size` follows a resized tensor.
        - `architectures` and labels follow a new head.
        """
        dropped = ("quantization_config", "compression_config") if self.base_weights.packed and not self.keep else ()
        config = {name: value for name, value in self.base.config.items() if name not in dropped}
        if self.dtype is not None:
            kind = next(name for name, code in DTYPES.items() if code == self.dtype)
            config |= {name: kind for name in ("dtype", "torch_dtype") if name in config} or {"dtype": kind}
        self.tied.mark(config)
        resize_vocabulary(config, self.changed, self.base_weights.shapes)
        return name_architecture(config, self.changed, self.adapters)


def split_shards(by_file: dict[str, list[Out]], size: int) -> dict[str, list[Out]]:
    """Return the tensors in new files of at most `size` bytes, in the same order; a larger tensor gets a file alone.

    The name is model.safetensors for one file, else model-00001-of-N.safetensors.
    """
    groups: list[list[Out]] = [[]]
    for out in (out for outs in by_file.values() for out in outs):
        if groups[-1] and sum(o.nbytes for o in groups[-1]) + out.nbytes > size:
            groups.append([])
        groups[-1].append(out)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": outs for i, outs in enumerate(groups, 1)}


def note_losses(account: Merged) -> None:
    """Add one note to the account, with their number and the worst, if rounding removed more than a tenth of the update
    of some tensors.
    """
    lost = {key: row["kept"] for key, row in account.tensors.items() if row.get("kept", 1.0) < KEPT}
    if lost:
        worst = min(lost, key=lost.__getitem__)
        account.notes.append(
            f"Rounding lost more than a tenth of the update of {len(lost)} tensors; '{worst}' holds {lost[worst]:.0%} "
            "of it. --dtype float32 keeps all."
        )


def make_certificate(work: Work, place: Workplace, account: Merged) -> Json:
    """Return the content of merge.json: graft ("1"), peft_format, base, adapters, output, dtype, quantized, tensors and
    notes. Base, adapters and output have the sha256 of their files.

    Reads all files of base and adapters for their digests.
    """
    base = [os.path.join(work.base.path, name) for name in {*work.base.files.values(), "config.json"}]
    return {
        "graft": "1", "peft_format": StackLayout().version,
        "base": {"path": work.base.path, "files": hash_files(base), "form": work.base_weights.form},
        "adapters": [
            {"path": p, "weight": w, "format": a.format, "method": a.method, "files": hash_files(list_input_files(p))}
            for p, w, a in zip(work.paths, work.weights, work.adapters)
        ],
        "output": {name: shard["sha256"] for name, shard in place.done.items()},
        "dtype": work.dtype, "quantized": work.keep,
        "tensors": account.tensors, "notes": account.notes,
    }  # fmt: skip


def hash_files(paths: Iterable[str]) -> dict[str, str]:
    """Return file name, without folder → sha256 for the files at `paths`, sorted by path.

    Files that do not exist are left out; of equal names the last counts.
    """
    by_name = {}
    for path in sorted(paths):
        with suppress(FileNotFoundError):
            by_name[os.path.basename(path)] = sha256_of(path)
    return by_name
