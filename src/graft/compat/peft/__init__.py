# SPDX-License-Identifier: Apache-2.0
"""The compat room: `import peft` gives graft, for programs and libraries that are written for PEFT.

Entry points: `install` before the first import of peft, `uninstall`, `is_installed`; for a script, and all processes
that it starts, `python -m graft.compat.peft script.py`. docs/moving_from_peft.md describes versions and clients.

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

__all__ = ["install", "installed", "uninstall"]

_displaced: dict[str, ModuleType] = {}


def is_installed() -> bool:
    """Return True if `import peft` is graft now."""
    return FINDER in sys.meta_path


def install(*, force: bool = False, version: str | None = None, children: bool = False) -> None:
    """Make `import peft` and all below it resolve to graft. A second call changes only the version, for children too.

    Args:
        force: also if the program holds objects of PEFT, or a module holds that it is not there; they keep them.
        version: for `peft.__version__` and the package metadata; None: GRAFT_PEFT_VERSION, or the usual.
        children: also in processes that this one starts, until `uninstall`.

    Raises:
        ImportError: the program uses PEFT already, or a client outside the table holds that it is not there. The text
            names them, and all is as before.
        ConfigError: the version is none.
    """
    version = choose_version(version)
    inherited = make_child_environment(version) if children or has_child_environment() else None
    before, FINDER.version = FINDER.version, version
    if not is_installed():
        real = real_peft()
        try:
            take_place(real, force)
        except BaseException:
            FINDER.version = before
            raise
    if inherited:
        set_child_environment(inherited)


def take_place(real: dict[str, ModuleType], force: bool) -> None:
    """Have `import peft` find graft, and the clients that have looked for PEFT hold graft's names."""
    for name in real:
        del sys.modules[name]
    sys.meta_path.insert(0, FINDER)
    try:
        settle_clients()
        if not force:
            check_flags()
        if real and not force and (names := list_holders(real)):
            raise ImportError(
                f"peft has been imported already, and part of the program would go on using it: {join_some(names)}. "
                "Call "
                "graft.compat.peft.install() before the first import of peft there, or pass force=True."
            )
    except BaseException:
        sys.meta_path.remove(FINDER)
        give_place(real)
        settle_clients()
        raise
    _displaced.update(real)


def give_place(real: dict[str, ModuleType]) -> None:
    for name in select_peft_modules(list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(real)


def uninstall() -> None:
    """Take the alias away, put back the modules that `install` displaced, and have clients hold what is there."""
    if not is_installed():
        return
    sys.meta_path.remove(FINDER)
    clear_child_environment()
    give_place(_displaced)
    _displaced.clear()
    settle_clients()


def stand_in() -> None:
    """Put graft in the place of the module `peft` that is being imported, which calls this."""
    sys.modules.pop("peft", None)
    if not is_installed():
        FINDER.version = choose_version(None)
        sys.meta_path.insert(0, FINDER)  # whoever looked has found this one, so that nobody has to look again
    import_module("peft")
