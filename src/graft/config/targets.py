# SPDX-License-Identifier: Apache-2.0
"""Default target_modules by architecture (`config.model_type`)."""

from __future__ import annotations


def _table(*rows: tuple[str, list[str] | str]) -> dict[str, list[str] | str]:
    return {model_type: targets for model_types, targets in rows for model_type in model_types.split()}


LORA = _table(
    ("t5 mt5", ["q", "v"]),
    (
        "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
        ["q_proj", "v_proj"],
    ),
    ("gpt2 gpt_bigcode", ["c_attn"]),
    ("bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon", ["query_key_value"]),
    ("blip-2", ["q", "v", "q_proj", "v_proj"]),
    ("bert roberta xlm-roberta electra layoutlm", ["query", "value"]),
    ("deberta-v2", ["query_proj", "value_proj"]),
    ("deberta", ["in_proj"]),
    ("mpt", ["Wqkv"]),
    ("btlm", ["c_proj", "c_attn"]),
    ("codegen", ["qkv_proj"]),
    ("phi", ["q_proj", "v_proj", "fc1", "fc2"]),
    ("gemma4", ".*language_model\\..*\\.(q_proj|v_proj)"),
    ("nemotron_h", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ("rwkv", ["key", "value", "receptance", "output"]),
    ("rwkv7", ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"]),
)

# mixers with a state, which PEFT has no targets for: the projections around them, and attention as in `LORA`
MIXERS = _table(
    ("mamba mamba2 falcon_mamba", ["in_proj", "out_proj"]),
    (
        "jamba bamba falcon_h1 zamba zamba2 granitemoehybrid lfm2 lfm2_moe",
        ["q_proj", "v_proj", "in_proj", "out_proj"],
    ),
    ("qwen3_next", ["q_proj", "v_proj", "in_proj_qkvz", "out_proj"]),
)

SDT = _table(("mamba falcon_mamba jamba", ["x_proj", "out_proj"]))  # A_log of their mixers as well

IA3 = _table(
    ("t5", ["k", "v", "wo"]),
    ("mt5", ["k", "v", "wi_1"]),
    ("gpt2 gpt_bigcode", ["c_attn", "mlp.c_proj"]),
    ("bloom", ["query_key_value", "mlp.dense_4h_to_h"]),
    ("roberta bert", ["key", "value", "output.dense"]),
    ("opt", ["q_proj", "k_proj", "fc2"]),
    ("gptj", ["q_proj", "v_proj", "fc_out"]),
    ("gpt_neox RefinedWebModel RefinedWeb falcon", ["query_key_value", "dense_4h_to_h"]),
    ("gpt_neo", ["q_proj", "v_proj", "c_proj"]),
    ("bart phi", ["q_proj", "v_proj", "fc2"]),
    ("llama mistral", ["k_proj", "v_proj", "down_proj"]),
    ("llama4 gemma gemma2 gemma3_text qwen2 qwen3", ["q_proj", "v_proj", "down_proj"]),
    ("mixtral", ["k_proj", "v_proj", "w2"]),
    ("deberta-v2", ["key_proj", "value_proj", "output.dense"]),
    ("deberta", ["in_proj", "output.dense"]),
)

IA3_FEEDFORWARD = _table(
    ("t5", ["wo"]),
    ("mt5", []),
    ("gpt2 gpt_bigcode", ["mlp.c_proj"]),
    ("bloom", ["mlp.dense_4h_to_h"]),
    ("roberta bert deberta-v2 deberta", ["output.dense"]),
    ("opt bart phi", ["fc2"]),
    ("gptj", ["fc_out"]),
    ("gpt_neox RefinedWeb RefinedWebModel falcon", ["dense_4h_to_h"]),
    ("gpt_neo", ["c_proj"]),
    ("llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3", ["down_proj"]),
    ("mixtral", ["w2"]),
)

LN_TUNING = _table(
    ("llama mistral gemma", ["input_layernorm", "post_attention_layernorm", "norm"]),
    ("bloom falcon", ["input_layernorm", "post_attention_layernorm", "ln_f"]),
    (
        "llava",
        ["multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"],
    ),
    ("t5 mt5", ["layer_norm", "final_layer_norm"]),
    ("bart", ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]),
    ("gpt2", ["ln_1", "ln_2", "ln_f"]),
    ("blip-2", ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"]),
    ("gptj", ["ln_1", "ln_f"]),
    ("phi", ["input_layernorm", "final_layernorm"]),
    (
        "gemma2 gemma3_text",
        [
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ],
    ),
    ("qwen2 qwen3", ["post_attention_layernorm"]),
)

ADALORA = _table(
    ("t5", ["q", "k", "v", "o", "wi", "wo"]),
    ("mt5", ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
    ("bart opt", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    ("gpt2 gpt_bigcode", ["c_attn"]),
    ("bloom gpt_neox", ["query_key_value"]),
    ("gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3", ["q_proj", "v_proj"]),
    ("bert", ["query", "value"]),
    ("roberta", ["query", "key", "value", "dense"]),
    ("deberta-v2", ["query_proj", "key_proj", "value_proj", "dense"]),
    ("deberta", ["in_proj"]),
    ("gemma4", ".*language_model\\..*\\.(q_proj|v_proj)"),
    ("nemotron_h", ["q_proj", "k_proj", "v_proj", "o_proj"]),
)

VBLORA = {**ADALORA, "roberta": ["query", "value"]}

BEFT = _table(
    ("t5 mt5", ["v"]),
    ("roberta bert", ["value"]),
    (
        "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
        ["v_proj"],
    ),
    ("deberta-v2", ["value_proj"]),
)

OSF = _table(
    (
        "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
    ),
    ("gpt2 gpt_bigcode", ["c_attn", "c_proj"]),
    ("bloom gpt_neox falcon", ["query_key_value", "dense_4h_to_h"]),
    ("opt", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    ("gptj", ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]),
)

PHI_ATTENTION = {**LORA, "phi": ["q_proj", "v_proj"]}  # VeRA and others: phi without its feed-forward layers

PVERA = {**PHI_ATTENTION, "dinov2": ["query", "value"]}

FROD = {**PHI_ATTENTION, "vit": ["query", "value"]}

FOURIER = {**LORA, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}  # FourierFT, C3A

WAVELET = {k: v for k, v in FOURIER.items() if k not in ("btlm", "rwkv", "rwkv7")}
ADAMSS = {**LORA, "vit": ["query", "value"]}

EMBEDDING_NAMES = ("embed_tokens", "lm_head")

TASK_HEADS: dict[str, list[str]] = {  # new modules of a task's model: they train, and files hold them
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
