# SPDX-License-Identifier: Apache-2.0
"""What the factors of adapters are made of, noted once, so that a look at many adapters takes little time."""

from __future__ import annotations

from collections.abc import Sized
from operator import is_

from torch import nn

from graft.core.effect import Factors
from graft.core.fused import LINEARS
from graft.core.lean import share_dropped
from graft.core.method import Method
from graft.kernels.eager import has_no_hooks


class Unchanged:
    """Entries of dictionaries, and how many some have: modules, their tensors and numbers, and that nobody hooks in."""

    def __init__(self) -> None:
        self._dicts: list[dict[str, object]] = []
        self._keys: list[str] = []
        self._values: list[object] = []
        self._sized: list[Sized] = []
        self._sizes: list[int] = []

    def still(self) -> bool:
        """Return True if all is as it was noted."""
        return list(map(len, self._sized)) == self._sizes and all(
            map(is_, map(dict.get, self._dicts, self._keys), self._values)
        )

    def note(self, method: Method, f: Factors) -> bool:
        """Note what the factors of a method consist of: two linear modules, a number, a dropout that does nothing.
        Return False, having noted nothing, if they are something else, or computed."""
        parts = [part for part in (f.A, f.B, f.scale, f.dropout) if part is not None]
        places = [place for part in parts for place in places_of(method, part)]
        if {id(d[key]) for d, key in places} != {id(part) for part in parts}:
            return False
        if f.dropout is not None and share_dropped(f.dropout) != 0:
            return False
        modules = [m for m in (f.A, f.B) if isinstance(m, nn.Linear) and type(m) in LINEARS]
        if len(modules) < 2 or not has_no_hooks(*modules):
            return False
        for d, key in places:
            self._entry(d, key)
        for m in modules if f.dropout is None else (*modules, f.dropout):
            self._module(m)
        return True

    def _entry(self, d: dict[str, object], key: str) -> None:
        self._dicts.append(d)
        self._keys.append(key)
        self._values.append(d.get(key))

    def _module(self, m: nn.Module) -> None:
        attributes = m.__dict__
        for key in ("training", "p"):
            if key in attributes:
                self._entry(attributes, key)
        for key in attributes["_parameters"]:
            self._entry(attributes["_parameters"], key)
        for d in (attributes, *(v for k, v in attributes.items() if k.endswith("_hooks") and v is not None)):
            self._sized.append(d)
            self._sizes.append(len(d))


def places_of(method: Method, part: object) -> list[tuple[dict[str, object], str]]:
    """Return where the layer holds a part of a method's: (dictionary, key), the container itself among them."""
    own = method.layer.__dict__
    found = []
    for name in method.computes_with:
        above = own if name in own else own["_modules"]
        container = above.get(name)
        d = container if isinstance(container, dict) else getattr(container, "_modules", {})
        if d.get(method.name) is part:
            found.append((d, method.name))
    return found
