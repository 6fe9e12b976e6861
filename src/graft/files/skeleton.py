# SPDX-License-Identifier: Apache-2.0
"""The model of a folder by its config alone: on the meta device, or with weights that take no memory.

No code of the folder ever runs, whatever its config says.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft import CheckpointError
from graft.config.reading import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


CONFIG = "config.json"
# fields, at any depth, that make transformers run or fetch what others wrote: classes, kernels, other configs, weights
CODE = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "experts_implementation", "_experts_implementation", "configuration_files",
        "use_pretrained_backbone")  # fmt: skip
COUNTS = ("layer", "layers", "blocks", "experts")  # ends of fields that say how many modules a model has
MOST = 2**12
LABELS = 2**20


def model_config(path: str) -> PreTrainedConfig | None:
    """Return the config that transformers makes of a folder's config.json; None if it knows no such model.

    Fields that name code, kernels or files elsewhere are left out: nothing of the folder runs, nobody is asked, and
    the network is not used.

    Raises:
        CheckpointError: the file is damaged, asks for more modules than any model has, or names a backbone elsewhere.
    """
    file = os.path.join(path, CONFIG)
    if not os.path.isfile(file):
        return None
    try:
        from transformers import AutoConfig
    except ImportError:
        return None
    fields = without_code(read_object(file, finite=False), file)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as f:
            json.dump(fields, f)
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception:  # of any type, where values are not what its class takes
            return None
    config._name_or_path = path
    return config


def without_code(value: Any, file: str) -> Any:
    """Return a value of a config without the fields that are not to reach transformers. Raises as `model_config`."""
    if isinstance(value, list):
        return [without_code(v, file) for v in value]
    if not isinstance(value, dict):
        return value
    for key, n in value.items():
        if type(n) is int and n > (MOST if key.endswith(COUNTS) else LABELS if key == "num_labels" else n):
            raise CheckpointError(f"{file} says {key} = {n:,}, which no model has: it is damaged.")
    backbone = value.get("backbone")
    if isinstance(backbone, str) and not (value.get("backbone_config") or value.get("use_timm_backbone", True)):
        raise CheckpointError(
            f"{file} names the backbone '{backbone}', which graft does not fetch: write its config there, as "
            "backbone_config."
        )
    return {key: without_code(v, file) for key, v in value.items() if key not in CODE}


def model_class(name: object) -> type[PreTrainedModel] | None:
    """Return transformers' model class of a name; None if the name is of nothing there, or of something else."""
    import transformers

    try:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
    except (ImportError, RuntimeError):  # its module needs a package that is not there
        return None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def skeleton(path: str, architecture: str | None = None) -> PreTrainedModel | None:
    """Return the model that transformers makes of a folder's config.json, without values; None if it knows none.

    Args:
        architecture: the name of another class than the config's.

    Raises:
        CheckpointError: as `model_config`; or transformers cannot make the model.
    """
    config = model_config(path)
    if config is None:
        return None
    import transformers

    named = [architecture] if architecture else getattr(config, "architectures", None)
    kinds = map(model_class, named if isinstance(named, list) else ())
    kind = next((kind for kind in kinds if kind is not None), None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with quiet():
        try:
            with torch.device("meta"):
                model: PreTrainedModel = transformers.AutoModel.from_config(config) if kind is None else kind(config)
        except Exception as e:  # of any type, where values do not fit each other
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
