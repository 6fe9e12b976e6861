# SPDX-License-Identifier: Apache-2.0
"""The mathematics of one adapter on one site. A subclass declares its tensors and, once, their effect on the layer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Flag, auto
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from graft.core.base_config import model_type
from graft.core.call import Call
from graft.core.carrier import CarrierState
from graft.core.containers import Slot
from graft.core.effect import Delta, Effect, Factors, Update
from graft.core.errors import CalibrationError, ConfigError
from graft.core.lean import Identity, new_lean
from graft.core.ops import META, OPS, Op
from graft.core.rows import Facts, Finish, Run
from graft.core.site import Site, Store, Weight
from graft.kernels.eager import cast

if TYPE_CHECKING:
    from typing import Self

    C = TypeVar("C", default=Any)  # the config of a method; bare `Method` is one of any config
else:
    C = TypeVar("C")

T = TypeVar("T")
Tuner = Any  # the `Registry` of a model's adapters, which is in a layer above this package

# annotations of values that do not train: facts, which a layer keeps in plain dicts, and buffers
UNTRAINED_TYPES = ("float", "int", "bool", "str", "list", "dict", "Tensor")
EQUIVALENT_HOOKS = (("fold", "pre", "post"), ("factors", "delta", "branch"))  # a row has the same mathematics
INSTANCE_FIELDS = frozenset({"layer", "name", "site", "cfg", "effect", "via_container", "config_path"})

# {(container, path below the adapter's name): tensor}
Tensors = dict[tuple[str, str], Tensor]


def _reader(name: str) -> property:
    """Return a property that reads a declared value from the layer. `__getattr__` finds it as well, but slower."""

    def read(self: Method) -> object:
        """Return the value of this adapter in the layer's container `name`. Raises TypeError if it has none there."""
        attributes = self.layer.__dict__
        try:
            # facts are in plain dicts
            return (attributes[name] if name in attributes else attributes["_modules"][name])[self.name]
        except (KeyError, AttributeError):  # the second: an empty container of Parameters
            raise TypeError(  # no AttributeError: Python would call `__getattr__`
                f"{type(self).__name__} declares '{name}', and has none for adapter '{self.name}' on layer "
                f"'{self.site.key}'. Let build() return it there, or check first whether there is one."
            ) from None

    return property(read)


def _config_of(cls: type) -> type | None:
    """Return the config class of a method class, X of its direct base `Method[X]` or `Subclass[X]`; None if no direct
    base names a class.
    """
    args = (arg for base in vars(cls).get("__orig_bases__", ()) for arg in get_args(base))
    return next((arg for arg in args if isinstance(arg, type)), None)


class WeightUse(Flag):
    """Flags that say how the first values of an adapter depend on the base weight."""

    NONE = 0
    TAKES = auto()  # some come from it, so that it has to be finite
    READS = auto()  # `init_values` reads it, also where other adapters stay on the meta device
    CHANGES = auto()  # `init_values` changes it
    # `init_values` runs before a load, too: its results are in no file, and `finish_load` does not set them
    BEFORE_LOAD = auto()
    STARTS = TAKES | READS  # for most methods with an `init_values` that reads it


class NotedTokens(NamedTuple):
    """Values that a layer noted (`call.note`) about the tokens of an adapter's rows."""

    layer: str
    values: Tensor  # (tokens, …)
    real: Tensor | None  # (tokens,), 0 for padding and 1 for others; None: the call names no padding


