# SPDX-License-Identifier: Apache-2.0
"""PEFT's name in the processes that this one starts: spawned workers, torchrun, accelerate launch, any Python.

A child inherits environment variables, and looks along PYTHONPATH: a folder in front of it holds a package `peft`, of
two lines, which puts graft in its own place, and the metadata that says a version. Nothing runs when an interpreter
starts, and nothing is installed. A `.pth` file would run in every interpreter of the environment, asked or not.
Another version than VERSION has metadata in the user's cache, in front of that folder.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping

from graft import ConfigError
from graft.compat.peft.modules import VERSION, metadata

VARIABLE = "GRAFT_AS_PEFT"  # "1": `import graft` calls install(children=True)
VERSION_VARIABLE = "GRAFT_PEFT_VERSION"  # the version, if `install` gets none
OLDER, NEEDS_NEWER = "0.20.0", (5, 24)  # the most that LLaMA-Factory takes; transformers that takes VERSION at least
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "as_peft")
OF_VERSIONS = ("graft", "as_peft")  # in the user's cache: a folder for each version
RELEASE = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+(\.[a-z0-9]+)*)?")


def choose_version(choice: str | None) -> str:
    """Return the version that `peft` reports: `choice`, else GRAFT_PEFT_VERSION, else `find_default_version()`.

    An empty GRAFT_PEFT_VERSION counts as unset.

    Raises:
        ConfigError: it is no release number such as "0.22.0" or "0.19.0.dev1"; an empty `choice`, too.
    """
    version = choice if choice is not None else os.environ.get(VERSION_VARIABLE) or find_default_version()
    if not (isinstance(version, str) and RELEASE.fullmatch(version)):
        where = VERSION_VARIABLE if choice is None else "the version for peft"
        raise ConfigError(f"{where} is {version!r}, which is no version. Give one like '{VERSION}'.")
    return version


def find_default_version() -> str:
    """Return "0.20.0" if a transformers before 5.24 is installed, else VERSION ("0.22.0"), also without
    transformers.
    """
    from graft.compat.peft.shims import read_release

    return OLDER if () < read_release("transformers") < NEEDS_NEWER else VERSION


def make_child_environment(version: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that make a child process find graft as PEFT.

    GRAFT_AS_PEFT is "1", GRAFT_PEFT_VERSION the version, PYTHONPATH graft's folders before the foreign entries of
    `environment`. For a version other than VERSION this writes metadata to the user's cache; `folders` has the error.
    """
    path = os.pathsep.join([*folders(version), *list_foreign_paths(environment)])
    return {VARIABLE: "1", VERSION_VARIABLE: version, "PYTHONPATH": path}


def folders(version: str) -> list[str]:
    """Return graft's folders for the PYTHONPATH of children: only `as_peft` for VERSION.

    For another version, a folder of the user's cache (XDG_CACHE_HOME or ~/.cache) comes first. It is created, and its
    `peft-<version>.dist-info/METADATA` is written anew.

    Raises:
        OSError: the user's cache cannot be written.
    """
    if version == VERSION:
        return [FOLDER]
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), *OF_VERSIONS, version)
    info = os.path.join(folder, f"peft-{version}.dist-info")
    try:
        os.makedirs(info, exist_ok=True)
        text = os.path.join(info, "METADATA")
        with open(f"{text}.{os.getpid()}", "w") as f:
            f.write(metadata(version))
        os.replace(f.name, text)  # at once: other processes may read it
    except OSError as e:
        raise OSError(f"Version {version} cannot be stored for child processes ({e}). Set XDG_CACHE_HOME.") from e
    return [folder, FOLDER]


def is_ours(folder: str) -> bool:
    """Return True for the folder `as_peft`, and for a path that ends in graft/as_peft/<any version>."""
    return folder == FOLDER or tuple(folder.split(os.sep)[-3:-1]) == OF_VERSIONS


def list_foreign_paths(environment: Mapping[str, str]) -> list[str]:
    """Return the entries of PYTHONPATH that are not graft's; [] if the variable is unset or empty.

    An empty entry is kept: it means the folder where the child starts.
    """
    path = environment.get("PYTHONPATH")
    return [p for p in path.split(os.pathsep) if not is_ours(p)] if path else []  # an empty entry: where it starts


def make_export_line(version: str) -> str:
    """Return a shell's `export` line with the quoted variables of `make_child_environment`, as `--env` prints it.

    Metadata may be written, as there.
    """
    return "export " + " ".join(
        f"{name}={shlex.quote(value)}" for name, value in make_child_environment(version).items()
    )


def set_child_environment(inherited: dict[str, str]) -> None:
    """Make child processes of this one find graft as PEFT, by `os.environ`. An earlier call is undone first.

    graft's folders are inserted into `sys.path` after the first entry.

    Args:
        inherited: the result of `make_child_environment`.
    """
    clear_child_environment()
    os.environ.update(inherited)
    # after the script's own folder: multiprocessing's spawn gives children the parent's path
    sys.path[1:1] = filter(is_ours, inherited["PYTHONPATH"].split(os.pathsep))


def has_child_environment() -> bool:
    """Return True if PYTHONPATH of this process has the folder `as_peft`, so that its children find graft as PEFT."""
    return FOLDER in os.environ.get("PYTHONPATH", "").split(os.pathsep)


def clear_child_environment() -> None:
    """Undo `set_child_environment`: delete both variables, and graft's folders from PYTHONPATH and `sys.path`.

    PYTHONPATH is deleted if no other entry is left.
    """
    for name in (VARIABLE, VERSION_VARIABLE):
        os.environ.pop(name, None)
    path = list_foreign_paths(os.environ)
    os.environ.pop("PYTHONPATH", None)
    if path:
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
    sys.path[:] = [p for p in sys.path if not (isinstance(p, str) and is_ours(p))]  # some put a Path there
