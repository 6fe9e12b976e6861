# SPDX-License-Identifier: Apache-2.0
"""Base models that are built in other ways than most: caches, embeddings, heads and masks of their own."""

from __future__ import annotations

import pytest
import torch
import transformers

import graft
from tests.leaves_out import CACHES_OF_LLAMA4
from tests.looks import get_registry
from tests.models import VOCAB, seeded, transformer

P = 4
own = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
plain = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.25, max_position_embeddings=64,
    **own,
)  # fmt: skip
small = dict(intermediate_size=36, num_key_value_heads=2, head_dim=8, **plain)
experts = dict(small, num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
encoder = {k: v for k, v in {**plain, "intermediate_size": 36}.items() if k != "tie_word_embeddings"}
coded = dict(
    own, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=36, decoder_ffn_dim=36, max_position_embeddings=64, init_std=0.25, decoder_start_token_id=2,
    dropout=0.0,
)  # fmt: skip
vision = dict(
    model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    image_size=8, patch_size=4, projection_dim=32, vision_use_head=False,
)  # fmt: skip


VERSION = tuple(int(n) for n in transformers.__version__.split(".")[:2])
OLDER = VERSION < (5, 24)  # than the test extra has: with that nothing is left out


def base_of(config, model, **settings):
    if OLDER and not hasattr(transformers, model):
        pytest.skip(f"transformers {transformers.__version__} has no {model}")
    with seeded(0), torch.no_grad():
        made = transformer(config, model, **settings)().eval()
        for p in made.parameters():
            if p.dim() == 1 and p.is_floating_point():
                p.add_(0.2 * torch.randn_like(p))
    if getattr(made, "generation_config", None) is not None:
        made.generation_config.eos_token_id = None
    return made


def with_prompt(base, method="PROMPT_TUNING", task="CAUSAL_LM", **more):
    config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type=task, num_virtual_tokens=P, **more)
    model = graft.get_peft_model(base, config).eval()
    with seeded(1), torch.no_grad():
        for p in model.prompt_encoder["default"].parameters():
            if p.requires_grad:
                p.normal_()
    return model


def ids(batch=3, length=6):
    with seeded(7):
        return torch.randint(3, VOCAB, (batch, length))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# caches


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
@pytest.mark.parametrize(
    "name, task",
    [("LlamaModel", "FEATURE_EXTRACTION"), pytest.param("Llama4ForCausalLM", "CAUSAL_LM", marks=CACHES_OF_LLAMA4)],
    ids=str,
)
@torch.no_grad()
def test_a_cache_under_either_name_where_the_called_model_is_the_stack(name, task, argument, method):
    extra = dict(intermediate_size_mlp=36, num_local_experts=2, interleave_moe_layer_step=2, attention_chunk_size=5)
    config = "LlamaConfig" if name == "LlamaModel" else "Llama4TextConfig"
    model = with_prompt(base_of(config, name, **small, **(extra if "4" in name else {})), method, task)
    if argument == "cache" and OLDER and get_registry(model).stacks["main"].cache_name != "cache":
        pytest.skip(f"transformers {transformers.__version__} calls it past_key_values")
    x = ids()
    want = model(input_ids=x, use_cache=False)[0][:, -2:]
    held = model(input_ids=x[:, :-2], use_cache=True)
    held = held[get_registry(model).stacks["main"].cache_name]
    out = model(input_ids=x[:, -2:], **{argument: held})[0]
    assert out.shape == want.shape
    close(out, want)


@torch.no_grad()
def test_a_static_cache_under_its_old_name_is_refused():
    model = with_prompt(base_of("LlamaConfig", "LlamaModel", **small), task="FEATURE_EXTRACTION")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match="StaticCache has no room for a prompt of 4 tokens"):
        model(input_ids=ids(), past_key_values=cache)


