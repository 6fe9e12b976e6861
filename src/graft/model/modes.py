# SPDX-License-Identifier: Apache-2.0
"""What a measurement changes in a model for a while: the modes of its modules, and which parameters train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Have the model in training or evaluation mode in the block, and all modules in their own again afterwards."""
    before = modes_of(model)
    model.train(training)
    try:
        yield
    finally:
        put_back(before)


@contextmanager
def modes_unless_it_fails(model: nn.Module) -> Iterator[None]:
    """Have all modules of a model in their modes from before again if the block raises."""
    before = modes_of(model)
    try:
        yield
    except BaseException:
        put_back(before)
        raise


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in model.modules()]


def put_back(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
