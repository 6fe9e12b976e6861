# SPDX-License-Identifier: Apache-2.0
"""Names that other libraries import from PEFT and that graft itself does not use; those of transformers' loading."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graft import AdapterLayer, method_of
from graft.config.reading import compile_ending, compile_pattern
from graft.inject.experts import is_merge_of_modules, read_part_name
from graft.inject.survey import ModuleTree, get_site, survey_model
from graft.inject.targets import (
    ALL_LINEAR,
    EMBEDDING_NAMES,
    HEAD_NAMES,
    find_embedding_path,
    find_tied_modules,
    list_linear_layers,
)
from graft.io.layouts import StackArranger, rescale_parts, stack_factors
from graft.methods import METHODS

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    from graft import LoraConfig, PeftConfig

    Conversion = WeightConverter | WeightRenaming

OUTER = "down_proj"  # this stack's layer wraps the layers of the other stacks


def build_peft_weight_mapping(
    weight_conversions: list[Conversion] | None, adapter_name: str, peft_config: LoraConfig | None = None
) -> list[Conversion]:
    """Return the conversions that transformers uses to load an adapter's file into a model with injected layers.

    Renamings drop "base_model.model." and put the adapter's name behind each parameter container, and ".weight" behind
    DoRA's magnitude. The prefixes are those of the config's method, or of all methods without a config. Renamings of
    `weight_conversions` follow.

    For LoRA, converters stack A and B of single experts, and bring factors of `target_parameters` into the layers'
    layout. Other conversions of base weights (q, k and v fused into one tensor) are left out, and transformers reports
    their keys as unexpected.
    """
    from transformers.core_model_loading import WeightRenaming

    prefixes = dict.fromkeys(method_of(t).prefix for t in (METHODS if peft_config is None else [peft_config.peft_type]))
    changes: list[Conversion] = [WeightRenaming(r"^base_model\.model\.", "")]
    for prefix in prefixes:
        changes.append(WeightRenaming(rf"({re.escape(prefix)}[^\.]*)", rf"\1.{adapter_name}"))
    # DoRA's magnitude is a module; files leave out its ".weight"
    changes.append(WeightRenaming(rf"(lora_magnitude_vector\.{re.escape(adapter_name)})$", r"\1.weight"))
    conversions = [c for c in weight_conversions or () if not isinstance(c, WeightRenaming)]
    changes += [c for c in weight_conversions or () if isinstance(c, WeightRenaming)]
    if peft_config is not None and peft_config.peft_type == "LORA":
        config = copy.copy(peft_config)  # injection rewrites it to today's names
        converters = [c for c in conversions if is_merge_of_modules(c)]
        for conversion in converters:
            changes += make_expert_converters(conversion, adapter_name, config, targets_outer(config, converters))
        if peft_config.target_parameters:
            changes += make_stack_converters(adapter_name, config)
    return changes


def make_expert_converters(
    conversion: WeightConverter, adapter_name: str, config: LoraConfig, nested: bool
) -> list[WeightConverter]:
    """Return two converters, for A and B, that stack the factors of single experts as `conversion` stacks their
    weights.

    [] if the path of the conversion's target, without the parameter, does not end with "experts".

    Args:
        nested: the outer stack (down_proj) has a layer, too, so the other stacks are below its `base_layer`.
    """
    path, _, parameter = conversion.target_patterns[0].rpartition(".")
    if not path.endswith("experts"):
        return []
    parts = [pattern.removesuffix(".weight") for pattern in conversion.source_patterns]
    path += ".base_layer" * (nested and parameter != OUTER)
    return [
        type(conversion)(
            source_patterns=[f"{part}.lora_{side}.*" for part in parts],
            target_patterns=[f"{path}.lora_{side}.{adapter_name}.weight"],
            operations=[Stacking(side, parts, config, adapter_name)],  # type: ignore[list-item]
        )
        for side in "AB"
    ]


def make_stack_converters(adapter_name: str, config: LoraConfig) -> list[WeightConverter]:
    """Return converters that bring A and B of each parameter in `target_parameters` into the layout of the layers.

    Two for each last module name before the parameter: below `base_layer`, and directly. One operation is shared, so
    that a doubt about the layout is warned of once.
    """
    from transformers.core_model_loading import WeightConverter, WeightTransform

    operation = Arranging(adapter_name, config)
    names = {name.split(".")[-2] for name in config.target_parameters or () if "." in name}
    converters = []
    for name, within in product(sorted(names), (".base_layer", "")):
        pair = [f"{name}{within}.lora_{side}.{adapter_name}.weight" for side in "AB"]
        try:
            converter = WeightConverter([*pair], [*pair], [operation])  # type: ignore[list-item]
        except ValueError:  # transformers 5.20 lets its own operations alone convert two tensors at once
            converter = WeightConverter.__new__(WeightConverter)
            WeightTransform.__init__(converter, [*pair], [*pair])
            converter.operations, converter.force_cpu = [operation], False  # type: ignore[list-item]
        converters.append(converter)
    return converters


def targets_outer(config: LoraConfig, converters: list[WeightConverter]) -> bool:
    """Return True if the config has an adapter on the outer stack (down_proj), by its name or by its part in each
    expert.

    If `target_modules` is a text (a regular expression), it is True without a comparison. Else the last parts of the
    names in `target_modules` and `target_parameters` are compared. The names of parts in experts come from the
    converters of that stack.
    """
    modules = config.target_modules or ()
    if isinstance(modules, str):
        return True
    names = {name.rpartition(".")[2] for name in (*modules, *(config.target_parameters or ()))}
    outer = [c for c in converters if c.target_patterns[0].rpartition(".")[2] == OUTER]
    return bool(names & {OUTER, *(read_part_name(pattern) for c in outer for pattern in c.source_patterns)})


class Stacking:
    """An operation in transformers' interface: makes A or B of a stack from those of all experts."""

    supports_many_to_many = False

    def __init__(self, side: str, parts: list[str], config: LoraConfig, adapter: str):
        """Keep the side ("A" or "B"), the patterns of the experts' parts, the LoRA config, and the adapter's name."""
        self.side, self.parts, self.config, self.adapter = side, parts, config, adapter

    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str],
        full_layer_name: str, model: nn.Module, **_: object,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the stacked factor under the first target pattern. Removes the sources from `input_dict`.

        B of experts is first rescaled, so that each expert keeps its own rank and alpha of the config on the stack's
        one scale. Without an AdapterLayer at that place it is not.
        """
        tensors = [input_dict.pop(pattern) for pattern in source_patterns]  # each: a tensor for each expert
        layer = layer_at(model, full_layer_name)
        if self.side == "B" and layer is not None:
            before = full_layer_name.partition(target_patterns[0])[0]
            paths = [
                [before + part.replace("*", str(e)) for e in range(len(of))] for part, of in zip(self.parts, tensors)
            ]
            tensors = rescale_parts(tensors, paths, self.config, layer.methods[self.adapter].cfg)
        return {target_patterns[0]: stack_factors(self.side, tensors)}


class Arranging:
    """An operation in transformers' interface: brings A and B of a stack, in any layout, into the layout of graft's
    layers.
    """

    supports_many_to_many = True

    def __init__(self, adapter: str, config: LoraConfig):
        """Take the layout of the file from its config; no doubt has been warned of yet."""
        self.arranger = StackArranger(vars(config), f"Adapter '{adapter}' (load it by PeftModel.from_pretrained)")

    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str],
        full_layer_name: str, model: nn.Module, **_: object,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return A and B under the target names, converted from the file's layout. Removes them from `input_dict`.

        They are returned unchanged if there is no AdapterLayer, one of the two is missing, or they cannot be factors of
        its stack. Warns of doubts about the layout, each once for the adapter.
        """
        pair = {
            name: tensors[0] if isinstance(tensors, list) else tensors
            for pattern, name in zip(source_patterns, target_patterns)
            if (tensors := input_dict.pop(pattern, None)) is not None
        }
        layer = layer_at(model, full_layer_name)
        return pair if layer is None or len(pair) < 2 else self.arranger.convert(layer, pair)


