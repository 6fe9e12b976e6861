# SPDX-License-Identifier: Apache-2.0
"""What a measurement changes in a model for a while: the modes of its modules, and which parameters train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def use_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Have the model in training or evaluation mode in the block, and all modules in their own again afterwards."""
    before = read_modes(model)
    model.train(training)
    try:
        yield
    finally:
        restore_modes(before)


@contextmanager
def restore_modes_on_error(model: nn.Module) -> Iterator[None]:
    """Have all modules of a model in their modes from before again if the block raises."""
    before = read_modes(model)
    try:
        yield
    except BaseException:
        restore_modes(before)
        raise


def read_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in model.modules()]


def restore_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
