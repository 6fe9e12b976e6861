# SPDX-License-Identifier: Apache-2.0
"""LoRA's side doors, against PEFT: conversion of PiSSA and OLoRA on saving, layer replication, AutoPeftModel."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from tests.raised import refuses, warns

IDS = torch.arange(3, 15)[None]


SIZES = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=40)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def nudge(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    return model.eval()


@pytest.mark.differs("PiSSA or OLoRA on a base on the meta device")
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_from_a_weight_without_values_says_that_something_is_missing(how):
    with torch.device("meta"):
        base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    config = graft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=how)
    with pytest.warns(graft.PeftWarning, match="changes base weights that are on the meta device"):
        model = graft.get_peft_model(base, config)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_converted_adapter_is_plain_lora_for_the_original_base(how, rslora, tmp_path):
    saved = {}
    for lib in (graft, peft):
        folder = tmp_path / lib.__name__
        config = lib.LoraConfig(
            r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=how, use_rslora=rslora
        )
        model = lib.get_peft_model(llama(), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = how
        expected = logits(nudge(model))
        model.save_pretrained(folder / "end", path_initial_model_for_weight_conversion=str(folder / "start"))
        saved[lib] = expected, load_file(folder / "end" / "adapter_model.safetensors")
        written = json.loads((folder / "end" / "adapter_config.json").read_text())
        assert written["init_lora_weights"] is True and written["r"] == 6
        for loader in (graft, peft):
            assert_close(
                logits(loader.PeftModel.from_pretrained(llama(), folder / "end")), expected, atol=2e-5, rtol=1e-4
            )
    assert_close(*(saved[lib][0] for lib in (graft, peft)), atol=2e-5, rtol=1e-4)
    assert {k: v.shape for k, v in saved[graft][1].items()} == {k: v.shape for k, v in saved[peft][1].items()}


@pytest.mark.differs("saving PiSSA or OLoRA as plain LoRA")
@pytest.mark.parametrize(
    "options",
    [dict(modules_to_save=["lm_head"]), dict(use_dora=True), dict(target_modules=["embed_tokens", "q_proj"])],
    ids=lambda o: next(iter(o)),
)
def test_a_conversion_keeps_what_is_neither_a_nor_b(options, tmp_path):
    """PEFT drops modules trained whole, magnitudes and embeddings."""
    embeds = "target_modules" in options
    lib = peft if embeds else graft  # PEFT begins with the default on an embedding, in silence
    config = lib.LoraConfig(
        **dict(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa") | options
    )
    model = lib.get_peft_model(llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    nudge(model)
    if embeds:
        model.save_pretrained(tmp_path / "trained")
        model = graft.PeftModel.from_pretrained(llama(), tmp_path / "trained")
    expected = logits(model)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_close(logits(graft.PeftModel.from_pretrained(llama(), tmp_path / "end")), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["pissa", "olora", "corda"])
def test_a_conversion_takes_the_initial_adapter_as_it_was_saved(how, tmp_path):
    settings = {"corda_config": graft.CordaConfig()} if how == "corda" else {}
    base, config = llama(), graft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=how, **settings)
    if how == "corda":
        graft.preprocess_corda(base, config, lambda: base(input_ids=IDS))
    model = graft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "start")
    expected = logits(nudge(model))
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_close(logits(graft.PeftModel.from_pretrained(llama(), tmp_path / "end")), expected, atol=2e-5, rtol=1e-4)


def test_replicated_layers_share_weights_but_not_adapters(tmp_path):
    models = {}
    for lib in (graft, peft):
        torch.manual_seed(1)
        config = lib.LoraConfig(
            r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], layer_replication=[(0, 2), (1, 3)]
        )
        models[lib] = nudge(lib.get_peft_model(llama(), config))
    ours, theirs = models[graft], models[peft]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert ours.config.num_hidden_layers == 4
    layers = ours.get_base_model().model.layers
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert (
        layers[1].self_attn.q_proj.lora_A["default"].weight is not layers[2].self_attn.q_proj.lora_A["default"].weight
    )
    ours.save_pretrained(tmp_path)
    assert_close(logits(graft.PeftModel.from_pretrained(llama(), tmp_path)), logits(ours), atol=1e-6, rtol=1e-6)
    expected = logits(ours)
    assert_close(logits(ours.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)  # each copy gets its own update


def test_replication_says_that_it_changes_the_base_of_others():
    model = graft.get_peft_model(llama(), graft.LoraConfig(target_modules=["q_proj"]), "first")
    config = graft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)])
    warns(graft.PeftWarning, r"base of adapters \['first'\] another one", model.add_adapter, "second", config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("third", config)


def test_replication_that_fails_leaves_the_model(tmp_path):
    base = llama()
    before, names = logits(base), [n for n, _ in base.named_modules()]
    with pytest.raises(graft.NoMatchingPeftModuleError):
        graft.get_peft_model(base, graft.LoraConfig(target_modules=["nope"], layer_replication=[(0, 2), (1, 3)]))
    with pytest.raises(ValueError, match="outside the model's 3"):
        graft.get_peft_model(base, graft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 9)]))
    assert [n for n, _ in base.named_modules()] == names and torch.equal(logits(base), before)
    assert base.config.num_hidden_layers == 3


def stacked(kind):
    """A model of another family, whose list of layers has another name or place."""
    from transformers import BertConfig, BertModel, FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

    sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=40)
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(**sizes, intermediate_size=32)).eval(), "query", lambda m: m.encoder.layer
    if kind == "falcon":
        return FalconForCausalLM(FalconConfig(**sizes)).eval(), "query_key_value", lambda m: m.transformer.h
    small = GPT2Config(n_embd=24, n_layer=3, n_head=4, vocab_size=40, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(small).eval(), "c_attn", lambda m: m.transformer.h


@pytest.mark.differs("`layer_replication`")
@pytest.mark.parametrize("kind", ["bert", "falcon", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_replicated_layers_of_other_families(kind):
    """PEFT knows BERT's list, and neither Falcon's nor GPT-2's below their heads."""
    ours = None
    for lib in (graft, peft) if kind == "bert" else (graft,):
        base, target, find = stacked(kind)
        plain, _, _ = stacked(kind)
        config = lib.LoraConfig(r=2, target_modules=[target], layer_replication=[(0, 2), (1, 3)])
        model = nudge(lib.get_peft_model(base, config))
        layers = find(model.get_base_model())
        assert len(layers) == 4 == model.config.num_hidden_layers
        with torch.no_grad():
            y = model(input_ids=IDS)[0]
            with model.disable_adapter():  # the original's layers, one of them twice
                bare = model(input_ids=IDS)[0]
            own = find(plain)
            stack = nn.ModuleList([own[0], own[1], own[1], own[2]])
            (plain.encoder if kind == "bert" else plain.transformer)._modules["layer" if kind == "bert" else "h"] = (
                stack
            )
            plain.config.num_hidden_layers = 4
            for m in plain.modules():
                if hasattr(m, "layer_idx"):
                    m.layer_idx = None
            assert_close(bare, plain(input_ids=IDS, use_cache=False)[0], atol=1e-5, rtol=1e-5)
        assert (y - bare).abs().max() > 1e-4
        if lib is peft:
            assert_close(ours, y, atol=1e-5, rtol=1e-5)
        ours = y


