# SPDX-License-Identifier: Apache-2.0
"""Checks of the file of a training or a run, before anything in it is used: names, types, shapes and ranges.

A file may come from anywhere, and torch and NumPy believe a generator's position.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft import CheckpointError, NonFiniteError
from graft.config.reading import describe_fault
from graft.core.errors import join_some
from graft.io.files import find_nonfinite
from graft.train.state_file import simulate_read

REMEDY = "Take an earlier checkpoint."
MOST_STEPS = 2**53
NUMBERS = 624  # of a Mersenne Twister
TWISTER, NORMALS, SIZE = struct.Struct("<8xii Q"), struct.Struct("<ddd8xf"), 5056  # of torch's generator on a CPU
BEHIND_NUMBERS = TWISTER.size + 8 * NUMBERS

# class of an optimizer of torch or graft → names in its state of each parameter; options that add names
KEPT = {
    "SGD": "", **dict.fromkeys(("Adam", "AdamW", "RAdam", "SparseAdam", "LoraFAOptimizer"), "step exp_avg exp_avg_sq"),
    "NAdam": "step exp_avg exp_avg_sq mu_product", "Adagrad": "step sum",
    "RMSprop": "step square_avg", "Adadelta": "step square_avg acc_delta", "Adamax": "step exp_avg exp_inf",
    "ASGD": "step eta mu ax", "Rprop": "step prev step_size", "Adafactor": "step", "Muon": "momentum_buffer",
}  # fmt: skip
MORE = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
COUNTERS = {"step", "eta", "mu", "mu_product"}  # numbers; all else that KEPT and MORE name has the parameter's shape
TENSORS = {name for names in (*KEPT.values(), *MORE.values()) for name in names.split()} - COUNTERS
TENSORS |= {"momentum_buffer", "variance", "row_var", "col_var"}
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg", "acc_delta", "exp_inf", "step_size"}  # from 0 on
SQUARES |= {"variance", "row_var", "col_var"}
KNOWN_MODULES = ("torch.optim.", "graft.optim")  # modules of classes with a known state

LARGEST_RATE = 2**24
RATES = {"lr", "initial_lr", "base_lrs", "_last_lr", "min_lrs", "max_lr", "min_lr", "eta_min"}
UNBOUNDED = {"best", "mode_worse"}  # losses of ReduceLROnPlateau, before the first
FUNCTIONS = "lr_lambdas"  # of schedules: attributes of the user's objects
NOT_NEGATIVE = {"eps", "weight_decay", "momentum", "last_epoch", "_step_count"}


def is_count(value: object) -> bool:
    """Return True for an int from 0 to 2^53; False for a bool or another subclass."""
    return type(value) is int and 0 <= value <= MOST_STEPS


def is_number(value: object) -> bool:
    """Return True for an int or a float, or a plain tensor with one number; False for a bool or another subclass of int
    or float.
    """
    return type(value) in (int, float) or (
        isinstance(value, Tensor) and value.numel() == 1 and describe_fault(value) is None
    )


def is_a(kind: type, each: type | None = None) -> Callable[[object], bool]:
    """Return a function that tells whether a value has exactly this type, and its items, or values of a dict, exactly
    the type `each`.
    """

    def is_right(value: object) -> bool:
        """Return True if the type of the value, and of each of its items or of a dict's values, is exactly this.

        Subclasses and a dict's keys do not count.
        """
        inner = value.values() if isinstance(value, dict) else value
        return type(value) is kind and (each is None or all(type(entry) is each for entry in inner))  # type: ignore[attr-defined]

    return is_right


def check_fields(value: object, table: Mapping[str, Callable[[object], bool]], what: str) -> None:
    """Raise CheckpointError unless a value is a dict with all fields of a table, and the table's function returns True
    for each. Other fields may be there.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is a {type(value).__name__}, not a dict. {REMEDY}")
    for name, is_right in table.items():
        if name not in value or not is_right(value[name]):
            raise CheckpointError(
                f"{what}: the field '{name}' is missing or of another kind than graft writes. {REMEDY}"
            )


# random numbers


