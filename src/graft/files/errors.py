# SPDX-License-Identifier: Apache-2.0
"""Errors of what works on files, and of servers that load them."""

from __future__ import annotations

from graft import ConfigError, PeftError


class OutputExistsError(PeftError, FileExistsError):
    """There is something already where a result would be written."""


class BaseNeededError(PeftError, ValueError):
    """A format says less than another needs: the base model has the rest, its names or its heads."""


class PackageNeededError(PeftError, ImportError):
    """A format, or a picture, needs a package that is not installed."""


class OptionError(PeftError, ValueError):
    """Options of a verb contradict each other, or have values that cannot be."""


class UnknownServerError(OptionError, ConfigError):
    """Nothing is known of a server of that name."""
