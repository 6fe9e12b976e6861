# SPDX-License-Identifier: Apache-2.0
"""Models and parameters that hold codes: how to recognise them, prepare them for adapters, and count them."""

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
from graft.storage.dense import NUMBERS, PLAIN, is_composed, strange_tensor
from graft.storage.experts import ExpertBlock
from graft.storage.find import STORES, TENSORS, find_marked_store
from graft.storage.quantized import Quantized
from graft.storage.stacks import list_packed_names

FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit")
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")  # lists of plain modules in configs of transformers
FIXED = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # quantization methods that fix the dtype of all other weights
PACKED = ("Params4bit",)  # types of parameters with a dtype for storage only


def dtype_is_fixed(model: nn.Module) -> bool:
    """Return True if the model's quantization method fixes the dtype of its other weights.

    Those are GPTQ, AQLM, EETQ, HQQ and torchao, by the model's `quantization_method`; or `hqq_quantized` is set.
    """
    method = getattr(model, "quantization_method", None)
    return getattr(method, "value", method) in FIXED or bool(getattr(model, "hqq_quantized", False))


def find_unpacked_dtype(parameters: Iterable[Tensor]) -> torch.dtype | None:
    """Return the dtype of the first parameter that is a plain tensor of floats with 16 to 64 bits; None without one.

    It is most likely the dtype of the hidden states.
    """
    return next((p.dtype for p in parameters if type(p) in PLAIN and p.dtype in NUMBERS), None)


def remove_quantization_marks(model: nn.Module) -> None:
    """Take the quantization config and flags off a model without packed weights, so that it is saved as a plain one.

    transformers' quantizer of the model (`hf_quantizer`), if there is one, removes the config. `is_loaded_in_8bit` and
    `is_loaded_in_4bit` become False where they are set.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for flag in FLAGS:
        if getattr(model, flag, False):
            setattr(model, flag, False)


def mark_plain_layers(model: nn.Module) -> None:
    """Add the plain linear layers to the list of unquantized modules in a model's quantization config:
    `llm_int8_skip_modules`, else `modules_to_not_convert`.

    So transformers loads a saved model that has plain layers next to packed ones. The model's config gets a changed
    copy of the quantization config, with the old and new names sorted, each once. Gives a warning if the quantization
    method has no such list. Does nothing for a model without a quantization config, or with one that is a dict.
    """
    model_config: Any = getattr(model, "config", None)
    marks = getattr(model_config, "quantization_config", None)
    if marks is None or isinstance(marks, dict):
        return
    plain = [name for name, m in model.named_modules() if find_op(m).linear and not holds_codes(m)]
    field = next((field for field in SKIPPED if hasattr(marks, field)), None)
    if field is None:
        warn(
            f"The model has plain layers next to quantized ones, which {type(marks).__name__} cannot tell apart, so "
            "that transformers cannot load a saved copy. Adapt all quantized layers, or dequantize the base model.",
            PeftWarning,
        )
        return
    model_config.quantization_config = marks = copy.copy(marks)  # the caller's config may load other models
    setattr(marks, field, sorted({*(getattr(marks, field) or ()), *plain}))


def prepare_packed(modules: Iterable[nn.Module]) -> None:
    """Let the stores of these modules prepare them for adapters, such as for gradients through packed weights.

    The block of experts of each module is prepared first. Then a store of packed or compressed weights runs `ready`,
    which may change the module or its class. Equal warnings of all modules are given once.
    """
    warnings: dict[str | None, None] = {}
    for m in modules:
        if list_packed_names(m):  # as hardly any module
            ExpertBlock(m).prepare()
        store = find_packed_store(m)
        if isinstance(store, (Quantized, Compressed)):
            warnings[store.ready(m)] = None
    for warning in warnings:
        if warning is not None:
            warn(warning, PeftWarning)


def release_packed(modules: Iterable[nn.Module]) -> None:
    """Undo `prepare_packed` for modules without adapters: restore blocks of experts, and let packed stores run
    `release`.

    Replaced forwards of classes stay.
    """
    for m in modules:
        ExpertBlock(m).release()
        store = find_packed_store(m)
        if isinstance(store, Quantized):
            store.release(m)


def find_packed_store(m: nn.Module) -> Store | None:
    """Return the store of a module by its mark, its type or that of its weight; None for a module with a plain weight
    or none.
    """
    store = find_marked_store(m) or STORES.find(type(m))
    if store is None and (weight := m._parameters.get("weight")) is not None and type(weight) not in PLAIN:
        store = TENSORS.find(type(weight))
    return store


def holds_codes(m: nn.Module) -> bool:
    """Return True if a module's weight is packed, that is codes and scales.

    The module's class decides if graft knows it, else the weight: it is no plain tensor of floating-point numbers.
    """
    store = STORES.find(type(m))
    return strange_tensor(m, "weight") is not None if store is None else isinstance(store, Quantized)


def find_castable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that may get another dtype: floats of 16 to 64 bits that are no part of a packed weight.

    Of a packed layer only the bias may, and that not if the layer has a tensor composed of others, since it computes in
    that dtype. A `Params4bit` never may.
    """
    fixed = set[nn.Parameter]()
    for m in filter(holds_codes, model.modules()):
        parameters = {name: p for name, p in m._parameters.items() if p is not None}
        computes_in_one = any(map(is_composed, parameters.values()))
        fixed |= {p for name, p in parameters.items() if computes_in_one or name != "bias"}
    return [p for p in model.parameters() if p.dtype in NUMBERS and p not in fixed and type(p).__name__ not in PACKED]