def check_random(state: object, what: str) -> None:
    """Raise CheckpointError unless a value holds states of Python's and NumPy's generators that these accept, with a
    position in range and finite numbers. NumPy's must be an MT19937 with 624 numbers.
    """
    check_fields(state, {"python": is_a(tuple), "numpy": is_a(tuple)}, f"{what}: the random state")
    try:
        random.Random(0).setstate(state["python"])  # type: ignore[index]
        np.random.RandomState(0).set_state(state["numpy"])  # type: ignore[index]
        kind, keys, position, cached, gauss = state["numpy"]  # type: ignore[index]
        right = kind == "MT19937" and len(keys) == NUMBERS and type(position) is int and 0 <= position <= NUMBERS
        right = right and cached in (0, 1) and math.isfinite(gauss) and math.isfinite(state["python"][2] or 0.0)  # type: ignore[index]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        right = False
    if not right:
        raise CheckpointError(f"{what}: a state of Python's or NumPy's generator is invalid. {REMEDY}")


def check_generator(state: object, what: str, device: str = "cpu") -> None:
    """Raise CheckpointError unless a value is a tensor that a torch generator of this device accepts as its state.

    The parts of a CPU state must also fit together.

    torch checks each number of a CPU state separately, and reads foreign memory where two do not fit. A device without
    generators accepts any tensor.
    """
    right = isinstance(state, Tensor)
    if isinstance(state, Tensor):
        with suppress(RuntimeError):  # a device without generators that one can make
            scratch = torch.Generator(device)
            try:
                scratch.set_state(state)
            except (RuntimeError, TypeError):
                right = False
        if right and device == "cpu" and len(state) == SIZE:
            data = state.numpy().tobytes()
            left, _, place = TWISTER.unpack_from(data)
            right = left + place <= NUMBERS + 1 and all(map(math.isfinite, NORMALS.unpack_from(data, BEHIND_NUMBERS)))
    if not right:
        raise CheckpointError(f"{what}: the state of a generator is invalid. {REMEDY}")


# optimizers and schedules


def check_value_like(value: object, current: object, what: str, exact: bool, name: str = "") -> None:
    """Raise CheckpointError unless a value of a file can replace the current one; lists, tuples and dicts recursively.

    Numbers of any type replace each other. They must be finite if the current one is, except for the best loss so far.
    Rates lie between 0 and 2^24, some others from 0 on, betas in [0, 1). Other values must have the type of the current
    one; texts are equal, and tensors have equal shape and dtype.

    Args:
        current: as a file would hold it, see `simulate_read`.
        exact: lists have equal lengths and dicts equal keys. False: for classes that graft does not know, and for the
            attributes of functions; there None may become anything, numbers may be infinite, and only common items are
            compared.
        name: of the option, for its range.
    """
    if current is None and not exact:
        return
    if is_number(current) and is_number(value):
        n, finite = float(value), math.isfinite(float(current)) and name not in UNBOUNDED  # type: ignore[arg-type]
        low, high = 0.0 if name in RATES | NOT_NEGATIVE else -math.inf, LARGEST_RATE if name in RATES else math.inf
        right = low <= n <= high and (math.isfinite(n) or not (finite and exact)) and (name != "betas" or 0 <= n < 1)
    elif isinstance(current, (list, tuple)) and type(value) is type(current):
        right = not exact or len(value) == len(current)
        for inner, inner_current in zip(value, current) if right else ():
            check_value_like(inner, inner_current, what, exact, name)
    elif isinstance(current, dict) and isinstance(value, dict):
        right = not exact or value.keys() == current.keys()
        for key in value.keys() & current.keys() if right else ():
            check_value_like(value[key], current[key], f"{what}, '{key}'", exact and key != FUNCTIONS, key)
    elif isinstance(current, Tensor):
        right = isinstance(value, Tensor) and value.shape == current.shape and value.dtype == current.dtype
    else:
        right = type(value) is type(current) and (not isinstance(current, str) or value == current)
    if not right:
        raise CheckpointError(f"{what} is {format_value(value)}, where {format_value(current)} is expected. {REMEDY}")


