# SPDX-License-Identifier: Apache-2.0
"""Adapters that several files make together: of the stages of a pipeline, and of cartridges in a row."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import graft
from graft.core.errors import CheckpointError, ConfigError, PeftWarning
from graft.io.compose import compose_cartridge_adapters, join_stages
from graft.io.files import load_pair, save_adapter
from graft.prompts.base import STORED
from tests.models import disturb, inputs, make, output, seeded
from tests.raised import refuses

FILES = {True: "adapter_model.safetensors", False: "adapter_model.bin"}


def stage(folder, targets, **options):
    """Save an adapter of some layers, whose values are those of an adapter of all of them."""
    config = graft.LoraConfig(**{"r": 2, "target_modules": targets, "init_lora_weights": False} | options)
    with seeded(1):
        model = disturb(graft.get_peft_model(make("mlp"), config))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("safe", [True, False])
def test_stages_join_to_one_adapter(tmp_path, safe):
    whole = stage(tmp_path / "whole", ["fc1", "lin0"])
    (_, loaded), parts = load_pair(str(whole)), []
    for name, targets in (("a", ["lin0"]), ("b", ["fc1"])):
        config = graft.PeftConfig.from_pretrained(whole)
        config.target_modules = set(targets)
        kept = {key: t for key, t in loaded.tensors.items() if targets[0] in key or "layers.2" in key}
        save_adapter(str(tmp_path / name), kept, config, True, loaded.fingerprint)
        parts.append(tmp_path / name)
    join_stages(parts, tmp_path / "joined", safe_serialization=safe)
    assert (tmp_path / "joined" / FILES[safe]).exists() and not (tmp_path / "joined" / FILES[not safe]).exists()
    models = [graft.PeftModel.from_pretrained(make("mlp"), folder).eval() for folder in (whole, tmp_path / "joined")]
    assert models[1].peft_config["default"].target_modules == {"fc1", "lin0"}
    assert_close(*(output(model, inputs("mlp")) for model in models), rtol=0, atol=0)


REFUSED = {
    "other values": (dict(targets=["lin0", "fc1"], init_lora_weights=True), r"lin0.* has other values in .*b"),
    "another rank": (dict(targets=["fc1"], r=3), r"b has r=3 in its config, a part before it 2"),
    "another flag": (dict(targets=["fc1"], use_rslora=True), r"use_rslora=True"),
    "a regular expression": (dict(targets=r".*\.fc1"), r"target_modules="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_of_other_saves_are_refused(tmp_path, name):
    options, text = REFUSED[name]
    stage(tmp_path / "a", ["lin0"]), stage(tmp_path / "b", **options)
    refuses(CheckpointError, text, join_stages, [tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_parts_of_other_methods_are_refused(tmp_path):
    stage(tmp_path / "a", ["lin0"])
    graft.get_peft_model(make("mlp"), graft.VeraConfig(r=2, target_modules=["fc2"])).save_pretrained(tmp_path / "b")
    with pytest.raises(CheckpointError, match="b holds a VeraConfig, a part before it a LoraConfig"):
        join_stages([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")


def cartridge(folder, base="llama", **options):
    config = graft.CartridgeConfig(**{"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"} | options)
    with seeded(sum(map(ord, folder.name))):
        model = graft.get_peft_model(make(base), config)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("safe", [True, False])
def test_cartridges_stand_in_a_row(tmp_path, safe):
    folders = [cartridge(tmp_path / "a"), cartridge(tmp_path / "b", num_virtual_tokens=2), cartridge(tmp_path / "c")]
    compose_cartridge_adapters(folders, output_path=tmp_path / "all", safe_serialization=safe)
    assert (tmp_path / "all" / FILES[safe]).exists()
    model = graft.PeftModel.from_pretrained(make("llama"), tmp_path / "all").eval()
    config = model.peft_config["default"]
    assert config.num_virtual_tokens == 8 and config.inference_mode
    parts = [load_file(folder / FILES[True])[STORED] for folder in folders]
    assert_close(graft.get_peft_model_state_dict(model)[STORED], torch.cat(parts))


def test_cartridges_of_other_sizes_are_refused(tmp_path):
    first, lora = cartridge(tmp_path / "a"), stage(tmp_path / "lora", ["lin0"])
    other = cartridge(tmp_path / "b", base="gpt2")
    tensors = load_file(first / FILES[True])
    more, wrong = tmp_path / "more", tmp_path / "wrong"
    config = graft.PeftConfig.from_pretrained(first)
    save_adapter(str(more), tensors | {"x": torch.ones(2)}, config, True, {})
    save_adapter(str(wrong), {STORED: torch.ones(3, 2)}, config, True, {})
    nothing = tmp_path / "nothing"
    save_adapter(str(nothing), {"x": torch.ones(2)}, config, True, {})
    for paths, error, text in (
        (str(first), ConfigError, "must be a list of paths"),
        ([first], ConfigError, "at least 2 adapters to compose, got 1"),
        ([first, lora], ConfigError, r"is not a CARTRIDGE adapter \(got LORA\)"),
        ([first, other], ConfigError, "for attribute 'num_attention_heads'|for attribute 'token_dim'"),
        ([first, more], ConfigError, r"holds more than a prompt \(x\)"),
        ([first, wrong], CheckpointError, r"has shape \(3, 2\), but its config says"),
        ([first, nothing], CheckpointError, "does not hold"),
    ):
        refuses(error, text, compose_cartridge_adapters, paths, output_path=tmp_path / "all")
    with pytest.raises(ValueError, match="should be a directory"):
        compose_cartridge_adapters([first, first], output_path=first / FILES[True])
    assert not (tmp_path / "all").exists()


def test_cartridges_of_another_base_warn(tmp_path):
    folders = []
    for name in ("a", "b"):
        folders.append(cartridge(tmp_path / name))
        config = graft.PeftConfig.from_pretrained(folders[-1])
        config.base_model_name_or_path = f"base {name}"
        save_adapter(str(folders[-1]), load_file(folders[-1] / FILES[True]), config, True, {})
    with pytest.warns(PeftWarning, match="was made for the base model 'base a', the one in .* for 'base b'"):
        compose_cartridge_adapters(folders, output_path=tmp_path / "all")
