# SPDX-License-Identifier: Apache-2.0
"""The factors of a saved LoRA adapter that can run from slots, or an error that says why it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import AdapterKeyError, ConfigError, some
from graft.inject.match import Matcher
from graft.inject.parts import Parts
from graft.io.files import Loaded
from graft.io.load import Values
from graft.methods.lora.choices import CONVERTED
from graft.serving.layer import SlotLayer

# fields of a LoraConfig that add something to A and B or run them in another way, and the value that leaves them off
PLAIN: dict[str, tuple] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


@dataclass
class SlotFactors:
    """The factors of an adapter on one layer: y + scaling · x Aᵀ B."""

    A: Tensor  # (r, in)
    B: Tensor  # (r, out), transposed from the file
    scaling: float


@dataclass
class Known:
    """An adapter that fits into a slot."""

    factors: dict[str, SlotFactors] | None  # by layer; None: `read` reads them from their files
    read: Callable[[], dict[str, SlotFactors]] | None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes."""
        return sum(t.nbytes for f in (self.factors or {}).values() for t in (f.A, f.B))


def check_config(name: str, config: Any) -> None:
    """Raise ConfigError unless adapters of this config are plain LoRA for the base as it is."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ConfigError(f"Adapter '{name}' does not fit: slots hold LoRA adapters, and this one's method is {kind}.")
    for option, off in PLAIN.items():
        value = getattr(config, option, off[0])
        if value not in off:
            raise ConfigError(
                f"Adapter '{name}' does not fit: its config says {option}={value!r}, and slots hold nothing but A and "
                "B. Run it from a PeftModel, or merge it into a base of its own."
            )
    how = config.init_lora_weights
    if isinstance(how, str) and how.startswith(CONVERTED):
        raise ConfigError(
            f"Adapter '{name}' does not fit: it belongs to base weights that init_lora_weights={how!r} changed. Save "
            "it as plain LoRA, with path_initial_model_for_weight_conversion."
        )


def fitted(
    name: str,
    config: Any,
    loaded: Loaded,
    layers: dict[str, SlotLayer],
    max_rank: int,
    base: Any,
    allow_nonfinite: bool = False,
) -> dict[str, SlotFactors]:
    """Return the factors of an adapter by layer path, in memory of their own.

    Raises:
        CheckpointError: a tensor is not a plain one of finite real numbers.
        ConfigError: it is not plain LoRA, or a rank is above `max_rank`.
        AdapterKeyError: it targets other modules, or its tensors are not those that its config describes.
        BaseModelMismatchError: it was made for another architecture.
    """
    check_config(name, config)
    load = Values(base, config, name, loaded, allow_nonfinite=allow_nonfinite)
    found: dict[str, dict[str, Tensor]] = {}
    other = []
    for key, tensor in load.tensors.items():
        path, _, leaf = key.removeprefix("base_model.model.").rpartition(".lora_")
        if path in layers and leaf in ("A.weight", "B.weight"):
            found.setdefault(path, {})[leaf[0]] = tensor
        else:
            other.append(key)
    if other:
        raise AdapterKeyError(
            f"Adapter '{name}' does not fit: no slots for {some(other)}. Name these modules in `targets`, if they are "
            "linear layers."
        )
    matcher = Matcher(config)
    lost = [key for key in layers if key not in found and matcher(key).outcome == "matched"]
    lost += [f"{key}.lora_{x}" for key, pair in found.items() for x in "AB" if x not in pair]
    if lost or not found:
        raise AdapterKeyError(f"Adapter '{name}' does not fit: {loaded.path} lacks {some(lost) or 'any LoRA tensor'}.")
    load.check_base(Parts({key: layers[key] for key in found}, {}))  # type: ignore[misc]
    return {key: _pair(name, key, pair, config.at(key), layers[key], max_rank) for key, pair in found.items()}


def _pair(name: str, key: str, pair: dict[str, Tensor], cfg: Any, layer: SlotLayer, max_rank: int) -> SlotFactors:
    A, B, r = pair["A"], pair["B"], cfg.r
    if r > max_rank:
        raise ConfigError(f"Adapter '{name}' does not fit: rank {r} on '{key}' is above max_rank={max_rank}.")
    wanted = (r, layer.in_features), (layer.out_features, r)
    if (tuple(A.shape), tuple(B.shape)) != wanted:
        raise AdapterKeyError(
            f"Adapter '{name}' does not fit: on '{key}' A is {tuple(A.shape)} and B {tuple(B.shape)}, which should be "
            f"{wanted[0]} and {wanted[1]} by its config and the base model."
        )
    if not (A.is_floating_point() and B.is_floating_point()):
        raise AdapterKeyError(f"Adapter '{name}' does not fit: on '{key}' A is {A.dtype} and B {B.dtype}, no floats.")
    scaling = cfg.lora_alpha / (math.sqrt(r) if cfg.use_rslora else r)
    return SlotFactors(_own(A), _own(B.T), scaling)


def _own(t: Tensor) -> Tensor:
    """Return a copy in host memory, since state dicts and models may change theirs."""
    return torch.empty(t.shape, dtype=t.dtype).copy_(t)
