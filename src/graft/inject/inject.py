# SPDX-License-Identifier: Apache-2.0
"""Put an adapter on a model: find, check, build, commit; or undo. One walk of the module tree."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from graft.core.call import Call
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.shared import Shared
from graft.core.site import Site
from graft.inject import build, plan
from graft.inject.parts import Parts
from graft.inject.report import InjectReport, Matched
from graft.inject.survey import Place, Tree, Wrapper, survey
from graft.prompts.base import Prompt


class Values(Protocol):
    """The values of a checkpoint, for an injection to put in place of initial ones."""

    def head(self, key: str, module: nn.Module) -> nn.Module | None:
        """A module for modules_to_save at a path whose shapes differ from those there, or None."""
        ...

    def of(self, parts: Parts, adapter: str) -> list[tuple[Any, Tensor]]:
        """Every entry of the adapter and its value, all checked. An entry's `assign` puts a value in place."""
        ...


@dataclass(eq=False)
class Injection:
    """One adapter on its way onto a model.

    Args:
        method: the Method class.
        call: the model's; a new one where it has none yet.
        shared: what all layers share; filled in by methods that have such.
        others: configs of the adapters already there.
        upcast: train half-precision adapters in float32.
        on_meta: leave the adapter's tensors on the meta device.
        values: put in place of initial ones.
        keys: adapt exactly these paths, whatever the config targets.
        heads: modules to use (instead of copies of the base's) for `modules_to_save`, by name.
        tree: a survey of the model, if one was just made.
        mixed: layers may carry adapters of other methods.
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
    prompt: Prompt | None = None  # that the adapter is

    # found by `plan.find`
    cfg: Any = None  # resolved: a copy of the user's config with targets and the like filled in
    report: InjectReport = field(init=False)
    sites: dict[str, Site] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)  # one for each site, and for those that follow
    saved: list[str] = field(default_factory=list)  # paths of modules_to_save
    tokens: dict[str, list[int]] = field(default_factory=dict)  # embeddings some of whose rows train
    followers: dict[str, str] = field(default_factory=dict)  # modules on the embedding's weight, and its path
    row_followers: dict[str, str] = field(default_factory=dict)  # those of them in which the same rows train
    biases: list[nn.Parameter] = field(default_factory=list)  # of the base, that train

    # made by `build.build`
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    ties: list[tuple[Method, Method]] = field(default_factory=list)  # (of a follower, of what it follows)

    @property
    def parts(self) -> Parts:
        return Parts(self.layers, self.wrappers, self.shared, self.prompt)

    def run(self) -> Injection:
        """Put the adapter on the model, in place, inactive and frozen.

        Raises:
            NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: the model is as it was before the call.
        """
        with collector_paused(), self.restructured():
            self.find()
            build.build(self)
            self.commit()
        self.config.__dict__.update(self.cfg.__dict__)
        return self

    def find(self) -> Injection:
        """Say what the injection will do, and raise what can go wrong, before the model is touched."""
        self.tree = self.tree or survey(self.model)
        self.cfg = copy.copy(self.config)
        plan.find(self)
        return self

    @contextmanager
    def restructured(self, keep: bool = True) -> Iterator[None]:
        """What the method changes in the model itself, undone if the block raises, or afterwards unless `keep`."""
        undo = self.method.restructure(self.config, self.model)
        if undo is not None:
            self.tree = None  # type: ignore[assignment]  # it shows the model as it was
        try:
            yield
        except BaseException:
            if undo is not None:
                undo()
            raise
        if undo is not None and not keep:
            undo()

    def count_saved(self) -> None:
        """Note in the report the modules that would be trained whole."""
        for key in self.saved:
            module = self.tree.modules[key]
            size = sum(p.numel() for p in module.parameters())
            self.report.modules_to_save.append(Matched(key, type(module).__name__, size))

    def commit(self) -> None:
        """Attach what was made; nothing here can fail."""
        tree = self.tree
        if not tree.layers and not tree.wrappers:
            for p in tree.owners:
                p.requires_grad = False
        for where, base in tree.vacant:
            attach(where, base)
        for key, layer in self.layers.items():
            layer.settle()
            if key not in tree.layers:
                attach(tree.places[key], layer)
        for key, wrapper in self.wrappers.items():
            if key not in tree.wrappers:
                wrapper.train(tree.modules[key].training)
                attach(tree.places[key], wrapper)
        for bias in self.biases:
            bias.requires_grad = True

    def undo(self, shared_before: Iterable[str]) -> None:
        """Take back what was built. shared_before: names of the containers that were there."""
        for layer in self.layers.values():
            layer.rollback()
            layer.forget(self.adapter)
        for wrapper in self.tree.wrappers.values():
            wrapper.forget(self.adapter)
        self.shared.forget(self.adapter)
        self.shared.take_out(set(self.shared.containers) - set(shared_before))


def inject(model: nn.Module, config: Any, method: type[Method], adapter: str, **options: Any) -> Injection:
    """Put `adapter` on `model`, in place, inactive and frozen: see `Injection` for the options and errors."""
    return Injection(model, config, method, adapter, **options).run()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Nothing that an injection makes is garbage: looking for some takes longer than the injection itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def attach(place: Place, module: nn.Module) -> None:
    parent, name = place
    if "activation_relu_or_gelu" in parent.__dict__:
        parent.activation_relu_or_gelu = 0  # type: ignore[assignment]  # torch's fast path in TransformerEncoderLayer would not call the layer
    parent._modules[name] = module  # setattr would only look the old one up again


def check_bias(cfg: Any, method: type[Method], others: Iterator[Any]) -> None:
    """Raise if the config's `bias` is unknown, or a second adapter wants to train biases."""
    bias = getattr(cfg, "bias", "none")
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise NotImplementedError(
            f"Requested bias: {bias}, is not implemented. Use none, all, or {method.__name__.lower()}_only."
        )
    others = list(others)  # type: ignore[assignment]
    if others and any(getattr(c, "bias", "none") != "none" for c in (cfg, *others)):
        raise ValueError(
            f"{method.__name__} supports only 1 adapter with bias. "
            "When using multiple adapters, set bias to 'none' for all adapters."
        )
