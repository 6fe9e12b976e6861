# SPDX-License-Identifier: Apache-2.0
"""Adaption prompts: an adapter on whole attentions, which reads all arguments of their call."""

import json
import math
import warnings
from dataclasses import fields

import peft
import pytest
import torch
from torch.testing import assert_close

import graft
from graft.core.effect import Update
from graft.core.errors import ConfigError, ConfigTypeError, UnsupportedLayerError
from graft.core.layer import AdapterLayer
from tests import models
from tests.leaves_out import WHOLE_GRAPHS
from tests.looks import layers
from tests.models import STD, VOCAB, seeded, transformer
from tests.pair import json_of, outcome
from tests.raised import refuses

LIBS = (graft, peft)
_mistral = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=36, num_attention_heads=4, max_position_embeddings=32,
    initializer_range=STD, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
BASES = {
    "llama": lambda: models.make("llama"),  # 4 heads on 2 of keys
    "mistral": transformer(
        "MistralConfig", "MistralForCausalLM", num_hidden_layers=3, num_key_value_heads=1, sliding_window=4, **_mistral
    ),
    "gpt2": lambda: models.make("gpt2"),
    "wide": transformer(  # heads that are together wider than the model
        "MistralConfig", "MistralForCausalLM", num_hidden_layers=2, num_key_value_heads=2, head_dim=10, **_mistral
    ),
    "bias": transformer(
        "LlamaConfig", "LlamaForCausalLM", num_hidden_layers=2, num_key_value_heads=4, attention_bias=True, **_mistral
    ),
}
NAME = {"llama": "model.layers.1.self_attn", "mistral": "model.layers.2.self_attn", "gpt2": "transformer.h.1.attn"}
BATCH = models.inputs("llama")

every = pytest.mark.parametrize("name", NAME)
generating = pytest.mark.parametrize("name", ["llama", "gpt2"])


def make(name="llama", dtype=torch.float32):
    with seeded(0):
        model = BASES[name]().eval()
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.data.normal_()
    return model.to(dtype)


def config(lib=graft, **options):
    return lib.AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM", **options})


def adapt(name="llama", lib=graft, base=None, seed=1, **options):
    base = make(name) if base is None else base
    with seeded(seed):
        return lib.get_peft_model(base, config(lib, **options)).eval()


@torch.no_grad()
def opened(model, number=3):
    """The model with gates that let something through, another in each layer and adapter."""
    with seeded(number):
        for key, p in model.named_parameters():
            if "adaption_gate" in key:
                p.copy_(torch.randn(1) + 1.5)
    return model


def three(name="llama"):
    """A model with adapters of different sizes."""
    model = adapt(name)
    with seeded(2):
        model.add_adapter("other", config(adapter_len=5, adapter_layers=1))
        model.add_adapter("third", config(adapter_len=2))
    return opened(model)


def logits(model, **kwargs):
    return model(**{**BATCH, **kwargs}).logits


def gradients(model, **kwargs):
    """Of every adaption parameter by its name without the adapter's."""
    model.zero_grad()
    y = logits(model, **kwargs)
    with seeded(4):
        (y * torch.randn(y.shape)).mean().backward()
    return {k.removesuffix(".default"): p.grad for k, p in model.named_parameters() if p.requires_grad}


def parts(model):
    """Outputs, gradients of prompts, gradients of gates: each as one vector."""
    grads = gradients(model)
    kinds = [torch.cat([g.flatten() for k, g in grads.items() if kind in k]) for kind in ("prompt", "gate")]
    return [t.detach().float() for t in (logits(model).flatten(), *kinds)]


# against PEFT


