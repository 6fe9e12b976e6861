# SPDX-License-Identifier: Apache-2.0
"""MTL-LoRA by its formula."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.models import seeded
from tests.raised import refuses


def made(**options):
    with seeded(0):
        config = graft.MtlLoraConfig(target_modules=["0"], r=3, lora_alpha=6, n_tasks=3, **options)
        model = graft.get_peft_model(nn.Sequential(nn.Linear(4, 5)), config)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_()
    return model.eval()


def held(model):
    layer = model.base_model.model[0]
    return layer.base_layer, *(getattr(layer, f"mtllora_{name}")["default"] for name in ("A", "B", "lambda", "w"))


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
@pytest.mark.parametrize("n", [1, 2])
def test_each_row_has_the_update_of_its_task(shape, n):
    model, x = (
        made(n_up_projection=n, weights_sharpness=0.5),
        torch.linspace(-1, 1, 24)[: torch.Size(shape).numel()].view(shape),
    )
    base, A, B, weights, w = held(model)
    y = model(x, task_ids=torch.tensor([2, 0, 2]))
    for row, task in enumerate([2, 0, 2]):
        up = sum(share * b for share, b in zip((w[task] / 0.5).softmax(0), B))
        delta = 2 * up @ torch.diag(weights[task]) @ A
        assert_close(y[row], base(x[row]) + x[row] @ delta.T)


def test_what_trains():
    assert {n.split(".")[-2] for n, p in made().named_parameters() if p.requires_grad} == {
        "mtllora_A", "mtllora_B", "mtllora_lambda",
    }  # fmt: skip
    assert held(made(n_up_projection=2))[-1].requires_grad


def test_bad_input():
    model, x = made(), torch.ones(3, 4)
    refuses(graft.RoutingError, "task_ids", model, x)
    with pytest.raises(graft.RoutingError, match=r"Only 3 tasks available\. Found task id = 3"):
        model(x, task_ids=torch.tensor([0, 3, 1]))
    refuses(graft.ConfigError, "n_up_projection", made, n_up_projection=0)


@pytest.mark.parametrize("n", [1, 2])
def test_for_a_task_it_is_lora(n, tmp_path):
    model, x = made(n_up_projection=n, weights_sharpness=0.5), torch.linspace(-1, 1, 12).view(3, 4)
    for task in range(3):
        graft.save_as_lora(tmp_path / str(task), model, rank=3, at={"task_ids": task})
        with seeded(0):
            base = nn.Sequential(nn.Linear(4, 5))
        lora = graft.PeftModel.from_pretrained(base, tmp_path / str(task)).eval()
        assert_close(lora(x), model(x, task_ids=torch.tensor([task] * 3)))
    with pytest.raises(graft.ConfigError, match="Only 3 tasks available: task_ids=3"):
        graft.convert_to_lora(model, rank=3, at={"task_ids": 3})
    refuses(TypeError, "follows `task_ids` of a call", graft.convert_to_lora, model, rank=3)
