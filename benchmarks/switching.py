# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one model: switch, disable, read, delete."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import cycle
from typing import Any

import torch
from torch import nn

import graft
from benchmarks.measure import Bench, Goal, Turns
from benchmarks.models import lora, smollm
from graft.core.lean import Identity, Linear, bare


@cache
def loaded(lib: Any, n: int) -> Any:
    """A model with adapters "default", "a1", … Shared by the rows."""
    model = lib.get_peft_model(smollm(values=False), lora(lib, r=2))
    for i in range(1, n):
        model.add_adapter(f"a{i}", lora(lib, r=2))
    return model


def in_default(lib: Any, n: int) -> Any:
    """The same, with "default" active, whatever the row before left."""
    model = loaded(lib, n)
    model.set_adapter("default")
    return model


def switch(n: int) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        model = loaded(lib, n)
        for name in cycle([f"a{n - 1}", "default"]):
            yield lambda name=name: model.set_adapter(name)

    return turns


def disable(n: int) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        model = in_default(lib, n)

        def block() -> None:
            with model.disable_adapter():
                pass

        while True:
            yield block

    return turns


def state_dict(n: int) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        model = in_default(lib, n)
        while True:
            yield lambda: lib.get_peft_model_state_dict(model)

    return turns


def delete(n: int) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        model = in_default(lib, n)
        while True:
            yield lambda: model.delete_adapter(f"a{n - 1}")
            model.add_adapter(f"a{n - 1}", lora(lib, r=2))

    return turns


def flags() -> Turns:
    """What no switch can do without: `requires_grad` of the parameters of both adapters, which are found already."""
    model = loaded.__wrapped__(graft, 2)  # one of its own: it writes to it
    pairs = [[p for name, p in model.named_parameters() if f".{who}." in name] for who in ("a1", "default")]

    def switch(on: bool) -> None:
        for p in pairs[0]:
            p.requires_grad = on
        for p in pairs[1]:
            p.requires_grad = not on

    for on in cycle([True, False]):
        yield partial(switch, on)


def release() -> Turns:
    """What no deletion can do without: to give up the modules and Parameters of an adapter."""
    model = loaded(graft, 2)
    shapes = [p.shape for name, p in model.named_parameters() if ".default." in name]  # "a1" comes and goes
    while True:
        held = []
        for A, B in zip(shapes[::2], shapes[1::2]):
            a, b, dropout = (bare(kind) for kind in (Linear, Linear, Identity))
            a._parameters["weight"], b._parameters["weight"] = (
                nn.Parameter(torch.empty(A)),
                nn.Parameter(torch.empty(B)),
            )
            held.append((a, b, dropout))
        yield held.clear
        del held


# PEFT takes half a minute to load 50 adapters
BENCHES = [
    Bench("set_adapter, 2 loaded", switch(2), Goal(faster=50), flags),
    Bench("disable_adapter, 2 loaded", disable(2), Goal(faster=100)),
    Bench("get_peft_model_state_dict, 2 loaded", state_dict(2), Goal(faster=50)),
    Bench("delete_adapter, 2 loaded", delete(2), Goal(faster=50), release),
    Bench("set_adapter, 50 loaded", switch(50), Goal(faster=500), flags, long=True),
    Bench("disable_adapter, 50 loaded", disable(50), Goal(faster=1000), long=True),
    Bench("get_peft_model_state_dict, 50 loaded", state_dict(50), Goal(faster=50), long=True),
    Bench("delete_adapter, 50 loaded", delete(50), Goal(faster=50), release, long=True),
]
