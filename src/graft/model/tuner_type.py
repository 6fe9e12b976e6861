# SPDX-License-Identifier: Apache-2.0
"""The metaclass of tuner classes, which refuses patches and subclasses that PEFT's tuners obey and graft's do not.

PEFT's tuners make layers one by one, in methods that subclasses override and other packages replace. graft's tuners
have four of these steps: an injection asks once whether they were replaced, and calls the replacement for each target
(`inject/steps.py`). Any other override would never run. Defining a class with an override is no error, since packages
do so on import; making an instance of it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

NAMES = (  # methods of PEFT's tuners that make layers; graft's tuners lack them
    "_check_new_adapter_config _create_and_replace_parameter _create_new_module _get_adapter_state_dict "
    "_mark_only_adapters_as_trainable _prepare_adapter_config _prepare_model _remap_adapter_state_dict_for_load "
    "_replace_module _unload_and_optionally_merge"
)
INTERNALS = frozenset(NAMES.split())
F = TypeVar("F", bound=Callable[..., object])
STEPS: dict[str, list[Callable[..., object]]] = {}  # steps of an injection: graft's own functions, by name
OF_METHODS: dict[object, type] = {}  # tuner classes by method; None: that of any
OVERRIDES: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()  # names that bodies of classes override
INSTEAD = (
    "graft.plan() shows what an adapter is put on; for new mathematics write a graft.Method, for a new layer type an "
    "Op (docs/architecture.md); for a tuner written for PEFT use PEFT itself"
)


def mark_step(function: F) -> F:
    """Record a function of a tuner as graft's own form of a step that packages may replace, and return it."""
    STEPS.setdefault(function.__name__, []).append(function)
    return function


INJECT = "inject_adapter"  # the injection as a whole, around the steps of it


def names_of_replaced(tuner: nn.Module, method: object) -> list[str]:
    """Return the names of the steps that are replaced on a tuner, its class, or the tuner class of a method."""
    classes = (type(tuner), OF_METHODS.get(method, type(tuner)))
    return [n for n, steps in STEPS.items() if n in tuner.__dict__ or any(getattr(c, n) not in steps for c in classes)]


def describe_missing(name: str, holder: str) -> str:
    """Return the error for a function of PEFT's tuners that graft lacks, with its remedies."""
    return f"{holder}.{name} is not in graft, which makes layers in other ways: {INSTEAD}."


class TunerType(type):
    """The metaclass of tuners."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, object], **options: object) -> TunerType:
        """Make the class; record the functions of PEFT that its body overrides, and its method."""
        cls = super().__new__(mcs, name, bases, namespace, **options)
        functions = {n: getattr(value, "__func__", value) for n, value in namespace.items()}
        OVERRIDES[cls] = frozenset(n for n, f in functions.items() if n in INTERNALS or f not in STEPS.get(n, [f]))
        if "_method" in namespace:
            OF_METHODS[namespace["_method"]] = cls
        return cls

    def __getattr__(cls, name: str) -> object:
        """Raise AttributeError, with a remedy for functions of PEFT's tuners that graft lacks."""
        if name in INTERNALS:
            raise AttributeError(describe_missing(name, cls.__name__))
        raise AttributeError(f"type object '{cls.__name__}' has no attribute '{name}'")

    def __setattr__(cls, name: str, value: object) -> None:
        """Set an attribute of the class.

        Raises AttributeError for functions of PEFT's tuners that graft never calls.
        """
        if name in INTERNALS:
            raise AttributeError(
                f"setting {cls.__name__}.{name} would change nothing, as graft never calls it: {INSTEAD}."
            )
        super().__setattr__(name, value)

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        """Make an instance. Raises TypeError if the class or a base overrides a function that graft never calls."""
        overridden = sorted({name for c in cls.__mro__ for name in OVERRIDES.get(c, ())})
        if overridden:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(overridden)}, which graft never calls: that code would not "
                f"run. Instead: {INSTEAD}."
            )
        return super().__call__(*args, **kwargs)
