# SPDX-License-Identifier: Apache-2.0
"""X-LoRA: experts weighed by a classifier on the hidden states of a first pass."""

import copy
import os
import shutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import graft
from graft.core.rows import CACHES, list_forward_arguments
from tests import models
from tests.looks import get_registry, layers
from tests.models import adapted, seeded
from tests.raised import refuses, warns

EXPERT = dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PEFT_NAMES, OTHER_NAMES = ("0", "1", "2"), ("math", "0", "layers")
LIBS = (graft, peft)
CLASSIFIER = "internal_xlora_classifier"


def base():
    model = models.make("llama")
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three experts on disk; the last has other layers than the first two."""
    root = tmp_path_factory.mktemp("experts")
    for i in range(3):
        values = {
            **EXPERT,
            "r": 2 + i,
            **({"target_modules": ["q_proj", "down_proj", "embed_tokens"]} if i == 2 else {}),
        }
        with seeded(i), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(**values))
            for layer in layers(model).values():
                for p in layer.parameters_of("default"):
                    p.data.copy_(torch.randn(p.shape) * 0.3)
            model.save_pretrained(root / str(i), save_embedding_layers=False)
    return root


def config(lib, folder, names=PEFT_NAMES, **values):
    adapters = {name: str(folder / str(i)) for i, name in enumerate(names)}
    return lib.XLoraConfig(**{"hidden_size": 24, "adapters": adapters, "task_type": "CAUSAL_LM", **values})


def mixture(lib, folder, names=PEFT_NAMES, on=None, **values):
    base_model = base() if on is None else on
    model = adapted(base_model, config(lib, folder, names, **values), lib=lib, seed=5, scale=0)
    with torch.no_grad(), seeded(6):
        for name, p in sorted(model.named_parameters()):
            if CLASSIFIER in name:
                p.copy_(torch.randn(p.shape) * 0.4)
    return model


def output(model, **options):
    return models.output(model, {**models.inputs("llama"), **options})


def gradients(model):
    model.zero_grad()
    y = output(model)
    with seeded(6):
        (y * torch.randn(y.shape)).sum().backward()
    return {
        n.replace("lora_model.model.", "model.", 1): p.grad for n, p in model.named_parameters() if p.grad is not None
    }


VARIETY = {
    "plain": {},
    "deep": dict(xlora_depth=3, xlora_size=5),
    "layerwise": dict(layerwise_scalings=True, softmax_temperature=0.7),
    "top 2": dict(top_k_lora=2),
    "top 2, softmax": dict(top_k_lora=2, enable_softmax=False, enable_softmax_topk=True, layerwise_scalings=True),
    "weight": dict(global_scaling_weight=1.7, enable_softmax=False),
    "pass": dict(scaling_pass_value=0.4),
    "trainable": dict(use_trainable_adapters=True, xlora_depth=2, xlora_size=7),
}


@pytest.mark.parametrize("how", VARIETY)
def test_outputs_gradients_and_weights_are_pefts(how, folder):
    ours, theirs = (mixture(lib, folder, **VARIETY[how]) for lib in LIBS)
    assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)
    assert_close(ours.get_latest_scalings(), theirs.get_latest_scalings(), rtol=1e-5, atol=1e-6)
    assert ours.get_latest_scalings().shape == (3, 7, len(layers(ours)), 3)
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        atol = 1e-5 * max(1.0, g.abs().max().item())
        assert_close(found[name], g, rtol=1e-4, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.differs("X-LoRA: `lora_bias` of an expert")
def test_the_mixture_is_the_sum_of_weighed_parts(folder):
    model = mixture(graft, folder, names=OTHER_NAMES, layerwise_scalings=True)
    layer = layers(model)["model.layers.1.self_attn.q_proj"]
    x, seen = torch.randn(3, 7, layer.in_features), []
    handle = model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: seen.append(layer(x)))
    output(model)
    handle.remove()
    order = [m.site.key for m in model.modules() if isinstance(m, graft.AdapterLayer)]
    weights = model.get_latest_scalings()[:, :, order.index(layer.site.key)]
    parts = [
        weights[..., i, None] * (x @ layer.get_delta_weight(n).T)
        for i, n in enumerate(OTHER_NAMES)
        if n in layer.adapters
    ]
    assert len(parts) == 3
    assert_close(seen[0], layer.base_layer(x)), "the first pass is the base model's"
    assert_close(seen[1], layer.base_layer(x) + sum(parts), rtol=1e-5, atol=1e-5)


def test_what_is_there_and_what_trains(folder):
    ours, theirs = (mixture(lib, folder) for lib in LIBS)
    assert list(ours.peft_config) == list(theirs.peft_config) == ["default", *PEFT_NAMES]
    names = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert names == {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert names == {f"base_model.{CLASSIFIER}.layers.0.{n}" for n in ("weight", "bias")}
    assert type(ours).__name__ == "PeftModelForCausalLM" and isinstance(ours.base_model, graft.XLoraModel)
    trains = mixture(graft, folder, use_trainable_adapters=True)
    assert any("lora_A.1." in n for n, p in trains.named_parameters() if p.requires_grad)
    ours.set_adapter("default")
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == names


@pytest.mark.differs("X-LoRA: the log of weights")
def test_the_api_of_weights(folder):
    ours, theirs = (mixture(lib, folder) for lib in LIBS)
    for model in (ours, theirs):
        output(model)
        assert model.get_scalings_log() == []
        model.enable_scalings_logging()
        output(model), output(model, input_ids=torch.ones(2, 4, dtype=torch.long), attention_mask=None)
        model.disable_scalings_logging()
        output(model)
        assert [tuple(s.shape[:2]) for s in model.get_scalings_log()] == [(3, 7), (2, 4)]
        assert [(n, places) for n, (places, _) in model.get_bucketed_scalings_log().items()] == [(7, [0]), (4, [1])]
        model.clear_scalings_log()
        assert model.get_scalings_log() == []
        model.set_topk_lora(1)
        model.set_global_scaling_weight(0.5)
        model.set_scaling_pass_value(None)
        assert model.get_global_scaling_weight() == 0.5
    assert ours.peft_config["default"].scaling_pass_value == pytest.approx(1 / 3)
    assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)
    embeds = dict(
        input_ids=None, inputs_embeds=models.make("llama").get_input_embeddings()(torch.arange(21).view(3, 7))
    )
    assert_close(output(ours, **embeds), output(theirs, **embeds), rtol=1e-5, atol=1e-5)


def test_experts_by_themselves_and_none(folder):
    model, plain = mixture(graft, folder, names=OTHER_NAMES), models.make("llama")
    mixed = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(plain))
    model.set_adapter("math")
    alone = graft.PeftModel.from_pretrained(plain, folder / "0")
    assert_close(output(model), output(alone))
    rows = output(model, adapter_names=["math", "__base__", "0"])
    assert_close(rows[0], output(alone)[0], rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    assert torch.equal(output(model), mixed)
    refuses(graft.RoutingError, "acts on the whole batch", output, model, adapter_names=["default"] * 3)
    assert not get_registry(model).call.context


# running


def test_generation(folder):
    ours, theirs = (mixture(lib, folder) for lib in LIBS)
    batch = {k: v[:1] for k, v in models.inputs("llama").items()}
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    out = ours.generate(**batch, **options)
    assert torch.equal(out, theirs.generate(**batch, **options))
    for i in range(4):
        text = out[:, : 7 + i]
        logits = ours(input_ids=text).logits[0, -1].detach()
        logits[2] = -torch.inf
        assert logits.argmax() == out[0, 7 + i]
    assert not get_registry(ours).call.context and not ours.get_base_model()._forward_pre_hooks
    ours.generate(**batch, max_new_tokens=2, num_beams=2)
    with pytest.raises(graft.RoutingError, match="takes no cache"):
        cache = ours.get_base_model()(batch["input_ids"], use_cache=True).past_key_values
        ours(batch["input_ids"][:, :1], past_key_values=cache)
    by_place = [cache if name in CACHES else None for name in list_forward_arguments(ours.get_base_model())]
    with pytest.raises(graft.RoutingError, match="takes no cache"):
        ours.base_model(batch["input_ids"][:, :1], *by_place[1 : by_place.index(cache) + 1])


@pytest.mark.differs("X-LoRA and gradient checkpointing")
def test_gradient_checkpointing(folder):
    model = mixture(graft, folder, layerwise_scalings=True)
    expected = gradients(model.train())
    models.checkpoint(model)
    model.enable_input_require_grads()
    for _ in range(2):
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, g in expected.items():
            assert_close(found[name], g, rtol=1e-4, atol=1e-5)


def test_an_error_leaves_nothing_behind(folder):
    model = mixture(graft, folder)
    expected = output(model)
    for nothing in ({}, {"input_ids": None}):
        refuses(graft.RoutingError, "neither input_ids nor inputs_embeds. Pass one", model, **nothing)

    def fail(*_):
        raise KeyError("stop")

    handle = model.get_base_model().lm_head.register_forward_hook(fail)
    refuses(KeyError, None, output, model)
    handle.remove()
    assert not get_registry(model).call.context
    assert torch.equal(output(model), expected)


# files


@pytest.mark.differs("X-LoRA: the saved classifier")
@pytest.mark.differs("X-LoRA: saved experts")
@pytest.mark.parametrize("names", [PEFT_NAMES, OTHER_NAMES])
@pytest.mark.parametrize("trains", [False, True])
def test_a_checkpoint_is_complete(names, trains, folder, tmp_path):
    model = mixture(graft, folder, names, use_trainable_adapters=trains, xlora_depth=2, xlora_size=5)
    with torch.no_grad():
        for layer in layers(model).values():
            for p in layer.parameters_of(names[0]):
                p.mul_(1.5)  # as if it had trained
    expected = output(model)
    model.save_pretrained(tmp_path / "saved")
    held = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert sorted(held) == [f"base_model.{CLASSIFIER}.layers.{i}.{n}" for i in (0, 3) for n in ("bias", "weight")]
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    loaded = graft.PeftModel.from_pretrained(base(), tmp_path / "moved")
    assert torch.equal(output(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded = graft.PeftModel.from_pretrained(base(), tmp_path / "moved", is_trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    alone = graft.PeftModel.from_pretrained(models.make("llama"), tmp_path / "moved" / names[0])
    assert any(t.any() for t in graft.get_peft_model_state_dict(alone).values()), "an expert is a checkpoint of LoRA"


@pytest.mark.differs("X-LoRA: names of experts")
def test_experts_from_other_places(folder, tmp_path):
    model = mixture(graft, folder)
    model.save_pretrained(tmp_path)
    moved = {name: str(folder / str(2 - i)) for i, name in enumerate(PEFT_NAMES)}
    loaded = graft.PeftModel.from_pretrained(base(), tmp_path, adapters=moved)
    assert loaded.peft_config["0"].r == 4
    for name in PEFT_NAMES:
        shutil.rmtree(tmp_path / name)
    assert torch.equal(output(graft.PeftModel.from_pretrained(base(), tmp_path)), output(model))


@pytest.mark.differs("X-LoRA: parameter names in memory")
def test_files_between_the_libraries(folder, tmp_path):
    ours, theirs = (mixture(lib, folder, xlora_depth=2, xlora_size=5) for lib in LIBS)
    expected = output(theirs)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    with pytest.raises(graft.AdapterKeyError, match=r"missing adapter keys.*layers\.0\.weight.*strict=False"):
        graft.PeftModel.from_pretrained(base(), tmp_path / "theirs")  # which PEFT left out of its file
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = graft.PeftModel.from_pretrained(base(), tmp_path / "theirs", strict=False)
    for name, p in theirs.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name or f"{CLASSIFIER}.layers.3." in name:
            assert torch.equal(loaded.state_dict()[name.replace("lora_model.model.", "model.", 1)], p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert_close(output(back), expected, rtol=1e-5, atol=1e-5)


# refused


def unchanged(model, call, error, text):
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    refuses(error, text, call, model)
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[n][0]) and on == before[n][1] for n, (p, on) in after.items())


def test_what_cannot_be_made(folder, tmp_path):
    def made(**values):
        return lambda model: graft.get_peft_model(model, config(graft, folder, **values))

    unchanged(models.make("llama"), made(), graft.ConfigError, "`use_cache` must be False")
    unchanged(base(), made(adapters={}), graft.ConfigError, "needs experts")
    unchanged(base(), made(top_k_lora=4), graft.ConfigError, "top_k_lora=4 is more than the 3 experts")
    gone = {"a": str(folder / "0"), "b": str(tmp_path / "gone")}
    unchanged(base(), made(adapters=gone), graft.CheckpointError, "Expert 'b' .* is neither next to its config nor at")
    unchanged(base(), made(names=("a", "b", "default")), graft.AdapterNameError, "already exists")
    kinds = {
        "dora": (graft.LoraConfig(**EXPERT, use_dora=True), "does not support LoRA layers with DoRA .expert 'b'"),
        "vera": (graft.VeraConfig(r=2, target_modules=["q_proj"]), "Expert 'b' of X-LoRA is VERA"),
    }
    for kind, (cfg, text) in kinds.items():
        graft.get_peft_model(models.make("llama"), cfg).save_pretrained(tmp_path / kind)
        bad = {"a": str(folder / "0"), "b": str(tmp_path / kind)}
        unchanged(base(), made(adapters=bad), graft.ConfigError, text)
    other = graft.get_peft_model(models.make("llama"), graft.LoraConfig(**{**EXPERT, "target_modules": ["o_proj"]}))
    other.save_pretrained(tmp_path / "broken")
    path = tmp_path / "broken" / "adapter_model.safetensors"
    os.truncate(path, 40)
    bad = {"a": str(folder / "0"), "b": str(tmp_path / "broken")}
    unchanged(base(), made(adapters=bad), graft.CheckpointError, "'b'")
    for kind, (options, key) in {"head": ({"modules_to_save": ["lm_head"]}, "lm_head"),
                                 "rows": ({"trainable_token_indices": [1, 2]}, "embed_tokens")}.items():  # fmt: skip
        cfg = graft.LoraConfig(r=2, target_modules=["q_proj"], **options)
        graft.get_peft_model(models.make("llama"), cfg).save_pretrained(tmp_path / kind)
        own = {"a": str(folder / "0"), "b": str(tmp_path / kind)}
        graft.get_peft_model(base(), config(graft, folder, adapters=own))  # one of them acts
        text = rf"cannot mix the '.*{key}'.*\['b', 'c'\] has. Train experts without modules_to_save"
        unchanged(base(), made(adapters={**own, "c": str(tmp_path / kind)}), graft.ConfigError, text)


def test_configs():
    ok = dict(hidden_size=24, adapters={})
    refuses(graft.ConfigError, "X-LoRA depth must be strictly positive", graft.XLoraConfig, **ok, xlora_depth=0)
    for lib in LIBS:
        with pytest.warns(UserWarning, match="No value was provided for `hidden_size`"):
            assert lib.XLoraConfig(adapters={}).hidden_size == 4096
        with pytest.warns(UserWarning, match="No value was provided for `adapters`"):
            assert lib.XLoraConfig(hidden_size=3).adapters == {}
        warns(UserWarning, "will result in worse performance", lib.XLoraConfig, **ok, enable_softmax_topk=True)
        warns(UserWarning, "must be at least 1", lib.XLoraConfig, **ok, top_k_lora=0)
        with pytest.warns(UserWarning, match="`enable_softmax_topk` enabled `top_k_lora` is not set"):
            lib.XLoraConfig(**ok, enable_softmax_topk=True, enable_softmax=False)
    for name in ("hidden_size", "xlora_size", "softmax_temperature"):
        refuses(graft.ConfigError, f"`{name}` must be positive, got 0", graft.XLoraConfig, **{**ok, name: 0})
    with pytest.raises(graft.ConfigError, match=r"`xlora_dropout_p` must be between 0 and 1, got 1\.5"):
        graft.XLoraConfig(**ok, xlora_dropout_p=1.5)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_of_the_classifier_is_pefts(p, folder):
    outputs = []
    for lib in LIBS:
        model = mixture(lib, folder, xlora_depth=3, xlora_size=5, xlora_dropout_p=p)
        dropping = [m for n, m in model.named_modules() if CLASSIFIER in n and isinstance(m, torch.nn.Dropout)]
        assert len(dropping) == (2 if p else 0)
        for m in dropping:
            m.train()
        models.seed(4)
        outputs.append(output(model))
        if p:
            assert not torch.equal(output(model), outputs[-1])
    assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.differs("X-LoRA: twelve experts and more")
def test_the_order_of_experts_is_kept(tmp_path):
    for names in (["b", "a", "c"], [str(i) for i in range(12)]):
        for lib in LIBS:  # PEFT sorts them as text
            lib.XLoraConfig(hidden_size=24, adapters=dict.fromkeys(names, "x")).save_pretrained(tmp_path / lib.__name__)
        assert list(graft.PeftConfig.from_pretrained(tmp_path / "graft").adapters) == names
        loaded = graft.PeftConfig.from_pretrained(tmp_path / "peft")
        assert list(loaded.adapters) == sorted(names, key=lambda name: name.zfill(2))


@pytest.mark.differs("X-LoRA: merging")
def test_what_it_does_not_do(folder):
    model = mixture(graft, folder)
    expected = output(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        refuses(NotImplementedError, "cannot be merged", call)
    with pytest.raises(ValueError, match=r"different peft types\. Found .*XLORA and .*LORA"):
        model.add_adapter("more", graft.LoraConfig(**EXPERT))
    refuses(graft.ConfigError, "is an expert of X-LoRA adapter 'default'", model.delete_adapter, "1")
    refuses(graft.ConfigError, "top_k_lora=9", model.set_topk_lora, 9)
    assert torch.equal(output(model), expected)
    assert torch.equal(output(copy.deepcopy(model)), expected)
    refuses(graft.ConfigError, "XLORA adapts no layers itself", graft.plan, base(), config(graft, folder))
    narrow = mixture(graft, folder, hidden_size=20)
    refuses(graft.RoutingError, "width 20, and the base model's have 24", output, narrow)
    model.set_adapter("0")
    plain = output(model)
    model.merge_adapter(["0"])
    assert_close(output(model), plain, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not hasattr(model.base_model, CLASSIFIER)
    base_again = model.unload()
    assert_close(output(base_again), output(models.make("llama")), rtol=1e-5, atol=1e-5)
