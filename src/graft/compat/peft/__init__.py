# SPDX-License-Identifier: Apache-2.0
"""graft under PEFT's names.

    import graft.compat.peft
    graft.compat.peft.install()

    from peft import LoraConfig, get_peft_model  # graft's
    from peft.tuners.lora import LoraLayer       # isinstance(layer, LoraLayer) holds for graft's LoRA layers

or, without touching a script, for it and all processes that it starts:

    python -m graft.compat.peft train.py --lr 1e-3          # or -m module
    python -m graft.compat.peft -m torch.distributed.run --nproc-per-node 2 train.py
    python -m graft.compat.peft -m accelerate.commands.launch train.py
    eval "$(python -m graft.compat.peft --env)"             # for whatever this shell starts

These set GRAFT_AS_PEFT=1 and PYTHONPATH, which children inherit; in code, `install(children=True)` does. With the
variable alone, `import graft` installs the alias. For an environment as a whole, `pip install packaging/as-peft` puts a
distribution `peft` in PEFT's place; nothing installs it by itself.

Call `install` before the first import of peft, and of modules that look for it on import (transformers' Trainer,
accelerate, trl): a module that has looked already keeps its answer.

The package metadata says 0.22.0, because transformers 5.24 accepts nothing older; graft's interface and files are
those of 0.21.2. `importlib.util.find_spec` and `importlib.metadata.version` find the alias whether PEFT is
installed or not.

Names that graft lacks raise an ImportError that says so. Layer classes (LoraLayer, lora.Linear, …) serve isinstance; a
class derived from one can be defined, and making one, patching one, or issubclass on the class of a layer is an error
that says what to do instead. Pickles name graft's modules.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from graft.compat.peft.children import hand_down, keep_to_itself
from graft.compat.peft.modules import FINDER, VERSION, ours, real_peft

__all__ = ["install", "installed", "uninstall"]

_displaced: dict[str, ModuleType] = {}


def installed() -> bool:
    """Say whether `import peft` is graft now."""
    return FINDER in sys.meta_path


def install(*, force: bool = False, version: str = VERSION, children: bool = False) -> None:
    """Make `import peft` and all below it resolve to graft. A second call changes only the version.

    Args:
        force: also if the program has imported PEFT; code that holds its objects keeps them.
        version: for `peft.__version__` and the package metadata.
        children: also in processes that this one starts, until `uninstall` (they say VERSION).

    Raises:
        ImportError: the program has imported PEFT already.
    """
    FINDER.version = version
    if installed():
        if children:
            hand_down()
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
    if children:
        hand_down()


def uninstall() -> None:
    """Take the alias away, and put back the modules that `install(force=True)` displaced."""
    if not installed():
        return
    sys.meta_path.remove(FINDER)
    keep_to_itself()
    for name in ours(list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(_displaced)
    _displaced.clear()


def stand_in() -> None:
    """Put graft in the place of the module `peft` that is being imported, which calls this."""
    sys.modules.pop("peft", None)
    install()
    import_module("peft")