@pytest.mark.parametrize("name, n", [("llama", 1), ("llama", 2), ("mistral", 2), ("gpt2", 1), ("gpt2", 2), ("bias", 2)])
def test_values_and_gradients_are_pefts(name, n):
    ours, theirs = (opened(adapt(name, lib, adapter_layers=n)) for lib in LIBS)
    assert (logits(ours) - logits(make(name))).abs().max() > 0.1
    assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    grads = gradients(ours), gradients(theirs)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * n
    for key, grad in grads[1].items():
        assert grad.abs().max() > 1e-3
        assert_close(grads[0][key], grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_a_seed_gives_pefts_values(name, dtype):
    ours, theirs = (dict(adapt(name, lib, make(name, dtype)).named_parameters()) for lib in LIBS)
    added = [key for key in theirs if "adaption" in key]
    assert len(added) == 4
    for key in added:
        assert torch.equal(ours[f"{key}.default"], theirs[key]) and ours[f"{key}.default"].dtype == dtype
        assert ours[f"{key}.default"].requires_grad
    assert {k.removesuffix(".default") for k, p in ours.items() if p.requires_grad} == set(added)


@every
def test_half_precision_is_as_exact_as_pefts(name):
    wrong, size = torch.zeros(2, 3), torch.zeros(3)  # of outputs, gradients of prompts, gradients of gates
    for seed in range(8):
        exact = opened(adapt(name, base=make(name, torch.bfloat16), seed=seed)).float()
        right = parts(exact)
        size += torch.tensor([t.square().sum() for t in right])
        for i, lib in enumerate(LIBS):
            model = opened(adapt(name, lib, make(name, torch.bfloat16), seed))
            assert logits(model).dtype == torch.bfloat16
            wrong[i] += torch.tensor([(a - b).square().sum() for a, b in zip(parts(model), right)])
    ours, theirs = (wrong / size).sqrt()
    assert (ours[:2] < 1.2 * theirs[:2]).all() and (ours < 0.05).all(), (ours, theirs)


@pytest.mark.differs("adaption prompts: names in memory")
@every
def test_files_are_pefts(name, tmp_path):
    ours, theirs = (opened(adapt(name, lib)) for lib in LIBS)
    for lib, model in zip(("ours", "theirs"), (ours, theirs)):
        model.save_pretrained(tmp_path / lib)
    mine, other = (graft.load_peft_weights(tmp_path / lib) for lib in ("ours", "theirs"))
    assert {f"base_model.model.{NAME[name]}.adaption_{what}" for what in ("prompt", "gate")} < mine.keys()
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in other)
    assert json_of(tmp_path / "ours") == json_of(tmp_path / "theirs")


@pytest.mark.parametrize("source, reader", [(peft, graft), (graft, peft), (graft, graft)])
@every
def test_an_adapter_from_a_folder(name, source, reader, tmp_path):
    trained = opened(adapt(name, source))
    expected = logits(trained)
    trained.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(make(name), tmp_path).eval()
    assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in loaded.parameters()) or reader is peft
    fresh = adapt(name, reader, adapter_len=7, adapter_layers=1)
    fresh.load_adapter(tmp_path, "again")
    fresh.set_adapter("again")
    assert_close(logits(fresh.eval()), expected, rtol=1e-5, atol=1e-5)


def test_an_inactive_adapter_is_saved_as_peft_does(tmp_path):
    model = three()
    model.set_adapter("other")
    expected = logits(model)
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    for lib in LIBS:
        loaded = lib.PeftModel.from_pretrained(make(), tmp_path / "other").eval()
        assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_the_config_has_pefts_fields():
    ours, theirs = ({f.name: f.default for f in fields(lib.AdaptionPromptConfig)} for lib in LIBS)
    assert {k: ours[k] for k in theirs if k not in ("peft_type", "peft_version")} == {
        k: v for k, v in theirs.items() if k not in ("peft_type", "peft_version")
    }
    made = [config(lib).to_dict() for lib in LIBS]
    assert made[0] == made[1] and config().peft_type == "ADAPTION_PROMPT"
    assert config().is_adaption_prompt and not graft.LoraConfig().is_adaption_prompt
    assert not config().is_prompt_learning


# the mathematics


