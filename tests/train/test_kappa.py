# SPDX-License-Identifier: Apache-2.0
"""KappaTune: condition numbers, and which layers they choose; as PEFT, and by the formula."""

import peft
import peft.helpers
import pytest
import torch
from torch import nn

import graft
from tests import models
from tests.pair import outcome


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 4)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.other = nn.Parameter(torch.randn(3, 5, 4))


def experts():
    with models.seeded(0):
        return nn.ModuleDict({"a": Experts(), "b": Experts()})


def kappa(W):
    S = torch.linalg.svdvals(W.double())
    return float(S[0] / S[-1])


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_p": 1.0}, {"max_dim_size_to_analyze": 30}], ids=str)
@pytest.mark.parametrize("name", ["mlp", "llama", "bert-seq"])
def test_targets_are_pefts(name, options):
    ours, theirs = (
        lib.find_kappa_target_modules(models.make(name), show_progress=False, **options) for lib in (graft, peft)
    )
    assert ours == theirs and ours["target_modules"]


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_p": 1.0}, {"moe_param_suffixes": (".other",)}], ids=str)
def test_experts_are_pefts(options):
    ours, theirs = (lib.find_kappa_target_modules(experts(), show_progress=False, **options) for lib in (graft, peft))
    assert ours == theirs and ours["target_parameters"]


CHOICES = [
    {}, dict(top_p=0.3), dict(top_p=0.0), dict(num_modules=2, top_p=0.9), dict(num_modules=0), dict(threshold=8.0),
    dict(threshold=0.5), dict(top_p=0.3, threshold=0.5),
]  # fmt: skip
SELECTORS = (graft.KappaTuneSelector, peft.helpers.KappaTuneSelector)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_choices_are_pefts(choice):
    ours, theirs = (select(models.make("mlp"), show_progress=False) for select in SELECTORS)
    assert ours.get_best_targets(**choice) == theirs.get_best_targets(**choice)
    ours, theirs = (select(experts(), show_progress=False) for select in SELECTORS)
    assert ours.get_best_target_parameters(**choice) == theirs.get_best_target_parameters(**choice)


def test_the_best_conditioned_come_first():
    model = models.make("mlp")
    found = graft.KappaTuneSelector(model, show_progress=False).modules
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert found.keys() == weights.keys()
    for name, W in weights.items():
        assert found[name] == pytest.approx(kappa(W), rel=1e-3)


@pytest.mark.differs("`find_kappa_target_modules` on Conv1D")
@pytest.mark.differs("`find_kappa_target_modules` on a model with adapters")
def test_conv1d_layers_count_and_adapters_do_not():
    """A model may have adapters already, merged ones too: their layers count with the weight of the base."""
    model = models.make("conv1D")
    before = graft.KappaTuneSelector(model, show_progress=False).modules
    assert list(before) == ["c_fc", "c_proj", "head"]
    adapted = graft.get_peft_model(model, graft.LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False))
    adapted.merge_adapter()
    after = graft.KappaTuneSelector(model, show_progress=False).modules
    assert after == pytest.approx(before, rel=1e-3)


def test_half_precision_and_weights_that_are_not_there():
    half = graft.find_kappa_target_modules(models.make("mlp").half(), show_progress=False, top_p=1.0)
    assert len(half["target_modules"]) == 8
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 4))
    result = outcome(lambda: graft.find_kappa_target_modules(empty, show_progress=False))
    assert result.warned("leaves out 1 layers") and result.value == {"target_modules": [], "target_parameters": None}
