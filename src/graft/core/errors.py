# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The exceptions and warnings of graft, the functions that warn, and functions that shorten texts for both."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType


class PeftError(Exception):
    """Base of graft's errors. `str()` of one has no control characters except line ends."""

    def __str__(self) -> str:
        """Return the text with unprintable characters escaped, except line ends; without the quotes of a KeyError."""
        return escape_controls(Exception.__str__(self), keep="\n")  # KeyError and OSError would add quotes or an errno


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
    """Another process writes a run or a sweep into this folder."""


class AdapterKeyError(PeftError, RuntimeError, ValueError):
    """A checkpoint and an adapter do not hold the same tensors."""


class CheckpointError(PeftError, ValueError):
    """A checkpoint cannot be read."""


class BaseModelMismatchError(PeftError, RuntimeError, ValueError):
    """A checkpoint belongs to a base model of another architecture."""


class HubError(CheckpointError, OSError):
    """The hub cannot be reached, or does not send a file that may exist."""


class DistributedError(PeftError, RuntimeError):
    """Processes would not train, or do not hold, the same adapter."""


class ServerTimeoutError(PeftError, TimeoutError):
    """A server did not answer in time."""


class ServerError(PeftError, OSError):
    """A server cannot be reached, refuses a request, or answers with something other than log-probabilities."""


class UnknownModelError(ServerError):
    """A server has no model, or adapter, of that name."""


class LossError(PeftError, ValueError):
    """A format, a server or a smaller rank cannot hold everything that an adapter has."""


class NonFiniteError(CheckpointError):
    """A checkpoint holds NaN or an infinite number."""


def escape_controls(text: str, keep: str = "") -> str:
    """Return a text with every unprintable character escaped as Python escapes it, such as \\x1b.

    These are controls, bidirectional overrides, surrogates and spaces other than ' '. Characters in `keep` stay. A
    printable text is returned as it is.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shorten_text(text: str, most: int = 200) -> str:
    """Return a text, or its first `most` characters and "…" if it is longer."""
    return text if len(text) <= most else f"{text[:most]}…"


def join_some(items: list[str], most: int = 8) -> str:
    """Return "[a, b, …]" of a list of texts, with control characters escaped.

    Of more than `most` items only the first are shown, and then "… and N more".
    """
    shown = ", ".join(map(escape_controls, items[:most]))
    return f"[{shown}]" if len(items) <= most else f"[{shown}, … and {len(items) - most} more]"


def describe_function(function: object) -> str:
    """Return "module.qualified_name" of a function as it was written, whatever `__wrapped__` or `__name__` say.

    A bound method is replaced by its function. The module is `__name__` of the function's globals, "" without. Python
    3.10 has only the unqualified name. Returns `repr(function)` for a callable without code.
    """
    written = getattr(function, "__func__", function)
    code = getattr(written, "__code__", None)
    if code is None:
        return repr(function)
    return f"{getattr(written, '__globals__', {}).get('__name__', '')}.{getattr(code, 'co_qualname', code.co_name)}"


INSIDE = (  # modules between the caller of graft and a warning
    "graft.", "contextlib", "torch.nn.modules.module", "torch.utils._contextlib", "torch.autograd", "torch._tensor",
)  # fmt: skip


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning that points at the first line outside graft, contextlib and torch's wrappers in the call stack.

    Frames are judged by the name of their module. If all are inside, the warning has no line of the stack.
    Control characters of the text are escaped, except line ends.
    """
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(escape_controls(text, keep="\n"), category, stacklevel=level)


_gathered: ContextVar[dict[tuple[str, type[Warning]], list[str]] | None] = ContextVar("_gathered", default=None)


def warn_of_layer(layer: str, text: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning about a layer: "{}" in the text becomes the layer's name in quotes.

    Within `gather_warnings` the layer is only noted, for one warning of all layers with the same text and category.
    """
    gathered = _gathered.get()
    if gathered is None:
        warn(text.format(f"'{layer}'"), category)
    else:
        gathered.setdefault((text, category), []).append(layer)


@contextmanager
def gather_warnings() -> Iterator[Callable[[], None]]:
    """Note the layers of `warn_of_layer` within the block, in place of warnings.

    Yields a function that gives them: one warning per text and category, which names the first layer and the number of
    others. The caller calls it after the block; without that, they are lost.
    """
    gathered: dict[tuple[str, type[Warning]], list[str]] = {}

    def say() -> None:
        """Give one warning per text and category in the order of their first occurrence.

        The text gets the first layer and, if there are more, their number.
        """
        for (text, category), (first, *more_layers) in gathered.items():
            warn(text.format(f"'{first}'" + (f" (and {len(more_layers)} more)" if more_layers else "")), category)

    token = _gathered.set(gathered)
    try:
        yield say
    finally:
        _gathered.reset(token)


def warn_unknown(function: Callable[..., object], kwargs: Iterable[str], known: set[str]) -> None:
    """Warn (PeftWarning) of each keyword in `kwargs` that is not in `known`: it has no effect.

    The text suggests the most similar name among `known` and the function's parameters, if one is close.
    """
    import inspect
    from difflib import get_close_matches

    for name in kwargs:
        if name not in known:
            close = get_close_matches(name, known | set(inspect.signature(function).parameters), n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            warn(f"{function.__name__}() knows no argument '{name}': it has no effect.{hint}", PeftWarning)
