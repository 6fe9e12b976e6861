# SPDX-License-Identifier: Apache-2.0
"""Adapters as experts: X-LoRA, with a classifier that weighs LoRA adapters, and models with an Arrow router
over them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from graft.config.base import PeftConfig
from graft.config.pair import CONFIG_NAME
from graft.core.carrier import Carrier, TunerTensors
from graft.core.errors import CheckpointError, ConfigError, RoutingError, UnsupportedLayerError
from graft.core.gate import all_adapters, changes, prepares
from graft.core.ops import META
from graft.inject.build import assign_values
from graft.inject.job import Options
from graft.inject.parts import AdapterCarriers, check_adapter_name, get_registry, read_modes, restore_modes
from graft.inject.report import InjectReport
from graft.inject.stage import draw_alike, find_team
from graft.inject.survey import survey_model
from graft.io import files
from graft.io.load import CheckpointValues
from graft.methods.lora.config import LoraConfig
from graft.methods.lora.sub_configs import ArrowConfig
from graft.methods.xlora import CLASSIFIER, XLoraClassifier, XLoraConfig, check_top_k
from graft.model.compose import Composition
from graft.model.peft_model import PeftModel
from graft.model.registry import Configs, Registry
from graft.model.tuner import Tuner

OTHERS = ("base_model.lora_model.", f"base_model.{CLASSIFIER}.")  # in PEFT's files of whole X-LoRA models


class XLoraRegistry(Registry):
    """The registry of a model with one X-LoRA adapter and its experts, which are adapters with names and run together
    with it.
    """

    owner = ""  # name of the X-LoRA adapter
    experts: Mapping[str, int] = MappingProxyType({})  # name of an expert → its place among the classifier's weights
    gate: TunerTensors | None = None  # carries the classifier
    places: dict[str, int]  # path of a layer → its place there

    @property
    def classifier(self) -> XLoraClassifier:
        """The classifier that weighs the experts; a module of the tuner."""
        return getattr(self.holder, CLASSIFIER)  # type: ignore[no-any-return]

    def carriers(self) -> Iterator[Carrier]:
        """Yield all carriers of adapters, and the one with the classifier if there is an X-LoRA adapter."""
        yield from super().carriers()
        if self.gate is not None:
            yield self.gate

    def parts_of(self, adapter_name: str) -> AdapterCarriers:
        """Return the carriers of an adapter.

        Those of the X-LoRA adapter have the classifier as `shared`. An adapter that is not loaded gives empty carriers.
        """
        parts = super().parts_of(adapter_name)
        if adapter_name == self.owner:
            parts.shared = self.gate
        return parts

    # adapters

    @prepares
    def add_adapter(  # type: ignore[override]
        self, adapter_name: str, config: XLoraConfig, options: Options
    ) -> InjectReport:
        """Load the experts onto the model and make the classifier; return the report.

        The experts are read before the model changes. On a later error everything is taken off again. Processes that
        hold the model together draw an equal classifier. The config becomes the first in `peft_config`, and the report
        counts the classifier's numbers as `other_trainable`.

        With `options.values` the classifier gets the values of a file.

        Raises:
            ConfigError: there is an adapter already, there are no experts, X-LoRA cannot weigh one, `top_k_lora` does
                not fit, or heads or a state_dict are passed.
            CheckpointError: an expert is not where the config says.
        """
        self.check_new(adapter_name, config)
        if not (options.heads is None and options.state_dict is None):
            raise ConfigError("X-LoRA takes its layers from its experts: pass neither heads nor a state_dict.")
        experts = {name: self._read_expert(adapter_name, config, name) for name in config.adapters or {}}
        if not experts:
            raise ConfigError("X-LoRA needs experts: name them in XLoraConfig.adapters, {name: path}.")
        check_top_k(config.top_k_lora, len(experts))
        try:
            for name, (expert, loaded) in experts.items():
                values = CheckpointValues(self.model, expert, name, loaded)
                self._inject(name, expert, Options(options.upcast, values=values))
            self._check_experts(experts)
            with draw_alike(find_team(self.model.modules())):
                self._make_classifier(adapter_name, config, list(experts), options.on_meta)
            report = InjectReport(adapter_name, "XLORA")
            report.other_trainable = sum(p.numel() for p in self.classifier.parameters())
            if options.values is not None:
                parts = self.parts_of(adapter_name)
                assign_values(parts, adapter_name, options.values.match_entries(parts, adapter_name))
        except BaseException:
            self.unload(keep_modules=False)
            self.holder._modules.pop(CLASSIFIER, None)
            raise
        self.peft_config = Configs({adapter_name: config, **self.peft_config})
        self._register(adapter_name, config)
        self.reports[adapter_name] = report
        return report

    def _read_expert(self, owner: str, config: XLoraConfig, name: str) -> tuple[LoraConfig, files.LoadedWeights]:
        """Read an expert: from the folder next to the config if that is a whole LoRA checkpoint, else from the path in
        the config. Return its config and weights.

        The folder is skipped if it cannot be read. A sub-folder is also skipped if a tensor's name begins with
        "base_model.lora_model." or the classifier's prefix (`OTHERS`), as in PEFT's files of whole X-LoRA models. Sets
        the config's `inference_mode` to False.

        Raises:
            CheckpointError: no place has the expert; the text has the first place's error.
            ConfigError: it is not LoRA, or uses DoRA.
            AdapterNameError: its name is taken, also by X-LoRA's adapter, or cannot be one.
        """
        check_adapter_name(name, [*self.peft_config, owner])
        where = config.adapters[name]  # type: ignore[index]
        places: list[tuple[str, str | None, dict[str, Any]]] = [(where, None, {})]
        if name in config.beside:
            places.insert(0, config.beside[name])
        error: Exception | None = None
        for folder, sub, hub in places:
            try:
                expert, loaded = files.load_pair(folder, sub, **hub)
            except CheckpointError as e:
                error = error or e
                continue
            if sub is None or not any(key.startswith(OTHERS) for key in loaded.tensors):
                break
        else:
            raise CheckpointError(
                f"Expert '{name}' of X-LoRA adapter '{owner}' is neither next to its config nor at '{where}' "
                f"({error}). Name its folder in XLoraConfig.adapters, or pass from_pretrained(…, adapters={{…}})."
            )
        if expert.peft_type != "LORA":
            raise ConfigError(f"Expert '{name}' of X-LoRA is {expert.peft_type.value}: only LoRA adapters can be.")
        if expert.use_dora:
            raise ConfigError(f"X-LoRA currently does not support LoRA layers with DoRA (expert '{name}').")
        expert.inference_mode = False
        return expert, loaded

    def _check_experts(self, names: Iterable[str]) -> None:
        """Raise ConfigError for the first layer or wrapper that keeps X-LoRA from weighing the named experts.

        On a layer each expert must only add, and the layer must be linear, an embedding, or a stack of experts. A
        wrapper of a head or of token rows may have only one of the experts.
        """
        for key, layer in self.layers.items():
            for m in (layer.methods[name] for name in names if name in layer.methods):
                op = layer.site.op
                by_token = op.linear or op.takes_ids or layer.site.experts is not None
                if not (m.effect.additive and by_token):
                    raise ConfigError(
                        f"X-LoRA weighs the updates of experts at each token, which layer '{key}' "
                        f"({layer.site.type_name}, {type(m).__name__}) of expert '{m.name}' does not allow."
                    )
        for key, wrapper in self.wrappers.items():
            users = [name for name in names if name in wrapper.adapters]
            try:
                wrapper.check_active(users)
            except ValueError as e:
                raise ConfigError(
                    f"X-LoRA cannot mix the '{key}' (a head, or token rows) that each of {users} has. Train experts "
                    "without modules_to_save, and without a task_type that adds a head, as SEQ_CLS does."
                ) from e

    def _make_classifier(self, adapter_name: str, config: XLoraConfig, names: list[str], on_meta: bool) -> None:
        """Make the classifier, frozen, and attach it to the tuner as its module `internal_xlora_classifier`.

        Sets `owner` (the adapter's name), `experts`, the classifier's carrier `gate`, and the numbers of layers
        (`places`, in the order of the model) and experts (`experts`, in the order of `names`).

        It is on the first layer's device (`on_meta`: the meta device), in the dtype of the model's first parameter.
        """
        modules = {id(m): i for i, (_, m) in enumerate(self.model.named_modules())}
        order = sorted(self.layers, key=lambda key: modules[id(self.layers[key])])
        self.places = {key: i for i, key in enumerate(order)}
        first = self.layers[order[0]]
        where = dict(device=first.where[0], dtype=next(self.model.parameters()).dtype)
        if on_meta:
            where["device"] = META
        classifier = XLoraClassifier(config, len(names), len(order), where)
        self.gate = TunerTensors(adapter_name, {CLASSIFIER: classifier})
        self.gate.state.call = self.call
        self.gate.require_grad(adapter_name, False)
        self.owner, self.experts = adapter_name, {name: i for i, name in enumerate(names)}
        self.holder.add_module(CLASSIFIER, classifier)

    def check_new(self, adapter_name: str, config: PeftConfig) -> None:
        """Raise as `Registry.check_new`. Raise ConfigError if the model has adapters already, or if its config has a
        true `use_cache`: X-LoRA reads the whole text to weigh experts.
        """
        super().check_new(adapter_name, config)
        if getattr(getattr(self.model, "config", None), "use_cache", False):
            raise ConfigError("`use_cache` must be False in the config: X-LoRA weighs experts by the whole text.")
        if self.layers:
            raise ConfigError(f"The model has adapters {list(self.peft_config)}: load X-LoRA into one without.")

    @changes(all_adapters)
    def set_adapter(self, adapter_name: str | Sequence[str] | Composition, inference_mode: bool = False) -> None:
        """Make adapters active: the X-LoRA adapter with all its experts, or only the named experts, which then act as
        plain LoRA.

        If the X-LoRA adapter is named, other names do not matter. Experts with it do not train unless its config has
        `use_trainable_adapters`. Also waits, does and raises as the base class.

        Raises:
            RoutingError: a composition is passed: X-LoRA weighs the experts itself.
        """
        if isinstance(adapter_name, Composition):
            raise RoutingError(f"X-LoRA mixes its adapters itself: {adapter_name!r} cannot be active in its model.")
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        together = self.owner in names
        if together:
            names = [self.owner, *self.experts]
        super().set_adapter(names, inference_mode)
        if together and not self.classifier.config.use_trainable_adapters:
            self.set_requires_grad([*self.experts], False)

    @changes(all_adapters)
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the X-LoRA adapter and its classifier; the experts stay, as plain LoRA adapters.

        `gate`, `owner` and `experts` become empty.

        Waits until no call runs.

        Raises:
            ConfigError: it is an expert of X-LoRA.
            AdapterNotFoundError: it is not loaded.
        """
        if adapter_name in self.experts:
            raise ConfigError(f"'{adapter_name}' is an expert of X-LoRA adapter '{self.owner}', which needs it.")
        super().delete_adapter(adapter_name)
        self.gate, self.owner, self.experts = None, "", {}
        del self.holder._modules[CLASSIFIER]

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, undoable: bool, progress: bool = False) -> None:
        """Merge active or named experts, as the base class does.

        Raises NotImplementedError while the X-LoRA adapter is active, whatever the names: its weights change at every
        token.
        """
        if self.owner in self.active_adapters:
            raise NotImplementedError(
                "X-LoRA cannot be merged: it weighs its experts anew at every token. To merge some experts unweighted, "
                "call set_adapter() with their names before."
            )
        super()._merge(adapter_names, safe_merge, undoable, progress)


