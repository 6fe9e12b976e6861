# SPDX-License-Identifier: Apache-2.0
"""The table of quantized forms of checkpoints, by the method that config.json names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from graft.core.errors import UnsupportedLayerError
from graft.files.base import BaseFiles
from graft.files.merging.held import Held

FORMS = {"fp8": "block_fp8", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed"}  # → module


def held_in(base: BaseFiles) -> Held:
    """Return how a checkpoint holds its weights.

    Raises:
        UnsupportedLayerError: in a quantized form that graft cannot read.
    """
    config: Any = base.config.get("quantization_config") or base.config.get("compression_config")
    if not config:
        return Held(base)
    method = config.get("quant_method")
    if method not in FORMS:
        raise UnsupportedLayerError(
            f"{base.path} is quantized by '{method}', which merging cannot read; it reads {', '.join(FORMS)}. Merge "
            "into the model as it was before quantization, and quantize the result."
        )
    made: Held = import_module(f"graft.files.merging.{FORMS[method]}").Form(base, config)
    return made
