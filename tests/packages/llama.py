# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama that a package has quantized: what must hold for it as a whole, whatever the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from graft.storage.find import find_store
from graft.storage.quantized import Quantized
from tests.looks import layers
from tests.models import adapted, seeded

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=120)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
with seeded(6):
    IDS = torch.randint(0, 120, (3, 9))
BESIDE = {  # methods of which PEFT, too, computes the right outputs on these bases
    "LORA": dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "OFT": dict(oft_block_size=8, target_modules=["q_proj", "down_proj"]),
    "VERA": dict(r=8, target_modules=["q_proj", "o_proj"]),
}


def saved(folder: Any) -> Any:
    with seeded(0):
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, initializer_range=0.2)).save_pretrained(folder)
    return folder


def plain(folder: Any) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def packed(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(find_store(m), Quantized)}


def dense_twin(model: nn.Module, folder: Any) -> Any:
    """A dense model with the weights that the packed ones stand for."""
    made = plain(folder)
    for name, m in packed(model).items():
        made.get_submodule(name).weight.data.copy_(find_store(m).read(m, "weight"))
    return made


class Straight(nn.Linear):
    """A packed layer's own values with the gradients of the dense weight."""

    def forward(self, x):
        y = super().forward(x)
        return y + (self.packed[0](x) - y).detach()


def straight_twin(model: nn.Module, folder: Any) -> Any:
    made = dense_twin(model, folder)
    for name, m in packed(model).items():
        layer = made.get_submodule(name)
        layer.__class__, layer.packed = Straight, [m]
    return made


def with_configs(model: nn.Module, *configs: Any) -> Any:
    return adapted(model, dict(zip("abcd", configs)), scale=0.3 if len(configs) == 1 else 0.1)


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def lora(**options: Any) -> Any:
    return graft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})


def model_tests(bases: dict[str, Callable[[Any], Any]], rounding: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """Return the tests. bases: make a model from a folder; rounding: the names of those that round inputs."""

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory):
        return saved(tmp_path_factory.mktemp("llama"))

    @pytest.fixture(params=bases)
    def kind(request):
        return request.param

    @pytest.fixture
    def base(kind, folder):
        return lambda: bases[kind](folder).eval()

    def close(kind, ours, theirs):
        tolerance = 0.1 if kind in rounding else 1e-3
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), ((ours - theirs).norm() / theirs.norm()).item()

    def test_all_linear_layers_train_as_over_the_dense_weights(base, folder):
        config = lora(target_modules="all-linear")
        model = with_configs(base(), config)
        assert len(layers(model)) == 14 and all(not layer.store.exact for layer in layers(model).values())
        twin = with_configs(straight_twin(base(), folder), config)
        graft.set_peft_model_state_dict(
            twin, graft.get_peft_model_state_dict(model, adapter_name="a"), "a"
        )  # rounded as the base is
        assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-3)
        ours, theirs = gradients(model), gradients(twin)
        assert ours.keys() == theirs.keys() and len(ours) == 28
        for name in ours:
            assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-2 * theirs[name].abs().max().item())

    @pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING"])
    def test_what_stands_beside_the_packed_layers_trains(base, folder, method):
        tokens = {} if method == "LN_TUNING" else dict(num_virtual_tokens=3)
        config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **tokens)
        ours = gradients(with_configs(base(), config))
        for name, theirs in gradients(with_configs(straight_twin(base(), folder), config)).items():
            assert_close(ours[name], theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())

    @pytest.mark.parametrize("fingerprint", ["sampled", "full"])
    def test_saving_and_loading(base, fingerprint, tmp_path):
        model = with_configs(base(), lora())
        model.save_pretrained(tmp_path, fingerprint=fingerprint)
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = graft.PeftModel.from_pretrained(base(), tmp_path / "a", **options).eval()
            assert torch.equal(logits(loaded), logits(model))

    def test_a_file_loads_over_the_dense_base(kind, base, folder, tmp_path):
        model = with_configs(base(), lora())
        model.save_pretrained(tmp_path)
        loaded = graft.PeftModel.from_pretrained(dense_twin(base(), folder), tmp_path / "a").eval()
        close(kind, logits(loaded), logits(model))
        loaded.save_pretrained(tmp_path / "dense")
        ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "a", tmp_path / "dense"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_mixed_batches(base):
        model = with_configs(base(), lora(), lora(use_dora=True))
        expected = []
        for row, name in enumerate(("a", "b")):
            model.set_adapter(name)
            expected.append(logits(model)[row])
        with model.disable_adapter():
            expected.append(logits(model)[2])
        assert_close(logits(model, adapter_names=["a", "b", "__base__"]), torch.stack(expected), rtol=1e-3, atol=1e-3)
        assert logits(model.train(), adapter_names=["a", "b", "__base__"]).requires_grad

    @pytest.mark.differs("quantized bases: unmerging")
    def test_unmerging_gives_the_base_back(base):
        model = with_configs(base(), lora(), lora(use_dora=True))
        model.base_model.set_adapter(["a", "b"])
        before = logits(model)
        with model.disable_adapter():
            plain = logits(model)
        model.merge_adapter()
        merged = logits(model)
        model.unmerge_adapter()
        assert torch.equal(logits(model), before) and not torch.equal(merged, before)
        for name in "ab":  # one by one: rounded once, all the same
            model.merge_adapter(adapter_names=[name])
        assert_close(logits(model), merged)
        model.add_adapter("c", lora(use_dora=True))
        model.unmerge_adapter()
        model.add_adapter("d", lora(use_dora=True))
        for layer in layers(model).values():
            magnitudes = [layer.lora_magnitude_vector[name].weight for name in "cd"]
            assert torch.equal(*magnitudes), "of the base, whatever was merged"
        assert torch.equal(logits(model), before)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        for name in "ba":
            model.merge_adapter(adapter_names=[name])
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)

    def test_ways_out_of_the_adapter(kind, base):
        model = with_configs(base(), lora())
        before = logits(model)
        with model.disable_adapter():
            plain = logits(model)
        dense = model.merge_and_unload(dequantize=True)
        assert type(dense.model.layers[0].mlp.down_proj) is nn.Linear
        close(kind, logits(dense), before)
        model = with_configs(base(), lora())
        kinds = {name: type(m) for name, m in base().named_modules()}
        model.merge_adapter()
        left = model.unload()
        assert {name: type(m) for name, m in left.named_modules()} == kinds
        assert not torch.equal(logits(left), plain)  # merged for good, as unloading says
        left = with_configs(base(), lora()).unload()
        assert torch.equal(logits(left), plain)

    @pytest.mark.parametrize("method", BESIDE)
    def test_outputs_are_those_of_peft(kind, base, method, tmp_path):
        import peft

        model = with_configs(base(), graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](**BESIDE[method]))
        model.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
        close(kind, logits(model), logits(theirs))

    own = [value for name, value in locals().items() if name.startswith("test_")]
    return folder, kind, base, *own
