# SPDX-License-Identifier: Apache-2.0
"""PEFT's name in the processes that this one starts: spawned workers, torchrun, accelerate launch, any Python.

A child inherits environment variables, and looks along PYTHONPATH: a folder in front of it holds a package `peft`, of
two lines, which puts graft in its own place, and the metadata that says a version. Nothing runs when an interpreter
starts, and nothing is installed. A `.pth` file would run in every interpreter of the environment, asked or not.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping

VARIABLE = "GRAFT_AS_PEFT"  # "1": `import graft` calls install(children=True)
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "as_peft")


def variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what a process has to inherit: GRAFT_AS_PEFT, and PYTHONPATH with the folder in front."""
    rest = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p and p != FOLDER]
    return {VARIABLE: "1", "PYTHONPATH": os.pathsep.join([FOLDER, *rest])}


def exports() -> str:
    """Return a line for a shell: `eval "$(python -m graft.compat.peft --env)"`."""
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables().items())


def hand_down() -> None:
    """Have all processes that this one starts from now on find graft under PEFT's name."""
    os.environ.update(variables())
    if FOLDER not in sys.path:  # multiprocessing's spawn gives children the parent's path
        sys.path.insert(1, FOLDER)  # after the script's own folder


def keep_to_itself() -> None:
    """Undo `hand_down`."""
    os.environ.pop(VARIABLE, None)
    rest = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p != FOLDER]
    if any(rest):
        os.environ["PYTHONPATH"] = os.pathsep.join(rest)
    else:
        os.environ.pop("PYTHONPATH", None)
    sys.path[:] = [p for p in sys.path if p != FOLDER]
