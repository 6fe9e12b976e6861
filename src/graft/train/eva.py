# SPDX-License-Identifier: Apache-2.0
"""EVA (arXiv 2410.07170): A begins with principal components of the layers' inputs, and ranks are distributed by their
variance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft import AdapterLayer, CalibrationError, ConfigError, PeftWarning
from graft.core.errors import join_some, warn
from graft.inject.parts import check_no_pieces, get_registry, use_mode
from graft.inject.survey import survey_model
from graft.train.calibration import check_measured, check_ranks, find_linear_methods, watch_calls
from graft.train.components import Components, distribute_ranks
from graft.train.helpers import move_tensors


def forward_fn_dict(model: nn.Module, inputs: Any) -> object:
    """Return the model's output for a batch of keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: object, peft_config: Any) -> Tensor:
    """Return the positions, (n, 2), of tokens that count.

    These are all of `input_ids`, or those of a given `attention_mask`. With `use_label_mask`, tokens with the label
    `label_mask_value` do not count, if the labels have the mask's shape.

    Raises:
        TypeError: the inputs are no dictionary.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(
            "When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary, got "
            f"{type(model_input).__name__}. Pass another prepare_model_inputs_fn, or None."
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    cfg = peft_config.eva_config
    labels = model_input.get("labels") if cfg.use_label_mask else None
    if labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != cfg.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: object, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the rows (n, in) of a layer's input, or of its first item, at the positions `model_input` (n, 2).

    Raises TypeError if the input is no tensor.
    """
    return get_first_tensor(layer_input, layer_name)[model_input.T.unbind()]


def flatten_rows(layer_input: object, model_input: object, layer_name: str) -> Tensor:
    """Return all rows (n, in) of a layer's input (…, in), or of its first item.

    Raises TypeError if that is no tensor.
    """
    return get_first_tensor(layer_input, layer_name).flatten(0, -2)


def get_first_tensor(layer_input: object, layer_name: str) -> Tensor:
    """Return the input, or the first item of a tuple or list.

    Raises TypeError, with the layer's name, if it is no tensor.
    """
    value = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(value, Tensor):
        raise TypeError(
            f"unsupported input type {type(value)} for prepare_layer_inputs_fn in layer {layer_name}, please provide a "
            "custom prepare_layer_inputs_fn"
        )
    return value


MAX_RHO = 1000
MAX_PASSES = 100


