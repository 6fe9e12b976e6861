# SPDX-License-Identifier: Apache-2.0
"""Prompts of keys and values made from caches and texts, and cartridges put together: as PEFT makes them."""

import importlib
import inspect
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import graft
from tests.looks import get_registry
from tests.models import checkpoint
from tests.pair import LIBS, close, json_of, outcome
from tests.prompts.samples import adapt, added, batch, both, first, make, on, randomize

P = 4
PREFIX, CARTRIDGE = first("PREFIX_TUNING", num_virtual_tokens=P), first("CARTRIDGE")
HOLDERS = pytest.mark.parametrize("sample", [PREFIX, CARTRIDGE], ids=str)


def pairs(tokens=5, rows=1, layers=2, heads=2, size=6):
    """Key and value of each layer, in the shapes of the tests' llama."""
    g = torch.Generator().manual_seed(tokens)
    return tuple(tuple(torch.randn(rows, heads, tokens, size, generator=g) for _ in "kv") for _ in range(layers))


def filled(cache, values):
    for i, (k, v) in enumerate(values):
        cache.update(k, v, i)
    return cache


def dynamic(values):
    return filled(DynamicCache(), values)


class Legacy:
    """What caches of older transformers look like."""

    def __init__(self, values):
        self.values = values

    def to_legacy_cache(self):
        return self.values


FORMS = {
    "tuple": tuple,
    "list": lambda values: [list(pair) for pair in values],
    "generator": lambda values: (pair for pair in values),
    "legacy": Legacy,
    "dynamic": dynamic,
}


# from a cache


@pytest.mark.parametrize("form", FORMS)
def test_prompt_from_a_cache(form):
    ours, theirs = (
        lib.prompt_embeddings_from_past_key_values(FORMS[form](pairs()), num_virtual_tokens=3) for lib in LIBS
    )
    assert torch.equal(ours, theirs) and ours.shape == (3, 48)
    assert torch.equal(ours[1, 12:24], pairs()[0][1][0, :, 1].flatten())  # [token][layer][k, v][head][dim]


@pytest.mark.parametrize("form", FORMS)
@HOLDERS
def test_adapter_from_a_cache(sample, form):
    ours, theirs = both(sample)
    made = [
        lib.initialize_kv_prefix_from_past_key_values(m, past_key_values=FORMS[form](pairs()), num_virtual_tokens=P)
        for lib, m in zip(LIBS, (ours, theirs))
    ]
    assert torch.equal(*made) and not made[0].requires_grad
    for m in (ours, theirs):
        assert torch.equal(m.prompt_encoder["default"].embedding.weight, made[1])
    close(ours(**batch(sample)).logits, theirs(**batch(sample)).logits)


def test_dtypes_and_gradients():
    half = [tuple(t.bfloat16().requires_grad_() for t in pair) for pair in pairs()]
    for lib in LIBS:
        flat = lib.prompt_embeddings_from_past_key_values(half, num_virtual_tokens=P)
        assert flat.dtype == torch.bfloat16 and flat.requires_grad
    ours, theirs = both(CARTRIDGE)
    for lib, m in zip(LIBS, (ours, theirs)):
        value = lib.initialize_kv_prefix_from_past_key_values(m, past_key_values=half)
        assert value.dtype == torch.bfloat16
    kept = {name: (p.dtype, p.requires_grad) for name, p in added(ours).items()}
    assert kept == {name: (p.dtype, p.requires_grad) for name, p in added(theirs).items()}
    assert {dtype for dtype, _ in kept.values()} == {torch.float32}
    assert all(p.grad_fn is None for p in added(ours).values())


