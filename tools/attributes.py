# SPDX-License-Identifier: Apache-2.0
"""A plugin of mypy: what a module has beyond nn.Module may be of any type.

torch declares it as a tensor or a module. Configs, sizes and functions of models and of other packages' layers are
neither, so that code which reads one would have to call the module itself `Any`.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

MODULE = "torch.nn.modules.module.Module."


def loose(context: AttributeContext) -> Type:
    """Return Any in place of the union that `nn.Module.__getattr__` gives."""
    found = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.explicit) if isinstance(found, UnionType) else found


class Attributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return loose if fullname.startswith(MODULE) else None


def plugin(version: str) -> type[Plugin]:
    return Attributes
