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
from graft.core.lean import Identity, Linear, new_lean


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


def marks() -> Turns:
    """What no disabling of layers can do without: a fact of each, set and set back."""
    facts = [dict(vars(m)) for m in loaded(graft, 2).modules() if hasattr(m, "base_layer")]

    def block() -> None:
        for on in (True, False):
            for held in facts:
                held["disabled"] = on

    while True:
        yield block


def collect() -> Turns:
    """What no state dict can do without: key and tensor of each factor, of layers that are found already."""
    layers = [(name, m._modules) for name, m in loaded(graft, 2).named_modules() if hasattr(m, "lora_A")]

    def make() -> dict[str, torch.Tensor]:
        return {
            f"{name}.{part}.weight": held[part]._modules["default"]._parameters["weight"]
            for name, held in layers
            for part in ("lora_A", "lora_B")
        }

    while True:
        yield make


def release() -> Turns:
    """What no deletion can do without: to give up the modules and Parameters of an adapter."""
    model = loaded(graft, 2)
    shapes = [p.shape for name, p in model.named_parameters() if ".default." in name]  # "a1" comes and goes
    while True:
        held = []
        for A, B in zip(shapes[::2], shapes[1::2]):
            a, b, dropout = (new_lean(kind) for kind in (Linear, Linear, Identity))
            a._parameters["weight"], b._parameters["weight"] = (
                nn.Parameter(torch.empty(A)),
                nn.Parameter(torch.empty(B)),
            )
            held.append((a, b, dropout))
        yield held.clear
        del held


# k: of each tensor or layer, what is done beside the floor's one operation
SWITCH = Goal(1, 3)  # find the parameter where it stands now, and note the adapter on the layer
DISABLE = Goal(1, 2)  # look whether the layer is merged
COLLECT = Goal(1, 4)  # see that it is whole, that it is here, that it has its shape
DELETE = Goal(1, 3)  # take it out of its container, and the adapter out of the layer's facts
# PEFT takes half a minute to load 50 adapters
BENCHES = [
    Bench("set_adapter, 2 loaded", switch(2), SWITCH, flags),
    Bench("disable_adapter, 2 loaded", disable(2), DISABLE, marks),
    Bench("get_peft_model_state_dict, 2 loaded", state_dict(2), COLLECT, collect),
    Bench("delete_adapter, 2 loaded", delete(2), DELETE, release),
    Bench("set_adapter, 50 loaded", switch(50), SWITCH, flags, long=True),
    Bench("disable_adapter, 50 loaded", disable(50), DISABLE, marks, long=True),
    Bench("get_peft_model_state_dict, 50 loaded", state_dict(50), COLLECT, collect, long=True),
    Bench("delete_adapter, 50 loaded", delete(50), DELETE, release, long=True),
]
