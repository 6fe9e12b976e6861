# SPDX-License-Identifier: Apache-2.0
"""Give an adapter that is in a model the values of another one, in place: compiled code goes on as it is."""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.checkpoint import files
from graft.checkpoint.files import Loaded
from graft.checkpoint.keys import Entry, entries, without_wrappers
from graft.checkpoint.state import Load, config_of, parts_of, renamed, some
from graft.config.base import HUB_KEYWORDS, PeftConfig
from graft.core.errors import AdapterKeyError, ConfigError, PeftWarning
from graft.core.layer import AdapterLayer
from graft.inject.inject import Parts, collector_paused
from graft.inject.survey import survey
from graft.methods.lora.init import changes_base

MUST_AGREE = ("use_rslora", "lora_dropout", "use_dora", "layer_replication")
RANK_DIM = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the values of a LoRA adapter by those of a saved one, whose ranks and targets may differ.

    Smaller ranks are padded with zeros, layers that the saved adapter does not have become zero. Larger ranks replace
    the tensors, and code that was compiled is compiled again: see `prepare_model_for_compiled_hotswap`. The adapter's
    config then describes what the model holds. If anything does not fit, nothing has changed.

    Args:
        model_name_or_path: folder or hub repository.
        adapter_name: the adapter in the model; the name stays.
        torch_device: accepted as in PEFT; values go to where the adapter is.
        **kwargs: `subfolder`, `key_mapping`, and what the hub takes (`revision`, `token`, …).

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        ConfigError: it is no LoRA adapter, it is merged, or the two need different code (dropout, DoRA, rsLoRA).
        AdapterKeyError: keys fit no layer of the adapter, or shapes differ in more than the rank.
        BaseModelMismatchError: the saved adapter was made for another architecture.
        CheckpointError: the folder holds no adapter, or its files are damaged.
    """
    where, subfolder = os.fspath(model_name_or_path), kwargs.get("subfolder")
    hub = {k: kwargs[k] for k in HUB_KEYWORDS if k in kwargs}
    config = PeftConfig.from_pretrained(where, subfolder=subfolder, **hub)
    loaded = files.load_weights(where, subfolder=subfolder, **hub)
    loaded.tensors = renamed(loaded.tensors, kwargs.get("key_mapping"))
    swap(model, loaded, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, from tensors. Their keys may be those of a file or of the model's state dict.

    Args:
        config: of the new adapter: it says the scaling.
        parameter_prefix: accepted as in PEFT; names follow from the structure.
    """
    swap(model, Loaded(dict(state_dict), "the given state dict"), adapter_name, config)


@dataclass
class Change:
    """What one layer will be like."""

    layer: AdapterLayer
    rank: int  # of the tensors in the model
    alpha: float
    scaling: float


@dataclass
class Plan:
    """What a swap will do. Nothing in it can fail but for lack of memory."""

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (parameter, value) of one shape
    zeros: list[Tensor] = field(default_factory=list)
    larger: list[tuple[Entry, Tensor]] = field(default_factory=list)  # values that need more room
    changes: list[Change] = field(default_factory=list)
    found: dict[str, AdapterLayer] = field(default_factory=dict)  # layers that the new adapter has
    wrong: list[str] = field(default_factory=list)


