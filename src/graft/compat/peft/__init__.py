# SPDX-License-Identifier: Apache-2.0
"""The compat room: `import peft` gives graft, for programs and libraries that are written for PEFT.

Entry points: `install` before the first import of peft, `uninstall`, `is_installed`; for a script, and all processes
that it starts, `python -m graft.compat.peft script.py`. docs/trainers.md describes versions and clients.

- `names.py`: the names in each module of PEFT, as data.
- `modules.py`: the finder that makes modules called peft, and hands out graft's objects.
- `layers.py`: PEFT's layer classes, for isinstance.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from graft.compat.peft.children import (
    choose_version,
    clear_child_environment,
    has_child_environment,
    make_child_environment,
    set_child_environment,
)
from graft.compat.peft.late import check_flags, list_holders, settle_clients
from graft.compat.peft.modules import FINDER, real_peft, select_peft_modules
from graft.core.errors import join_some

__all__ = ["install", "is_installed", "uninstall"]

_displaced: dict[str, ModuleType] = {}


def is_installed() -> bool:
    """Return True if `sys.meta_path` has graft's finder, so that `import peft` finds graft."""
    return FINDER in sys.meta_path


def install(*, force: bool = False, version: str | None = None, children: bool = False) -> None:
    """Make `import peft` and every import below it find graft.

    A second call changes only the version, for children too.

    An imported PEFT is taken out of `sys.modules` until `uninstall`. Loaded clients (transformers, accelerate, TRL,
    diffusers) get graft's names and flags.

    Args:
        force: skip the check for objects, modules and constants of the program that use PEFT or say that it is absent.
        version: for `peft.__version__` and the package metadata; None: GRAFT_PEFT_VERSION, else the default for the
            installed transformers.
        children: set environment variables so that child processes find graft too, until `uninstall`.

    Raises:
        ImportError: the program uses PEFT already, or a module outside the client table holds a constant that says PEFT
            is absent. Modules and clients are as before then. `force=True` skips this.
        ConfigError: `version` is no version number.
        OSError: with `children`, the user's cache cannot be written.
    """
    version = choose_version(version)
    inherited = make_child_environment(version) if children or has_child_environment() else None
    FINDER.version = version
    if not is_installed():
        take_place(real_peft(), force)
    if inherited:
        set_child_environment(inherited)


def take_place(real: dict[str, ModuleType], force: bool) -> None:
    """Make `import peft` find graft, and set graft's names and flags in the clients that are loaded.

    Deletes the modules `real` of PEFT from `sys.modules`, puts the finder first in `sys.meta_path`, and keeps `real`
    for `uninstall`. On any error all three and the clients are put back, and the error is raised again.

    Raises:
        ImportError: without `force`, a module's constant says that PEFT is absent, or a module or live object still
            uses `real`.
    """
    for name in real:
        del sys.modules[name]
    sys.meta_path.insert(0, FINDER)
    try:
        settle_clients()
        if not force:
            check_flags()
        if real and not force and (names := list_holders(real)):
            raise ImportError(
                f"peft has been imported already, and parts of the program still use it: {join_some(names)}. Call "
                "graft.compat.peft.install() before the first import of peft there, or pass force=True."
            )
    except BaseException:
        sys.meta_path.remove(FINDER)
        give_place(real)
        settle_clients()
        raise
    _displaced.update(real)


def give_place(real: dict[str, ModuleType]) -> None:
    """Delete graft's `peft` modules from `sys.modules`, and put the modules `real` of PEFT back there."""
    for name in select_peft_modules(list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(real)


def uninstall() -> None:
    """Undo `install`; without it, do nothing.

    Removes the finder and the environment variables for children. Puts PEFT's displaced modules back into
    `sys.modules`, and sets the clients' names and flags by the PEFT found then, if any.
    """
    if not is_installed():
        return
    sys.meta_path.remove(FINDER)
    clear_child_environment()
    give_place(_displaced)
    _displaced.clear()
    settle_clients()


def stand_in() -> None:
    """Put graft's module `peft` into `sys.modules`, in place of the one that is being imported.

    The package `peft` of the folder `as_peft` calls this, after it took itself out of `sys.modules`.

    Puts the finder first in `sys.meta_path` with the default version, unless it is there, and imports `peft`. The
    clients' names and flags are not set.
    """
    if not is_installed():
        FINDER.version = choose_version(None)
        sys.meta_path.insert(0, FINDER)  # no client looked for PEFT in vain: none is settled
    import_module("peft")
