# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a base model, a few bytes in an adapter's file: shapes of weights, and a few of their values.

It covers the weights that the adapter acts on; for a prompt, those of the model's blocks. It does not see changes in
other weights, or between the sampled values. `save_pretrained(fingerprint="full")` writes digests of all tensors, which
see every changed bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from graft.config.reading import Json, parse_json
from graft.core.carrier import carrier_of
from graft.core.errors import CheckpointError
from graft.core.ops import find_op
from graft.core.site import Site
from graft.core.wrappers import collect_parameters
from graft.inject.parts import AdapterCarriers
from graft.inject.survey import survey_model
from graft.io.base import get_base_model_state_dict, remove_carrier_names
from graft.storage.dense import plain_tensors
from graft.storage.find import find_store
from graft.storage.parallel import (
    find_whole_shape,
    gather_numbers,
    is_sharded,
    is_whole,
    layout_of,
    strip_inner_wrappers,
)


def digest_base_tensors(
    base: nn.Module, names: Container[str] | None = None, without: Container[str] = ()
) -> dict[str, str]:
    """Return "dtype:digest" of each tensor of the base model by its original name.

    Reads all tensors, at about the speed of the disk that they came from. Leaves out sharded tensors, those on the meta
    device, types that do not show their bytes, and layers with a merged adapter. Only tensors of the state dict count:
    no non-persistent buffers.

    Args:
        names: look only at these; None: all.
        without: leave out these, as `remove_carrier_names` gives them.
    """
    merged = {layer.site.path for layer in survey_model(base).layers.values() if layer.merged_adapters}
    texts = {
        name: digest_base_tensor(t)
        for name, t in get_base_model_state_dict(base).items()
        if (names is None or name in names)
        and remove_carrier_names(name) not in without
        and not (t.is_meta or is_sharded(t))
        if name.rpartition(".")[0] not in merged
    }
    return {name: text for name, text in texts.items() if text is not None}


def digest_base_tensor(t: Tensor) -> str | None:
    """Return "dtype:digest" of a tensor: the first 16 hex digits of SHA-256 over its bytes, read on the CPU.

    For a tensor subclass the bytes are those of all its inner tensors, and None is returned if they cannot be read. The
    shape does not count.
    """
    parts = plain_tensors(t)
    if parts is None:
        return None
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
    return f"{str(t.dtype).removeprefix('torch.')}:{sha256.hexdigest()[:16]}"