class XLoraTuner(Tuner):
    """The tuner of X-LoRA. It has the classifier as `internal_xlora_classifier`."""

    _registry_class = XLoraRegistry

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        """Make the tuner, and set it and the model to eval mode."""
        super().__init__(model, *args, **kwargs)
        self.eval()

    @property
    def xlora_config(self) -> XLoraConfig:
        """The config of the tuner's classifier, `internal_xlora_classifier`."""
        return self.internal_xlora_classifier.config  # type: ignore[no-any-return]


# Arrow


TASK, GENERAL, ROUTER = "task_", "gks_", "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load adapters as `task_0`, … (and `gks_0`, … with `use_gks`), add `arrow_router` over them, activate it, and
    return the PeftModel.

    The names are written into `task_adapter_names` and `gks_adapter_names` of `arrow_config`. The router has the
    adapters' targets and their rank. After an error within the loading, adapters are removed, and the modes of the
    modules are as before.

    Args:
        task_specific_adapter_paths: of the experts: folders, or "owner/repository[/subfolder]" on the hub.
        general_adapter_paths: of adapters of general knowledge, for GenKnowSub; ignored without `use_gks`.
        adapter_kwargs: for `from_pretrained` and `load_adapter`.

    Raises:
        ConfigError: there are no experts, or no general paths for `use_gks`; `top_k` exceeds the number of experts; or
            they differ in rank, shapes or layers.
        UnsupportedLayerError: they adapt other layers than linear ones.
        CheckpointError: a folder holds no adapter.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("You should provide general LoRA paths if you want to use GenKnowSub.")
    tasks = {f"{TASK}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    if arrow_config.top_k > len(tasks):
        raise ConfigError(f"top_k={arrow_config.top_k} is more than the {len(tasks)} experts.")
    general = {f"{GENERAL}{i}": path for i, path in enumerate(general_adapter_paths or ()) if arrow_config.use_gks}
    sources = {name: split_source(path) for name, path in {**tasks, **general}.items()}
    model: PeftModel | None = None
    before = read_modes(base_model)
    try:
        for name, (where, subfolder) in sources.items():
            options = dict(adapter_kwargs) if subfolder is None else {"subfolder": subfolder, **adapter_kwargs}
            if model is None:
                model = PeftModel.from_pretrained(base_model, where, name, **options)
            else:
                model.load_adapter(where, name, **options)
        assert model is not None
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(tasks), list(general)
        targets, r = agree_on_targets(model, list(sources))
        router = LoraConfig(arrow_config=arrow_config, target_modules=targets, r=r)
        autocast = adapter_kwargs.get("autocast_adapter_dtype", True)
        model.add_adapter(ROUTER, router, autocast_adapter_dtype=autocast)
    except BaseException:
        if model is not None:
            get_registry(model).unload(keep_modules=False)
        restore_modes(before)
        raise
    model.set_adapter(ROUTER)
    return model


def split_source(path: str) -> tuple[str, str | None]:
    """Return (folder or hub repository, sub-folder or None) of an adapter's path.

    A relative path of three parts or more, that is no folder, is a repository of the first two with a sub-folder. Any
    other path is returned as it is, with None.

    Raises CheckpointError for a folder without adapter_config.json.
    """
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, CONFIG_NAME)):
            raise CheckpointError(f"Local adapter path '{path}' does not contain '{CONFIG_NAME}'.")
        return path, None
    parts = path.strip("/").split("/")
    if os.path.isabs(path) or len(parts) < 3:
        return path, None
    return "/".join(parts[:2]), "/".join(parts[2:])


