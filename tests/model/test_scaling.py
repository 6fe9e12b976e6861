# SPDX-License-Identifier: Apache-2.0
"""Cost is linear in the number of modules, and does not depend on how many other adapters are loaded.

Counted in function calls, which do not depend on the machine: a look at all modules for each module would show.
"""

from __future__ import annotations

import copy
import cProfile
import gc
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft import plan  # here, so that no call is counted that imports it
from tests.models import adapted

FEW, MANY = 40, 80
MODULES_ALLOWED = 2.1  # twice as many modules, and what is done once per call
ADAPTERS_ALLOWED = 1.1


def calls(function: Callable[[], Any]) -> int:
    """How many functions run, those written in C included."""
    profile = cProfile.Profile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # what earlier tests left would be counted when it goes
        gc.disable()
        try:
            profile.runcall(function)
        finally:
            gc.enable()
    return sum(entry.callcount for entry in profile.getstats())


class Stack(nn.Module):
    """`n` linear layers in blocks of ten, as deep a name as in a transformer."""

    def __init__(self, n: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({f"l{i}": nn.Linear(4, 4) for i in range(10)}) for _ in range(n // 10)
        )

    def forward(self, x):
        for layer in self.layers:
            for linear in layer.values():
                x = linear(x)
        return x


def config(method: str = "LORA", **options: Any) -> Any:
    cls = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    if method == "IA3":
        options.setdefault("feedforward_modules", [])
    if method == "OFT":
        options |= dict(r=0, oft_block_size=2)
    if method == "MISS":
        options.setdefault("r", 2)
    if method == "VBLORA":
        options.setdefault("vector_length", 2)
    return cls(**{"target_modules": [f"l{i}" for i in range(10)], **options})


@cache
def _original(n: int, adapters: int) -> Any:
    names = ["default", *(f"a{i}" for i in range(1, adapters))]
    return adapted(Stack(n), dict.fromkeys(names, config()), scale=0)


def stack_with(n: int, adapters: int = 1) -> Any:
    return copy.deepcopy(_original(n, adapters))


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What happens once per process is no part of a count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whichever test is the first
        exercise(stack_with(20, 2))
    gc.collect()


def exercise(model: Any) -> None:
    model.set_adapter("a1")
    model.merge_adapter()
    model.unmerge_adapter()
    graft.get_peft_model_state_dict(model)
    model.get_layer_status()
    model.delete_adapter("a1")


# modules


@pytest.mark.parametrize("method", ["LORA", "IA3", "VERA", "LOHA", "OFT", "HRA", "HIRA", "MISS", "VBLORA", "LN_TUNING"])
def test_injection_is_linear(method):
    few, many = (calls(lambda n=n: graft.get_peft_model(Stack(n), config(method))) for n in (FEW, MANY))
    assert many <= MODULES_ALLOWED * few


CONFIGS = {
    "names": dict(),
    "regex": dict(target_modules=r"layers\.\d+\.l[0-7]"),
    "all-linear": dict(target_modules="all-linear"),
    "excluded": dict(exclude_modules=["l3", "l4"]),
    "every name": None,  # in full
    "layers": dict(layers_to_transform=[1, 3, 5], layers_pattern="layers"),
    "ranks": dict(rank_pattern={"l1": 4, r"layers\.1\.l2": 2}),
    "saved": dict(modules_to_save=["l9"], target_modules=["l0", "l1"]),
    "bias": dict(bias="all"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_injection_is_linear_however_targets_are_named(name):
    def inject(n: int) -> Any:
        model = Stack(n)
        options = CONFIGS[name]
        if options is None:
            options = dict(target_modules=[k for k, m in model.named_modules() if isinstance(m, nn.Linear)][::2])
        return graft.get_peft_model(model, config(**options))

    inject(20)
    few, many = (calls(lambda n=n: inject(n)) for n in (FEW, MANY))
    assert many <= MODULES_ALLOWED * few


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "second adapter": lambda model: model.add_adapter("second", config()),
    "set_adapter": lambda model: model.set_adapter("a1"),
    "disable_adapter": lambda model: model.disable_adapter().__enter__(),
    "state dict": lambda model: graft.get_peft_model_state_dict(model, adapter_name="a1"),
    "delete_adapter": lambda model: model.delete_adapter("a1"),
    "merge_adapter": lambda model: model.merge_adapter(),
    "unload": lambda model: model.unload(),
    "layer status": lambda model: model.get_layer_status(),
    "plan": lambda model: plan(model.get_base_model(), config(), "third"),
    "forward": lambda model: model(torch.zeros(1, 4)),
    "mixed batch": lambda model: model(torch.zeros(2, 4), adapter_names=["default", "a1"]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_linear_in_the_modules(name):
    few, many = (stack_with(n, 2) for n in (FEW, MANY))
    assert calls(lambda: OPERATIONS[name](many)) <= MODULES_ALLOWED * calls(lambda: OPERATIONS[name](few))


@pytest.mark.parametrize("name", ["save", "load", "load another"])
def test_files_are_linear_in_the_modules(name, tmp_path):
    counted = [calls(file_operation(name, n, 2, tmp_path)) for n in (20, FEW, MANY)]
    assert counted[2] <= MODULES_ALLOWED * counted[1]


def file_operation(name: str, n: int, adapters: int, folder: Path) -> Callable[[], Any]:
    model, path = stack_with(n, adapters), str(folder / f"{n}-{adapters}")
    if name == "save":
        return lambda: model.save_pretrained(path, selected_adapters=["default"])
    model.save_pretrained(path, selected_adapters=["default"])
    if name == "load":
        return lambda: graft.PeftModel.from_pretrained(Stack(n), path)
    model.eval()  # as a model that serves is; else loading for inference sets all of it to eval
    return lambda: model.load_adapter(path, "another")


# adapters that happen to be loaded, too

REPORTING = ("layer status", "unload")  # their result is about all adapters


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in REPORTING])
def test_operations_do_not_depend_on_other_adapters(name):
    few, many = (stack_with(20, adapters) for adapters in (2, 10))
    assert calls(lambda: OPERATIONS[name](many)) <= ADAPTERS_ALLOWED * calls(lambda: OPERATIONS[name](few))


@pytest.mark.parametrize("name", ["save", "load another"])
def test_files_do_not_depend_on_other_adapters(name, tmp_path):
    few, many = (calls(file_operation(name, 20, adapters, tmp_path)) for adapters in (2, 10))
    assert many <= ADAPTERS_ALLOWED * few
