# SPDX-License-Identifier: Apache-2.0
"""The command's frame: exit codes, errors in one line, and what every verb does with `--json` and `--quiet`.

Exit codes: 0 done; 1 problems were found; 2 wrong usage; 3 an input is unreadable or damaged; 4 it does not fit the
base; 5 refused, since something would be lost.
"""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated

import typer

from graft.core.errors import (
    AdapterKeyError,
    BaseModelMismatchError,
    LossError,
    NoMatchingPeftModuleError,
    PeftError,
    UnsupportedLayerError,
    escape_controls,
)
from graft.files.errors import BaseNeededError, OptionError, OutputExistsError, PackageNeededError, UnknownModelError

FOUND, USAGE, UNREADABLE, MISFIT, LOSS = 1, 2, 3, 4, 5
CODES: tuple[tuple[type[Exception], int], ...] = (  # the first that fits
    (OptionError, USAGE), (OutputExistsError, USAGE), (UnknownModelError, USAGE), (BaseNeededError, USAGE),
    (PackageNeededError, USAGE), (LossError, LOSS), (BaseModelMismatchError, MISFIT), (AdapterKeyError, MISFIT),
    (NoMatchingPeftModuleError, MISFIT), (UnsupportedLayerError, MISFIT), (PeftError, UNREADABLE),
    (OSError, UNREADABLE),
)  # fmt: skip
VERBS = (  # modules of this package, in the order of `graft --help`
    "inspect", "diff", "lint", "resize", "extract", "merge", "convert", "check", "export", "verify", "plan",
)  # fmt: skip

LOOK, CHANGE, SERVE, PLAN = "Look at adapters", "Change them", "Have them served", "Before training"  # of `--help`
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


def print_version(asked: bool) -> None:
    if asked:
        from graft import __version__

        print(f"graft {__version__}")
        raise typer.Exit


@app.callback()
def verbs(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print graft's version.")
    ] = False,
) -> None:
    """Make one verb alone stay a verb: typer would take it for the command itself."""


def main() -> None:
    """Run the command; leave the process with its exit code. With --json an error is a document as well."""
    for verb in [v for v in sys.argv[1:2] if v in VERBS] or VERBS:  # of several, importing takes the time of a call
        import_module(f"graft.command.{verb}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that is no text, or ΔW where people write ASCII
    for_programs = "--json" in sys.argv
    try:
        left = app(prog_name="graft", standalone_mode=False)  # typer would print its errors as they are
    except Exception as e:
        code = getattr(e, "exit_code", None) or next((code for kind, code in CODES if isinstance(e, kind)), None)
        if code is None:
            raise
        text = str(e)
        if hasattr(e, "format_message"):  # typer's own, of a wrong usage
            text = e.format_message()
            if not text:  # no verb: the help has been printed
                sys.exit(code)
            place = getattr(getattr(e, "ctx", None), "command_path", "graft")
            text = f"{text.rstrip('.')}. See {place} --help."
        if for_programs:
            print_json({"error": text, "kind": type(e).__name__, "exit_code": code})
        print(f"graft: {escape_controls(text)}", file=sys.stderr)
        sys.exit(code)
    sys.exit(left if isinstance(left, int) else 0)


def print_json(value: object) -> None:
    """Print one document for programs, on standard output."""
    print(json.dumps(as_json(value), indent=1, sort_keys=True, allow_nan=False))


def as_json(value: object) -> object:
    """Return a value as JSON has it, which knows no NaN and nothing infinite: null stands for them."""
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
