# SPDX-License-Identifier: Apache-2.0
"""What X-LoRA adds to its model class: settings of the mixture, and a log of its weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graft.core.errors import ConfigError


def set_topk_lora(tuner: Any, value: int | None) -> None:
    """Let only so many experts act on each token; None: all of them.

    Raises:
        ConfigError: there are not so many.
    """
    check_top_k(value, tuner.classifier.n_classes)
    tuner.classifier.config.top_k_lora = value


def set_global_scaling_weight(tuner: Any, weight: float) -> None:
    """Multiply what all experts add by `weight`."""
    tuner.classifier.config.global_scaling_weight = weight


def get_global_scaling_weight(tuner: Any) -> float:
    weight: float = tuner.classifier.config.global_scaling_weight
    return weight


def set_scaling_pass_value(tuner: Any, value: float | None) -> None:
    """Set the weight of every expert in the first pass; None: 1 / number of experts."""
    tuner.classifier.config.scaling_pass_value = 1 / tuner.classifier.n_classes if value is None else value


def get_latest_scalings(tuner: Any) -> Tensor | None:
    """Return the weights of the last call, (batch, tokens, layers, experts); None before the first."""
    latest: Tensor | None = tuner.classifier.latest
    return latest


def get_scalings_log(tuner: Any) -> list[Tensor]:
    """Return the weights of the calls since logging was turned on, in a list of its own."""
    return list(tuner.classifier.log_scalings)


def enable_scalings_logging(tuner: Any) -> None:
    tuner.classifier.scalings_logging = True


def disable_scalings_logging(tuner: Any) -> None:
    """Turn logging off, and keep the log."""
    tuner.classifier.scalings_logging = False


def clear_scalings_log(tuner: Any) -> None:
    tuner.classifier.log_scalings.clear()


def get_bucketed_scalings_log(tuner: Any) -> dict[int, tuple[list[int], list[Tensor]]]:
    """Return the log by number of tokens: {tokens: (places in the log, weights)}."""
    buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
    for i, scalings in enumerate(tuner.classifier.log_scalings):
        places, values = buckets.setdefault(scalings.shape[1], ([], []))
        places.append(i)
        values.append(scalings)
    return buckets


def check_top_k(value: int | None, experts: int) -> None:
    if value is not None and value > experts:
        raise ConfigError(f"top_k_lora={value} is more than the {experts} experts.")


API = {
    function.__name__: function
    for function in (
        set_topk_lora,
        set_global_scaling_weight,
        get_global_scaling_weight,
        set_scaling_pass_value,
        get_latest_scalings,
        get_scalings_log,
        enable_scalings_logging,
        disable_scalings_logging,
        clear_scalings_log,
        get_bucketed_scalings_log,
    )
}
