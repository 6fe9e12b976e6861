# SPDX-License-Identifier: Apache-2.0
"""`python -m graft.compat.peft script.py …` runs a script, `-m module …` a module, with graft in PEFT's place.

Child processes find graft as PEFT, too. `--env` prints the line that sets these variables in a shell.
"""

import os
import runpy
import sys

from graft import ConfigError
from graft.compat.peft import install
from graft.compat.peft.children import choose_version, make_export_line

USAGE = "usage: python -m graft.compat.peft [--peft-version X.Y.Z] ((script.py | -m module) [arguments …] | --env)"


def main(arguments: list[str]) -> None:
    """Run the command line: a script, a module after `-m`, or `--env`, which prints an export line for a shell.

    Before a script or module runs, `install(children=True)` puts graft in PEFT's place, and `sys.argv` becomes its
    arguments. For a script, `sys.path[0]` becomes its folder, unless Python runs with `-P` (safe path).

    Raises:
        SystemExit: with a message, the version is no version number or the script does not exist; with code 2 and the
            usage on stderr, there is no script, or another option.
    """
    choice, arguments = version_in(arguments)
    try:
        version = choose_version(choice)
    except ConfigError as e:
        sys.exit(f"{e} {USAGE}")
    if arguments == ["--env"]:
        print(make_export_line(version))
        return
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[as_module:]
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    install(version=version, children=True)
    sys.argv = arguments
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    if not os.path.exists(arguments[0]):
        sys.exit(f"can't open file '{arguments[0]}': no such file. {USAGE}")
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


def version_in(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the version of a leading `--peft-version X` or `--peft-version=X`, and the arguments after it.

    Without such an option, or with no X after it: None and all arguments. An option that is not first is not looked
    for.
    """
    if arguments[:1] == ["--peft-version"] and len(arguments) > 1:
        return arguments[1], arguments[2:]
    if arguments and arguments[0].startswith("--peft-version="):
        return arguments[0].partition("=")[2], arguments[1:]
    return None, arguments


if __name__ == "__main__":
    main(sys.argv[1:])
