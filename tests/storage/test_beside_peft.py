# SPDX-License-Identifier: Apache-2.0
"""What PEFT computes right on packed layers of transformers is what graft computes, with its files."""

import peft
import pytest
import torch
from torch.testing import assert_close
from transformers.integrations import finegrained_fp8

import graft
from tests.models import disturb
from tests.storage.cells import IN, Net, linear
from tests.storage.test_float8 import fp8, fp8_linear
from tests.storage.test_integers import gemma

KINDS = {"fp8": fp8(), "gemma": gemma(8)}
CONFIGS = {"LORA": dict(r=4), "VERA": dict(r=4), "MISS": dict(r=4), "RANDLORA": dict(r=4), "FOURIERFT": {}}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, method, tmp_path, monkeypatch):
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_linear)
    config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](**CONFIGS[method], target_modules=["layer"])
    ours = disturb(graft.get_peft_model(Net(KINDS[kind](linear())), config).eval())
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(KINDS[kind](linear())), tmp_path).eval()
    found = []
    for model in (ours, theirs):
        x = torch.linspace(-1, 1, 3 * IN).view(3, IN).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append((y, x.grad))
    assert_close(*found, rtol=1e-4, atol=1e-4)
