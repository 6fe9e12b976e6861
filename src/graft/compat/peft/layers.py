# SPDX-License-Identifier: Apache-2.0
"""PEFT's layer classes, for isinstance: an AdapterLayer belongs to one by its methods and its base layer.

Other packages derive classes from these when they are imported, whether or not they use them later. A derived class
can be defined; to make an instance of it is an error that says what to do instead, and so is setting an attribute.
"""

from __future__ import annotations

from abc import ABC, ABCMeta
from functools import cache
from typing import Any

from torch import nn

from graft.compat.peft.names import OF_STORES
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.ops import OPS
from graft.inject.saved import ModulesToSaveWrapper
from graft.inject.tokens import TrainableTokensWrapper
from graft.methods import METHODS, method_of
from graft.storage import STORES

SAME = {"Conv1D": "Linear"}  # layer types that share a class in PEFT
BNB = ("Linear4bit", "Linear8bitLt")  # layer types of bitsandbytes, for which PEFT has classes of every method
PLAIN = [name.rpartition(".")[2] for name in OPS.names() if name not in STORES.names()]
WRAPPER = "ParamWrapper"  # PEFT's class of LoRA on a tensor that its module does not call
PARALLEL = ("ColumnParallelLinear", "RowParallelLinear")  # Megatron's
OF_LORA = {WRAPPER: WRAPPER, "LoraParallelLinear": "LoraParallelLinear", "_LoraParameterProxy": ""}
KINDS = tuple(dict.fromkeys(SAME.get(kind, kind) for kind in (*PLAIN, *BNB)))


INSTEAD = "write a graft.Method for new mathematics, an Op for a new layer type"


class _LayerType(ABCMeta):
    """The metaclass of PEFT's layer classes: isinstance asks for a layer's methods and the type of its base layer."""

    method: type[Method] | None  # None: any
    kind: str | None  # type of the base layer, or name of its store; None: any; "": graft has no such layers
    derived: bool  # by a client

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any):
        if "method" in namespace:
            return super().__new__(mcs, name, bases, namespace | {"derived": False}, **options)
        bases = tuple(b for b in bases if b is not nn.Module)  # PEFT's are no modules, so that clients add it in front
        return super().__new__(mcs, name, bases, namespace | {"derived": True}, **options)

    def __instancecheck__(cls, obj: Any) -> bool:
        if cls.derived or not isinstance(obj, AdapterLayer):
            return False
        if cls.method is not None and not any(isinstance(m, cls.method) for m in obj.methods.values()):
            return False
        return cls.kind is None or cls.kind in kinds_of(obj)

    def __subclasscheck__(cls, other: type) -> bool:
        if isinstance(other, _LayerType) or not issubclass(other, AdapterLayer):
            return super().__subclasscheck__(other)
        if cls.method is None and cls.kind is None:
            return True
        raise TypeError(
            f"issubclass(…, {cls.__name__}) has no answer: graft's layers are of the class {other.__name__}, whatever "
            f"their method. Ask isinstance(layer, {cls.__name__})."
        )

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{cls.__name__} is only for isinstance: graft makes its layers when a config is injected, and not from "
            f"PEFT's layer classes; {INSTEAD}."
        )

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or cls.__dict__.get("derived", True):
            raise AttributeError(f"type object '{cls.__name__}' has no attribute '{name}'")
        raise AttributeError(
            f"{cls.__name__}.{name} is not in graft, whose layers are made and run in other ways: {INSTEAD}."
        )

    def __setattr__(cls, name: str, value: Any) -> None:
        if not (name.startswith(("__", "_abc")) or cls.derived):
            own = "AdapterLayer" if cls.method is None else cls.method.__name__
            raise AttributeError(
                f"setting {cls.__name__}.{name} would change nothing: graft's layers are AdapterLayer, and their "
                f"mathematics is {own}; {INSTEAD}."
            )
        super().__setattr__(name, value)


def kind_of(layer: AdapterLayer) -> str:
    """Return PEFT's class name for a layer type: that of the base layer, or of the first above it that has one."""
    names = [SAME.get(c.__name__, c.__name__) for c in type(layer.get_base_layer()).__mro__]
    return next((n for n in names if n in KINDS), names[0])


def kinds_of(layer: AdapterLayer) -> tuple[str, ...]:
    """Return what PEFT's class of a layer may be called: by its base layer's type and store, or as one of a tensor."""
    if layer.op.opaque:
        return (WRAPPER,)
    kind = kind_of(layer)
    return (kind, layer.store.name, *(("LoraParallelLinear",) if kind in PARALLEL else ()))


PREFIXES = {"ADALORA": "SVD"}  # prefixes of PEFT's class names that are not the method's name


def stem(peft_type: str) -> str:
    """Return the beginning of a method's class names: "HRA" for HRAConfig."""
    return METHODS[peft_type].config.removesuffix("Config")


def layer_names(peft_type: str) -> list[str]:
    """Return the names of a method's layer classes, with and without the method's name, which PEFT puts before some."""
    if peft_type not in METHODS:  # prompts act on no layer
        return []
    return [
        f"{stem(peft_type)}Layer",
        *kind_names(peft_type, KINDS),
        *({**OF_STORES, **OF_LORA} if peft_type == "LORA" else ()),
    ]


def kind_names(peft_type: str, kinds: tuple[str, ...]) -> list[str]:
    return [*kinds, *(f"{PREFIXES.get(peft_type, stem(peft_type))}{kind}" for kind in kinds)]


class BaseTunerLayer(AdapterLayer, metaclass=_LayerType):
    """Any layer with adapters, or one that had some."""

    method = None
    kind = None


@cache
def layer_class(peft_type: str, name: str) -> type | None:
    """Return the class of that name, or None: `LoraLayer` is any layer of LoRA, `Linear` one on a linear layer."""
    own = stem(peft_type)
    if name == f"{own}Layer":
        bases: tuple[type, ...] = (BaseTunerLayer,)
        kind = None
    else:
        special = {**OF_STORES, **OF_LORA}.get(name) if peft_type == "LORA" else None
        kind = name.removeprefix(PREFIXES.get(peft_type, own)) if special is None else special
        if special is None and kind not in KINDS:
            return None
        bases = (layer_class(peft_type, f"{own}Layer"),)  # type: ignore[assignment]
    method = method_of(peft_type)
    facts = {"method": method, "kind": kind, "adapter_layer_names": method.layer_names, "__module__": __name__}
    return _LayerType(name, bases, facts)


class AuxiliaryTrainingWrapper(ABC):  # noqa: B024
    """A wrapper of a module that trains beside the adapter layers."""


AuxiliaryTrainingWrapper.register(ModulesToSaveWrapper)
AuxiliaryTrainingWrapper.register(TrainableTokensWrapper)