CONVERSIONS = {
    "rslora": (
        "LoraConfig",
        dict(init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 3}),
        "Passing `path_initial_model_for_weight_conversion` to `save_pretrained`",
    ),
    "vera": ("VeraConfig", {}, "is not supported for Vera"),
}


@pytest.mark.parametrize("lib", [graft, peft])
@pytest.mark.parametrize("case", CONVERSIONS)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
def test_what_cannot_be_converted_on_saving(case, lib, tmp_path):
    kind, options, text = CONVERSIONS[case]
    model = lib.get_peft_model(llama(), getattr(lib, kind)(r=2, target_modules=["q_proj"], **options))
    config = model.peft_config["default"]
    if case == "rslora":
        config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    if case == "rslora":
        config.init_lora_weights = "pissa"
    with pytest.raises(ValueError, match=text):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


@pytest.mark.differs('converting on save what changed no base ("gaussian")')
def test_a_conversion_of_what_left_the_base_alone_says_so(tmp_path):
    config = graft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
    model = graft.get_peft_model(llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "gaussian"
    expected = logits(nudge(model))
    with pytest.warns(UserWarning, match="only works for converting a PiSSA/CorDA/OLoRA/LoRA-GA adapter"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = graft.PeftModel.from_pretrained(llama(), tmp_path / "end")  # B began with zeros: nothing is taken out
    assert_close(logits(loaded), expected, atol=2e-5, rtol=1e-4)


def test_a_conversion_of_pissa_says_nothing(tmp_path):
    model = graft.get_peft_model(llama(), graft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_conversion_refuses_rslora_with_either_pattern(pattern, tmp_path):
    options = {"use_rslora": True, pattern: {"0.self_attn.q_proj": 1}}
    with pytest.warns(UserWarning, match="cannot be converted to plain LoRA"):
        config = graft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa", **options)
    model = graft.get_peft_model(llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(graft.ConfigError, match="rank_pattern or alpha_pattern"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


def test_a_conversion_refuses_an_initial_adapter_that_differs_by_a_tenth(tmp_path):
    model = graft.get_peft_model(llama(), graft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.data.mul_(1.1)
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(graft.ConfigError, match="not the start of this one"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


def test_an_auto_class_loads_base_and_adapter_from_the_adapters_folder(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = graft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj"])
    model = nudge(graft.get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter")
    loaded = graft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is graft.PeftModelForCausalLM
    assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)
    assert_close(
        logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        graft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    refuses(OSError, "from_pretrained", graft.AutoPeftModel)


def test_without_a_task_the_base_class_comes_from_the_stored_mapping(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = nudge(graft.get_peft_model(base, graft.LoraConfig(r=3, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    assert_close(logits(graft.AutoPeftModel.from_pretrained(tmp_path / "adapter")), logits(model), atol=1e-6, rtol=1e-6)
    path = tmp_path / "adapter" / "adapter_config.json"
    stored = json.loads(path.read_text())
    stored["auto_mapping"]["parent_library"] = "os"
    path.write_text(json.dumps(stored))
    refuses(ValueError, "not in the import allowlist", graft.AutoPeftModel.from_pretrained, tmp_path / "adapter")


@pytest.mark.differs("lora_bias and DoRA active together")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [["z", "y"], ["y", "z"]])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_shifted_bias_and_dora_act_together_as_they_merge(order, kind, bias):
    from graft.core.merging import compute_merged
    from graft.core.plan import order_steps

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8, bias=bias) if kind == "linear" else nn.Conv1d(6, 8, 3, bias=bias)).double()
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["0"], r=2, lora_bias=True), "z").eval()
    model.add_adapter("y", graft.LoraConfig(target_modules=["0"], r=2, use_dora=True))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_()
    model.base_model.set_adapter(order)
    x = torch.randn(70, 6, *[5] * (kind == "conv")).double()
    y = model(x)
    layer = model.base_model.model[0]
    if bias:
        model.merge_adapter()
        assert_close(model(x), y)
        model.unmerge_adapter()
        for name in "zy":  # in a mixed batch each acts alone, whatever is active
            model.set_adapter(name)
            alone = model(x)
            model.base_model.set_adapter(order)
            rows = model(x, adapter_names=[name] * 35 + ["__base__"] * 35)
            assert_close(rows[:35], alone[:35])
    else:  # there is no bias to merge into, but one may be put there
        layer.base_layer.bias = nn.Parameter(torch.zeros(8).double())
        W, b = compute_merged(layer, order_steps(layer, [layer.methods[n] for n in order]))
        assert_close(layer.op.call(layer.base_layer, x, W, b), y)
