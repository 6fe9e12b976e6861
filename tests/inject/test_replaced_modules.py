# SPDX-License-Identifier: Apache-2.0
"""Modules of an adapter that somebody replaces, prunes or parametrizes are the adapter's from then on."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import graft
from tests.models import adapted, seeded

X = torch.linspace(-1, 1, 420).view(70, 6)  # enough rows for every short cut


def net():
    with seeded(0):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def config(**options):
    return graft.LoraConfig(r=2, target_modules=["0", "2"], **options)


def net_with(*names, **options):
    return adapted(net(), dict.fromkeys(names, config(**options)), seed=0, scale=1)


class Other(nn.Linear):
    """What a pass over a model puts in place of linear layers."""


def swap(model, cls=Other):
    """Replace every linear layer of every adapter, as such a pass does."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(parent, nn.ModuleDict) and isinstance(child, nn.Linear):
                with seeded(5):
                    new = cls(child.in_features, child.out_features, bias=False)
                setattr(parent, name, new)


def keys(model, name="X"):
    state = graft.get_peft_model_state_dict(model, adapter_name=name)
    return state


def test_replaced_modules_are_saved(tmp_path):
    model = net_with("X")
    swap(model)
    y = model(X)
    layer = model.base_model.model[0]
    assert torch.equal(keys(model)["base_model.model.0.lora_A.weight"], layer.lora_A["X"].weight)
    model.save_pretrained(tmp_path)
    assert_close(graft.PeftModel.from_pretrained(net(), tmp_path / "X")(X), y)


def test_replaced_modules_are_loaded_into():
    model = net_with("X")
    state = {k: v.clone() for k, v in keys(model).items()}
    y = model(X)
    swap(model)
    assert not torch.allclose(model(X), y)
    graft.set_peft_model_state_dict(model, state, "X")
    assert_close(model(X), y)
    assert {type(m) for n, m in model.named_modules() if n.endswith("lora_A.X")} == {Other}


@pytest.mark.parametrize("before", [True, False])
def test_replaced_modules_train_and_freeze(before):
    model = net_with("X", "Y")
    if before:  # where the parameters stand has been looked up by then
        model.set_adapter("Y"), model.set_adapter("X")
    swap(model)
    model.set_adapter("Y")
    on = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(on) == 4 and all(".Y." in n for n in on)
    model.set_adapter("X", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.set_requires_grad("Y")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == on


def test_replaced_modules_merge():
    model = net_with("X")
    swap(model)
    y = model(X)
    model.merge_adapter()
    assert_close(model(X), y)


def test_a_replaced_module_decides_the_dtype():
    model = graft.get_peft_model(net(), config(use_dora=True), "X")
    model.set_adapter("X")
    layer = model.base_model.model[0]
    assert layer.methods["X"].dtype == torch.float32
    layer.lora_A["X"] = nn.Linear(6, 2, bias=False, dtype=torch.float64)
    assert layer.methods["X"].dtype == torch.float64


CHANGES = {
    "prune": lambda m: prune.random_unstructured(m, "weight", amount=0.5),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dora", [False, True])
def test_a_changed_module_computes_saves_and_trains(change, dora):
    model = net_with("X", "Y", use_dora=dora)
    model.set_adapter("Y"), model.set_adapter("X")
    part = model.base_model.model[0].lora_A["X"]
    before = {n: p for n, p in part.named_parameters()}
    with seeded(1):
        CHANGES[change](part)
    own = dict(part.named_parameters())
    assert own.keys() != before.keys()
    part(X)  # the old ways compute the weight in a hook
    plain = copy.deepcopy(part.weight.detach())
    y = model(X)
    y.pow(2).sum().backward()
    assert all(p.grad is not None for p in own.values())
    model.set_adapter("Y")
    assert not any(p.requires_grad for p in part.parameters())
    model.set_adapter("X")
    assert all(p.requires_grad for p in part.parameters())
    saved = keys(model)
    assert sum(".0.lora_A" in k for k in saved) == len(part.state_dict())
    model.base_model.model[0].lora_A["X"] = nn.Linear(6, 2, bias=False)
    model.base_model.model[0].lora_A["X"].weight.data = plain
    assert_close(model(X), y)


def test_a_replaced_parameter_is_the_one_that_counts():
    with seeded(0):
        base = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"]), "X")
    model.set_adapter("X")
    layer = model.base_model.model[0]
    layer.lora_embedding_A["X"] = nn.Parameter(torch.ones(2, 5))
    model.set_adapter("X", inference_mode=True)
    assert not layer.lora_embedding_A["X"].requires_grad
    assert keys(model)["base_model.model.0.lora_embedding_A"].eq(1).all()