def is_quantized(model: nn.Module) -> bool:
    """Return True if attributes of the model say that it was loaded quantized, or a module of it has a packed weight.

    These attributes are `is_loaded_in_8bit`, `is_loaded_in_4bit`, `is_quantized` and those of `dtype_is_fixed`.
    """
    is_marked = dtype_is_fixed(model) or any(getattr(model, flag, False) for flag in (*FLAGS, "is_quantized"))
    return is_marked or any(map(holds_codes, model.modules()))


def why_copy_cannot_train(module: nn.Module) -> str | None:
    """Return why a copy of a module cannot train: it or a module below it has a packed weight.

    None if there is no packed weight, or if the modules round floats at each call.
    """
    for m in filter(holds_codes, module.modules()):
        store = STORES.find(type(m))
        if not (isinstance(store, Quantized) and store.trains(m)):
            return f"the weight of a {type(m).__name__} is held in codes, which cannot train"
    return None


def has_loose_bias(module: nn.Module) -> bool:
    """Return True if a layer with a packed weight has a bias that is a tensor but no Parameter."""
    bias = getattr(module, "bias", None)
    loose = isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter)
    return loose and isinstance(STORES.find(type(module)), Quantized)


def make_bias_parameter(module: nn.Module) -> tuple[nn.Parameter, Callable[[], None]]:
    """Make the bias of a layer a Parameter without gradient, with the same memory.

    The bias is taken from the module's buffers or attributes. Return the Parameter, and a function that undoes the
    change.
    """
    owner: Any = module._buffers if "bias" in module._buffers else module.__dict__
    before = owner.pop("bias")
    bias = module._parameters["bias"] = nn.Parameter(before.detach(), requires_grad=False)

    def undo() -> None:
        """Delete the Parameter, and put the old bias back among the buffers or attributes."""
        del module._parameters["bias"]
        owner["bias"] = before

    return bias, undo


def count_numbers(p: Tensor) -> int:
    """Return the number of values of a parameter.

    A tensor that DeepSpeed has emptied counts with its whole size (`ds_numel`). A Params4bit has two values in each
    byte of its `quant_storage`, by default uint8.
    """
    n = p.numel() or getattr(p, "ds_numel", 0)
    if type(p).__name__ in PACKED:
        n *= 2 * torch.empty((), dtype=getattr(p, "quant_storage", torch.uint8)).element_size()
    return n
