# SPDX-License-Identifier: Apache-2.0
"""The class of tuner classes, which says what a patch or a subclass written for PEFT's tuners would be here: nothing.

PEFT's tuners make layers one by one in methods that subclasses override and other packages replace. graft's tuners have
no such methods: an override would never run. Defining a class with one is no error, as packages do so on import.
"""

from __future__ import annotations

from typing import Any

NAMES = (  # methods of PEFT's tuners that make layers, which graft's do not have
    "_cast_adapter_dtype _check_new_adapter_config _check_target_module_exists _create_and_replace "
    "_create_and_replace_parameter _create_new_module _get_adapter_state_dict _inject_parameters "
    "_mark_only_adapters_as_trainable _prepare_adapter_config _prepare_model _remap_adapter_state_dict_for_load "
    "_replace_module _unload_and_optionally_merge"
)
INTERNALS = frozenset(NAMES.split())
INSTEAD = (
    "graft.plan() shows what an adapter is put on; for new mathematics write a graft.Method, for a new layer type an "
    "Op (docs/architecture.md); for a tuner written for PEFT use PEFT itself"
)


class TunerType(type):
    """The metaclass of tuners."""

    def __getattr__(cls, name: str) -> Any:
        if name in INTERNALS:
            raise AttributeError(f"{cls.__name__}.{name} is not in graft, which makes layers in other ways: {INSTEAD}.")
        raise AttributeError(f"type object '{cls.__name__}' has no attribute '{name}'")

    def __setattr__(cls, name: str, value: Any) -> None:
        if name in INTERNALS:
            raise AttributeError(
                f"setting {cls.__name__}.{name} would change nothing, as graft never calls it: {INSTEAD}."
            )
        super().__setattr__(name, value)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        overridden = sorted({name for c in cls.__mro__ for name in INTERNALS & c.__dict__.keys()})
        if overridden:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(overridden)}, which graft never calls: it would not do what it "
                f"was written for. Instead: {INSTEAD}."
            )
        return super().__call__(*args, **kwargs)
