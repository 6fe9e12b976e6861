# SPDX-License-Identifier: Apache-2.0
"""The registry of adapters on layers: adding, merging and unloading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from graft.core import merging
from graft.core.carrier import carrier_of
from graft.core.errors import AdapterNameError, ConfigError, warn
from graft.core.layer import AdapterLayer
from graft.core.method import Method, as_it_is
from graft.core.names import several
from graft.core.ops import find_op
from graft.core.run import Run
from graft.core.shared import Shared
from graft.inject.inject import Values, check_bias, inject
from graft.inject.parts import Parts
from graft.inject.report import InjectReport
from graft.inject.survey import Tree, nest_of, survey
from graft.io.base import original
from graft.methods import ROWS, method_of
from graft.model.registry import Registry
from graft.storage import DENSE, Quantized, holds_codes, innermost
from graft.storage.packed import dtype_beside, unmark


class LayerRegistry(Registry):
    """The registry of a model's adapters of one method on layers; of any methods if `method` is None.

    holder: the tuner, which holds the tensors that layers share.
    """

    method: type[Method]
    several = "use model.base_model.set_adapter([...]) to activate several"

    def __init__(self, holder: nn.Module, model: nn.Module, method: type[Method] | None, tree: Tree | None = None):
        self.holder, self.mixed = holder, method is None
        self.method = method  # type: ignore[assignment]
        self.tree: Tree | None = self.begin(model, tree)  # for the first injection, None afterwards
        self.checkpointing = self.tree.checkpointing
        self.shared = Shared()
        self.shared.state.call = self.call
        self.frozen_before: set[str] | None = None  # names of the base's parameters; None: leave all as they are
        self.surrounding: dict[Any, type[Method]] = {}  # classes that surround runs of the model, by adapter
        self.arguments: set[str] = set()
        self.peft_config |= getattr(model, "peft_config", None) or {}
        for name, config in self.peft_config.items():
            self._note(name, config)

    def method_for(self, config: Any) -> type[Method]:
        return method_of(config.peft_type) if self.mixed else self.method  # type: ignore[no-any-return]

    def alike(self, config: Any) -> dict[str, Any]:
        """Return the configs of the adapters of the same method, by name."""
        method = method_of(config.peft_type)
        return {name: c for name, c in self.peft_config.items() if method_of(c.peft_type) is method}

    # adapters

    def add_adapter(
        self,
        adapter_name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        values: Values | None = None,
        keys: Any = None,
        heads: dict[str, nn.Module] | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> InjectReport:
        """Inject another adapter, inactive. All or nothing: see `graft.inject.inject`.

        Args:
            state_dict: adapt exactly the layers that it has tensors for.
        """
        self.check_new(adapter_name, config)
        if state_dict is not None:
            keys = self._keys_in(state_dict, config)
        return self._inject(
            adapter_name,
            config,
            upcast=autocast_adapter_dtype,
            on_meta=low_cpu_mem_usage,
            values=values,
            keys=keys,
            heads=heads,
        )

    def _inject(self, adapter_name: str, config: Any, **options: Any) -> InjectReport:
        """Inject an adapter that has been checked, and register it."""
        tree, self.tree, disabled = self.tree, None, self.switched_off
        method = self.method_for(config)
        done = inject(
            self.model,
            config,
            method,
            adapter_name,
            call=self.call,
            shared=self.shared,
            others=self.alike(config),
            tree=tree,
            mixed=self.mixed,
            **options,
        )
        for name, container in self.shared.modules().items():
            if name not in self.holder._modules:
                self.holder.add_module(name, container)
        self.take_in(done.parts, disabled)
        if self.frozen_before is None:
            self.frozen_before = done.frozen_before
        self.peft_config[adapter_name] = config
        self._note(adapter_name, config)
        self.reports[adapter_name] = done.report
        return done.report

    def _note(self, adapter_name: str, config: Any) -> None:
        method = method_of(config.peft_type).variant(config)
        self.surrounding.pop(adapter_name, None)
        if method.surrounds:
            self.surrounding[adapter_name] = method
        self.arguments |= set(method.arguments)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter whose config the caller has put into `peft_config` under that name, as PEFT's callers do."""
        if model is not self.model:
            raise ValueError("inject_adapter injects into the tuner's own model; make another tuner for another model.")
        self.check_known([adapter_name])
        if any(adapter_name in part.adapters for part in self.carriers()):
            raise AdapterNameError(f"Adapter with name '{adapter_name}' already exists: its layers carry it.")
        config = self.peft_config.pop(adapter_name)
        self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype, state_dict=state_dict)

    def parts_of(self, adapter_name: str) -> Parts:
        parts = super().parts_of(adapter_name)
        parts.shared = self.shared
        return parts

    @contextmanager
    def acting(self, run: Run) -> Iterator[Callable[[Any], Any]]:
        names = self.active_adapters if run.rows is None else run.rows.names
        found: dict[type[Method], list[str]] = {}
        for name in names if self.surrounding else ():
            if name is not None and name in self.surrounding:
                found.setdefault(self.surrounding[name], []).append(name)
        if not found:
            yield as_it_is
            return
        with ExitStack() as stack:
            steps = []
            for method, run.adapters in found.items():
                steps.append(stack.enter_context(method.around(self, self.call, run)))

            def finish(output: Any) -> Any:
                for step in steps:
                    output = step(output)
                return output

            yield finish

    def check_method(self, config: Any) -> None:
        if not self.mixed:
            super().check_method(config)
        elif config.is_prompt_learning:
            raise ConfigError(
                f"The provided `peft_type` '{config.peft_type.value}' is not compatible with the `PeftMixedModel`: it "
                "acts on no layers. Use get_peft_model without mixed=True."
            )

    def check_new(self, adapter_name: str, config: Any) -> None:
        super().check_new(adapter_name, config)
        method = self.method_for(config)
        if not config.inference_mode:
            self._check_alone(adapter_name, config)
        check_bias(config, method, iter(self.peft_config.values()))

    def check_trainable(self, adapter_name: str) -> None:
        self._check_alone(adapter_name, self.peft_config[adapter_name])

    def _check_alone(self, adapter_name: str, config: Any) -> None:
        """Raise ConfigError if the method lets one adapter train at a time, and another one does."""
        method, tuner = self.method_for(config), ROWS[config.peft_type.value].tuner
        others = [n for n, c in self.alike(config).items() if n != adapter_name and not c.inference_mode]
        if method.single_trainable and others:
            raise ConfigError(
                f"{tuner} supports only 1 trainable adapter. When using multiple adapters, set "
                f"inference_mode to True for all adapters except the one you want to train. Trainable: {others}."
            )

    def carriers(self) -> Iterator[Any]:
        yield from super().carriers()
        if self.shared.containers:
            yield self.shared

    # merging

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The adapters merged into some layer."""
        return list(dict.fromkeys(name for layer in self.mergeable_layers() for name in layer.merged_adapters))

    def mergeable_layers(self) -> list[AdapterLayer]:
        rows = [w.adapter_layer for w in self.wrappers.values() if w.adapter_layer is not None]
        return [*self.layers.values(), *rows]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (the active ones if None) into the base weights; `unmerge_adapter` takes them out again.

        Args:
            safe_merge: compute every merged weight first and check that it is finite, which takes as long as merging.
                Without it only the adapters' own tensors are checked, not whether a sum overflows half precision.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: values are not finite, a name is there twice, or adapters are disabled. Nothing is merged then.
            NotImplementedError: some layer cannot hold them merged. Nothing is merged then.
        """
        self._merge(adapter_names, safe_merge, undoable=True)

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, undoable: bool, progress: bool = False) -> None:
        names = self.active_adapters if adapter_names is None else several(adapter_names, "adapter_names")
        self.check_known(names)
        done = self.merged_adapters
        wanted, names = names, [n for n in names if n not in done]
        layers: Any = self.mergeable_layers()
        merging.say_merged(done, wanted, names, any(merging.replaces(layer, names) for layer in layers))
        if not names:
            return
        for layer in layers:
            merging.check(layer, names, safe_merge, undoable)
        merging.check_finite(layers, names)
        left = [n for n in self.active_adapters if n not in names and n not in done]
        if not undoable:
            silent = left
            until = "the merged model is without them"
        else:
            hosts = [layer for layer in layers if not layer.methods.keys().isdisjoint(names)]
            silent = [n for n in left if any(n in layer.methods for layer in hosts)]
            until = f"in layers that carry {', '.join(names)}, they have no effect until unmerge_adapter()"
        if silent:
            warn(f"Active adapters {silent} are not merged: {until}.")
        if progress:
            from tqdm import tqdm

            layers = tqdm(layers, desc="Merging", unit="layer")
        for layer in layers:
            here = [n for n in names if n in layer.methods]
            if here:
                layer.merge_checked(here, undoable)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again."""
        if not self.merged_adapters:
            warn("Already unmerged. Nothing to do.")
        for layer in self.mergeable_layers():
            if layer.merged_adapters:
                layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge for good and return the plain model: see `LayerTuner.merge_and_unload`."""
        with self._dequantized(adapter_names) if dequantize else nullcontext():
            self._merge(adapter_names, safe_merge, undoable=False, progress=progressbar)
        plain = self.unload()
        if dequantize and not any(map(holds_codes, plain.modules())):
            unmark(plain)
        return plain

    @contextmanager
    def _dequantized(self, adapter_names: list[str] | None) -> Iterator[None]:
        """Hold packed weights of the layers of these adapters as plain tensors; as before if the block raises."""
        done = self.merged_adapters
        wanted = self.active_adapters if adapter_names is None else several(adapter_names, "adapter_names")
        layers = [layer for layer in self.mergeable_layers() if not layer.methods.keys().isdisjoint([*done, *wanted])]
        packed = [(layer, layer.store) for layer in layers if isinstance(layer.store, Quantized)]
        for layer, store in packed:
            if (why := store.unread(layer.base_layer)) is not None:
                raise NotImplementedError(f"Cannot dequantize layer '{layer.site.key}': {why}.")
        if done:
            self.unmerge_adapter()
        before = [(layer, layer.base_layer, layer.op, store) for layer, store in packed]
        dtype = dtype_beside(survey(self.model).owners)
        try:
            for layer, store in packed:
                plain = store.dense(layer.base_layer, dtype)
                layer.move(plain, find_op(plain), DENSE)
            if done:
                self._merge(done, False, undoable=True)
            yield
        except BaseException:
            if self.merged_adapters:
                self.unmerge_adapter()
            for layer, *held in before:
                layer.move(*held)
            if done:
                self._merge(done, False, undoable=True)
            raise

    def unload(self) -> nn.Module:
        """Return the model without adapter layers, of which the parameters train that did before the first adapter.

        Modules in `modules_to_save` keep the active adapter's values, also while adapters are disabled. A base that had
        adapters before this registry was made stays frozen.
        """
        survey_places(self.model, self._restore)
        self.layers, self.wrappers = {}, {}
        if "peft_config" in self.model.__dict__:
            del self.model.peft_config
        retie(self.model)
        if self.frozen_before is not None:
            for name, p in self.model.named_parameters(remove_duplicate=False):
                if p.is_floating_point():
                    p.requires_grad_(name not in self.frozen_before)
        return self.model

    def _restore(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        carrier = carrier_of(child)
        if carrier is not None:
            parent._modules[name] = innermost(child) if nest_of(child) else carrier.kept

    def _keys_in(self, state_dict: dict[str, Tensor], config: Any) -> set[str]:
        mark = f".{self.method_for(config).prefix}"
        return {original(k.rsplit(mark, 1)[0].replace("_orig_mod.", "")) for k in state_dict if mark in k}


def survey_places(model: nn.Module, act: Any) -> None:
    """Call `act(parent, name, child)` once for every module that is not inside a layer or wrapper.

    Modules inside one whose parameters are adapted are not inside a layer.
    """
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            act(module, name, child)
            if nest_of(child):
                child = innermost(child)
            if id(child) in seen or carrier_of(child) is not None:
                continue
            seen.add(id(child))
            visit(child)

    visit(model)


def retie(model: Any) -> None:
    """Tie the embeddings of a tied model again after merging, or say in its config that they now differ."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or inputs is None or inputs.weight is outputs.weight or inputs.weight.is_meta:
        return
    if torch.equal(inputs.weight, outputs.weight):
        outputs.weight = inputs.weight
        return
    warn("Setting `config.tie_word_embeddings` to False: merging gave the tied embeddings different weights.")
    config.tie_word_embeddings = False
