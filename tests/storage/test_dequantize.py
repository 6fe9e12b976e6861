# SPDX-License-Identifier: Apache-2.0
"""`merge_and_unload(dequantize=True)`: packed weights become plain ones that hold the adapters."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.looks import layers, merged
from tests.models import adapted, disturb, seeded
from tests.storage.cells import same, state
from tests.storage.test_cells import Calibrated, Eight


class Net(nn.Module):
    def __init__(self, kind=Calibrated):
        super().__init__()
        with seeded(0):
            self.layer, self.plain, self.left = kind(nn.Linear(20, 12)), nn.Linear(12, 6), kind(nn.Linear(6, 4))

    def forward(self, x):
        return self.left(self.plain(self.layer(x)).tanh())


def x():
    with seeded(2):
        return torch.randn(5, 20)


def lora(**options):
    return graft.LoraConfig(r=3, target_modules=["layer", "plain"], **options)


@pytest.mark.differs("`merge_and_unload(dequantize=True)`")
@pytest.mark.parametrize("kind", [Eight, Calibrated])
@pytest.mark.parametrize("safe", [True, False])
def test_adapted_layers_become_plain(kind, safe):
    model = adapted(Net(kind), lora())
    expected = model(x())
    plain = model.merge_and_unload(dequantize=True, safe_merge=safe)
    assert type(plain.layer) is type(plain.plain) is nn.Linear and type(plain.left) is kind
    assert_close(plain(x()), expected)
    assert {"layer.weight", "layer.bias"} <= plain.state_dict().keys()


def test_what_is_merged_already_comes_along_exactly():
    model = adapted(Net(Eight), dict.fromkeys(["default", "other"], lora()))
    model.base_model.set_adapter(["default", "other"])
    expected = model(x())
    model.base_model.set_adapter("other")
    model.merge_adapter(["other"])  # rounded
    model.base_model.set_adapter(["other"])
    with pytest.warns(UserWarning, match="merged"):
        plain = model.merge_and_unload(adapter_names=["default"], dequantize=True)
    assert_close(plain(x()), expected)


def test_a_model_can_be_trained_afterwards():
    plain = adapted(Net(Calibrated), lora()).merge_and_unload(dequantize=True)
    again = graft.get_peft_model(plain, lora())
    again(x()).sum().backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)
    again.merge_adapter()


@pytest.mark.parametrize("field", ["llm_int8_skip_modules", "modules_to_not_convert"])
@pytest.mark.parametrize("before", [None, ["left.part"]])
def test_the_quantization_config_names_what_is_plain_beside_packed_layers(field, before):
    """Else transformers would take it for packed in what `save_pretrained` writes. The caller's config stays."""
    net = Net(Eight)
    given = SimpleNamespace(**{field: before})
    net.config = SimpleNamespace(quantization_config=given)
    plain = adapted(net, lora()).merge_and_unload(dequantize=True)
    assert getattr(plain.config.quantization_config, field) == sorted([*(before or []), "layer", "plain"])
    assert getattr(given, field) is before


def test_a_config_without_room_for_plain_layers_is_told():
    net = Net(Calibrated)
    net.config = SimpleNamespace(quantization_config=SimpleNamespace())
    with pytest.warns(graft.PeftWarning, match=r"cannot load a saved copy\. Adapt all quantized layers"):
        adapted(net, lora()).merge_and_unload(dequantize=True)
    adapted(net, graft.LoraConfig(r=3, target_modules=["plain"])).merge_and_unload(dequantize=True)  # no news


@pytest.mark.parametrize("already", [False, True])
def test_a_failure_leaves_the_packed_weights(already):
    model = adapted(Net(Eight), dict.fromkeys(["default", "other"], lora()))
    if already:
        model.base_model.set_adapter("other")
        model.merge_adapter(["other"])
    with torch.no_grad():
        layers(model)["plain"].lora_B["default"].weight[0, 0] = torch.nan
    before, now = state(model), merged(model)
    with seeded(2):
        y = model(x())
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(adapter_names=["default"], dequantize=True, safe_merge=True)
    assert merged(model) == now and same(before, state(model))
    assert type(layers(model)["layer"].base_layer) is Eight
    assert torch.equal(model(x()).nan_to_num(), y.nan_to_num())
    model.unmerge_adapter() if already else None
    model.delete_adapter("default")


def test_what_has_no_merged_form_stays():
    model = adapted(Net(Calibrated), graft.LilyConfig(r=2, target_modules=["layer"]))
    expected = model(x())
    with pytest.raises(NotImplementedError, match=r"unload\(\)"):
        model.merge_and_unload(dequantize=True)
    assert type(layers(model)["layer"].base_layer) is Calibrated and torch.equal(model(x()), expected)


def test_the_way_out_is_in_the_message():
    with pytest.raises(NotImplementedError, match=r"or merge_and_unload\(dequantize=True\)"):
        adapted(Net(Calibrated), lora()).merge_adapter()


def test_on_a_dense_model_it_does_what_merging_does():
    model = graft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), graft.LoraConfig(r=2, target_modules=["0"]))
    disturb(model)
    expected = model(torch.ones(2, 4))
    assert_close(model.merge_and_unload(dequantize=True)(torch.ones(2, 4)), expected)
