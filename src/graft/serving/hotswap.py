# SPDX-License-Identifier: Apache-2.0
"""Give a model's adapter the values of another one, in place; and make room for larger ones before a model is
compiled.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from graft import AdapterKeyError, AdapterLayer, ConfigError, LoraConfig, PeftWarning, method_of
from graft.core.errors import join_some, warn, warn_unknown
from graft.inject.parts import (
    AdapterCarriers,
    find_carriers,
    find_gate,
    get_config,
    get_gate,
    get_registry,
    pause_collector,
    unwrap_model,
)
from graft.io.files import READING, LoadedWeights, read_checkpoint
from graft.io.load import CheckpointValues
from graft.storage.parallel import find_whole_shape, layout_of, strip_inner_wrappers, write_all_whole

if TYPE_CHECKING:
    from graft import Method

T = TypeVar("T")
MUST_AGREE = (
    "use_rslora", "lora_dropout", "use_dora", "use_qalora", "alora_invocation_tokens", "velora_config",
    "monteclora_config", "layer_replication", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
OPTIONS = {"key_mapping", "allow_nonfinite"}
RANK_DIM = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
SIZES = (("out_features", "out_channels"), ("in_features", "in_channels"))  # attributes of A and of B with the rank


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the values of a LoRA adapter by those of a saved one. Its ranks and targets may differ.

    Zeros fill up smaller ranks, and layers that the saved adapter does not target. Larger ranks replace the tensors,
    and torch compiles the model again: see `prepare_model_for_compiled_hotswap`. The adapter's config then describes
    the tensors in the model. If anything does not fit, nothing changes: it checks first, then waits until no call of
    the model runs, and writes. Unknown options give a warning.

    Args:
        model_name_or_path: folder or hub repository.
        adapter_name: the adapter in the model; the name stays.
        torch_device: accepted as in PEFT; values go to the adapter's device.
        **kwargs: `subfolder`, `key_mapping`, `allow_nonfinite` (let NaN and infinite numbers pass), `check_digest`
            (False: load a file even if its tensors were changed after saving), `expert_layout` (see
            `PeftModel.from_pretrained`), and options of the hub (`revision`, `token`, …).

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        ConfigError: it is no LoRA adapter, it is merged, or the two need different code (dropout, DoRA, rsLoRA).
        AdapterKeyError: keys fit no layer of the adapter or are missing, or shapes differ in more than the rank.
        BaseModelMismatchError: the saved adapter was made for another architecture.
        CheckpointError: the folder holds no adapter, or its files are damaged.
        InUseError: calls of the model last longer than its `change_timeout`.
    """
    warn_unknown(hotswap_adapter, kwargs, OPTIONS | READING)
    config: Any
    config, loaded = read_checkpoint(model_name_or_path, kwargs, lambda _: None)
    swap_values(model, loaded, adapter_name, config, **{k: kwargs[k] for k in OPTIONS if k in kwargs})


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the values of a LoRA adapter by those of a state dict.

    Keys may be those of a file or of the model's state dict.

    All else, and the errors, are as of `hotswap_adapter`.

    Args:
        config: the new adapter's, for its scaling and targets.
        parameter_prefix: accepted as in PEFT; names follow from the structure.
    """
    swap_values(model, LoadedWeights.from_state_dict(state_dict), adapter_name, config)


class LayerChange(NamedTuple):
    """The rank, alpha and scaling that a layer will have for its adapter.

    `rank` is that of the tensors in the model.
    """

    layer: AdapterLayer
    rank: int  # rank of the tensors in the model
    alpha: float
    scaling: float

    @classmethod
    def make(cls, layer: AdapterLayer, r: int, alpha: float, rslora: bool, rank: int) -> LayerChange:
        """Return the change for an adapter of rank r in tensors of `rank` ≥ r.

        Alpha grows with the rank, by rank / r or with `rslora` by its square root, so that the scaling stays that of
        rank r: alpha / r, or alpha / √r.
        """
        scale = math.sqrt if rslora else float
        return cls(layer, rank, alpha if r == rank else alpha * scale(rank) / scale(r), alpha / scale(r))

    def write(self, adapter: str, change_scaling: Callable[[Any], object]) -> None:
        """Set the adapter's rank and alpha on the layer, and replace its scalings, of now and of the start, each by the
        result of `change_scaling` for it.
        """
        scalings = {key: change_scaling(vars(self.layer)[key][adapter]) for key in ("scaling", "scaling_at_start")}
        self.layer.set_facts(adapter, r=self.rank, lora_alpha=self.alpha, **scalings)


@dataclass
class SwapPlan:
    """Everything that a swap will write. Only a lack of memory can make it fail.

    Attributes:
        copies: (parameter, value) of one shape.
        zeros: parameters that become zero.
        larger: (entry, value, rank) of values that need larger tensors.
        changes: ranks and scalings of layers.
        layers_found: layers of the new adapter, by path.
        missing, wrong: names and texts of faults.
    """

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (parameter, value) of one shape
    zeros: list[Tensor] = field(default_factory=list)
    larger: list[tuple[Any, Tensor, int]] = field(default_factory=list)  # (…, value, rank): larger values
    changes: list[LayerChange] = field(default_factory=list)
    layers_found: dict[str, AdapterLayer] = field(default_factory=dict)  # layers of the new adapter
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def swap_values(model: nn.Module, loaded: LoadedWeights, adapter: str, config: LoraConfig, **options: object) -> None:
    """Check everything by `prepare_swap`, then write the values, and let the model's registry, if there is one, note
    that there are others.

    No other change of the model runs meanwhile. Calls run on during the checks; the writing waits until none runs, or
    raises InUseError.
    """
    model = unwrap_model(model)
    gate = get_gate(model)
    with gate.change(f"hotswap_adapter({adapter!r})", (), late=True):
        write_values = prepare_swap(model, loaded, adapter, config, **options)
        with gate.change("hotswap", (adapter,)):
            write_values()
            if (registry := get_registry(model)) is not None:
                registry.note_values()


def prepare_swap(
    model: nn.Module, loaded: LoadedWeights, adapter: str, config: LoraConfig, **options: Any
) -> Callable[[], None]:
    """Check that the loaded adapter can replace adapter `adapter`, and return the function that writes it.

    Nothing changes yet; the garbage collector is paused while the plan is made. The base is compared for the layers in
    the file only. Without a config of the adapter on the model, `config` is checked alone.

    Raises:
        ConfigError: the configs are incompatible, the adapter is merged on a layer, or a higher rank is not possible.
        AdapterNotFoundError, AdapterKeyError, BaseModelMismatchError: as `hotswap_adapter`.
    """
    parts, _, base, now = find_carriers(model, adapter)
    check_compatible(now or config, config)
    merged = [key for key, layer in parts.layers.items() if adapter in layer.merged_adapters]
    if merged:
        raise ConfigError(
            f"Cannot hot-swap adapter '{adapter}' because it is currently merged into the base weights. Please unmerge "
            f"the adapter first, with unmerge_adapter(). It is merged on {join_some(merged, 2)}."
        )
    load = CheckpointValues(base, config, adapter, loaded, **options)
    with pause_collector():
        plan = plan_swap(load, parts)
    load.check_base(AdapterCarriers(plan.layers_found, {}))
    if plan.larger:
        check_growth(plan, adapter, config)

    @torch.no_grad()
    def write_values() -> None:
        """Write all values, zeros, ranks and scalings of the plan, and update the adapter's config in `peft_config`, if
        there is one.

        Larger tensors replace those in the model; all others are overwritten in place, and so are scalings that are
        tensors.
        """
        with torch.inference_mode(False):
            replace_tensors([(entry, value.to(entry.tensor, copy=True), rank) for entry, value, rank in plan.larger])
            zeros = [(target, target.new_zeros(()).expand(find_whole_shape(target))) for target in plan.zeros]
            write_all_whole([*plan.copies, *zeros])
            for change in plan.changes:
                new = change.scaling
                change.write(adapter, lambda old, new=new: old.fill_(new) if isinstance(old, Tensor) else new)  # type: ignore[misc]
        if now is not None:
            model.peft_config[adapter] = update_config(now, plan.changes)

    return write_values


def check_compatible(now: LoraConfig, new: LoraConfig) -> None:
    """Raise ConfigError unless an adapter of config `new` can replace one of config `now`.

    Both have to be LoRA, equal in the fields `MUST_AGREE`, and each has to pass `check_start`: a start that leaves the
    base unchanged, and no block-diagonal factors (`use_bdlora`).
    """
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
        check_start(config, which)


def check_start(config: LoraConfig, which: str) -> None:
    """Raise ConfigError if an adapter's initialisation changes the base, which other adapters have unchanged, or if its
    factors are block-diagonal, so that its rank cannot change. which: describes the adapter in the text.
    """
    setting = method_of("LORA").variant(config).changes_base(config)
    if setting is not None:
        raise ConfigError(
            f"The adapter {which} belongs to base weights that {setting} changed, and others to the base as it was. "
            "PiSSA and OLoRA can be saved as plain LoRA, with path_initial_model_for_weight_conversion."
        )
    if config.use_bdlora is not None:
        raise ConfigError(
            f"The adapter {which} has block-diagonal factors (use_bdlora), which zeros cannot fill up to another rank. "
            "Load it with load_adapter()."
        )


def check_growth(plan: SwapPlan, adapter: str, config: LoraConfig) -> None:
    """Raise ConfigError if tensors that must grow are spread over processes, or tied, see `check_tied`.

    Warn with PeftWarning if a scaling of the plan's layers is a tensor: then they outgrow the room that was made for
    compiled code.
    """
    rank = max(rank for _, _, rank in plan.larger)
    if any(layout_of(entry.tensor) is not None for entry, _, _ in plan.larger):
        raise ConfigError(
            f"Adapter '{adapter}' would grow to rank {rank}, and its tensors are spread over processes. Swap before "
            "the model is wrapped, or make the adapter with that rank."
        )
    check_tied(adapter, config, rank)
    if any(isinstance(change.layer.scaling[adapter], Tensor) for change in plan.changes):
        text = f"Adapter '{adapter}' grows to rank {rank}, more than prepare_model_for_compiled_hotswap made room for: "
        warn(f"{text}compiled code will be compiled again.", PeftWarning)


def check_tied(adapter: str, config: LoraConfig, rank: int) -> None:
    """Raise ConfigError if the config ties layers (`ensure_weight_tying`), so that tensors cannot grow to `rank` in
    place.
    """
    if getattr(config, "ensure_weight_tying", False):
        raise ConfigError(
            f"Adapter '{adapter}' shares its memory between tied layers (ensure_weight_tying) and cannot grow to rank "
            f"{rank} in place. Load one of that rank with load_adapter()."
        )


def plan_swap(load: CheckpointValues, parts: AdapterCarriers) -> SwapPlan:
    """Return a plan with a value for every tensor of the adapter `load.adapter`. The model does not change.

    Values that fit are planned as copies, padded with zeros below the rank in the model; values of a higher rank as
    larger tensors. If the file has no tensor of a layer, and the new config does not target it, its factors are planned
    as zeros. Values left over are accepted if they are tensors of the base with equal values, as saved embeddings are.

    Raises:
        AdapterKeyError: values are left over, tensors are missing that cannot be zero, or the file has no layer of this
            adapter. Also if shapes or kinds of dtype (floating point or not) differ, or a tensor is on the meta device.
            One error names all faults.
    """
    plan = SwapPlan()
    prefix = parts.prefix if any(k.startswith("base_model.") for k in load.tensors) else ""
    load.arrange_stacks(parts, prefix)
    left = dict(load.tensors)
    for layer, group in load.group_entries(parts, prefix):
        pairs = [(entry, None if (name := find_name(left, entry)) is None else left.pop(name)) for entry in group]
        absent = [entry for entry, value in pairs if value is None]
        if layer is None or pairs[0][0].container not in RANK_DIM:  # modules to save, token rows
            _plan_values(plan, pairs)
            continue
        method: Method = layer.methods[load.adapter]
        file_tensors = {(entry.container, entry.path): value for entry, value in pairs if value is not None}
        values = method.from_file_tensors(file_tensors, load.config)  # a file may hold others than the model
        pairs = [(entry, None if value is None else values[entry.container, entry.path]) for entry, value in pairs]
        key, room = layer.site.key, layer.r[load.adapter]
        cfg: Any = load.config.at(method.config_path or key)
        if len(absent) < len(pairs):
            plan.layers_found[key] = layer
            plan.changes.append(LayerChange.make(layer, cfg.r, cfg.lora_alpha, cfg.use_rslora, max(room, cfg.r)))
            _plan_values(plan, pairs, room, cfg.r)
        elif load.matcher(key).outcome == "matched" or any(entry.container not in RANK_DIM for entry in absent):
            _plan_values(plan, pairs)
        else:
            plan.zeros += [entry.tensor for entry in absent]
            plan.changes.append(LayerChange.make(layer, room, cfg.lora_alpha, cfg.use_rslora, room))
    # a file holds embeddings with the adapters on them
    base = load.find_base_tensors(set(left), prefix, parts)[0] if left else {}
    differing = [name for name, p in base.items() if not torch.equal(p, left.pop(name).to(p))]
    plan.wrong += [f"{name} is not what the base model has" for name in differing]
    faults = [f"unexpected keys found: {join_some(sorted(left))[1:-1]}"] if left else []
    faults += [f"missing keys: {join_some(plan.missing)}"] if plan.missing else []
    faults += [join_some(plan.wrong)] if plan.wrong else []
    if faults or not plan.layers_found:
        raise AdapterKeyError(
            f"Hot swapping the adapter did not succeed, {'; '.join(faults) or 'it has no layer of this one'}. Adapter "
            f"'{load.adapter}' is unchanged; the values are from {load.path}. To keep both, call load_adapter() with "
            "another name."
        )
    return plan


def find_name(names: Collection[str], entry: Any) -> str | None:
    """Return the one of `names` that belongs to an entry: its name in a file, else the first of its names in the
    model's state dict, without those of inner wrappers. None if there is none.
    """
    if entry.file in names:
        return entry.file
    return next((n for n in map(strip_inner_wrappers, (entry.memory, *entry.also)) if n in names), None)


def _plan_values(plan: SwapPlan, pairs: list[tuple[Any, Tensor | None]], room: int = 0, r: int = 0) -> None:
    """Add to the plan the values of rank r for tensors of rank `room`.

    With r above `room` they go to `plan.larger`, where that changes the shape. All others go to `plan.copies`, padded
    with zeros if r is smaller. The defaults 0 mean tensors without a rank.

    A missing value is noted in `plan.missing`. One of another shape or kind of dtype (floating point or not), or for a
    tensor on the meta device, is noted in `plan.wrong`. Nothing is raised.
    """
    for entry, value in pairs:
        if value is None:
            plan.missing.append(entry.file)
            continue
        current = find_whole_shape(entry.tensor)
        shape = current if r == room else compute_shape(entry.layer, entry, r)
        if value.shape != shape:
            plan.wrong.append(f"{entry.file} has shape {tuple(value.shape)}, expected is {tuple(shape)}")
        elif value.is_floating_point() != entry.tensor.is_floating_point():
            plan.wrong.append(f"{entry.file} has dtype {value.dtype}, where {entry.tensor.dtype} is needed")
        elif entry.tensor.is_meta:
            plan.wrong.append(f"{entry.file} is on the meta device, without values: load an adapter before swapping it")
        elif r > room and shape != current:
            plan.larger.append((entry, value, r))
        else:
            plan.copies.append(
                (entry.tensor, value if shape == current else pad_to_rank(entry.layer, entry, value, room))
            )


# A and B at another rank


def compute_shape(layer: Any, slot: Any, r: int) -> torch.Size:
    """Return the shape that an adapter's tensor would have at rank r.

    A has r rows; B has r columns, divided by the groups of a convolution. Tensors without a rank, or of one dimension,
    keep their shape.
    """
    shape = list(find_whole_shape(slot.tensor))
    dim = RANK_DIM.get(slot.container)
    if dim is not None and len(shape) > 1:
        shape[dim] = r // layer.op.count_groups(layer.base_layer) if dim else r
    return torch.Size(shape)


def pad_to_rank(layer: Any, slot: Any, value: Tensor, r: int) -> Tensor:
    """Return A or B padded with zeros up to rank r; in A of grouped convolutions, at the end of each group."""
    out = value.new_zeros(compute_shape(layer, slot, r))
    inside, values = out, value
    if not RANK_DIM[slot.container]:
        inside, values = (t.unflatten(0, (layer.op.count_groups(layer.base_layer), -1)) for t in (out, value))
    inside.narrow(1, 0, values.shape[1]).copy_(values)
    return out


def replace_tensors(larger: list[tuple[Any, Tensor, int]]) -> None:
    """Replace A and B by tensors of another rank, and set the sizes of their modules where they have such attributes.

    Parameter objects stay: their `data` is the new tensor itself, their `grad` becomes None, and their version rises.
    Those of inference mode are replaced by new Parameters with the same `requires_grad`.
    """
    for entry, value, rank in larger:
        p: Any = entry.owner._parameters[entry.attribute]
        if p.is_inference():  # counts no versions, and no optimizer has it
            entry.owner._parameters[entry.attribute] = nn.Parameter(value, p.requires_grad)
        else:
            p.data, p.grad = value, None
            torch.autograd.graph.increment_version(p)  # caches of values computed from it see the change
        for name in SIZES[RANK_DIM[entry.container]]:
            if hasattr(entry.owner, name):
                setattr(entry.owner, name, rank)


def update_config(config: LoraConfig, changes: list[LayerChange]) -> LoraConfig:
    """Return a shallow copy of `config` with the ranks and alphas of the layers, so that a file describes the tensors
    in the model. `r` and `lora_alpha` become the most frequent ones, and both patterns are replaced by those of the
    other layers.
    """
    cfg = copy.copy(config)
    cfg.r, cfg.rank_pattern = find_most_common({c.layer.site.key: c.rank for c in changes})
    cfg.lora_alpha, cfg.alpha_pattern = find_most_common({c.layer.site.key: c.alpha for c in changes})
    return cfg


def find_most_common(values: dict[str, T]) -> tuple[T, dict[str, T]]:
    """Return the most frequent value, and the others by the pattern "^" and the escaped path of their layer.

    Of equally frequent values the first wins; there must be one.
    """
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {f"^{re.escape(key)}": value for key, value in values.items() if value != most}


# room for later adapters


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for larger adapters, so that a model compiled afterwards need not be compiled again.

    Turns scalings into tensors and pads A and B with zeros. Outputs stay the same. Call it with the first adapter on
    the model, before you compile the model.

    Args:
        target_rank: the largest rank of later adapters; None leaves the ranks.
        config: a LoraConfig or a dict of them; their `r` and the values of their `rank_pattern` become `target_rank`,
            as the ranks in the model do.
        check_compiled: raise, warn or do nothing if the model is compiled already.

    Raises:
        ConfigError: `check_compiled` is unknown, the model is compiled, there is no LoRA adapter, or one has changed
            the base or has block-diagonal factors. With `target_rank` also if one has a larger rank, is merged, or is
            tied and smaller, or if groups of a convolution do not divide the rank. Nothing has changed.
        InUseError: calls of the model last longer than its `change_timeout`.
    """
    find_gate(model)  # raises for an object that is no model, or has adapters of another package
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )
    if check_compiled != "ignore" and any(
        m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()
    ):
        if check_compiled == "error":
            raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model.")
        warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will be compiled "
            "again. Call the function before compiling the model.",
            PeftWarning,
        )
    model = unwrap_model(model)
    on: dict[str, dict[str, AdapterLayer]] = defaultdict(dict)  # layers by adapter
    for layer in (m for m in model.modules() if isinstance(m, AdapterLayer)):
        for name in (n for n, m in layer.methods.items() if isinstance(m, method_of("LORA"))):
            on[name][layer.site.key] = layer
    if not on:
        raise ConfigError(
            "No adapter layers found on the model, make sure to call `prepare_model_for_compiled_hotswap` after "
            "loading the first LoRA adapter and before loading the second."
        )
    patterns = {name: list(cfg.rank_pattern or ()) for name, cfg in list_configs(config).items()}
    for name, layers in on.items():
        check_start(next(iter(layers.values())).methods[name].cfg, f"'{name}'")
    with get_gate(model).change("prepare_model_for_compiled_hotswap()"), torch.inference_mode(False), torch.no_grad():
        if target_rank is not None:
            for name, layers in on.items():
                check_paddable(name, layers, target_rank, get_config(model, name))
            slots = [(layer, s) for name, layers in on.items() for layer in layers.values() for s in layer.slots(name)]
            larger = [(layer, s) for layer, s in slots if compute_shape(layer, s, target_rank) != s.tensor.shape]
            replace_tensors([(s, pad_to_rank(layer, s, s.tensor, target_rank), target_rank) for layer, s in larger])
        for name, layers in on.items():
            changes = [prepare_layer(layer, name, target_rank) for layer in layers.values()]
            if (known := get_config(model, name)) is not None:
                model.peft_config[name] = update_config(known, changes)
    if target_rank is not None:
        for name, cfg in list_configs(config).items():
            cfg.r, cfg.rank_pattern = target_rank, dict.fromkeys(patterns[name], target_rank)


