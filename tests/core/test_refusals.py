# SPDX-License-Identifier: Apache-2.0
"""What a layer refuses with the reason, where it would otherwise do nothing, or fail in the middle."""

import numpy as np
import pytest
import torch
from torch import nn

import graft
from graft.core.effect import Rewrite
from graft.core.rows import Rows
from graft.inject.inject import Injection
from graft.inject.parts import get_registry
from graft.methods.hra import HRA, HRAConfig
from tests.raised import refuses


def base(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=bias), nn.Linear(4, 4)).eval()


def lora(**options):
    return graft.LoraConfig(**{"r": 2, "target_modules": ["0"], **options})


@pytest.mark.differs("setting `layer._active_adapter` or `layer._disable_adapters`")
@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [("_active_adapter", ["default"], "set_adapter"), ("_disable_adapters", True, "enable_adapters")],
)
def test_state_that_peft_keeps_in_private_attributes(name, value, remedy):
    layer = graft.get_peft_model(base(), lora()).base_model.model[0]
    before = getattr(layer, name)
    refuses(AttributeError, remedy, setattr, layer, name, value)
    assert getattr(layer, name) == before


@pytest.mark.parametrize("names", [None, ["default", "__base__"]])
@pytest.mark.parametrize("kwargs", [{}, {"x": 1}])
def test_a_call_without_the_input_raises_as_the_plain_layer(names, kwargs):
    model = graft.get_peft_model(base(), lora())
    call, layer = get_registry(model).call, model.base_model.model[0]
    rows = None if names is None else Rows.from_names(names, torch.device("cpu"))
    with call.use_context(call.context._replace(rows=rows)):
        refuses(TypeError, "missing 1 required positional argument: 'input'", layer, **kwargs)


def test_a_string_of_targets_that_matches_nothing_says_what_a_string_is():
    with pytest.raises(graft.NoMatchingPeftModuleError, match=r"regular expression.*whole path.*list"):
        graft.get_peft_model(nn.Sequential(base()), lora(target_modules="1"))


def test_a_name_that_is_there_is_no_suggestion():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"c_attn": nn.Linear(2, 2)}) for _ in range(2)])})
    with pytest.raises(graft.NoMatchingPeftModuleError, match="layers_to_transform") as raised:
        graft.get_peft_model(model, lora(target_modules=["c_attn"], layers_to_transform=[9]))
    assert "did you mean" not in str(raised.value)


def test_the_report_of_a_load_is_short(tmp_path):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    config = lora(target_modules=[str(i) for i in range(20)])
    made = graft.get_peft_model(model, config).eval()
    made.save_pretrained(tmp_path)
    report = made.load_adapter(tmp_path, "second")
    assert repr(report) == "LoadReport(loaded=40)"
    report.missing_keys = [f"key{i}" for i in range(20)]
    assert "16 more" in repr(report) and len(repr(report)) < 200


class Shifting(HRA):
    def describe(self):
        return Rewrite(lambda W, b: (W, torch.ones(len(W))))


class OfNumpy(HRA):
    def build(self, shared):
        return {**super().build(shared), "hra_table": np.ones(3)}


def injected(method, bias=True):
    model = base(bias)
    Injection(model, HRAConfig(r=2, target_modules=["0"]), method, "a").run()
    return model


def test_a_fold_that_returns_a_bias_where_there_is_none():
    layer = injected(Shifting, bias=False)[0]
    before = layer.get_base_weight().clone()
    refuses(NotImplementedError, r"\['a'\] into layer '0'.*bias", layer.merge, adapter_names=["a"])
    assert not layer.merged and torch.equal(layer.get_base_weight(), before)


def test_values_that_are_no_tensors():
    refuses(TypeError, r"'hra_table' of adapter 'a' on layer '0'.*torch\.from_numpy", injected, OfNumpy)


STARTS = {
    "PiSSA": lambda: lora(init_lora_weights="pissa", target_modules=["1"]),
    "TinyLoRA": lambda: graft.TinyLoraConfig(r=2, target_modules=["1"]),
    "OSF": lambda: graft.OSFConfig(target_modules=["1"]),
}


@pytest.mark.parametrize("config", STARTS.values(), ids=STARTS)
def test_a_base_that_cannot_be_decomposed(config):
    model = base()
    model[1].weight.data[0, 0] = torch.nan
    refuses(torch.linalg.LinAlgError, r"'default'.*layer '1'.*NaN", graft.get_peft_model, model, config())
    assert type(model[1]) is nn.Linear
