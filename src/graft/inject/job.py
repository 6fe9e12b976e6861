# SPDX-License-Identifier: Apache-2.0
"""One adapter on its way onto a model: what it is asked for, what `find` has found, and what `build` has made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.core.call import Call
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.shared import SharedTensors
from graft.core.site import Site
from graft.inject.beside import Head, describe_trained_module
from graft.inject.parts import AdapterCarriers
from graft.inject.report import InjectReport, Matched
from graft.inject.survey import ModuleTree, Wrapper
from graft.methods.trainable_tokens import TrainableTokens
from graft.prompts.base import Prompt
from graft.storage.parallel import processes


class Receiver(Protocol):
    """The place of a tensor, which takes another one's values."""

    def assign(self, value: Tensor) -> None: ...


class ValueSource(Protocol):
    """A checkpoint's values, which an injection assigns in place of initial ones."""

    @property
    def names(self) -> Collection[str]:
        """The checkpoint's keys."""
        ...

    def make_head(self, key: str, module: nn.Module) -> nn.Module | None:
        """Return a module for modules_to_save if the checkpoint's shapes differ from those of `module`, else None."""
        ...

    def check_room(self, numbers: float) -> None:
        """Raise if that many numbers, to be made before the values are known, are out of proportion."""
        ...

    def match_entries(self, parts: AdapterCarriers, adapter: str) -> list[tuple[Receiver, Tensor]]:
        """Return every entry of the adapter with its value, all checked. An entry's `assign` puts it in place."""
        ...


@dataclass(frozen=True)
class Options:
    """What an adapter comes with, beside its name and config."""

    upcast: bool = True  # train half-precision adapters in float32
    on_meta: bool = False  # leave its tensors on the meta device
    values: ValueSource | None = None  # a checkpoint's, in place of initial ones
    heads: dict[str, nn.Module] | None = None  # modules for `modules_to_save`, by name, instead of copies of the base's
    state_dict: dict[str, Tensor] | None = None  # adapt exactly the layers that it has tensors for
    provisional: bool = False  # the caller may still take it off: see `Registry.provisional`


@dataclass
class Targets:
    """The modules and parameters that a config targets, as `find` goes on. Methods take their place."""

    sites: dict[str, Site] = field(default_factory=dict)  # by path
    along: set[str] = field(default_factory=set)  # paths of sites that came with that of the module around them
    tied: dict[str, str] = field(default_factory=dict)  # path of a module tied to the embedding → path of that


@dataclass(eq=False)
class InjectionJob:
    """An injection's question and answers.

    Args:
        method: the Method class.
        call: the Call of the model.
        shared: the tensors that all layers of the model share; some methods add to it.
        others: configs of the adapters that the model has, by name.
        keys: adapt exactly these paths, whatever the config targets.
        tree: a survey of the model, if one was just made.
        mixed: layers may carry adapters of other methods.
        prompt: the adapter itself, if it is a prompt.
        steps: those of the tuner that were replaced, to be asked.
    """

    model: nn.Module
    config: PeftConfig
    method: type[Method]
    adapter: str
    call: Call = field(default_factory=Call)
    shared: SharedTensors = field(default_factory=SharedTensors)
    others: Mapping[str, PeftConfig] = field(default_factory=dict)
    options: Options = Options()
    keys: Iterable[str] | None = None
    tree: ModuleTree = None  # type: ignore[assignment]
    mixed: bool = False
    several: bool = field(default_factory=lambda: processes() > 1)  # this process is one of several
    group: dist.ProcessGroup | None = None  # of the processes that compute the model in pieces
    prompt: Prompt | None = None
    steps: Any = None  # Steps

    # found by `find.find`
    cfg: Any = None  # copy of the user's config with targets and the like filled in
    report: InjectReport = field(init=False)
    targets: Targets = field(default_factory=Targets)
    methods: dict[str, Method] = field(default_factory=dict)  # by path: of the targets, and of modules tied to them
    beside: dict[str, Head | TrainableTokens] = field(default_factory=dict)  # of modules and rows that train along
    order: dict[str, Method] = field(default_factory=dict)  # what draws, in the model's order, also on other stages
    biases: list[nn.Parameter | nn.Module] = field(default_factory=list)  # that train; the layer of one that is packed

    # made by `build.build`
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    takebacks: list[Callable[[], None]] = field(default_factory=list)  # what `undo` does beside forgetting the adapter
    frozen_before: set[str] | None = None  # the base's parameters that did not train, by name; None if none did

    @property
    def parts(self) -> AdapterCarriers:
        return AdapterCarriers(self.layers, self.wrappers, self.shared if self.shared.containers else None, self.prompt)

    @property
    def local_methods(self) -> dict[str, Method]:
        """The methods in `order` whose layers this process has."""
        return {key: method for key, method in self.order.items() if key in self.methods}

    def report_heads_and_rows(self) -> None:
        """Note in the report what trains beside the layers."""
        untied_methods = {key: method for key, method in self.beside.items() if method.source is None}
        self.report.modules_to_save += [
            Matched(key, *describe_trained_module(method)) for key, method in untied_methods.items()
        ]

    def undo(self) -> None:
        """Take back all that `build` made."""
        for layer in self.layers.values():
            layer.rollback()
            layer.forget(self.adapter)
        for wrapper in self.tree.wrappers.values():
            wrapper.forget(self.adapter)
        self.shared.forget(self.adapter)
        for takeback in self.takebacks:
            takeback()
