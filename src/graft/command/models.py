# SPDX-License-Identifier: Apache-2.0
"""Loading of models with transformers, for verbs that run one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from graft import CheckpointError, ConfigError
from graft.config import pair
from graft.core.errors import join_some
from graft.files.base import read_base_files
from graft.files.errors import make_damage_error
from graft.files.formats import recognise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft import PeftModel


def load_base(path: str | os.PathLike[str], device: str = "cpu") -> PreTrainedModel:
    """Load the model of a folder with transformers, as the class that its config names, in float32, eval mode and on
    `device`.

    No code of the folder runs, the network is not used, and weights come only from safetensors files. Without a class
    name it is a causal language model; of several names the first counts. Progress bars of transformers are switched
    off for the whole process.

    Raises:
        CheckpointError: the folder has no model, a damaged or incomplete one, or an adapter in it.
        ConfigError: transformers is missing, or does not know the class or config.
    """
    files = read_base_files(path)
    if os.path.exists(os.path.join(files.path, pair.CONFIG_NAME)):  # transformers would load the adapter's base instead
        raise CheckpointError(f"{path} holds a model and an adapter, {pair.CONFIG_NAME}. Give the model alone.")
    try:
        import torch
        import transformers
    except ImportError:
        text = "Running a model needs transformers. Install it: pip install 'transformers>=4.56'."
        raise ConfigError(text) from None
    from graft.files.skeleton import build_model_config, find_model_class, silence_transformers

    named = files.config.get("architectures") or [None]
    name = named[0] if isinstance(named, list) else named
    cls: Any = transformers.AutoModelForCausalLM if name is None else find_model_class(name)
    config = None if cls is None else build_model_config(files.path)
    if config is None:
        raise ConfigError(
            f"transformers {transformers.__version__} cannot build the model in {path}, a "
            f"{name or files.config.get('model_type')}. Install a version that knows its class and config."
        )
    transformers.utils.logging.disable_progress_bar()
    how: Any = dict(local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
    try:
        with silence_transformers():  # transformers prints names of tensors unescaped
            model, report = cls.from_pretrained(path, config=config, torch_dtype=torch.float32, **how)
    except Exception as e:  # of any type, if values of the config contradict each other
        raise CheckpointError(f"The model in {path} cannot be loaded: {e}") from None
    if absent := sorted(report["missing_keys"]):  # missing tensors would be random
        raise make_damage_error(f"The model in {path} lacks tensors {join_some(absent)} of a {type(model).__name__}")
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def attach_adapter(base: PreTrainedModel, adapter: str | os.PathLike[str]) -> PeftModel:
    """Load an adapter of any format onto a model, in place, and return the PeftModel in eval mode.

    PEFT's format is loaded by `PeftModel.from_pretrained`, every other by `load_adapter`.
    """
    from graft import PeftModel
    from graft.files.load import load_adapter

    if recognise(os.fspath(adapter)) == "peft":  # PEFT's format has methods that the neutral form lacks
        return PeftModel.from_pretrained(base, adapter).eval()
    return load_adapter(base, adapter).eval()
