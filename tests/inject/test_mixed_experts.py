# SPDX-License-Identifier: Apache-2.0
"""Batches whose rows use different adapters on stacks of experts, dense and packed, in inference and training."""

import pytest
import torch
from torch.testing import assert_close

import graft
from graft.core.errors import RoutingError
from graft.core.rows import Rows
from tests.families import base as family
from tests.inject.test_parameters import base
from tests.leaves_out import FUSED_EXPERTS
from tests.looks import layers
from tests.models import checkpoint, seeded
from tests.raised import refuses
from tests.storage.packed_experts import KINDS, both

pytestmark = FUSED_EXPERTS
IDS = torch.arange(70).view(5, 14) % 31
ROWS = ["both", "__base__", "first", "both", "down"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


MAKE = {
    "mixtral": lambda: base("mixtral"), "qwen": lambda: base("qwen"), "gpt_oss": lambda: base("gpt_oss"),
    "nemotron": lambda: family("nemotron_h", moe_intermediate_size=24),  # without gates
    "deepseek": lambda: family("deepseek_v3", n_group=2, q_lora_rank=None),
    **{kind: lambda kind=kind: both(kind)[0] for kind in KINDS},
}  # fmt: skip


def three_adapters(model):
    """Three adapters: of both stacks, of other ranks, of one stack."""
    stacked = [path for path in BOTH if any(n.endswith(path) for n, _ in model.named_parameters())]
    targets = stacked if len(stacked) == 2 else ["experts.up_proj", "experts.down_proj"]
    options = dict(lora_alpha=3, init_lora_weights=False)
    configs = {
        "first": dict(r=2, target_modules=["q_proj"], target_parameters=targets),
        "both": dict(r=3, target_modules=[], target_parameters=targets),
        "down": dict(r=1, target_modules=["o_proj"], target_parameters=targets[1:]),
    }
    for i, (name, config) in enumerate(configs.items()):
        with seeded(i):
            if name == "first":
                model = graft.get_peft_model(model, graft.LoraConfig(**config | options), name)
            else:
                model.add_adapter(name, graft.LoraConfig(**config | options))
    return model


def alone(model, row):
    """Run one row with its adapter, as the only one."""
    name = ROWS[row]
    if name == "__base__":
        with model.disable_adapter():
            return model(IDS[row : row + 1]).logits
    model.set_adapter(name)
    return model(IDS[row : row + 1]).logits


@pytest.mark.differs("mixed batches with adapters on stacks of experts")
@pytest.mark.parametrize("kind", MAKE)
def test_each_row_is_as_with_its_adapter_alone(kind):
    model = three_adapters(MAKE[kind]())
    with torch.no_grad():
        found, two = (model(IDS[:n], adapter_names=ROWS[:n]).logits for n in (len(ROWS), 2))
        expected = torch.cat([alone(model, row) for row in range(len(ROWS))])
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_close(two, expected[:2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[1], found[0], atol=1e-3)


def gradients(model, run):
    model.zero_grad()
    for n, p in model.named_parameters():
        p.requires_grad = "lora_" in n
    run()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "kind", ["mixtral", "gpt_oss", "nemotron", *(kind for kind in ("mxfp4", "fp8") if kind in KINDS)]
)
def test_gradients_are_those_of_each_row_alone(kind, checkpointing):
    model = three_adapters(MAKE[kind]())

    def one_by_one():
        for row in range(len(ROWS)):
            model.set_adapter("first")  # all train, whichever acts
            if ROWS[row] != "__base__":
                model.set_adapter(ROWS[row])
                for n, p in model.named_parameters():
                    p.requires_grad = "lora_" in n
                model(IDS[row : row + 1]).logits.sin().sum().backward()

    expected = gradients(model, one_by_one)
    model.train()
    if checkpointing:
        checkpoint(model)
    found = gradients(model, lambda: model(IDS, adapter_names=ROWS).logits.sin().sum().backward())
    assert found.keys() == expected.keys() and {n.split(".")[-2] for n in found} == {"first", "both", "down"}
    for n, grad in expected.items():
        assert_close(found[n], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_generate_and_all_rows_alike():
    model = three_adapters(MAKE["mixtral"]())
    options = dict(max_new_tokens=4, do_sample=False)
    found = model.generate(input_ids=IDS, adapter_names=ROWS, **options)
    for row, name in enumerate(ROWS):
        if name != "__base__":
            model.set_adapter(name)
            assert torch.equal(model.generate(input_ids=IDS[row : row + 1], **options)[0], found[row])
    model.set_adapter("first")
    assert torch.equal(model(IDS, adapter_names=["first"] * 5).logits, model(IDS).logits)


def test_what_graft_cannot_run_is_refused_and_nothing_is_left_behind():
    model = three_adapters(MAKE["mixtral"]())
    expected = model(IDS).logits
    inner = layers(model)["model.layers.0.mlp.experts.down_proj"].get_base_layer()
    inner.down_proj.requires_grad = True
    refuses(RoutingError, "need a frozen stack on this process", model, IDS, adapter_names=ROWS)
    inner.down_proj.requires_grad = False
    inner._is_expert_parallel = True
    refuses(RoutingError, "expert parallelism", model, IDS, adapter_names=ROWS)
    inner._is_expert_parallel = False
    assert "forward" not in inner.__dict__ and not any("graft" in key for key in inner.__dict__)
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(RoutingError, match="70 tokens in a mixed batch of 4 samples"):
        Rows.from_names(ROWS[:4]).groups_of_tokens(70, "x", IDS.device)