def layer_at(model: nn.Module, name: str) -> AdapterLayer | None:
    """Return the AdapterLayer with the parameter `name`: the module before ".lora_"; None if that is another module.

    Raises AttributeError if the model has no such module.
    """
    layer = model.get_submodule(name.partition(".lora_")[0])
    return layer if isinstance(layer, AdapterLayer) else None


ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
EMBEDDING_LAYER_NAMES = [*EMBEDDING_NAMES]  # lists, since callers append to them
SEQ_CLS_HEAD_NAMES = [*HEAD_NAMES]
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


# targets


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Return the match of the pattern with the whole path `key`, or None.

    Raises ConfigError if the pattern is no regular expression.
    """
    return compile_pattern(target_pattern, "target_modules").fullmatch(key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """Return the first regular expression that matches `key_to_match` as a whole or from a dot to its end; else
    `key_to_match` itself.

    Raises ConfigError for an invalid expression that it comes to.
    """
    return next((p for p in pattern_keys if compile_ending(p, "the patterns").match(key_to_match)), key_to_match)


def _maybe_include_all_linear_layers(peft_config: PeftConfig, model: nn.Module) -> object:
    """Return the config.

    If its target_modules is "all-linear" in any case, replace that by the linear layers' names, in place.
    """
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        peft_config.target_modules = list_linear_layers(peft_config, model, survey_model(model).modules)
    return peft_config


def _set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Set the active adapters of all copies of modules (`modules_to_save`) and token rows in a model.

    A copy gets those of the names that it has; with none, the base's module acts.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
    for wrapper in survey_model(model).wrappers.values():
        wrapper.set_adapter([name for name in names if name in wrapper.adapters], inference_mode)


# a model's modules


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return (parent, module, name in its parent) of the module at path `key`; for "" all is the model, with the name
    "".

    Raises AttributeError if there is none.
    """
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """Return the path of the model's input embedding; `default` if it has none."""
    return find_embedding_path(model, survey_model(model)) or default