@dataclass
class AdaptedLayers(Generic[C]):
    """The layers that get an adapter, as `Method.share` sees them."""

    model: nn.Module
    sites: Sequence[Site]
    cfg: C
    existing: dict[str, Any] = field(default_factory=dict)  # containers of values that adapters share already, by name
    other_configs: Mapping[str, C] = field(default_factory=dict)  # adapter → config, of those that share them

    @property
    def max_fan_in(self) -> int:
        """Return the largest `fan_in` of the sites. Raises ValueError without sites."""
        return max(site.fan_in for site in self.sites)

    @property
    def max_out_features(self) -> int:
        """Return the largest `out_features` of the sites. Raises ValueError without sites."""
        return max(site.out_features for site in self.sites)

    def check_agreement(self, method: type[Method]) -> None:
        """Raise ConfigError if a field of `method.agreeing_fields` differs from that of an adapter that shares tensors
        with this one. The first such field is named.
        """
        for name, config in self.other_configs.items():
            for key in method.agreeing_fields:
                if getattr(config, key) != getattr(self.cfg, key):
                    raise ConfigError(
                        f"{method.__name__} projections are shared: they must be saved for all adapters or none, and "
                        f"drawn alike. {key} is {getattr(self.cfg, key)}, but adapter '{name}' has "
                        f"{getattr(config, key)}."
                    )


class PublishedRate(NamedTuple):
    """The learning rates of a method's authors.

    Attributes:
        low, high: the least and the largest; equal where the source has one.
        source: paper (arXiv id) or code, where in it, and the optimizer unless it is Adam or AdamW.
    """

    low: float
    high: float
    source: str


COMPARISON = "PEFT's method comparison, on MetaMathQA with Llama 3.2 3B"


def fill_kaiming(t: Tensor) -> Tensor:
    """Fill a tensor with uniform numbers of at most 1 / √n, n its number of inputs, as `nn.Linear` fills its weight.

    Return the tensor.
    """
    return nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def make_dropout(share: float) -> nn.Module:
    """Return `nn.Dropout(share)`, or a new identity module (`core/lean.py`) if `share` is 0 or less."""
    return nn.Dropout(share) if share > 0 else new_lean(Identity)


class Method(Generic[C]):
    """One adapter on one site. Its tensors are on the layer: `self.lora_A` reads `layer.lora_A[self.name]`.

    A subclass makes tensors in `build` (and `share`, `init_values`). It overrides the first of these that its formula
    allows:

    - `factors` → `Factors`: ΔW of low rank.
    - `delta` → ΔW.
    - `describe` → any other `Effect`.

    Attributes:
        site: the module that it adapts, with the shape of the weight.
        cfg: the config as its patterns resolve it for this site.
        layer: the AdapterLayer; None before the layer holds the values of `build`.
    """

    config: ClassVar[Any]  # its PeftConfig class: C, unless the subclass sets another
    prefix: ClassVar[str]  # the beginning of its containers' names, in memory and in files
    keeps_base_dtype: ClassVar[frozenset[str]] = frozenset()  # containers in half precision: others train in float32
    only_linear: ClassVar[str] = ""  # why it adapts linear layers only
    unmergeable: ClassVar[str | None] = None  # why a method with a `branch` only has no merged form
    weight_use: ClassVar[WeightUse] = WeightUse.NONE  # the result of `uses_weight`, unless that is overridden
    ungrouped: ClassVar[str] = ""  # why it cannot adapt a convolution with groups > 1
    targets: ClassVar[Mapping[str, list[str] | str]] = {}  # default target_modules by model_type
    fallback_targets: ClassVar[str | None] = None  # default target_modules of other model types
    # functions of (tuner, …) that its model class has as methods
    tuner_methods: ClassVar[Mapping[str, Callable[..., object] | property]] = {}
    always_tied: ClassVar[bool] = False  # modules tied to an adapted embedding always use the embedding's parameters
    # container → its name in files: {0} the container, {1} the path below; "": only in older files, and skipped
    files: ClassVar[dict[str, str]] = {}
    moves: ClassVar[bool] = True  # its tensors go to the device of the base weight, in a dtype to compute in
    compresses_targets: ClassVar[bool] = True  # injection may shorten long lists of targets to suffixes
    surrounds_disabled: ClassVar[bool] = False  # `surround_run` acts with adapters disabled, too
    has_labelled_loss: ClassVar[bool] = False  # `surround_run` adds one of the labels in the call
    arguments: ClassVar[tuple[str, ...]] = ()  # of the model's call, for the method; not passed to the base model
    # the argument of a call that its update follows, and which `effect_at` fixes
    depends_on: ClassVar[str | None] = None
    over_layers: ClassVar[str | None] = None  # its work on all layers, for errors; then one adapter trains at a time
    joins_weights: ClassVar[str | None] = None  # its work on the base weights of all layers, for errors
    published_lr: ClassVar[PublishedRate | None] = None  # None: its source names none
    base_mark: str = ""  # attribute of the base module that a calibration sets, see `leave_on_base`
    agreeing_fields: ClassVar[tuple[str, ...]] = ()  # fields that have to be equal in adapters that share tensors
    facts: ClassVar[tuple[str, ...]] = ("r",)  # fields of the config that a layer has as plain facts, if there are any
    # container → function of an adapter's methods, in the model's order, to keys: layers with equal keys share a tensor
    layer_keys: ClassVar[dict[str, Callable[[Sequence[Any]], Sequence[Hashable]]]] = {}

    lays_out_stacks: ClassVar[bool] = False  # it adapts a stack as a whole; others adapt each matrix (`core/each.py`)

    # derived from the declarations of a subclass
    layer_names: ClassVar[tuple[str, ...]] = ()  # containers of tensors that train
    # these containers, empty, for layers that do not need them
    empty: ClassVar[dict[str, nn.ParameterDict | nn.ModuleDict]] = {}
    dropouts: ClassVar[tuple[str, ...]] = ()  # declared modules named as a field of the config, the share that drops
    shares: ClassVar[bool] = False  # it overrides `share`
    surrounds: ClassVar[bool] = False  # it overrides `surround_run` or `facts_of_run`
    has_loss: ClassVar[bool] = False  # it overrides `compute_auxiliary_loss`
    takes_device: ClassVar[bool] = False  # `build` has that argument
    computes_with: ClassVar[frozenset[str]] = frozenset()  # names that it declares, facts included
    checks_compatibility: ClassVar[bool] = False  # it overrides `why_incompatible`

    config_path: str = ""  # the path that the config's patterns match, if it is not the site's path
    via_container: bool = False  # the config names the module around the site
    source: Method | None = None  # the same adapter on the embedding that shares its weight with the site's module
    layer: Any  # a Layer, with the containers of all adapters
    lenders: Mapping[str, Method] = MappingProxyType({})  # container → the method on another layer that owns its tensor

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Derive class attributes from a subclass's declarations, and make each annotation without a value a property
        that reads the layer. `computes_with` gets its name.

        `dropouts` gets the names that end with "dropout", have the type `nn.Module` and are fields of `config`. An
        annotated container of trained tensors gets an empty `nn.ParameterDict` or `nn.ModuleDict` in `empty`. Its
        name begins with `prefix` and does not end with "dropout". `layer_names` are the keys of `empty`. `config` is
        derived unless the class sets it. `surrounds`, `has_loss`, `checks_compatibility` and `shares` are True if the
        hook of that purpose is overridden; `takes_device` if `build` has a `device`. Raises TypeError as
        `_check_overrides`.
        """
        super().__init_subclass__(**kwargs)
        if "config" not in vars(cls) and (config := _config_of(cls)) is not None:
            cls.config = config
        for name, annotation in inspect.get_annotations(cls).items():
            if name in vars(cls):
                continue
            setattr(cls, name, _reader(name))
            cls.computes_with |= {name}
            kind = str(getattr(annotation, "__name__", annotation))
            if name.endswith("dropout") and kind.endswith("Module") and hasattr(getattr(cls, "config", None), name):
                cls.dropouts = (*cls.dropouts, name)
            is_container = name.startswith(getattr(cls, "prefix", "")) and not name.endswith("dropout")
            if is_container and not kind.startswith(UNTRAINED_TYPES):
                cls.empty = {**cls.empty, name: nn.ParameterDict() if kind.endswith("Parameter") else nn.ModuleDict()}
        cls.layer_names = tuple(cls.empty)
        hooks = ("surround_run", "facts_of_run")
        cls.surrounds = any(getattr(cls, hook).__func__ is not getattr(Method, hook).__func__ for hook in hooks)
        cls.has_loss = cls.compute_auxiliary_loss.__func__ is not Method.compute_auxiliary_loss.__func__  # type: ignore[attr-defined]
        cls.takes_device = "device" in inspect.signature(cls.build).parameters
        cls.checks_compatibility = cls.why_incompatible is not Method.why_incompatible
        cls.shares = cls.share.__func__ is not Method.share.__func__  # type: ignore[attr-defined]
        _check_overrides(cls)

    def __init__(self, site: Site, cfg: C, name: str):
        """Keep the site, the config and the adapter's name. `layer` is None until the adapter is added to one."""
        self.site, self.cfg, self.name, self.layer = site, cfg, name, None

    def __getattr__(self, key: str) -> Any:
        """Return the value of this adapter in the layer's container `key`.

        Raises:
            AttributeError: there is no layer yet, or `key` is a dunder name or an attribute of the instance itself.
        """
        # fail for dunder names and the attributes that `__init__` sets, or copy and pickle recurse without end
        if key.startswith("__") or key in INSTANCE_FIELDS or self.layer is None:
            raise AttributeError(f"{type(self).__name__} has no '{key}'" + ("" if key in INSTANCE_FIELDS else " yet"))
        return getattr(self.layer, key)[self.name]

    # declare

    @classmethod
    def variant(cls, cfg: C) -> type[Method]:
        """Return the class for a config: a subclass if fields of the config change the mathematics, else `cls`
        itself.
        """
        return cls

    @classmethod
    def default_targets(cls, model: nn.Module) -> list[str] | str | None:
        """Return `target_modules` for a config without any, by the model's type; `fallback_targets` if `targets` has no
        entry for it.
        """
        return cls.targets.get(model_type(model), cls.fallback_targets)

    @classmethod
    def prepare(cls, cfg: C, model: nn.Module) -> None:
        """Complete the config for this model in place, or raise.

        Its `target_modules` are set already. By default does nothing.
        """

    @classmethod
    def find_companions(cls, cfg: C, model: nn.Module, paths: Sequence[str]) -> Sequence[str]:
        """Return the paths of further modules that get the adapter, next to `paths`, which the config targets.

        By default none.

        May raise if a companion cannot be adapted.
        """
        return ()

    @classmethod
    def split_budget(cls, methods: Sequence[Self]) -> None:
        """Complete the configs of one adapter's methods in place, where they depend on all sites.

        There are no tensors yet.

        By default does nothing.
        """

    @classmethod
    def restructure(cls, cfg: C, model: nn.Module) -> Callable[[], None] | None:
        """Change the model itself before targets are searched.

        Return a function that undoes it; None (the default) if unchanged.
        """
        return None

    @classmethod
    def share(cls, layers: AdaptedLayers[C]) -> dict[str, nn.Parameter | nn.Module | Tensor | object]:
        """Return the values that all layers of the model share, by name: {} by default.

        Parameters and modules train.
        """
        return {}

    @classmethod
    def facts_of_run(cls, tuner: Tuner, call: Call, run: Run) -> Facts:
        """Return facts about a run that is about to begin, by key, for the layers in it (`call.fact`); {} by default.

        Called before each run with adapters of this class, `run.adapters`. May raise to refuse the run.
        """
        return {}

    @classmethod
    @contextmanager
    def surround_run(cls, tuner: Tuner, call: Call, run: Run) -> Iterator[Finish]:
        """Surround one run of the model with adapters of this class, `run.adapters`; with adapters disabled only if
        `surrounds_disabled` is True.

        Yields a function of the output. Here it is identity, and the layers see `facts_of_run` during the run.
        """
        with call.extend_context(facts=cls.facts_of_run(tuner, call, run)):
            yield return_unchanged

    @classmethod
    def arguments_of(cls, batch: Mapping[str, object], model: nn.Module) -> dict[str, Tensor]:
        """Return the arguments of this method that a batch with labels implies, for callers that run without labels.

        Here {}.
        """
        return {}

    @classmethod
    def compute_auxiliary_loss(cls, cfg: C, noted: Sequence[NotedTokens]) -> Tensor:
        """Return the loss of an adapter, a scalar, from the values that its layers noted for its rows in one run
        (`call.note`).

        Raises NotImplementedError here; a method without such a loss does not override it.
        """
        raise NotImplementedError

    @classmethod
    def check_together(cls, methods: Sequence[Self]) -> None:
        """Raise if these adapters of one layer cannot be active at once. By default does nothing: all are accepted."""

    def why_incompatible(self, other: object) -> str | None:
        """Return why an adapter with the config `other` cannot be on the same layer as this one; None (the default) if
        it can.

        A layer asks both adapters about each other when it gets the second.
        """
        return None

    def check(self) -> str | None:
        """Return why the method cannot adapt this site, or None. There are no tensors yet. The first reason counts:

        - The text `only_linear`, on another known layer type.
        - The text `ungrouped`, on a convolution with groups.
        - An unknown layer type, unless the effect adapts any module.
        - A weight that cannot be read although the effect, the method's `uses_weight` or an opaque op needs it.
        """
        site, effect, name = self.site, self.effect, type(self).__name__
        if self.only_linear and site.op.known and not site.op.linear:
            return self.only_linear
        if self.ungrouped and site.op.known and site.op.count_groups(site.module) > 1:
            return self.ungrouped
        if not (site.op.known or effect.adapts_any_module):
            return f"Currently, only the following modules are supported: {', '.join(OPS.names())}"
        reads = effect.reads or WeightUse.READS in self.uses_weight() or site.op.opaque
        why = site.weight.why_unreadable() if reads else None
        if why is not None:
            return f"{name} needs its weight, and {why}"
        return None

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return all that the adapter adds to its layer, by name: parameters, modules, tensors (buffers), plain facts.

        A parameter that does not require gradients never trains. If the method takes a second argument, `device=None`,
        it gets the meta device there when values come later. Else meta is torch's default device during the call.
        `shared` has the containers of `share`. Raises NotImplementedError here.
        """
        raise NotImplementedError

    def build_declared(self) -> dict[str, object]:
        """Return the values that the class declares, for `build` to add to or override: those of the config's fields in
        `facts`, and a `make_dropout` of the field's share for each of `dropouts`.

        Fields in `facts` that the config lacks are left out.
        """
        cfg = self.cfg
        values: dict[str, object] = {name: getattr(cfg, name) for name in self.facts if hasattr(cfg, name)}
        return values | {name: make_dropout(getattr(cfg, name)) for name in self.dropouts}

    def init_values(self) -> None:
        """Set the initial values of the tensors in place.

        Does nothing here. Skipped before a load, except with `WeightUse.BEFORE_LOAD`.
        """

    def fill_start(self, t: Tensor, std: float | None = None, mean: float = 0.0) -> None:
        """Fill a new tensor in place: with `mean` if the config's `init_weights` is true, so that the adapter starts as
        nothing.

        Else fill it with normal values around `mean` of the deviation `std`, or with uniform ones, as nn.Linear does,
        if `std` is None.
        """
        if self.cfg.init_weights:  # type: ignore[attr-defined]
            nn.init.constant_(t, mean)
        elif std is None:
            fill_kaiming(t)
        else:
            nn.init.normal_(t, mean, std)

    def uses_weight(self) -> WeightUse:
        """Return how the first values depend on the base weight: by default `weight_use`.

        With `WeightUse.READS`, `share` may read the weight as well.
        """
        return self.weight_use

    def finish_load(self) -> None:
        """Adapt values or the base after a checkpoint was loaded into the adapter's tensors.

        By default does nothing.
        """

    def tie_to_embedding(self, source: Method) -> None:
        """Use the tensors of `source`, the same adapter on the embedding that shares its weight with this layer.

        Raises:
            NotImplementedError: the method has no such sharing (the default).
        """
        raise NotImplementedError(
            f"no implementation exists to tie the adapters of {type(self).__name__}: layer '{self.site.key}'."
        )

    def to_file_tensors(self, values: Tensors, cfg: C) -> Tensors:
        """Return the tensors of a file from those in memory; here unchanged.

        cfg: the adapter's config, for all sites.
        """
        return values

    @property
    def is_stored_unchanged(self) -> bool:
        """Return True if the class does not override `to_file_tensors`, so that files hold the tensors of memory."""
        return type(self).to_file_tensors is Method.to_file_tensors

    def from_file_tensors(self, tensors: Tensors, cfg: C) -> Tensors:
        """Return the tensors for memory from those of a file; here unchanged. cfg: the config in the checkpoint."""
        return tensors

    def check_shared(self, tensors: Tensors) -> None:
        """Raise CheckpointError if a file's tensors that layers share do not fit this layer.

        By default does nothing: all are accepted.
        """

    # act

    def factors(self) -> Factors:
        """Return `Factors` with ΔW = scale · B A. Raises NotImplementedError unless overridden."""
        raise NotImplementedError

    def delta(self) -> Delta:
        """Return ΔW, canonical: (out, in, *kernel). Raises NotImplementedError unless overridden."""
        raise NotImplementedError

    def describe(self) -> Effect:
        """Return the effect of the adapter: an `Update` by `factors`, `delta` or `branch`, whichever the most derived
        class defines. One with a `branch` alone cannot merge, for the reason `unmergeable`. Next to a `delta`, a
        `branch` computes the product with ΔW on layers that take vectors.

        An override may depend on the site and the config only, since `effect` keeps the result.
        """
        hook = next(hook for kind in type(self).__mro__ for hook in EQUIVALENT_HOOKS[1] if hook in vars(kind))
        if hook == "branch":
            return Update(branch=self.branch, why_unmergeable=self.unmergeable)
        if hook == "factors":
            return Update(factors=self.factors)
        multiplies = hasattr(type(self), "branch") and self.site.multiplies_vectors
        return Update(self.delta, branch=self.branch if multiplies else None)

    def leave_on_base(self, value: object) -> None:
        """Set the attribute `base_mark` of the base module to a calibration's result, for `take_from_base`."""
        setattr(self.site.module, self.base_mark, value)

    def take_from_base(self, missing: str) -> Any:
        """Remove the attribute `base_mark`, which a calibration set on the base module, and return its value.

        `rollback` of the layer sets it again, if the injection fails.

        Raises:
            CalibrationError: the module has no such attribute, with the message `missing`.
        """
        module, mark = self.site.module, self.base_mark
        if mark not in module.__dict__:
            raise CalibrationError(missing)
        left = module.__dict__.pop(mark)
        self.layer.on_rollback(lambda: setattr(module, mark, left))
        return left

    def effect_at(self, value: object) -> Effect:
        """Return the effect on rows that have this value of the argument `depends_on`.

        Raises:
            ConfigError: the argument cannot have that value.
            NotImplementedError: the class does not override this.
        """
        raise NotImplementedError

    @cached_property
    def effect(self) -> Effect:
        """Return the result of `describe`, which is called once per adapter and layer."""
        return self.describe()

    # facts

    @property
    def matrix_method(self) -> Method:
        """Return the method as it is on one matrix of a stack of experts; here, for all other weights, the method
        itself.
        """
        return self

    @property
    def is_variant(self) -> bool:
        """Return True if this class is a subclass of the class that defines its `variant`, and so chosen by the config.

        False if no class but `Method` defines `variant`.
        """
        owner = next(cls for cls in type(self).__mro__ if "variant" in vars(cls))
        return owner not in (type(self), Method)

    @property
    def dtype(self) -> torch.dtype:
        """Return the adapter's dtype for computing: that of its first tensor on the layer, looked up at each access."""
        first: Tensor = self.layer.first_tensor(self.name)
        return first.dtype

    def cast(self, x: Tensor) -> Tensor:
        """Return x in the adapter's dtype.

        Ids stay as they are, and so does x if the layer's input casting is disabled.
        """
        return x if self.site.op.takes_ids or not self.layer.cast_input_dtype_enabled else cast(x, self.dtype)


def build_placeholders(method: Method, shared: dict[str, object]) -> dict[str, object]:
    """Return the values of `build` on the meta device, for an adapter that gets its values later.

    A method that takes `device` gets it as an argument and may choose otherwise. For others, meta is the default
    device.
    """
    if method.takes_device:
        return method.build(shared, META)  # type: ignore[call-arg]
    with META:
        return method.build(shared)


def return_unchanged(output: T) -> T:
    """Return the argument."""
    return output


def _check_overrides(cls: type[Method]) -> None:
    """Raise TypeError if a class overrides one of two equivalent hooks and inherits an override of another.

    Classes that define `describe`, or that have only the default one, pass: the default chooses the most derived hook.
    """
    if "describe" in vars(cls) or cls.describe is Method.describe:  # that one asks for the most derived hook
        return
    for hooks in EQUIVALENT_HOOKS:
        new = [hook for hook in hooks if hook in vars(cls)]
        inherited = [h for h in hooks if h not in new and getattr(cls, h, None) is not getattr(Method, h, None)]
        if new and inherited:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(new)} and inherits {', '.join(inherited)}, which says the same. "
                "Override both, or `describe`."
            )


class Layer(Protocol):
    """A base layer and the adapters on it. Each attribute and function is described where AdapterLayer defines it."""

    site: Site
    op: Op
    store: Store
    call: Call
    methods: dict[str, Method]  # by adapter
    kinds: list[type]
    containers: list[str]
    scaling: dict[str, float]
    scaling_at_start: dict[str, float]
    attached: set[str]
    training: bool
    cast_input_dtype_enabled: bool
    _modules: dict[str, nn.Module | None]

    @property
    def state(self) -> CarrierState:
        """The active, trainable and merged adapters and the record of merges. A declaration only."""

    @property
    def base_layer(self) -> nn.Module:
        """The module beneath this layer. A declaration only."""

    @property
    def base_module(self) -> nn.Module:
        """The module that this layer replaces. A declaration only."""

    @property
    def base_weight(self) -> Weight:
        """The `Weight` of the innermost base module. A declaration only."""

    @property
    def weight_now(self) -> Tensor:
        """The canonical weight, with merged adapters in it. A declaration only."""

    @property
    def bias_now(self) -> Tensor | None:
        """The bias, with merged adapters in it; None without one. A declaration only."""

    @property
    def W0(self) -> Tensor:
        """The canonical weight without any adapter. A declaration only."""

    @property
    def base_trains(self) -> bool:
        """True if weight or bias of the base layer require gradients. A declaration only."""

    @property
    def may_fuse(self) -> bool:
        """True if a kernel may overwrite the base layer's output and not call the module. A declaration only."""

    def _get_name(self) -> str:
        """The layer's name in repr and errors, such as "lora.Linear". A declaration only."""

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The names of the containers of trained tensors. A declaration only."""

    @property
    def where(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of the base weight, each None if unknown. A declaration only."""

    @property
    def argument_names(self) -> tuple[str, ...]:
        """The names of the arguments of the base module's forward. A declaration only."""

    def get_base_layer(self) -> nn.Module:
        """Return the innermost module without adapters. A declaration only."""

    def find_reader_plan(self) -> Any:
        """Return the plan that acts for modules that read the weight; None for the base alone. A declaration only."""

    def plan_for(self, names: tuple[str, ...], weights: tuple[float, ...] | None = None) -> Any:
        """Return the plan that runs these adapters; None if the layer carries none of them. A declaration only."""

    def refresh_plan(self) -> None:
        """Set the plan that `forward` runs, after a change of active or merged adapters. A declaration only."""

    def slots(self, adapter: str) -> list[Slot]:
        """Return the slots of an adapter's tensors. A declaration only."""

    def tensors(self, adapter: str, transient: bool = False) -> Iterator[tuple[Slot, Tensor]]:
        """Yield (slot, tensor) of an adapter's tensors in checkpoints; of all if `transient`. A declaration only."""

    def write_bias(self, bias: Tensor) -> None:
        """Overwrite the base layer's bias. A declaration only."""
