# SPDX-License-Identifier: Apache-2.0
"""Models and parameters that hold codes: the marks by which they are known, and what they need of the rest: mending,
counting, biases that train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import PeftWarning, warn
from graft.core.ops import find_op
from graft.core.site import Store
from graft.storage.compressed import Compressed
from graft.storage.dense import NUMBERS, PLAIN, strange_tensor
from graft.storage.experts import let_experts_train, restore_experts
from graft.storage.find import STORES, TENSORS, find_marked_store
from graft.storage.quantized import Quantized
from graft.storage.stacks import list_packed_names

FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit")
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")  # lists of plain modules in configs of transformers
FIXED = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # quantization formats that fix the dtype of all other weights
PACKED = ("Params4bit",)  # types of parameters whose dtype is only that of their storage


def dtype_is_fixed(model: nn.Module) -> bool:
    method = getattr(model, "quantization_method", None)
    return getattr(method, "value", method) in FIXED or bool(getattr(model, "hqq_quantized", False))


def is_marked(model: nn.Module) -> bool:
    """Return True if the one who loaded a model says that it is quantized."""
    return dtype_is_fixed(model) or any(getattr(model, flag, False) for flag in (*FLAGS, "is_quantized"))


def find_unpacked_dtype(parameters: Iterable[Tensor]) -> torch.dtype | None:
    """Return the dtype of the first parameter that is not packed: most likely that of a model's hidden states."""
    return next((p.dtype for p in parameters if type(p) in PLAIN and p.dtype in NUMBERS), None)


def remove_quantization_marks(model: nn.Module) -> None:
    """Take the marks off a model that holds nothing packed any more, so that it is saved as a plain one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for flag in FLAGS:
        if getattr(model, flag, False):
            setattr(model, flag, False)


def mark_plain_layers(model: nn.Module) -> None:
    """Have the quantization config of a model of transformers name the linear layers that are plain, so that it loads
    as it is saved, with these beside packed ones; warn where a config cannot name them."""
    model_config: Any = getattr(model, "config", None)
    marks = getattr(model_config, "quantization_config", None)
    if marks is None or isinstance(marks, dict):
        return
    plain = [name for name, m in model.named_modules() if find_op(m).linear and not holds_codes(m)]
    field = next((field for field in SKIPPED if hasattr(marks, field)), None)
    if field is None:
        warn(
            f"Some layers of the model are plain now, and others hold codes, which {type(marks).__name__} cannot tell "
            "apart: transformers will not load what save_pretrained() writes. Adapt all quantized layers, or merge "
            "into a base that is loaded dequantized.",
            PeftWarning,
        )
        return
    model_config.quantization_config = marks = copy.copy(marks)  # the caller's may load other models
    setattr(marks, field, sorted({*(getattr(marks, field) or ()), *plain}))


def prepare_packed(modules: Iterable[nn.Module]) -> None:
    """Have the stores of packed weights mend what would make adapters on or below these modules wrong."""
    warnings: dict[str | None, None] = {}
    for m in modules:
        if list_packed_names(m):
            let_experts_train(m)
        store = find_packed_store(m)
        if isinstance(store, (Quantized, Compressed)):
            warnings[store.ready(m)] = None
    for warning in warnings:
        if warning is not None:
            warn(warning, PeftWarning)


def release_packed(modules: Iterable[nn.Module]) -> None:
    """Undo for these modules, on which no adapter acts any more, what keeps packages from their own ways."""
    for m in modules:
        restore_experts(m)
        store = find_packed_store(m)
        if isinstance(store, Quantized):
            store.release(m)


def find_packed_store(m: nn.Module) -> Store | None:
    """Return the store of a module by its mark, its type or that of its weight; None for plain ones."""
    store = find_marked_store(m) or STORES.find(type(m))
    if store is None and (weight := m._parameters.get("weight")) is not None and type(weight) not in PLAIN:
        store = TENSORS.find(type(weight))
    return store


def holds_codes(m: nn.Module) -> bool:
    """Return True if a module's weight is packed: codes and scales, whatever the module is called."""
    store = STORES.find(type(m))
    return strange_tensor(m, "weight") is not None if store is None else isinstance(store, Quantized)


def why_copy_cannot_train(module: nn.Module) -> str | None:
    """Return why a copy of a module cannot train: a weight on it or below it is held in codes. None if none is."""
    for m in filter(holds_codes, module.modules()):
        store = STORES.find(type(m))
        if not (isinstance(store, Quantized) and store.trains(m)):
            return f"the weight of a {type(m).__name__} is held in codes, which cannot train"
    return None


def has_loose_bias(module: nn.Module) -> bool:
    """Return True if a layer with a packed weight has a bias that is no Parameter."""
    bias = getattr(module, "bias", None)
    loose = isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter)
    return loose and isinstance(STORES.find(type(module)), Quantized)


def make_bias_parameter(module: nn.Module) -> tuple[nn.Parameter, Callable[[], None]]:
    """Make a layer's bias a Parameter, so that it can train; return it, and what undoes this."""
    owner: Any = module._buffers if "bias" in module._buffers else module.__dict__
    before = owner.pop("bias")
    bias = module._parameters["bias"] = nn.Parameter(before.detach(), requires_grad=False)

    def undo() -> None:
        del module._parameters["bias"]
        owner["bias"] = before

    return bias, undo


def count_numbers(p: Tensor) -> int:
    """Return how many numbers a parameter holds: two in a byte if packed to 4 bits, all shards with DeepSpeed."""
    n = p.numel() or getattr(p, "ds_numel", 0)
    if type(p).__name__ in PACKED:
        n *= 2 * torch.empty((), dtype=getattr(p, "quant_storage", torch.uint8)).element_size()
    return n
