# SPDX-License-Identifier: Apache-2.0
"""graft under PEFT's names.

    import graft.compat.peft
    graft.compat.peft.install()

    from peft import LoraConfig, get_peft_model  # graft's
    from peft.tuners.lora import LoraLayer       # isinstance(layer, LoraLayer) holds for graft's LoRA layers

or, without touching a script: `python -m graft.compat.peft train.py --lr 1e-3` (or `-m module`).

Call `install` before the first import of peft, and of modules that look for it on import (transformers' Trainer,
accelerate, trl): a module that has looked already keeps its answer.

The package metadata says 0.22.0, because transformers 5.24 accepts nothing older; graft's interface and files are
those of 0.21.2. `importlib.util.find_spec` and `importlib.metadata.version` find the alias whether PEFT is
installed or not. `pip show peft` does not, nor do processes that this one spawns (not forks).

Names that graft lacks raise an ImportError that says so. Layer classes (LoraLayer, lora.Linear, …) serve isinstance;
issubclass on the class of a layer, deriving from them and patching them have no meaning. Pickles name graft's modules.
"""

from __future__ import annotations

import sys
from types import ModuleType

from graft.compat.peft.modules import FINDER, VERSION, ours, real_peft

__all__ = ["install", "installed", "uninstall"]

_displaced: dict[str, ModuleType] = {}


def installed() -> bool:
    """Say whether `import peft` is graft now."""
    return FINDER in sys.meta_path


def install(*, force: bool = False, version: str = VERSION) -> None:
    """Make `import peft` and all below it resolve to graft. A second call changes only the version.

    Args:
        force: also if the program has imported PEFT; code that holds its objects keeps them.
        version: for `peft.__version__` and the package metadata.

    Raises:
        ImportError: the program has imported PEFT already.
    """
    FINDER.version = version
    if installed():
        return
    real = real_peft()
    if real and not force:
        raise ImportError(
            "peft has been imported already, so part of the program would go on using it. Call "
            "graft.compat.peft.install() before the first import of peft and of what imports it, or pass force=True."
        )
    for name in real:
        del sys.modules[name]
    _displaced.update(real)
    sys.meta_path.insert(0, FINDER)


def uninstall() -> None:
    """Take the alias away, and put back the modules that `install(force=True)` displaced."""
    if not installed():
        return
    sys.meta_path.remove(FINDER)
    for name in ours(list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(_displaced)
    _displaced.clear()
