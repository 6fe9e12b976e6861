# SPDX-License-Identifier: Apache-2.0
"""Module trees from dotted names: target discovery looks at names and layer types, nothing has to run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def tree(names: Iterable[str], leaf=lambda: nn.Linear(2, 3), **attributes) -> nn.Module:
    """A model with a layer at every name. A name that is a prefix of another gets no layer of its own."""
    names = list(names)
    root = nn.Module()
    with torch.random.fork_rng(devices=[]):
        for name in names:
            *parents, last = name.split(".")
            module = root
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]
            if not any(other.startswith(name + ".") for other in names):
                module.add_module(last, leaf())
    for key, value in attributes.items():
        setattr(root, key, value)
    return root


class Config(dict):
    """A stand-in for a transformers configuration."""

    def __init__(self, model_type: str, **values):
        super().__init__(model_type=model_type, **values)

    def to_dict(self) -> dict:
        return dict(self)

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)