def list_changed_tensors(of_file: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names in both mappings with different digests.

    Tensors with another dtype now are left out, as their bytes always differ.
    """
    pairs = [(name, of_file[name], now[name]) for name in of_file if name in now]
    return [name for name, a, b in pairs if a != b and a.partition(":")[0] == b.partition(":")[0]]


KEY = "graft_base"  # key in the safetensors metadata
MAX_NAMED = 1024  # with more layers a fingerprint holds only a digest of names and shapes
SAMPLED_LAYERS, SAMPLES = 16, 4
TOLERANCE = 2**-7  # relative: a base in half precision is the same base


class Fingerprint(TypedDict, total=False):
    """The fingerprint of a base model. A field that it lacks is not known."""

    n: int  # weights
    shapes: str  # a digest of names and shapes
    weights: dict[str, list[int]]  # shapes by name
    sample: dict[str, list[float]]  # a few values of some weights
    full: dict[str, str]  # digests of all tensors


NAMED: tuple[Literal["weights", "sample", "full"], ...] = ("weights", "sample", "full")  # fields by names of weights


class BaseWeight(NamedTuple):
    """A weight of the base model: its site and module, and whether an adapter is merged into it."""

    site: Site
    module: nn.Module
    merged: bool = False  # it does an adapter's work as well


def list_base_weights(parts: AdapterCarriers, base: nn.Module) -> dict[str, BaseWeight]:
    """Return the weights that an adapter acts on, by path without wrappers' parts, each with a flag if adapters are
    merged into it.

    For a prompt these are the weights of all numbered blocks of `base` (`list_block_weights`).
    """
    if parts.prompt is not None:
        return list_block_weights(base)
    return {
        strip_inner_wrappers(key): BaseWeight(layer.site, layer.base_layer, bool(layer.state.merged))
        for key, layer in parts.layers.items()
    }


def list_block_weights(base: nn.Module) -> dict[str, BaseWeight]:
    """Return a BaseWeight for each known layer in a model's numbered blocks, by path without `base_model_prefix`.

    A module counts if a part of its path is a number, its op is known and takes no ids, and it carries no adapters. It
    need not have a weight. The BaseWeight has a new Site of the module, with its op and store, and the module; it is
    not merged.
    """
    body = f"{getattr(base, 'base_model_prefix', None) or ''}."
    block_weights = {}
    for key, module in survey_model(base).modules.items():
        if carrier_of(module) is None and any([part.isdigit() for part in key.split(".")]):
            op = find_op(module)
            if op.known and not op.takes_ids:
                block_weights[key.removeprefix(body)] = BaseWeight(Site(key, module, op, find_store(module)), module)
    return block_weights


def make_fingerprint(
    weights: dict[str, BaseWeight], with_values: bool = True, together: bool = False, part: bool = False
) -> Fingerprint:
    """Return the fingerprint of weights: names, shapes and, with `with_values`, a few values of up to 16 weights.

    Without any weight it has no sample.

    Args:
        together: all processes call this, so that sharded weights can be read.
        part: the weights are those of one pipeline stage: name and sample all of them, for `join_fingerprints`.
    """
    shapes = {key: list(weight.site.shape) for key, weight in weights.items()}
    chosen = (sorted(weights) if part else choose_sampled_names(weights)) if with_values else []
    values = {key: sample for key in chosen if (sample := sample_weight(weights[key], together)) is not None}
    return summarize_weights(shapes, values if with_values and weights else None, part)


def choose_sampled_names(names: Iterable[str]) -> list[str]:
    """Return the names of up to 16 weights that a fingerprint samples, evenly spaced in sorted order.

    It takes every (n // 16)-th name of n from the first on, and at most 16. Of 17 to 31 names it takes number i n / 16,
    rounded down.
    """
    names = sorted(names)
    if SAMPLED_LAYERS < len(names) < 2 * SAMPLED_LAYERS:
        return [names[i * len(names) // SAMPLED_LAYERS] for i in range(SAMPLED_LAYERS)]
    return names[:: max(1, len(names) // SAMPLED_LAYERS)][:SAMPLED_LAYERS]


def summarize_weights(
    shapes: dict[str, list[int]], values: dict[str, list[float]] | None, part: bool = False
) -> Fingerprint:
    """Return a fingerprint: "n", the count of weights, and "shapes", a digest of their names and shapes.

    "weights", the shapes themselves, is in it for up to 1024 weights, or with `part`. "sample" holds `values`, unless
    they are None.
    """
    note: Fingerprint = {"n": len(shapes), "shapes": hash_text(json.dumps(shapes, sort_keys=True))}
    if part or len(shapes) <= MAX_NAMED:
        note["weights"] = shapes
    if values is not None:
        note["sample"] = values
    return note


def join_fingerprints(parts: Sequence[Fingerprint]) -> Fingerprint:
    """Return the fingerprint of a model from those of its stages; a later stage wins for a weight in several.

    It has the values of the weights that a single process would sample, none if no stage has values. Full digests are
    joined, if any stage has them.
    """
    shapes = {k: v for p in parts for k, v in p.get("weights", {}).items()}
    values = {k: v for p in parts for k, v in p.get("sample", {}).items()}
    full = {k: v for p in parts for k, v in p.get("full", {}).items()}
    chosen = {key: values[key] for key in choose_sampled_names(shapes) if key in values} if values else None
    note = summarize_weights(shapes, chosen)
    return note | {"full": full} if full else note


def rename_weights(note: Fingerprint, rename: Callable[[Json], Json]) -> Fingerprint | None:
    """Return a copy of a fingerprint with other names of its weights, and a new digest of names and shapes; None if it
    does not name them.

    `rename` gets each of the dicts "weights", "sample" and "full" and returns the new one.
    """
    if not note.get("weights"):
        return None
    new_note = note.copy()
    for name in NAMED:
        if name in note:
            new_note[name] = rename(note[name])
    return new_note | {"shapes": summarize_weights(new_note["weights"], None)["shapes"]}


def select_weights(note: Fingerprint, wanted: Callable[[str], bool]) -> Fingerprint:
    """Return a copy of a fingerprint with count, digest and shapes only of weights that `wanted` says True to.

    Samples and digests stay.
    """
    shapes = {key: shape for key, shape in note["weights"].items() if wanted(key)}
    return {**note, **summarize_weights(shapes, None, part=True)}


def make_list_check(*kinds: type) -> Callable[[object], bool]:
    """Return a function that tests whether a value is a dict of lists of numbers of the types `kinds`.

    Types must be exact: a bool is no int. With float in `kinds` all numbers have to be finite. An empty dict passes.
    """

    def is_right(value: object) -> bool:
        """Return True if `value` is a dict of lists with numbers of these types.

        Each list must be exactly a list, each number exactly of one of `kinds`. If float is one of them, all numbers
        have to be finite. Empty dicts and lists pass.
        """
        if not isinstance(value, dict) or not {type(inner) for inner in value.values()} <= {list}:
            return False
        return {type(n) for inner in value.values() for n in inner} <= {*kinds} and (
            float not in kinds or all(math.isfinite(n) for inner in value.values() for n in inner)
        )

    return is_right


NOTE: dict[str, Callable[[object], bool]] = {
    "n": lambda value: type(value) is int,
    "shapes": lambda value: type(value) is str,
    "weights": make_list_check(int),
    "sample": make_list_check(int, float),
    "full": lambda value: isinstance(value, dict) and {type(digest) for digest in value.values()} <= {str},
}


def read_fingerprint(text: str | None, path: str) -> Fingerprint | None:
    """Return the fingerprint in a file's note; None for no note, an empty one or JSON's null.

    Raises:
        CheckpointError: it is no JSON object, or a field has another type. The text names the file and the field.
    """
    if not text:
        return None
    where = f"{path}: the note '{KEY}' on its base model"
    note: Fingerprint | None = parse_json(text, where)
    if note is not None:
        check_fingerprint(note, where)
    return note


def check_fingerprint(note: object, where: str) -> None:
    """Raise CheckpointError, which begins with `where`, if `note` is no dict or a field of it in `NOTE` has another
    type. Missing and unknown fields pass.
    """
    if not isinstance(note, dict):
        raise CheckpointError(f"{where} is a {type(note).__name__}, not an object. Save or download the file again.")
    for name, is_right in NOTE.items():
        if name in note and not is_right(note[name]):
            raise CheckpointError(f"{where} has a field '{name}' of another type. Save or download the file again.")


def sample_weight(weight: BaseWeight, together: bool = False) -> list[float] | None:
    """Return up to 4 evenly spaced values of a weight, from the first on, as floats of 5 significant digits.

    Returns None if it is quantized, merged into, unreadable, on the meta device, of an unknown layer, or sharded, or if
    a value is NaN or infinite. A sharded weight is read if `together` says that all processes call this; its values are
    then gathered.
    """
    site, base, name = weight.site, weight.module, weight.site.parameter
    if not site.store.exact or weight.merged or not site.op.known or (site.store.in_parts and not together):
        return None
    parameter = collect_parameters(base).get(name)
    if parameter is not None and not parameter.is_meta and layout_of(parameter) is not None:
        n = find_whole_shape(parameter).numel()
        values = gather_numbers(parameter, list(range(0, n, max(1, n // SAMPLES)))[:SAMPLES]) if together else None
    elif site.store.why_unreadable(base, name):
        return None
    else:
        W = site.store.read(base, name).detach()
        if W.is_meta or not is_whole(W):
            return None
        flat = W.reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float().tolist()
    if values is None or not all(map(math.isfinite, values)):
        return None
    return [float(f"{v:.5g}") for v in values]


def why_other_base(of_file: Fingerprint, now: Fingerprint, common: bool = False) -> str | None:
    """Return in words how a file's fingerprint differs from `now`, in shapes or sampled values; None if both are of one
    base. common: compare the weights that both have; all if one does not name its weights.
    """
    if common:
        of_file, now = restrict_to_common(of_file, now) or (of_file, now)
    differs = describe_difference(of_file, now)
    return differs if differs or match_values(of_file, now) else "its weights have other values"


def match_values(of_file: Fingerprint, now: Fingerprint) -> bool:
    """Return True if the sampled values of two fingerprints agree within 1/128 of the larger, or if one has no sample.

    Only weights in both are compared, and of two samples of different length only the first values. Values below 1e-4
    count as 1e-4.
    """
    old, new = of_file.get("sample"), now.get("sample")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return True
    pairs = [pair for key in old.keys() & new.keys() for pair in zip(old[key], new[key])]
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b), 1e-4) for a, b in pairs)


def hash_text(text: str) -> str:
    """Return the first 16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def restrict_to_common(of_file: Fingerprint, now: Fingerprint) -> tuple[Fingerprint, Fingerprint] | None:
    """Return two fingerprints with only the weights that both have; None if one does not name its weights.

    Both come back unchanged if they have no weight in common.

    One may lack weights that are there, if only the other can read the shapes of a module type.
    """
    old, new = of_file.get("weights"), now.get("weights")
    if not old or not new:
        return None
    shared = old.keys() & new.keys()
    if not shared:  # another model
        return of_file, now
    return select_weights(of_file, shared.__contains__), select_weights(now, shared.__contains__)


def describe_difference(of_file: Fingerprint, now: Fingerprint) -> str | None:
    """Return in words how the weights of a file's fingerprint differ from those of `now`.

    None if their digests of names and shapes ("shapes") are equal. The text has only the first of these reasons, and
    its weight or example is the first by name:

    - Another count, if one of them names no weights.
    - A weight with another shape.
    - Missing layers, with an example.
    - More layers, with an example.
    - A damaged file.
    """
    if of_file.get("shapes") == now["shapes"]:
        return None
    old, new = of_file.get("weights"), now.get("weights")
    if old is None or new is None:
        return f"it adapts {of_file.get('n')} weights, here {now['n']} match, with other names or shapes"
    for key in sorted(set(old) & set(new)):
        if old[key] != new[key]:
            return f"size mismatch for '{key}': {tuple(old[key])} in the checkpoint's base, {tuple(new[key])} here"
    if missing := sorted(set(old) - set(new)):
        return f"{len(missing)} adapted layers of its base are not in this model, such as '{missing[0]}'"
    extra = sorted(set(new) - set(old))
    if not extra:
        return "the note on its base contradicts itself, so that the file is damaged"
    return f"{len(extra)} targeted layers of this model were not in its base, such as '{extra[0]}'"
