# SPDX-License-Identifier: Apache-2.0
"""Training and eval modes of all modules of a model, changed for a while or put back after an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def use_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block, set the whole model to training (True) or eval mode.

    Afterwards each module has its own mode back.
    """
    before = read_modes(model)
    model.train(training)
    try:
        yield
    finally:
        restore_modes(before)


@contextmanager
def restore_modes_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, put the modes of all modules of a model back."""
    before = read_modes(model)
    try:
        yield
    except BaseException:
        restore_modes(before)
        raise


def read_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return each module of a model with its mode, (module, training)."""
    return [(module, module.training) for module in model.modules()]


def restore_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set the mode of each module in (module, training)."""
    for module, training in modes:
        module.training = training
