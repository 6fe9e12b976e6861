# SPDX-License-Identifier: Apache-2.0
"""Tiny models that generate, prompts for them, and decoding without a cache to compare `generate` with.

Nothing ends a sequence (no end-of-sequence token), weights are of order one and the vocabulary is small, so that each
step's choice depends on every part of the prompt and is decided by a wide margin.
"""

from __future__ import annotations

import functools
import inspect

import torch
import transformers
from torch import nn

import graft
from tests.models import VOCAB, adapted, clone, seeded, transformer

LENGTH, TOKENS, STEPS, WINDOW = (
    6,
    4,
    6,
    5,
)  # of the input, of the prompt, of the output; the prompt + input exceed WINDOW

_own = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
_plain = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.25, **_own)
_small = dict(intermediate_size=36, num_key_value_heads=2, max_position_embeddings=32, **_plain)
_mixed = dict(_small, head_dim=6, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
_per_layer = dict(  # layers 2 and 3 use the keys and values of 0 and 1
    _mixed, num_hidden_layers=4, layer_types=_mixed["layer_types"] * 2, num_kv_shared_layers=2,
    hidden_size_per_layer_input=4, vocab_size_per_layer_input=VOCAB,
)  # fmt: skip
_coded = dict(
    d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=36, decoder_ffn_dim=36, max_position_embeddings=32, init_std=0.3, dropout=0.0,
    decoder_start_token_id=2, forced_eos_token_id=None, **_own,
)  # fmt: skip
_t5 = dict(
    _own, d_model=24, d_kv=6, d_ff=36, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
    initializer_factor=2.0,
)  # fmt: skip


def vision() -> nn.Module:
    """A model that reads images as well, and makes the masks for its text part."""
    settings = transformers.Gemma3Config(
        text_config=_mixed, mm_tokens_per_image=4, image_token_index=40, boi_token_index=39, eoi_token_index=38,
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=28),
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(settings)


MODELS = {
    "llama": transformer("LlamaConfig", "LlamaForCausalLM", **_small),
    "gpt2": transformer(
        "GPT2Config", "GPT2LMHeadModel", n_inner=36, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        **_plain,
    ),
    "opt": transformer(
        "OPTConfig", "OPTForCausalLM", ffn_dim=36, max_position_embeddings=32, word_embed_proj_dim=24, init_std=0.25,
        dropout=0.0, **_plain,
    ),
    "neox": transformer("GPTNeoXConfig", "GPTNeoXForCausalLM", intermediate_size=36, **_plain),
    "qwen2": transformer("Qwen2Config", "Qwen2ForCausalLM", **_small),
    "qwen3": transformer("Qwen3Config", "Qwen3ForCausalLM", head_dim=6, **_small),
    "gemma": transformer("GemmaConfig", "GemmaForCausalLM", head_dim=6, **_small),
    "gemma2": transformer("Gemma2Config", "Gemma2ForCausalLM", **_mixed),
    "gemma3": transformer("Gemma3TextConfig", "Gemma3ForCausalLM", **_mixed),
    "gemma3-vision": vision,
    "mistral": transformer("MistralConfig", "MistralForCausalLM", sliding_window=WINDOW, **_small),
    "mixtral": transformer("MixtralConfig", "MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2, **_small),
    "bloom": transformer("BloomConfig", "BloomForCausalLM", **_plain),
    "falcon": transformer("FalconConfig", "FalconForCausalLM", **_plain),  # one head of keys for all
    "falcon-grouped": transformer(  # keys are repeated before they are kept
        "FalconConfig", "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2, **_plain
    ),
    "bigcode": transformer(
        "GPTBigCodeConfig", "GPTBigCodeForCausalLM", n_inner=36, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, **_plain,
    ),
    "gemma3n": transformer(
        "Gemma3nTextConfig", "Gemma3nForCausalLM", laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4, **_per_layer,
    ),
    "gemma4": transformer("Gemma4TextConfig", "Gemma4ForCausalLM", global_head_dim=12, **_per_layer),
    "t5": transformer("T5Config", "T5ForConditionalGeneration", **_t5),
    "mt5": transformer("MT5Config", "MT5ForConditionalGeneration", **_t5),
    "bart": transformer("BartConfig", "BartForConditionalGeneration", **_coded),
    "pegasus": transformer("PegasusConfig", "PegasusForConditionalGeneration", **_coded),
}  # fmt: skip
NEWER = {"gemma4": "Gemma4ForCausalLM", "gemma3n": "Gemma3nForCausalLM", "qwen3": "Qwen3ForCausalLM"}
for _name, _class in NEWER.items():
    if not hasattr(transformers, _class):  # before transformers 5, 4.53, 4.51
        del MODELS[_name]
SEQ2SEQ = ("t5", "mt5", "bart", "pegasus")

_cpt = dict(cpt_token_ids=[5, 11, 3, 17], cpt_mask=[1] * TOKENS, cpt_tokens_type_mask=[1, 2, 3, 4])
METHODS = {
    "prompt": ("PROMPT_TUNING", {}),
    "mlp": ("P_TUNING", {}),
    "lstm": ("P_TUNING", dict(encoder_reparameterization_type="LSTM", encoder_hidden_size=9)),
    "multitask": ("MULTITASK_PROMPT_TUNING", dict(num_tasks=3, num_ranks=2)),
    "cpt": ("CPT", dict(opt_projection_epsilon=30.0, opt_projection_format_epsilon=30.0, **_cpt)),
    "prefix": ("PREFIX_TUNING", {}),
    "projection": ("PREFIX_TUNING", dict(prefix_projection=True, encoder_hidden_size=9)),
    "cartridge": ("CARTRIDGE", {}),
}
SOFT = ("prompt", "mlp", "lstm", "multitask", "cpt")
KEYS = ("prefix", "projection", "cartridge")


def base(name: str) -> nn.Module:
    """A fresh model in eval mode, with the same weights every time, whose generation only ends with its length."""
    return clone(_original(name), {})


@functools.cache
def _original(name: str) -> nn.Module:
    with seeded(0), torch.no_grad():
        model = MODELS[name]().eval()
        for p in model.parameters():
            if p.dim() == 1:  # norms and biases, which begin as ones and zeros
                p.add_(0.3 * torch.randn_like(p))
    model.generation_config.eos_token_id = None
    return model


def config(name: str, method: str, **more):
    kind, options = METHODS[method]
    task = "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM"
    own = {} if kind == "CPT" else dict(num_virtual_tokens=TOKENS)
    return graft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type=task, **{**own, **options, **more})


def spread(encoder: nn.Module, number: int = 1) -> None:
    """Make a prompt matter: give everything that trains in it values of order one."""
    with seeded(number), torch.no_grad():
        for p in encoder.parameters():
            if p.requires_grad:
                p.normal_(std=1.5)


def with_prompt(name: str, method: str, **more):
    """A tiny model with a prompt, in eval mode."""
    model = adapted(base(name), config(name, method, **more), scale=0)  # not all of a prompt trains and is spread
    spread(model.prompt_encoder["default"])
    return model


def inputs(name: str, method: str = "prompt", batch: int = 3) -> dict:
    """Token ids with left padding of a different length in each row, and each row's task where there are tasks."""
    with seeded(7):
        ids = torch.randint(3, VOCAB, (batch, LENGTH))
    mask = (torch.arange(LENGTH)[None] >= torch.arange(batch)[:, None] % 3).long()
    tasks = {"task_ids": torch.arange(batch) % 3} if method == "multitask" else {}
    return {"input_ids": ids * mask, "attention_mask": mask, **tasks}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions that do not count padding, as `generate` makes them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def greedy(model, given: dict, steps: int = STEPS) -> torch.Tensor:
    """What `generate` must give: every token chosen from a whole forward pass without a cache.

    Gemma 3n shares keys between layers by way of the cache before transformers 5, and so gets an empty one.
    """
    use_cache = model.config.model_type == "gemma3n_text"
    forward = inspect.signature(getattr(model, "base_model", model).forward).parameters
    if model.config.is_encoder_decoder:
        ids = torch.full((len(given["input_ids"]), 1), model.config.decoder_start_token_id)
        for _ in range(steps):
            logits = model(**given, decoder_input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        return ids
    ids, mask, rest = given["input_ids"], given["attention_mask"], {k: v for k, v in given.items() if k == "task_ids"}
    for _ in range(steps):
        placed = {"position_ids": positions(mask)} if "position_ids" in forward else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=use_cache, **placed, **rest).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def generate(model, given: dict, **options) -> torch.Tensor:
    """`generate` without chance."""
    return model.generate(**given, **{"max_new_tokens": STEPS, "do_sample": False, **options})


def embedded(model, given: dict) -> dict:
    """What a base model is given to see a soft prompt in front of its input: the prompt's embeddings and the words'."""
    inner = model.get_base_model()
    stack = inner.get_encoder() if model.config.is_encoder_decoder else decoder_of(inner)
    words = getattr(stack, "embed_tokens", None) or inner.get_input_embeddings()
    encoder = model.prompt_encoder["default"]
    ids, mask = given["input_ids"], given["attention_mask"]
    prompt = encoder(**{k: v for k, v in given.items() if k == "task_ids"})[..., :TOKENS, :]
    embeds = torch.cat([prompt.expand(len(ids), -1, -1), words(ids)], dim=1)
    out = {"inputs_embeds": embeds, "attention_mask": torch.cat([mask.new_ones(len(mask), TOKENS), mask], dim=1)}
    if hasattr(stack, "get_per_layer_inputs"):  # Gemma 3n and 4: for the prompt, those of padding
        padded = nn.functional.pad(ids, (TOKENS, 0), value=model.config.pad_token_id)
        only = [None] if "gemma4" in stack.config.model_type else []  # without embeddings, which it takes, too
        out["per_layer_inputs"] = stack.get_per_layer_inputs(padded, *only)
    return out


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder, which some models do not tell before transformers 4.57."""
    told = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model.base_model if told is None else told


def empty_cache(settings):
    """A cache that grows; it takes the model's config since transformers 4.56."""
    takes_config = "config" in inspect.signature(transformers.DynamicCache.__init__).parameters
    return transformers.DynamicCache(config=settings) if takes_config else transformers.DynamicCache()


def held(cache) -> list:
    """Key and value of each layer."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))  # before transformers 4.54


def filled(model, batch: int):
    """A cache that holds a prompt of keys and values, for a base model."""
    from graft.prompts.prefix_tuning import as_pairs

    settings = decoder_of(model.get_base_model()).config
    cache = own = empty_cache(settings)
    if model.config.is_encoder_decoder:
        cache = transformers.EncoderDecoderCache(own, empty_cache(settings))
    for i, pair in enumerate(as_pairs(model.prompt_encoder["default"](), model.peft_config["default"])):
        own.update(*(t.detach().expand(batch, -1, -1, -1) for t in pair), i)
    return cache


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
