# SPDX-License-Identifier: Apache-2.0
"""XLoraConfig: the fields of PEFT 0.21.2, and where a checkpoint has its experts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from graft.config.base import CONFIG_NAME, PeftConfig
from graft.config.hub import fetch
from graft.core.errors import ConfigError, warn


@dataclass(kw_only=True)
class XLoraConfig(PeftConfig):
    """X-LoRA (arXiv 2402.07148): a classifier on the base model's hidden states weighs LoRA adapters, the experts.

    Raises:
        ConfigError: a value out of range.
    """

    peft_type: Any = "XLORA"
    hidden_size: int | None = None  # of the base model's hidden states; None: 4096
    adapters: dict[str, str] | None = None  # name of an expert → folder or hub repository
    enable_softmax: bool = True  # over the experts
    enable_softmax_topk: bool = False  # over those that are kept
    layerwise_scalings: bool = False  # each layer has weights of its own
    xlora_depth: int = 1  # linear layers of the classifier
    xlora_size: int = 2048  # its width, if it has several layers
    xlora_dropout_p: float = 0.2  # in the classifier
    use_trainable_adapters: bool = False  # experts train as well
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None  # so many experts act on a token; None: all
    scaling_pass_value: float = 0.0  # weight of every expert in the pass that the classifier reads
    global_scaling_weight: float = 1.0  # times every weight

    taken_on_loading: ClassVar[frozenset[str]] = frozenset({"adapters"})

    def __post_init__(self) -> None:
        super().__post_init__()
        # expert → (where this config was read, sub-folder there, keywords for the hub)
        self.beside: dict[str, tuple[str, str, dict[str, Any]]] = {}
        if self.hidden_size is None:
            warn(
                "No value was provided for `hidden_size`. This will be set to 4096 by default, please ensure that "
                "this is correct."
            )
            self.hidden_size = 4096
        if self.adapters is None:
            warn("No value was provided for `adapters`. This will be set to empty, please ensure that this is correct.")
            self.adapters = {}
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn("`enable_softmax_topk` enabled `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            warn("`enable_softmax_topk` and `enable_softmax` are both enabled. This will result in worse performance.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warn("`top_k_lora` value must be at least 1.")
        if self.xlora_depth <= 0:
            raise ConfigError("X-LoRA depth must be strictly positive.")
        for name in ("hidden_size", "xlora_size", "softmax_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 <= self.xlora_dropout_p <= 1:
            raise ConfigError(f"`xlora_dropout_p` must be between 0 and 1, got {self.xlora_dropout_p}.")

    def to_json(self, auto_mapping_dict: dict[str, Any] | None = None) -> str:
        """Return the text of adapter_config.json, with the experts in their order, which means something."""
        values = json.loads(super().to_json(auto_mapping_dict))
        return json.dumps({**values, "adapters": self.adapters}, indent=2)

    def take(self, options: dict[str, Any]) -> None:
        """Take the experts from other places."""
        if "adapters" in options:
            self.adapters, self.beside = dict(options["adapters"]), {}

    def read_from(self, where: str, subfolder: str | None = None, **hub: Any) -> None:
        """Note which experts are saved beside this config, in sub-folders that have their names.

        Their order is that of the classifier's outputs. PEFT, which calls them 0, 1, 2, …, sorts them as text.
        """
        names = list(self.adapters or ())
        if names == sorted(names) and all(name.isdigit() for name in names):
            self.adapters = {name: self.adapters[name] for name in sorted(names, key=int)}  # type: ignore[index]
        for name in self.adapters or {}:
            folder = os.path.join(subfolder or "", name)
            if fetch(where, CONFIG_NAME, subfolder=folder, **hub) is not None:
                self.beside[name] = (where, folder, hub)
