# SPDX-License-Identifier: Apache-2.0
"""Refusals in one line: `refuses(ConfigError, "must be positive", graft.LoraConfig, r=0)`."""

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
