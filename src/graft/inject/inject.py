# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""An injection puts an adapter on a model: find, check, build, then commit, or undo on an error.

The module tree is walked once.

An injection has three parts. *Find* walks the model once. It makes a method for each target, head and table of token
rows, in the order of their initial draws. Everything that can fail is checked here, and no tensor is made. *Build*
makes the tensors, shared ones first: it builds, initialises, places them, fills in values of a file and ties them, all
apart from the model. *Commit* attaches the layers and freezes the base, which cannot fail. If an error occurs, changes
of base weights by an initialisation are rolled back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from torch import nn

from graft.config.base import PeftConfig, check_config
from graft.core.errors import gather_warnings
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.inject import build, find
from graft.inject.beside import RowsLayer, TrainableTokensWrapper
from graft.inject.job import InjectionJob
from graft.inject.parts import pause_collector, sort_inside_out
from graft.inject.stage import draw_alike, find_team
from graft.inject.survey import ModuleTree, survey_model
from graft.methods import ROWS, method_of
from graft.storage.codes import prepare_packed
from graft.storage.find import DENSE, find_store_of_tensor, innermost


class Injection(InjectionJob):
    """An `InjectionJob` with the steps that do it. `run` does all; `find` alone is a plan."""

    def run(self) -> Injection:
        """Put the adapter on the model, in place, inactive and frozen. Return this injection.

        Waits until no call of the model runs. Copies the completed config into the caller's. The garbage collector
        pauses meanwhile. Gathered warnings come just before the commit. If processes hold the model together, they draw
        as the first does. Those of a sharded base wait for each other. An error or a warning turned into one undoes
        everything.

        Raises:
            DistributedError: a process of a sharded base does not come, or with another adapter.
            NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: the model is as it was before the call.
        """
        with self.restructure_model(), ExitStack() as on_error:
            with pause_collector(), gather_warnings() as say:
                self.find()
                if self.team is not None:
                    self.team.meet(
                        self.adapter, self.cfg, [*self.methods, *self.beside], self.options.values is not None
                    )
                on_error.callback(self.undo)
                with draw_alike(self.team):
                    build.build_carriers(self)
            say()
            with self.call.gate.change("a change", ()):  # waits until no call of the model runs
                pass
            on_error.pop_all()
            self.commit()
        self.config.__dict__.update(self.cfg.__dict__)
        return self

    def find(self) -> Injection:
        """Survey the model unless that is done, copy the config to `cfg`, and fill in all that the injection will do.

        Return this injection.

        `team` is looked up first; on a base that FSDP2 has sharded, the dense stores of the survey's layers and
        wrappers are looked up again, except of merged ones. With replaced steps their config is swapped meanwhile. The
        model and the caller's config stay as they are. Raises the errors of `resolve_job`.
        """
        self.team = find_team(self.model.modules())  # before stores are found, which depend on it
        self.tree = self.tree or survey_model(self.model)
        if self.team is not None and self.team.sharding is not None:
            for layer in (*self.tree.layers.values(), *self.tree.wrappers.values()):
                if layer.store is DENSE and not layer.state.merged:  # a merged layer's store has to undo the merge
                    weight = layer.base_weight
                    layer.store = layer.site.store = find_store_of_tensor(weight.module, weight.name)
        self.cfg = copy.copy(self.config)
        with nullcontext() if self.steps is None else self.steps.swap_config(self):
            find.resolve_job(self)
        return self

    @contextmanager
    def restructure_model(self, keep: bool = True) -> Iterator[None]:
        """Let the method change the model's modules (`restructure`) for the block, if it does so.

        Undoes the change if the block raises, or at its end unless `keep`. After a change sets `tree` to None, as the
        survey shows the old modules. Without a change the block runs as it is.
        """
        undo = self.method.restructure(self.config, self.model)
        if undo is not None:
            self.tree = None  # type: ignore[assignment]  # the survey shows the model before the change
        with ExitStack() as at_end:
            if undo is not None:
                at_end.callback(undo)
            yield
            if keep:
                at_end.pop_all()

    def commit(self) -> None:
        """Attach the new layers and wrappers to the model, in each place that its module has. Nothing here can fail.

        If the base had no adapters before, its parameters freeze, in place; the names of those frozen already are kept
        in `frozen_before`. Trained biases then get `requires_grad`. The sharding, if there is one, is passed both
        changes.

        Empty carriers of deleted adapters are replaced by their base modules. Packed weights are prepared for adapters.
        Changes of base weights by `init_values` become final, unless the injection is provisional. New wrappers take
        the training mode of the module they replace; token rows get a `TrainableTokensWrapper`. Layers of parameters
        are nested around their module again, old and new. Other existing layers and wrappers stay in place.
        """
        tree, sharding = self.tree, None if self.team is None else self.team.sharding
        prepare_packed(tree.modules.values())
        if not tree.layers and not tree.wrappers:
            self.frozen_before = list_frozen_names(self.model, tree)
            for p in tree.owners:
                p.requires_grad = False
            if sharding is not None:
                sharding.set_trainability(tree.owners, False)
        for path, base in tree.vacant.items():
            tree.attach(path, base)
        nests: dict[str, list[AdapterLayer]] = {path: list(layers) for path, layers in tree.nests.items()}
        for key, layer in self.layers.items():
            if not self.options.provisional:
                layer.drop_rollback()
            if key in tree.layers:
                continue
            if layer.op.opaque:
                nests.setdefault(layer.site.path, []).append(layer)
            else:
                tree.attach(key, layer)
        for path, layers in nests.items():
            nest_layers(tree, path, layers)
        for key, wrapper in self.wrappers.items():
            if key not in tree.wrappers:
                module = TrainableTokensWrapper(wrapper) if isinstance(wrapper, RowsLayer) else wrapper
                tree.attach(key, module.train(tree.modules[key].training))
        for bias in self.biases:
            bias.requires_grad = True  # `build_carriers` has made Parameters of packed ones
        if sharding is not None:
            sharding.set_trainability(self.biases, True)  # type: ignore[arg-type]  # parameters by now