@dataclass
class InputMeasurement:
    """One measurement of the inputs of a model's layers, by name in the model.

    Attributes:
        ranks: by layer, as the config has them.
        device: of the model's inputs; None: they stay where they are.
        cfg: the LoraConfig.
        forward_fn, prepare_model, prepare_layer: as of `get_eva_state_dict`.
        gather: use the inputs of all processes.
        progress: show a bar.
    """

    model: nn.Module
    layers: dict[str, nn.Module]  # by name in the model
    ranks: dict[str, int]  # by layer, as the config has them
    device: torch.device | None  # of the model's inputs
    cfg: Any  # LoraConfig
    dataloader: Iterable[object]
    forward_fn: Callable[[nn.Module, object], object]
    prepare_model: Callable[[object, object], object] | None
    prepare_layer: Any  # function, {layer name: function}, or None
    gather: bool
    progress: bool

    def iterate_batches(self) -> Iterator[tuple[object, object]]:
        """Yield (batch on the model's device, result of `prepare_model`) for one pass through the data.

        `prepare_model` gets the batch and the config; without it the second is a deep copy of the batch.

        A batch is not moved if the device is None or meta.
        """
        device = None if self.device is None or self.device.type == "meta" else self.device
        for batch in self.dataloader:
            inputs = batch if device is None else move_tensors(batch, lambda t: t.to(device))
            prepared = copy.deepcopy(inputs) if self.prepare_model is None else self.prepare_model(inputs, self.cfg)
            yield inputs, prepared

    def run(self, batch: tuple[object, object], names: Iterable[str], see: Callable[[str, Tensor], object]) -> None:
        """Run `forward_fn` on the model and a batch, and call `see` with the name and the input rows of each named
        layer, at each of its calls. Rows are made by `prepare_layer`, or `flatten_rows` where it has none. With
        `gather` and torch.distributed initialized they are those of all processes.

        `batch` holds the model's inputs and the second argument of `prepare_layer`. Hooks are removed afterwards.

        Raises:
            CalibrationError: inputs are not finite.
        """
        inputs, prepared = batch

        def see_input(name: str, args: object, output: object) -> None:
            """Call `see` with the rows of a layer's input: the result of `prepare_layer`, or its function for `name`,
            else of `flatten_rows`.

            With `gather`, and torch.distributed initialized, the rows are those of all processes. Raises
            CalibrationError if they are not finite.
            """
            prepare = self.prepare_layer
            prepare = (prepare.get(name) if isinstance(prepare, Mapping) else prepare) or flatten_rows
            rows = prepare(args, prepared, name)
            if self.gather and dist.is_initialized():
                rows = gather_from_processes(rows)
            if not rows.isfinite().all():
                raise CalibrationError(f"The inputs of layer '{name}' are not finite. Check the data.")
            see(name, rows)

        with watch_calls({name: self.layers[name] for name in names}, see_input):
            self.forward_fn(self.model, inputs)

    def compute_components(self) -> dict[str, Tensor]:
        """Return by layer the first principal components of its inputs, (rank, in), with the ranks that EVA
        distributes; a rank may be 0. With `whiten` each is divided by the square root of its singular value.

        Layers with equal inputs in the first batch, such as q and k, share one computation, for the largest of their
        ranks. The first batch runs once more for that comparison.

        Raises:
            CalibrationError: no data, a layer without inputs, or as `converge`.
            ConfigError: a rank is above the width of a layer's inputs.
        """
        first = next(self.iterate_batches(), None)
        if first is None:
            raise CalibrationError("dataloader is empty, and EVA measures inputs of batches. Pass some batches.")
        seen: dict[str, tuple[tuple[object, ...], int]] = {}
        self.run(first, self.layers, lambda name, rows: seen.setdefault(name, (digest_rows(rows), rows.shape[1])))
        check_measured(self.layers, seen, "input")
        most = self.find_largest_ranks({name: width for name, (_, width) in seen.items()})
        owners: dict[tuple[object, ...], str] = {}
        owner = {name: owners.setdefault(seen[name][0], name) for name in self.layers}
        for name, source in owner.items():
            most[source] = max(most[source], most[name])
        most = {name: most[source] for name, source in owner.items()}
        inputs = {source: Components(most[source], self.cfg.eva_config.tau) for source in owners.values()}
        ranks = self.converge(inputs, owner, most)
        state_dict = {}
        for name, rank in ranks.items():
            components = inputs[owner[name]]
            state_dict[name] = components.V[:rank].clone()
            if self.cfg.eva_config.whiten:
                state_dict[name] /= components.S[:rank, None].sqrt()
        return state_dict

    def find_largest_ranks(self, widths: dict[str, int]) -> dict[str, int]:
        """Return by layer the largest rank it can get: r · rho rounded, at most the width of its inputs.

        A rho above 1000 becomes at most the largest dimension of a parameter over the config's r, rounded down.

        Raises:
            ConfigError: a layer's rank is above the width of its inputs.
        """
        rho = self.cfg.eva_config.rho
        if rho > MAX_RHO:
            rho = min(rho, max(max(p.shape, default=1) for p in self.model.parameters()) // self.cfg.r)
        check_ranks({name: (r, widths[name]) for name, r in self.ranks.items()}, "inputs have {} components")
        return {name: min(round(r * rho), widths[name]) for name, r in self.ranks.items()}

    def converge(self, inputs: dict[str, Components], owner: dict[str, str], most: dict[str, int]) -> dict[str, int]:
        """Add batches to the components until those within the ranks have converged; return the rank of each layer.

        Only inputs that have not converged get rows. After each batch, once all inputs have rows, the ranks are
        distributed again, with the sum of `self.ranks` as the budget. Batches with fewer rows than a layer has
        components are skipped for it. Shows a bar with `progress`, in the first process.

        Args:
            inputs: components by the first layer with this input; changed in place.
            owner: layer → that first layer.
            most: largest rank by layer.

        Raises:
            CalibrationError: for one input all batches of the first pass are too small, or components still change
                after `MAX_PASSES` passes.
        """
        from tqdm import tqdm

        budget, ranks = sum(self.ranks.values()), dict(most)
        largest: dict[str, int] = dict.fromkeys(inputs, 0)
        hidden = not self.progress or (dist.is_initialized() and dist.get_rank() > 0)

        def add_rows(name: str, rows: Tensor) -> None:
            """Add a layer's rows to its components, if they are as many as the components.

            Notes the largest number of rows.
            """
            largest[name] = max(largest[name], len(rows))
            if len(rows) >= inputs[name].n:
                inputs[name].add(rows)

        def list_turning() -> list[str]:
            """Return the names of inputs without rows so far, or with a component within the rank that has not
            converged.
            """
            return [name for name, c in inputs.items() if not c.rows or not c.converged[: ranks[name]].all()]

        with tqdm(leave=False, disable=hidden) as bar:
            for _ in range(MAX_PASSES):
                for batch in self.iterate_batches():
                    turning = list_turning()
                    bar.set_description(f"{len(inputs) - len(turning)}/{len(inputs)} inputs have converged")
                    bar.update()
                    if not turning:
                        return ranks
                    self.run(batch, turning, add_rows)
                    if all(c.rows for c in inputs.values()):
                        ranks = distribute_ranks(inputs, owner, most, budget)
                short = {name: c.n for name, c in inputs.items() if not c.rows}
                if short:
                    lines = [
                        f"{name} ({n} rows needed, at most {largest[name]} in a batch)" for name, n in short.items()
                    ]
                    raise CalibrationError(
                        f"There are too few samples in a batch for {len(short)} layers: {join_some(lines)}. Use larger "
                        "batches, a smaller r or a smaller rho."
                    )
        if not list_turning():
            return ranks
        raise CalibrationError(
            f"Components of {len(list_turning())} layers still turn after {MAX_PASSES} passes through the data: "
            f"{join_some(list_turning())}. Use more data, or a smaller tau than {self.cfg.eva_config.tau}."
        )


def gather_from_processes(rows: Tensor) -> Tensor:
    """Return the rows of all processes, concatenated by rank.

    They may have different numbers of rows; all processes must call this.
    """
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    numbers = [int(n) for n in sizes]
    padded = rows.new_zeros(max(numbers), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, numbers)])


