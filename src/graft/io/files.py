# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Reading and writing the files of an adapter, which change together. Only this process writes."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np  # torch reads no read-only bytes
import torch
from torch import Tensor

from graft.config import notes, pair, seal
from graft.config.atomic import replace_file
from graft.config.base import PeftConfig, make_config, make_files, why_no_config
from graft.config.hub import HUB_KEYWORDS, describe_offline, fetch_file, select_hub_keywords
from graft.config.pair import SAFETENSORS as SAFETENSORS_WEIGHTS_NAME
from graft.config.pair import TODAY, AdapterInMemory, ConfigFile, StackLayout, describe_whole_model
from graft.config.pair import TORCH as WEIGHTS_NAME
from graft.config.reading import check_tensors_by_name, describe_fault, load_torch_file, open_file
from graft.core.errors import CheckpointError, NonFiniteError, join_some
from graft.io.entries import rename_keys
from graft.io.fingerprint import KEY, Fingerprint, read_fingerprint
from graft.io.rendezvous import GATHER
from graft.io.tensors import PackedTensors, copy_to_cpu, digest_tensors, write_safetensors
from graft.storage.parallel import is_sharded

READING = HUB_KEYWORDS | {"subfolder", "check_digest", "expert_layout"}  # options of `read_checkpoint`
LOOKS = 5  # attempts to find the weights, as another process may replace them by the other format


@dataclass
class LoadedWeights:
    """The content of a weights file, and its notes."""

    tensors: dict[str, Tensor]
    path: str
    fingerprint: Fingerprint | None = None  # the base model's, if graft wrote the file
    noted: notes.WeightsFile | None = None  # path, config and time of the file
    layout: StackLayout = TODAY  # of the factors of stacks
    finite: bool = False  # True: all numbers are known to be finite; False: not checked

    @classmethod
    def from_state_dict(cls, state_dict: object) -> LoadedWeights:
        """Return the weights in a caller's state dict, as a new dict.

        Raises CheckpointError unless it maps names to tensors.
        """
        where = "the given state dict"
        return cls(check_tensors_by_name(state_dict, where), where)


class AdapterSnapshot(NamedTuple):
    """A copy of an adapter, which later steps do not change.

    `AdapterSlots.load(name, snapshot.tensors, config=snapshot.config)` uses it without a file.

    Attributes:
        config: of the adapter.
        tensors: by their names in a file.
        base: the fingerprint of the base model.
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    base: Fingerprint

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write weights (safetensors), config and further files of the adapter straight into `folder`, by
        `save_adapter`; no model card.
        """
        save_adapter(os.fspath(folder), self.tensors, self.config, True, self.base)


def save_adapter(
    folder: str, tensors: dict[str, Tensor], config: PeftConfig, safetensors: bool, fingerprint: Fingerprint
) -> None:
    """Write weights, config and further files of an adapter into `folder`, which is made if needed.

    On an error the old files stay. The weights file also holds the fingerprint, the config and a digest. Tensors are
    copied to the CPU first. An older weights file of the other format is deleted.

    Args:
        safetensors: write adapter_model.safetensors; else adapter_model.bin.

    Raises:
        CheckpointError: there is no tensor, or one is sharded.
    """
    check_saved_tensors(folder, tensors)
    beside = make_files(config)
    text = beside.pop(pair.CONFIG_NAME).decode()
    os.makedirs(folder, exist_ok=True)
    on_cpu: Any = PackedTensors.copy(tensors) if safetensors else copy_to_cpu(tensors)
    noted = {KEY: json.dumps(fingerprint), notes.CONFIG: text, seal.KEY: digest_tensors(on_cpu)}

    def write(path: str) -> None:
        """Write the weights to `path`: as safetensors with the notes in the metadata, else by `torch.save`, with the
        notes put into that file afterwards.
        """
        if safetensors:
            write_safetensors(path, on_cpu, {"format": "pt", **noted})
        else:
            with open(path, "w+b") as f:  # given a path, torch writes its name into the file
                torch.save(on_cpu, f)
                notes.add_notes(f, noted)

    pair.save_pair(folder, SAFETENSORS_WEIGHTS_NAME if safetensors else WEIGHTS_NAME, write, text, beside)


