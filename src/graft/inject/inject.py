# SPDX-License-Identifier: Apache-2.0
"""Put an adapter on a model: find, check, build, commit; or undo. One walk of the module tree."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from graft.core.call import Call
from graft.core.errors import gathering
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.shared import Shared
from graft.core.site import Site
from graft.inject import build, find
from graft.inject.beside import RowsLayer, TrainableTokensWrapper
from graft.inject.experts import LeftOut
from graft.inject.parts import Parts, inside_out
from graft.inject.report import InjectReport, Matched
from graft.inject.stage import draw_alike
from graft.inject.survey import Place, Tree, Wrapper, survey
from graft.methods import ROWS
from graft.prompts.base import Prompt
from graft.storage import innermost, ready


class Values(Protocol):
    """A checkpoint's values, which an injection assigns in place of initial ones."""

    @property
    def names(self) -> Collection[str]:
        """The checkpoint's keys."""
        ...

    def head(self, key: str, module: nn.Module) -> nn.Module | None:
        """Return a module for modules_to_save if the checkpoint's shapes differ from those of `module`, else None."""
        ...

    def check_room(self, numbers: float) -> None:
        """Raise if that many numbers, to be made before the values are known, are out of proportion."""
        ...

    def of(self, parts: Parts, adapter: str) -> list[tuple[Any, Tensor]]:
        """Return every entry of the adapter with its value, all checked. An entry's `assign` puts it in place."""
        ...


@dataclass(frozen=True)
class Options:
    """What an adapter comes with, beside its name and config."""

    upcast: bool = True  # train half-precision adapters in float32
    on_meta: bool = False  # leave its tensors on the meta device
    values: Values | None = None  # a checkpoint's, in place of initial ones
    heads: dict[str, nn.Module] | None = None  # modules for `modules_to_save`, by name, instead of copies of the base's
    state_dict: dict[str, Tensor] | None = None  # adapt exactly the layers that it has tensors for


def nobody() -> None:
    """Do nothing: no calls of the model are under way."""


@dataclass(eq=False)
class Injection:
    """One adapter on its way onto a model.

    Args:
        method: the Method class.
        call: the Call of the model; a new one if it has none yet.
        shared: the tensors that all layers of the model share; some methods add to it.
        others: configs of the adapters that the model has, by name.
        upcast: train half-precision adapters in float32.
        on_meta: leave the adapter's tensors on the meta device.
        values: a checkpoint's, in place of initial ones.
        keys: adapt exactly these paths, whatever the config targets.
        heads: modules to use (instead of copies of the base's) for `modules_to_save`, by name.
        tree: a survey of the model, if one was just made.
        mixed: layers may carry adapters of other methods.
        close: waits until no call of the model is under way.
        steps: those of the tuner that were replaced, to be asked.
    """

    model: nn.Module
    config: Any
    method: type[Method]
    adapter: str
    call: Call | None = None
    shared: Shared = field(default_factory=Shared)
    others: dict[str, Any] = field(default_factory=dict)
    upcast: bool = True
    on_meta: bool = False
    values: Values | None = None
    keys: Iterable[str] | None = None
    heads: dict[str, nn.Module] | None = None
    tree: Tree = None  # type: ignore[assignment]
    mixed: bool = False
    prompt: Prompt | None = None  # the adapter itself, if it is a prompt
    close: Callable[[], None] = nobody  # closes the model's gate, before `commit`
    steps: Any = None  # Steps

    # found by `plan.find`
    cfg: Any = None  # copy of the user's config with targets and the like filled in
    report: InjectReport = field(init=False)
    sites: dict[str, Site] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)  # one for each site and each follower, by path
    along: set[str] = field(default_factory=set)  # paths of sites that came with that of the module around them
    saved: list[str] = field(default_factory=list)  # paths of modules_to_save
    tokens: dict[str, list[int]] = field(default_factory=dict)  # path of an embedding → its rows that train
    tied_modules: dict[str, str] = field(default_factory=dict)  # path of a tied module → path of its embedding
    tied_rows: dict[str, str] = field(default_factory=dict)  # the same, where the embedding's rows train
    absent: dict[str, str] = field(default_factory=dict)  # path of a module of another pipeline stage → of its parent
    left: LeftOut = field(default_factory=LeftOut)  # experts that the config names by their old names, and their like
    remote_sites: dict[str, Method] = field(default_factory=dict)  # methods of sites of other stages, by path
    order: list[str] = field(default_factory=list)  # paths of sites, those of other stages among them
    biases: list[nn.Parameter] = field(default_factory=list)  # biases of the base model that train
    loose: list[nn.Module] = field(default_factory=list)  # layers whose bias trains and is no Parameter yet
    released: list[Callable[[], None]] = field(default_factory=list)  # each undoes that such a bias has become one

    # made by `build.build`
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    ties: list[tuple[Method, Method]] = field(default_factory=list)  # (method of a follower, that of its embedding)
    frozen_before: set[str] | None = None  # the base's parameters that did not train, by name; None if none did

    @property
    def parts(self) -> Parts:
        return Parts(self.layers, self.wrappers, self.shared, self.prompt)

    def run(self) -> Injection:
        """Put the adapter on the model, in place, inactive and frozen.

        Raises:
            NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: the model is as it was before the call.
        """
        with self.restructured():
            with collector_paused(), gathering() as say:
                self.find()
                draw_alike(self.tree.modules.values())
                before = list(self.shared.containers)
                build.build(self)
            try:
                say()
                self.close()
            except BaseException:
                self.undo(before)
                raise
            self.commit()
        self.config.__dict__.update(self.cfg.__dict__)
        return self

    def find(self) -> Injection:
        """Find all that the injection will do and raise all that can go wrong, without a change to the model."""
        self.tree = self.tree or survey(self.model)
        self.cfg = copy.copy(self.config)
        with nullcontext() if self.steps is None else self.steps.asking(self):
            find.find(self)
        return self

    @contextmanager
    def restructured(self, keep: bool = True) -> Iterator[None]:
        """Let the method change the model itself; undo that if the block raises, or afterwards unless `keep`."""
        undo = self.method.restructure(self.config, self.model)
        if undo is not None:
            self.tree = None  # type: ignore[assignment]  # the survey shows the model before the change
        try:
            yield
        except BaseException:
            if undo is not None:
                undo()
            raise
        if undo is not None and not keep:
            undo()

    def count_saved(self) -> None:
        """Note in the report the modules that would train whole."""
        for key in self.saved:
            module = self.tree.modules[key]
            size = sum(p.numel() for p in module.parameters())
            self.report.modules_to_save.append(Matched(key, type(module).__name__, size))

    def commit(self) -> None:
        """Attach layers and wrappers; freeze the base under its first adapter. Nothing here can fail."""
        tree = self.tree
        ready(tree.modules.values())
        if not tree.layers and not tree.wrappers:
            self.frozen_before = frozen(self.model, tree)
            for p in tree.owners:
                p.requires_grad = False
        for where, base in tree.vacant:
            attach(where, base)
        nests: dict[str, list[AdapterLayer]] = {path: list(layers) for path, layers in tree.nests.items()}
        for key, layer in self.layers.items():
            layer.keep()
            if key in tree.layers:
                continue
            if layer.op.opaque:
                nests.setdefault(layer.site.path, []).append(layer)
            else:
                attach(tree.places[key], layer)
        for path, layers in nests.items():
            nest(tree.places[path], layers, innermost(tree.modules[path]))
        for key, wrapper in self.wrappers.items():
            if key not in tree.wrappers:
                module = TrainableTokensWrapper(wrapper) if isinstance(wrapper, RowsLayer) else wrapper
                attach(tree.places[key], module.train(tree.modules[key].training))
        for bias in self.biases:
            bias.requires_grad = True

    def undo(self, shared_before: Iterable[str]) -> None:
        """Take back all that `build` made. shared_before: names of the shared containers before it."""
        for layer in self.layers.values():
            layer.rollback()
            layer.forget(self.adapter)
        for wrapper in self.tree.wrappers.values():
            wrapper.forget(self.adapter)
        for release in self.released:
            release()
        self.shared.forget(self.adapter)
        self.shared.take_out(set(self.shared.containers) - set(shared_before))