def list_frozen_names(model: nn.Module, tree: ModuleTree) -> set[str] | None:
    """Return the names of the parameters that do not train, all names of shared ones.

    Returns None if no parameter trains, and an empty set if all train.
    """
    trains = [p.requires_grad for p in tree.owners]
    if not any(trains):
        return None
    if all(trains):
        return set()
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def find_methods(model: nn.Module, config: PeftConfig) -> dict[str, Method]:
    """Return by path the methods that an injection of `config` would put on layers of `model`; neither changes.

    Raises:
        ConfigTypeError: `config` is no PeftConfig. Other errors as `get_peft_model`, for a config that does not fit.
    """
    check_config(config)
    return Injection(model, config, method_of(config.peft_type), "default").find().methods


def nest_layers(tree: ModuleTree, path: str, layers: list[AdapterLayer]) -> None:
    """Put the layers of several parameters of the module at a path around it and each other, and the outermost into the
    module's places.

    The layer of the module's first parameter is the innermost.
    """
    inner: nn.Module = innermost(tree.modules[path])
    for layer in sort_inside_out(layers):
        layer._modules["base_layer"] = inner
        inner = layer
    tree.attach(path, inner)


def check_second_bias(cfg: PeftConfig) -> None:
    """Raise ValueError if the config of a second adapter trains biases of the base.

    Raises:
        NotImplementedError: `bias` has a value that is not known.
    """
    if find.read_bias_option(cfg) != "none":
        raise ValueError(
            f"{ROWS[cfg.peft_type.value].tuner} supports only 1 adapter with bias. "
            "When using multiple adapters, set bias to 'none' for all adapters."
        )