def write_sealed(path: str, tensors: dict[str, Tensor], texts: Mapping[str, str] | None = None) -> None:
    """Write copies of tensors with their digest to `path`, whole or not at all: an error leaves the old file.

    Args:
        texts: contents of further text files in the folder, by name. Each is written before, whole or not at all.
    """
    for name, text in (texts or {}).items():
        replace_file(os.path.join(os.path.dirname(path), name), text)
    packed = PackedTensors.copy(tensors)
    replace_file(path, lambda to: write_safetensors(to, packed, {"format": "pt", seal.KEY: packed.digest()}))


def write_torch_file(path: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a file of torch.save, whole or not at all, and make its folder: "." for a path without one.

    Errors of torch and of the disk are raised as they are.
    """

    def write_file(where: str) -> None:
        """Write the tensors to a path. An open file reports a full disk, which torch 2.6 does not do for a path."""
        with open(where, "wb") as f:
            torch.save(tensors, f)

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    replace_file(path, write_file)


def check_saved_tensors(folder: str, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError if there is no tensor to save into `folder`, or one of them is sharded."""
    if not tensors:
        raise CheckpointError(
            f"There is no tensor to save into {folder}: the adapter is not in the model (any more). Save it before "
            "merge_and_unload(), unload() or delete_adapter(), or save the base model with its own save_pretrained()."
        )
    if spread := [k for k, t in tensors.items() if is_sharded(t)]:
        raise CheckpointError(f"'{spread[0]}' is sharded: each process holds a part of it. {GATHER}")


def load_pair(
    where: str, subfolder: str | None = None, check_digest: bool = True, **hub: object
) -> tuple[Any, LoadedWeights]:
    """Return an adapter's config and weights from a folder or hub repository, as one save wrote them.

    For a file without graft's note of a config, `layout` of the weights, which says how the file holds expert stacks,
    is set from the config.

    Args:
        check_digest: compare the tensors with the file's digest, if it has one.

    Raises:
        CheckpointError: one of them is missing or damaged.
        ConfigError: the config is not valid.
    """
    config_file = ConfigFile(where, subfolder, **hub)
    loaded = load_weights(where, subfolder, check_digest, **hub)
    fields = config_file.choose_fields(loaded.noted)
    if loaded.noted is None or loaded.noted.config is None:  # graft did not write it
        loaded.layout = StackLayout.from_config(fields)
    return make_config(fields, config_file.path, os.fspath(where), subfolder, **hub), loaded


def read_checkpoint(
    where: str | os.PathLike[str] | AdapterInMemory,
    options: dict[str, Any],
    replacement: Callable[[PeftConfig], str | None],
    config: PeftConfig | None = None,
) -> tuple[PeftConfig, LoadedWeights]:
    """Return config and tensors of a saved adapter, or of an `AdapterInMemory`. On the latter options have no effect.

    The layout of stacks of experts in the file is set from the config's version, from clients that replaced the
    loading, and from `expert_layout`.

    Args:
        where: folder or hub repository.
        options: keyword arguments of the caller: those for the hub, `subfolder`, `check_digest` and `expert_layout`;
            others are ignored.
        replacement: returns the name of the client that replaced the loading of adapters with a config, or None.
        config: use this instead of the stored one, which is then not read.

    Raises:
        ValueError: `config` is no config.
        ConfigError: `expert_layout` is no known layout.
        CheckpointError, HubError: as `PeftModel.from_pretrained`.
    """
    if isinstance(where, AdapterInMemory):
        return where.config, LoadedWeights(where.tensors, where.path)
    source = select_hub_keywords(options) | {"where": os.fspath(where), "subfolder": options.get("subfolder")}
    source["check_digest"] = options.get("check_digest", True)
    if config is None:
        config, loaded = load_pair(**source)
    elif not isinstance(config, PeftConfig):
        raise ValueError(f"The input config must be a PeftConfig, {why_no_config(config)}")
    else:
        loaded = load_weights(**source)
        if loaded.noted is None or loaded.noted.config is None:  # graft did not write it
            loaded.layout = StackLayout(config.peft_version)
    if (who := replacement(config)) is not None:
        loaded.layout = loaded.layout.for_replacement(who)
    if layouts := options.get("expert_layout"):
        loaded.layout = loaded.layout.with_names(layouts)
    return config, loaded


def load_weights(where: str, subfolder: str | None = None, check_digest: bool = True, **hub: object) -> LoadedWeights:
    """Return an adapter's weights from a folder or hub repository: the safetensors file if there, else the torch file.

    Looks up to 5 times, as another process may replace one format by the other meanwhile. A file from the hub is
    downloaded.

    Args:
        check_digest: as in `load_pair`.

    Raises:
        CheckpointError: there is no weights file, or it is damaged. The first says if it is a whole model, or the hub
            is offline.
    """
    for _ in range(LOOKS):
        for name, read in (
            (SAFETENSORS_WEIGHTS_NAME, partial(read_safetensors, check_digest=check_digest)),
            (WEIGHTS_NAME, partial(read_torch, check_digest=check_digest)),
        ):
            path = fetch_file(where, name, subfolder=subfolder, **hub)
            if path is not None:
                with suppress(FileNotFoundError):
                    return read(path)
    place = os.path.join(where, subfolder) if subfolder else where
    raise CheckpointError(
        f"Can't find weights for {place}: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is there, or on "
        f"the hub{describe_whole_model(place) or describe_offline(where, **hub)}."
    )


def read_torch(path: str, check_digest: bool = True) -> LoadedWeights:
    """Return the content of a torch file, with its notes.

    Tensors get separate memory: those that share it are copied.

    The digest is compared if the file has one, `check_digest` is True, and no tensor has a fault.

    Raises:
        CheckpointError: it is damaged, holds no dict of tensors, or its digest differs.
    """
    with open_file(path) as f:
        stamp, noted = notes.read_stamp(f.fileno()), notes.read_torch_notes(f)
        tensors = check_tensors_by_name(load_torch_file(f, path), path)
    if check_digest and seal.KEY in noted and not any(map(describe_fault, tensors.values())):
        seal.check_digest(noted[seal.KEY], digest_tensors(tensors), path)
    of_base = read_fingerprint(noted.get(KEY), path)
    return LoadedWeights(separate_memory(tensors), path, of_base, notes.WeightsFile(path, noted, stamp))


def separate_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a new dict of the tensors with copies of those that share memory with an earlier one or keep a larger
    storage alive.

    torch.save keeps shared memory, and Parameters made of such tensors would train as one. Tensors with a fault stay as
    they are, and so do the others.
    """
    out, seen = dict[str, Tensor](), set[int]()
    for key, t in tensors.items():
        if describe_fault(t) is None:  # loading refuses the others
            memory = t.untyped_storage()
            if memory.data_ptr() in seen or memory.nbytes() > t.nbytes:
                t = t.clone()
            seen.add(memory.data_ptr())
        out[key] = t
    return out


def read_safetensors(path: str, check_digest: bool = True, may_differ: bool = True) -> LoadedWeights:
    """Return the content of a safetensors file, read into memory, with tensors in the file's order and its notes.

    A mapped file would change a running model when overwritten, and kill the process when truncated. safetensors'
    `load` reads the tensors; after its ValueError those of `load_file` are copied. Another thread computes the digest
    meanwhile. `finite` is set if the sum of all numbers shows it. The result also has the fingerprint of the base and a
    stamp of the file.

    Args:
        check_digest: compare the tensors with the file's digest, if it has one.
        may_differ: the error for a wrong digest names `check_digest=False`. False: the file must have a digest, and
            `check_digest` be True.

    Raises:
        FileNotFoundError: there is no file.
        CheckpointError: it is damaged or unreadable, has an unknown dtype, is a git-lfs pointer, or its digest is wrong
            or missing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    with ThreadPoolExecutor(1) as beside:
        try:
            with open_file(path) as f:
                data, stamp = f.read(), notes.read_stamp(f.fileno())
            saved = notes.read_safetensors_notes(BytesIO(data)).get(seal.KEY) if check_digest else None
            digest = None if saved is None else beside.submit(seal.digest_file, data)
            try:
                unordered = load(data)
            except ValueError:  # tensors of no numbers (AdaLoRA's rank 0), which safetensors 0.4 reads from files alone
                unordered = {key: t.clone() for key, t in load_file(path).items()}
            header, _ = notes.parse_header(data)  # `load` does not return it
            # in the file's order, which `load` loses
            tensors = {key: unordered[key] for key in header if key in unordered}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, KeyError) as e:  # KeyError: a dtype that torch lacks
            if not isinstance(e, OSError) and data.startswith(notes.LFS):
                raise CheckpointError(f"{path} is git-lfs's pointer to a file. Fetch that by `git lfs pull`.") from e
            raise CheckpointError(f"{path} is truncated or corrupted ({e}). Save or download it again.") from e
        finite = is_file_sum_finite(data, tensors)
        if saved is None and not may_differ:
            raise CheckpointError(f"{path} has no digest, so graft cannot know that it wrote it. Take another file.")
        if saved is not None and digest is not None:
            seal.check_digest(saved, digest.result(), path, may_differ)
    noted = notes.select_texts(header.get("__metadata__"))
    of_base = read_fingerprint(noted.get(KEY), path)
    return LoadedWeights(tensors, path, of_base, notes.WeightsFile(path, noted, stamp), finite=finite)


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Return an adapter's tensors by file key, from a folder or hub repository.

    `device` says where to put them; None: the CPU. `key_mapping` renames keys, with a warning if it fits none. Raises
    CheckpointError if there are no weights or they are damaged, and the errors of `rename_keys`.
    """
    tensors = load_weights(os.fspath(model_id), **hub).tensors
    if device is not None:
        tensors = {k: v.to(device) for k, v in tensors.items()}
    return rename_keys(tensors, key_mapping, must_fit=True) if key_mapping else tensors


# checks of tensors before any of them is put into a model


NARROW = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))  # dtypes without arithmetic
SMALL = 2**14  # numbers: smaller tensors of one shape are summed up in one pass


def check_tensors(tensors: dict[str, Tensor], path: str, allow_nonfinite: bool = False) -> None:
    """Raise if one of the tensors cannot be loaded into an adapter.

    All dtypes and layouts are checked before any numbers.

    Args:
        path: where they come from, for errors.
        allow_nonfinite: accept NaN and infinite numbers; they are not searched for.

    Raises:
        CheckpointError: one is sparse, nested, quantized or complex, on the meta device, of an unusual dtype, or
            repeats its numbers.
        NonFiniteError: one holds NaN or an infinite number.
    """
    for name, t in tensors.items():
        why = describe_fault(t)
        if why is not None:
            raise CheckpointError(f"'{name}' in {path} {why}. Save it as a plain tensor of real numbers.")
    if allow_nonfinite:
        return
    if bad := find_nonfinite(tensors):
        raise NonFiniteError(
            f"NaN or infinite numbers are in {join_some(bad, 4)}, of {path}: training has diverged, or the file is "
            "damaged. Pass allow_nonfinite=True to load it all the same."
        )


@torch.no_grad()
def find_nonfinite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the floating tensors with a NaN or infinite number, unordered.

    Complex and sharded tensors are left out. Sums are tested first: of each tensor above 2¹⁴ numbers, and of all
    smaller ones of one dtype, device and shape. The values of a tensor are tested only if its sum is not finite, or its
    dtype is float8, which has no sums. The process waits once for each device, and once for each tested tensor.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for name, t in tensors.items():
        # a sharded tensor can only be read by all processes
        if t.is_floating_point() and (type(t) is Tensor or not is_sharded(t)):
            groups[(t.dtype, t.device, t.shape) if t.numel() <= SMALL else name].append(name)
    suspects: list[str] = []
    sums: dict[torch.device, list[tuple[list[str], Tensor]]] = defaultdict(list)
    for names in groups.values():
        t = tensors[names[0]]
        if t.dtype in NARROW:
            suspects += names
        else:
            joined = t if len(names) == 1 else torch.stack([tensors[name] for name in names])
            sums[t.device].append((names, joined.sum().float()))
    for on_device in sums.values():
        are_finite = torch.stack([total for _, total in on_device]).isfinite().tolist()
        suspects += [name for (names, _), is_finite in zip(on_device, are_finite) if not is_finite for name in names]
    return [
        n for n in suspects if not (tensors[n].float() if tensors[n].dtype in NARROW else tensors[n]).isfinite().all()
    ]


def is_file_sum_finite(data: bytes, tensors: dict[str, Tensor]) -> bool:
    """Return True if all tensors of a safetensors file are float32 and the sum of its numbers is finite.

    One pass over the file takes a quarter of the time of one over each tensor. False is no proof of a bad number: the
    sum may have overflowed.
    """
    if {t.dtype for t in tensors.values()} != {torch.float32}:
        return False
    begin = 8 + int.from_bytes(data[:8], "little")
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.frombuffer(data, "<f4", offset=begin).sum()))


def is_all_finite(t: Tensor) -> bool:
    """Return True if a tensor holds no NaN and no infinite number; float8 is cast to float32 for that.

    Waits for the device.
    """
    return bool((t.float() if t.dtype in NARROW else t).isfinite().all())
