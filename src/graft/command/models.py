# SPDX-License-Identifier: Apache-2.0
"""Models that verbs run, which need transformers."""

from __future__ import annotations

import os
from typing import Any

from graft.core.errors import CheckpointError, ConfigError
from graft.files.base import base_files


def load_base(path: str | os.PathLike[str], dtype: str = "float32", device: str = "cpu") -> Any:
    """Load a model from its folder, as the class that its config names, in eval mode.

    Raises:
        CheckpointError: the folder holds no model, or a damaged one.
        ConfigError: transformers is not there, or has no such class.
    """
    held = base_files(path)
    try:
        import torch
        import transformers
    except ImportError:
        text = "A model can be run with transformers only: pip install 'graft-adapters[transformers]'."
        raise ConfigError(text) from None
    name = (held.config.get("architectures") or ["AutoModelForCausalLM"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ConfigError(
            f"The model in {path} is a {name}, which transformers {transformers.__version__} does not have."
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        model = cls.from_pretrained(path, torch_dtype=getattr(torch, dtype), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"The model in {path} cannot be loaded: {e}") from None
    return model.to(device).eval()


def on(base: Any, adapter: str | os.PathLike[str]) -> Any:
    """Put an adapter of any format onto a model, in eval mode."""
    from graft import PeftModel

    return PeftModel.from_pretrained(base, adapter).eval()
