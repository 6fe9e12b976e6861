# SPDX-License-Identifier: Apache-2.0
"""Tiny models of families whose experts transformers holds as stacks, or whose files have other names."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from tests.models import clone, seeded

SIZES = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
IDS = torch.arange(28).view(2, 14) % 31
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=24)
LOCAL: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)
ROUTED: dict[str, Any] = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=24, n_shared_experts=1,
    first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip
LATENT: dict[str, Any] = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
HYBRID: dict[str, Any] = dict(layer_types=["full_attention"] * 2)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # class of the model, without its ending → sizes
    "qwen2_moe": ("Qwen2Moe", EXPERTS | dict(shared_expert_intermediate_size=12)),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | dict(head_dim=8)),
    "qwen3_next": ("Qwen3Next", EXPERTS | HYBRID | dict(head_dim=8, shared_expert_intermediate_size=12)),
    "deepseek_v2": ("DeepseekV2", ROUTED | LATENT | dict(topk_method="greedy")),
    "deepseek_v3": ("DeepseekV3", ROUTED | LATENT),
    "glm4_moe": ("Glm4Moe", ROUTED | dict(head_dim=8)),
    "olmoe": ("Olmoe", EXPERTS),
    "dots1": ("Dots1", ROUTED | dict(head_dim=8)),
    "hunyuan": ("HunYuanMoEV1", dict(num_experts=4, moe_topk=2, intermediate_size=24, head_dim=8)),
    "ernie": ("Ernie4_5_Moe", dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=8, intermediate_size=24)),
    "mixtral": ("Mixtral", LOCAL),
    "minimax": ("MiniMax", LOCAL | HYBRID | dict(head_dim=8)),
    "minimax_m2": ("MiniMaxM2", LOCAL | dict(head_dim=8)),
    "phimoe": ("Phimoe", LOCAL),
    "lfm2_moe": ("Lfm2Moe", EXPERTS | HYBRID | dict(num_dense_layers=1)),
    "jamba": ("Jamba", dict(num_experts=4, intermediate_size=24, attn_layer_period=1, attn_layer_offset=0,
                            expert_layer_period=1, expert_layer_offset=0, use_mamba_kernels=False)),
    "granitemoe": ("GraniteMoe", LOCAL),
    "granitemoeshared": ("GraniteMoeShared", LOCAL | dict(shared_intermediate_size=12)),
    "granitemoehybrid": ("GraniteMoeHybrid", LOCAL | dict(shared_intermediate_size=12, mamba_n_heads=4,
                                                               layer_types=["attention"] * 2)),
    "qwen3_5_moe": ("Qwen3_5Moe", EXPERTS | HYBRID | dict(head_dim=8, shared_expert_intermediate_size=12)),
    "gemma4": ("Gemma4", EXPERTS | HYBRID | dict(head_dim=8, enable_moe_block=True, top_k_experts=2,
                                                 hidden_size_per_layer_input=0)),
    "gpt_oss": ("GptOss", LOCAL | dict(head_dim=8)),
    "llama4": ("Llama4", LOCAL | dict(head_dim=8, intermediate_size_mlp=24, num_experts_per_tok=1)),
    "nemotron_h": ("NemotronH", dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
                                     intermediate_size=24, n_shared_experts=1, head_dim=8, n_group=1, topk_group=1,
                                     moe_shared_expert_intermediate_size=12, layers_block_type=["attention", "moe"])),
}  # fmt: skip
FLAT = {n: v for n, v in SIZES.items() if n != "num_key_value_heads"} | dict(intermediate_size=24)
SEEN: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
)
SECTIONS = dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
RENAMED: dict[str, tuple[str, str, dict[str, Any]]] = {  # whose files have other names: class, its config, sizes
    "llava": ("LlavaForConditionalGeneration", "Llava", dict(
        vision_config=SEEN | dict(model_type="clip_vision_model"), text_config=SIZES | dict(intermediate_size=24))),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VL", dict(
        text_config=SIZES | SECTIONS, vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2))),
    "vit": ("ViTForImageClassification", "ViT", SEEN),
    "swin": ("SwinForImageClassification", "Swin", dict(
        image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoX", FLAT),
    "gte": ("GteForMaskedLM", "Gte", FLAT),  # transformers cuts q, k and v out of one tensor
    "aria": ("AriaTextForCausalLM", "AriaText", SIZES | dict(
        intermediate_size=24, moe_num_experts=3, moe_topk=2, moe_num_shared_experts=1)),
}  # fmt: skip
TEXT = {"Qwen3_5Moe", "Gemma4", "Llama4"}  # whose text model has a config of its own


def base(family: str, **sizes: Any) -> Any:
    """Return a fresh model in eval mode whose experts count."""
    return clone(_original(family), {}) if not sizes else _built(family, sizes)


@cache
def _original(family: str) -> Any:
    return _built(family, {})


def _built(family: str, sizes: dict[str, Any]) -> Any:
    import transformers as t

    if family in RENAMED:
        kind, config, own = RENAMED[family]
        with seeded(0):
            return getattr(t, kind)(getattr(t, f"{config}Config")(**own)).eval()
    name, own = FAMILIES[family]
    made = SIZES | own | sizes
    config = getattr(t, f"{name}TextConfig" if name in TEXT else f"{name}Config")(**made)
    with seeded(0):
        model = getattr(t, f"{name}ForCausalLM")(config)
        for n, p in model.named_parameters():
            if "experts" in n:
                nn.init.normal_(p, std=0.3)
    return model.eval()