@HOLDERS
def test_the_named_adapter_alone_changes(sample):
    model = adapt(graft, sample)
    model.add_adapter("b", sample.config(graft))
    before = {name: p.clone() for name, p in added(model).items()}
    value = graft.initialize_kv_prefix_from_past_key_values(model, adapter_name="b", past_key_values=pairs())
    assert torch.equal(model.prompt_encoder["b"].embedding.weight, value)
    assert all(torch.equal(p, before[n]) for n, p in added(model).items() if ".b." not in n)
    graft.initialize_kv_prefix_from_past_key_values(model, past_key_values=pairs(9))
    assert torch.equal(model.prompt_encoder["b"].embedding.weight, value)
    assert not torch.equal(model.prompt_encoder["default"].embedding.weight, value)


def test_unfilled_room_of_a_static_cache_is_not_taken():
    def static(room):
        return filled(StaticCache(make("llama").config, max_cache_len=room), pairs(P))

    value = graft.prompt_embeddings_from_past_key_values(static(12), num_virtual_tokens=P)
    assert torch.equal(value, graft.prompt_embeddings_from_past_key_values(pairs(P), num_virtual_tokens=P))
    with pytest.raises(ValueError, match=f"Need at least 6 cached tokens, got {P}"):
        graft.prompt_embeddings_from_past_key_values(static(12), num_virtual_tokens=6)


def test_own_keys_of_a_decoder():
    """Not those that it has for the encoder's output."""
    both_caches = EncoderDecoderCache(dynamic(pairs()), dynamic(pairs(9)))
    value = graft.prompt_embeddings_from_past_key_values(both_caches, num_virtual_tokens=P)
    assert torch.equal(value, graft.prompt_embeddings_from_past_key_values(pairs(), num_virtual_tokens=P))
    sample = on(first("PREFIX_TUNING", num_virtual_tokens=P, num_transformer_submodules=1), "t5")
    model = adapt(graft, sample)
    own = pairs(heads=4)
    value = graft.initialize_kv_prefix_from_past_key_values(model, past_key_values=own)
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, value)
    acting = get_registry(model).prompt(1).self_attention_cache
    for layer, (k, v) in zip(acting.layers, own):
        assert torch.equal(layer.keys, k[:, :, :P]) and torch.equal(layer.values, v[:, :, :P])


WRONG_CACHES = {
    "empty": ((), 3, ValueError, ["Empty `past_key_values`"]),
    "empty_dynamic": (DynamicCache(), 3, ValueError, ["Empty `past_key_values`"]),
    "unfilled_layers": (DynamicCache(config=make("llama").config), 3, ValueError, ["Empty `past_key_values`", "0"]),
    "rank": ([(k[0], v[0]) for k, v in pairs()], 3, ValueError, ["rank 4", "(2, 5, 6)"]),
    "batch": (pairs(rows=2), 3, ValueError, ["batch=1", "batch=2"]),
    "short": (pairs(10), 40, ValueError, ["Need at least 40 cached tokens, got 10."]),
    "one_short_layer": (pairs(5, layers=1) + pairs(2, layers=1), 3, ValueError, ["cached tokens", "2"]),
    "heads": (pairs(layers=1) + pairs(layers=1, heads=3), 3, ValueError, ["Inconsistent", "(2, 6)", "(3, 6)"]),
    "sizes": (pairs(layers=1) + pairs(layers=1, size=4), 3, ValueError, ["Inconsistent", "(2, 6)", "(2, 4)"]),
    "key_unlike_value": ([(pairs()[0][0], pairs(size=4)[0][1])], 3, ValueError, ["Inconsistent", "(2, 4)"]),
    "no_tokens": (pairs(), 0, ValueError, ["num_virtual_tokens", "positive", "0"]),
    "negative": (pairs(), -2, ValueError, ["num_virtual_tokens", "positive", "-2"]),
    "none": (None, 3, TypeError, ["past_key_values", "NoneType", "key, value"]),
    "number": (7, 3, TypeError, ["past_key_values", "int"]),
    "tensor": (pairs()[0][0], 3, TypeError, ["past_key_values", "Tensor"]),
    "text": ("kv", 3, TypeError, ["past_key_values", "str"]),
    "texts": (("kv", "kv"), 3, TypeError, ["past_key_values", "tuple"]),
    "keys_alone": ([(k,) for k, _ in pairs()], 3, TypeError, ["past_key_values", "pair"]),
}
LENIENT = (
    "key_unlike_value",
    "no_tokens",
    "negative",
    "text",
    "texts",
    "keys_alone",
    "empty_dynamic",
    "unfilled_layers",
)


