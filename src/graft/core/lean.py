# SPDX-License-Identifier: Apache-2.0
"""torch's modules without dictionaries for hooks until somebody asks for one.

An adapter adds up to seven modules to a layer, as its names in memory are PEFT's. Two thirds of a module's cost are
eleven dictionaries for hooks, and hardly any of these modules gets a hook.
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
    """A dictionary that a module gets when somebody first asks for it."""

    def __init__(self, name: str, kind: type):
        self.name, self.kind = name, kind

    def __get__(self, module: nn.Module | None, owner: object = None) -> object:
        if module is None:
            return self
        if is_dynamo_compiling():  # before torch 2.7 it cannot write there; hooks that come later it ignores anyway
            return self.kind()
        return module.__dict__.setdefault(self.name, self.kind())


def make_lean(cls: type[M]) -> type[M]:
    """Decorate a class so that its instances, made by `bare`, have no dictionaries for hooks at first."""
    for name, kind in _HOOKS.items():
        setattr(cls, name, _LazyDict(name, kind))
    return cls


def init_lean(module: nn.Module, **facts: object) -> None:
    """Do for an instance of a lean class as `nn.Module.__init__` does. Set facts, which are no modules or tensors, past
    `nn.Module.__setattr__`, which takes 1 µs for each."""
    attributes = module.__dict__
    attributes.update(_PLAIN)
    attributes.update(facts)
    for name, kind in _EMPTY:
        attributes[name] = kind()


def new_lean(cls: type[M]) -> M:
    """Make an instance of a lean class that is begun and no more, in a quarter of the time of `nn.Module.__init__`."""
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
    """Return the share of inputs that a method's dropout takes out now. None for a module that the layer has to call:
    one that is not torch's, has hooks, drops everything, or whose draws a dispatch mode has to see."""
    kind = type(dropout)
    if not has_no_hooks(dropout) or kind not in (Identity, nn.Identity, nn.Dropout):
        return None
    if kind is not nn.Dropout or not dropout.training or not dropout.p:
        return 0.0
    return None if dropout.p == 1 or watched() else dropout.p
