# SPDX-License-Identifier: Apache-2.0
"""graft.load_adapter: files of other libraries straight onto models; merged weights change as those libraries say."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.files import load
from graft.files.bases import open_base
from tests.files.make_fixtures import LLAMA, net
from tests.trees import tree

FIXTURES = Path(__file__).parents[1] / "files" / "fixtures"


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.load_state_dict(load_file(FIXTURES / "base_llama" / "model.safetensors"))
    return model


def bert():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig.from_pretrained(FIXTURES / "base_bert"))
    model.load_state_dict(load_file(FIXTURES / "base_bert" / "model.safetensors"), strict=False)
    return model


FILES = {
    "lycoris_locon": net, "lycoris_tucker": net, "lycoris_dora": net, "lycoris_loha": net, "lycoris_lokr": net,
    "mlx_lora": llama, "mlx_dora": llama, "torchtune_lora": llama, "torchtune_dora": llama, "litgpt_lora": llama,
    "adapterhub_lora": bert, "adapterhub_ia3": bert,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_merging_changes_the_weights_as_the_other_library_does(name):
    model = FILES[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merged = graft.load_adapter(model, FIXTURES / name).merge_and_unload()
    wanted = load_file(FIXTURES / f"{name}.delta.safetensors")
    for key, value in merged.state_dict().items():
        path, _, leaf = key.rpartition(".")
        if leaf == "weight":
            change = wanted.get(path, torch.zeros_like(value))
            assert (value - before[key] - change).abs().max() < 4e-6 * max(1, change.abs().max()), key


def part(name):
    """One model of a pipeline, by its files."""
    shapes = open_base(FIXTURES / "base_pipeline" / name).shapes
    weights = {n.removesuffix(".weight"): shape for n, shape in shapes.items() if n.endswith(".weight")}
    made = iter([weights[n] for n in weights if len(weights[n]) > 1])

    def layer():
        out, fan_in, *kernel = next(made)
        return nn.Conv2d(fan_in, out, kernel) if kernel else nn.Linear(fan_in, out)

    return tree([n for n in weights if len(weights[n]) > 1], layer)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
@pytest.mark.parametrize("file", ["kohya_sd", "diffusers_new"])
def test_one_model_of_a_pipeline_gets_its_part(name, file):
    wanted = load_file(FIXTURES / f"{file}.delta.safetensors")
    wanted = {path.removeprefix(f"{name}."): d for path, d in wanted.items() if path.startswith(f"{name}.")}
    model = part(name)
    before = {path: model.get_submodule(path).weight.detach().clone() for path in wanted}
    merged = graft.load_adapter(model, FIXTURES / file).merge_and_unload()
    assert wanted
    for path, d in wanted.items():
        torch.testing.assert_close(merged.get_submodule(path).weight - before[path], d, rtol=0, atol=1e-5)


def test_parts_of_one_set_of_names_go_to_the_model_of_their_shapes(tmp_path):
    """SDXL's text encoders: the names of the first are among those of the second."""
    shapes = {"te1": (4, 6), "te2": (8, 10)}
    names = {f"lora_{te}_layers_0_fc1": shape for te, shape in shapes.items()} | {"lora_unet_block_fc": (3, 5)}
    tensors = {}
    for name, (out, fan_in) in names.items():
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, fan_in), f"{name}.lora_up.weight": torch.randn(out, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    for te, (out, fan_in) in shapes.items():
        made = graft.load_adapter(tree(["layers.0.fc1"], partial(nn.Linear, fan_in, out)), tmp_path / "a.safetensors")
        weight = made.merge_and_unload().layers.get_submodule("0.fc1").weight
        assert weight.shape == (out, fan_in), te
    with pytest.raises(graft.BaseModelMismatchError, match="has no modules for"):
        graft.load_adapter(tree(["else"]), tmp_path / "a.safetensors")


def test_beside_the_adapters_of_a_peft_model():
    model = graft.get_peft_model(llama(), graft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    model.eval().requires_grad_(False)
    assert graft.load_adapter(model, FIXTURES / "torchtune_dora", "tune") is model
    assert model.active_adapters == ["default"] and set(model.peft_config) == {"default", "tune"}
    ids = torch.arange(6)[None]
    model.set_adapter("tune")
    plain = graft.load_adapter(llama(), FIXTURES / "torchtune_dora").eval()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_a_model_that_was_never_saved_has_the_architecture_of_its_class():
    """GGUF asks for it: how llama.cpp orders rows depends on that."""
    model = llama()
    model.config.architectures = None
    for made in (model, graft.get_peft_model(model, graft.LoraConfig(target_modules=["q_proj"]))):
        assert load.describe_base_of(made).config["architectures"] == ["LlamaForCausalLM"]


def test_another_model_stays_as_it_was():
    model = net()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(graft.BaseModelMismatchError, match="has no modules for"):
        graft.load_adapter(model, FIXTURES / "mlx_lora")
    assert [name for name, _ in model.named_modules()] == before


def test_weights_of_the_model_are_not_copied_where_names_are_enough(monkeypatch):
    asked = []
    monkeypatch.setattr(load, "read_weight_bytes", lambda read, name: asked.append(name))
    graft.load_adapter(llama(), FIXTURES / "mlx_lora")
    assert asked == []


def test_weights_are_those_of_the_base_while_an_adapter_is_merged():
    config = graft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = graft.get_peft_model(llama(), config)
    name = "model.layers.0.self_attn.q_proj.weight"
    before = load.describe_base_of(model).tensors[name].read().copy()
    model.merge_adapter()
    now = load.describe_base_of(model).tensors[name].read()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    merged = layer.base_layer.weight.detach().numpy()
    assert abs(now - before).max() < 1e-6 < 1e-3 < abs(merged - before).max()
