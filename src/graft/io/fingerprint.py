# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a base model, in a few bytes: shapes of the adapted weights, and a few of their values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from graft.config.reading import parsed
from graft.core.errors import CheckpointError
from graft.core.layer import AdapterLayer
from graft.storage.parallel import is_sharded, is_whole

KEY = "graft_base"  # key in the safetensors metadata
MAX_NAMED = 1024  # with more layers a fingerprint holds only a digest of names and shapes
SAMPLED_LAYERS, SAMPLES = 16, 4
TOLERANCE = 2**-7  # relative: a base in half precision is the same base


def fingerprint(layers: dict[str, AdapterLayer], with_values: bool = True) -> dict:
    """Return names and shapes of the adapted weights and, where they are the base's own, a few of their values."""
    shapes = {key: list(layer.site.shape) for key, layer in layers.items()}
    made: dict = {"n": len(shapes), "shapes": digest(json.dumps(shapes, sort_keys=True))}
    if len(shapes) <= MAX_NAMED:
        made["weights"] = shapes
    if with_values and layers:
        chosen = sorted(layers)[:: max(1, len(layers) // SAMPLED_LAYERS)][:SAMPLED_LAYERS]
        made["sample"] = {key: values for key in chosen if (values := sample(layers[key])) is not None}
    return made


def lists_of(*kinds: type) -> Callable[[Any], bool]:
    """Return a function that says whether a value is a dict of lists of finite numbers of these types."""

    def is_right(value: Any) -> bool:
        if not isinstance(value, dict) or not {type(inner) for inner in value.values()} <= {list}:
            return False
        return {type(n) for inner in value.values() for n in inner} <= {*kinds} and (
            float not in kinds or all(math.isfinite(n) for inner in value.values() for n in inner)
        )

    return is_right


NOTE: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: type(value) is int,
    "shapes": lambda value: type(value) is str,
    "weights": lists_of(int),
    "sample": lists_of(int, float),
}


def read_note(text: str | None, path: str) -> dict | None:
    """Return the fingerprint that a file holds, if it holds one.

    Raises:
        CheckpointError: it is no fingerprint. The text names the file and the field.
    """
    if not text:
        return None
    where = f"{path}: the note '{KEY}' on its base model"
    note = parsed(text, where)
    if note is None:
        return None
    if not isinstance(note, dict):
        raise CheckpointError(f"{where} is a {type(note).__name__}, not an object: save or download the file again.")
    for name, is_right in NOTE.items():
        if name in note and not is_right(note[name]):
            raise CheckpointError(f"{where} has a field '{name}' of another type: save or download the file again.")
    return note


def sample(layer: AdapterLayer) -> list[float] | None:
    """Return evenly spaced values; None if the weight is quantized, merged into, not there, or sharded.

    To read a sharded weight takes all processes, and one of them may be alone here.
    """
    base, name = layer.get_base_layer(), layer.site.parameter
    if not layer.store.exact or layer.merged_adapters or not layer.site.op.known or layer.store.unread(base, name):
        return None
    W = layer.store.read(base, name).detach()
    if W.is_meta or is_sharded(W) or not is_whole(W):
        return None
    flat = W.reshape(-1)
    picked = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
    return [float(f"{v:.5g}") for v in picked.float().tolist()]


def same_values(stored: dict, now: dict) -> bool:
    """Say whether two fingerprints could be of the same weights."""
    old, new = stored.get("sample"), now.get("sample")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return True
    pairs = [pair for key in old.keys() & new.keys() for pair in zip(old[key], new[key])]
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b), 1e-4) for a, b in pairs)


def digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def difference(stored: dict, now: dict) -> str | None:
    """Say in words how the architectures differ; None if they do not."""
    if stored.get("shapes") == now["shapes"]:
        return None
    old, new = stored.get("weights"), now.get("weights")
    if old is None or new is None:
        return f"it adapts {stored.get('n')} weights, here {now['n']} match, with other names or shapes"
    for key in sorted(set(old) & set(new)):
        if old[key] != new[key]:
            return f"'{key}' has shape {tuple(old[key])} in the checkpoint's base and {tuple(new[key])} here"
    if missing := sorted(set(old) - set(new)):
        return f"{len(missing)} adapted layers of its base are not in this model, such as '{missing[0]}'"
    extra = sorted(set(new) - set(old))
    if not extra:
        return "the note on its base contradicts itself, so that the file is damaged"
    return f"{len(extra)} targeted layers of this model were not in its base, such as '{extra[0]}'"