def agree_on_targets(model: PeftModel, names: list[str]) -> tuple[list[str], int]:
    """Return the router's targets, sorted, and its rank: the largest of the layers of the first adapter.

    All adapters must have the same layers, and the same rank on each. Targets are the last names of the model's adapted
    layers, or their full paths if these names also fit other modules.

    Raises:
        UnsupportedLayerError: an adapter is on a layer that is not linear.
        ConfigError: adapters differ in layers or ranks.
    """
    layers = get_registry(model).layers
    adapted = {name: {key: layer for key, layer in layers.items() if name in layer.methods} for name in names}
    unsupported = [f"  - adapter '{n}' on module '{k}' of type {a.site.type_name}" for n, by_key in adapted.items()
             for k, a in by_key.items() if not a.site.op.linear]  # fmt: skip
    if unsupported:
        raise UnsupportedLayerError(
            "LoRA adapters must only target Linear-like layers. Found:\n" + "\n".join(unsupported)
        )
    first = names[0]
    for name in names[1:]:
        if adapted[name].keys() != adapted[first].keys():
            raise ConfigError(
                f"[{name}] target_modules mismatch:\n  this adapter -> {sorted(adapted[name])}\n"
                f"  reference   -> {sorted(adapted[first])}"
            )
        for key, layer in adapted[name].items():
            ranks = [layer.methods[n].pair[0].shape[0] for n in (name, first)]
            if ranks[0] != ranks[1]:
                raise ConfigError(f"[{name}] rank mismatch: {ranks[0]} != {ranks[1]} (layer '{key}')")
    leaves = {key.rpartition(".")[2] for key in layers}
    paths = survey_model(model.get_base_model()).modules
    also = any(key.rpartition(".")[2] in leaves and key not in layers for key in paths)
    return sorted(layers if also else leaves), max(layer.methods[first].pair[0].shape[0] for layer in layers.values())
