# SPDX-License-Identifier: Apache-2.0
"""Conversion of a PiSSA, OLoRA, CorDA or LoRA-GA adapter to plain LoRA for the base as it was: ΔW = s (B A - B₀ A₀)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from graft.core.errors import ConfigError, PeftWarning, join_some, warn
from graft.core.method import Layer
from graft.methods.lora.config import LoraConfig
from graft.methods.lora.lora import LoRA
from graft.methods.lora.shift import NAME
from graft.methods.lora.sub_configs import CONVERTED

MARK = f".{NAME}."
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def subtract_initial(
    initial: dict[str, Tensor], tensors: dict[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return tensors and config of a plain LoRA adapter with twice the rank: A = [A; A₀], B = [B, -B₀], so ΔW = s (B A
    - B₀ A₀).

    The tensors of `lora_shift` are left out; all others stay. A₀ and B₀ take the dtype and device of A and B. The new
    config has init_lora_weights=True, no `corda_config`, and twice r, ranks and alphas (lora_alpha · √2 with rsLoRA).
    Warns if the initialisation is neither True nor one that changes the base. The inputs stay as they are.

    Args:
        initial: the adapter's tensors before training, by file key; A (r, …), B (out, r, …).

    Raises:
        ConfigError: in this order: a config without the field `init_lora_weights`; rsLoRA with patterns; `initial` is
            not this adapter's start (`check_initial`); the variant changes the base weights, too.
    """
    if not hasattr(config, "init_lora_weights"):
        raise ConfigError(f"path_initial_model_for_weight_conversion is not supported for {type(config).__name__}.")
    how = config.init_lora_weights
    if how is not True and not (isinstance(how, str) and how.startswith(CONVERTED)):
        warn(
            "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/CorDA/OLoRA/LoRA-GA adapter "
            "to a LoRA adapter"
        )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported with rsLoRA and "
            "rank_pattern or alpha_pattern: the scaling of those layers cannot be kept."
        )
    check_initial(initial, tensors)
    out = {key: t for key, t in tensors.items() if MARK not in key}  # all but A and B stays: magnitudes, heads
    for key, now in tuple(out.items()):
        if "lora_A" in key or "lora_embedding_A" in key:
            out[key] = torch.cat([now, initial[key].to(now)], dim=0)
        elif "lora_B" in key or "lora_embedding_B" in key:
            out[key] = torch.cat([now, -initial[key].to(now)], dim=1)
    new_config = copy.deepcopy(config)
    new_config.init_lora_weights, new_config.corda_config = True, None
    new_config.r *= 2
    new_config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    new_config.rank_pattern = {k: 2 * v for k, v in (config.rank_pattern or {}).items()}
    new_config.alpha_pattern = {k: 2 * v for k, v in (config.alpha_pattern or {}).items()}
    setting = LoRA.variant(new_config).changes_base(new_config)
    if setting is not None:
        raise ConfigError(f"An adapter with {setting} has no form for the base weights as they were. Save it as it is.")
    return out, new_config


def check_initial(initial: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise ConfigError unless `initial` is the start of the adapter in `tensors`.

    It needs each factor in the same shape. Where the file has a shift, `initial` needs an A equal to the shift's, up to
    1 % of each value plus 1 % of the largest. A layer that has no `lora_A.weight` in `initial` is not compared.
    """
    factors = [key for key in tensors if any(name in key for name in FACTORS)]
    strange = [key for key in factors if key not in initial or initial[key].shape != tensors[key].shape]
    if strange:
        raise ConfigError(
            "The adapter in path_initial_model_for_weight_conversion is not the start of this one: it lacks "
            f"{join_some(strange)}, or has another shape there. Pass the folder with this adapter, saved before "
            "training."
        )
    for key, A in tensors.items():
        layer, mark, name = key.partition(MARK)
        before = initial.get(f"{layer}.lora_A.weight")
        if not mark or name != "A" or before is None:
            continue
        if before.shape != A.shape or not torch.allclose(before.to(A), A, rtol=1e-2, atol=1e-2 * float(A.abs().max())):
            raise ConfigError(
                f"The adapter in path_initial_model_for_weight_conversion is not the start of this one, by A of "
                f"'{layer}'. Pass the folder with this adapter, saved before training."
            )


def warn_rounded(adapter: str, layers: Mapping[str, Layer]) -> None:
    """Warn if a layer of the adapter holds a quantized weight, which the initialisation has rounded anew: no ΔW undoes
    that. Names the first such layer.
    """
    rounded = [key for key, layer in layers.items() if adapter in layer.methods and not layer.store.exact]
    if rounded:
        warn(
            f"The converted adapter '{adapter}' is not exact: the initialisation has rounded the weight of layer "
            f"'{rounded[0]}' anew. Save the adapter unconverted: its file makes that base again.",
            PeftWarning,
        )
