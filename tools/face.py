# SPDX-License-Identifier: Apache-2.0
"""Write src/graft/__init__.pyi: the types of graft's public names, which the package itself imports when they are used.

`python -m tools.face`; tests/test_face.py holds the file to what this writes.
"""

from __future__ import annotations

from pathlib import Path

import graft
from graft.methods import METHODS, PROMPTS, ROWS, method_of

FILE = Path(__file__).parents[1] / "src" / "graft" / "__init__.pyi"
HEAD = """# SPDX-License-Identifier: Apache-2.0
# written by tools/face.py: the types of the public names, for editors and type checkers

from enum import Enum
"""


def write_face() -> str:
    """Return the text of the stub: an import for each name, and the classes that graft makes while it runs."""
    imports: dict[str, set[str]] = {}
    for name, module in graft._NAMES.items():
        if name != "PeftType":
            imports.setdefault(getattr(getattr(graft, name), "__module__", module), set()).add(name)
    for kind, row in ROWS.items():
        imports.setdefault(method_of(kind).config.__module__, set()).add(row.config)
    for row in PROMPTS.values():
        imports.setdefault(f"graft.{row.method.partition(':')[0]}", set()).add(row.tuner)
    for module, name in {tuple(row.base.split(":")) for row in METHODS.values()}:
        imports.setdefault(f"graft.{module}", set()).add(name)
    lines = [f"from {module} import {name} as {name}" for module in sorted(imports) for name in sorted(imports[module])]
    kinds = [f'    {name} = "{name}"' for name in ROWS]
    models = [f"class {row.tuner}({row.base.partition(':')[2]}): ..." for row in METHODS.values()]
    names = ["__all__ = [", *(f'    "{name}",' for name in graft.__all__), "]"]
    parts = [HEAD], lines, ["", "__version__: str", "", "class PeftType(str, Enum):"], kinds, ["", *models, ""], names
    return "\n".join(line for part in parts for line in part) + "\n"


if __name__ == "__main__":
    FILE.write_text(write_face())
    print(FILE)
