# SPDX-License-Identifier: Apache-2.0
"""Refusals and warnings in one line: `refuses(ConfigError, "must be positive", graft.LoraConfig, r=0)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refuses(
    error: type[BaseException] | tuple[type[BaseException], ...],
    text: str | None,
    call: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Assert that `call` raises `error` with a message in which the pattern `text` is found; None fits any message."""
    __tracebackhide__ = True
    with pytest.raises(error, match=text):
        call(*args, **kwargs)


def warns(category: type[Warning], text: str | None, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return what `call` returns. Assert that it gives a warning of `category` in which the pattern `text` is found."""
    __tracebackhide__ = True
    with pytest.warns(category, match=text):
        return call(*args, **kwargs)
