# SPDX-License-Identifier: Apache-2.0
"""The command's frame: exit codes, errors in one line, and what every verb does with `--json` and `--quiet`.

Exit codes: 0 done; 1 problems were found; 2 wrong usage; 3 an input is unreadable or damaged; 4 it does not fit the
base; 5 refused, since something would be lost.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import typer

from graft.core.errors import BaseModelMismatchError, CheckpointError, ConfigError, ConfigTypeError, PeftError
from graft.files.errors import (
    BaseNeededError,
    LossError,
    OptionError,
    OutputExistsError,
    PackageNeededError,
    ServerError,
    UnknownModelError,
)

FOUND, USAGE, UNREADABLE, MISFIT, LOSS = 1, 2, 3, 4, 5
CODES: tuple[tuple[type[Exception], int], ...] = (  # the first that fits
    (OptionError, USAGE), (OutputExistsError, USAGE), (UnknownModelError, USAGE), (BaseNeededError, USAGE),
    (PackageNeededError, USAGE), (LossError, LOSS), (BaseModelMismatchError, MISFIT), (ServerError, UNREADABLE),
    (CheckpointError, UNREADABLE), (ConfigTypeError, UNREADABLE), (ConfigError, UNREADABLE), (PeftError, FOUND),
    (OSError, UNREADABLE),
)  # fmt: skip
VERBS = (  # modules of this package, in the order of `graft --help`
    "inspect", "diff", "lint", "resize", "extract", "merge", "convert", "check", "export", "verify", "plan", "hub",
)  # fmt: skip

LOOK, CHANGE, SERVE, PLAN, HUB = (  # parts of `graft --help`
    "Look at adapters", "Change them", "Have them served", "Before training", "On the hub",
)  # fmt: skip
HELP = """
Adapters as files: look at them, compare, change, convert and prove them.

An adapter is a folder, a file or a hub id (user/repo@revision), of any library's format; only a hub id asks the
network. Sources are never changed, and a result appears whole or not at all. Every verb takes --json and -q.
"""
CODES_TEXT = """
Exit codes: 0 done; 1 problems were found; 2 wrong usage, or an output that exists; 3 an input is not there, unreadable
or damaged; 4 it does not fit the base; 5 refused, since something would be lost.
"""

app = typer.Typer(
    name="graft", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown", help=HELP,
    epilog=CODES_TEXT,
)  # fmt: skip


@app.callback()
def verbs() -> None:
    """Make one verb alone stay a verb: typer would take it for the command itself."""


def main() -> None:
    """Run the command; leave the process with its exit code."""
    for verb in [v for v in sys.argv[1:2] if v in VERBS] or VERBS:  # of several, importing takes the time of a call
        import_module(f"graft.command.{verb}")
    try:
        app(prog_name="graft")
    except tuple(kind for kind, _ in CODES) as e:
        print(f"graft: {e}", file=sys.stderr)
        sys.exit(next(code for kind, code in CODES if isinstance(e, kind)))


def print_json(value: Any) -> None:
    """Print one document for programs, on standard output."""
    print(json.dumps(value, indent=1, sort_keys=True))