def check_state_like(thing: object, value: object, state: object, what: str, name: str = "") -> None:
    """Raise CheckpointError unless `thing`, an optimizer or schedule, can take `value` where it has `state`, by
    `check_value_like`.

    `state` is first turned into the form that a file would hold (`simulate_read`). Objects of classes of torch and
    graft must have the same entries.
    """
    check_value_like(value, simulate_read(state), what, type(thing).__module__.startswith(KNOWN_MODULES), name)


def format_value(value: object) -> str:
    """Return `repr` of None and of values of exactly the types bool, int and float.

    For any other value, also one of a subclass, return "of type …" with the class name.
    """
    return repr(value) if value is None or type(value) in (bool, int, float) else f"of type {type(value).__name__}"


def check_moments(
    state: object, shape: torch.Size, dtype: torch.dtype, optimizer: object, group: Mapping[str, Any], what: str
) -> None:
    """Raise CheckpointError unless an optimizer can use a state of a parameter with this shape and dtype.

    The state must be a dict with names of type str, plain tensors, and finite numbers; an empty dict is allowed. For
    optimizers of other packages than torch and graft nothing more is checked. For these two, required names must be
    there, and known names have the right type: counters lie between 0 and `MOST_STEPS`, moments have the parameter's
    shape and dtype, and squares are not negative. `momentum_buffer` may be None, and unknown names are ignored.

    Args:
        dtype: of the values that train: of masters, where an optimizer keeps those.

    Raises:
        NonFiniteError: a tensor or number is NaN or infinite.
    """
    if not isinstance(state, dict) or not all(type(name) is str for name in state):
        raise CheckpointError(f"{what} is no dict of named values. {REMEDY}")
    if faults := [name for name, t in state.items() if isinstance(t, Tensor) and describe_fault(t)]:
        raise CheckpointError(f"{what}: {join_some(faults)} are no plain tensors. {REMEDY}")
    check_state_finite(state, what)
    module, kind = type(optimizer).__module__, type(optimizer).__name__
    if not state or not module.startswith(KNOWN_MODULES):
        return
    for name in list_required_names(kind, group):
        if name not in state:
            raise CheckpointError(f"{what} lacks '{name}'. {REMEDY}")
    counts: type = int if module.startswith("graft.") or kind == "SparseAdam" else Tensor
    shapes = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:])}
    for name, value in state.items():
        if name in COUNTERS:
            right = isinstance(value, counts) and is_number(value) and 0 <= float(value) <= MOST_STEPS  # type: ignore[arg-type]
            right = right and not (isinstance(value, Tensor) and not value.is_floating_point())
        elif name in TENSORS and isinstance(value, Tensor):
            right = value.shape == shapes.get(name, shape) and value.dtype == dtype
            right = right and (name not in SQUARES or not bool((value < 0).any()))
        elif name in TENSORS:
            right = name == "momentum_buffer" and value is None
        else:
            continue
        if not right:
            raise CheckpointError(f"{what}: '{name}' has another type, shape or range than it has here. {REMEDY}")


def list_required_names(kind: str, group: Mapping[str, Any]) -> list[str]:
    """Return the names that the state of each parameter of a group must have, for the name of an optimizer class of
    graft or torch. An unknown class gives [].

    Options of the group such as amsgrad add names, RMSprop with momentum "momentum_buffer". LoraMuonOptimizer has
    "momentum_buffer" alone in groups with `muon`, else those of Adam.
    """
    if kind == "LoraMuonOptimizer":
        return ["momentum_buffer"] if group.get("muon") else KEPT["Adam"].split()
    more = [name for option, name in MORE.items() if group.get(option) and kind in KEPT]
    momentum = ["momentum_buffer"] if kind == "RMSprop" and group["momentum"] else []
    return [*KEPT.get(kind, "").split(), *more, *momentum]


def check_state_finite(values: Mapping[str, object], what: str) -> None:
    """Raise NonFiniteError, with up to three names, for tensors and floats that are NaN or infinite.

    Only floating tensors and values of exactly the type float are looked at: complex and sharded tensors are left out.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    bad = find_nonfinite(tensors) + [n for n, v in values.items() if type(v) is float and not math.isfinite(v)]
    if bad:
        raise NonFiniteError(
            f"{what} holds NaN or infinite numbers in {join_some(bad, 3)}: training had diverged. {REMEDY}"
        )
