# SPDX-License-Identifier: Apache-2.0
"""An adapter on another base than its own is noticed, a prompt as well."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open

import graft
from graft.io.fingerprint import KEY
from tests import models
from tests.models import adapted
from tests.prompts import samples as prompts


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "base model" in str(w.message)]


def note(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as f:
        return json.loads(f.metadata()[KEY])


def prompt(model="llama"):
    return prompts.adapt(graft, prompts.on(prompts.first("PROMPT_TUNING"), model))


def base(model="llama", change=None):
    made = prompts.make(model)
    if change is not None:
        with torch.no_grad():
            made.get_parameter(change).add_(1.0)
    return made


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CARTRIDGE"])
def test_a_prompt_carries_the_fingerprint_of_its_base(method, tmp_path):
    model = prompts.adapt(graft, prompts.first(method))
    model.save_pretrained(tmp_path)
    assert note(tmp_path)["n"] == 14 and "layers.0.self_attn.q_proj" in note(tmp_path)["weights"]
    load = lambda **options: graft.PeftModel.from_pretrained(base(**options), tmp_path)
    assert said(load) == []
    (text,) = said(lambda: load(change="model.layers.0.self_attn.q_proj.weight"))
    assert "with other weights: expect other outputs" in text


def test_a_composed_cartridge_carries_the_fingerprint_of_its_parts(tmp_path):
    prompts.adapt(graft, prompts.first("CARTRIDGE")).save_pretrained(tmp_path / "one")
    graft.compose_cartridge_adapters([tmp_path / "one"] * 2, output_path=tmp_path / "two")
    assert note(tmp_path / "two") == note(tmp_path / "one")


def test_a_prompt_on_another_head_vocabulary_or_dtype_is_no_other_base(tmp_path):
    prompt().save_pretrained(tmp_path)
    larger, half = base(), base().bfloat16()
    larger.resize_token_embeddings(60)
    for model in (larger, half):
        assert said(lambda model=model: graft.PeftModel.from_pretrained(model, tmp_path)) == []
    config = graft.PeftConfig.from_pretrained(tmp_path)
    config.task_type = "FEATURE_EXTRACTION"
    assert said(lambda: graft.PeftModel.from_pretrained(base().model, tmp_path, config=config)) == []


def test_a_prompt_on_another_architecture(tmp_path):
    prompt().save_pretrained(tmp_path)
    other = prompts.make("gemma")  # as wide, with other heads
    expected = r"made for another base model: size mismatch for 'layers\.0"
    with pytest.raises(RuntimeError, match=expected) as error:  # PEFT's callers expect that
        graft.PeftModel.from_pretrained(other, tmp_path)
    assert type(error.value) is graft.BaseModelMismatchError


def lora(**options):
    return graft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})


def with_lora(**options):
    return adapted(models.make("llama"), lora(**options), scale=0)


UNSEEN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("how", ["sampled", "full"])
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_a_full_fingerprint_sees_what_a_sampled_one_cannot(kind, how, tmp_path):
    (with_lora() if kind == "lora" else prompt()).save_pretrained(tmp_path, fingerprint=how)
    changed = models.make("llama")
    changed.get_parameter(UNSEEN).data[1, 2] += 1e-3
    for same in (models.make("llama"), models.make("llama").bfloat16()):
        assert said(lambda same=same: graft.PeftModel.from_pretrained(same, tmp_path)) == []
    size = len(models.make("llama").state_dict())
    warned = said(lambda: graft.PeftModel.from_pretrained(changed, tmp_path))
    assert len(warned) == (how == "full")
    assert all(f"(1 of {size} tensors differ: [{UNSEEN}])" in text for text in warned)


@pytest.mark.parametrize("options", [dict(bias="all"), dict(init_lora_weights="pissa")], ids=["bias", "pissa"])
def test_a_full_fingerprint_leaves_out_what_the_adapter_changes(options, tmp_path):
    model = graft.get_peft_model(models.make("opt"), lora(**options))
    for p in model.parameters():
        p.data += p.requires_grad * 0.1
    model.save_pretrained(tmp_path, fingerprint="full")
    assert said(lambda: graft.PeftModel.from_pretrained(models.make("opt"), tmp_path)) == []
    model.base_model.merge_adapter()
    model.save_pretrained(tmp_path, fingerprint="full")
    assert note(tmp_path)["full"]
    assert said(lambda: graft.PeftModel.from_pretrained(models.make("opt"), tmp_path)) == []


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(fingerprint="all"), '"sampled" or "full"'),
        (dict(fingerprint="full", safe_serialization=False), "needs safe_serialization=True"),
    ],
    ids=["unknown", "torch"],
)
def test_other_fingerprints_are_refused(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        with_lora().save_pretrained(tmp_path, **options)
    assert not list(tmp_path.iterdir())
