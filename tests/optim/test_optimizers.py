# SPDX-License-Identifier: Apache-2.0
"""Optimizers for LoRA: the same steps as PEFT's, and the formulas."""

import sys
from types import ModuleType

import peft.optimizers
import pytest
import torch

import graft
from graft import optim as optimizers
from tests import models
from tests.pair import adapt, both, close_dicts, gradients, randomize
from tests.samples import each, first

SAMPLES = [*each("plain", "mlp conv1D llama"), first("LORA", "mlp", "head"), *each("bias_all rslora", "mlp")]
SAMPLES = [s for s in SAMPLES if s.method == "LORA"]


def trained(sample, make, steps=3):
    """Both libraries' models after some steps with the same gradients."""
    states = []
    for model, lib in zip(both(sample), (optimizers, peft.optimizers)):
        randomize(model, sample).eval()
        optimizer = make(lib, model)
        for _ in range(steps):
            gradients(model, sample)
            optimizer.step()
        states.append({n: p.detach() for n, p in model.named_parameters()})
    return states


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("name", ["loraplus", "lorafa", "riemannian"])
def test_steps_are_pefts(sample, name, monkeypatch):
    """PEFT's LoRA-FA computes in bfloat16 wherever it can."""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)

    def make(lib, model):
        create = getattr(lib, f"create_{name}_optimizer")
        if name == "lorafa":
            config = model.peft_config["default"]
            return create(model, config.r, config.lora_alpha, lr=0.01, weight_decay=0.1)
        if name == "loraplus":
            return create(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1, eps=1e-4)
        return create(model, torch.optim.SGD, lr=0.01, reg=0.1)

    close_dicts(*trained(sample, make), 1e-4)


@pytest.mark.parametrize("sample", [first("LORA", "embedding"), first("LORA", "mlp", "bias_all")], ids=str)
def test_groups_of_loraplus(sample):
    """Sizes, rates and decay of each."""
    seen = []
    for model, lib in zip(both(sample), (optimizers, peft.optimizers)):
        made = lib.create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=0.01,
            loraplus_lr_ratio=4.0,
            loraplus_lr_embedding=0.5,
            loraplus_weight_decay=0.1,
        )
        seen.append([(sorted(p.shape for p in g["params"]), g["lr"], g["weight_decay"]) for g in made.param_groups])
    assert seen[0] == seen[1]


class Manager:
    """In the place of the one of bitsandbytes, which is not installed."""

    def __init__(self):
        self.seen = []

    def register_module_override(self, module, name, options):
        self.seen.append((module, name, options))


@pytest.fixture
def manager(monkeypatch):
    made, bnb, optim = Manager(), ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optim.GlobalOptimManager = type("GlobalOptimManager", (), {"get_instance": staticmethod(lambda: made)})
    bnb.optim = optim
    monkeypatch.setitem(sys.modules, "bitsandbytes", bnb)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    return made


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit", "Adam", "AdamW32bit"])
def test_loraplus_keeps_embeddings_in_32_bits(name, manager):
    """Of optimizers that hold their state in 8."""
    kind = type(name, (torch.optim.Adam,), {})
    seen = []
    for model, lib in zip(both(first("LORA", "embedding")), (optimizers, peft.optimizers)):
        made = lib.create_loraplus_optimizer(model, kind, lr=0.01, loraplus_lr_ratio=4.0)
        assert type(made) is kind
        embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        assert [m for m, _, _ in manager.seen] == (embeddings if "8bit" in name else [])
        seen.append([options for _, *options in manager.seen])
        manager.seen.clear()
    assert seen[0] == seen[1]
    assert seen[0] == ([["weight", {"optim_bits": 32}]] * 2 if "8bit" in name else [])


def test_lorafa_freezes_a():
    model = adapt(graft, first("LORA"))
    made = optimizers.create_lorafa_optimizer(model, lr=0.1)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    assert {id(p) for g in made.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    with pytest.raises(graft.ConfigError, match="betas"):
        optimizers.LoraFAOptimizer([torch.nn.Parameter(torch.ones(1))], betas=(1.0, 0.9))


def test_riemannian_refusals():
    with pytest.raises(ValueError, match="did not find any trainable"):
        optimizers.create_riemannian_optimizer(models.make("mlp"), torch.optim.SGD, lr=0.1)
    made = optimizers.create_riemannian_optimizer(adapt(graft, first("LORA")), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="closures"):
        made.step(lambda: 0.0)


PARTS = [dict(use_bdlora=dict(target_modules_bd_a=["0"])), dict(use_qalora=True, qalora_group_size=2)]


@pytest.mark.parametrize("option", PARTS, ids=str)
def test_factors_that_are_kept_in_part_are_refused(option):
    config = graft.LoraConfig(r=2, target_modules=["0"], **option)
    model = graft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 6)), config)
    for make in (
        lambda: optimizers.create_lorafa_optimizer(model),
        lambda: optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1),
    ):
        with pytest.raises(graft.ConfigError, match=f"needs A and B as matrices, .*{next(iter(option))} keeps a part"):
            make()