def _get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Return the names of the modules with a weight tied to the input embedding. A PeftModel is unwrapped first."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return find_tied_modules(base, survey_model(base))[1]


# aLoRA


def calculate_alora_offsets(
    peft_config: dict[str, object], active_adapter: str, input_ids: Tensor, adapter_names: list[str] | None = None
) -> list[int | None]:
    """Return for each row the number of tokens from the last start of its invocation sequence to its end, or None.

    None if the row lacks the sequence, or its adapter has no `alora_invocation_tokens`.

    Args:
        peft_config: adapter name → config.
        adapter_names: the adapter of each row; None: all use `active_adapter`.
    """
    offsets: list[int | None] = []
    for row, name in zip(input_ids.tolist(), adapter_names or [active_adapter] * len(input_ids)):
        tokens = list(getattr(peft_config.get(name), "alora_invocation_tokens", None) or ())
        starts = range(len(row) - len(tokens), -1, -1) if tokens else ()
        offsets.append(next((len(row) - i for i in starts if row[i : i + len(tokens)] == tokens), None))
    return offsets


# tensors


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return `weight.T` if `fan_in_fan_out`, else `weight` itself."""
    return weight.T if fan_in_fan_out else weight


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Return (device, address, bytes) of a tensor's storage, equal for tensors on the same memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight as a dense tensor, read by the layer's store (plain, bitsandbytes, GPTQ, …).

    The layer stays as it is.
    """
    return get_site("", module, ModuleTree(module)).weight.read()


def gather_params_ctx(
    param: Tensor | Iterable[Tensor], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> AbstractContextManager[object]:
    """Return a context that gathers parameters partitioned by DeepSpeed's ZeRO-3; without such it does nothing.

    Args:
        modifier_rank: rank of the process that keeps its changes of the block.
    """
    params = [param] if isinstance(param, Tensor) else list(param)
    if not any(hasattr(p, "ds_id") for p in params):
        return nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters(params, modifier_rank, fwd_module)  # type: ignore[no-any-return]


def init_empty_weights(include_buffers: bool | None = None) -> AbstractContextManager[object]:
    """Return a context that creates tensors on the meta device.

    `include_buffers` has no effect: buffers are included.
    """
    return torch.device("meta")


# installed packages

PACKAGES = {
    "auto_awq": "awq",
    "bnb": "bitsandbytes",
    "bnb_4bit": "bitsandbytes",
    "inc": "neural_compressor",
    "te": "transformer_engine",
    "torch_tpu": "torch_xla",
}


@cache
def import_check(name: str) -> Callable[[], bool] | bool | None:
    """Return PEFT's check of that name, or None if it is no such name. Results are cached.

    `is_<package>_available` is a function that takes any arguments: True if the package can be found (`find_spec`),
    under PEFT's other names for it, too. `is_<package>_ge_v1_2` is a function that returns whether the installed
    version is at least that one; for transformers it is a bool. A missing package gives False. `is_xpu_available` is
    torch's function.
    """
    if name == "is_xpu_available":
        return torch.xpu.is_available
    if match := re.fullmatch(r"is_(\w+)_available", name):
        package = PACKAGES.get(match[1], match[1])
        return lambda *_, **__: importlib.util.find_spec(package) is not None
    if match := re.fullmatch(r"is_([a-z]+)_ge_v(\d+(?:_\d+)*)", name):
        new_enough = read_release(match[1]) >= tuple(int(n) for n in match[2].split("_"))
        return new_enough if match[1] == "transformers" else lambda: new_enough
    return None


def read_release(package: str) -> tuple[int, ...]:
    """Return the leading numbers of an installed package's version, such as (5, 24, 0); () if it is not installed."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ()
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in numbers[0].split(".")) if numbers else ()
