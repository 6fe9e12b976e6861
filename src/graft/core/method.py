# SPDX-License-Identifier: Apache-2.0
"""One adapter on one site. A subclass declares its tensors and says once, by an effect, what they do to the layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.core.effect import Effect, LowRank, Update
from graft.core.ops import META, OPS, is_stock
from graft.core.site import Site

if TYPE_CHECKING:
    from graft.core.call import Call

FACT_TYPES = ("float", "int", "bool", "str", "list", "dict")  # annotations of what a layer keeps in plain dicts
SAME_MATHS = (("fold", "pre", "post"), ("factors", "delta", "branch"))  # hooks that say one thing twice
OWN = frozenset({"layer", "name", "site", "cfg", "effect"})

# {(container, path below the adapter's name): tensor}
Tensors = dict[tuple[str, str], Tensor]


def _reader(name: str) -> property:
    """Read a declared value from the layer; quicker than `__getattr__`, which would find it, too."""

    def read(self: Any) -> Any:
        own = self.layer.__dict__
        return (own[name] if name in own else own["_modules"][name])[self.name]  # facts are kept in dicts

    return property(read)


class Method:
    """A bound view: the tensors live on the layer, and `self.lora_A` reads `layer.lora_A[self.name]`.

    Declare tensors with `build` (and `share`, `init`). Say what they do by the first of these that the formula allows:

    - `factors` → `Factors`: ΔW of low rank.
    - `delta` → ΔW.
    - `describe` → any other `Effect`.

    Attributes:
        site: where it acts, with the shape of the weight.
        cfg: the config of this site, with what its patterns say here.
        layer: the AdapterLayer; None before `build`.
    """

    config: ClassVar[Any]  # its PeftConfig class
    prefix: ClassVar[str]  # what its containers' names begin with, as in checkpoints
    upcast: ClassVar[bool] = True  # half-precision adapters are trained in float32
    targets: ClassVar[dict[str, Any]] = {}  # default target_modules by model_type
    single_trainable: ClassVar[bool] = False  # one adapter of a model trains at a time
    empty: ClassVar[dict[str, Any]] = {}  # containers that a layer shows, empty, if it does not need them
    tuner_methods: ClassVar[dict[str, Any]] = {}  # what it adds to the model class: functions of (tuner, …)
    always_tied: ClassVar[bool] = False  # modules tied to an adapted embedding run its own parameters, too
    unnamed: ClassVar[frozenset[str]] = frozenset()  # containers whose one parameter a file names by the container
    compresses_targets: ClassVar[bool] = True  # long lists of names may be shortened to suffixes

    # derived from what a subclass declares
    layer_names: ClassVar[tuple[str, ...]] = ()  # containers of what trains
    shares: ClassVar[bool] = False  # `share` makes tensors that live once per model

    layer: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, annotation in inspect.get_annotations(cls).items():
            if name in vars(cls):
                continue
            setattr(cls, name, _reader(name))
            fact = str(getattr(annotation, "__name__", annotation)).startswith(FACT_TYPES)
            if name.startswith(getattr(cls, "prefix", "")) and not fact and not name.endswith("dropout"):
                cls.layer_names = (*cls.layer_names, name)
        cls.layer_names = tuple(dict.fromkeys((*cls.layer_names, *cls.empty)))
        cls.shares = cls.share.__func__ is not Method.share.__func__  # type: ignore[attr-defined]
        _refuse_half_an_override(cls)

    def __init__(self, site: Site, cfg: Any, name: str):
        self.site, self.cfg, self.name, self.layer = site, cfg, name, None

    def __getattr__(self, key: str) -> Any:
        # dunder names and what `__init__` sets must fail here, or copy and pickle recurse without end
        if key.startswith("__") or key in OWN or self.layer is None:
            raise AttributeError(f"{type(self).__name__} has no '{key}'" + ("" if key in OWN else " yet"))
        return getattr(self.layer, key)[self.name]

    # declare

    @classmethod
    def variant(cls, cfg: Any) -> type[Method]:
        """The subclass that serves a config, where some of its fields change the mathematics."""
        return cls

    @classmethod
    def default_targets(cls, model: Any) -> list[str] | str | None:
        """target_modules for a config that names none."""
        return cls.targets.get(getattr(getattr(model, "config", None), "model_type", "custom"))

    @classmethod
    def prepare(cls, cfg: Any, model: nn.Module) -> None:
        """Complete and check the config, whose targets are known by now, against the model."""

    @classmethod
    def restructure(cls, cfg: Any, model: nn.Module) -> Callable[[], None] | None:
        """Change the model itself, before anything is matched; return what undoes it."""
        return None

    @classmethod
    def share(
        cls, sites: Sequence[Site], cfg: Any, existing: dict[str, Any], others: dict[str, Any]
    ) -> dict[str, nn.Parameter | nn.Module | Tensor | Any]:
        """What lives once per model, by name: parameters and modules train.

        Args:
            existing: containers of what the other adapters share, by name.
            others: their configs.
        """
        return {}

    @classmethod
    @contextmanager
    def around(cls, tuner: Any, call: Call) -> Iterator[Callable[[Any], Any]]:
        """Surround one call of the model; yield what its output goes through."""
        yield _as_it_is

    @classmethod
    def check_together(cls, methods: Sequence[Any]) -> None:
        """Raise if these adapters of one layer cannot be active at once."""

    @classmethod
    def excludes(cls, other: Any) -> str | None:
        """Say why an adapter of the config `other` cannot be beside one of this class, or None. Asked both ways."""
        return None

    def check(self) -> str | None:
        """Say why this site cannot be adapted, or None. There are no tensors yet."""
        site, effect, name = self.site, self.effect, type(self).__name__
        if not site.op.known and not (effect.whole or getattr(effect, "input_of", None)):
            return f"Currently, only the following modules are supported: {', '.join(OPS.names())}"
        reads = effect.reads or self.inits_from_weight()
        why = site.store.unread(site.module, site.parameter) if reads else None
        if why is not None:
            return f"{name} needs its weight, and {why}"
        folds = getattr(effect, "folds", False)
        known: Any = OPS.origin(type(site.module)) if folds else None
        if known is not None and not is_stock(site.module):
            return f"Its forward is not that of {known.__name__}, and {name} would call the latter"
        return None

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        """What the adapter adds to its layer: parameters, modules, tensors (buffers) and plain facts, by name.

        A parameter that does not require gradients never trains.
        """
        raise NotImplementedError

    def placeholders(self, shared: dict[str, Any]) -> dict[str, Any]:
        """The same with all tensors on the meta device, where values are yet to come."""
        with META:
            return self.build(shared)

    def init(self) -> None:
        """Fill in the values; skipped when they are about to be loaded."""

    def inits_from_weight(self) -> bool:
        """Whether `init` reads or changes the base weight, so that it must run before values are loaded, too."""
        return False

    def tie(self, source: Method) -> None:
        """Use the tensors of `source`, the same adapter on the embedding that this layer's weight is tied to."""
        raise NotImplementedError(
            f"no implementation exists to tie the adapters of {type(self).__name__}: layer '{self.site.key}'."
        )

    def stored(self, values: Tensors, cfg: Any) -> Tensors:
        """What a checkpoint holds of the adapter's tensors; `cfg` is the adapter's whole config."""
        return values

    def restored(self, stored: Tensors, cfg: Any) -> Tensors:
        """The reverse; `cfg` is that of the checkpoint."""
        return stored

    # act

    def factors(self) -> Any:
        """`Factors` with ΔW = scale · B A."""
        raise NotImplementedError

    def delta(self) -> Any:
        """ΔW, canonical: (out, in, *kernel)."""
        raise NotImplementedError

    def describe(self) -> Effect:
        """The effect: `LowRank(self.factors)` or `Update(self.delta)`, whichever was overridden last.

        It may depend on the site and the config, and on nothing else.
        """
        return LowRank(self.factors) if _last(type(self), "factors", "delta") == "factors" else Update(self.delta)

    @cached_property
    def effect(self) -> Effect:
        """What `describe` says, kept."""
        return self.describe()

    # facts

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in: that of its first tensor."""
        return self.layer.first_tensor(self.name).dtype  # type: ignore[no-any-return]

    def cast(self, x: Tensor) -> Tensor:
        """x in the dtype of the adapter. Ids stay as they are."""
        return x if self.site.op.takes_ids or not self.layer.cast_input_dtype_enabled else x.to(self.dtype)


def _as_it_is(output: Any) -> Any:
    return output


def _last(cls: type, *hooks: str) -> str:
    """The hook that was overridden last: by the most derived class."""
    for base in cls.__mro__:
        for hook in hooks:
            if hook in vars(base):
                return hook
    raise AttributeError(hooks)


def _refuse_half_an_override(cls: type[Method]) -> None:
    """Raise TypeError for a subclass that changes one of several hooks that say the same."""
    if "describe" in vars(cls) or cls.describe is Method.describe:  # which asks who came last
        return
    for group in SAME_MATHS:
        own = [hook for hook in group if hook in vars(cls)]
        inherited = [h for h in group if h not in own and getattr(cls, h, None) is not getattr(Method, h, None)]
        if own and inherited:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(own)} and inherits {', '.join(inherited)}, which says the same: "
                "override both, or `describe`."
            )
