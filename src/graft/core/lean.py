# SPDX-License-Identifier: Apache-2.0
"""Subclasses of torch's modules that make each dictionary for hooks only when it is first read.

An adapter adds up to seven modules to a layer, as its names in memory are PEFT's. Eleven dictionaries for hooks are two
thirds of a module's cost, and hardly any of these modules gets a hook.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.compiler import is_dynamo_compiling

from graft.kernels.eager import has_no_hooks, watched

_NEW = nn.Module().__dict__
_HOOKS = {k: type(v) for k, v in _NEW.items() if "hooks" in k and isinstance(v, dict)}
_PLAIN = {k: v for k, v in _NEW.items() if not isinstance(v, (dict, set))}
_EMPTY = [(k, type(v)) for k, v in _NEW.items() if isinstance(v, (dict, set)) and k not in _HOOKS]

M = TypeVar("M", bound=nn.Module)


class _LazyDict:
    """A descriptor for one dictionary of hooks, which it creates in the module when the attribute is first read."""

    def __init__(self, name: str, kind: type):
        self.name, self.kind = name, kind

    def __get__(self, module: nn.Module | None, owner: object = None) -> object:
        """Return a new dictionary of type `kind`, and store it in the module under `name`, so that later reads bypass
        this.

        Returns the descriptor itself if read on the class. While torch.compile traces, the dictionary is not stored.
        """
        if module is None:
            return self
        if is_dynamo_compiling():  # before torch 2.7 it cannot write there; hooks that come later it ignores anyway
            return self.kind()
        return module.__dict__.setdefault(self.name, self.kind())


def make_lean(cls: type[M]) -> type[M]:
    """Add a `_LazyDict` for each dictionary of hooks to a module class, and return the class. Used as a decorator.

    Only instances made by `new_lean` or `init_lean` start without these dictionaries.
    """
    for name, kind in _HOOKS.items():
        setattr(cls, name, _LazyDict(name, kind))
    return cls


def init_lean(module: nn.Module, **facts: object) -> None:
    """Set the attributes that `nn.Module.__init__` sets on an instance of a lean class, except the dictionaries for
    hooks.

    Also store `facts` in the instance's `__dict__`, without `nn.Module.__setattr__`, which takes 1 µs for each. They
    may be neither modules nor tensors.
    """
    attributes = module.__dict__
    attributes.update(_PLAIN)
    attributes.update(facts)
    for name, kind in _EMPTY:
        attributes[name] = kind()


def new_lean(cls: type[M]) -> M:
    """Return an instance of a lean class, set up by `init_lean` alone and not by the class's own `__init__`.

    This takes a quarter of the time of `nn.Module.__init__`.
    """
    module = object.__new__(cls)
    init_lean(module)
    return module


@make_lean
class Linear(nn.Linear):
    pass


@make_lean
class Identity(nn.Identity):
    pass


@make_lean
class ModuleDict(nn.ModuleDict):
    pass


def find_dropout_rate(dropout: nn.Module) -> float | None:
    """Return the probability that a dropout module drops an input now; 0.0 for Identity, in eval mode and for p = 0.

    Returns None if the layer has to call the module: it is neither Identity nor torch's Dropout, it has hooks, p is 1,
    or a dispatch mode watches operations.
    """
    kind = type(dropout)
    if not has_no_hooks(dropout) or kind not in (Identity, nn.Identity, nn.Dropout):
        return None
    if kind is not nn.Dropout or not dropout.training or not dropout.p:
        return 0.0
    return None if dropout.p == 1 or watched() else dropout.p