def by_hand(attention, prompt, gate, x, cos, sin):
    """What an adapter adds, head by head."""
    d = attention.head_dim
    q, k, v = attention.q_proj(x), attention.k_proj(prompt)[0], attention.v_proj(prompt)[0]
    n, m = q.shape[-1] // d, k.shape[-1] // d
    out = []
    for h in range(n):
        mine, kv = q[..., h * d : (h + 1) * d], slice(h * m // n * d, (h * m // n + 1) * d)
        turned = torch.cat((-mine[..., d // 2 :], mine[..., : d // 2]), -1)
        weights = ((mine * cos + turned * sin) @ k[:, kv].T / math.sqrt(d)).softmax(-1)
        out.append(gate * weights @ v[:, kv])
    return attention.o_proj(torch.cat(out, -1))


def call_of(model, path):
    """Arguments and output of one attention in a forward pass of the model."""
    seen = {}
    layer = model.get_submodule(path)
    hook = layer.register_forward_hook(lambda m, a, k, y: seen.update(args=a, kwargs=k, y=y), with_kwargs=True)
    logits(model, use_cache=False)
    hook.remove()
    return layer, seen["args"], seen["kwargs"], seen["y"]


@pytest.mark.parametrize("name", ["llama", "mistral", "wide"])
@torch.no_grad()
def test_the_formula(name):
    model = opened(adapt(name))
    layer, _, kwargs, y = call_of(model.get_base_model(), "model.layers.1.self_attn")
    base = layer.base_layer(**kwargs)
    cos, sin = kwargs["position_embeddings"]
    added = by_hand(
        layer.base_layer, layer.adaption_prompt["default"], layer.adaption_gate["default"],
        kwargs["hidden_states"], cos, sin,
    )  # fmt: skip
    assert added.abs().max() > 0.05
    assert_close(y[0], base[0] + added, rtol=1e-5, atol=1e-5)
    assert len(y) == len(base)


@torch.no_grad()
def test_arguments_by_place_and_by_name():
    layer, _, kwargs, y = call_of(opened(adapt()).get_base_model(), NAME["llama"])
    first = [kwargs.pop(key) for key in ("hidden_states", "position_embeddings", "attention_mask")]
    assert torch.equal(layer(*first, **kwargs)[0], y[0])
    assert torch.equal(layer(first[0], position_embeddings=first[1], attention_mask=first[2], **kwargs)[0], y[0])


@torch.no_grad()
def test_positions_in_place_of_their_embeddings():
    """Attentions of older models turn the queries by themselves."""
    model = adapt().get_base_model()
    layer, _, kwargs, _ = call_of(model, NAME["llama"])
    attention, read = layer.base_layer, next(iter(layer.methods.values())).input_of
    expected = read(attention, kwargs)
    attention.rotary_emb = model.model.rotary_emb
    positions = torch.arange(kwargs["hidden_states"].shape[1])[None]
    got = read(attention, {"hidden_states": kwargs["hidden_states"], "position_ids": positions})
    assert_close(got, expected)
    shifted = read(attention, {"hidden_states": kwargs["hidden_states"], "position_ids": positions + 3})
    assert (shifted - expected).abs().max() > 0.1


@every
def test_a_fresh_adapter_is_the_identity(name):
    assert torch.equal(logits(adapt(name)), logits(make(name)))


def test_attention_weights_are_still_handed_out():
    base = make()
    base.set_attn_implementation("eager")
    plain = base(**BATCH, output_attentions=True).attentions
    model = opened(adapt(base=base, adapter_layers=1))
    ours = model(**BATCH, output_attentions=True).attentions
    assert len(ours) == 2
    for a, b in zip(ours, plain):
        assert_close(a, b)  # the adapter's own come on top


# adapters


@pytest.mark.differs("adaption prompts: several adapters")
@torch.no_grad()
def test_two_active_adapters_add_up():
    model = three()
    layer, _, kwargs, _ = call_of(model.get_base_model(), NAME["llama"])
    y = {}
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        y[len(names), names[0]] = layer(**kwargs)[0]
    base = layer.base_layer(**kwargs)[0]
    assert_close(y[2, "default"], y[1, "default"] + y[1, "other"] - base, rtol=1e-5, atol=1e-5)


@every
@torch.no_grad()
def test_rows_of_others_may_adapt_the_layers_of_the_attention(name):
    """Which the prompt goes through as well, with rows of its own."""
    with seeded(1):
        model = graft.get_peft_model(make(name), config(), mixed=True).eval()
        targets = ["c_attn", "attn.c_proj"] if name == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj"]
        low = graft.LoraConfig(target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
        model.add_adapter("low", low)
    opened(model)
    names, batch = ["low", "default", "__base__", "default", "low"], models.inputs("llama", 5)
    mixed = model(**batch, adapter_names=names).logits
    for row, adapter in enumerate(names):
        model.set_adapter([a for a in [adapter] if a != "__base__"])
        alone = model(**{k: v[row : row + 1] for k, v in batch.items()}).logits
        assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("first", ["low", "block", "norms"])
@torch.no_grad()
def test_on_a_model_that_carries_others(name, first):
    """The prompt is as wide as on a plain one, and found in blocks that carry adapters."""
    gpt2 = name == "gpt2"
    configs = {
        "low": graft.LoraConfig(target_modules=["c_attn" if gpt2 else "q_proj"], fan_in_fan_out=gpt2),
        "block": graft.BottleneckConfig(reduction_factor=4),
        "norms": graft.LNTuningConfig(target_modules=["ln_1" if gpt2 else "input_layernorm"]),
    }
    model = graft.get_peft_model(make(name), configs[first], "first", mixed=True).eval()
    with seeded(1):
        model.add_adapter("default", config())
    with seeded(1):
        plain = graft.get_peft_model(make(name), config()).eval()
    opened(model)
    opened(plain)
    batch = models.inputs("llama", 3)
    found = model(**batch, adapter_names=["default"] * 3).logits
    assert_close(found, plain(**batch).logits, rtol=1e-5, atol=1e-5)


def test_status():
    model = three()
    assert [s.name for s in model.get_layer_status()] == [f"model.model.layers.{i}.self_attn" for i in (0, 1)]
    status = model.get_model_status()
    assert status.adapter_model_type == "AdaptionPromptModel" and status.num_adapter_layers == 2
    assert status.trainable_params == 2 * (3 * 24 + 1) and status.available_adapters == ["default", "other", "third"]


# generation


@generating
@torch.no_grad()
def test_generating_with_a_cache_is_a_step_at_a_time(name):
    model, theirs = (opened(adapt(name, lib)) for lib in LIBS)
    with seeded(5):
        ids = torch.randint(3, VOCAB, (2, 4))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    got = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    seen, both = ids, mask
    for step, cached in enumerate(got.logits):
        both = mask if not step else torch.cat((both, torch.ones_like(both[:, :1])), 1)
        positions = (both.cumsum(1) - 1).clamp(min=0)
        for lib in (model, theirs):
            plain = lib(input_ids=seen, attention_mask=both, position_ids=positions, use_cache=False).logits[:, -1]
            assert_close(cached, plain, rtol=1e-4, atol=1e-4)
        seen = got.sequences[:, : seen.shape[1] + 1]
    assert (got.logits[0] - make(name)(input_ids=ids, attention_mask=mask).logits[:, -1]).abs().max() > 0.1


# compiled, checkpointed, on meta


@WHOLE_GRAPHS
@every
def test_compiled_whole(name):
    model = opened(adapt(name))
    base = model.get_base_model()
    layer = base.get_submodule(NAME[name])
    torch._dynamo.reset()
    with torch.no_grad():
        _, args, kwargs, y = call_of(base, NAME[name])
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert_close(compiled(*args, **kwargs)[0], y[0])


def test_planning_and_loading_without_memory(tmp_path):
    trained = opened(adapt())
    trained.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = BASES["llama"]()
    report = graft.plan(empty, config(adapter_layers=1))
    assert [m.name for m in report.matched] == [NAME["llama"]] and report.trainable_parameters == 3 * 24 + 1
    loaded = graft.PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True).eval()
    values, expected = loaded.state_dict(), trained.state_dict()
    assert values.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in values.items())
    assert_close(logits(loaded), logits(trained).detach(), rtol=1e-5, atol=1e-5)


def test_without_a_wrapper():
    trained = opened(adapt())
    values = {k.removeprefix("base_model.model."): t for k, t in graft.get_peft_model_state_dict(trained).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = graft.inject_adapter_in_model(config(), make(), state_dict=values)
    assert graft.set_peft_model_state_dict(model, values, strict=True).missing_keys == []
    assert torch.equal(logits(model), logits(trained))
    bare = graft.inject_adapter_in_model(config(adapter_layers=1), make().model)
    assert [k for k, m in bare.named_modules() if isinstance(m, AdapterLayer)] == ["layers.1.self_attn"]


# configs


def test_a_config_can_be_used_again(tmp_path):
    cfg = config(adapter_layers=1)
    for name, path in NAME.items():
        cfg.target_modules = None
        with seeded(1):
            model = graft.get_peft_model(make(name), cfg)
        assert list(layers(model)) == [path] and cfg.target_modules == path.rpartition(".")[2]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == "attn" and saved.keys() == config(peft).to_dict().keys()


REFUSED = {
    "model": ("bert", {}, ConfigError, "Unsupported model type for adaption prompt: 'bert'."),
    "model-targets": (
        "bert", {"target_modules": "attention"}, ConfigError, "Unsupported model type for adaption prompt: 'bert'.",
    ),
    "plain": ("mlp", {}, ConfigError, "Unsupported model type for adaption prompt: 'custom'."),
    "layers": (
        "llama", {"adapter_layers": 9}, ConfigError,
        "Config specifies more adapter layers '9' than the model has '2'.",
    ),
    "typo": (
        "llama", {"target_modules": "self_atn"}, ConfigError,
        "more adapter layers '2' than the model has '0'. Modules called 'self_atn' are counted.",
    ),
    "no-len": ("llama", {"adapter_len": None}, ConfigError, "Please specify `adapter_len` in `peft_config`"),
    "no-layers": ("llama", {"adapter_layers": None}, ConfigError, "Please specify `adapter_layers` in `peft_config`"),
    "mlp": ("llama", {"target_modules": "mlp"}, UnsupportedLayerError, "It is no attention with q_proj"),
    "linear": ("llama", {"target_modules": "q_proj"}, UnsupportedLayerError, "It is no attention with q_proj"),
}  # fmt: skip


@pytest.mark.differs("adaption prompts: `target_modules`")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    base_name, options, error, text = REFUSED[name]
    base = models.make(base_name)
    before = {k: p.requires_grad for k, p in base.named_parameters()}
    with pytest.raises(error) as raised:
        graft.get_peft_model(base, config(**options))
    assert text in str(raised.value)
    assert {k: p.requires_grad for k, p in base.named_parameters()} == before


@pytest.mark.parametrize("name", ["model", "layers"])
def test_errors_that_peft_raises_as_well(name):
    base_name, options, _, text = REFUSED[name]
    for lib in LIBS:
        result = outcome(lambda lib=lib: lib.get_peft_model(models.make(base_name), config(lib, **options)))
        assert result.kind is ValueError and text in str(result.error)


@pytest.mark.differs("`adapter_len`, `adapter_layers` missing or ≤ 0")
@pytest.mark.parametrize("field", ["adapter_len", "adapter_layers"])
def test_numbers_must_be_positive(field):
    for value in (0, -1):
        refuses(ConfigError, f"`{field}` must be positive, got {value}", config, **{field: value})
    refuses(ConfigTypeError, field, config, **{field: "3"})


def test_a_second_adapter_that_does_not_fit():
    model = adapt()
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", graft.LoraConfig(task_type="CAUSAL_LM"))
    refuses(ValueError, "more adapter layers '3'", model.add_adapter, "deep", config(adapter_layers=3))
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), logits(make()))


def test_what_follows_from_its_hooks():
    layer = next(iter(layers(adapt()).values()))
    effect = layer.methods["default"].effect
    assert type(effect) is Update and effect.weightless
    assert effect.additive and effect.input_of and effect.why_unmergeable and not effect.whole
