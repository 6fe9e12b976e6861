# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint holds its weights: plain, or in a quantized form, by the method that config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from graft import UnsupportedLayerError
from graft.config.reading import Json
from graft.files.base import BaseFiles
from graft.files.merging.numbers import of_file
from graft.files.tensors import Tensor


class BaseWeights:
    """The weights of a checkpoint. A subclass knows a quantized form.

    Attributes:
        shapes: of the dense weights, by name.
        packed: name of a dense weight → the checkpoint's tensors that hold it, the codes first.
        dtype: of dense weights that are written in place of packed ones, as safetensors calls it.
    """

    form = "plain"

    def __init__(self, base: BaseFiles):
        self.base = base
        self.packed: dict[str, list[str]] = {}
        self.shapes = dict(base.shapes)
        dtype = base.config.get("dtype") or base.config.get("torch_dtype")
        self.dtype = {"float32": "F32", "float16": "F16"}.get(str(dtype), "BF16")

    def read(self, name: str) -> torch.Tensor:
        """Return a dense weight: a plain one in its own dtype, a packed one in float32."""
        return self.unpack(name, self.parts(name)) if name in self.packed else of_file(self.base.tensors[name])

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the checkpoint's tensors that hold a packed weight."""
        return {part: self.base.tensors[part] for part in self.packed[name]}

    def pack(self, name: str, W: torch.Tensor) -> dict[str, Tensor]:
        """Return the tensors that hold W as the checkpoint held the weight of that name."""
        raise NotImplementedError

    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> torch.Tensor:
        """Return the dense weight, in float32, that `pack` made these tensors of."""
        raise NotImplementedError

    def plain_config(self, config: Mapping[str, object]) -> Json:
        """Return config.json of the model without quantization."""
        return {name: value for name, value in config.items() if name != "quantization_config"}


FORMS = {"fp8": "block_fp8", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed"}  # → module


def weights_of(base: BaseFiles) -> BaseWeights:
    """Return how a checkpoint holds its weights.

    Raises:
        UnsupportedLayerError: in a quantized form that graft cannot read.
    """
    config = base.config.get("quantization_config") or base.config.get("compression_config")
    if not config:
        return BaseWeights(base)
    method = config.get("quant_method")
    if method not in FORMS:
        raise UnsupportedLayerError(
            f"{base.path} is quantized by '{method}', which merging cannot read; it reads {', '.join(FORMS)}. Merge "
            "into the model as it was before quantization, and quantize the result."
        )
    made: BaseWeights = import_module(f"graft.files.merging.{FORMS[method]}").Form(base, config)
    return made
