# SPDX-License-Identifier: Apache-2.0
"""What a base model was, in a few bytes: shapes of the adapted weights, and a hash of sampled values."""

from __future__ import annotations

import hashlib
import json

import torch

from graft.core.layer import AdapterLayer

KEY = "graft_base"  # in the safetensors metadata
MAX_NAMED = 1024  # beyond that many layers, only a digest of names and shapes is kept
SAMPLED_LAYERS, SAMPLES = 32, 16


def fingerprint(layers: dict[str, AdapterLayer], with_values: bool = True) -> dict:
    """Names and shapes of the adapted weights and, where the values are the base's own, a hash of some of them."""
    shapes = {key: list(layer.site.shape) for key, layer in layers.items()}
    made: dict = {"n": len(shapes), "shapes": digest(json.dumps(shapes, sort_keys=True))}
    if len(shapes) <= MAX_NAMED:
        made["weights"] = shapes
    if with_values and layers:
        step = max(1, len(layers) // SAMPLED_LAYERS)
        made["sample"] = digest(b"".join(filter(None, (sample(layers[k]) for k in sorted(layers)[::step]))))
    return made


def sample(layer: AdapterLayer) -> bytes | None:
    """Evenly spaced values, rounded to bfloat16 so that a base loaded in half precision counts as the same."""
    if not layer.store.exact or layer.merged_adapters or not layer.site.op.known:
        return None
    W = layer.store.read(layer.get_base_layer(), layer.site.parameter).detach()
    if W.is_meta:
        return None
    flat = W.reshape(-1)
    picked = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
    return picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


def digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def difference(stored: dict, now: dict) -> str | None:
    """In words, how the architectures differ; None if they do not."""
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
    return f"{len(extra)} targeted layers of this model were not in its base, such as '{extra[0]}'"
