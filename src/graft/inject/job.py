# SPDX-License-Identifier: Apache-2.0
"""The state of one injection: its inputs, the results of `resolve_job`, and the results of `build_carriers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.core.call import Call
from graft.core.carrier import SharedTensors
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.site import Site
from graft.inject.beside import Head, describe_trained_module
from graft.inject.parts import AdapterCarriers
from graft.inject.report import InjectReport, Matched
from graft.inject.stage import ProcessTeam
from graft.inject.survey import ModuleTree, Wrapper
from graft.methods.trainable_tokens import TrainableTokens
from graft.prompts.base import Prompt
from graft.storage.parallel import processes

TensorWriter = Callable[[Tensor], None]  # writes a value into one tensor, such as that of an adapter's entry


@dataclass(frozen=True)
class Options:
    """The optional arguments of an injection. The comments say the effect of each."""

    upcast: bool = True  # train half-precision adapters in float32
    on_meta: bool = False  # leave its tensors on the meta device
    values: Any = None  # of a file (`CheckpointValues`) or of other adapters, in place of initial ones
    heads: dict[str, nn.Module] | None = None  # modules for `modules_to_save`, by name, instead of copies of the base's
    state_dict: dict[str, Tensor] | None = None  # adapt exactly the layers that it has tensors for
    provisional: bool = False  # the caller may still remove the adapter: see `Registry.provisional`


@dataclass(eq=False)
class InjectionJob:
    """The inputs and results of one injection: model and config first, then fields that `resolve_job` and
    `build_carriers` fill.

    Args:
        method: the Method class.
        call: the Call of the model.
        shared: the tensors that all layers of the model share; some methods add to it.
        other_configs: configs of the adapters that the model has, by name.
        keys: adapt exactly these paths, whatever the config targets.
        tree: a survey of the model, if one was just made.
        mixed: layers may carry adapters of other methods.
        prompt: the adapter's prompt, if it is a prompt method.
        steps: the steps of the tuner that another package replaced.
    """

    model: nn.Module
    config: PeftConfig
    method: type[Method]
    adapter: str
    call: Call = field(default_factory=Call)
    shared: SharedTensors = field(default_factory=SharedTensors)
    other_configs: Mapping[str, PeftConfig] = field(default_factory=dict)
    options: Options = Options()
    keys: Iterable[str] | None = None
    tree: ModuleTree = None  # type: ignore[assignment]
    mixed: bool = False
    several: bool = field(default_factory=lambda: processes() > 1)  # this process is one of several
    team: ProcessTeam | None = None  # the processes that hold the model together, in pieces or sharded
    prompt: Prompt | None = None
    steps: Any = None  # ReplacedSteps, if another package replaced a step

    # set by `find.resolve_job`
    cfg: Any = None  # copy of the user's config with targets and the like filled in
    report: InjectReport = field(init=False)
    sites: dict[str, Site] = field(default_factory=dict)  # of the config's targets, by path
    along: set[str] = field(default_factory=set)  # paths of sites that a targeted parent module brought
    tied: dict[str, str] = field(default_factory=dict)  # path of a module tied to the embedding → path of that
    methods: dict[str, Method] = field(default_factory=dict)  # by path: of the targets, and of modules tied to them
    beside: dict[str, Head | TrainableTokens] = field(default_factory=dict)  # heads and token rows, by path
    # all methods that draw initial values, in the model's order, also those of other stages
    order: dict[str, Method] = field(default_factory=dict)
    biases: list[nn.Parameter | nn.Module] = field(default_factory=list)  # that train; for a packed one its layer

    # set by `build.build_carriers`
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    takebacks: list[Callable[[], None]] = field(default_factory=list)  # further actions of `undo`
    frozen_before: set[str] | None = None  # the base's parameters that did not train, by name; None if none did

    @property
    def parts(self) -> AdapterCarriers:
        """The new carriers of the adapter. `shared` is None if no tensor is shared."""
        return AdapterCarriers(self.layers, self.wrappers, self.shared if self.shared.containers else None, self.prompt)

    @property
    def local_methods(self) -> dict[str, Method]:
        """The methods in `order` with a path that `methods` has, by path, in that order: those on layers of this
        process.
        """
        return {key: method for key, method in self.order.items() if key in self.methods}

    def report_heads_and_rows(self) -> None:
        """Append a `Matched` entry for each of the job's heads and sets of token rows to the report's
        `modules_to_save`.

        An entry has the key, and the description and count of trainable numbers from `describe_trained_module`. Heads
        and rows with a `source`, which are tied to another one, are left out.
        """
        untied = [(key, method) for key, method in self.beside.items() if method.source is None]
        self.report.modules_to_save += [Matched(key, *describe_trained_module(method)) for key, method in untied]

    def undo(self) -> None:
        """Take the adapter off all layers of the job, all wrappers of the survey and the shared tensors, and roll base
        weights back. Then run all `takebacks`, the first one first.
        """
        for layer in self.layers.values():
            layer.rollback()
            layer.forget(self.adapter)
        for wrapper in self.tree.wrappers.values():
            wrapper.forget(self.adapter)
        self.shared.forget(self.adapter)
        for takeback in self.takebacks:
            takeback()
