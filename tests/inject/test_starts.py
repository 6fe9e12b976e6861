# SPDX-License-Identifier: Apache-2.0
"""Starts that read the base weights, on weights that are not finite."""

import pytest
import torch
from torch import nn

import graft

STARTS = {
    "olora": lambda: graft.LoraConfig(target_modules=["0", "1"], r=2, init_lora_weights="olora"),
    "pissa": lambda: graft.LoraConfig(target_modules=["0", "1"], r=2, init_lora_weights="pissa"),
    "dora": lambda: graft.LoraConfig(target_modules=["0", "1"], r=2, use_dora=True),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("start", STARTS)
def test_a_base_that_is_not_finite_is_refused_by_name(start, value):
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        base[1].weight[2, 3] = value
    before = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(torch.linalg.LinAlgError, match=r"'mine' cannot start from the weight of layer '1'.*NaN"):
        graft.get_peft_model(base, STARTS[start](), "mine")
    after = dict(base.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(p, before[name]) or name == "1.weight" for name, p in after.items())
    assert after["1.weight"].isfinite().sum() == 35


def test_a_start_that_reads_nothing_goes_on():
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        base[1].weight[2, 3] = float("nan")
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["0", "1"], r=2))
    assert all(p.isfinite().all() for name, p in model.named_parameters() if "lora_" in name)


def test_random_rows_may_stand_for_rows_that_are_not_finite():
    base = nn.Sequential(nn.Embedding(6, 4))
    with torch.no_grad():
        base[0].weight[2] = float("nan")
    config = graft.TrainableTokensConfig(target_modules=["0"], token_indices=[2], init_weights=False)
    assert graft.get_peft_model(base, config)(torch.tensor([2, 3])).isfinite().all()
