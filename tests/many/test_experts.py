# SPDX-License-Identifier: Apache-2.0
"""Runs with adapters on stacks of experts: each in the bits that it has alone, in any company."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.kernels import experts as kernel
from graft.many import MultiTrain
from tests.leaves_out import FUSED_EXPERTS
from tests.many.alone import same
from tests.models import seeded
from tests.storage.packed_experts import BOTH, gpt_oss, made, mixtral

pytestmark = FUSED_EXPERTS
STEPS = 8


def on_experts(**options: Any) -> Any:
    return graft.LoraConfig(**{"target_modules": [], "target_parameters": BOTH, **options})


CONFIGS = {  # with the rows and the rate of each
    "few": (on_experts(r=4), 1, 1e-2),  # tokens: some experts get one or none
    "many": (on_experts(r=8, lora_alpha=20, target_modules=["q_proj"]), 4, 3e-3),
    "downs": (on_experts(r=2, target_parameters=BOTH[1:]), 2, 1e-2),
}


def batches(name: str) -> list[dict[str, Tensor]]:
    with seeded(sum(map(ord, name))):
        ids = torch.randint(3, 31, (STEPS, CONFIGS[name][1], 8))
    return [{"input_ids": i, "labels": i} for i in ids]


def trained(make: Any, *names: str) -> dict[str, list[Tensor]]:
    runs = MultiTrain(made(make))
    for name in names:
        config, _, lr = CONFIGS[name]
        optimizer = partial(torch.optim.AdamW, lr=lr)
        runs.add(name, config, data=batches(name), optimizer=optimizer, steps=STEPS, seed=1)
    runs.run()
    return {name: runs[name].parameters for name in names}


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_together_is_alone(make):
    apart = {name: trained(make, name)[name] for name in CONFIGS}
    for order in (reversed(CONFIGS), ["few", "many"]):
        for name, found in trained(make, *order).items():
            assert same(found, apart[name]), name


def test_a_program_of_one_adapter_is_close():
    """It adds ΔW to the matrices, which rounds otherwise than products of factors."""
    apart = trained(mixtral, "many")["many"]
    config, _, lr = CONFIGS["many"]
    base = made(mixtral)
    with seeded(1):
        model = graft.get_peft_model(base, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    started, optimizer = [p.detach().clone() for p in parameters], torch.optim.AdamW(parameters, lr)
    for batch in batches("many"):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b, c in zip(apart, parameters, started):
        assert (a - b).norm() <= 1e-4 * (b - c).norm() > 0


@pytest.mark.parametrize("rows", range(1, 9))
def test_a_product_of_few_rows_is_that_of_many(rows):
    with seeded(rows):
        x, W = torch.randn(9, 64), torch.randn(64, 96)
    for matrix in (W, W.mT.contiguous().mT):  # as in the backward pass, and as in the forward pass
        for start in range(10 - rows):
            found = kernel.multiply_rows(x[start : start + rows], matrix, torch.empty(rows, 96))
            assert torch.equal(found, (x @ matrix)[start : start + rows])
