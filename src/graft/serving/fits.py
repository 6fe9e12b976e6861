# SPDX-License-Identifier: Apache-2.0
"""What fits into slots: LoRA's factors, and with gains the vectors of DoRA and IA3."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft import AdapterKeyError, ConfigError, LoraConfig
from graft.core.errors import join_some
from graft.inject.match import Matcher
from graft.inject.parts import AdapterCarriers
from graft.io.files import LoadedWeights
from graft.io.load import CheckpointValues
from graft.kernels.decomposed import row_norms
from graft.methods.ia3 import is_feedforward
from graft.methods.lora.sub_configs import CONVERTED
from graft.serving.layer import SlotLayer

if TYPE_CHECKING:
    from graft import PeftConfig

# fields of a LoraConfig that add something to A and B or run them in another way, and the value that leaves them off
PLAIN: dict[str, tuple[object, ...]] = {
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
    """What an adapter does on one layer: gain ⊙ (W (inner ⊙ x) + b + scaling · x Aᵀ B) + shift."""

    A: Tensor  # (r, in); r is 0 for adapters without factors
    B: Tensor  # (r, out), transposed from the file
    scaling: float = 1.0
    gain: Tensor | None = None  # (out,); None: ones
    shift: Tensor | None = None  # (out,); None: zeros
    inner: Tensor | None = None  # (in,); None: ones

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.A, self.B, self.gain, self.shift, self.inner) if t is not None]


@dataclass
class Known:
    """An adapter that fits into a slot."""

    factors: dict[str, SlotFactors] | None  # by layer; None: `read` reads them from their files
    read: Callable[[], dict[str, SlotFactors]] | None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes."""
        return sum(t.nbytes for f in (self.factors or {}).values() for t in f.tensors)


