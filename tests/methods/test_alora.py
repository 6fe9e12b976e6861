# SPDX-License-Identifier: Apache-2.0
"""aLoRA: an adapter that acts from its invocation tokens on."""

import warnings

import peft
import pytest
import torch
from torch.testing import assert_close

import graft
from graft.compat.peft.shims import calculate_alora_offsets
from graft.methods.lora.alora import find_last_occurrence
from tests import models
from tests.leaves_out import CHUNKS_OF_PADDED, WHOLE_GRAPHS
from tests.looks import get_registry, layers
from tests.models import adapted, seeded
from tests.raised import refuses, warns

TOKENS = [11, 10]  # in the rows 0 and 1 of the batch
CONFIG = dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
ALORA = {**CONFIG, "alora_invocation_tokens": TOKENS}
QUIET = pytest.mark.filterwarnings("ignore:The invocation tokens")


def with_alora(checkpointing=None, **others):
    """One aLoRA adapter, and beside it others by name."""
    configs = {"default": ALORA, **{name: {**CONFIG, **values} for name, values in others.items()}}
    model = adapted(models.make("llama"), {name: graft.LoraConfig(**values) for name, values in configs.items()})
    if checkpointing is not None:
        models.checkpoint(model.train(), checkpointing)
        model.enable_input_require_grads()
    return model


def batch(rows=2, invoked=True):
    """Prompts without padding that hold the invocation at different places."""
    with seeded(4):
        ids = torch.randint(12, models.VOCAB, (rows, 8))
    for row in range(rows if invoked else 0):
        ids[row, 1 + row : 3 + row] = torch.tensor(TOKENS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model, inputs, **options):
    return model(**inputs, **options).logits.detach()


def padded(inputs, n, left):
    """The same with n tokens of padding."""
    pad = torch.zeros(len(inputs["input_ids"]), n, dtype=torch.long)
    return {k: torch.cat([pad, v] if left else [v, pad], 1) for k, v in inputs.items()}


# where it acts


@pytest.mark.parametrize(
    "ids, tokens, expected",
    [
        ([1, 2, 3, 1, 2, 4], [1, 2], 3),  # the last of two
        ([1, 2, 3, 4], [4], 1),
        ([1, 2, 3, 4], [1, 2, 3, 4], 4),
        ([1, 1, 1], [1, 1], 2),  # overlapping
        ([1, 2, 3], [3, 1], 0),
        ([1, 2], [1, 2, 3], 0),  # longer than the input
        ([1, 3, 2], [1, 2], 0),  # not side by side
    ],
)
def test_the_last_occurrence_counted_from_the_end(ids, tokens, expected):
    assert find_last_occurrence(torch.tensor([ids, [9] * len(ids)]), torch.tensor(tokens)).tolist() == [expected, 0]
    assert peft.tuners.lora.variants.calculate_alora_offsets(
        {"a": peft.LoraConfig(alora_invocation_tokens=tokens, task_type="CAUSAL_LM")}, "a", torch.tensor([ids])
    ) == [expected or None]


def test_pefts_function_for_offsets():
    configs = {n: peft.LoraConfig(**{**ALORA, "alora_invocation_tokens": t}) for n, t in (("a", [1, 2]), ("b", [3]))}
    configs["plain"] = peft.LoraConfig(**CONFIG)
    ids = torch.tensor([[1, 2, 3, 1], [3, 1, 2, 0], [5, 5, 5, 5], [1, 2, 1, 2], [3, 1, 2, 3]])
    for names in (None, ["b", "a", "a", "__base__", "plain"]):
        expected = peft.tuners.lora.variants.calculate_alora_offsets(configs, "a", ids, names)
        assert calculate_alora_offsets(configs, "a", ids, names) == expected


def test_what_stands_before_the_invocation_is_the_base_models():
    model, inputs = with_alora(), batch()
    with model.disable_adapter():
        base = logits(model, inputs)
    out = logits(model, inputs)
    for row in range(2):
        assert_close(out[row, : 1 + row], base[row, : 1 + row])
        assert (out[row, 1 + row :] - base[row, 1 + row :]).abs().amax(-1).min() > 1e-3


def test_the_part_is_that_of_lora_at_these_positions():
    model, inputs = with_alora(), batch()
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    x, seen = torch.randn(2, 8, layer.in_features), []
    hook = model.get_base_model().register_forward_pre_hook(lambda *_: seen.append(layer(x)))
    model(**inputs)
    hook.remove()
    where = torch.arange(8) >= torch.tensor([[1], [2]])
    A, B = (c["default"].weight for c in (layer.lora_A, layer.lora_B))
    expected = layer.base_layer(x) + where[..., None] * (x @ (1.5 * B @ A).T)
    assert_close(seen[0], expected)
    assert torch.equal(layer(x), layer.base_layer(x)), "no call tells of an invocation"