def swap(model: nn.Module, loaded: Loaded, adapter: str, config: Any) -> None:
    """Check everything, then write."""
    model = getattr(model, "_orig_mod", model)  # type: ignore[assignment]
    parts, _, base = parts_of(model, adapter)
    now = config_of(model, adapter)
    check_compatible(now or config, config)
    merged = [key for key, layer in parts.layers.items() if adapter in layer.merged_adapters]
    if merged:
        raise ConfigError(
            f"Cannot hot-swap adapter '{adapter}' because it is currently merged into the base weights of "
            f"{some(merged, 2)}: call unmerge_adapter() before."
        )
    with collector_paused():
        plan = plan_swap(parts, loaded, adapter, config)
    Load(base, config, adapter, loaded)._check_base(Parts(plan.found, {}))
    if plan.larger and any(isinstance(c.layer.scaling[adapter], Tensor) for c in plan.changes):
        rank = max(c.rank for c in plan.changes)
        text = f"Adapter '{adapter}' grows to rank {rank}, more than prepare_model_for_compiled_hotswap made room for: "
        warnings.warn(f"{text}compiled code will be compiled again.", PeftWarning, stacklevel=3)
    with torch.inference_mode(False), torch.no_grad():
        larger = [(entry, value.to(entry.tensor, copy=True)) for entry, value in plan.larger]
        for entry, value in larger:
            resize(entry, value)
        if plan.copies:
            torch._foreach_copy_([target for target, _ in plan.copies], [value for _, value in plan.copies])
        if plan.zeros:
            torch._foreach_zero_(plan.zeros)
        for change in plan.changes:
            rescale(change, adapter)
    if now is not None:
        model.peft_config[adapter] = described(now, plan.changes)  # type: ignore[union-attr,index,operator]