@torch.no_grad()
def test_a_first_layer_without_keys():
    settings = dict(experts, layer_types=["linear_attention", "full_attention"], block_size=4)
    model = with_prompt(base_of("MiniMaxConfig", "MiniMaxForCausalLM", **settings))
    x = {"input_ids": ids(), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    with_cache, without = (model.generate(**x, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)


STATES = {
    "Jamba": dict(
        experts, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4
    ),
    "Qwen3Next": dict(
        experts, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "Lfm2": dict(small, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
}  # fmt: skip


def refused(base, *words, **options):
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(graft.ConfigError) as raised:
        with_prompt(base, **options)
    assert all(word in str(raised.value) for word in words), raised.value
    assert base.state_dict().keys() == before.keys()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())


@pytest.mark.differs(
    "keys for layers that keep a state or latent keys (Jamba, Qwen3-Next, LFM2, MiniMax, DeepSeek-V2 and V3); "
    "prompts for Mamba"
)
@pytest.mark.skipif(VERSION < (5, 0), reason="caches of their own there")
@pytest.mark.parametrize("method", ["PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("name", STATES)
def test_keys_for_layers_that_keep_a_state(name, method):
    base = base_of(f"{name}Config", f"{name}ForCausalLM", **STATES[name])
    refused(base, "Layers [0]", f"{name}Model", method, "Use PROMPT_TUNING or P_TUNING", method=method)
    x = ids()
    model = with_prompt(base)
    with_cache, without = (model.generate(x, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "CARTRIDGE"])
def test_keys_for_latent_attention(method):
    latent = dict(
        experts, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
    )  # fmt: skip
    del latent["head_dim"]
    base = base_of("DeepseekV3Config", "DeepseekV3ForCausalLM", **latent)
    refused(base, "DeepseekV3Model", "multi-head latent attention", method, "PROMPT_TUNING", method=method)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_models_that_keep_a_state(name, method):
    heads = dict(num_heads=8, head_dim=8, n_groups=1) if name == "Mamba2" else {}
    base = base_of(
        f"{name}Config", f"{name}ForCausalLM", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=VOCAB,
        **heads,
    )  # fmt: skip
    refused(base, f"{name}Model keeps a state", method, "LORA", method=method)


def test_an_encoder_of_sound():
    settings = dict(coded, num_mel_bins=8, max_source_positions=16, max_target_positions=16)
    base = base_of("WhisperConfig", "WhisperForConditionalGeneration", **settings)
    words = ("WhisperEncoder", "inputs_embeds", "its input is input_features", "LORA")
    refused(base, *words, task="SEQ_2_SEQ_LM")


# embeddings


NARROW = {
    "OPTForCausalLM": dict(plain, ffn_dim=36, word_embed_proj_dim=16),
    "ElectraForSequenceClassification": dict(encoder, embedding_size=16),
    "AlbertForSequenceClassification": dict(encoder, embedding_size=16),
    "MobileBertForSequenceClassification": dict(encoder, embedding_size=16, intra_bottleneck_size=32),
    "RemBertForSequenceClassification": dict(encoder, input_embedding_size=16),
}


@pytest.mark.differs(
    "embeddings narrower than the layers (OPT with `word_embed_proj_dim`, ELECTRA, ALBERT, MobileBERT, RemBERT), "
    "flan-T5 whose heads are wider than the model"
)
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"])
@pytest.mark.parametrize("name", NARROW)
def test_embeddings_narrower_than_the_layers(name, method, tmp_path):
    kind = name.partition("For")[0]
    base = base_of(f"{kind}Config", name, **NARROW[name])
    task = "CAUSAL_LM" if name.endswith("LM") else "SEQ_CLS"
    model = with_prompt(base, method, task)
    assert model.peft_config["default"].token_dim == 16
    tasks = {"task_ids": torch.tensor([0, 0, 0])} if "MULTITASK" in method else {}
    with torch.no_grad():
        out = model(input_ids=ids(), **tasks).logits
        with model.disable_adapter():
            assert not torch.allclose(out[..., -1:, :], model(input_ids=ids()).logits[..., -1:, :])
    model.save_pretrained(tmp_path)
    again = graft.PeftModel.from_pretrained(base_of(f"{kind}Config", name, **NARROW[name]), tmp_path)
    with torch.no_grad():
        close(again(input_ids=ids(), **tasks).logits, out)


# labels and outputs


@pytest.mark.parametrize("name", ["M2M100", "Blenderbot", "BlenderbotSmall"])
def test_labels_of_a_model_that_shifts_them_in_its_forward_only(name):
    base = base_of(f"{name}Config", f"{name}ForConditionalGeneration", **coded)
    assert not hasattr(base, "prepare_decoder_input_ids_from_labels")
    model = with_prompt(base, "MULTITASK_PROMPT_TUNING", "SEQ_2_SEQ_LM", num_tasks=3)
    given = {"input_ids": ids(), "task_ids": torch.arange(3)}
    labels = ids(3, 5).clone()
    labels[0, -1] = -100
    shifted = graft.shift_tokens_right(labels, 0, 2)
    with torch.no_grad():
        out = model(**given, labels=labels)
        logits = model(**given, decoder_input_ids=shifted).logits
    close(out.logits, logits)
    loss = torch.nn.functional.cross_entropy(logits[:, P:].flatten(0, 1), labels.flatten())
    close(out.loss, loss)


@pytest.mark.parametrize("name", ["Bloom", "Falcon", "Llama", "GPT2"])
@torch.no_grad()
def test_tuples_of_a_head_on_the_last_token(name):
    model = with_prompt(
        base_of(f"{name}Config", f"{name}ForSequenceClassification", num_labels=4, **plain), task="SEQ_CLS"
    )
    close(model(input_ids=ids(), return_dict=False)[0], model(input_ids=ids()).logits)


TAGGERS = {
    "XLMRobertaXL": dict(encoder, pad_token_id=0),
    "Yoso": encoder,
    "BioGpt": dict(plain, intermediate_size=36),
    "Bert": encoder,
}


@pytest.mark.parametrize("name", TAGGERS)
def test_losses_that_leave_out_what_the_mask_does(name):
    base = base_of(f"{name}Config", f"{name}ForTokenClassification", num_labels=3, **TAGGERS[name])
    model = with_prompt(base, task="TOKEN_CLS")
    given = {"input_ids": ids(), "attention_mask": (torch.arange(6)[None] < torch.tensor([[6], [4], [5]])).long()}
    labels = (ids() % 3).masked_fill(given["attention_mask"] == 0, -100)
    with torch.no_grad():
        out = model(**given, labels=labels)
        close(out.logits, model(**given).logits)
        with pytest.raises(ValueError, match="attention_mask has 10 columns for 6 tokens"):
            model(input_ids=ids(), attention_mask=torch.ones(3, 10))
    close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, P:].flatten(0, 1), labels.flatten()))


@pytest.mark.differs("SEQ_CLS of Longformer")
@torch.no_grad()
def test_local_attention_with_a_head_that_looks_far():
    """Longformer: the prompt sees all of the input, as its first token does, whose place it takes."""
    base = base_of(
        "LongformerConfig",
        "LongformerForSequenceClassification",
        num_labels=3,
        attention_window=4,
        **{**encoder, "num_hidden_layers": 1},
    )
    model, x = with_prompt(base, task="SEQ_CLS"), ids(2, 24)
    other = x.clone()
    other[:, -1] = (x[:, -1] + 5) % 30 + 3
    assert (model(input_ids=x).logits - model(input_ids=other).logits).abs().max() > 1e-3


@pytest.mark.differs("soft prompts for `BigBirdForQuestionAnswering`; XLNet in `generate`")
def test_a_head_that_counts_the_tokens():
    settings = dict(encoder, attention_type="original_full")
    base = base_of("BigBirdConfig", "BigBirdForQuestionAnswering", **settings)
    refused(base, "BigBirdForQuestionAnswering", "PREFIX_TUNING", "LORA", task="QUESTION_ANS")
    model = with_prompt(base, "PREFIX_TUNING", "QUESTION_ANS")
    x = ids()
    x[:, 2] = base.config.sep_token_id % VOCAB
    assert model(input_ids=x).start_logits.shape == (3, 6)


def test_an_order_of_its_own():
    base = base_of("XLNetConfig", "XLNetLMHeadModel", d_model=32, n_layer=2, n_head=4, d_inner=36, **own)
    model = with_prompt(base)
    assert model(input_ids=ids()).logits.shape[1] == 6 + P
    with pytest.raises(ValueError, match=r"perm_mask has no place .* XLNetModel cannot generate with a prompt"):
        model.generate(ids(), max_new_tokens=2)


# images


def paligemma():
    config = transformers.PaliGemmaConfig(
        text_config=dict(small, model_type="gemma"), vision_config=vision, image_token_index=40, projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    with seeded(0):
        model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


TEXT = torch.tensor([[5, 9, 7, 12]])  # as many tokens as the prompt
IMAGE = torch.tensor([[40, 40, 40, 40, 6, 8, 11]])


@pytest.mark.differs("PaliGemma, Qwen3-VL with images")
@pytest.mark.skipif(VERSION < (5, 0), reason="types make other masks there")
@pytest.mark.parametrize("suffix", [None, 0, 2])
@torch.no_grad()
def test_a_prompt_belongs_to_a_prefix_that_sees_itself(suffix):
    """PaliGemma: the prompt acts as the same words in front would."""
    base, model = paligemma(), with_prompt(paligemma())
    model.prompt_encoder["default"].embedding.weight.copy_(base.get_input_embeddings()(TEXT)[0])
    with seeded(3):
        pixels = torch.randn(1, 3, 8, 8)

    def given(x):
        n = x.shape[1]
        types = {} if suffix is None else {"token_type_ids": (torch.arange(n) >= n - suffix).long()[None]}
        return {"input_ids": x, "attention_mask": torch.ones_like(x), "pixel_values": pixels, **types}

    whole, short = given(torch.cat([TEXT, IMAGE], dim=1)), given(IMAGE)
    close(model(**short).logits[:, P:], base(**whole).logits[:, P:])
    if not suffix:
        want, got = (
            m.generate(**x, max_new_tokens=5, do_sample=False)[:, -5:] for m, x in ((base, whole), (model, short))
        )
        assert torch.equal(got, want)


@pytest.mark.skipif(VERSION < (5, 0), reason="no such model, or one whose config is another")
@torch.no_grad()
def test_images_in_several_layers():
    """Qwen3-VL adds to the image's tokens in its first layers, too, and marks them."""
    text = dict(small, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
    sees = dict(
        depth=1, hidden_size=16, out_hidden_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, in_channels=3, intermediate_size=16, num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=sees, image_token_id=40, video_token_id=39, vision_start_token_id=38,
        vision_end_token_id=37, tie_word_embeddings=False,
    )  # fmt: skip
    with seeded(0):
        base = transformers.Qwen3VLForConditionalGeneration(config).eval()
    with seeded(3):
        image = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    short = torch.tensor([[4, 38, 40, 40, 40, 40, 37, 6, 8]])
    whole = torch.cat([TEXT, short], dim=1)
    want = base(input_ids=whole, mm_token_type_ids=(whole == 40).long(), **image).logits[:, P:]
    words = base.get_input_embeddings()(TEXT)[0]
    model = with_prompt(base)
    model.prompt_encoder["default"].embedding.weight.copy_(words)
    close(model(input_ids=short, mm_token_type_ids=(short == 40).long(), **image).logits[:, P:], want)
