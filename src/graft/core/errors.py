# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The exceptions and warnings of graft, the function that warns, and texts for both, cut where they are long."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType


class PeftError(Exception):
    """Base of all errors that graft raises on its own account. Its text, printed, has no control characters."""

    def __str__(self) -> str:
        return escape_controls(Exception.__str__(self), keep="\n")  # not KeyError's, in quotes, nor OSError's


class PeftWarning(UserWarning):
    """Base of graft's warnings."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """`target_modules` selected no module of the model."""


class UnsupportedLayerError(PeftError, TypeError, ValueError):
    """A target has a layer type that the method cannot adapt."""


class ConfigError(PeftError, ValueError):
    """A config field has a value outside its range."""


class ConfigTypeError(PeftError, TypeError, ValueError):
    """A config field has a value of the wrong type."""


class AdapterNotFoundError(PeftError, ValueError):
    """The model has no adapter of that name."""


class AdapterNameError(PeftError, KeyError, ValueError):
    """No adapter can have this name."""


class CalibrationError(PeftError, ValueError):
    """Data cannot initialise an adapter: there is none, too little, or some layers see nothing of it."""


class AlreadyInjectedError(PeftError, ValueError):
    """The model has adapters already."""


class RoutingError(PeftError, ValueError):
    """The rows of a batch do not fit the adapters that the caller names for them."""


class InUseError(PeftError, RuntimeError):
    """A model cannot change now, or be called, because of a call or a change that is under way."""


class FolderInUseError(InUseError):
    """Another process is writing a run or a sweep into this folder."""


class AdapterKeyError(PeftError, RuntimeError, ValueError):
    """A checkpoint and an adapter do not hold the same tensors."""


class CheckpointError(PeftError, ValueError):
    """A checkpoint cannot be read."""


class BaseModelMismatchError(PeftError, RuntimeError, ValueError):
    """A checkpoint belongs to a base model of another architecture."""


class HubError(CheckpointError, OSError):
    """The hub cannot be reached, or does not give a file that may be there."""


class DistributedError(PeftError, RuntimeError):
    """Processes would not train, or do not hold, the same adapter."""


class ServerTimeoutError(PeftError, TimeoutError):
    """A server did not answer in time."""


class ServerError(PeftError, OSError):
    """A server cannot be reached, refuses a request, or answers something else than log-probabilities."""


class UnknownModelError(ServerError):
    """A server has no model, or adapter, of that name."""


class LossError(PeftError, ValueError):
    """A format, a server or a smaller rank cannot hold all that an adapter has."""


class NonFiniteError(CheckpointError):
    """A checkpoint holds NaN or an infinite number."""


def escape_controls(text: str, keep: str = "") -> str:
    """Return a text that moves no cursor, ends no line and turns no direction of writing when it is printed.

    Each character that is not printable (controls, bidirectional overrides, surrogates, spaces other than ' ') is
    written as Python writes it, such as \\x1b. Characters of `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shorten_text(text: str, most: int = 200) -> str:
    """Return a text for an error: the beginning if it is long."""
    return text if len(text) <= most else f"{text[:most]}…"


def join_some(items: list[str], most: int = 8) -> str:
    """Return a list as text: in full, or its beginning and how many more there are."""
    shown = ", ".join(map(escape_controls, items[:most]))
    return f"[{shown}]" if len(items) <= most else f"[{shown}, … and {len(items) - most} more]"


def describe_function(function: object) -> str:
    """Return a client's function as texts show it: where it was written, whatever it says that it wraps."""
    written = getattr(function, "__func__", function)
    code = getattr(written, "__code__", None)
    if code is None:
        return repr(function)
    return f"{getattr(written, '__globals__', {}).get('__name__', '')}.{getattr(code, 'co_qualname', code.co_name)}"


INSIDE = (  # modules that stand between a caller and a warning
    "graft.", "contextlib", "torch.nn.modules.module", "torch.utils._contextlib", "torch.autograd", "torch._tensor",
)  # fmt: skip


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called graft, however deep inside graft this is."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(escape_controls(text, keep="\n"), category, stacklevel=level)


_gathered: ContextVar[dict[tuple[str, type[Warning]], list[str]] | None] = ContextVar("_gathered", default=None)


def warn_of_layer(layer: str, text: str, category: type[Warning] = UserWarning) -> None:
    """Warn of a layer, which replaces {} in the text; within `gather_warnings`, once of all layers with this text."""
    gathered = _gathered.get()
    if gathered is None:
        warn(text.format(f"'{layer}'"), category)
    else:
        gathered.setdefault((text, category), []).append(layer)


@contextmanager
def gather_warnings() -> Iterator[Callable[[], None]]:
    """Gather what `warn_of_layer` says in this block; yield the function that says it, for afterwards."""
    gathered: dict[tuple[str, type[Warning]], list[str]] = {}

    def say() -> None:
        for (text, category), (first, *more_layers) in gathered.items():
            warn(text.format(f"'{first}'" + (f" (and {len(more_layers)} more)" if more_layers else "")), category)

    token = _gathered.set(gathered)
    try:
        yield say
    finally:
        _gathered.reset(token)
