# SPDX-License-Identifier: Apache-2.0
"""A shadow network from a folder or the hub: any backbone, or a shadow network that was detached, with its projection.

PEFT's form of the latter has "shadow_model_config" in its config and names that begin with "shadow_model.".
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from graft.core.errors import ConfigError

PROJECTED, DETACHED = "causal_lm_with_hidden_projection", "DetachedShadowModel"
PROJECTION = "shadow_hidden_projection.weight"


def network_from(where: str, width: int) -> tuple[Any, nn.Module | None]:
    """Return the network, whose embeddings do not train, and its projection to `width`; None if it has none.

    Raises:
        ConfigError: the projection is to another width.
    """
    from transformers import AutoConfig, AutoModel

    raw = json.loads(_file(where, "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") == PROJECTED:
        inner = dict(raw["shadow_model_config"])
        network, projection = _filled(AutoConfig.for_model(**inner), where, "shadow_model.")
    elif raw.get("architectures") == [DETACHED]:
        network, projection = _filled(AutoConfig.from_pretrained(where), where, "backbone.")
    else:
        network, projection = AutoModel.from_pretrained(where), None
    if projection is not None and projection.out_features != width:
        raise ConfigError(
            f"The shadow network of '{where}' projects to {projection.out_features} numbers, and the base model is "
            f"{width} wide."
        )
    embeddings = network.get_input_embeddings()
    if embeddings is not None:
        embeddings.requires_grad_(False)
    return network, projection


def _filled(config: Any, where: str, prefix: str) -> tuple[Any, nn.Linear | None]:
    """Return a network with the values of a file, and the projection beside it."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    network = AutoModel.from_config(config)
    tensors = load_file(_file(where, "model.safetensors"))
    network.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    weight = tensors.get(PROJECTION)
    if weight is None:
        return network, None
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.load_state_dict({"weight": weight})
    return network, projection


def _file(where: str, name: str) -> Any:
    from pathlib import Path

    from transformers.utils import cached_file

    return Path(str(cached_file(where, name)))
