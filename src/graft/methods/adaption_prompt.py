# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, arXiv 2303.16199."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.fields import POSITIVE, Chosen
from graft.core.base_config import model_type
from graft.core.effect import Effect, Update
from graft.core.errors import ConfigError
from graft.core.method import COMPARISON, Method, PublishedRate
from graft.core.ops import find_op
from graft.methods.places import walk
from graft.storage.find import innermost


@dataclass(kw_only=True)
class AdaptionPromptConfig(Chosen):
    """Adaption prompts: the attentions of the last `adapter_layers` blocks attend to `adapter_len` learned tokens, too.

    Raises:
        ConfigError: a number is not positive.
    """

    peft_type: str = "ADAPTION_PROMPT"
    target_modules: str | None = None  # name of the attentions; None: by architecture
    adapter_len: Annotated[int | None, POSITIVE] = None  # tokens per layer
    adapter_layers: Annotated[int | None, POSITIVE] = None  # how many blocks, counted from the output

    is_adaption_prompt = True


class AdaptionPrompt(Method[AdaptionPromptConfig]):
    """LLaMA-Adapter, arXiv 2303.16199: attention(h) + (gate · softmax(q Kᵀ / √d) V) Wₒ with q of the attention itself,
    K and V of a learned prompt.
    """

    prefix = "adaption_"
    published_lr = PublishedRate(5e-4, 5e-3, COMPARISON)
    targets = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
    keeps_base_dtype = frozenset({"adaption_prompt", "adaption_gate"})  # they pass through the attention's own layers

    adaption_prompt: nn.Parameter  # (1, adapter_len, hidden)
    adaption_gate: nn.Parameter  # (1,)

    @classmethod
    def default_targets(cls, model: nn.Module) -> str:
        """Return the name of the attention modules for the model's type.

        Raises ConfigError for types other than llama, mistral and gpt2.
        """
        kind = model_type(model)
        if kind not in cls.targets:
            raise ConfigError(
                f"Unsupported model type for adaption prompt: '{kind}'. Known ones: {', '.join(cls.targets)}."
            )
        return str(cls.targets[kind])

    @classmethod
    def prepare(cls, cfg: AdaptionPromptConfig, model: nn.Module) -> None:
        """Set `cfg.target_paths` to the set of paths of the last `adapter_layers` modules called `target_modules`, or
        the type's default.

        The model's type is checked even if `target_modules` is set.

        Raises:
            ConfigError: the model type is unknown; `adapter_len` or `adapter_layers` is None; the model has fewer such
                modules.
        """
        default = cls.default_targets(model)  # raises for other models
        name = cfg.target_modules or default
        if cfg.adapter_len is None or cfg.adapter_layers is None:
            needed = "adapter_len" if cfg.adapter_len is None else "adapter_layers"
            raise ConfigError(f"Please specify `{needed}` in `peft_config`: there is no default.")
        paths = [path for path, _ in walk(model) if path.rpartition(".")[2] == name]
        if len(paths) < cfg.adapter_layers:
            raise ConfigError(
                f"Config specifies more adapter layers '{cfg.adapter_layers}' than the model has '{len(paths)}'. "
                f"Modules called '{name}' are counted."
            )
        cfg.target_paths = set(paths[-cfg.adapter_layers :])

    def check(self) -> str | None:
        """Return None for an attention with q_proj, k_proj, v_proj and o_proj, or with c_attn and no q_attn; else the
        reason.
        """
        names = self.site.module._modules.keys()
        if names >= {"q_proj", "k_proj", "v_proj", "o_proj"} or ("c_attn" in names and "q_attn" not in names):
            return None
        return "It is no attention with q_proj, k_proj, v_proj and o_proj, or with all in one c_attn, as in GPT-2"

    def describe(self) -> Effect:
        """Return an `Update` with a `branch` on the queries that `input_of` computes; it cannot merge."""
        return Update(branch=self.branch, input_of=self.input_of)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised `adaption_prompt` (1, adapter_len, hidden) and `adaption_gate` (1,), in the dtype of the
        base weight.

        `hidden` is the input width of q_proj, or of c_attn. An `adapter_len` of None counts as 0. They are made on the
        default device.
        """
        site, cfg = self.site, self.cfg
        projection = innermost(site.module.get_submodule("c_attn" if has_fused_projection(site.module) else "q_proj"))
        hidden, dtype = find_op(projection).dims(projection)[1], site.weight.where()[1]
        return dict(
            adaption_prompt=nn.Parameter(torch.empty(1, cfg.adapter_len or 0, hidden, dtype=dtype)),
            adaption_gate=nn.Parameter(torch.empty(1, dtype=dtype)),
        )

    def init_values(self) -> None:
        """Fill the prompt with normal values and the gate with 0, so that the adapter starts as nothing."""
        nn.init.normal_(self.adaption_prompt)
        nn.init.zeros_(self.adaption_gate)  # the adapter starts as nothing

    @staticmethod
    def input_of(module: nn.Module, call: dict[str, Any]) -> Tensor:
        """Return the queries of an attention, (batch, tokens, heads, head_dim), computed again from its arguments by
        name.

        Llama's and Mistral's get rotary embeddings, from `position_embeddings` or `position_ids`; GPT-2's none.
        """
        x, shape = call["hidden_states"], (-1, module.head_dim)
        q: Tensor = module.c_attn(x).chunk(3, -1)[0] if has_fused_projection(module) else module.q_proj(x)
        q = q.unflatten(-1, shape)
        if has_fused_projection(module):
            return q
        cos, sin = call.get("position_embeddings") or module.rotary_emb(x, call["position_ids"])
        first, second = q.chunk(2, -1)
        return q * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)

    def cast(self, x: Tensor) -> Tensor:
        """Return x as it is: `branch` casts the prompt to the queries' dtype instead."""
        return x  # `branch` casts the prompt instead

    def branch(self, q: Tensor) -> Tensor:
        """Return the prompt's part of the attention's output, (batch, tokens, hidden), for queries q (batch, tokens,
        heads, head_dim).

        Keys and values come from the prompt, in q's dtype, by the attention's own layers, values times the gate; heads
        are repeated to fit the queries. The attention has the usual scale and no mask. The result passes o_proj, with a
        fused projection (GPT-2) nothing.
        """
        attention = self.layer.base_layer
        prompt, gate = self.adaption_prompt.to(q.dtype), self.adaption_gate.to(q.dtype)
        if has_fused_projection(attention):
            _, k, v = attention.c_attn(prompt).chunk(3, -1)
        else:
            k, v = attention.k_proj(prompt), attention.v_proj(prompt)
        kv = torch.stack((k, gate * v)).unflatten(-1, (-1, attention.head_dim))  # (2, 1, adapter_len, heads, head_dim)
        kv = kv.repeat_interleave(q.shape[2] // kv.shape[3], 3).transpose(2, 3)  # one head for each of the queries'
        k, v = kv.expand(2, len(q), *kv.shape[2:])
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)
        return y if has_fused_projection(attention) else attention.o_proj(y)


def has_fused_projection(attention: nn.Module) -> bool:
    """Return True if the attention has a layer `c_attn` for queries, keys and values (GPT-2): the prompt's output then
    has no projection.
    """
    return "c_attn" in attention._modules
