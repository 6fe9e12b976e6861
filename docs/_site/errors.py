# SPDX-License-Identifier: Apache-2.0
"""Links from the errors in a docstring to the page of errors; the module need not import them."""

from __future__ import annotations

from typing import Any

import griffe


class Errors(griffe.Extension):
    """Let graft's errors be known by name in the whole package, where names of docstrings are looked up last."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for name, cls in pkg["core.errors"].classes.items():
            if name not in pkg.members:
                pkg.set_member(name, griffe.Alias(name, cls.path))
