# SPDX-License-Identifier: Apache-2.0
"""DeLoRA: strength apart from directions, and the norms of the weight's columns."""

import pytest
import torch
from torch import nn

import graft
from tests import models
from tests.pair import close, output, randomize
from tests.samples import first

SAMPLE = first("DELORA")


def made(**options):
    config = graft.DeloraConfig(target_modules=["lin0"], r=3, delora_lambda=7, **options)
    return randomize(graft.get_peft_model(models.make("mlp"), config), SAMPLE).eval()


def test_the_strength_does_not_depend_on_lengths():
    model = made()
    layer = model.base_model.model.lin0
    y, delta = output(model, SAMPLE), layer.get_delta_weight("default")
    with torch.no_grad():
        layer.delora_A["default"].mul_(3)
        layer.delora_B["default"].mul_(0.2)
    close(output(model, SAMPLE), y)
    with torch.no_grad():
        layer.delora_lambda["default"].mul_(2)
    close(layer.get_delta_weight("default"), 2 * delta)


def test_norms_are_of_the_weight_without_adapters(tmp_path):
    model = made()
    layer = model.base_model.model.lin0
    norms = layer.base_layer.weight.norm(dim=0)
    close(layer.delora_w_norm["default"], norms)
    model.merge_adapter()
    model.add_adapter("b", model.peft_config["default"])
    close(layer.delora_w_norm["b"], norms)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        base = models.make("mlp")
        base.lin0.weight.add_(0.5)
    other = graft.PeftModel.from_pretrained(base, tmp_path)
    close(other.base_model.model.lin0.delora_w_norm["default"], norms)  # the adapter as it was trained


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_file_needs_no_weight(low_cpu_mem_usage, tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    close(output(loaded, SAMPLE), output(model, SAMPLE), 0)


def test_convolutions_count_the_kernel():
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    layer = graft.get_peft_model(base, graft.DeloraConfig(target_modules=["0"], r=2)).base_model.model[0]
    close(layer.delora_w_norm["default"], base[0].base_layer.weight.flatten(1).norm(dim=0))


def test_half_precision_starts_as_the_identity():
    """Where the adapter is in float16, too."""
    base = nn.Sequential(nn.Linear(10, 12)).half()
    x = torch.linspace(-1, 1, 30).view(3, 10).half()
    expected = base(x)
    config = graft.DeloraConfig(target_modules=["0"], r=2)
    model = graft.get_peft_model(base, config, autocast_adapter_dtype=False)
    assert model.base_model.model[0].delora_B["default"].dtype == torch.float16
    assert torch.equal(model(x), expected)
