# SPDX-License-Identifier: Apache-2.0
"""The model of a folder by its config alone: on the meta device, or with weights that take no memory."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from graft.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(path: str, architecture: str | None = None) -> PreTrainedModel | None:
    """Return the model that transformers makes of a folder's config.json, without values; None if it knows none.

    Code of the folder itself never runs.

    Args:
        architecture: the name of another class than the config's.
    """
    if not os.path.exists(os.path.join(path, "config.json")):
        return None
    try:
        import transformers
    except ImportError:
        return None
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        except (ValueError, KeyError, OSError):
            return None  # of a model that this transformers does not know
        names = [architecture] if architecture else getattr(config, "architectures", None) or []
        kind = next((found for n in names if (found := getattr(transformers, n, None)) is not None), None)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        try:
            with torch.device("meta"):
                model: PreTrainedModel = transformers.AutoModel.from_config(config) if kind is None else kind(config)
        except (ValueError, KeyError, ImportError, TypeError, AttributeError) as e:
            raise CheckpointError(f"transformers cannot make the model of {path}: {e}") from None
    return model


def weightless(model: PreTrainedModel) -> PreTrainedModel:
    """Give the tensors of a model on the meta device memory: that of one zero each."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(nothing(p), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = nothing(b)
    return model


def nothing(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=t.dtype).expand(t.shape)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from talking about configs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
