# SPDX-License-Identifier: Apache-2.0
"""Config fields of prompt methods, and their values from the base model's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from graft.config.base import PeftConfig
from graft.config.bounds import must_be
from graft.config.fields import POSITIVE
from graft.config.reading import Json
from graft.core.errors import ConfigError

# names that each field has in the configs of base models
NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}

ONE_OR_TWO = must_be("1, or 2 for an encoder and a decoder", lambda number: number in (1, 2))


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """The config of a prompt method. `fit` takes sizes that are None from the base model's config.

    Raises:
        ConfigError: a size is not positive, or `num_transformer_submodules` neither 1 nor 2.
    """

    num_virtual_tokens: Annotated[int | None, POSITIVE] = None
    token_dim: Annotated[int | None, POSITIVE] = None  # size of an embedding, or of one layer's keys
    num_transformer_submodules: Annotated[int | None, ONE_OR_TWO] = None  # 2 for an encoder and a decoder, else 1
    num_attention_heads: Annotated[int | None, POSITIVE] = None
    num_layers: Annotated[int | None, POSITIVE] = None
    modules_to_save: list[str] | None = None  # trained whole and saved next to the prompt

    is_prompt_learning: ClassVar[bool] = True
    holds_keys: ClassVar[bool] = False  # the prompt is keys and values of each layer, not embeddings

    @property
    def rows(self) -> int:
        """The number of virtual tokens, times `num_transformer_submodules`; None counts as 0 tokens and 1 submodule."""
        return (self.num_virtual_tokens or 0) * (self.num_transformer_submodules or 1)

    def fit(self, model_config: object, width: int | None = None) -> None:
        """Set the sizes that are None from the base model's config.

        `token_dim` is `width`, for prompts that are embeddings (not keys). Then `num_layers`, `token_dim` and
        `num_attention_heads`, if still None, get the first value that the config has under one of their names in
        `NAMES`. `num_transformer_submodules` is 2 for SEQ_2_SEQ_LM, else 1. For keys, `_fit_keys` corrects the width
        and the heads. `encoder_hidden_size`, if it is there and None, becomes `token_dim`.

        Args:
            model_config: the base model's: an object, a dict or None.
            width: the size of its word embeddings, if it has any.

        Raises:
            ConfigError: a size is neither passed nor in the model's config, or sizes contradict each other.
        """
        facts = to_dict(model_config)
        if self.token_dim is None and not self.holds_keys:
            self.token_dim = width
        for field, names in NAMES.items():
            if getattr(self, field) is None:
                size = next((facts[n] for n in names if facts.get(n) is not None), None)
                if size is None:
                    raise ConfigError(
                        f"Please specify `{field}` in `peft_config`: the base model "
                        + (f"has none of {', '.join(names)} in its config." if facts else "has no config.")
                    )
                setattr(self, field, size)
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if self.task_type == "SEQ_2_SEQ_LM" else 1
        if self.holds_keys:
            self._fit_keys(facts)
        if getattr(self, "encoder_hidden_size", 0) is None:
            self.encoder_hidden_size = self.token_dim

    def _fit_keys(self, facts: Json) -> None:
        """Set `token_dim` to the width of one layer's keys over all heads, and `num_attention_heads` to the number of
        key heads. Both must be set before.

        Heads are grouped if `facts` has `num_key_value_heads`, or with Falcon's multi_query in the old architecture (1
        head). Then the width is heads × `head_dim`. Without `head_dim`, it is heads × (`token_dim` // the old number of
        heads). Size and heads are the largest of all layers, where the config has a global size or `per_layer_config`.

        Without grouped heads, the number of heads stays, and `token_dim` is d_kv × heads (T5) or stays.

        Raises:
            ConfigError: without grouped heads, `token_dim` is no multiple of the heads.
        """
        heads = facts.get("num_key_value_heads")
        if heads is None and facts.get("multi_query") and not facts.get("new_decoder_architecture"):  # Falcon
            heads = 1
        assert self.token_dim is not None and self.num_attention_heads is not None
        if heads is None:
            if facts.get("d_kv") is not None:  # T5: all heads together need not be as wide as the model
                self.token_dim = facts["d_kv"] * self.num_attention_heads
            if self.token_dim % self.num_attention_heads:
                raise ConfigError(
                    f"token_dim={self.token_dim} is no multiple of num_attention_heads={self.num_attention_heads}: it "
                    "is the size of one layer's keys, over all heads."
                )
            return
        size = facts.get("head_dim") or self.token_dim // self.num_attention_heads
        if facts.get("global_head_dim"):
            size = max(size, facts["global_head_dim"])
            heads = max(heads, facts.get("num_global_key_value_heads") or 0)
        for layer in (facts.get("per_layer_config") or {}).values():
            size, heads = max(size, layer.get("head_dim", 0)), max(heads, layer.get("num_key_value_heads", 0))
        self.token_dim, self.num_attention_heads = size * heads, heads


def to_dict(model_config: Any) -> Json:
    """Return a model's config as a new dict: of a dict its entries, else its `to_dict()`. None gives {}.

    Names in `attribute_map` are added where they are missing and their target exists. If `text_config` is a dict, its
    entries override all others.
    """
    if model_config is None:
        return {}
    facts = dict(model_config) if isinstance(model_config, dict) else model_config.to_dict()
    aliases = getattr(model_config, "attribute_map", {})
    facts |= {new: facts[old] for new, old in aliases.items() if new not in facts and old in facts}
    return {**facts, **facts["text_config"]} if isinstance(facts.get("text_config"), dict) else facts
