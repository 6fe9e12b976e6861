# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: configs, and the learning rates that a short search on validation dates chose."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import graft
from graft.train import allocate_on_step

ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Choice:
    """A method as it is used here."""

    config: Callable[[int], Any]  # training steps -> config
    lr: float
    note: str
    after_step: Callable[..., Any] | None = None


def lora(steps: int) -> Any:
    return graft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=ATTENTION)


def adalora(steps: int) -> Any:
    return graft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=6,
        target_r=4,
        lora_alpha=16,
        target_modules=ATTENTION,
        total_step=steps,
        tinit=steps // 6,
        tfinal=steps // 3,
    )


def ia3(steps: int) -> Any:
    return graft.IA3Config(task_type="CAUSAL_LM")  # keys, values and the feed-forward's input, as in the paper


def prompt_tuning(steps: int) -> Any:
    return graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)


def prefix_tuning(steps: int) -> Any:
    return graft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)


LORA = Choice(lora, 3e-3, "r 4, q and v")
OTHERS = {
    "AdaLoRA": Choice(adalora, 1e-2, "r 6 → 4, q and v", allocate_on_step),
    "IA3": Choice(ia3, 1e-1, "k, v, down"),
    "prefix tuning": Choice(prefix_tuning, 3e-2, "20 tokens"),
    "prompt tuning": Choice(prompt_tuning, 1e-1, "20 tokens"),
}