def check_config(name: str, config: Any, gains: bool) -> None:
    """Raise ConfigError unless slots can hold adapters of this config, for the base as it is."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in ("LORA", "IA3"):
        raise ConfigError(
            f"Adapter '{name}' does not fit: slots hold LoRA adapters, and DoRA and IA3 with gains=True; this one's "
            f"method is {kind}."
        )
    if not gains and (kind == "IA3" or config.use_dora):
        raise ConfigError(
            f"Adapter '{name}' does not fit: {'IA3' if kind == 'IA3' else 'DoRA (use_dora=True)'} needs vectors beside "
            "A and B. Make the slots with gains=True."
        )
    for option, off in PLAIN.items():
        value = getattr(config, option, off[0])
        if value not in off:
            raise ConfigError(
                f"Adapter '{name}' does not fit: its config says {option}={value!r}, and slots hold no such thing. Run "
                "it from a PeftModel, or merge it into a base of its own."
            )
    how = getattr(config, "init_lora_weights", True)
    if isinstance(how, str) and how.startswith(CONVERTED):
        raise ConfigError(
            f"Adapter '{name}' does not fit: it belongs to base weights that init_lora_weights={how!r} changed. Save "
            "it as plain LoRA, with path_initial_model_for_weight_conversion."
        )


A_, B_, MAGNITUDE, SCALES = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "ia3_l"  # below a layer's path


def leaves(config: Any) -> tuple[str, ...]:
    """Return the tensors that an adapter of a config has on each layer."""
    if config.peft_type.value == "IA3":
        return (SCALES,)
    return (A_, B_, MAGNITUDE) if config.use_dora else (A_, B_)


def by_layer(name: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> dict[str, dict[str, Tensor]]:
    """Return tensors by layer path and the name below it.

    Raises:
        AdapterKeyError: some have other names.
    """
    found: dict[str, dict[str, Tensor]] = {}
    known, other = leaves(config), []
    for key, tensor in tensors.items():
        leaf = next((leaf for leaf in known if key.endswith(f".{leaf}")), None)
        if leaf is None:
            other.append(key)
        else:
            path = key.removeprefix("base_model.model.").removesuffix(f".{leaf}")
            found.setdefault(path, {})[leaf] = tensor
    if other:
        raise _no_slots(name, other)
    return found


def _no_slots(name: str, keys: Sequence[str]) -> AdapterKeyError:
    return AdapterKeyError(
        f"Adapter '{name}' does not fit: no slots for {join_some(list(keys))}. Name these modules in `targets`, if "
        "they are "
        "linear layers."
    )


def fitted(
    name: str,
    config: Any,
    loaded: LoadedWeights,
    layers: dict[str, SlotLayer],
    max_rank: int,
    base: nn.Module,
    allow_nonfinite: bool = False,
) -> dict[str, SlotFactors]:
    """Return what an adapter does, by layer path, in memory of its own.

    Raises:
        CheckpointError: a tensor is not a plain one of finite real numbers.
        ConfigError: slots cannot hold its method, or a rank is above `max_rank`.
        AdapterKeyError: it targets other modules, or its tensors are not those that its config describes.
        BaseModelMismatchError: it was made for another architecture.
    """
    check_config(name, config, next(iter(layers.values())).has_gains)
    load = CheckpointValues(base, config, name, loaded, allow_nonfinite=allow_nonfinite)
    found = by_layer(name, load.tensors, config)
    if other := [f"{path}.{leaf}" for path, own in found.items() if path not in layers for leaf in own]:
        raise _no_slots(name, other)
    matcher = Matcher(config)
    lost = [key for key in layers if key not in found and matcher(key).outcome == "matched"]
    lost += [f"{key}.{leaf}" for key, own in found.items() for leaf in leaves(config) if leaf not in own]
    if lost or not found:
        raise AdapterKeyError(
            f"Adapter '{name}' does not fit: {loaded.path} lacks {join_some(lost) or 'any tensor of it'}."
        )
    load.check_base(AdapterCarriers({key: layers[key] for key in found}, {}))  # type: ignore[misc]
    make = _scales if leaves(config) == (SCALES,) else _factors
    return {key: make(name, key, own, config, layers[key], max_rank) for key, own in found.items()}


def _factors(
    name: str, key: str, own: dict[str, Tensor], config: LoraConfig, layer: SlotLayer, max_rank: int
) -> SlotFactors:
    cfg = config.at(key)
    A, B, r = own[A_], own[B_], cfg.r
    if r > max_rank:
        raise ConfigError(f"Adapter '{name}' does not fit: rank {r} on '{key}' is above max_rank={max_rank}.")
    _check(name, key, own, {A_: (r, layer.in_features), B_: (layer.out_features, r), MAGNITUDE: (layer.out_features,)})
    scaling = cfg.lora_alpha / (math.sqrt(r) if cfg.use_rslora else r)
    made = SlotFactors(_own(A), _own(B.T), scaling)
    if MAGNITUDE in own:
        if why := layer.site.weight.why_unreadable():
            raise ConfigError(f"Adapter '{name}' does not fit: DoRA needs the weight of '{key}', and {why}.")
        W = layer.site.weight.canon()
        wide = torch.promote_types(A.dtype, torch.float32)  # of half-precision files the gain is not rounded as well
        A, B, m = (t.to(W.device, wide) for t in (A, B, own[MAGNITUDE]))
        gain = m / row_norms(W, A, scaling * B)
        made.gain, b = _own(gain), layer.bias
        made.shift = None if b is None else _own(b * (1 - gain))
    return made


def _scales(name: str, key: str, own: dict[str, Tensor], config: Any, layer: SlotLayer, max_rank: int) -> SlotFactors:
    inner, l = is_feedforward(key, config), own[SCALES]
    n = layer.in_features if inner else layer.out_features
    _check(name, key, own, {SCALES: (1, n) if inner else (n, 1)})
    made = SlotFactors(l.new_empty(0, layer.in_features), l.new_empty(0, layer.out_features))
    if inner:
        made.inner = _own(l.flatten())
    else:
        made.gain = _own(l.flatten())
    return made


def _check(name: str, key: str, own: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise AdapterKeyError if a tensor has another shape than its config and the layer say, or is no float."""
    for leaf, tensor in own.items():
        if tuple(tensor.shape) != shapes[leaf]:
            raise AdapterKeyError(
                f"Adapter '{name}' does not fit: '{key}.{leaf}' is {tuple(tensor.shape)}, which should be "
                f"{shapes[leaf]} by its config and the base model."
            )
        if not tensor.is_floating_point():
            raise AdapterKeyError(f"Adapter '{name}' does not fit: '{key}.{leaf}' is {tensor.dtype}, no floats.")


def _own(t: Tensor) -> Tensor:
    """Return a copy in host memory, since state dicts and models may change theirs."""
    return torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t)
