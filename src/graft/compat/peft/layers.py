# SPDX-License-Identifier: Apache-2.0
"""PEFT's layer classes, for isinstance: an AdapterLayer belongs to one by its methods and its base layer.

Calling one makes a layer by hand. Other packages derive classes from these when they are imported, and may never use
them. A class may be derived; making an instance of it raises an error with the remedy, and so does setting a method.
Markers may be set, and four methods can be replaced: `forward`, `merge`, `unmerge` and `get_delta_weight`. Only then do
graft's layers look for replacements.
"""

from __future__ import annotations

from abc import ABC, ABCMeta
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NoReturn

from torch import Tensor, nn

from graft import (
    AdapterLayer,
    Method,
    ModulesToSaveWrapper,
    PeftWarning,
    RoutingError,
    method_of,
)
from graft.compat.peft.names import OF_STORES, import_held
from graft.core.errors import warn
from graft.core.layer import ParamWrapper
from graft.methods import METHODS

SAME = {"Conv1D": "Linear"}  # layer types that share a class in PEFT
BNB = ("Linear4bit", "Linear8bitLt")  # layer types of bitsandbytes; PEFT has classes of every method for them
PLAIN = ("Linear", "FalconLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d")  # layer types of torch and transformers
WRAPPER = "ParamWrapper"  # PEFT's class of LoRA on a tensor that its module does not call
PARALLEL = ("ColumnParallelLinear", "RowParallelLinear")  # Megatron's
OF_LORA = {WRAPPER: WRAPPER, "LoraParallelLinear": "LoraParallelLinear", "_LoraParameterProxy": "", "TeLinear": ""}
SPECIAL: dict[str, dict[str, str | None]] = {  # class names that do not follow from a layer type, by method
    "LORA": {**OF_STORES, **OF_LORA},
    "ADAPTION_PROMPT": {"AdaptedAttention": None, "AdaptedAttentionGPT": "GPT2Attention"},
}
ASKED = {"LORA": ("lora_ga_init",)}  # methods that clients look for to see the abilities of PEFT
READ = "get_param"  # of a ParamWrapper; nothing in graft calls it; other clients get a replacement
KINDS = (*PLAIN, *BNB)


DELTA = "get_delta_weight"
REPLACEABLE = ("forward", "merge", "unmerge", DELTA)
INSTEAD = "write a graft.Method for new mathematics, an Op for a new layer type"


