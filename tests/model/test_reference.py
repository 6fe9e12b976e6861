# SPDX-License-Identifier: Apache-2.0
"""A frozen copy of an adapter: what it says stays, whatever the adapter learns, and nothing else sees it."""

import pytest
import torch
from torch.testing import assert_close

import graft
from graft.model.functional import set_requires_grad
from tests.leaves_out import FUSED_EXPERTS
from tests.models import make, seeded
from tests.raised import refuses

LISTED = ["q_proj", "up_proj"]
IDS = torch.arange(12).view(2, 6)


def policy(**options):
    with seeded(1):
        config = graft.LoraConfig(**dict(r=2, target_modules=LISTED, init_lora_weights=False) | options)
        return graft.get_peft_model(make("llama"), config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, dict(use_rslora=True, lora_alpha=7), dict(use_dora=True), dict(init_lora_weights="pissa"),
     dict(init_lora_weights="olora", use_dora=True), dict(modules_to_save=["lm_head"])],
    ids=["plain", "rslora", "dora", "pissa", "olora and dora", "whole head"],
)  # fmt: skip
def test_it_says_what_the_adapter_said(options):
    model = policy(**options)
    before = logits(model)
    reference = model.reference()
    assert model.active_adapters == ["default"] and reference.name == "default-reference"
    model.train()
    train(model)
    model.eval()
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert_close(reference(input_ids=IDS).logits, before)
    after = logits(model)
    assert_close(model(input_ids=IDS, adapter_names=["default", reference.name]).logits[1], before[1])
    reference.remove()
    assert [*model.peft_config] == ["default"]
    assert_close(logits(model), after)


@FUSED_EXPERTS
def test_of_experts():
    from tests.model.test_adapter_tensors import logits as of_experts
    from tests.model.test_adapter_tensors import with_experts

    model = with_experts("qwen3_moe")
    before, reference = of_experts(model), model.reference()
    for p in model.parameters():
        if p.requires_grad:
            p.data *= 2
    from tests.families import IDS as ids

    assert not torch.allclose(of_experts(model), before, atol=1e-2)
    assert_close(reference(ids).logits, before)


def test_it_never_trains_and_is_in_no_file(tmp_path):
    model = policy()
    reference = model.reference(name="old")
    own = {id(p) for n, p in model.named_parameters() if ".old." in n}
    assert own and not reference(input_ids=IDS).logits.requires_grad
    for change in (
        lambda: model.set_adapter("old"),
        lambda: model.set_requires_grad("old"),
        lambda: set_requires_grad(model, "old"),
        lambda: model.base_model.set_adapter(["default", "old"]),
        lambda: model.set_adapter("default"),
    ):
        change()
        assert not any(p.requires_grad for p in model.parameters() if id(p) in own)
    assert any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert not any("old" in key for key in graft.adapter_tensors(model).tensors)
    model.save_pretrained(tmp_path / "told", selected_adapters=["old"])
    assert (tmp_path / "told/old/adapter_config.json").exists()


def test_bad_calls():
    model = policy()
    refuses(graft.AdapterNotFoundError, "Adapter policy not found", model.reference, "policy")
    reference = model.reference()
    refuses(graft.AdapterNameError, None, model.reference)
    refuses(graft.ConfigError, "number of rows", reference)
    assert [*model.peft_config] == ["default", "default-reference"]


def test_in_half_precision():
    model = policy()
    half = graft.get_peft_model(make("llama").bfloat16(), graft.LoraConfig(r=2, target_modules=LISTED)).eval()
    with seeded(3):
        for p in half.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.1)
    before, reference = logits(half), half.reference()
    assert {p.dtype for n, p in half.named_parameters() if "lora" in n} == {torch.float32}
    assert torch.equal(reference(input_ids=IDS).logits, before)
    assert model is not half
