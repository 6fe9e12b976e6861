# SPDX-License-Identifier: Apache-2.0
"""The state and the names that other packages read off layers, wrappers, tuners and statuses."""

from operator import attrgetter
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import graft
from graft.core.containers import BufferDict
from graft.core.errors import PeftWarning
from graft.core.layer import AdapterLayer
from graft.model.functional import check_if_peft_model, rescale_adapter_scale, set_adapter, set_requires_grad
from graft.model.tuner import tuner_of
from tests.looks import layers
from tests.models import make, seeded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lin(self.emb(x)).tanh())


def net():
    with seeded(0):
        return Net()


def lora(**options):
    return graft.LoraConfig(r=2, init_lora_weights=False, **options)


def test_wrappers_name_only_adapters_that_they_have():
    model = graft.get_peft_model(net(), lora(target_modules=["lin"]))
    model.add_adapter("b", lora(target_modules=["lin"], modules_to_save=["head"], trainable_token_indices={"emb": [1]}))
    inner = model.get_base_model()
    for names in (["default"], ["b"], ["default", "b"], ["default"]):
        model.base_model.set_adapter(names)
        assert inner.lin.active_adapters == names
        own = [name for name in names if name == "b"]
        assert inner.head.active_adapters == inner.emb.active_adapters == own
        assert inner.head.weight is (
            inner.head.modules_to_save["b"].weight if own else inner.head.original_module.weight
        )


def test_new_layers_say_which_adapters_are_active():
    model = graft.get_peft_model(net(), lora(target_modules=["lin"]))
    before = model(torch.arange(5))
    model.add_adapter("b", lora(target_modules=["emb", "lin"]))
    assert {tuple(layer.active_adapters) for layer in layers(model).values()} == {("default",)}
    assert torch.equal(model(torch.arange(5)), before)
    model.set_adapter("b")
    model.delete_adapter("default")
    assert {tuple(layer.active_adapters) for layer in layers(model).values()} == {("b",)}


def test_peft_names_of_the_adapters_on_a_carrier():
    config = lora(target_modules=["lin"], modules_to_save=["head"], trainable_token_indices={"emb": [1]})
    model = graft.get_peft_model(net(), config)
    inner = model.get_base_model()
    for carrier in (inner.lin, inner.head, inner.emb):
        assert carrier._adapters == carrier._get_available_adapters() == {"default"}
        assert carrier._all_available_adapter_names() == ["default"]


@pytest.mark.parametrize("lib", [graft, peft])
def test_the_names_of_a_carriers_containers_lead_to_its_adapters(lib):
    options = dict(r=2, target_modules=["lin"], modules_to_save=["head"], trainable_token_indices={"emb": [1]})
    inner = lib.get_peft_model(net(), lib.LoraConfig(**options)).base_model.model
    for carrier in (inner.lin, inner.head, inner.emb):
        held = [attrgetter(name)(carrier) for name in carrier.adapter_layer_names]
        assert all("default" in container for container in held if len(container))
    assert inner.emb.adapter_layer_names == ("token_adapter.trainable_tokens_delta",)
    assert inner.emb.token_adapter.token_indices["default"] == [1]


def test_token_rows_and_parameters_stand_in_the_status():
    model = graft.get_peft_model(net(), lora(target_parameters=["lin.weight"], trainable_token_indices={"emb": [1, 2]}))
    status = {s.name: s for s in model.get_layer_status()}
    assert status["model.lin"].module_type == "lora.ParamWrapper"
    rows = status["model.emb.token_adapter"]
    assert rows.module_type == "TrainableTokensLayer" and rows.requires_grad == {"default": True}
    assert model.get_model_status().num_adapter_layers == 2
    layer = model.get_base_model().lin
    assert isinstance(layer, AdapterLayer) and layer.parameter_name == "weight"
    assert repr(layer).startswith("lora.ParamWrapper") and "parameter_name='weight'" in repr(layer)
    model.base_model.model.emb.token_adapter.trainable_tokens_delta["default"].requires_grad_(False)
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_tied_token_rows_are_counted_once():
    model = graft.get_peft_model(
        make("gpt2"), lora(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[3])
    )
    names = [s.name for s in model.get_layer_status()]
    assert sum(name.endswith("token_adapter") for name in names) == 1