def check_compatible(now: Any, new: Any) -> None:
    """Raise unless an adapter of config `new` can run in the place of one of config `now`."""
    kinds = [getattr(c.peft_type, "value", c.peft_type) for c in (now, new)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
    if kinds[0] != "LORA":
        raise ConfigError(f"Hotswapping only supports LORA but {kinds[0]} was passed.")
    for name in MUST_AGREE:
        a, b = getattr(now, name), getattr(new, name)
        if a != b:
            raise ConfigError(f"Configs are incompatible: for {name}, {a} != {b}")
    for config, which in ((now, "in the model"), (new, "to be swapped in")):
        if changes_base(config.init_lora_weights):
            raise ConfigError(
                f"The adapter {which} belongs to base weights that init_lora_weights={config.init_lora_weights!r} "
                "changed, and others to the base as it was. Save it as plain LoRA, with "
                "path_initial_model_for_weight_conversion."
            )


def plan_swap(parts: Parts, loaded: Loaded, adapter: str, config: Any) -> Plan:
    """Find the value of every tensor of the adapter.

    Raises:
        AdapterKeyError: keys are left over, tensors are missing that cannot be zero, or shapes differ.
    """
    left = {without_wrappers(k): v for k, v in loaded.tensors.items()}
    prefix = parts.prefix if any(k.startswith("base_model.") for k in left) else ""
    held: dict[int, list[tuple[Entry, Tensor | None]]] = defaultdict(list)  # by layer; modules to save under 0
    for entry in entries(parts, adapter, prefix):
        value = left.pop(entry.file, None)
        if value is None:
            names = map(without_wrappers, (entry.memory, entry.file, *entry.also))
            value = next((left.pop(n) for n in names if n in left), None)
        held[0 if entry.layer is None else id(entry.layer)].append((entry, value))
    plan, missing = Plan(), []
    for pairs in held.values():
        absent = [entry for entry, value in pairs if value is None]
        if len(absent) == len(pairs) and all(entry.container in RANK_DIM for entry in absent):
            plan.zeros += [entry.tensor for entry in absent]
        else:
            missing += [without_wrappers(entry.file) for entry in absent]
        for entry, value in pairs:
            if value is not None:
                _take(plan, entry, value)
    for key, layer in parts.layers.items():
        _account(plan, layer, held[id(layer)], config.at(key))
    faults = [f"unexpected keys found: {', '.join(sorted(left))}"] if left else []
    faults += [f"missing keys: {some(missing)}"] if missing else []
    faults += [some(plan.wrong)] if plan.wrong else []
    if faults or not plan.found:
        raise AdapterKeyError(
            f"Hot swapping the adapter did not succeed, {'; '.join(faults) or 'it has no layer of this one'}. Adapter "
            f"'{adapter}' stays what it was; values from {loaded.path}."
        )
    return plan


def _take(plan: Plan, entry: Entry, value: Tensor) -> None:
    """Note what becomes of one tensor."""
    here, rank = entry.tensor, None
    if value.shape != here.shape and (rank := rank_of(entry, value)) is not None:
        value = at_rank(entry, value, max(rank_of(entry, here) or 0, rank))
    if here.is_meta:
        plan.wrong.append(f"{entry.file} is on the meta device, without values: load an adapter before swapping it")
    elif value.shape == here.shape:
        plan.copies.append((here, value))
    elif rank is not None and value.shape == at_rank(entry, here, rank).shape:
        plan.larger.append((entry, value))
    else:
        plan.wrong.append(f"{entry.file} has shape {tuple(value.shape)}, in the model {tuple(here.shape)}")


def _account(plan: Plan, layer: AdapterLayer, pairs: list[tuple[Entry, Tensor | None]], cfg: Any) -> None:
    """Note rank and scaling of one layer."""
    here = [(entry, value, room) for entry, value in pairs if (room := rank_of(entry, entry.tensor)) is not None]
    room = rank = here[0][2]
    if here[0][1] is not None:
        plan.found[layer.site.key] = layer
        rank = cfg.r
        for entry, value, _ in here:
            if value is not None and rank_of(entry, value) != rank:
                plan.wrong.append(f"{entry.file} has rank {rank_of(entry, value)}, its config says {rank}")
    held, scale = max(room, rank), math.sqrt if cfg.use_rslora else float
    alpha = cfg.lora_alpha if held == rank else cfg.lora_alpha * scale(held) / scale(rank)
    plan.changes.append(Change(layer, held, alpha, cfg.lora_alpha / scale(rank)))


def rank_of(entry: Entry, tensor: Tensor) -> int | None:
    """The rank of an adapter's A or B; None of other tensors."""
    dim, shape = RANK_DIM.get(entry.container), tensor.shape
    if dim is None or len(shape) < 2 or len(shape) != entry.tensor.dim():
        return None
    if len(shape) == 2:
        return shape[dim]
    groups = groups_of(entry)
    if dim:
        return shape[1] * groups
    return None if shape[0] % groups else shape[0]


def groups_of(entry: Entry) -> int:
    site = entry.layer.site  # type: ignore[union-attr]
    return site.in_features // site.shape[1] if len(site.shape) > 2 else 1


def at_rank(entry: Entry, tensor: Tensor, rank: int) -> Tensor:
    """A or B with zeros up to a larger rank; of grouped convolutions, at the end of each group."""
    dim, groups = RANK_DIM[entry.container], groups_of(entry)
    if rank == rank_of(entry, tensor):
        return tensor
    if dim == 0 and groups > 1:
        return padded(tensor.view(groups, -1, *tensor.shape[1:]), rank // groups, 1).flatten(0, 1)
    return padded(tensor, rank // groups if dim else rank, dim)


def padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    made = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    made.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return made


def resize(entry: Entry, value: Tensor) -> None:
    """Replace A or B by one of another rank; the Parameter object stays."""
    p: Any = entry.owner._parameters[entry.attribute]
    p.data, p.grad = value, None
    for name in ("in_features", "in_channels") if RANK_DIM[entry.container] else ("out_features", "out_channels"):
        if hasattr(entry.owner, name):
            setattr(entry.owner, name, rank_of(entry, value))


def rescale(change: Change, adapter: str) -> None:
    """Set what a layer knows of its adapter's rank and scaling; a scaling that is a tensor is filled."""
    layer: Any = change.layer
    layer.r[adapter], layer.lora_alpha[adapter] = change.rank, change.alpha
    for scalings in (layer.scaling, layer._scaling_at_start):
        if isinstance(scalings[adapter], Tensor):
            scalings[adapter].fill_(change.scaling)
        else:
            scalings[adapter] = change.scaling


def described(config: Any, changes: list[Change]) -> Any:
    """A copy of `config` that says what the layers hold, so that saving it saves the adapter that runs."""
    made = copy.copy(config)
    made.r, made.rank_pattern = usual({c.layer.site.key: c.rank for c in changes})
    made.lora_alpha, made.alpha_pattern = usual({c.layer.site.key: c.alpha for c in changes})
    return made


def usual(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and a pattern for every layer that has another one."""
    most = Counter(values.values()).most_common(1)[0][0]
    others = sorted((key for key, value in values.items() if value != most), key=len, reverse=True)
    return most, {re.escape(key): values[key] for key in others}


# before compiling


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for what is to be swapped in, so that code which is compiled afterwards need not be compiled again.

    Scalings become tensors, and A and B are padded with zeros. Outputs stay the same. Call it when the first adapter
    is there and the model is not compiled yet.

    Args:
        target_rank: the largest rank that will come; None leaves the ranks.
        config: a LoraConfig or a dict of them, whose ranks become `target_rank`. Those in the model always do.
        check_compiled: what to do if the model is compiled already.

    Raises:
        ConfigError: there is no LoRA adapter, one has a larger rank, or the model is compiled. Nothing has changed.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )
    if check_compiled != "ignore" and is_compiled(model):
        if check_compiled == "error":
            raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model.")
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will be compiled "
            "again. Call the function before compiling the model.",
            PeftWarning,
            stacklevel=2,
        )
    model = getattr(model, "_orig_mod", model)  # type: ignore[assignment]
    on: dict[str, dict[str, AdapterLayer]] = defaultdict(dict)  # layers by adapter
    for key, layer in survey(model).layers.items():
        if layer.method.config.peft_type == "LORA":
            for name in layer.methods:
                on[name][key] = layer
    if not on:
        raise ConfigError(
            "No adapter layers found on the model, make sure to call `prepare_model_for_compiled_hotswap` after "
            "loading the first LoRA adapter and before loading the second."
        )
    with torch.inference_mode(False), torch.no_grad():
        larger = [
            item
            for name, layers in on.items()
            for entry in entries(Parts(layers, {}), name, "")
            if target_rank is not None and (item := make_room(entry, target_rank)) is not None
        ]
        for entry, value in larger:
            resize(entry, value)
        for name, layers in on.items():
            changes = [prepare(layer, name, target_rank) for layer in layers.values()]
            if (known := config_of(model, name)) is not None:
                model.peft_config[name] = described(known, changes)  # type: ignore[union-attr,index,operator]
    if target_rank is not None:
        for given in config.values() if isinstance(config, dict) else [config] if config is not None else []:
            given.r, given.rank_pattern = target_rank, dict.fromkeys(given.rank_pattern or (), target_rank)


def is_compiled(model: nn.Module) -> bool:
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())


def make_room(entry: Entry, rank: int) -> tuple[Entry, Tensor] | None:
    """An A or B at a larger rank; None for other tensors."""
    before = rank_of(entry, entry.tensor)
    if before is None:
        return None
    if before > rank:
        raise ConfigError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({before}). Layer "
            f"'{entry.layer.site.key}'."  # type: ignore[union-attr]
        )
    if rank % groups_of(entry):
        raise ConfigError(
            f"Trying to pad a convolution with groups={groups_of(entry)} to target rank {rank}, which is no multiple "
            f"of that. Layer '{entry.layer.site.key}'."  # type: ignore[union-attr]
        )
    return entry, at_rank(entry, entry.tensor, rank)


def prepare(layer: Any, adapter: str, rank: int | None) -> Change:
    """Turn an adapter's scaling on a layer into a tensor, and note its rank."""
    before, rank = layer.r[adapter], rank or layer.r[adapter]
    scale = math.sqrt if layer.use_rslora[adapter] else float
    alpha = layer.lora_alpha[adapter] * (1 if rank == before else scale(rank) / scale(before))
    layer.r[adapter], layer.lora_alpha[adapter] = rank, alpha
    device = layer.methods[adapter].pair[0].device
    for scalings in (layer.scaling, layer._scaling_at_start):
        scalings[adapter] = torch.as_tensor(float(scalings[adapter]), device=device)
    return Change(layer, rank, alpha, float(layer.scaling[adapter]))
