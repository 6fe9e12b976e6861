# SPDX-License-Identifier: Apache-2.0
"""The adapters that fit into slots: LoRA's factors, and with gains the vectors of DoRA and IA3."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft import AdapterKeyError, ConfigError, LoraConfig, method_of
from graft.core.errors import join_some
from graft.inject.parts import AdapterCarriers
from graft.io.files import LoadedWeights
from graft.io.load import CheckpointValues
from graft.serving.layer import SlotLayer

if TYPE_CHECKING:
    from graft import PeftConfig

# fields of a LoraConfig that add something to A and B or run them in another way, and the value that leaves them off
PLAIN: dict[str, tuple[object, ...]] = {
    "lora_bias": (False,), "bias": ("none",), "modules_to_save": (None, []), "trainable_token_indices": (None,),
    "target_parameters": (None, []), "layer_replication": (None,), "alora_invocation_tokens": (None,),
    "use_qalora": (False,), "use_bdlora": (None,), "arrow_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,),
}  # fmt: skip


@dataclass
class SlotFactors:
    """The tensors of an adapter on one layer: gain ⊙ (W (inner ⊙ x) + b + scaling · x Aᵀ B) + shift.

    Attributes:
        A: (r, in); r is 0 for adapters without factors.
        B: (r, out), transposed from the file.
        gain, shift: (out,); None: ones, zeros.
        inner: (in,); None: ones.
    """

    A: Tensor  # (r, in); r is 0 for adapters without factors
    B: Tensor  # (r, out), transposed from the file
    scaling: float = 1.0
    gain: Tensor | None = None  # (out,); None: ones
    shift: Tensor | None = None  # (out,); None: zeros
    inner: Tensor | None = None  # (in,); None: ones

    @property
    def tensors(self) -> list[Tensor]:
        """A, B and those of gain, shift and inner that are not None."""
        return [t for t in (self.A, self.B, self.gain, self.shift, self.inner) if t is not None]


@dataclass
class KnownAdapter:
    """An adapter that fits into a slot.

    Attributes:
        factors: by layer; None if `read` reads them from their files each time.
        read: returns the factors; None if they are in host memory.
    """

    factors: dict[str, SlotFactors] | None  # by layer; None: `read` reads them from their files
    read: Callable[[], dict[str, SlotFactors]] | None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory of its factors; 0 if they are read from files."""
        return sum(t.nbytes for f in (self.factors or {}).values() for t in f.tensors)


