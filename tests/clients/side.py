# SPDX-License-Identifier: Apache-2.0
"""One side of a pair: run scenarios of a module with the given library as `peft`, and write what they found.

python -m tests.clients.side (graft | peft) module folder scenario …
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

from tests.clients import tiny


def use(library: str) -> None:
    """Have `import peft` mean the library. PEFT says it is 0.22.0, as graft does: see `graft.compat.peft`."""
    if library == "graft":
        import graft.compat.peft

        graft.compat.peft.install()
    else:
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "0.22.0" if name == "peft" else version(name)
    assert tiny.library() == library


def main(library: str, module: str, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    use(library)
    scenarios = importlib.import_module(module)
    for name in names:
        place = folder / name
        place.mkdir()
        os.chdir(place)
        torch.manual_seed(0)
        try:
            found = getattr(scenarios, name).scenario(place)
            assert found, f"{name} returned nothing to compare"
        except Exception:
            found = traceback.format_exc()
        torch.save(found, folder / "unfinished")
        os.replace(folder / "unfinished", folder / f"{name}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
