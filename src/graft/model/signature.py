# SPDX-License-Identifier: Apache-2.0
"""Give `forward` and `generate` of a PeftModel the signature and help of the model inside."""

from __future__ import annotations

import functools
import inspect
from typing import Any

CALLS = ("forward", "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Show the base model's signature and docstring on methods that take just (*args, **kwargs).

    Args:
        method: "forward", "generate" or "all".

    Raises:
        ValueError: it is another name.
    """
    if method not in (*CALLS, "all"):
        raise ValueError(f"method {method} is not supported please choose one of {[*CALLS, 'all']}")
    base = model.get_base_model()
    for name in CALLS if method == "all" else (method,):
        if hasattr(base, name) and takes_anything(getattr(model, name)):
            setattr(model, name, like(getattr(model, name), getattr(base, name)))


def update_forward_signature(model: Any) -> None:
    update_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    update_signature(model, "generate")


def takes_anything(function: Any) -> bool:
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    return kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def like(function: Any, example: Any) -> Any:
    """Return `function` with the signature and help of `example`."""

    @functools.wraps(example)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapped
