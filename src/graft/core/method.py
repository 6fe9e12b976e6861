# SPDX-License-Identifier: Apache-2.0
"""The mathematics of one adapter on one site. A subclass declares its tensors and, once, their effect on the layer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Flag, auto
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from graft.core.base_config import model_type
from graft.core.call import Call
from graft.core.carrier import Carrier
from graft.core.effect import Delta, Effect, Factors, Update
from graft.core.errors import CalibrationError, ConfigError
from graft.core.ops import META, OPS
from graft.core.rows import Finish, Run
from graft.core.shared import SharedTensors
from graft.core.site import Site
from graft.kernels.eager import cast

if TYPE_CHECKING:
    from typing import Self

    from graft.core.call import Call
    from graft.core.rows import Finish, Run

    C = TypeVar("C", default=Any)  # the config of a method; bare `Method` is one of any config
else:
    C = TypeVar("C")

T = TypeVar("T")

# annotations of what does not train: facts, which a layer keeps in plain dicts, and buffers
UNTRAINED_TYPES = ("float", "int", "bool", "str", "list", "dict", "Tensor")
EQUIVALENT_HOOKS = (("fold", "pre", "post"), ("factors", "delta", "branch"))  # groups of hooks that say the same
INSTANCE_FIELDS = frozenset({"layer", "name", "site", "cfg", "effect", "via_container", "config_path"})

# {(container, path below the adapter's name): tensor}
Tensors = dict[tuple[str, str], Tensor]


def _reader(name: str) -> property:
    """Return a property that reads a declared value from the layer. `__getattr__` would find it, too, but slower."""

    def read(self: Method) -> object:
        attributes = self.layer.__dict__
        try:
            return (attributes[name] if name in attributes else attributes["_modules"][name])[
                self.name
            ]  # facts stand in plain dicts
        except (KeyError, AttributeError):  # the second: an empty container of Parameters
            raise _not_built(self, name) from None

    return property(read)


def _config_of(cls: type) -> type | None:
    """Return X of a class that derives from `Method[X]`, or a subclass's `[X]`; None if there is none."""
    args = (arg for base in vars(cls).get("__orig_bases__", ()) for arg in get_args(base))
    return next((arg for arg in args if isinstance(arg, type)), None)


def _not_built(method: Method, name: str) -> TypeError:  # after an AttributeError Python would ask `__getattr__`
    return TypeError(
        f"{type(method).__name__} declares '{name}', and has none for adapter '{method.name}' on layer "
        f"'{method.site.key}': let build() return it there, or ask first whether there is one."
    )


class Use(Flag):
    """What the first values of an adapter have to do with the base weight."""

    NOT = 0
    TAKES = auto()  # some come from it, which then has to be finite
    READS = auto()  # `init_values` reads it, also where other adapters are left on the meta device
    CHANGES = auto()  # `init_values` changes it
    AGAIN = (
        auto()
    )  # `init_values` runs before a load, too: files lack what it finds, and `finish_load` does not make up for it
    STARTS = TAKES | READS  # what most methods do whose `init_values` looks at it


class NotedTokens(NamedTuple):
    """What a layer noted of the tokens of an adapter's rows."""

    layer: str
    values: Tensor  # (tokens, …)
    real: Tensor | None  # (tokens,), 0 for padding and 1 for others; None: there is none, as far as the call tells


@dataclass
class AdaptedLayers(Generic[C]):
    """The layers that an adapter is put on, as `Method.share` sees them."""

    model: nn.Module
    sites: Sequence[Site]
    cfg: C
    existing: dict[str, Any] = field(default_factory=dict)  # containers of what adapters share already, by name
    other_configs: Mapping[str, C] = field(default_factory=dict)  # configs of these adapters, by name

    @property
    def max_fan_in(self) -> int:
        return max(site.fan_in for site in self.sites)

    @property
    def max_out_features(self) -> int:
        return max(site.out_features for site in self.sites)

    def check_agreement(self, method: type[Method]) -> None:
        """Raise ConfigError if the adapter differs from one that shares its tensors in a field of `agreeing_fields`."""
        for name, config in self.other_configs.items():
            for key in method.agreeing_fields:
                if getattr(config, key) != getattr(self.cfg, key):
                    raise ConfigError(
                        f"{method.__name__} projections are shared: they must be saved for all adapters or none, and "
                        f"drawn alike. {key} is {getattr(self.cfg, key)}, but adapter '{name}' has "
                        f"{getattr(config, key)}."
                    )


class PublishedRate(NamedTuple):
    """The learning rates with which a method's authors trained it.

    Attributes:
        low, high: the least and the largest; equal where the source has one.
        source: paper (arXiv id) or code, where in it, and the optimizer unless it is Adam or AdamW.
    """

    low: float
    high: float
    source: str


COMPARISON = "PEFT's method comparison, on MetaMathQA with Llama 3.2 3B"


def make_dropout(share: float) -> nn.Module:
    """Return a module that drops this share of its input in training; one that does nothing for 0."""
    return nn.Dropout(share) if share > 0 else nn.Identity()


class Method(Generic[C]):
    """One adapter on one site. Its tensors stand on the layer: `self.lora_A` reads `layer.lora_A[self.name]`.

    A subclass makes tensors in `build` (and `share`, `init`). It gives the first of these that its formula allows:

    - `factors` → `Factors`: ΔW of low rank.
    - `delta` → ΔW.
    - `describe` → any other `Effect`.

    Attributes:
        site: the module that it adapts, with the shape of the weight.
        cfg: the config as its patterns resolve it for this site.
        layer: the AdapterLayer; None before `build`.
    """

    config: ClassVar[Any]  # its PeftConfig class: C, unless it says another
    prefix: ClassVar[str]  # the beginning of its containers' names, in memory and in files
    keeps_base_dtype: ClassVar[frozenset[str]] = frozenset()  # containers in half precision: others train in float32
    only_linear: ClassVar[str] = ""  # why it adapts linear layers only
    ungrouped: ClassVar[str] = ""  # why it cannot adapt a convolution with groups > 1
    targets: ClassVar[Mapping[str, list[str] | str]] = {}  # default target_modules by model_type
    # functions of (tuner, …) that its model class gets as methods
    tuner_methods: ClassVar[Mapping[str, Callable[..., object] | property]] = {}
    always_tied: ClassVar[bool] = False  # modules tied to an adapted embedding always use the embedding's parameters
    # containers → their names in files: {0} the container, {1} what is below; "": older files have it, nobody needs it
    files: ClassVar[dict[str, str]] = {}
    moves: ClassVar[bool] = True  # its tensors go to the device of the base weight, in a dtype to compute in
    compresses_targets: ClassVar[bool] = True  # injection may shorten long lists of targets to suffixes
    has_labelled_loss: ClassVar[bool] = False  # `surround_run` adds one of the labels in the call
    arguments: ClassVar[tuple[str, ...]] = ()  # of the model's call that it takes; the base model only gets its own
    depends_on: ClassVar[str | None] = (
        None  # the argument of a call that its update follows, and which `effect_at` fixes
    )
    over_layers: ClassVar[str | None] = None  # what it does with all layers at once: then one adapter trains at a time
    published_lr: ClassVar[PublishedRate | None] = None  # of its source; None: not known
    agreeing_fields: ClassVar[tuple[str, ...]] = ()  # fields in which adapters that share tensors have to agree
    # containers of which layers of one adapter have one tensor: all its methods, in the model's order → a key for each
    layer_keys: ClassVar[dict[str, Callable[[Sequence[Any]], Sequence[Hashable]]]] = {}

    lays_out_stacks: ClassVar[bool] = False  # it knows stacks of matrices itself; others act on each (`core/each.py`)

    # derived from the declarations of a subclass
    layer_names: ClassVar[tuple[str, ...]] = ()  # containers of tensors that train
    # these containers, as a layer shows those that it does not need
    empty: ClassVar[dict[str, nn.ParameterDict | nn.ModuleDict]] = {}
    shares: ClassVar[bool] = False  # `share` makes tensors that live once per model
    surrounds: ClassVar[bool] = False  # `surround_run` does something
    has_loss: ClassVar[bool] = False  # `compute_auxiliary_loss` does something
    takes_device: ClassVar[bool] = False  # `build` has that argument
    computes_with: ClassVar[frozenset[str]] = frozenset()  # names that it declares and reads, facts among them
    checks_compatibility: ClassVar[bool] = False  # `excludes` may refuse an adapter beside it

    config_path: str = ""  # the path by which the config's patterns know the site; "" if that is the site's own
    via_container: bool = False  # the config names the module around the site, and the site came with that
    source: Method | None = None  # the same adapter on the embedding to which the site's module is tied
    layer: Any  # Layer, with the containers of all adapters
    lenders: Mapping[str, Method] = MappingProxyType({})  # containers whose tensors are another layer's, and whose

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "config" not in vars(cls) and (config := _config_of(cls)) is not None:
            cls.config = config
        for name, annotation in inspect.get_annotations(cls).items():
            if name in vars(cls):
                continue
            setattr(cls, name, _reader(name))
            cls.computes_with |= {name}
            kind = str(getattr(annotation, "__name__", annotation))
            is_container = name.startswith(getattr(cls, "prefix", "")) and not name.endswith("dropout")
            if is_container and not kind.startswith(UNTRAINED_TYPES):
                cls.empty = {**cls.empty, name: nn.ParameterDict() if kind.endswith("Parameter") else nn.ModuleDict()}
        cls.layer_names = tuple(cls.empty)
        cls.surrounds = cls.surround_run.__func__ is not Method.surround_run.__func__  # type: ignore[attr-defined]
        cls.has_loss = cls.compute_auxiliary_loss.__func__ is not Method.compute_auxiliary_loss.__func__  # type: ignore[attr-defined]
        cls.takes_device = "device" in inspect.signature(cls.build).parameters
        cls.checks_compatibility = cls.why_incompatible is not Method.why_incompatible
        cls.shares = cls.share.__func__ is not Method.share.__func__  # type: ignore[attr-defined]
        _check_overrides(cls)

    def __init__(self, site: Site, cfg: C, name: str):
        self.site, self.cfg, self.name, self.layer = site, cfg, name, None

    def __getattr__(self, key: str) -> Any:
        # fail for dunder names and the attributes that `__init__` sets, or copy and pickle recurse without end
        if key.startswith("__") or key in INSTANCE_FIELDS or self.layer is None:
            raise AttributeError(f"{type(self).__name__} has no '{key}'" + ("" if key in INSTANCE_FIELDS else " yet"))
        return getattr(self.layer, key)[self.name]

    # declare

    @classmethod
    def variant(cls, cfg: C) -> type[Method]:
        """Return the subclass for a config, some fields of which change the mathematics."""
        return cls

    @classmethod
    def default_targets(cls, model: nn.Module) -> list[str] | str | None:
        """Return `target_modules` for a config that names none; None if the method knows none for this model."""
        return cls.targets.get(model_type(model))

    @classmethod
    def prepare(cls, cfg: C, model: nn.Module) -> None:
        """Complete the config for this model, or raise. Its `target_modules` are set by now."""

    @classmethod
    def find_companions(cls, cfg: C, model: nn.Module, paths: Sequence[str]) -> Sequence[str]:
        """Return the paths of modules that the adapter is put on beside `paths`, which the config targets; or raise."""
        return ()

    @classmethod
    def split_budget(cls, methods: Sequence[Self]) -> None:
        """Complete the configs of one adapter's methods, which may depend on all its sites. No tensors yet."""

    @classmethod
    def restructure(cls, cfg: C, model: nn.Module) -> Callable[[], None] | None:
        """Change the model itself, before the search for targets; return a function that undoes it."""
        return None

    @classmethod
    def share(cls, layers: AdaptedLayers[C]) -> dict[str, nn.Parameter | nn.Module | Tensor | object]:
        """Make the tensors that all layers of the model share, by name. Parameters and modules train."""
        return {}

    @classmethod
    @contextmanager
    def surround_run(cls, tuner: Tuner, call: Call, run: Run) -> Iterator[Finish]:
        """Surround one run of the model in which adapters of this class act; yield the function for its output."""
        yield return_unchanged

    @classmethod
    def arguments_of(cls, batch: Mapping[str, object], model: nn.Module) -> dict[str, Tensor]:
        """Return the arguments of this method that a batch with labels tells, for callers that run without labels."""
        return {}

    @classmethod
    def compute_auxiliary_loss(cls, cfg: C, noted: Sequence[NotedTokens]) -> Tensor:
        """Return the loss of an adapter, (), of the values that its layers recorded in a run (`call.record_value`)."""
        raise NotImplementedError

    @classmethod
    def check_together(cls, methods: Sequence[Self]) -> None:
        """Raise if these adapters of one layer cannot be active at once."""

    def why_incompatible(self, other: object) -> str | None:
        """Return why an adapter with the config `other` cannot stand beside this one, or None.

        A layer asks both adapters about each other.
        """
        return None

    def check(self) -> str | None:
        """Return why the method cannot adapt this site, or None. There are no tensors yet."""
        site, effect, name = self.site, self.effect, type(self).__name__
        if self.only_linear and site.op.known and not site.op.linear:
            return self.only_linear
        if self.ungrouped and site.op.known and site.op.count_groups(site.module) > 1:
            return self.ungrouped
        if not (site.op.known or effect.adapts_any_module):
            return f"Currently, only the following modules are supported: {', '.join(OPS.names())}"
        reads = effect.reads or Use.READS in self.uses_weight() or site.op.opaque
        why = site.weight.why_unreadable() if reads else None
        if why is not None:
            return f"{name} needs its weight, and {why}"
        return None

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Make all that the adapter adds to its layer, by name: parameters, modules, tensors (buffers), plain facts.

        A parameter that does not require gradients never trains. A method that takes a second argument,
        `device=None`, gets the meta device there where values come later, and goes its own way; others are built with
        it as the default.
        """
        raise NotImplementedError

    def init_values(self) -> None:
        """Set initial values. Before a load it runs only with `Use.AGAIN`."""

    def fill_start(self, t: Tensor, std: float | None = None) -> None:
        """Fill a new tensor with zeros, so that the adapter starts as nothing; with `init_weights=False` at random.

        std: of normal values; None: draw uniform values as nn.Linear does.
        """
        if self.cfg.init_weights:  # type: ignore[attr-defined]
            nn.init.zeros_(t)
        elif std is None:
            nn.init.kaiming_uniform_(t, a=math.sqrt(5))
        else:
            nn.init.normal_(t, std=std)

    def uses_weight(self) -> Use:
        """Return what the first values have to do with the base weight; with `Use.READS`, `share` may read it, too."""
        return Use.NOT

    def finish_load(self) -> None:
        """Follow the values of a checkpoint, which have just been put into the adapter's tensors."""

    def tie_to_embedding(self, source: Method) -> None:
        """Use the tensors of `source`, the same adapter on the embedding that this layer's weight is tied to."""
        raise NotImplementedError(
            f"no implementation exists to tie the adapters of {type(self).__name__}: layer '{self.site.key}'."
        )

    def to_file_tensors(self, values: Tensors, cfg: C) -> Tensors:
        """Return a file's tensors from those in memory. cfg: the adapter's config, for all sites."""
        return values

    @property
    def is_stored_unchanged(self) -> bool:
        """Return True if `to_file_tensors` changes nothing."""
        return type(self).to_file_tensors is Method.to_file_tensors

    def from_file_tensors(self, tensors: Tensors, cfg: C) -> Tensors:
        """Return the tensors in memory from a file's. cfg: the config in the checkpoint."""
        return tensors

    def check_shared(self, tensors: Tensors) -> None:
        """Raise CheckpointError if what a file holds of the tensors that layers share cannot be used on this one."""

    # act

    def factors(self) -> Factors:
        """Return `Factors` with ΔW = scale · B A."""
        raise NotImplementedError

    def delta(self) -> Delta:
        """Return ΔW, canonical: (out, in, *kernel)."""
        raise NotImplementedError

    def describe(self) -> Effect:
        """Return the effect: an `Update` by `factors` or `delta`, whichever the most derived class has.

        It may depend on the site and the config, and on nothing else.
        """
        by_factors = _find_last_override(type(self), "factors", "delta") == "factors"
        return Update(factors=self.factors) if by_factors else Update(self.delta)

    def take_from_base(self, mark: str, missing: str) -> Any:
        """Take an attribute that a calibration has left at the base's module; an injection that fails gives it back.

        Raises:
            CalibrationError: it is not there; `missing` says so.
        """
        module = self.site.module
        if mark not in module.__dict__:
            raise CalibrationError(missing)
        left = module.__dict__.pop(mark)
        self.layer.on_rollback(lambda: setattr(module, mark, left))
        return left

    def effect_at(self, value: object) -> Effect:
        """Return the effect on rows whose argument `depends_on` has this value.

        Raises:
            ConfigError: it cannot have it.
        """
        raise NotImplementedError

    @cached_property
    def effect(self) -> Effect:
        """The result of `describe`, kept."""
        return self.describe()

    # facts

    @property
    def matrix_method(self) -> Method:
        """The method as it is on one matrix of a stack; itself on anything else."""
        return self

    @property
    def is_variant(self) -> bool:
        """Return True if the class is one that a method chooses by its config, and not the method's own."""
        owner = next(cls for cls in type(self).__mro__ if "variant" in vars(cls))
        return owner not in (type(self), Method)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the adapter computes: that of its first tensor."""
        first: Tensor = self.layer.first_tensor(self.name)
        return first.dtype

    def cast(self, x: Tensor) -> Tensor:
        """Return x in the dtype of the adapter. Ids stay as they are."""
        return x if self.site.op.takes_ids or not self.layer.cast_input_dtype_enabled else cast(x, self.dtype)


def build_placeholders(method: Method, shared: dict[str, object]) -> dict[str, object]:
    """Return what `build` gives where values come later, mostly on the meta device."""
    if method.takes_device:
        return method.build(shared, META)  # type: ignore[call-arg]
    with META:
        return method.build(shared)


def return_unchanged(output: T) -> T:
    """Return an output unchanged."""
    return output


def _find_last_override(cls: type, *hooks: str) -> str:
    """Return the hook that the most derived class overrides."""
    for base in cls.__mro__:
        for hook in hooks:
            if hook in vars(base):
                return hook
    raise AttributeError(hooks)


def _check_overrides(cls: type[Method]) -> None:
    """Raise TypeError if a class overrides one of several hooks that say the same, and inherits another."""
    if "describe" in vars(cls) or cls.describe is Method.describe:  # that one asks for the most derived hook
        return
    for hooks in EQUIVALENT_HOOKS:
        new = [hook for hook in hooks if hook in vars(cls)]
        inherited = [h for h in hooks if h not in new and getattr(cls, h, None) is not getattr(Method, h, None)]
        if new and inherited:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(new)} and inherits {', '.join(inherited)}, which says the same: "
                "override both, or `describe`."
            )


class Tuner(Protocol):
    """A model with adapters. Each attribute is described where `Registry` defines it."""

    @property
    def model(self) -> nn.Module: ...  # the user's, of any class
    @property
    def training(self) -> bool: ...
    @property
    def is_disabled(self) -> bool: ...
    @property
    def is_mixed(self) -> bool: ...
    @property
    def peft_config(self) -> Mapping[str, Any]: ...  # by adapter
    @property
    def active_adapters(self) -> list[str]: ...
    @property
    def layers(self) -> Mapping[str, Any]: ...  # by path
    @property
    def wrappers(self) -> Mapping[str, Any]: ...  # by path
    @property
    def states(self) -> dict[str, Any]: ...  # of methods that allocate a budget, by adapter
    @property
    def common_tensors(self) -> SharedTensors: ...

    starts: dict[str, Any]  # notes of first values, by adapter
    trained: set[str]
    watch: Any
    in_ddp: bool

    @property
    def call(self) -> Call: ...
    def carriers(self) -> Iterator[Carrier]: ...
    def parts_of(self, adapter_name: str) -> Any: ...
    def check_known(self, names: Sequence[str]) -> None: ...
    def calling(self, what: str) -> AbstractContextManager[object]: ...
    def enter_methods(self, run: Run) -> AbstractContextManager[Finish]: ...
