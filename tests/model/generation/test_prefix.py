# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a real text as a prefix do what the text in front of the input does."""

import pytest
import torch
import transformers
from torch.nn.functional import pad

import graft
from graft.prompts.prefix_tuning import from_pairs
from tests.covering import law, pairs, product
from tests.leaves_out import DEEP_DECODERS
from tests.model.generation.models import (
    MODELS,
    STEPS,
    WINDOW,
    base,
    close,
    config,
    generate,
    greedy,
    held,
    inputs,
    spread,
)
from tests.models import VOCAB, seeded

PLAIN = [
    "llama",
    "gpt2",
    "opt",
    "gemma2",
    "gemma3",
    "gemma3-vision",
    "qwen2",
    "qwen3",
    "neox",
    "mistral",
    "mixtral",
    "bloom",
]
SHARED = [name for name in ("gemma3n", "gemma4") if name in MODELS]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def text(tokens):
    with seeded(11):
        return torch.randint(3, VOCAB, (1, tokens))


def pairs_of(model, ids):
    """Key and value of each layer that has its own, of all tokens (where attention slides too)."""
    cache = transformers.DynamicCache()
    model(input_ids=ids, past_key_values=cache)
    return held(cache)


def with_prefix(model, name, method, pairs, tokens, **more):
    peft = graft.get_peft_model(model, config(name, method, num_virtual_tokens=tokens, **more)).eval()
    peft.prompt_encoder["default"].load_prompt_embeddings(from_pairs(pairs, tokens))
    return peft


def compare(name, method, tokens, fit=lambda pairs: pairs):
    """The same logits and continuations, with and without padding."""
    model, ids, given = base(name), text(tokens), inputs(name)
    peft = with_prefix(model, name, method, fit(pairs_of(model, ids)), tokens)
    own = {"input_ids": given["input_ids"][:1]}  # the row without padding
    whole = {"input_ids": torch.cat([ids, own["input_ids"]], dim=1)}
    with peft.disable_adapter():
        logits, out = peft(**whole).logits[:, tokens:], generate(peft, whole)
        alone = peft(**own).logits
    close(peft(**own).logits, logits)
    assert (alone - logits).abs().max() > 0.1
    assert torch.equal(generate(peft, own), out[:, tokens:])
    mask = given["attention_mask"]
    padded = {"input_ids": torch.cat([ids.expand(3, -1), given["input_ids"]], dim=1)}
    padded["attention_mask"] = torch.cat([mask.new_ones(3, tokens), mask], dim=1)
    with peft.disable_adapter():
        out = generate(peft, padded)
    assert torch.equal(generate(peft, given), out[:, tokens:])


@law("name, method, tokens", product(PLAIN, ("prefix", "cartridge"), (3, WINDOW + 3)), pairs)
def test_prefix_is_the_text_it_was_made_of(name, method, tokens):
    compare(name, method, tokens)


def fit_gemma3n(pairs):
    return pairs + [tuple(torch.zeros_like(t) for t in pairs[0])] * 2


def fit_gemma4(pairs):
    """Layers that slide have smaller heads: the rest is room that is cut off again."""
    widest = max(k.shape[-1] for k, _ in pairs)
    return fit_gemma3n([tuple(pad(t, (0, widest - t.shape[-1])) for t in pair) for pair in pairs])


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("method", ["prefix", "cartridge"])
def test_layers_that_use_the_keys_of_others_are_left_out(name, method):
    fit = {"gemma3n": fit_gemma3n, "gemma4": fit_gemma4}[name]
    with pytest.warns(
        UserWarning, match=r"injected into layers \[0, 1\]; skipped \[2, 3\] due to KV shape mismatch or"
    ):
        compare(name, method, 3, fit)


@pytest.mark.differs("prefix tuning of Falcon with one head of keys for all")
def test_layers_with_fewer_heads_get_the_first():
    """Llama with two heads of keys and values in its first layer, and one in the second."""
    model, ids, own = base("llama"), text(3), inputs("llama")["input_ids"][:1]
    attention = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        whole = getattr(attention, name).weight
        setattr(attention, name, torch.nn.Linear(24, 6, bias=False))
        getattr(attention, name).weight.copy_(whole[6:])
    attention.num_key_value_groups = 4
    pairs = pairs_of(model, ids)
    assert [k.shape[1] for k, _ in pairs] == [2, 1]
    want = model(input_ids=torch.cat([ids, own], dim=1)).logits[:, 3:]
    pairs[1] = tuple(torch.cat([t, torch.full_like(t, 9)], dim=1) for t in pairs[1])
    close(with_prefix(model, "llama", "prefix", pairs, 3)(input_ids=own).logits, want)


def test_larger_heads_than_the_prompt_has_get_nothing():
    model = graft.get_peft_model(base("opt"), config("opt", "prefix", token_dim=20, num_attention_heads=4)).eval()
    with pytest.raises(ValueError, match=r"skipped every layer because none has .* prompt's shape: 4 heads of 5"):
        model(**inputs("opt"))
    with model.disable_adapter():
        model(**inputs("opt"))


def coded(name, encoder, decoder):
    """A model whose encoder and decoder have these numbers of layers."""
    settings, fields = base(name).config.to_dict(), ("num_layers", "num_decoder_layers")
    settings.pop("num_hidden_layers", None)
    if name == "bart":
        fields = ("encoder_layers", "decoder_layers")
    with seeded(0):
        kind = type(base(name))
        model = kind(kind.config_class(**{**settings, **dict(zip(fields, (encoder, decoder)))})).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_decoder_of_less_depth_than_the_encoder(name):
    """The config counts the encoder's layers, as PEFT's does: what is too much is not used."""
    peft = graft.get_peft_model(coded(name, 3, 2), config(name, "prefix")).eval()
    assert peft.active_peft_config.num_layers == 3
    spread(peft.prompt_encoder["default"])
    given = inputs(name)
    assert torch.equal(generate(peft, given), greedy(peft, given))
    given["decoder_input_ids"] = given["input_ids"][:, :2]
    out = peft(**given).logits
    with peft.disable_adapter():
        assert (peft(**given).logits - out).abs().max() > 0.01


@pytest.mark.parametrize("name", [pytest.param("bart", marks=DEEP_DECODERS), "t5"])
def test_decoder_of_more_depth_than_the_encoder(name):
    model, given = coded(name, 1, 2), {**inputs(name), "decoder_input_ids": inputs(name)["input_ids"][:, :2]}
    before = model(**given).logits
    with pytest.raises(graft.ConfigError, match=r"num_layers=1, but \w+ has 2 layers\. Pass them"):
        graft.get_peft_model(model, config(name, "prefix"))
    assert torch.equal(model(**given).logits, before)
    peft = graft.get_peft_model(model, config(name, "prefix", num_layers=2)).eval()
    assert (peft(**given).logits - before).abs().max() > 0.01


@pytest.mark.parametrize("name", PLAIN[:3])
def test_continued_by_hand(name):
    """The cache that comes out holds the prefix, and takes the continuation."""
    model, ids = base(name), text(3)
    peft = with_prefix(model, name, "prefix", pairs_of(model, ids), 3)
    own = inputs(name)["input_ids"][:1]
    out = peft(input_ids=own[:, :-1], use_cache=True)
    held = getattr(out, "cache", None) or out.past_key_values
    with peft.disable_adapter():
        want = generate(peft, {"input_ids": torch.cat([ids, own], dim=1), "past_key_values": held})
    assert torch.equal(generate(peft, {"input_ids": own}), want[:, 3:])
    assert want.shape[1] == 3 + own.shape[1] + STEPS
