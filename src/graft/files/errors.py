# SPDX-License-Identifier: Apache-2.0
"""Errors of functions on adapter files, and of the checks for servers."""

from __future__ import annotations

from graft import BaseModelMismatchError, CheckpointError, ConfigError, PeftError


class OutputExistsError(PeftError, FileExistsError):
    """The output path exists already, or came from another process meanwhile."""


class BaseNeededError(PeftError, ValueError):
    """A format lacks information that another format needs, and only the base model has it: module names, shapes, or
    values.
    """


class PackageNeededError(PeftError, ImportError):
    """A format or a picture needs a package that is not installed."""


class OptionError(PeftError, ValueError):
    """Options contradict each other, or one has an impossible value."""


class UnknownServerError(OptionError, ConfigError):
    """graft has no data on a server of this name."""


def make_damage_error(fault: str) -> CheckpointError:
    """Return (do not raise) a CheckpointError: the fault of a file, without a full stop, and the remedy."""
    return CheckpointError(f"{fault}. Save or download it again.")


def make_misfit_error(fault: str) -> BaseModelMismatchError:
    """Return (do not raise) a BaseModelMismatchError: why a base does not fit, without a full stop, and the remedy."""
    return BaseModelMismatchError(f"{fault}. Give the base that the adapter was trained on.")