@pytest.mark.parametrize("case", WRONG_CACHES)
def test_wrong_caches(case):
    cache, tokens, error, words = WRONG_CACHES[case]
    ours, theirs = (
        outcome(lambda lib=lib: lib.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=tokens))
        for lib in LIBS
    )
    assert type(ours.error) is error and all(word in str(ours.error) for word in words), ours.error
    assert theirs.error is not None or case == "key_unlike_value"
    assert case in LENIENT or ours.kind is theirs.kind


def test_tokens_that_slid_out_of_a_window():
    """Layers then hold the last tokens, not the first."""
    config = make("gemma3").config
    config.sliding_window, config.layer_types = 4, ["sliding_attention", "full_attention"]
    cache = filled(DynamicCache(config=config), pairs(6))
    with pytest.raises(ValueError, match=r"Layer 0 of the cache has seen 6 tokens and keeps 3: the first ones.*gone"):
        graft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3)


# adapters that do not fit


def unchanged(model, call, error, *words):
    """The call raises `error` with these words, and leaves the model as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert modes == {n: m.training for n, m in model.named_modules()}


FROM = {
    "cache": lambda model, **options: graft.initialize_kv_prefix_from_past_key_values(
        model, **{"past_key_values": pairs(), **options}
    ),
    "text": lambda model, **options: graft.initialize_kv_prefix_from_text(model, Words(), text="a b c d e", **options),
}
SOURCES = pytest.mark.parametrize("source", FROM)


@SOURCES
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"])
def test_prompts_of_embeddings_are_refused(method, source):
    sample = first(method)
    for lib, model in zip(LIBS, both(sample)):
        with pytest.raises(ValueError, match=f"Adapter 'default' must be a CARTRIDGE or PREFIX_TUNING.*{method}"):
            lib.initialize_kv_prefix_from_past_key_values(model, past_key_values=pairs())
    model = adapt(graft, sample)
    unchanged(model, lambda: FROM[source](model), ValueError, "'default'", "CARTRIDGE or PREFIX_TUNING", method)


@SOURCES
def test_other_models_are_refused(source):
    lora = graft.get_peft_model(make("llama"), graft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    unchanged(lora, lambda: FROM[source](lora), ValueError, "'default'", "CARTRIDGE or PREFIX_TUNING", "LORA")
    bare = make("llama")
    unchanged(bare, lambda: FROM[source](bare), TypeError, "PeftModel", "LlamaForCausalLM")


@SOURCES
def test_a_projection_is_refused(source):
    sample = first("PREFIX_TUNING", "projection")
    theirs = adapt(peft, sample)
    with pytest.raises(ValueError, match="prefix_projection=True"):
        peft.initialize_kv_prefix_from_past_key_values(theirs, past_key_values=pairs())
    model = adapt(graft, sample)
    unchanged(model, lambda: FROM[source](model), ValueError, "'default'", "prefix_projection=False")


@SOURCES
@HOLDERS
def test_names_and_numbers(sample, source):
    model = adapt(graft, sample)
    init = FROM[source]
    unchanged(model, lambda: init(model, adapter_name="nope"), graft.AdapterNotFoundError, "nope", "default")
    for n in (0, P - 1, P + 1):
        words = (f"num_virtual_tokens={n}", "'default'", f"has {P}")
        unchanged(model, lambda n=n: init(model, num_virtual_tokens=n), ValueError, *words)
    model.delete_adapter("default")
    unchanged(model, lambda: init(model), ValueError, "No adapter is active")


OTHER_MODELS = {
    "layers": (dict(layers=3), "3 layers with 2 heads of 6"),
    "heads": (dict(heads=4), "2 layers with 4 heads of 6"),
    "sizes": (dict(size=7), "2 layers with 2 heads of 7"),
    "heads_of_equal_width": (dict(heads=4, size=3), "2 layers with 4 heads of 3"),  # PEFT takes it and mixes up heads
}


@pytest.mark.parametrize("other", OTHER_MODELS)
@HOLDERS
def test_a_cache_of_another_model(sample, other):
    changes, found = OTHER_MODELS[other]
    model = adapt(graft, sample)
    words = (found, "'default'", "2 with 2 of 6", "base model")
    unchanged(model, lambda: FROM["cache"](model, past_key_values=pairs(**changes)), ValueError, *words)


@SOURCES
@pytest.mark.parametrize("model", ["t5", "bart"])
def test_layers_that_share_keys_cannot_be_set(model, source):
    adapted = adapt(graft, on(PREFIX, model))
    words = ("'default'", "num_transformer_submodules=2", "num_transformer_submodules=1")
    unchanged(adapted, lambda: FROM[source](adapted), ValueError, *words)


def test_a_decoder_beside_an_encoder_reads_no_text():
    model = adapt(graft, on(first("PREFIX_TUNING", num_transformer_submodules=1), "t5"))
    unchanged(model, lambda: FROM["text"](model), ValueError, "'default'", "encoder")


# from a text


class Words:
    """A tokenizer of letters; with `chat`, one with a template for chats, which may fail."""

    def __init__(self, chat=None):
        self.chat_template = chat
        self.calls = []

    def __call__(self, text, return_tensors=None, truncation=False, max_length=None):
        self.calls.append("plain")
        ids = [3 + ord(word) % 37 for word in text.split()]
        return {"input_ids": torch.tensor([ids[:max_length] if truncation else ids])}

    def apply_chat_template(self, messages, **options):
        assert options["tokenize"] and not options["add_generation_prompt"] and not options["return_dict"]
        if isinstance(self.chat_template, Exception):
            raise self.chat_template
        (message,) = messages
        assert message["role"] == "system"
        self.calls.append("chat")
        return torch.cat([torch.tensor([[1, 2]]), self(message["content"])["input_ids"]], dim=1)


TEXT = "a b c d e f g h i"


@pytest.mark.parametrize("model", ["llama", "gpt2", "opt", "gemma3", "neox"])
@HOLDERS
def test_adapter_from_a_text(sample, model):
    """PEFT reads the whole text, graft the tokens that count."""
    ours, theirs = both(on(sample, model))
    for chat in (True, False):
        made = [
            lib.initialize_kv_prefix_from_text(m, Words("x"), text=TEXT, use_chat_template=chat)
            for lib, m in zip(LIBS, (ours, theirs))
        ]
        close(*made)
        assert torch.equal(ours.prompt_encoder["default"].embedding.weight, made[0])
    close(ours(**batch(sample)).logits, theirs(**batch(sample)).logits)


@HOLDERS
def test_an_adapter_from_a_text_stands_for_that_text(sample):
    """The prompt makes of the input what its text would, in its place."""
    model, base = adapt(graft, sample), make(sample.model)
    graft.initialize_kv_prefix_from_text(model, Words(), text=TEXT)
    ids = batch(sample, "none")["input_ids"]
    text = Words()(TEXT)["input_ids"][:, :P].expand(len(ids), -1)
    close(model(input_ids=ids).logits, base(input_ids=torch.cat([text, ids], dim=1)).logits[:, P:])


def test_max_length():
    ours, theirs = both(CARTRIDGE)
    for chat in (True, False):
        for n in (P, 7):
            close(*(
                lib.initialize_kv_prefix_from_text(m, Words("x"), text=TEXT, use_chat_template=chat, max_length=n)
                for lib, m in zip(LIBS, (ours, theirs))
            ))  # fmt: skip
    model = adapt(graft, CARTRIDGE)
    words = (f"at least {P} cached tokens, got 3", "'default'", "max_length")
    for chat in (True, False):
        short = lambda chat=chat: graft.initialize_kv_prefix_from_text(
            model, Words("x"), text=TEXT, use_chat_template=chat, max_length=3
        )
        unchanged(model, short, ValueError, *words)


@pytest.mark.parametrize("text", ["", "a b c"])
def test_short_texts(text):
    model = adapt(graft, CARTRIDGE)
    call = lambda: graft.initialize_kv_prefix_from_text(model, Words(), text=text)
    unchanged(model, call, ValueError, f"at least {P} cached tokens, got {len(text.split())}", "longer text")


def test_templates():
    """None: the text alone. One that refuses system messages: a warning, and the text alone."""
    model = adapt(graft, CARTRIDGE)
    plain, chat, fails = Words(), Words("x"), Words(ValueError("no system role"))

    def init(tokenizer, **options):
        return outcome(lambda: graft.initialize_kv_prefix_from_text(model, tokenizer, text=TEXT, **options))

    alone, asked = init(plain), init(chat, use_chat_template=False)
    assert torch.equal(alone.value, asked.value) and plain.calls == chat.calls == ["plain"]
    assert not alone.warnings and not asked.warnings
    assert not torch.equal(init(chat).value, alone.value)
    failed = init(fails)
    assert torch.equal(failed.value, alone.value)
    assert failed.warned("no system role") and failed.warned("use_chat_template=False")


def test_another_models_tokenizer():
    model = adapt(graft, CARTRIDGE)
    tokenizer = lambda text, **_: {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 977]])}
    call = lambda: graft.initialize_kv_prefix_from_text(model, tokenizer, text=TEXT)
    unchanged(model, call, graft.ConfigError, "token 977", "41 tokens", "tokenizer")


def test_reading_a_text_leaves_no_trace():
    """Whatever else is on: another prompt, training with dropout, gradient checkpointing, adapters off."""
    base = make("llama")
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = graft.initialize_kv_prefix_from_text(adapt(graft, PREFIX), Words(), text=TEXT)
    model = randomize(adapt(graft, PREFIX, base=base))
    checkpoint(base)
    model.train()
    base.model.norm.eval()
    before = {n: (m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}
    init = lambda: graft.initialize_kv_prefix_from_text(model, Words(), text=TEXT)
    assert torch.equal(init(), expected)
    after = {n: (m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}
    assert before == after
    with model.disable_adapter():
        assert torch.equal(init(), expected)
        assert not model.has_active_enabled_adapter
    assert model.has_active_enabled_adapter and all(p.grad is None for p in model.parameters())


def test_an_error_in_the_model_leaves_no_trace():
    model = adapt(graft, PREFIX).train()
    broken = model.base_model.model.layers[1].mlp
    broken.forward = lambda x: 1 / 0
    unchanged(model, lambda: FROM["text"](model), ZeroDivisionError)
    assert model.has_active_enabled_adapter


def test_more_tokens_than_a_window_holds():
    """A text fills sliding layers as far as the prompt goes."""
    sample = on(PREFIX, "gemma3")
    base = make("gemma3")
    base.config.sliding_window = 3
    model = adapt(graft, sample, base=base)
    value = graft.initialize_kv_prefix_from_text(model, Words(), text=TEXT)
    first_layer = base.model.layers[0].self_attn
    hidden = base.model.layers[0].input_layernorm(base.model.embed_tokens(Words()(TEXT)["input_ids"][:, :P]))
    close(value[:, 12:24], first_layer.v_proj(hidden)[0])


# cartridges put together


def save(lib, folder, seed=1, **config):
    model = randomize(adapt(lib, first("CARTRIDGE", **config), seed=seed), spread=0.5 + seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cartridges(tmp_path_factory):
    """Three saved by PEFT, of 4, 3 and 2 tokens, of which 2, 0 and 1 are frozen."""
    folder = tmp_path_factory.mktemp("cartridges")
    sizes = {"a": (4, 2), "b": (3, 0), "c": (2, 1)}
    return [
        save(peft, folder / name, i, num_virtual_tokens=n, num_frozen_tokens=f)
        for i, (name, (n, f)) in enumerate(sizes.items())
    ]


def weights(folder):
    path = folder / "adapter_model.safetensors"
    return load_file(path) if path.exists() else torch.load(folder / "adapter_model.bin", weights_only=True)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("order", ["ab", "ba", "abc", "cca"])
def test_composing(cartridges, order, safe, tmp_path):
    """The same folders: files, tensors, config."""
    chosen = [cartridges["abc".index(name)] for name in order]
    for lib in LIBS:
        lib.compose_cartridge_adapters(
            iter(map(str, chosen)), output_path=tmp_path / lib.__name__, safe_serialization=safe
        )
    ours, theirs = tmp_path / "graft", tmp_path / "peft"
    assert sorted(f.name for f in ours.iterdir()) == sorted(f.name for f in theirs.iterdir())
    mine, expected = weights(ours), weights(theirs)
    assert mine.keys() == expected.keys() and torch.equal(mine["prompt_embeddings"], expected["prompt_embeddings"])
    assert json_of(ours) == json_of(theirs)
    loaded = [
        lib.PeftModel.from_pretrained(make("llama"), folder)
        for lib, folder in ((graft, ours), (peft, ours), (graft, theirs))
    ]
    outputs = [m(**batch(CARTRIDGE)).logits for m in loaded]
    close(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_composed_prompt_is_both_in_turn(cartridges, tmp_path):
    graft.compose_cartridge_adapters(cartridges[:2], output_path=tmp_path)
    parts = [weights(folder)["prompt_embeddings"] for folder in cartridges[:2]]
    assert torch.equal(weights(tmp_path)["prompt_embeddings"], torch.cat(parts))
    config = json_of(tmp_path)
    assert config["num_virtual_tokens"] == 7 and config["num_frozen_tokens"] == 2 and config["inference_mode"]


def test_composing_into_one_of_them(cartridges, tmp_path):
    """In the other format: the old file, which would be read first, goes."""
    folder = shutil.copytree(cartridges[0], tmp_path / "a")
    expected = torch.cat([weights(folder)["prompt_embeddings"], weights(cartridges[1])["prompt_embeddings"]])
    graft.compose_cartridge_adapters([folder, cartridges[1]], output_path=folder, safe_serialization=False)
    assert not (folder / "adapter_model.safetensors").exists()
    assert torch.equal(weights(folder)["prompt_embeddings"], expected)


def rewrite(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def store(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def kept(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def retype(**values):
    return lambda folder: rewrite(folder, **values)


def lose(name):
    return lambda folder: (folder / name).unlink()


def hold(**tensors):
    return lambda folder: store(folder, tensors)


CONFIG, FILE = graft.ConfigError, graft.CheckpointError
WEIGHTS = "adapter_model.safetensors"
SPOILT = {
    "task_type": (retype(task_type="SEQ_CLS"), CONFIG, ["'task_type'", "CAUSAL_LM", "SEQ_CLS"]),
    "token_dim": (retype(token_dim=24), CONFIG, ["'token_dim'", "12", "24"]),
    "num_layers": (retype(num_layers=3), CONFIG, ["'num_layers'", "2", "3"]),
    "heads": (retype(num_attention_heads=4), CONFIG, ["'num_attention_heads'", "2", "4"]),
    "submodules": (retype(num_transformer_submodules=2), CONFIG, ["'num_transformer_submodules'", "1", "2"]),
    "method": (retype(peft_type="PREFIX_TUNING"), CONFIG, ["not a CARTRIDGE", "PREFIX_TUNING"]),
    "no_config": (lose("adapter_config.json"), FILE, ["adapter_config.json"]),
    "no_weights": (lose(WEIGHTS), FILE, [WEIGHTS]),
    "damaged": (lambda folder: (folder / WEIGHTS).write_bytes(b"{}"), FILE, ["truncated or corrupted"]),
    "other_tensors": (hold(x=torch.ones(2)), FILE, ["prompt_embeddings"]),
    "narrow": (hold(prompt_embeddings=torch.ones(3, 4)), FILE, ["(3, 4)", "(3, 48)"]),
    "flat": (hold(prompt_embeddings=torch.ones(3)), FILE, ["(3,)", "(3, 48)"]),
    "length": (retype(num_virtual_tokens=9), FILE, ["(3, 48)", "(9, 48)"]),
    "head": (hold(prompt_embeddings=torch.ones(3, 48), head=torch.ones(2)), CONFIG, ["(head)", "modules_to_save"]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_cartridges_that_cannot_be_composed(cartridges, case, tmp_path):
    """What was at the destination is there still."""
    spoil, error, words = SPOILT[case]
    bad = shutil.copytree(cartridges[1], tmp_path / "bad")
    spoil(bad)
    out = shutil.copytree(cartridges[2], tmp_path / "out")
    for folder in (out, tmp_path / "new"):
        for chosen in ([cartridges[0], bad], [cartridges[0], cartridges[2], bad]):
            with pytest.raises(error) as raised:
                graft.compose_cartridge_adapters(chosen, output_path=folder)
            assert all(word in str(raised.value) for word in (*words, str(bad))), raised.value
    assert kept(out) == kept(cartridges[2]) and not (tmp_path / "new").exists()


def test_how_many_and_where(cartridges, tmp_path):
    compose = graft.compose_cartridge_adapters
    for chosen in ([], [cartridges[0]]):
        with pytest.raises(graft.ConfigError, match=f"Need at least 2 adapters to compose, got {len(chosen)}"):
            compose(chosen, output_path=tmp_path / "out")
    with pytest.raises(graft.ConfigError, match="adapter_paths must be a list of paths"):
        compose(str(cartridges[0]), output_path=tmp_path / "out")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        compose(cartridges, output_path=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious" and not (tmp_path / "out").exists()


def test_other_base_models_are_told(cartridges, tmp_path):
    other = rewrite(shutil.copytree(cartridges[1], tmp_path / "other"), base_model_name_or_path="some/base")
    seen = outcome(lambda: graft.compose_cartridge_adapters([cartridges[0], other], output_path=tmp_path / "out"))
    assert seen.error is None and seen.warned("some/base") == [graft.PeftWarning]
    assert not outcome(lambda: graft.compose_cartridge_adapters(cartridges, output_path=tmp_path / "out")).warnings


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("step", ["write", "sync", "replace"])
def test_a_failed_write_leaves_the_old_files(cartridges, step, safe, tmp_path, monkeypatch):
    out = shutil.copytree(cartridges[2], tmp_path / "out")
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == (2 if step != "write" else 1):  # between the two files
            raise OSError("no space left")
        return real(*args, **kwargs)

    owner, name = {
        "write": ("graft.io.files", "write_safetensors") if safe else ("torch", "save"),
        "sync": ("os", "fsync"),
        "replace": ("os", "replace"),
    }[step]
    module = importlib.import_module(owner)
    real = getattr(module, name)
    monkeypatch.setattr(module, name, full)
    with pytest.raises(OSError, match="no space left"):
        graft.compose_cartridge_adapters(cartridges[:2], output_path=out, safe_serialization=safe)
    monkeypatch.undo()
    assert calls and kept(out) == kept(cartridges[2])


# names


def test_signatures_are_pefts():
    for name in (
        "prompt_embeddings_from_past_key_values",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "compose_cartridge_adapters",
    ):
        ours, theirs = (inspect.signature(getattr(lib, name)).parameters.values() for lib in LIBS)
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_names_in_the_place_of_peft():
    from graft.compat.peft.modules import resolve

    for name in ("prompt_embeddings_from_past_key_values", "compose_cartridge_adapters"):
        assert resolve("peft.tuners.cartridge.utils", name) is resolve("peft", name) is getattr(graft, name)
