# SPDX-License-Identifier: Apache-2.0
"""Models that verbs run, which need transformers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from graft import CheckpointError, ConfigError
from graft.config.pair import CONFIG_NAME
from graft.core.errors import join_some
from graft.files.base import read_base_files
from graft.files.formats import recognise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft import PeftModel


def load_base(path: str | os.PathLike[str], device: str = "cpu") -> PreTrainedModel:
    """Load a model from its folder, as the class that its config names, in float32 and eval mode.

    Raises:
        CheckpointError: the folder holds no model, a damaged one, or one without all tensors of that class.
        ConfigError: transformers is not there, or has no such class.
    """
    files = read_base_files(path)
    if os.path.exists(os.path.join(files.path, CONFIG_NAME)):  # transformers would load the base that it names instead
        raise CheckpointError(
            f"{path} holds a model and an adapter, {CONFIG_NAME}. Give a folder with the model alone."
        )
    try:
        import torch
        import transformers
    except ImportError:
        text = "A model can be run with transformers only: pip install 'transformers>=4.56'."
        raise ConfigError(text) from None
    from graft.files.skeleton import build_model_config, find_model_class, silence_transformers

    named = files.config.get("architectures") or [None]
    name = named[0] if isinstance(named, list) else named
    cls: Any = transformers.AutoModelForCausalLM if name is None else find_model_class(name)
    config = None if cls is None else build_model_config(files.path)
    if config is None:
        raise ConfigError(
            f"transformers {transformers.__version__} does not make the model in {path}, a "
            f"{name or files.config.get('model_type')}: it has no such class, or its config other values."
        )
    transformers.utils.logging.disable_progress_bar()
    how: Any = {
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    try:
        with silence_transformers():  # transformers prints names of tensors as they are
            model, report = cls.from_pretrained(path, config=config, torch_dtype=torch.float32, **how)
    except Exception as e:  # of any type, where values of the config do not fit each other
        raise CheckpointError(f"The model in {path} cannot be loaded: {e}") from None
    if absent := sorted(report["missing_keys"]):  # they would be random
        raise CheckpointError(f"The model in {path} lacks the tensors {join_some(absent)} of a {type(model).__name__}.")
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def attach_adapter(base: PreTrainedModel, adapter: str | os.PathLike[str]) -> PeftModel:
    """Put an adapter of any format onto a model, in eval mode."""
    from graft import PeftModel
    from graft.files.load import load_adapter

    if recognise(os.fspath(adapter)) == "peft":  # whose own reader knows methods that are in no other format, too
        return PeftModel.from_pretrained(base, adapter).eval()
    return load_adapter(base, adapter).eval()
