# SPDX-License-Identifier: Apache-2.0
"""Models with weights that accelerate brings to the device for each call of their module: as on the CPU."""

import pytest
import torch

import graft
from tests.device.dispatch import (
    FIRST,
    METHODS,
    check_llama,
    check_sample,
    dispatched,
    equal,
    file_of,
    inputs,
    llama,
    logits,
    moved_away,
    parts,
    places,
    seeded,
)
from tests.models import adapted

pytestmark = pytest.mark.filterwarnings("ignore:(aLoRA is currently only supported|.* trains without its)")


def offloaded(model):
    return dispatched(model, {"one": FIRST, "two": "cpu"})


def away(model):
    """All but the first block and the norm."""
    return dispatched(model, places(embedding="cpu", second="cpu", head="cpu"))


def around(model):
    """The head, whose input comes from another device than that to which its weight is brought."""
    return dispatched(model, places(head="cpu"))


CONFIGS = {
    "ADAPTION_PROMPT": lambda: graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    "SHADOW": lambda: graft.ShadowConfig(shadow_dropout=0.0, target_modules=["layers.1"], task_type="CAUSAL_LM"),
    "SHADOW of words": lambda: graft.ShadowConfig(
        shadow_dropout=0.0, share_embeddings=False, target_modules=["layers.1"], task_type="CAUSAL_LM"
    ),
    "heads": lambda: graft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "token rows": lambda: graft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 4, 7]),
    "HIRA": lambda: graft.HiraConfig(r=3, target_modules=["embed_tokens", "lm_head"]),
    "PREFIX_TUNING": lambda: graft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": lambda: graft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("sample", METHODS, ids=str)
def test_a_model_with_a_part_offloaded(sample, tmp_path):
    check_sample(sample, offloaded, tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("spread", [away, around])
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_embeddings_and_heads(name, spread, tmp_path):
    check_llama(CONFIGS[name], spread, tmp_path)


@pytest.mark.parametrize("spread", [away, around])
def test_rows_of_a_tied_embedding(spread, tmp_path):
    check_llama(CONFIGS["token rows"], spread, tmp_path, tied=True)


BIASED = {
    "LORA": lambda bias: graft.LoraConfig(r=3, target_modules=["layer"], bias=bias),
    "VERA": lambda bias: graft.VeraConfig(r=3, target_modules=["layer"], bias=bias),
    "OFT": lambda bias: graft.OFTConfig(oft_block_size=3, target_modules=["layer"], bias=bias),
    "DEFT": lambda bias: graft.DeftConfig(r=3, target_modules=["layer"], bias=bias),
    "GLORA": lambda bias: graft.GloraConfig(r=3, target_modules=["layer"], bias=bias),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["all", "{}_only"])
@pytest.mark.parametrize("method", BIASED)
def test_biases_from_a_file_are_those_of_the_next_call(method, kind, tmp_path):
    with seeded(1):
        model = graft.get_peft_model(parts(), BIASED[method](kind.format(method.lower())))
    moved_away(model)
    saved, x = file_of(model, tmp_path / "here"), inputs()
    there = graft.PeftModel.from_pretrained(offloaded(parts()), tmp_path / "here")
    for _ in range(2):
        equal(there(x), model(x))
    equal(file_of(there, tmp_path / "there"), saved)
    other = moved_away(moved_away(model))
    graft.set_peft_model_state_dict(there, graft.get_peft_model_state_dict(other))
    equal(there(x), other(x))


@torch.no_grad()
def test_all_biases_of_a_model_are_saved(tmp_path):
    config = graft.LoraConfig(r=3, target_modules=["one.layer"], bias="all")
    here = adapted(parts(), config, scale=0)
    with pytest.warns(graft.PeftWarning, match="1 of them are offloaded"):
        there = adapted(offloaded(parts()), config, scale=0)
    equal(file_of(there, tmp_path / "there"), file_of(here, tmp_path / "here"))


@torch.no_grad()
def test_an_adapter_that_was_offloaded_with_its_model_takes_other_values(tmp_path):
    config = graft.LoraConfig(r=3, target_modules=["layer"])
    here, there = (adapted(parts(), config, scale=0) for _ in range(2))
    dispatched(there, {"base_model.model.one": FIRST, "base_model.model.two": "cpu"})
    moved_away(here)
    graft.set_peft_model_state_dict(there, graft.get_peft_model_state_dict(here))
    x = inputs()
    for _ in range(2):
        equal(there(x), here(x))
    equal(file_of(there, tmp_path / "there"), file_of(here, tmp_path / "here"))


def test_a_tied_tensor_of_the_base_in_a_file_is_refused_while_it_is_offloaded(tmp_path):
    config = graft.LoraConfig(r=3, target_modules=["q_proj"])
    model = adapted(llama(tied=True), config, scale=0)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    there = away(llama(tied=True))
    before = logits(there).detach()
    with pytest.raises(graft.BaseModelMismatchError, match="tied to another module"):
        graft.PeftModel.from_pretrained(there, tmp_path)
    equal(logits(there), before.cpu())