def check_config(name: str, config: Any, gains: bool) -> None:
    """Raise ConfigError unless slots can hold adapters of this config on an unchanged base: LoRA, and with `gains` also
    DoRA and IA3.

    Every option of `PLAIN` must have one of the values there, which mean off; a missing option counts as off. A LoRA
    start that changes the base is refused, except LoftQ.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in ("LORA", "IA3"):
        raise ConfigError(
            f"Adapter '{name}' does not fit: slots hold LoRA adapters, and DoRA and IA3 with gains=True; this one's "
            f"method is {kind}."
        )
    if not gains and (kind == "IA3" or config.use_dora):
        raise ConfigError(
            f"Adapter '{name}' does not fit: {'IA3' if kind == 'IA3' else 'DoRA (use_dora=True)'} needs vectors as "
            "well as A and B. Make the slots with gains=True."
        )
    for option, off in PLAIN.items():
        value = getattr(config, option, off[0])
        if value not in off:
            raise ConfigError(
                f"Adapter '{name}' does not fit: its config says {option}={value!r}, and slots hold no such thing. Run "
                "it from a PeftModel, or merge it into a copy of the base."
            )
    how = getattr(config, "init_lora_weights", True)
    if how != "loftq" and kind == "LORA" and method_of("LORA").variant(config).changes_base(config) is not None:
        raise ConfigError(
            f"Adapter '{name}' does not fit: it belongs to base weights that init_lora_weights={how!r} changed. Save "
            "it as plain LoRA, with path_initial_model_for_weight_conversion."
        )


A_, B_, MAGNITUDE, SCALES = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "ia3_l"  # below a layer's path


def list_leaves(config: Any) -> tuple[str, ...]:
    """Return the names of the tensors that an adapter of this config has on each layer: IA3's vector, or A and B, with
    DoRA's magnitude.
    """
    if config.peft_type.value == "IA3":
        return (SCALES,)
    return (A_, B_, MAGNITUDE) if config.use_dora else (A_, B_)


def group_by_layer(
    name: str, tensors: Mapping[str, Tensor], config: PeftConfig, layers: Collection[str] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Return tensors by layer path, and there by the name below it. The prefix of PEFT's files is removed.

    Args:
        layers: paths of the layers with slots; None: any path passes.

    Raises:
        AdapterKeyError: some end with other names than the config's method has, or are of other layers.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    leaves, unknown = list_leaves(config), []
    for file_key, tensor in tensors.items():
        key = file_key.removeprefix("base_model.model.")
        leaf = next((leaf for leaf in leaves if key.endswith(f".{leaf}")), "")
        path = key.removesuffix(f".{leaf}")
        if leaf and (layers is None or path in layers):
            grouped.setdefault(path, {})[leaf] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise AdapterKeyError(
            f"Adapter '{name}' does not fit: no slots for {join_some(unknown)}. Name these modules in `targets`, if "
            "they are linear layers."
        )
    return grouped


def fit_adapter(
    name: str,
    config: Any,
    loaded: LoadedWeights,
    layers: dict[str, SlotLayer],
    max_rank: int,
    base: nn.Module,
    allow_nonfinite: bool = False,
) -> dict[str, SlotFactors]:
    """Return by layer path the factors of an adapter for slots, as copies in host memory.

    Only layers with tensors in the file have an entry.

    Raises:
        CheckpointError: a tensor is not a plain one of finite real numbers; with `allow_nonfinite` NaN passes.
        ConfigError: slots cannot hold its method, or a rank is above `max_rank`.
        AdapterKeyError: it has tensors of modules without slots, or none at all. Also if it lacks tensors of a layer,
            or all of a layer that its config targets.
        BaseModelMismatchError: it was made for another architecture.
    """
    check_config(name, config, next(iter(layers.values())).has_gains)
    load = CheckpointValues(base, config, name, loaded, allow_nonfinite=allow_nonfinite)
    tensors = group_by_layer(name, load.tensors, config, layers)
    lost = [key for key in layers if key not in tensors and load.matcher(key).outcome == "matched"]
    lost += [f"{key}.{leaf}" for key, below in tensors.items() for leaf in list_leaves(config) if leaf not in below]
    if lost or not tensors:
        raise AdapterKeyError(
            f"Adapter '{name}' does not fit: {loaded.path} lacks {join_some(lost) or 'any tensor of it'}."
        )
    load.check_base(AdapterCarriers({key: layers[key] for key in tensors}, {}))  # type: ignore[misc]
    make = _make_scales if list_leaves(config) == (SCALES,) else _make_factors
    return {key: make(name, key, below, config, layers[key], max_rank) for key, below in tensors.items()}


def _make_factors(
    name: str, key: str, below: dict[str, Tensor], config: LoraConfig, layer: SlotLayer, max_rank: int
) -> SlotFactors:
    """Return copies of the factors of LoRA in host memory: A (r, in), B (r, out), and the scaling as a field.

    DoRA's magnitude m becomes the gain m / ‖W + scaling · B A‖, by rows and in float32 at least. A bias b of the layer
    gives the shift b · (1 - gain).

    Raises:
        ConfigError: the rank is above `max_rank`, or DoRA cannot read the weight.
        AdapterKeyError: a tensor has another shape or no float dtype.
    """
    cfg = config.at(key)
    A, B, r = below[A_], below[B_], cfg.r
    if r > max_rank:
        raise ConfigError(f"Adapter '{name}' does not fit: rank {r} on '{key}' is above max_rank={max_rank}. Raise it.")
    n, out = layer.in_features, layer.out_features
    _check_shapes(name, key, below, {A_: (r, n), B_: (out, r), MAGNITUDE: (out,)})
    scaling = cfg.lora_alpha / (math.sqrt(r) if cfg.use_rslora else r)
    factors = SlotFactors(_copy_to_host(A), _copy_to_host(B.T), scaling)
    if MAGNITUDE in below:
        if why := layer.site.weight.why_unreadable():
            raise ConfigError(f"Adapter '{name}' does not fit: DoRA needs the weight of '{key}', and {why}.")
        W = layer.site.weight.canon()
        wide = torch.promote_types(A.dtype, torch.float32)  # of half-precision files the gain is not rounded as well
        A, B, m = (t.to(W.device, wide) for t in (A, B, below[MAGNITUDE]))
        gain = m / torch.addmm(W.to(wide), scaling * B, A).norm(dim=1)
        factors.gain, b = _copy_to_host(gain), layer.bias
        factors.shift = None if b is None else _copy_to_host(b * (1 - gain))
    return factors


def _make_scales(
    name: str, key: str, below: dict[str, Tensor], config: Any, layer: SlotLayer, max_rank: int
) -> SlotFactors:
    """Return the factors of IA3 on a layer: rank 0, and a flat copy of its vector.

    It is `inner` for a feed-forward module, from a tensor (1, in), else `gain`, from one (out, 1). Raises
    AdapterKeyError for another shape or no float dtype.
    """
    inner, l = config.is_feedforward(key), below[SCALES]
    n = layer.in_features if inner else layer.out_features
    _check_shapes(name, key, below, {SCALES: (1, n) if inner else (n, 1)})
    A, B, vector = l.new_empty(0, layer.in_features), l.new_empty(0, layer.out_features), _copy_to_host(l.flatten())
    return SlotFactors(A, B, inner=vector) if inner else SlotFactors(A, B, gain=vector)


def _check_shapes(name: str, key: str, below: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise AdapterKeyError if a tensor has another shape than its config and the layer say, or is no float."""
    for leaf, tensor in below.items():
        if tuple(tensor.shape) != shapes[leaf]:
            raise AdapterKeyError(
                f"Adapter '{name}' does not fit: '{key}.{leaf}' is {tuple(tensor.shape)}, which should be "
                f"{shapes[leaf]} by its config and the base model."
            )
        if not tensor.is_floating_point():
            raise AdapterKeyError(f"Adapter '{name}' does not fit: '{key}.{leaf}' is {tensor.dtype}. Use floats.")


def _copy_to_host(t: Tensor) -> Tensor:
    """Return a contiguous copy in host memory, of the same dtype, since state dicts and models may change theirs."""
    return torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t)
