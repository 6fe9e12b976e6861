# SPDX-License-Identifier: Apache-2.0
"""PEFT's layer classes, for isinstance: an AdapterLayer belongs to one by its methods and its base layer."""

from __future__ import annotations

from abc import ABC
from functools import cache
from typing import Any

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
KINDS = tuple(dict.fromkeys(SAME.get(kind, kind) for kind in (*PLAIN, *BNB)))


class _LayerType(type):
    """The metaclass of PEFT's layer classes: isinstance asks for a layer's methods and the type of its base layer."""

    method: type[Method]
    kind: str | None  # type of the base layer, or name of its store; None: any

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]):
        if "method" not in namespace:
            raise TypeError(
                f"{bases[0].__name__} only tells graft's layers apart and cannot be derived from ('{name}'): "
                "write a graft.Method for new mathematics, an Op for a new layer type."
            )
        return super().__new__(mcs, name, bases, namespace)

    def __instancecheck__(cls, obj: Any) -> bool:
        if not isinstance(obj, AdapterLayer) or not any(isinstance(m, cls.method) for m in obj.methods.values()):
            return False
        return cls.kind is None or cls.kind in (kind_of(obj), obj.store.name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{cls.__name__} is only for isinstance: graft makes its layers when a config is injected.")

    def __setattr__(cls, name: str, value: Any) -> None:
        if not name.startswith("__"):
            raise AttributeError(
                f"setting {cls.__name__}.{name} would change nothing: graft's layers are AdapterLayer, and their "
                f"mathematics is {cls.method.__name__}."
            )
        super().__setattr__(name, value)


def kind_of(layer: AdapterLayer) -> str:
    """Return PEFT's class name for a layer type: that of the base layer, or of the first above it that has one."""
    names = [SAME.get(c.__name__, c.__name__) for c in type(layer.get_base_layer()).__mro__]
    return next((n for n in names if n in KINDS), names[0])


PREFIXES = {"ADALORA": "SVD"}  # prefixes of PEFT's class names that are not the method's name


def stem(peft_type: str) -> str:
    """Return the beginning of a method's class names: "HRA" for HRAConfig."""
    return METHODS[peft_type].config.removesuffix("Config")


def layer_names(peft_type: str) -> list[str]:
    """Return the names of a method's layer classes, with and without the method's name, which PEFT puts before some."""
    if peft_type not in METHODS:  # prompts act on no layer
        return []
    return [f"{stem(peft_type)}Layer", *kind_names(peft_type, KINDS), *(OF_STORES if peft_type == "LORA" else ())]


def kind_names(peft_type: str, kinds: tuple[str, ...]) -> list[str]:
    return [*kinds, *(f"{PREFIXES.get(peft_type, stem(peft_type))}{kind}" for kind in kinds)]


@cache
def layer_class(peft_type: str, name: str) -> type | None:
    """Return the class of that name, or None: `LoraLayer` is any layer of LoRA, `Linear` one on a linear layer."""
    own = stem(peft_type)
    if name == f"{own}Layer":
        bases: tuple[type, ...] = (AdapterLayer,)
        kind = None
    else:
        of_store = OF_STORES.get(name) if peft_type == "LORA" else None
        kind = of_store or name.removeprefix(PREFIXES.get(peft_type, own))
        if of_store is None and kind not in KINDS:
            return None
        bases = (layer_class(peft_type, f"{own}Layer"),)  # type: ignore[assignment]
    method = method_of(peft_type)
    facts = {"method": method, "kind": kind, "adapter_layer_names": method.layer_names, "__module__": __name__}
    return _LayerType(name, bases, facts)


class AuxiliaryTrainingWrapper(ABC):  # noqa: B024
    """A wrapper of a module that trains beside the adapter layers."""


AuxiliaryTrainingWrapper.register(ModulesToSaveWrapper)
AuxiliaryTrainingWrapper.register(TrainableTokensWrapper)