def test_tuners_say_whether_layers_share_tensors():
    shared = {name for name in ("LORA", "IA3", "VERA", "VBLORA", "PVERA") if tuner_of(name).uses_shared_state}
    assert shared == {"VERA", "VBLORA", "PVERA"}


def test_a_folder_without_a_method_is_no_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    assert not check_if_peft_model(tmp_path)


def test_a_method_named_by_its_string(tmp_path):
    config = lora(target_modules=["lin"])
    config.peft_type = "LORA"
    assert config.peft_type is graft.PeftType.LORA
    graft.get_peft_model(net(), config).save_pretrained(tmp_path)


def test_a_config_keeps_its_own_method():
    with pytest.warns(PeftWarning, match="peft_type"):
        config = graft.LoraConfig(peft_type="IA3")
    assert config.peft_type == "LORA"


def test_a_config_from_its_type_alone():
    assert type(graft.PeftConfig.from_peft_type(peft_type="OFT")) is graft.OFTConfig


def test_what_describes_a_machine_is_not_read(tmp_path):
    config = lora(target_modules=["lin"])
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"runtime_config": {"ephemeral_gpu_offload": true},', 1))
    assert "runtime_config" not in graft.LoraConfig.from_json_file(path)
    with pytest.warns(UserWarning, match="runtime_config"):
        assert graft.PeftConfig.from_pretrained(tmp_path).target_modules == {"lin"}


def test_paths_in_configs():
    config = graft.CordaConfig(cache_file=Path("a") / "b", covariance_file=Path("c"))
    assert (config.cache_file, config.covariance_file) == ("a/b", "c")
    assert graft.LoraConfig(base_model_name_or_path=Path("x")).base_model_name_or_path == "x"


def test_settings_that_nobody_looks_at_may_be_none():
    for use_asa in (False, True):
        config = graft.AdamssConfig(use_asa=use_asa, asa_target_subspaces=None, init_warmup=None, mask_interval=None)
        assert (config.asa_target_subspaces, config.init_warmup) == (50, graft.AdamssConfig().init_warmup)


def test_buffers_are_updated_like_a_dict():
    a, b = torch.ones(2), torch.zeros(3)
    buffers = BufferDict({"a": a})
    buffers.update(BufferDict({"b": b}))
    buffers.update({"c": a})
    buffers.update([("a", b)])
    assert list(buffers) == ["a", "b", "c"] and buffers["a"] is b


class Config:
    """A base model's config that says its type only as a dict."""

    def to_dict(self):
        return {"model_type": "llama"}


@pytest.mark.parametrize("config", [{"model_type": "llama"}, Config()], ids=["dict", "to_dict"])
def test_default_targets_of_a_config_that_is_a_dict(config):
    base = net()
    base.q_proj, base.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)
    base.config = config
    assert list(layers(graft.get_peft_model(base, lora()))) == ["q_proj", "v_proj"]


def test_token_rows_that_nothing_is_tied_to():
    with pytest.warns(UserWarning, match="does not have tied weights"):
        graft.get_peft_model(
            make("llama"), lora(target_modules=["q_proj"], trainable_token_indices=[1], ensure_weight_tying=True)
        )


def test_a_scaling_read_before_is_not_changed_by_rescaling():
    model = graft.get_peft_model(net(), lora(target_modules=["lin"]))
    layer, x = model.get_base_model().lin, torch.randn(3, 6)
    base, full = layer.base_layer(x), layer(x)
    before = layer.scaling
    with rescale_adapter_scale(model, 0.5):
        assert layer.scaling["default"] == before["default"] / 2
        torch.testing.assert_close(layer(x) - base, (full - base) / 2)
    assert layer.scaling == before and torch.equal(layer(x), full)
    model.add_adapter("gone", lora(target_modules=["lin"]))
    with rescale_adapter_scale(model, 0.5):
        model.delete_adapter("gone")
    assert layer.scaling == before


def test_no_adapter_to_activate():
    for function in (set_adapter, set_requires_grad):
        with pytest.raises(graft.AdapterNotFoundError, match="The model has: none"):
            function(net(), [])