class _LayerType(ABCMeta):
    """The metaclass of PEFT's layer classes: isinstance asks for a layer's methods and the type of its base layer."""

    method: type[Method] | None  # None: any
    kind: str | None  # type of the base layer, or name of its store; None: any; "": graft has no such layers
    derived: bool  # by a client

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, object], **options: object) -> _LayerType:
        """Make the class.

        A class without `method` in its namespace, so a client's, is marked `derived` and loses the base nn.Module.
        """
        if "method" in namespace:
            return super().__new__(mcs, name, bases, namespace | {"derived": False}, **options)
        bases = tuple(b for b in bases if b is not nn.Module)  # PEFT's are no modules: clients put nn.Module in front
        return super().__new__(mcs, name, bases, namespace | {"derived": True}, **options)

    def __instancecheck__(cls, obj: object) -> bool:
        """Return True if `obj` is an AdapterLayer with an adapter of the class's method, and `list_class_names(obj)`
        has the class's `kind`.

        A method or kind of None fits any. A class that a client derived has no instances.
        """
        if cls.derived or not isinstance(obj, AdapterLayer):
            return False
        if cls.method is not None and not any(isinstance(m, cls.method) for m in obj.methods.values()):
            return False
        return cls.kind is None or cls.kind in list_class_names(obj)

    def __subclasscheck__(cls, other: type) -> bool:
        """Return True if `other` is derived from this class, or is AdapterLayer or a subclass and this class has
        neither method nor kind, as BaseTunerLayer.

        Raises:
            TypeError: `other` is an AdapterLayer class, and this class has a method or kind: only objects have these.
        """
        if isinstance(other, _LayerType) or not issubclass(other, AdapterLayer):
            return super().__subclasscheck__(other)
        if cls.method is None and cls.kind is None:
            return True
        raise TypeError(
            f"issubclass(…, {cls.__name__}) has no answer: graft's layers are of the class {other.__name__} for every "
            f"method. Call isinstance(layer, {cls.__name__})."
        )

    def __call__(cls, *args: Any, **kwargs: Any) -> AdapterLayer:
        """Return a layer by `build_layer` with these arguments.

        Raises:
            TypeError: the class is derived by a client, or has no method (BaseTunerLayer).
        """
        if cls.derived or cls.method is None:
            raise TypeError(
                f"{cls.__name__} is only for isinstance: graft makes layers when it injects a config. "
                f"Instead, {INSTEAD}."
            )
        return build_layer(cls, *args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        """Raise AttributeError for a name that the class lacks.

        The text has the remedy, except for dunder names and derived classes, which get Python's own text.
        """
        if name.startswith("__") or cls.__dict__.get("derived", True):
            raise AttributeError(f"type object '{cls.__name__}' has no attribute '{name}'")
        raise AttributeError(
            f"{cls.__name__}.{name} is not in graft: its layers are made and run in another way. Instead, {INSTEAD}."
        )

    def __setattr__(cls, name: str, value: object) -> None:
        """Set an attribute of the class, or refuse it.

        - `forward`, `merge`, `unmerge`, `get_delta_weight`: set, and graft's layers of this class call the replacement.
            If graft has no such layers (kind ""), a PeftWarning is given instead.
        - `get_param`, where the class has it: set here and on graft's ParamWrapper.
        - `__init__`: set with a PeftWarning that graft never calls it.
        - other dunder and `_abc` names, any attribute of a client's derived class, and markers: set. Markers begin with
            "_" and are bool, int, str, None, or one of the original methods.

        Raises:
            AttributeError: any other name.
        """
        if cls.derived:
            return super().__setattr__(name, value)
        if name in REPLACEABLE and cls.kind != "":
            set_replacement(cls, name, value)
        elif name in REPLACEABLE:
            warn(f"{cls.__name__}.{name} was replaced: graft has no such layers, and never calls it.", PeftWarning)
        elif name == READ and name in cls.__dict__:
            setattr(ParamWrapper, name, value)
        elif name == "__init__":
            warn(f"{cls.__name__}.__init__ was replaced: graft makes layers without it, as before.", PeftWarning)
        elif not name.startswith(("__", "_abc")):
            is_original = any(value is getattr(cls, method_name, None) for method_name in REPLACEABLE)
            if not (name.startswith("_") and (is_original or isinstance(value, (bool, int, str, type(None))))):
                method_name = "AdapterLayer" if cls.method is None else cls.method.__name__
                raise AttributeError(
                    f"setting {cls.__name__}.{name} would change nothing: graft's layers are AdapterLayer, and their "
                    f"mathematics is {method_name}. Instead, {INSTEAD}."
                )
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        """Delete the attribute. For a replaced method of a class with layers in graft, graft's original acts again."""
        super().__delattr__(name)
        if name in REPLACEABLE and not cls.derived and cls.kind != "":
            set_replacement(cls, name, OWN[name])


@cache
def make_refusing_function(name: str, why: str) -> Callable[..., NoReturn]:
    """Return a function called `name` that raises NotImplementedError, whatever its arguments; for clients that look
    whether PEFT has it.

    The same name and reason give the same function again. why: the rest of the text, after the name.
    """

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        """Raise NotImplementedError with name and reason, whatever the arguments."""
        raise NotImplementedError(f"{name}() {why}")

    refuse.__name__ = name
    return refuse


def set_replacement(cls: type, name: str, value: object) -> None:
    """Register `value` as the newest replacement of method `name` for layers of `cls`; the original removes the entry.

    While any class has a replacement, AdapterLayer and ParamWrapper get a method that looks for it; afterwards their
    own. `get_delta_weight` patches `forward`, too.
    """
    replacements = REPLACED[name]
    replacements[:] = [(c, f) for c, f in replacements if c is not cls]
    if value is not OWN[name]:
        replacements.insert(0, (cls, value))
    for changed in (name, *(("forward",) if name == DELTA else ())):
        asked = REPLACED[changed] or (changed == "forward" and REPLACED[DELTA])
        for kind, original in GRAFTS[changed].items():
            setattr(kind, changed, make_asking_method(changed) if asked else original)


def make_asking_method(name: str) -> Callable[..., object]:
    """Return a method for AdapterLayer that calls the replacement for the layer, if there is one, else graft's
    original.

    Its attribute `find` is `find_replacement` for this name, as `core.merging.find_patched_method` needs it.
    """

    def run(self: AdapterLayer, *args: object, **kwargs: object) -> object:
        """Call the replacement that fits this layer, else graft's original.

        A replaced `forward` gets `adapter_names`, the adapter of each row, when a mixed batch runs.

        Raises:
            RoutingError: a row of that batch uses several adapters at once.
        """
        replacement = run.find(self)  # type: ignore[attr-defined]
        if replacement is None:
            return OWN[name](self, *args, **kwargs)
        if name == "forward" and self.call.open and (names := names_of_rows(self.call)):
            kwargs["adapter_names"] = names
        return replacement(self, *args, **kwargs)

    run.find = partial(find_replacement, name)  # type: ignore[attr-defined]
    return run


def find_replacement(name: str, layer: AdapterLayer) -> Callable[..., object] | None:
    """Return the newest replacement of method `name` on a class that fits the layer; None if there is none.

    None for `forward` while a mixture's gates are active, since PEFT's mixtures do not call it.
    """
    if name == "forward" and layer.call.current_gates() is not None:  # PEFT's mixtures do not call it
        return None
    return next((f for cls, f in REPLACED[name] if cls.__instancecheck__(layer)), None)


def names_of_rows(call: Any) -> list[str] | None:
    """Return the adapter name of each row of the mixed batch that runs, in order of rows; "__base__" for rows without
    one. None if no mixed batch runs, or it has no rows.

    Raises:
        RoutingError: rows use several adapters at once (a Stack or an Average).
    """
    rows = call.current_rows()
    groups = {} if rows is None else rows.groups
    named: dict[int, str] = {}
    for key, group in groups.items():
        if not isinstance(key, str | None):
            raise RoutingError("A replaced layer takes one adapter for each row, not a Stack or an Average.")
        named |= dict.fromkeys(group, "__base__" if key is None else key)
    return [named[row] for row in sorted(named)] or None


OF_WHOLE_MODELS = (  # fields that choose layers of a model; a layer made by hand is in no model
    *("rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "layer_replication", "trainable_token_indices", "ensure_weight_tying"),
)


def build_layer(cls: Any, base_layer: nn.Module, adapter_name: str, *args: object, **kwargs: object) -> AdapterLayer:
    """Return `base_layer` with an adapter, for PEFT's call `Linear(base_layer, "default", config=…)`.

    Injects a copy of the config without the fields that choose layers of a model. Parameters of `base_layer` that
    required gradients still do. `r` and `lora_alpha` have no effect on a config without that field.

    Args:
        args, kwargs: for a ParamWrapper `parameter_name` first; then `config`, `r` and `lora_alpha`, which replace the
            config's unless None. Others have no effect.

    Raises:
        TypeError: `config` is missing or of another method, or layers around such a module belong to another class.
    """
    from graft import inject_adapter_in_model

    names = (*(("parameter_name",) if cls.kind == WRAPPER else ()), "config", "r", "lora_alpha")
    options: dict[str, object] = dict(zip(names, args)) | kwargs
    config: Any = options.get("config")
    if getattr(config, "peft_type", None) != cls.method.config.peft_type:
        raise TypeError(f"{cls.__name__} is made with config=…, a {cls.method.config.__name__}; it is {config!r}.")
    fields = dict.fromkeys(OF_WHOLE_MODELS)
    fields |= {k: options[k] for k in ("r", "lora_alpha") if options.get(k) is not None}
    if cls.kind == WRAPPER:
        fields["target_parameters"] = [f"base.{options['parameter_name']}"]
    else:
        fields["target_modules"] = ["base"]
    trained = [p for p in base_layer.parameters() if p.requires_grad]
    around = nn.Module()
    around.base = base_layer
    inject_adapter_in_model(
        replace(config, **{k: v for k, v in fields.items() if hasattr(config, k)}), around, adapter_name
    )
    for p in trained:
        p.requires_grad_(True)
    if not isinstance(around.base, cls):
        raise TypeError(f"{cls.__name__} is not the class of layers around a {type(base_layer).__name__}.")
    return around.base  # type: ignore[no-any-return]


def list_class_names(layer: AdapterLayer) -> tuple[str, ...]:
    """Return the kinds of PEFT classes that a layer belongs to: that of its base layer, and the name of its store.

    The first is the first of KINDS among the classes of the base layer and their parents, and Conv1D counts as
    "Linear". If none is in KINDS, it is the name of the base layer's class. "LoraParallelLinear" is added for
    Megatron's layers. A layer of a parameter has only "ParamWrapper".
    """
    if layer.op.opaque:
        return (WRAPPER,)
    names = [SAME.get(c.__name__, c.__name__) for c in type(layer.get_base_layer()).__mro__]
    kind = next((n for n in names if n in KINDS), names[0])
    return (kind, layer.store.name, *(("LoraParallelLinear",) if kind in PARALLEL else ()))


PREFIXES = {"ADALORA": "SVD"}  # prefixes of PEFT's class names that are not the method's name


def get_class_prefix(peft_type: str) -> str:
    """Return the beginning of a method's class names: "HRA" for HRAConfig; KeyError for prompt methods."""
    return METHODS[peft_type].config.removesuffix("Config")


def layer_names(peft_type: str) -> list[str]:
    """Return the names of a method's layer classes: "<Method>Layer", each kind with and without the method's prefix,
    special ones.

    [] for prompt methods, which have no layers.
    """
    if peft_type not in METHODS:  # prompts act on no layer
        return []
    return [f"{get_class_prefix(peft_type)}Layer", *kind_names(peft_type, KINDS), *SPECIAL.get(peft_type, ())]


def kind_names(peft_type: str, kinds: tuple[str, ...]) -> list[str]:
    """Return the kinds, and after them each with the method's prefix: "Linear" and "LoraLinear"; "SVDLinear" for
    AdaLoRA.
    """
    return [*kinds, *(f"{PREFIXES.get(peft_type, get_class_prefix(peft_type))}{kind}" for kind in kinds)]


class BaseTunerLayer(AdapterLayer, metaclass=_LayerType):
    """A layer with adapters, or one that had some."""

    method = None
    kind = None

    # the originals, for those who replace them

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        """Run graft's own forward, as clients call it when they replace `forward` and keep this original.

        A layer of a parameter runs by the delta weight if `get_delta_weight` is replaced for it. Without active
        adapters, and with a single one on a stack of several matrices, it runs as usual.

        Raises:
            UnsupportedLayerError: the replaced `get_delta_weight` cannot serve an adapter of the layer.
        """
        if REPLACED[DELTA] and self.op.opaque and find_replacement(DELTA, self) is not None:
            plan = self.find_reader_plan()
            if plan is not None and (len(plan.steps) > 1 or self.num_experts == 1):  # else PEFT's runs by the factors
                kwargs.pop("adapter_names", None)
                return self.run_with_delta_weight(plan, x, *args, **kwargs)
        return self._mixed_batch_forward(x, *args, **kwargs)

    merge, unmerge, get_delta_weight = AdapterLayer.merge, AdapterLayer.unmerge, AdapterLayer.get_delta_weight


OWN = {name: vars(BaseTunerLayer)[name] for name in REPLACEABLE}
GRAFTS = {name: {kind: getattr(kind, name) for kind in (AdapterLayer, ParamWrapper)} for name in REPLACEABLE}
# the last first, in lists: compiles
REPLACED: dict[str, list[tuple[type, Any]]] = {name: [] for name in REPLACEABLE}


@cache
def layer_class(peft_type: str, name: str) -> type | None:
    """Return PEFT's layer class of a method by its name; None if the method has no class of that name.

    Results are cached.

    `LoraLayer` is the class of all layers of LoRA, and `Linear` and `LoraLinear` of those on a linear layer. The class
    has PEFT's `adapter_layer_names`, the four replaceable methods, and for LoRA's base class `lora_ga_init`.
    """
    prefix = get_class_prefix(peft_type)
    if name == f"{prefix}Layer":
        bases: tuple[type, ...] = (BaseTunerLayer,)
        kind = None
    else:
        special = SPECIAL.get(peft_type, {})
        kind = special.get(name, name.removeprefix(PREFIXES.get(peft_type, prefix)))
        if name not in special and kind not in KINDS:
            return None
        bases = (layer_class(peft_type, f"{prefix}Layer"),)  # type: ignore[assignment]
    method = method_of(peft_type)
    facts: dict[str, object] = {"method": method, "kind": kind, "adapter_layer_names": method.layer_names}
    facts |= OWN | {"__module__": __name__}  # clients look for the originals in a class's own namespace
    if kind is None:
        why = f"is not in graft: injection follows the config. Instead, {INSTEAD}."
        facts |= {asked: make_refusing_function(asked, why) for asked in ASKED.get(peft_type, ())}
    if kind == WRAPPER:
        facts[READ] = getattr(ParamWrapper, READ)
    return _LayerType(name, bases, facts)


class AuxiliaryTrainingWrapper(ABC):  # noqa: B024
    """PEFT's base class of module copies that train next to adapter layers; graft's two wrappers are registered with
    it.
    """


AuxiliaryTrainingWrapper.register(ModulesToSaveWrapper)
AuxiliaryTrainingWrapper.register(import_held("TrainableTokensWrapper"))
