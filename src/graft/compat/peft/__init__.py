# SPDX-License-Identifier: Apache-2.0
"""graft under PEFT's names.

    import graft.compat.peft
    graft.compat.peft.install()

    from peft import LoraConfig, get_peft_model  # graft's
    from peft.tuners.lora import LoraLayer       # isinstance(layer, LoraLayer) holds for graft's LoRA layers

or, without touching a script: `python -m graft.compat.peft train.py --lr 1e-3` (or `-m module`).

Call `install` before the first import of peft, and of what looks for it when it is imported (transformers' Trainer,
accelerate, trl): what has looked already keeps its answer.

The package metadata says 0.22.0, because transformers 5.24 accepts nothing older; what graft speaks is 0.21.2, and so
say the files that it writes. `importlib.util.find_spec` and `importlib.metadata.version` find the alias whether PEFT is
installed or not. `pip show peft` does not, nor do processes that are spawned (not forked) from this one.

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
    return FINDER in sys.meta_path


def install(*, force: bool = False, version: str = VERSION) -> None:
    """Make `import peft` and all below it resolve to graft. Calling it again changes only the version.

    Args:
        force: also if PEFT has been imported; whoever holds its objects keeps them.
        version: what `peft.__version__` and the package metadata say.

    Raises:
        ImportError: PEFT has been imported already.
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
    """Take the alias away again, and put back what `install(force=True)` displaced."""
    if not installed():
        return
    sys.meta_path.remove(FINDER)
    for name in ours(list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(_displaced)
    _displaced.clear()
