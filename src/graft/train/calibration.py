# SPDX-License-Identifier: Apache-2.0
"""What initialisations that begin with data share: the layers that they measure, and their files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.atomic import replace
from graft.core.errors import CalibrationError, CheckpointError, ConfigError, some
from graft.core.pieces import refuse_pieces
from graft.inject.inject import Injection
from graft.methods import method_of


def linear_methods(model: nn.Module, config: Any, how: str) -> dict[str, Any]:
    """Return, by path, what an injection of `config` would put on the linear layers of `model`; nothing changes.

    Raises:
        ConfigError: the config asks for another initialisation, or targets no linear layer.
        as `get_peft_model`, for what would not fit.
    """
    if config.init_lora_weights != how:
        raise ConfigError(f"This prepares init_lora_weights='{how}', and the config says {config.init_lora_weights!r}.")
    found = Injection(model, config, method_of("LORA"), "default").find().methods
    linear = {key: m for key, m in found.items() if m.site.op.linear}
    if not linear:
        kinds = ", ".join(sorted({m.site.type_name for m in found.values()}))
        raise ConfigError(
            f"No supported layers found for init_lora_weights='{how}': it begins with data of linear layers, and "
            f"target_modules={config.target_modules} names {kinds}."
        )
    refuse_pieces(((key, m.site) for key, m in linear.items()), f"init_lora_weights='{how}' measures data")
    return linear


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Have the model in training or evaluation mode in the block, and all modules in their own again afterwards."""
    before = [(m, m.training) for m in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def require_all(keys: Any, seen: Any, what: str) -> None:
    """Raise CalibrationError unless all of `keys` are in `seen`."""
    missing = [key for key in keys if key not in seen]
    if missing:
        raise CalibrationError(
            f"The data gave no {what} for {len(missing)} of {len(list(keys))} layers: {some(missing)}."
        )


def stored(path: str | None) -> dict[str, Tensor] | None:
    """Return the tensors of a cache; None if there is no file, or an empty one.

    Raises:
        CheckpointError: the file holds something else.
    """
    if path is None or not os.path.isfile(path) or not os.path.getsize(path):
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise CheckpointError(f"{path} cannot be read as tensors ({e}): delete it, and it will be made anew.") from e
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{path} does not hold tensors by name: delete it, and it will be made anew.")
    return found


def store(path: str | None, tensors: dict[str, Tensor]) -> None:
    """Write a cache, if there is a path for it."""
    if path is not None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        replace(path, lambda where: torch.save(tensors, where))


def of_file(found: dict[str, Tensor], name: str, path: str | None) -> Tensor:
    if name not in found:
        raise CheckpointError(
            f"{path} lacks '{name}': it was made for another model or other target_modules. Delete it, and it will be "
            "made anew."
        )
    return found[name]
