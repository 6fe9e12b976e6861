# SPDX-License-Identifier: Apache-2.0
"""Steering vectors from pairs of inputs, by the model's states: arXiv 2312.06681, 2310.01405."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft import AdapterLayer, CalibrationError, ConfigError, SteeringConfig
from graft.inject.parts import get_registry, use_mode
from graft.train.calibration import watch_calls

Inputs = Mapping[str, object]  # arguments of the model's forward


def compute_direction(differences: Tensor, how: Literal["mean", "pca"] = "mean") -> Tensor:
    """Return a direction (H,) of differences (pairs, H): their mean, or with "pca" their first principal component, of
    length 1 and turned to the side of the mean.
    """
    mean = differences.mean(0)
    if how == "mean":
        return mean
    centered = differences - mean
    first = torch.linalg.svd(centered, full_matrices=False)[2][0]
    return torch.where(first @ mean < 0, -first, first)


@torch.no_grad()
def set_steering_vectors(
    model: nn.Module,
    pairs: Iterable[tuple[Inputs, Inputs]],
    adapter_name: str = "default",
    how: Literal["mean", "pca"] = "mean",
) -> None:
    """Set the vectors of a steering adapter in place: for each layer, the direction from the second input of a pair to
    the first. Only the writing waits until no call of the model runs.

    Args:
        model: a PeftModel with the adapter. The base model runs in eval mode, without adapters, twice for each pair of
            batches.
        pairs: batches (wanted, unwanted) with equal numbers of rows, as arguments of the model. The state at the last
            token of each row counts, padding left out.
        how: the mean of the differences, or their first principal component.

    Raises:
        ConfigError: the adapter has no steering vectors, or `how` is unknown.
        CalibrationError: there are no pairs, or only one row of them with "pca". Also if a pair has batches with
            different numbers of rows, or values are not finite.
        InUseError: calls of the model last longer than its `change_timeout`. Whatever is raised, the adapter is as it
            was.
    """
    if how not in ("mean", "pca"):
        raise ConfigError(f"how={how!r} is unknown. Choose 'mean' or 'pca'.")
    registry = get_registry(model)
    all_layers = {} if registry is None else registry.layers
    layers = {key: layer for key, layer in all_layers.items() if adapter_name in layer.methods}
    if not layers or not isinstance(registry.peft_config[adapter_name], SteeringConfig):
        raise ConfigError(f"'{adapter_name}' is no adapter of steering vectors. Add one with a SteeringConfig before.")
    differences: dict[str, list[Tensor]] = {key: [] for key in layers}
    for wanted, unwanted in pairs:
        states = [record_last_states(model, layers, inputs) for inputs in (wanted, unwanted)]
        for key in layers:
            first, second = (of[key] for of in states)
            if first.shape != second.shape:
                raise CalibrationError(f"A pair has batches of {len(first)} and {len(second)} rows. Make them equal.")
            differences[key].append(first - second)
    if how == "pca" and any(sum(len(part) for part in parts) < 2 for parts in differences.values() if parts):
        raise CalibrationError("A principal component needs two pairs at least.")
    vectors = {key: compute_direction(torch.cat(parts), how) for key, parts in differences.items() if parts}
    if not vectors:
        raise CalibrationError("There are no pairs to make a steering vector from. Pass at least one.")
    broken = [key for key, v in vectors.items() if not v.isfinite().all()]
    if broken:
        raise CalibrationError(f"The model's states at layer '{broken[0]}' are not finite. Check the inputs.")
    with registry.call.gate.change(f"set_steering_vectors() of adapter '{adapter_name}'", (adapter_name,)):
        for key, layer in layers.items():
            layer.steering_vector[adapter_name].copy_(vectors[key])


def record_last_states(model: nn.Module, layers: Mapping[str, AdapterLayer], inputs: Inputs) -> dict[str, Tensor]:
    """Return by layer the output of its base layer at the last token of each row, (rows, H) in float32; of a tuple the
    first item counts. Outputs of two dimensions are taken as they are.

    The model runs once, in eval mode and without adapters; hooks are removed afterwards. A 2-D attention mask tells the
    last token of a row, on either side of padding; otherwise it is the last one.
    """
    out: dict[str, Tensor] = {}
    mask = inputs.get("attention_mask")
    real = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def keep_last_state(key: str, args: object, y: Any) -> None:
        """Keep the output, or the first item of a tuple, at the last token of each row that the mask leaves, in
        float32.
        """
        y = (y if isinstance(y, Tensor) else y[0]).float()
        if y.dim() > 2:
            last = y.new_full((len(y),), y.shape[1] - 1, dtype=torch.long)
            if real is not None:
                last = (real.int().argmax(1) + real.sum(1) - 1).to(y.device)
            y = y[torch.arange(len(y), device=y.device), last]
        out[key] = y

    base_layers = {key: layer.base_layer for key, layer in layers.items()}
    with watch_calls(base_layers, keep_last_state), use_mode(model, False), model.disable_adapter():
        model(**inputs)
    return out