@pytest.mark.parametrize("left", [True, False])
def test_padding(left):
    model, inputs = with_alora(), batch()
    expected, out = logits(model, inputs), logits(model, padded(inputs, 3, left))
    assert_close(out[:, 3:] if left else out[:, :8], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.differs("aLoRA: rows without the invocation tokens")
def test_rows_without_the_tokens_are_the_base_models_and_named():
    model, inputs = with_alora(), batch(3)
    inputs["input_ids"][1] = 20
    out = warns(graft.PeftWarning, r"not in rows \[1\] of the input", logits, model, inputs)
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is searched for
        base = logits(model, inputs)
    assert_close(out[1], base[1])
    assert (out[0] - base[0]).abs().max() > 1e-3
    with pytest.warns(graft.PeftWarning, match="not in any row"):
        assert torch.equal(logits(model, batch(2, invoked=False)), logits_without(model, batch(2, invoked=False)))


def logits_without(model, inputs):
    with model.disable_adapter():
        return logits(model, inputs)


def test_offsets_that_the_caller_gives():
    model, inputs = with_alora(), batch()
    expected = logits(model, inputs)
    for given in ([7, 6], torch.tensor([7, 6])):
        assert torch.equal(logits(model, inputs, alora_offsets=given), expected)
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    assert_close(logits(model, embeds, alora_offsets=[7, 6]), expected)
    assert_close(logits(model, inputs, alora_offsets=[0, 6])[0], logits_without(model, inputs)[0])
    everywhere = logits(model, inputs, alora_offsets=[100, None])
    plain = lora_of(model)
    assert_close(everywhere[0], logits(plain, inputs)[0])
    assert_close(everywhere[1], logits_without(model, inputs)[1])
    with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets when only inputs_embeds"):
        assert torch.equal(logits(model, embeds), logits_without(model, inputs))


def lora_of(model):
    """The same values as plain LoRA."""
    plain = graft.get_peft_model(models.make("llama"), graft.LoraConfig(**CONFIG))
    graft.set_peft_model_state_dict(plain, graft.get_peft_model_state_dict(model), strict=True)
    return plain.eval()


def test_an_input_that_is_the_invocation_is_plain_lora():
    model = with_alora()
    ids = torch.tensor([[*TOKENS, 3, 4], [*TOKENS, 20, 9]])
    assert_close(logits(model, {"input_ids": ids}), logits(lora_of(model), {"input_ids": ids}))


# several adapters


@QUIET
def test_rows_with_adapters_of_their_own():
    model = with_alora(other={"alora_invocation_tokens": [15]}, plain={}, dora={"use_dora": True})
    names = ["other", "plain", "default", "__base__", "dora", "default"]
    for used in (names, [n if n != "dora" else "other" for n in names]):
        inputs = batch(6)
        inputs["input_ids"][0, 5] = 15
        inputs["input_ids"][4, 3] = 15
        mixed = logits(model, inputs, adapter_names=used)
        for row, name in enumerate(used):
            one = {k: v[row : row + 1] for k, v in inputs.items()}
            if name == "__base__":
                expected = logits_without(model, one)
            else:
                model.set_adapter(name)
                expected = logits(model, one)
            assert_close(mixed[row], expected[0], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        model.set_adapter("default")
        out = model.generate(**inputs, adapter_names=used, max_new_tokens=3, do_sample=False)
        without = model.generate(**inputs, adapter_names=used, max_new_tokens=3, do_sample=False, use_cache=False)
        assert torch.equal(out, without)


@pytest.mark.differs("several aLoRA adapters active")
def test_two_active_at_once_each_from_its_own_tokens():
    model, inputs = with_alora(other={"alora_invocation_tokens": [15]}), batch()
    inputs["input_ids"][:, 6] = 15
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, inputs)
    model.set_adapter("default")
    one = logits(model, inputs)
    assert_close(both[:, :6], one[:, :6])
    assert (both[:, 6:] - one[:, 6:]).abs().max() > 1e-3


# generation


HOW = ["greedy", "samples", "chunks", "static"]
CASES = [
    pytest.param(how, left, marks=[CHUNKS_OF_PADDED] * (how == "chunks" and left > 0)) for how in HOW for left in (0, 3)
]


@pytest.mark.differs("aLoRA generating without a cache")
@pytest.mark.parametrize("how, left", CASES)
def test_generation_with_a_cache_is_that_without(how, left):
    model, inputs = with_alora(), padded(batch(), left, True)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    if how == "samples":
        options |= dict(do_sample=True, num_return_sequences=2)
    cached = {"chunks": dict(prefill_chunk_size=3), "static": dict(cache_implementation="static")}.get(how, {})

    def generated(**more):
        with seeded(3):
            return model.generate(**inputs, **options, **more)

    out = generated(**cached)
    assert torch.equal(out, generated(use_cache=False))
    assert not torch.equal(out, lora_of(model).generate(**inputs, **options)[: len(out)])
    assert not get_registry(model).call.context
    for row in out if how == "greedy" else ():  # decoding by hand: each token from the whole text before it
        text, prompt = row[None], inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"][:1], torch.ones(1, 6, dtype=torch.long)], 1)
        steps = logits(model, {"input_ids": text, "attention_mask": mask})[0, prompt - 1 : -1]
        steps[:, 2] = -torch.inf  # the end of a text, which `min_new_tokens` puts off
        assert torch.equal(steps.argmax(-1), text[0, prompt:])


def test_steps_of_the_callers_own_with_a_cache():
    model, inputs = with_alora(), batch()
    ids = inputs["input_ids"]
    expected = logits(model, {"input_ids": ids})
    first = model(input_ids=ids[:, :5], use_cache=True)
    rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, alora_offsets=[3, 3])
    assert_close(torch.cat([first.logits, rest.logits], 1).detach(), expected, rtol=1e-4, atol=1e-4)


