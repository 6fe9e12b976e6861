# SPDX-License-Identifier: Apache-2.0
"""What the samples are made of on which every law of tests/conformance has to hold."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

import graft
from graft.core.method import Method

HOOKS = ("describe", "factors", "delta", "branch", "shift", "pre", "post", "fold")


@dataclass(frozen=True)
class Sample:
    """A method and a configuration that shows one of its ways to act."""

    method: str
    label: str = ""
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    other: dict[str, Any] = field(default_factory=dict, hash=False)  # where a second adapter must differ
    subtracts: bool = False  # unmerging subtracts the update, so the weight comes back rounded
    identity: bool | float = True  # a fresh adapter changes nothing, or no output by more than this
    together: bool = True  # two adapters can be active at once
    draws: bool = False  # its adapters are random in training
    by_row: bool = True  # what a row gets depends on that row alone, and not on the others of its adapter
    reads: bool = False  # shapes of its tensors follow from the values of the weight
    rewrites: bool = False  # the base weight, for good; so it stands only beside its like
    shifts: bool = False  # the base weight, when it begins
    # looks at the base model, the config and inputs, and returns what is done to the model with the adapter in it
    prepare: Callable[[nn.Module, Any, Tensor], Callable[[nn.Module], Any] | None] | None = field(
        default=None, hash=False
    )

    # what a call needs beside the input: keyword arguments, each row's by what is in the row
    needs: Callable[[Tensor], dict[str, Any]] | None = field(default=None, hash=False)

    def __str__(self) -> str:
        return f"{self.method}-{self.label}" if self.label else self.method

    @property
    def adapter(self) -> type[Method]:
        """The class that its config selects."""
        return class_of(self)

    @property
    def hooks(self) -> frozenset[str]:
        """By which hooks of a method it says what it does."""
        found = self.adapter
        return frozenset(h for h in HOOKS if getattr(found, h, None) is not getattr(Method, h, None))

    def make(self, adapter: str = "default"):
        values = {**self.config, **(self.other if adapter == "other" else {})}
        return graft.PEFT_TYPE_TO_CONFIG_MAPPING[self.method](target_modules=["layer"], **copy.deepcopy(values))

    def called(self, model: nn.Module) -> nn.Module:
        """Have every call of a model get what it needs."""
        if self.needs is not None:
            model.register_forward_pre_hook(Needs(self.needs), with_kwargs=True)
        return model


@cache
def class_of(sample: Sample) -> type[Method]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a test that makes the config sees them
        return graft.method_of(sample.method).variant(sample.make())


@dataclass(frozen=True)
class Needs:
    needs: Callable[[Tensor], dict[str, Any]]

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**self.needs(args[0]), **kwargs}


def kinds(x: Tensor) -> Tensor:
    """Return 0 or 1 for each row, by what is in it."""
    return (x.flatten(1)[:, 0] > 0).long()
