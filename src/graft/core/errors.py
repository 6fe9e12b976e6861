# SPDX-License-Identifier: Apache-2.0
"""Every exception and warning class of graft, and how a warning is given."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class PeftError(Exception):
    """Base of all errors that graft raises on its own account."""


class PeftWarning(UserWarning):
    """Base of graft's warnings."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """`target_modules` selected no module of the model."""


class UnsupportedLayerError(PeftError, TypeError, ValueError):
    """A target was matched whose layer type the method cannot adapt."""


class ConfigError(PeftError, ValueError):
    """A config field has a value outside its range."""


class ConfigTypeError(PeftError, TypeError, ValueError):
    """A config field has a value of the wrong type."""


class AdapterNotFoundError(PeftError, ValueError):
    """No adapter of that name is loaded."""


class AdapterNameError(PeftError, KeyError, ValueError):
    """The name cannot be given to an adapter."""

    __str__ = Exception.__str__  # KeyError would show the text in quotes


class AlreadyInjectedError(PeftError, ValueError):
    """The model has adapters already."""


class RoutingError(PeftError, ValueError):
    """The rows of a batch cannot be given to the adapters that were asked for."""


class AdapterKeyError(PeftError, RuntimeError, ValueError):
    """A checkpoint and an adapter do not hold the same tensors."""


class CheckpointError(PeftError, ValueError):
    """A checkpoint cannot be read."""


class BaseModelMismatchError(PeftError, ValueError):
    """A checkpoint was made for a base model of another architecture."""


INSIDE = ("graft.", "contextlib", "torch.nn.modules.module", "torch.utils._contextlib")


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn whoever called graft, however deep inside this is."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