def test_generation_from_embeddings():
    model, inputs = with_alora(), batch()
    expected = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    options = dict(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=3, min_new_tokens=3)
    out = model.generate(**options, do_sample=False, alora_offsets=[7, 6])
    assert torch.equal(out, expected[:, 8:])
    warns(UserWarning, "during generate as input_ids are not available", model.generate, **options, do_sample=False)


@pytest.mark.differs("aLoRA with beams that a `generation_config` asks for")
@pytest.mark.differs("aLoRA: `num_beams` given to a forward")
def test_beams_are_refused():
    from transformers import GenerationConfig

    model, inputs = with_alora(), batch()
    for options in (dict(num_beams=2), dict(generation_config=GenerationConfig(num_beams=2))):
        with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
            model.generate(**inputs, max_new_tokens=2, **options)
    assert not get_registry(model).call.context
    with model.disable_adapter():
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
    assert torch.equal(model(**inputs, num_beams=2).logits, model(**inputs).logits)


# training


def gradients(model, inputs, **options):
    model.zero_grad()
    y = model(**inputs, **options).logits
    with seeded(6):
        (y * torch.randn(y.shape)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.differs("aLoRA: a second forward under gradient checkpointing, before a backward")
def test_two_forwards_and_one_backward_with_checkpointing_are_refused():
    model, inputs = with_alora(False), batch()
    total = sum(model(**inputs).logits.sum() for _ in range(2))
    refuses(graft.RoutingError, r"with different rows, facts, gates.*backward\(\) after each", total.backward)
    model.zero_grad()
    assert gradients(model, inputs)


@QUIET
def test_without_invocation_gradients_are_zero_and_there():
    model = with_alora().train()
    found = gradients(model, batch(invoked=False))
    assert found and all(not g.any() for g in found.values())


@WHOLE_GRAPHS
@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    model, inputs = with_alora(), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ids in (inputs, batch(2, invoked=False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = logits(model, ids)
        assert_close(compiled(**ids).logits.detach(), expected)


# refused


@pytest.mark.differs("`alora_invocation_tokens=[]`")
@pytest.mark.parametrize("tokens", [[], [3, -1]])
def test_tokens_that_are_none(tokens):
    with pytest.raises(graft.ConfigError, match="must be the ids of one token or more"):
        graft.LoraConfig(alora_invocation_tokens=tokens, task_type="CAUSAL_LM")


def test_configs():
    refuses(graft.ConfigError, "variant combination", graft.LoraConfig, **ALORA, use_dora=True)
    warns(UserWarning, "only supported for CAUSAL_LM", graft.LoraConfig, alora_invocation_tokens=[1])
    with pytest.raises(graft.UnsupportedLayerError, match="linear layers"):
        graft.get_peft_model(models.make("llama"), graft.LoraConfig(**{**ALORA, "target_modules": ["embed_tokens"]}))


@pytest.mark.parametrize(
    "given, error, text",
    [
        ([7], graft.RoutingError, "1 entries, for a batch of 2"),
        ([7, -1], graft.ConfigTypeError, "one number of positions"),
        ([7, 1.5], graft.ConfigTypeError, "one number of positions"),
        (7, graft.ConfigTypeError, "one number of positions"),
        (torch.tensor(7), graft.ConfigTypeError, "one number of positions"),
        ([7, True], graft.ConfigTypeError, "one number of positions"),
    ],
)
def test_offsets_that_are_none(given, error, text):
    model, inputs = with_alora(), batch()
    refuses(error, text, model, **inputs, alora_offsets=given)
    assert not get_registry(model).call.context
    model(**inputs)


# PEFT


def pair():
    found = []
    for lib in (graft, peft):
        with seeded(1):
            model = lib.get_peft_model(models.make("llama"), lib.LoraConfig(**ALORA))
        with torch.no_grad(), seeded(3):
            for name, p in sorted(model.named_parameters()):
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape) * 0.3)
        found.append(model.eval())
    return found


@QUIET
def test_forward_gradients_and_generation_as_in_peft():
    ours, theirs = pair()
    inputs = models.inputs("llama", 4)
    assert_close(logits(ours, inputs), logits(theirs, inputs), rtol=1e-5, atol=1e-5)
    found, expected = gradients(ours.train(), inputs), gradients(theirs.train(), inputs)
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert_close(found[name], g, rtol=1e-4, atol=1e-5)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    texts = [m.eval().generate(**batch(), **options) for m in (ours, theirs)]
    assert torch.equal(*texts)