def inject(model: nn.Module, config: Any, method: type[Method], adapter: str, **options: Any) -> Injection:
    """Put `adapter` on `model`, in place, inactive and frozen: see `Injection` for the options and errors."""
    return Injection(model, config, method, adapter, **options).run()


def frozen(model: nn.Module, tree: Tree) -> set[str] | None:
    """Name the parameters that do not train, before a first adapter freezes all; None if none trains."""
    still = [p for p in tree.owners if not p.requires_grad]
    if len(still) == len(tree.owners):
        return None
    if not still:
        return set()
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


MANY = 10_000  # objects, of which the collector's search as young takes a few ms


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector: an injection makes no garbage, and the search takes longer than the injection.

    Count what was made as old afterwards. Python would search it at once otherwise, as young: 0.4 s of 1.1 s for 10,000
    modules.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # what a caller has frozen stays so; to count that takes long where it is much
        if enabled and gc.get_count()[0] > MANY and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


def attach(place: Place, module: nn.Module) -> None:
    parent, name = place
    if "activation_relu_or_gelu" in parent.__dict__:
        parent.activation_relu_or_gelu = 0  # type: ignore[assignment]  # torch's fast path in TransformerEncoderLayer would not call the layer
    parent._modules[name] = module  # setattr would only look the old one up again


def nest(place: Place, layers: list[AdapterLayer], base: nn.Module) -> None:
    """Put layers of parameters of one module around it, each around those of the parameters before its own."""
    inner: nn.Module = base
    for layer in inside_out(layers) if layers else ():
        layer._modules["base_layer"] = inner
        inner = layer
    attach(place, inner)


def check_bias(cfg: Any, method: type[Method], others: Iterator[Any]) -> None:
    """Raise if the config's `bias` is unknown, or a second adapter wants to train biases."""
    bias = getattr(cfg, "bias", "none")
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise NotImplementedError(
            f"Requested bias: {bias}, is not implemented. Use none, all, or {method.__name__.lower()}_only."
        )
    kinds = [getattr(other, "bias", "none") for other in others]
    if kinds and bias != "none":
        raise ValueError(
            f"{ROWS[cfg.peft_type.value].tuner} supports only 1 adapter with bias. "
            "When using multiple adapters, set bias to 'none' for all adapters."
        )
