# SPDX-License-Identifier: Apache-2.0
"""AdapterFusion by its formula, and as AdapterHub's library computes it: files and outputs of its own."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import graft
from graft.core.errors import ConfigError, RoutingError
from graft.files.errors import BaseNeededError
from tests.looks import get_registry, layers
from tests.methods.test_adapterhub import base as hub_base
from tests.models import checkpoint, inputs, make, output, seeded
from tests.raised import refuses

HERE = Path(__file__).parent / "fixtures"
CASES = sorted(folder.name for folder in (HERE / "fusion").iterdir())


def fused(name="llama", preset="seq_bn", fill=True, dtype=torch.float32, upcast=(True, True), **options):
    """upcast: whether the bottlenecks are in float32 whatever the base, and whether the fusion is."""
    with seeded(3):
        config, of = graft.BottleneckConfig.preset(preset, reduction_factor=2), dict(autocast_adapter_dtype=upcast[0])
        model = graft.get_peft_model(make(name).to(dtype), config, "a", mixed=True, **of)
        model.add_adapter("b", graft.BottleneckConfig.preset(preset, reduction_factor=2), **of)
        config = graft.AdapterFusionConfig(adapters=["a", "b"], **options)
        model.add_adapter("both", config, autocast_adapter_dtype=upcast[1])
        for path, p in model.named_parameters() if fill else ():
            if "bottleneck_" in path or "fusion_" in path:
                p.data.add_(torch.randn_like(p) * 0.2)
    model.set_adapter("both")
    return model.eval()


@pytest.mark.parametrize("label", CASES)
@torch.no_grad()
def test_a_fusion_computes_what_it_computes_there(label):
    name, folder = label.partition("-")[0], HERE / "fusion" / label
    given = {k[3:]: v for k, v in load_file(HERE / "adapterhub" / name / "outputs.safetensors").items() if "in." in k}
    model = graft.load_adapter(hub_base(name), folder / "a", "a", mixed=True)
    graft.load_adapter(model, folder / "b", "b")
    graft.load_adapter(model, folder / "fused", "fused")
    outputs = load_file(folder / "outputs.safetensors")
    alone = model.eval()(**given).last_hidden_state
    model.set_adapter("fused")
    y = model.eval()(**given).last_hidden_state
    assert (y - alone).abs().max() > 1e-2
    assert_close(y, outputs["y"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("label", ["bert-pfeiffer", "llama-plus"])
def test_the_regularization_is_theirs(label):
    name, folder = label.partition("-")[0], HERE / "fusion" / label
    model = graft.load_adapter(hub_base(name), folder / "a", "a", mixed=True)
    graft.load_adapter(model, folder / "b", "b")
    graft.load_adapter(model, folder / "fused", "fused", is_trainable=True)
    model.set_adapter("fused")
    given = {k[3:]: v for k, v in load_file(HERE / "adapterhub" / name / "outputs.safetensors").items() if "in." in k}
    model.train()(**given)
    assert_close(get_registry(model).auxiliary_loss("fused"), load_file(folder / "outputs.safetensors")["loss"])


@torch.no_grad()
def test_the_formula():
    model, seen = fused(), {}
    layer = layers(model)["model.layers.0"]
    handles = [
        layer.base_layer.register_forward_hook(lambda _m, _a, y: seen.update(h=y if torch.is_tensor(y) else y[0])),
        layer.register_forward_hook(lambda _m, _a, y: seen.update(y=y if torch.is_tensor(y) else y[0])),
    ]
    output(model, inputs("llama"))
    for handle in handles:
        handle.remove()
    h, own = seen["h"], layer.methods
    u = [own[name].u(h) for name in ("a", "b")]
    q, k, v = (getattr(layer, f"fusion_{part}")["both"] for part in ("query", "key", "value"))
    scores = torch.stack([(q(h) * k(of)).sum(-1) for of in u])
    expected = h + sum(p[..., None] * v(of) for p, of in zip(scores.softmax(0), u))
    assert_close(seen["y"], expected)


@pytest.mark.parametrize("upcast", [(False, True), (True, False), (True, True)])
@torch.no_grad()
def test_a_fusion_in_another_dtype_than_its_bottlenecks_or_the_base(upcast):
    model = fused(dtype=torch.bfloat16, upcast=upcast)
    y, expected = output(model, inputs("llama")), output(copy.deepcopy(model).double(), inputs("llama"))
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 0.06 * expected.norm()


@torch.no_grad()
def test_a_token_of_several_rows():
    """As generation gives them, one after another."""
    model, ids = fused(), inputs("llama")["input_ids"][:, :1]
    assert len(ids) > 1
    assert_close(output(model, dict(input_ids=ids)), torch.cat([output(model, dict(input_ids=i[None])) for i in ids]))


def test_only_the_fusion_trains_and_its_loss_has_the_regularization():
    model = fused().train()
    given = dict(inputs("llama"))
    given["labels"] = given["input_ids"]
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {
        f"fusion_{part}" for part in ("query", "key", "value")
    }
    loss = model(**given).loss
    plain = model.eval()(**given).loss
    values = [layer.fusion_value["both"].weight for layer in layers(model).values()]
    assert_close(loss - plain, 0.01 * sum((W - torch.eye(len(W))).square().sum() for W in values))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for reentrant in (True, False):
        again = fused().train()
        checkpoint(again.get_base_model(), reentrant)
        again.get_base_model().enable_input_require_grads()  # transformers 5 does so itself
        assert_close(again(**given).loss, loss)
        again(**given).loss.backward()
        assert_close({name: p.grad for name, p in again.named_parameters() if p.grad is not None}, gradients)
    without = fused(regularization=False).train()
    assert_close(without(**given).loss, without.eval()(**given).loss)


@pytest.mark.parametrize(
    "name, preset", [("llama", "seq_bn"), ("bert", "seq_bn"), ("bert", "double_seq_bn"), ("llama", "par_bn")]
)
@torch.no_grad()
def test_files_rows_and_a_stack(name, preset, tmp_path):
    model, given = fused(name, preset), inputs(name)
    y = output(model, given)
    model.save_pretrained(tmp_path)
    loaded = graft.PeftMixedModel.from_pretrained(make(name), tmp_path / "a", "a")
    loaded.load_adapter(tmp_path / "b", "b")
    loaded.load_adapter(tmp_path / "both", "both")
    loaded.set_adapter("both")
    assert_close(output(loaded.eval(), given), y, rtol=0, atol=0)
    rows = ["both", "a", "__base__"]
    mixed = output(model, given | dict(adapter_names=rows))
    with model.disable_adapter():
        plain = output(model, given)
    model.set_adapter("a")
    a = output(model, given)
    assert_close(mixed, torch.stack([y[0], a[1], plain[2]]))
    model.set_adapter(["a", "both"])
    assert (output(model, given) - y).abs().max() > 1e-3


def test_bad_input(tmp_path):
    refuses(ConfigError, "each once, got adapters=", graft.AdapterFusionConfig, adapters=["a", "a"])
    with pytest.raises(ConfigError, match=r"needs bottlenecks. Name them"):
        graft.get_peft_model(make("llama"), graft.AdapterFusionConfig())
    with pytest.raises(ConfigError, match=r"needs adapters \['a'\], which the model does not have"):
        graft.get_peft_model(make("llama"), graft.AdapterFusionConfig(adapters=["a"]))
    model = fused()
    before = {name for name, _ in model.named_parameters() if ".both" in name}
    with pytest.raises(ConfigError, match=r"needs adapters \['c'\]"):
        model.add_adapter("other", graft.AdapterFusionConfig(adapters=["a", "c"]))
    model.add_adapter("lora", graft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="takes bottlenecks: adapter 'lora' is LoRA"):
        model.add_adapter("other", graft.AdapterFusionConfig(adapters=["a", "lora"]))
    model.add_adapter("inv", graft.BottleneckConfig.preset("seq_bn_inv"))
    with pytest.raises(ConfigError, match="adapter 'inv', invertible"):
        model.add_adapter("other", graft.AdapterFusionConfig(adapters=["inv"]))
    model.delete_adapter(["inv", "lora"])
    assert {name for name, _ in model.named_parameters() if "fusion_" in name} == before
    refuses(NotImplementedError, "changes activations", model.merge_and_unload)
    model.delete_adapter("b")
    with pytest.raises(RoutingError, match=r"needs adapters \['b'\] on layer 'model.layers.0', which are gone"):
        output(model, inputs("llama"))
    with pytest.raises(BaseNeededError, match=r"lacks \['a', 'b'\]"):
        graft.load_adapter(hub_base("llama"), HERE / "fusion" / "llama-plus" / "fused")
