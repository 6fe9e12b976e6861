# SPDX-License-Identifier: Apache-2.0
"""Prompts in `generate` and in decoding by hand, against the base model that is given the prompt by other means."""

import copy
import functools
import inspect

import pytest
import torch
import transformers

import graft
from tests.covering import Case, Sometimes, law, product
from tests.leaves_out import WHOLE_GRAPHS
from tests.model.generation.models import (
    KEYS,
    LENGTH,
    METHODS,
    MODELS,
    SEQ2SEQ,
    SOFT,
    STEPS,
    TOKENS,
    WINDOW,
    base,
    close,
    config,
    embedded,
    empty_cache,
    filled,
    generate,
    greedy,
    inputs,
    positions,
    spread,
    with_prompt,
)
from tests.models import VOCAB, seeded

DECODERS = [name for name in MODELS if name not in SEQ2SEQ]
CASES = [(name, method) for name in MODELS for method in METHODS if not (method == "cpt" and name in SEQ2SEQ)]
PLACED = [name for name in DECODERS if name != "bloom"]  # those that take position_ids
SLIDING = (
    "gemma2",
    "gemma3",
    "gemma3-vision",
    "gemma3n",
    "gemma4",
    "mistral",
)  # where padding takes room in the window
PER_LAYER = ("gemma3n", "gemma4")  # not all layers have keys and values, or embeddings
FEW = [(name, method) for name in ("llama", "opt", "gemma3", "t5", "bart") for method in ("multitask", "prefix")]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@functools.cache
def plain(name):
    return generate(base(name), inputs(name))


def without(given, *names):
    return {k: v for k, v in given.items() if k not in names}


# greedy decoding


@law("name, method", [Case(c) for c in CASES], lambda c: [c[0], c[1], Sometimes(c, 4)])
def test_generate_equals_decoding_without_a_cache(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    out = generate(model, given)
    assert torch.equal(out, greedy(model, given))
    assert not torch.equal(out, plain(name))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", ["lstm", "multitask"])
def test_soft_prompt_is_embeddings_in_front(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    out = model(**given).logits
    assert out.shape[1] == TOKENS + LENGTH
    close(out, model.get_base_model()(**embedded(model, given)).logits)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_soft_prompt_is_embeddings_in_front_of_the_encoder(name):
    model, given = with_prompt(name, "lstm"), {**inputs(name), "decoder_input_ids": inputs(name)["input_ids"][:, 2:]}
    want = model.get_base_model()(**embedded(model, given), decoder_input_ids=given["decoder_input_ids"])
    close(model(**given).logits, want.logits)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in PER_LAYER])
def test_prefix_is_a_cache_that_is_not_empty(name):
    model, given = with_prompt(name, "prefix"), inputs(name)
    mask, start = given["attention_mask"], positions(given["attention_mask"])
    longer = torch.cat([mask.new_ones(3, TOKENS), mask], dim=1)
    if name in SEQ2SEQ:
        ids = given["input_ids"][:, 2:]
        args, rest = {**given, "decoder_input_ids": ids}, {}
    else:
        args, rest = given, {"attention_mask": longer}
    if name in PLACED:
        args, rest = {**args, "position_ids": start}, {**rest, "position_ids": start + TOKENS}
    want = model.get_base_model()(**{**args, **rest}, past_key_values=filled(model, 3)).logits
    close(model(**args).logits, want)


# beams, samples


@pytest.mark.parametrize("name", [n for n in MODELS if n not in (*PER_LAYER, "gemma3-vision")])
def test_beams_of_a_soft_prompt(name):
    method = "lstm" if name in SEQ2SEQ else "multitask"
    model, given = with_prompt(name, method), inputs(name, method)
    out = generate(model, given, num_beams=3, num_return_sequences=2)
    want = generate(model.get_base_model(), embedded(model, given), num_beams=3, num_return_sequences=2)
    assert torch.equal(out if name in SEQ2SEQ else out[:, LENGTH:], want)


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in PER_LAYER])
def test_beams_of_a_prefix(name):
    model, given = with_prompt(name, "prefix"), inputs(name)
    ids, mask = given["input_ids"], given["attention_mask"]
    seen = {"input_ids": torch.nn.functional.pad(ids, (TOKENS, 0)), "past_key_values": filled(model, 9)}
    seen["attention_mask"] = torch.cat([mask.new_ones(3, TOKENS), mask], dim=1)
    want = generate(model.get_base_model(), seen, num_beams=3)
    assert torch.equal(generate(model, given, num_beams=3), want[:, TOKENS:])