def digest_rows(rows: Tensor) -> tuple[object, ...]:
    """Return a tuple to compare tensors by: the sizes, the dtype, and as ints the sum of all numbers' bits with weights
    by place, and without. Numbers have up to 8 bytes.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    words = rows.detach().contiguous().view(whole).flatten().long()
    places = torch.arange(len(words), device=words.device) * 0x9E3779B97F4A7C1 + 1
    return (*rows.shape, rows.dtype, int((words * places).sum()), int(words.sum()))


def set_eva_values(registry: Any, adapter: str, values: dict[str, Tensor]) -> None:
    """Set A of an adapter's layers, with its rank, and describe the result in the config: target_modules, rank_pattern
    and alpha_pattern.

    A layer with values of rank 0 loses the adapter; without another adapter its base layer is put back in all places.
    A layer without values keeps its rank and begins as with init_lora_weights=True, with a warning. With
    `adjust_scaling_factors` alpha changes with the rank.

    Raises:
        CalibrationError: the values do not fit. Nothing has changed.
    """
    layers = {key: layer for key, layer in registry.layers.items() if adapter in layer.methods}
    check_eva_values(adapter, layers, values)
    cfg: Any = registry.peft_config[adapter]
    tree = survey_model(registry.model)
    by_key, missing = {}, [key for key in layers if key not in values]
    for key, layer in layers.items():
        A, settings = values.get(key), cfg.at(key)
        r, alpha = settings.r if A is None else len(A), settings.lora_alpha
        if not r:
            layer.forget(adapter)
            if not layer.methods:  # no other adapter is on it
                tree.attach(key, layer.base_layer)
                del registry.layers[key]
            continue
        if A is not None and cfg.eva_config.adjust_scaling_factors:
            alpha *= r / settings.r
        set_layer_start(layer, adapter, r, alpha, A)
        by_key[key] = (r, alpha)
    cfg.target_modules = registry.name_targets(by_key)
    cfg.rank_pattern = {key: r for key, (r, _) in by_key.items() if r != cfg.r}
    cfg.alpha_pattern = {key: alpha for key, (_, alpha) in by_key.items() if alpha != cfg.lora_alpha}
    if missing:
        warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {join_some(missing)}",
            PeftWarning,
        )


def check_eva_values(adapter: str, layers: dict[str, AdapterLayer], values: dict[str, Tensor]) -> None:
    """Raise CalibrationError unless each value is for a layer of the adapter, (rank, in) and finite, and at least one
    layer has a rank above 0. Layers may lack a value.
    """
    unknown = sorted(values.keys() - layers.keys())
    if unknown:
        raise CalibrationError(
            f"eva_state_dict has values for {join_some(unknown)}, where adapter '{adapter}' is not. Leave them out."
        )
    for key, A in values.items():
        wanted = layers[key].fan_in
        if A.dim() != 2 or A.shape[1] != wanted or not A.isfinite().all():
            raise CalibrationError(
                f"eva_state_dict['{key}'] has shape {tuple(A.shape)}, expected is (rank, {wanted}) of finite numbers."
            )
    if not any(len(A) for A in values.values()):
        raise CalibrationError(f"eva_state_dict gives no layer of adapter '{adapter}' a rank. Measure it again.")


def set_layer_start(layer: AdapterLayer, adapter: str, r: int, alpha: float, A: Tensor | None) -> None:
    """Copy A into an adapter on one layer.

    If the rank differs, the tensors are on meta, or A is None, first replace its method by a new one with rank and
    alpha.

    New parameters have the dtype, device and `requires_grad` of the old ones. Without A, they keep the default start.
    The order of the layer's adapters stays.
    """
    method = layer.methods[adapter]
    now = method.lora_A.weight
    if A is None or r != method.cfg.r or now.is_meta:
        cfg = copy.copy(method.cfg)
        cfg.r, cfg.lora_alpha = r, alpha
        names, upcast = list(layer.methods), now.dtype != layer.where[1]
        layer.drop(adapter)
        new_method = type(method)(layer.site, cfg, adapter)
        layer.add(new_method, new_method.build({}))
        layer.methods.update({name: layer.methods.pop(name) for name in names})  # in the order that they had
        new_method.init_values()
        layer.place_adapter(adapter, layer.where, upcast)
        layer.require_grad(adapter, adapter in layer.state.trainable)
        layer.refresh_plan()
        method = new_method
    if A is not None:
        method.lora_A.weight.data.copy_(A)


PREFIX = "base_model.model."


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[object],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, object], object] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[object, object], object] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: object = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return {layer name: first principal components of its inputs, (rank, in)}, with the ranks that EVA distributes.

    Layers are the linear ones of the adapter, named with the prefix "base_model.model." in a PeftModel. The model runs
    in eval mode and without adapters meanwhile. With several processes and `gather_distributed_inputs`, warn that all
    inputs are gathered.

    Args:
        model: a PeftModel or a base model.
        dataloader: batches, read from the start again until the components have converged.
        peft_config: the LoraConfig; needed for a base model.
        forward_fn: (model, batch) → runs the model.
        prepare_model_inputs_fn: (batch, config) → the second argument of the next one; None: the batch.
        prepare_layer_inputs_fn: (a layer's positional arguments, the former's result, name) → rows (n, in); None: all
            rows of the first argument; a dict by layer name.
        gather_distributed_inputs: use the inputs of all processes, which then find the same components.

    Raises:
        CalibrationError: no data, batches that are too small, or layers without inputs (named).
        ConfigError: a rank is above the width of a layer's inputs; there is no config; `prepare_layer_inputs_fn` names
            an unknown layer.
        AdapterNotFoundError: a PeftModel has no such adapter.
        UnsupportedLayerError: this process has only a piece of a layer.
    """
    registry = get_registry(model)
    if registry is not None:
        registry.check_known([adapter_name])
        peft_config = registry.peft_config[adapter_name] if peft_config is None else peft_config
        prefix = next(name for name, m in model.named_modules() if m is registry.model) + "."
        with_adapter = {key: layer for key, layer in registry.layers.items() if adapter_name in layer.methods}
        check_no_pieces(((key, layer.site) for key, layer in with_adapter.items()), "EVA measures inputs")
        layers: dict[str, nn.Module] = {f"{prefix}{key}": m for key, m in with_adapter.items() if m.op.linear}
        ranks = {f"{prefix}{key}": peft_config.at(key).r for key, m in with_adapter.items() if m.op.linear}
        device = next((m.where[0] for m in with_adapter.values()), None)
    elif peft_config is None:
        raise ConfigError("peft_config is required if model is not a PeftModel")
    else:
        methods = find_linear_methods(model, peft_config, "eva")
        layers = {key: m.site.module for key, m in methods.items()}
        ranks = {key: m.cfg.r for key, m in methods.items()}
        device = next(iter(methods.values())).site.weight.where()[0]
    if isinstance(prepare_layer_inputs_fn, Mapping) and (unknown := sorted({*prepare_layer_inputs_fn} - {*layers})):
        raise ConfigError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
            f"{join_some(unknown)}"
        )
    if dist.is_initialized() and gather_distributed_inputs:
        warn(
            "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore EVA initialization "
            "will gather tensors from all ranks. Ensure the model does not receive the same inputs on different ranks."
        )
    measure = InputMeasurement(
        model,
        layers,
        ranks,
        device,
        peft_config,
        dataloader,
        forward_fn,
        prepare_model_inputs_fn,
        prepare_layer_inputs_fn,
        gather_distributed_inputs,
        show_progress_bar,
    )
    with model.disable_adapter() if registry is not None else nullcontext(), use_mode(model, False):
        return measure.compute_components()


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[object] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, object], object] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[object, object], object] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: object = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Set the first values of an adapter with init_lora_weights="eva", and the ranks that EVA distributes.

    Waits until no call of the model runs.

    Layers that get no rank lose the adapter; the config then names the others. Parameters with a new rank are new
    objects: make the optimizer afterwards.

    Args:
        eva_state_dict: the result of `get_eva_state_dict`, instead of data. The other arguments are those of that
            function.

    Raises:
        ConfigError: the model is no PeftModel, the adapter has another initialisation, several adapters are active, or
            it is merged.
        AdapterNotFoundError: there is no such adapter.
        InUseError: calls of the model last longer than its `change_timeout`.
        CalibrationError: neither data nor a state dict, or one that does not fit. The model is as it was.
    """
    registry = get_registry(model)
    if registry is None:
        raise ConfigError("model must be a PeftModel")
    registry.check_known([adapter_name])
    cfg = registry.peft_config[adapter_name]
    if len(registry.active_adapters) > 1:
        raise ConfigError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if getattr(cfg, "init_lora_weights", None) != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if adapter_name in registry.merged_adapters:
        raise ConfigError(f"Adapter '{adapter_name}' is merged. Call unmerge_adapter() before this.")
    if eva_state_dict is None:
        if dataloader is None:
            raise CalibrationError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    with registry.call.gate.change(f"EVA's values of adapter '{adapter_name}'", (adapter_name,)):
        set_eva_values(registry, adapter_name, {name.removeprefix(PREFIX): A for name, A in eva_state_dict.items()})
