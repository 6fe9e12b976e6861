# SPDX-License-Identifier: Apache-2.0
"""The frame of the command: it turns functions into verbs, prints their results and errors, and sets the exit code.

Exit codes: 0 done; 1 problems were found; 2 wrong usage; 3 an input is unreadable or damaged; 4 it does not fit the
base; 5 refused, since something would be lost.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, Signature, getdoc, signature
from io import TextIOWrapper
from typing import Annotated, Any, NamedTuple, TypeVar

import typer

from graft import (
    AdapterKeyError,
    BaseModelMismatchError,
    LossError,
    NoMatchingPeftModuleError,
    PeftError,
    UnknownModelError,
    UnsupportedLayerError,
)
from graft.core.errors import escape_controls
from graft.files.errors import BaseNeededError, OptionError, OutputExistsError, PackageNeededError

FOUND, USAGE, UNREADABLE, MISFIT, LOSS = 1, 2, 3, 4, 5
CODES: tuple[tuple[type[Exception], int], ...] = (  # the first match counts
    (OptionError, USAGE), (OutputExistsError, USAGE), (UnknownModelError, USAGE), (BaseNeededError, USAGE),
    (PackageNeededError, USAGE), (LossError, LOSS), (BaseModelMismatchError, MISFIT), (AdapterKeyError, MISFIT),
    (NoMatchingPeftModuleError, MISFIT), (UnsupportedLayerError, MISFIT), (PeftError, UNREADABLE),
    (OSError, UNREADABLE),
)  # fmt: skip
MODULES = {  # of this package → its heading in `graft --help`, and its verbs, in that order
    "look": ("Look at adapters", "inspect diff lint"), "change": ("Change them", "resize extract merge convert"),
    "serve": ("Have them served", "check export verify"), "plan": ("Before training", "plan"),
    "device": ("On a GPU", "device-report"),
}  # fmt: skip
VERBS = {verb: module for module, (_, verbs) in MODULES.items() for verb in verbs.split()}

COMMON = {  # help of parameters that several verbs share
    "adapter": "Folder, file, or hub id (user/repo@revision).",
    "base": "Folder or hub id of the base; else that of the adapter's config.",
    "output": "Where the result goes.",
    "force": "Replace what stands at the output.",
    "dry_run": "Compute and report, and write nothing.",
    "as_json": "Print one JSON document.",
    "quiet": "Print nothing but errors.",
}
NAMES = {"as_json": ("--json",), "quiet": ("--quiet", "-q"), "output": ("--output", "-o")}
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


Verb = TypeVar("Verb", bound=Callable[..., "Result"])


class Result(NamedTuple):
    """The result of a verb.

    Attributes:
        document: of --json.
        report: a function that prints the result for people.
        has_problems: the command exits with `code`.
        code: 1, or another exit code.
    """

    document: object
    report: Callable[[], None]
    has_problems: bool = False
    code: int = FOUND


def add_verb(function: Verb) -> Verb:
    """Add a function to the verbs, under its name with `_` as `-` and the heading of its module, and return it
    unchanged.

    Positional parameters become arguments, and keyword-only parameters become options. The docstring before "Args:" is
    the help. Help texts of parameters come from its "Args:", or from COMMON, else they are empty. --json (`as_json`)
    and --quiet are added; a parameter `quiet` is True for either of them. The command prints the result's report, its
    document with --json, or nothing with --quiet. It exits with the result's code if that has problems.
    """
    text, _, described = (getdoc(function) or "").partition("\nArgs:\n")
    texts = COMMON | {
        name: " ".join(words.split()) for name, words in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", described, re.M)
    }
    arguments = signature(function, eval_str=True).parameters
    flags = {n: Parameter(n, Parameter.KEYWORD_ONLY, default=False, annotation=bool) for n in ("as_json", "quiet")}
    parameters = [describe_parameter(p, texts.get(p.name, "")) for p in {**arguments, **flags}.values()]

    def run(as_json: bool, quiet: bool, **options: Any) -> None:
        """Call the function, then print its result as JSON (--json, also with --quiet), as a report, or not at all
        (--quiet). A function with an argument `quiet` gets True for either option.

        Raises typer.Exit with the result's code if it has problems.
        """
        silent = {"quiet": as_json or quiet} if "quiet" in arguments else {}
        result = function(**options, **silent)
        if as_json:
            print_json(result.document)
        elif not quiet:
            result.report()
        if result.has_problems:
            raise typer.Exit(result.code)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    panel, _ = MODULES[function.__module__.rpartition(".")[2]]
    app.command(function.__name__.replace("_", "-"), help=text, rich_help_panel=panel)(run)
    return function


def describe_parameter(parameter: Parameter, text: str) -> Parameter:
    """Return a parameter with the typer annotation of an argument, or if it is keyword-only of an option, and the help
    `text` unless it has one.

    An option's names are those in NAMES, else `--` and the parameter's name with hyphens. An option that is annotated
    keeps its annotation.
    """
    hint: Any = parameter.annotation
    if parameter.kind is not Parameter.KEYWORD_ONLY:
        hint = Annotated[hint, typer.Argument()]
    elif not hasattr(hint, "__metadata__"):
        hint = Annotated[hint, typer.Option(*NAMES.get(parameter.name, (f"--{parameter.name.replace('_', '-')}",)))]
    (info,) = hint.__metadata__
    info.help = info.help or text
    return parameter.replace(annotation=hint)


def print_version(asked: bool) -> None:
    """Print "graft <version>" and raise typer.Exit if the option was given; else do nothing."""
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
    """Do nothing. The callback makes typer keep a verb name even if only one verb is registered, and adds --version."""


def main() -> None:
    """Run the verb in `sys.argv`, and exit the process with its code.

    Only the verb's own module is imported; without a known verb, all are. Characters that the output's encoding lacks
    are printed escaped.

    Expected errors are those of typer and of `CODES`, where the first match counts. Each is printed as one line on
    standard error, with "--force" for "force=True (--force)"; with --json also as a document on standard output. The
    process then exits with the error's code. Without a verb only the help is printed. Other exceptions pass through.
    """
    for verb in [v for v in sys.argv[1:2] if v in VERBS] or VERBS:  # importing all of them takes as long as a call
        import_module(f"graft.command.{VERBS[verb]}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # for names that are no valid text, and ΔW on an ASCII terminal
            stream.reconfigure(errors="backslashreplace")
    for_programs = "--json" in sys.argv
    try:
        left = app(prog_name="graft", standalone_mode=False)  # otherwise typer prints its errors unescaped
    except Exception as e:
        code = getattr(e, "exit_code", None) or next((code for kind, code in CODES if isinstance(e, kind)), None)
        if code is None:
            raise
        text = re.sub(r"\b\w+=True \((--[a-z-]+)\)", r"\1", str(e))  # the option, not Python's argument
        if hasattr(e, "format_message"):  # a usage error of typer
            text = e.format_message()
            if not text:  # no verb was given, and typer printed the help
                sys.exit(code)
            place = getattr(getattr(e, "ctx", None), "command_path", "graft")
            text = f"{text.rstrip('.')}. See {place} --help."
        if for_programs:
            print_json({"error": text, "kind": type(e).__name__, "exit_code": code})
        print(f"graft: {escape_controls(text)}", file=sys.stderr)
        sys.exit(code)
    sys.exit(left if isinstance(left, int) else 0)


def print_json(value: object) -> None:
    """Print a value as one JSON document on standard output, with sorted keys and an indentation of 1.

    NaN and infinity become null.
    """
    print(json.dumps(replace_non_finite(value), indent=1, sort_keys=True, allow_nan=False))


def replace_non_finite(value: object) -> object:
    """Return a copy of a value for JSON: NaN and infinite floats become None, keys become texts, tuples become lists,
    at any depth. Other values stay.
    """
    if isinstance(value, dict):
        return {str(k): replace_non_finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_non_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
