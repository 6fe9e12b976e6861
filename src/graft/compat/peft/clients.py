# SPDX-License-Identifier: Apache-2.0
"""Names of PEFT's inside that single clients import: axolotl, unsloth, ms-swift, diffusers and others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from graft import PeftWarning, method_of
from graft.compat.peft.layers import make_refusing_function
from graft.core.errors import warn
from graft.inject import experts
from graft.inject.survey import survey_model

if TYPE_CHECKING:
    from graft import PeftConfig

TRANSFORMERS_MODEL_CONFIG = method_of("ADAPTION_PROMPT").targets  # by model_type; callers ask which there are
VARIANT_KWARG_KEYS = ["alora_offsets"]  # arguments of a layer's forward that are its adapters'


class _ExcludedModule:
    """PEFT's answer that a config excludes a module, for isinstance: graft's answer is False."""


def onload_layer(layer: nn.Module) -> AbstractContextManager[None]:
    """Return a context manager that loads a layer's tensors which accelerate has offloaded, for the time of the block.

    Changes of the block to the innermost base layer are written back. Without offloading it does nothing.
    """
    weight = getattr(layer, "base_weight", None)  # only graft's layers have one
    return nullcontext() if weight is None else weight.bring_in(layer, writes=True)


def get_bnb_param_type(param: Tensor) -> str | bool:
    """Return "4bit" for a parameter with a class called Params4bit, "8bit" for Int8Params, False for any other."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


def get_quantization_config(model: nn.Module, method: str) -> object:
    """Return `model.config.quantization_config` if `model.quantization_method` equals `method`; else None.

    None, too, if the model has no config, or the config no such field.
    """
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def get_model_conversion_mapping(*args: Any, **kwargs: Any) -> Any:
    """Call transformers' function of this name with these arguments, and return its result.

    Raises:
        ImportError: the installed transformers has no such function.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping as theirs

    return theirs(*args, **kwargs)


def convert_peft_config_for_transformers(peft_config: PeftConfig, model: nn.Module, conversions: object = None) -> None:
    """Rewrite the targets of a LoRA config, in place, where they name experts one by one and the model holds stacks of
    experts.

    Other methods' configs, and configs for a model without `config.model_type`, stay as they are.

    Args:
        conversions: has no effect; graft gets the conversions from transformers itself.
    """
    if peft_config.peft_type == "LORA" and hasattr(getattr(model, "config", None), "model_type"):
        experts.convert_expert_targets(peft_config, model, survey_model(model), None)


# adaption prompts


def llama_rotate_half(x: Tensor) -> Tensor:
    """Return (-b, a) of the last dimension's halves (a, b)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def llama_apply_rotary_pos_emb(q: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Return queries (batch, heads, length, dim) after RoPE: q * cos + rotate_half(q) * sin.

    Args:
        cos, sin: tables (…, positions, dim), flattened to rows; row n is for position n.
        position_ids: (batch, length), the rows to take.
    """
    cos, sin = (table.reshape(-1, table.shape[-1])[position_ids][:, None] for table in (cos, sin))
    return q * cos + llama_rotate_half(q) * sin


# names of PEFT that graft has nothing to run for


class _Unused(type):
    """The metaclass of PEFT's classes that graft exports and never uses: calling one raises, setting an attribute
    warns.
    """

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        """Raise NotImplementedError with the class's name and docstring, instead of making an object."""
        raise NotImplementedError(f"{cls.__name__}: {cls.__doc__}")

    def __setattr__(cls, name: str, value: object) -> None:
        """Set the attribute, after a PeftWarning that graft never reads it."""
        warn(f"{cls.__name__}.{name} was set, and nothing in graft asks for it: {cls.__doc__}", PeftWarning)
        super().__setattr__(name, value)


class RankAllocator(metaclass=_Unused):
    """graft's AdaLoRA ranks the triplets of all layers at once, in model.base_model.update_and_allocate(step)."""

    mask_to_budget = make_refusing_function("mask_to_budget", f"has no effect: {__doc__}")


class DoraLinearLayer(metaclass=_Unused):
    """graft's DoRA is a method of its layers, and reads weights of every storage without a layer of this class."""

    update_layer = make_refusing_function("update_layer", f"has no effect: {__doc__}")


class MiCALinearVariant(metaclass=_Unused):
    """graft's MiCA is a method of its layers: make a LoraConfig with init_lora_weights="mica"."""


def register_peft_method(
    *, name: str, config_cls: object, model_cls: object, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Raise NotImplementedError: graft cannot run PEFT's tuner classes. Nothing is registered.

    Raises:
        NotImplementedError: always, with the way to add a method to graft.
    """
    raise NotImplementedError(
        f"register_peft_method: '{name}' is written for PEFT's tuners, which graft does not have. Use PEFT for it, or "
        'write a graft.Method: see "Add a method" in docs/architecture.md.'
    )
