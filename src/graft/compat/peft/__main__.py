# SPDX-License-Identifier: Apache-2.0
"""`python -m graft.compat.peft script.py …` runs a script, `-m module …` a module, with graft in PEFT's place.

The processes that it starts have graft there as well. `--env` prints what a shell has to set for that.
"""

import os
import runpy
import sys

from graft.compat.peft import install
from graft.compat.peft.children import exports

USAGE = "usage: python -m graft.compat.peft (script.py | -m module) [arguments …] | --env"


def main(arguments: list[str]) -> None:
    if arguments == ["--env"]:
        print(exports())
        return
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[as_module:]
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    install(children=True)
    sys.argv = arguments
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    if not os.path.exists(arguments[0]):
        sys.exit(f"can't open file '{arguments[0]}': no such file. {USAGE}")
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