@pytest.mark.parametrize("name", ["llama", "bloom", *SEQ2SEQ])
@pytest.mark.parametrize("method", ["mlp", "multitask", "projection"])
def test_beams_without_a_cache(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    out = generate(model, given, num_beams=3, num_return_sequences=2)
    assert torch.equal(out, generate(model, given, num_beams=3, num_return_sequences=2, use_cache=False))
    assert not torch.equal(out[::2], out[1::2])


@pytest.mark.parametrize("name, method", FEW)
def test_samples(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    options = dict(do_sample=True, num_return_sequences=3, temperature=2.0)
    with seeded(3):
        out = generate(model, given, **options)
    with seeded(3):
        want = generate(model, given, **options, use_cache=False)
    assert torch.equal(out, want)
    assert len(out.unique(dim=0)) > 3


# embeddings, positions, masks


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "t5", "bart"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_inputs_embeds(name, method):
    model, given = with_prompt(name, method), inputs(name)
    words = (model.get_encoder() if name in SEQ2SEQ else model).get_input_embeddings()
    embeds = {"inputs_embeds": words(given["input_ids"]), "attention_mask": given["attention_mask"]}
    more = {"decoder_input_ids": given["input_ids"][:, :2]} if name in SEQ2SEQ else {}
    close(model(**embeds, **more).logits, model(**given, **more).logits)
    out = generate(model, given)
    assert torch.equal(generate(model, embeds), out if name in SEQ2SEQ else out[:, LENGTH:])


@pytest.mark.differs("prompts: `position_ids`")
@pytest.mark.parametrize("name", [n for n in PLACED if n not in SLIDING])
@pytest.mark.parametrize("method", ["lstm", "prefix"])
def test_padding_changes_nothing_under_position_ids(name, method):
    model, given = with_prompt(name, method), inputs(name)
    padded = model(**given, position_ids=positions(given["attention_mask"])).logits
    for row, ids in enumerate(given["input_ids"]):
        pad = row % 3
        close(padded[row, -LENGTH + pad :], model(input_ids=ids[None, pad:]).logits[0, -LENGTH + pad :])


def four_dims(mask, kind, window=None):
    """(batch, 1, tokens, tokens): what each token sees, as a boolean mask or one that is added to the scores."""
    at = torch.arange(mask.shape[1])
    back = at[:, None] - at
    sees = (back >= 0) & (back < (window or len(at))) & mask[:, None, None].bool()
    return sees if kind is torch.bool else torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(kind).min)


@pytest.mark.differs("prompts: the attention mask")
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "qwen3", "mistral"])
@pytest.mark.parametrize("method", ["mlp", "prefix"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_mask_of_four_dimensions(name, method, kind):
    model, given = with_prompt(name, method), inputs(name)
    mask = given["attention_mask"]
    place = {"position_ids": positions(mask)}
    whole = four_dims(mask, kind, WINDOW if name == "mistral" else None)
    out = model(input_ids=given["input_ids"], attention_mask=whole, **place).logits[:, -LENGTH:]
    close(out[mask.bool()], model(**given, **place).logits[:, -LENGTH:][mask.bool()])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2"])
@pytest.mark.parametrize("method", ["mlp", "prefix", "long"])
def test_masks_by_kind_of_layer(name, method):
    more = {} if method != "long" else {"num_virtual_tokens": WINDOW + 2}
    model, given = with_prompt(name, "prefix" if more else method, **more), inputs(name)
    mask = given["attention_mask"]
    place = {"position_ids": positions(mask)}
    kind = torch.float32  # which every kind of attention takes
    masks = {"full_attention": four_dims(mask, kind), "sliding_attention": four_dims(mask, kind, WINDOW)}
    out = model(input_ids=given["input_ids"], attention_mask=masks, **place).logits[:, -LENGTH:]
    close(out[mask.bool()], model(**given, **place).logits[:, -LENGTH:][mask.bool()])


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("method", ["mlp", "prefix"])
def test_masks_by_kind_of_layer_with_a_cache_that_keeps_all(name, method):
    """A cache made without the model's config does not slide: masks cover what it holds."""
    model, given = with_prompt(name, method, num_virtual_tokens=WINDOW + 2), inputs(name)
    mask, kind = given["attention_mask"], torch.float32
    place = {"position_ids": positions(mask)}
    cache = transformers.DynamicCache()
    masks = {"full_attention": four_dims(mask, kind), "sliding_attention": four_dims(mask, kind, WINDOW)}
    out = model(input_ids=given["input_ids"], attention_mask=masks, past_key_values=cache, **place).logits
    new, longer = out[:, -1:].argmax(-1), torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    masks = {"full_attention": four_dims(longer, kind), "sliding_attention": four_dims(longer, kind, WINDOW)}
    step = model(
        input_ids=new, attention_mask={k: m[:, :, -1:] for k, m in masks.items()}, past_key_values=cache,
        position_ids=positions(longer)[:, -1:],
    ).logits  # fmt: skip
    whole = {"input_ids": torch.cat([given["input_ids"], new], dim=1), "attention_mask": longer}
    want = model(**whole, position_ids=positions(longer)).logits
    close(out[:, -LENGTH:][mask.bool()], want[:, -LENGTH - 1 : -1][mask.bool()])
    close(step[:, -1], want[:, -1])


@pytest.mark.parametrize("method", [*SOFT, *KEYS])
def test_logits_to_keep(method):
    model, given = with_prompt("llama", method), inputs("llama", method)
    close(model(**given, logits_to_keep=2).logits, model(**given).logits[:, -2:])


# decoding by hand


takes = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
ARGUMENTS = ["past_key_values", *(["cache"] if "cache" in takes else [])]  # the new name, where there is one


def kept(output):
    """The cache that a forward pass gives."""
    return output["cache"] if "cache" in output else output["past_key_values"]


@law(
    "name, method, argument",
    product(
        ("llama", "gpt2", "opt", "gemma3", "mistral", "bloom"),
        ("lstm", "multitask", "cpt", "prefix", "cartridge"),
        ARGUMENTS,
    ),
    lambda c: [c[0], c[1], c[2], Sometimes(c[:2], 2)],
)
def test_decoding_by_hand(name, method, argument):
    model, given = with_prompt(name, method), inputs(name, method)
    ids, mask, rest = given["input_ids"], given["attention_mask"], without(given, "input_ids", "attention_mask")
    cache, out, new = {argument: empty_cache(model.config)}, ids, ids
    for _ in range(STEPS):
        place = {"position_ids": positions(mask)[:, -new.shape[1] :]} if name in PLACED else {}
        result = model(input_ids=new, attention_mask=mask, use_cache=True, **cache, **place, **rest)
        new = result.logits[:, -1:].argmax(-1)
        out, mask = torch.cat([out, new], dim=1), torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        cache = {argument: kept(result)}
    assert cache[argument].get_seq_length() == TOKENS + LENGTH + STEPS - 1
    assert torch.equal(out, generate(model, given))


@pytest.mark.parametrize("method", ["mlp", "prefix"])
def test_decoding_by_hand_with_masks_of_four_dimensions(method):
    model, given = with_prompt("llama", method), inputs("llama")
    mask = given["attention_mask"]
    first = model(
        input_ids=given["input_ids"], attention_mask=four_dims(mask, torch.bool), position_ids=positions(mask)
    )
    mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    new = first.logits[:, -1:].argmax(-1)
    step = model(
        input_ids=new, attention_mask=four_dims(mask, torch.bool)[:, :, -1:], past_key_values=kept(first),
        position_ids=positions(mask)[:, -1:],
    )  # fmt: skip
    assert torch.equal(torch.cat([new, step.logits.argmax(-1)], dim=1), generate(model, given)[:, LENGTH : LENGTH + 2])


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("method", ["mlp", "multitask", "prefix"])
def test_decoding_by_hand_after_an_encoder(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    new = out = torch.full((3, 1), model.config.decoder_start_token_id)
    cache = {}
    for _ in range(STEPS):
        result = model(**given, decoder_input_ids=new, use_cache=True, **cache)
        new = result.logits[:, -1:].argmax(-1)
        out, cache = torch.cat([out, new], dim=1), {"past_key_values": kept(result)}
    assert torch.equal(out, generate(model, given))


@pytest.mark.parametrize("name, method", FEW)
def test_without_a_mask(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    given["input_ids"] = given["input_ids"].clamp(min=3)
    whole = {**given, "attention_mask": torch.ones_like(given["attention_mask"])}
    assert torch.equal(generate(model, without(given, "attention_mask")), generate(model, whole))


# adapters, errors


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["multitask", "prefix"])
def test_switching_adapters(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    more = {} if method == "multitask" else {"num_virtual_tokens": 2}
    model.add_adapter("other", config(name, method, **more))
    spread(model.prompt_encoder["other"].requires_grad_(True), 5)
    first = generate(model, given)
    model.set_adapter("other")
    second = generate(model, given)
    assert torch.equal(second, greedy(model, given))
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(generate(model, given), plain(name))
    assert torch.equal(generate(model, given), second)
    model.set_adapter("default")
    assert torch.equal(generate(model, given), first)
    assert torch.equal(generate(model.get_base_model(), without(given, "task_ids")), plain(name))


class Failing(transformers.LogitsProcessor):
    """Raises at the third token."""

    calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("enough")
        return scores


@pytest.mark.parametrize("name, method", [(n, m) for n, m in CASES if n in ("llama", "bart")])
def test_an_exception_leaves_nothing_behind(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    with pytest.raises(RuntimeError, match="enough"):
        generate(model, given, logits_processor=transformers.LogitsProcessorList([Failing()]))
    assert torch.equal(generate(model.get_base_model(), without(given, "task_ids")), plain(name))
    assert torch.equal(generate(model, given), greedy(model, given))


@WHOLE_GRAPHS
@pytest.mark.parametrize("method", [pytest.param("mlp", marks=pytest.mark.slow), "prefix"])
def test_compiled_forward(method):
    torch._dynamo.reset()
    model, given = with_prompt("gpt2", method), inputs("gpt2")
    close(torch.compile(model, backend="eager", fullgraph=True)(**given).logits, model(**given).logits)


@pytest.mark.differs("`encoder_outputs` with soft prompts")
@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("method", ["mlp", "multitask"])
def test_encoder_outputs_are_computed_again(name, method):
    model, given = with_prompt(name, method), inputs(name, method)
    given["decoder_input_ids"] = given["input_ids"][:, :2]
    encoded = model.get_base_model().get_encoder()(given["input_ids"], attention_mask=given["attention_mask"])
    with pytest.warns(UserWarning, match="`encoder_outputs` should not be passed when using prompts in the encoder"):
        out = model(**given, encoder_outputs=encoded).logits
    close(out, model(**given).logits)
    with pytest.raises(ValueError, match=r"encoder_outputs do not hold the prompt\. Pass input_ids"):
        model(**without(given, "input_ids"), encoder_outputs=encoded)
    prompt = without(given, "decoder_input_ids")
    with pytest.warns(UserWarning, match="encoder_outputs"):
        assert torch.equal(generate(model, {**prompt, "encoder_outputs": encoded}), generate(model, prompt))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_outputs_are_kept_where_the_prompt_is_in_the_decoder(name, recwarn):
    model, given = with_prompt(name, "prefix"), inputs(name)
    encoded = model.get_base_model().get_encoder()(given["input_ids"], attention_mask=given["attention_mask"])
    out = generate(model, {"attention_mask": given["attention_mask"], "encoder_outputs": encoded})
    assert torch.equal(out, generate(model, given))
    assert not [w for w in recwarn if "encoder_outputs" in str(w.message)]


@pytest.mark.differs("static caches where the prompt would be in them")
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_static_cache_is_refused(method):
    model, given = with_prompt("llama", method), inputs("llama")
    with pytest.raises(ValueError, match="cache_implementation='static' has no room for a prompt"):
        generate(model, given, cache_implementation="static")
    settings = transformers.GenerationConfig(cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='static' has no room for a prompt"):
        model.generate(**given, generation_config=settings)
    assert torch.equal(generate(model, given), greedy(model, given))


@pytest.mark.differs("`generate` with a cache that holds tokens")
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_cache_of_an_earlier_generate_is_refused(method):
    """`generate` would skip as many tokens as the cache holds, the prompt's included."""
    model, given = with_prompt("llama", method), {"input_ids": inputs("llama")["input_ids"][:1]}
    first = generate(model, given, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, first.sequences], dim=1)
    with pytest.raises(ValueError, match="Continue the cache with forward"):
        generate(model, {"input_ids": longer, "past_key_values": kept(first)})


@pytest.mark.parametrize("method", [*SOFT, *KEYS])
def test_a_cache_of_the_base_is_refused(method):
    """It holds tokens but no prompt, which enters before them or not at all."""
    model, given = with_prompt("llama", method), inputs("llama", method, 1)
    with model.disable_adapter():
        held = kept(model(input_ids=given["input_ids"][:, :3], use_cache=True))
        want = generate(model, {**without(given, "task_ids"), "past_key_values": copy.deepcopy(held)})
    for argument in ARGUMENTS:
        with pytest.raises(ValueError, match=r"got a cache that holds 3 tokens.*or leave it out"):
            generate(model, {**given, argument: held})
    with model.disable_adapter():
        assert torch.equal(generate(model, {**without(given, "task_ids"), "past_key_values": held}), want)
    empty = transformers.DynamicCache()
    assert torch.equal(generate(model, {**given, "past_key_values": empty}), generate(model, given))


@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_object_without_room_is_refused(name, method):
    """A static cache that was made by hand, in a forward pass."""
    model, given = with_prompt(name, method), inputs(name)
    made = inspect.signature(transformers.StaticCache.__init__).parameters
    sizes = {} if "max_batch_size" not in made and "batch_size" not in made else {"max_batch_size": 3}
    cache = transformers.StaticCache(config=model.config, max_cache_len=16, **sizes)
    if name == "bart":
        given["decoder_input_ids"] = given["input_ids"][:, :2]
        cache = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
    if (name, method) == ("bart", "prompt"):  # which is in the encoder
        close(model(**given, past_key_values=cache).logits, model(**given).logits)
        return
    want = model(**given).logits
    with pytest.raises(ValueError, match=r"Cache has no room for a prompt of 4 tokens\. Leave it out"):
        model(**given, past_key_values=cache)
    close(model(**given).logits, want)


@pytest.mark.differs("assisted decoding (`assistant_model`, `prompt_lookup_num_tokens`)")
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bart"])
@pytest.mark.parametrize("method", ["multitask", "prefix"])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_assisted_decoding(name, method, how):
    """Rejected tokens are taken from the cache again, which older versions count from its front."""
    method = "lstm" if name in SEQ2SEQ and method == "multitask" else method
    model, given = with_prompt(name, method), inputs(name, method, 1)
    help_ = {"assistant": {"assistant_model": base(name)}, "lookup": {"prompt_lookup_num_tokens": 3}}[how]
    want = generate(model, given, max_new_tokens=12)
    if "cache" in takes:
        assert torch.equal(generate(model, given, max_new_tokens=12, **help_), want)
    elif not (name in SEQ2SEQ and method == "lstm"):  # there the prompt is not in the cache
        with pytest.raises(ValueError, match="Assisted decoding cuts off the prompt's part of the cache"):
            generate(model, given, max_new_tokens=12, **help_)
    assert torch.equal(generate(model, given, max_new_tokens=12), want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_input_in_chunks(name, method):
    model, given = (
        with_prompt(name, method),
        inputs(name, batch=1),
    )  # before transformers 5, padding moves the positions
    assert torch.equal(generate(model, given, prefill_chunk_size=4), generate(model, given))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("columns", [LENGTH - 1, LENGTH + TOKENS])
def test_masks_of_another_length_are_refused(name, method, columns):
    """A mask covers the input's tokens, not the prompt's."""
    model, given = with_prompt(name, method), inputs(name)
    if name in SEQ2SEQ:
        given = {**given, "decoder_input_ids": given["input_ids"]}
    mask = "decoder_attention_mask" if (name, method) == ("t5", "prefix") else "attention_mask"
    with pytest.raises(ValueError, match=f"attention_mask has {columns} columns for {LENGTH} tokens"):
        model(**{**given, mask: torch.ones(3, columns)})


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_more_tokens_than_positions(name, method):
    model = with_prompt(name, method)
    ids = torch.randint(3, VOCAB, (1, 32 - TOKENS))
    model(input_ids=ids)
    with pytest.raises(ValueError, match=rf"31 tokens and a prompt of {TOKENS} need 35 positions.* 32: 3 too many"):
        model(input_ids=ids[:, :1].expand(-1, 31))
    with pytest.raises(ValueError, match=rf"29 tokens and a prompt of {TOKENS} need 33 positions.* 32: 1 too many"):
        generate(model, {"input_ids": ids})


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_more_tokens_than_positions_of_an_encoder(name):
    from tests.models import _bert

    settings = getattr(transformers, f"{name}Config")(**_bert)
    model = getattr(transformers, f"{name}ForTokenClassification")(settings).eval()
    room = 32 if name == "Bert" else 32 - settings.pad_token_id - 1
    model = graft.get_peft_model(model, graft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=TOKENS))
    model(input_ids=torch.full((1, room - TOKENS), 5))
    with pytest.raises(ValueError, match=rf"need {room + 2} positions.* has {room}: 2 too many"):
        model(input_ids=torch.full((1, room - TOKENS + 2), 5))


# a call within a call


class Within(transformers.LogitsProcessor):
    """Calls the model while it generates."""

    def __init__(self, call):
        self.call, self.got = call, []

    def __call__(self, ids, scores):
        self.got.append((ids, self.call(ids)))
        return scores


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", ["active", "disabled", "other"])
def test_a_call_within_generate(name, method, kind):
    model, given = with_prompt(name, method), inputs(name)
    model.add_adapter("other", config(name, method, **{"num_virtual_tokens": 2}))
    want = generate(model, given)

    def forward(ids):
        more = {"decoder_input_ids": ids} if name in SEQ2SEQ else {}
        return model(input_ids=given["input_ids"] if more else ids, **more).logits

    def disabled(ids):
        with model.disable_adapter():
            return forward(ids)

    def other(ids):
        model.set_adapter("other")
        try:
            return forward(ids)
        finally:
            model.set_adapter("default")

    call = {"active": forward, "disabled": disabled, "other": other}[kind]
    within = Within(call)
    assert torch.equal(generate(model, given, logits_processor=[within]), want)
    assert len(within.got) == STEPS
    for ids, logits in within.got:
        close(logits, call(ids))


@pytest.mark.parametrize("method", [*SOFT, *KEYS])
def test_task_ids_are_left_out_where_a_method_has_no_tasks(method):
    model, given = with_prompt("llama", method), inputs("llama", method)
    want = generate(model, given)
    assert torch.equal(generate(model, {**given, "task_ids": inputs("llama", "multitask")["task_ids"]}), want)


@pytest.mark.parametrize("method", ["prefix", "cartridge"])
def test_prefix_needs_a_model_with_a_cache(method):
    from tests.models import make

    model = make("deberta")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kind, _ = METHODS[method]
    cfg = graft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="SEQ_CLS", num_virtual_tokens=TOKENS)
    with pytest.raises(graft.ConfigError, match="Model does not support past key values which are required for prefix"):
        graft.get_peft_model(model, cfg)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
