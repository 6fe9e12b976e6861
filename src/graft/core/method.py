# SPDX-License-Identifier: Apache-2.0
"""The mathematics of one adapter on one layer. A subclass says the cheapest thing it can; the rest is derived."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graft.core.ops import META, OPS, is_stock
from graft.core.site import Site

if TYPE_CHECKING:
    from graft.core.call import Rows
    from graft.core.layer import AdapterLayer


_CLASS_VAR = re.compile(r"(\w+\.)*ClassVar\b")
_FACT = re.compile(r"(float|int|bool|str|list|dict)\b")


def _reader(name: str) -> property:
    """Reads a declared value from the layer; quicker than `__getattr__`, which would find it, too."""

    def read(self: Any) -> Any:
        own = self.layer.__dict__
        return (own[name] if name in own else own["_modules"][name])[self.name]  # facts are kept in dicts

    return property(read)


class Method:
    """A bound view: the tensors live on the layer, `self.lora_A` reads `layer.lora_A[self.name]`.

    Declare with `build` (and `share`, `init`); act with the first of these that the formula allows:

    - `factors`: ΔW = B A. Forward, merging, mixed batches and conversion follow, on every layer type.
    - `delta`: ΔW. The forward pass calls the layer's own function with it; `branch` can be cheaper.
    - `pre` / `post`: rewrite the input or the output; `fold` then says what merging means.
    - `fold`: W becomes f(W). The forward pass folds and calls the layer's own function.
    - `replacement`: a module that runs in place of the base layer.

    Where the module is no layer of one input but, say, an attention, `input_of` says what x is in all of these.
    """

    config: ClassVar[Any]  # its PeftConfig class
    prefix: ClassVar[str]  # what its containers' names begin with, as in checkpoints
    order: ClassVar[Literal["in", "out"]] = "out"  # acts before or after the weight: decides the fold order
    upcast: ClassVar[bool] = True  # half-precision adapters are trained in float32
    shares: ClassVar[bool] = False  # `share` makes tensors that live once per model
    targets: ClassVar[dict[str, Any]] = {}  # default target_modules by model_type
    single_trainable: ClassVar[bool] = False  # one adapter of a model trains at a time
    empty: ClassVar[dict[str, Any]] = {}  # containers that a layer shows, empty, if it does not need them
    tuner_methods: ClassVar[dict[str, Any]] = {}  # what it adds to the model class: functions of (tuner, …)
    always_tied: ClassVar[bool] = False  # modules tied to an adapted embedding run its own parameters, too
    unnamed: ClassVar[frozenset[str]] = frozenset()  # containers whose one parameter a file names by the container
    compresses_targets: ClassVar[bool] = True  # long lists of names may be shortened to suffixes

    # derived from what a subclass declares, and the hooks it overrides
    layer_names: ClassVar[tuple[str, ...]] = ()  # containers of what trains
    additive: ClassVar[bool]  # y = base(x) + branch(x)
    mergeable: ClassVar[bool]
    folds: ClassVar[bool]  # the forward pass needs the dense weight
    replaces: ClassVar[bool]
    low_rank: ClassVar[bool]
    rewrites_input: ClassVar[bool]
    adds_output: ClassVar[bool]
    joins: ClassVar[bool]
    sees_call: ClassVar[bool]  # of modules with several inputs

    layer: Any  # an AdapterLayer, with the containers that the method declared
    name: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, annotation in inspect.get_annotations(cls).items():
            if name in vars(cls) or _CLASS_VAR.match(str(annotation)):
                continue
            setattr(cls, name, _reader(name))
            fact = _FACT.match(getattr(annotation, "__name__", str(annotation)))
            if name.startswith(getattr(cls, "prefix", "")) and not fact and not name.endswith("dropout"):
                cls.layer_names = (*cls.layer_names, name)
        cls.layer_names = tuple(dict.fromkeys((*cls.layer_names, *cls.empty)))

        def has(*hooks: str) -> bool:
            return any(inspect.getattr_static(cls, hook) is not inspect.getattr_static(Method, hook) for hook in hooks)

        cls.low_rank = has("factors")
        cls.replaces = has("replacement")
        cls.rewrites_input = has("pre")
        cls.adds_output = has("factors", "delta", "branch", "post")
        cls.joins = has("join")
        cls.sees_call = has("input_of")
        cls.additive = has("factors", "delta", "branch") and not has("fold", "pre")
        cls.mergeable = has("factors", "delta", "fold", "replacement")
        cls.folds = has("fold") and not has("factors", "delta", "branch", "pre", "post")

    def __init__(self, layer: AdapterLayer, name: str):
        self.layer, self.name = layer, name

    def __getattr__(self, key: str) -> Any:
        # dunder names and `layer` must fail here, or copy and pickle recurse without end
        if key.startswith("__") or key in ("layer", "name"):
            raise AttributeError(key)
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
        """Change the model itself, before anything is matched; returns what undoes it."""
        return None

    @classmethod
    def check(cls, site: Site, cfg: Any) -> str | None:
        """Why this site cannot be adapted, or None."""
        if not site.op.known and not (cls.replaces or cls.sees_call):
            return f"Currently, only the following modules are supported: {', '.join(OPS.names())}"
        why = site.store.unread(site.module, site.parameter) if cls.needs_weight(site, cfg) else None
        if why is not None:
            return f"{cls.__name__} needs its weight, and {why}"
        known: Any = OPS.origin(type(site.module)) if cls.through_weight(site) else None
        if known is not None and not is_stock(site.module):
            return f"Its forward is not that of {known.__name__}, and {cls.__name__} would call the latter"
        return None

    @classmethod
    def share(cls, sites: Sequence[Site], cfg: Any, existing: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
        """Tensors of the whole model by name. `existing` holds what other adapters share, `others` their configs."""
        return {}

    @classmethod
    def build(cls, site: Site, cfg: Any, shared: dict[str, Any]) -> dict[str, Any]:
        """What the adapter adds to a layer: parameters, modules, tensors (buffers) and plain facts, by name."""
        raise NotImplementedError

    @classmethod
    def placeholders(cls, site: Site, cfg: Any, shared: dict[str, Any]) -> dict[str, Any]:
        """The same with all tensors on the meta device, where values are yet to come."""
        with META:
            return cls.build(site, cfg, shared)

    def init(self, cfg: Any) -> None:
        """Fill in the values; skipped when they are about to be loaded."""

    @classmethod
    def inits_from_weight(cls, cfg: Any) -> bool:
        """Whether `init` reads or changes the base weight, so that it must run before values are loaded, too."""
        return False

    @classmethod
    def check_together(cls, methods: Sequence[Any]) -> None:
        """Raise if these adapters of one layer cannot be active at once."""
        if cls.replaces and len(methods) > 1:
            names = [m.name for m in methods]
            raise ValueError(
                f"Trying to use more than one {cls.__name__} adapter {names} at once on layer "
                f"'{methods[0].layer.site.key}', but each replaces the whole layer: activate one."
            )

    def tie(self, source: Method) -> None:
        """Use the tensors of `source`, the same adapter on the embedding that this layer's weight is tied to."""
        raise NotImplementedError(
            f"no implementation exists to tie the adapters of {type(self).__name__}: layer '{self.layer.site.key}'."
        )

    @classmethod
    def stored(cls, layer: Any, container: str, tensor: Tensor, cfg: Any) -> Tensor:
        """What a checkpoint holds of one of the adapter's tensors."""
        return tensor

    @classmethod
    def restored(cls, layer: Any, container: str, here: Tensor, tensor: Tensor, cfg: Any) -> Tensor:
        """The reverse, where a checkpoint's tensor has not the shape of `here`, the adapter's own; `cfg` is that of the
        checkpoint. What is returned replaces `here` if the shapes are equal then."""
        return tensor

    @classmethod
    def after_forward(cls, tuner: Any, output: Any) -> Any:
        """Change the output of the whole model, such as its loss."""
        return output

    # act

    @classmethod
    def input_of(cls, module: nn.Module, call: dict[str, Any]) -> Tensor:
        """x, (batch, …), from all arguments of a module that returns a tuple; y is the first of what it returns."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = B A. A (r, fan_in), B (out, r), scaling included."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """ΔW, canonical: (out, in, *kernel)."""
        A, B = self.factors()
        if A.dtype in (torch.float16, torch.bfloat16):
            A, B = A.float(), B.float()
        return (B @ A).view(self.layer.site.shape)

    def delta_bias(self) -> Tensor | None:
        """Δb, if the adapter shifts the bias as well."""
        return None

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the base output, from x in the adapter's dtype."""
        op, base = self.layer.op, self.layer.base_layer
        if self.low_rank and op.factorable(base):
            A, B = self.factors()
            return op.up(base, op.down(base, x, A), B)
        return op.call(base, x, self.delta().to(self.dtype), None)

    @classmethod
    def add_rows(cls, layer: AdapterLayer, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        """y, which may be written to, with each adapter's branch added to the rows of the batch that use it."""
        for adapter, index in rows.segments:
            m = layer.methods.get(adapter)  # type: ignore[arg-type]
            if m is not None:
                part = m.post(x.index_select(0, index), y.index_select(0, index))
                y.index_copy_(0, index, part.to(y.dtype))
        return y

    def join(self, x: Tensor) -> Tensor:
        """The layer's output with this adapter, where both together cost less. Asked for only while the layer is `open`
        and, if gradients are wanted, its weight and bias need none."""
        y = self.layer.base_layer(x)
        return self.post(x, y).to(y.dtype)

    def pre(self, x: Tensor) -> Tensor:
        """The base layer's input, from x as it came."""
        return x

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output, from x as it came and the base output y."""
        return y + self.branch(self.cast(x))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (canonical) and bias of a plain layer that acts as base and adapter together."""
        shift = self.delta_bias()
        if shift is not None and b is not None:
            b = b + shift.to(b.dtype)
        return W + self.delta().to(W.dtype), b

    def check_merge(self) -> None:
        """Raise if this adapter cannot be merged into this layer."""
        self.delta_bias()
        if self.low_rank:
            self.factors()

    def replacement(self) -> nn.Module:
        raise NotImplementedError

    # facts

    @classmethod
    def acts(cls, site: Site) -> Literal["in", "out"]:
        """`order`, where it depends on the layer type."""
        return cls.order

    @classmethod
    def through_weight(cls, site: Site) -> bool:
        """Whether the forward pass on this site folds the weight (instead of `pre` and `post`)."""
        return cls.folds

    @classmethod
    def needs_weight(cls, site: Site, cfg: Any) -> bool:
        """Whether it reads the base weight: in the forward pass, or to begin with."""
        return cls.through_weight(site) or cls.inits_from_weight(cfg)

    def frozen(self) -> Sequence[nn.Parameter]:
        """Parameters that never train."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in: that of its first tensor."""
        _, _, owner, attribute, trains, _, held, root = self.layer._slots[self.name][0]
        tensor = (owner._parameters if trains else owner._buffers).get(attribute)
        if tensor is None or held.get(self.name) is not root:
            tensor = self.layer.slots(self.name)[0].tensor
        return tensor.dtype

    def cast(self, x: Tensor) -> Tensor:
        return x if self.layer.op.takes_ids or not self.layer.cast_input_dtype_enabled else x.to(self.dtype)