def list_configs(config: LoraConfig | dict[str, LoraConfig] | None) -> dict[str, LoraConfig]:
    """Return by name the configs that a caller passes: a dict as it is, one under "", none for None."""
    return config if isinstance(config, dict) else {} if config is None else {"": config}


def check_paddable(adapter: str, layers: dict[str, AdapterLayer], rank: int, config: LoraConfig) -> None:
    """Raise ConfigError unless an adapter's tensors can be padded to a rank on all layers: no rank is larger, the
    number of groups of a convolution divides the new one, and the adapter is not merged. Where the rank is smaller,
    `check_tied` must pass, too.
    """
    for key, layer in layers.items():
        r, groups = layer.r[adapter], layer.op.count_groups(layer.base_layer)
        if r > rank:
            raise ConfigError(
                f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({r}). Adapter "
                f"'{adapter}', layer '{key}'."
            )
        if rank % groups:
            raise ConfigError(
                f"Trying to pad a {layer.site.type_name} LoRA adapter with groups={groups} to target rank {rank}, but "
                f"the target rank is not divisible by {groups}. Please choose a target rank that is divisible by "
                f"{groups}. Adapter '{adapter}', layer '{key}'."
            )
        if adapter in layer.merged_adapters:
            raise ConfigError(f"Adapter '{adapter}' is merged into '{key}'. Call unmerge_adapter() before.")
        if r < rank:
            check_tied(adapter, config, rank)


def prepare_layer(layer: AdapterLayer, adapter: str, rank: int | None) -> LayerChange:
    """Turn an adapter's scalings on a layer, of now and of the start, into tensors () on its device.

    Set its rank, and the alpha that keeps the scaling.

    Return the change; rank None keeps the rank.
    """
    r, alpha, rslora = (of[adapter] for of in (layer.r, layer.lora_alpha, layer.use_rslora))
    change = LayerChange.make(layer, r, alpha, rslora, rank or r)
    device = layer.methods[adapter].pair[0].device
    change.write(adapter, lambda scaling: torch.as_tensor(float(scaling), device=device))
    return change
