# SPDX-License-Identifier: Apache-2.0
"""A plugin of mypy for two types of torch's.

What a module has beyond nn.Module may be of any type. torch declares it as a tensor or a module. Configs, sizes and
functions of models and of other packages' layers are neither, so that code which reads one would have to call the
module itself `Any`.

`apply` of a Function, which torch does not annotate, takes what the class's `forward` takes, without a context, and
returns what that returns.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, CallableType, Type, TypeOfAny, UnionType, get_proper_type

MODULE, FUNCTION = "torch.nn.modules.module.Module.", "torch.autograd.function.Function"


def loose(context: AttributeContext) -> Type:
    """Return Any in place of the union that `nn.Module.__getattr__` gives."""
    found = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.explicit) if isinstance(found, UnionType) else found


def applied(context: AttributeContext) -> Type:
    """Return the type of `apply` by that of `forward`."""
    cls = context.type.type_object() if isinstance(context.type, CallableType) else None
    if cls is None or not cls.has_base(FUNCTION):
        return context.default_attr_type
    forward, contexts = get_proper_type(cls["forward"].type), cls.get_containing_type_info("setup_context")
    if not isinstance(forward, CallableType):
        return context.default_attr_type
    first = int(contexts is None or contexts.fullname.startswith("torch."))  # else `forward` gets no context
    return forward.copy_modified(forward.arg_types[first:], forward.arg_kinds[first:], forward.arg_names[first:])


class Attributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return loose if fullname.startswith(MODULE) else None

    def get_class_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return applied if fullname.endswith(".apply") else None


def plugin(version: str) -> type[Plugin]:
    return Attributes
