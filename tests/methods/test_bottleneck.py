# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks on whole models: places, files, rows, checkpointing. AdapterHub's numbers are in test_adapterhub.py."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.errors import ConfigError, NoMatchingPeftModuleError
from tests.leaves_out import EMBEDDINGS_APART
from tests.looks import layers
from tests.models import adapted, disturb, inputs, make, output, seeded

SMALL = dict(reduction_factor=3)
PRESETS = ["seq_bn", "double_seq_bn", "par_bn", "adapter_plus", "seq_bn_inv"]


def test_places_by_name_and_blocks_left_out():
    model = graft.get_peft_model(make("llama"), graft.BottleneckConfig(mlp_modules=["mlp"], **SMALL))
    assert sorted(layers(model)) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    config = graft.BottleneckConfig.preset("double_seq_bn", leave_out=[0], reduction_factor={"1": 2})
    model = graft.get_peft_model(make("llama"), config)
    assert sorted(layers(model)) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    with pytest.raises(NoMatchingPeftModuleError, match=r"mlp_modules=\['mpl'\] matched nothing.*down_proj"):
        graft.get_peft_model(make("llama"), graft.BottleneckConfig(mlp_modules=["mpl"]))


@pytest.mark.parametrize(
    "changes, error, text",
    [
        (dict(reduction_factor=0), ConfigError, "must be positive"),
        (dict(reduction_factor={"0": 2}), ConfigError, "no entry for block 1, and no 'default'"),
        (dict(non_linearity="glue"), ConfigError, "Unknown non_linearity 'glue'. Known: relu"),
        (dict(stochastic_depth=1.0), ConfigError, "below 1"),
        (dict(mh_adapter=True), ConfigError, "original_ln_before=False"),
        (dict(is_parallel=True, mh_adapter=True), ConfigError, "adapt the MLP only"),
        (dict(phm_layer=True, phm_dim=5), ConfigError, "phm_dim=5 must divide the width"),
        (dict(leave_out=[99]), ConfigError, "`leave_out` names block 99. Choose .* 0 to 1"),
        (dict(leave_out=[-1]), ConfigError, "`leave_out` names block -1"),
        (dict(leave_out=[2], mlp_modules=["mlp"]), ConfigError, "`leave_out` names block 2"),
        (dict(reduction_factor={"default": 2, "7": 3}), ConfigError, "`reduction_factor` names block '7'"),
        (dict(leave_out=[0, 1]), NoMatchingPeftModuleError, "leave no place"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_bad_configs_change_nothing(changes, error, text):
    base = make("llama")
    before = copy.deepcopy(base)
    with pytest.raises(error, match=text):
        graft.get_peft_model(base, graft.BottleneckConfig(**changes))
    assert [n for n, _ in base.named_modules()] == [n for n, _ in before.named_modules()]
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_without_blocks_is_told_what_it_has():
    with pytest.raises(NoMatchingPeftModuleError, match=r"no blocks with an attention and an MLP.*linear layers"):
        graft.get_peft_model(make("mlp"), graft.BottleneckConfig())


@torch.no_grad()
def test_beside_lora_on_the_same_layer():
    with seeded(1):
        model = graft.get_peft_model(
            make("llama"), graft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False), "low", mixed=True
        )
        model.add_adapter("bn", graft.BottleneckConfig.preset("double_seq_bn", **SMALL))
    disturb(model, 0.2).eval()
    model.base_model.set_adapter(["low", "bn"])
    layer = layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(2, 3, layer.in_features)
    y = layer.base_layer(x) + layer.scaling["low"] * layer.lora_B["low"](layer.lora_A["low"](x))
    assert_close(layer(x), y + layer.methods["bn"].u(y))


def test_bfloat16_keeps_the_dtype_of_the_model():
    model = adapted(make("llama").bfloat16(), graft.BottleneckConfig.preset("par_bn", **SMALL), scale=0.2)
    y = output(model, inputs("llama"))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "bottleneck_" in n)


@pytest.mark.parametrize("name", ["Bart", *(pytest.param(name, marks=EMBEDDINGS_APART) for name in ("Marian", "T5"))])
@torch.no_grad()
def test_an_invertible_adapter_is_the_encoders(name):
    """Also on a model with a head, before which no inverse acts: the decoder's states are not its own."""
    import transformers as t

    sizes = dict(vocab_size=17, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    sizes |= dict(decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    if name == "T5":
        sizes = dict(vocab_size=17, d_model=8, d_ff=12, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
    kind = getattr(t, {"Bart": "BartForConditionalGeneration", "Marian": "MarianMTModel"}.get(name, f"{name}Model"))
    model = kind(getattr(t, f"{name}Config")(**sizes)).eval()
    adapted = graft.get_peft_model(model, graft.BottleneckConfig.preset("seq_bn_inv", **SMALL)).eval()
    found = {
        path: layer for path, layer in layers(adapted).items() if "default" in getattr(layer, "bottleneck_inv", ())
    }
    (path,) = found
    assert path.endswith({"Bart": "encoder.layernorm_embedding"}.get(name, "encoder.embed_tokens"))
    seen = []
    found[path].register_forward_hook(lambda _m, _x, y: seen.append(y.shape))
    adapted(input_ids=torch.ones(2, 5, dtype=torch.long), decoder_input_ids=torch.ones(2, 3, dtype=torch.long))
    assert seen == [(2, 5, 8)]


@torch.no_grad()
def test_files_of_invertible_adapters_are_equal_under_every_name(tmp_path):
    """Those of before have the adapter's name in them, and load as well."""
    config, batch = graft.BottleneckConfig.preset("seq_bn_inv", **SMALL), inputs("llama")
    for name in ("default", "other"):
        model = adapted(make("llama"), {name: copy.deepcopy(config)}, scale=0.2)
        model.save_pretrained(tmp_path / name)
    first, second = tmp_path / "default", tmp_path / "other" / "other"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    want = output(model, batch)
    for name in ("default", "third"):
        assert torch.equal(output(graft.PeftModel.from_pretrained(make("llama"), second, name).eval(), batch), want)
    state = load_file(second / "adapter_model.safetensors")
    assert sum("bottleneck_inv.F.0.weight" in key for key in state) == 2
    old = {key.replace("bottleneck_inv.", "bottleneck_inv.other."): t for key, t in state.items()}
    save_file(old, second / "adapter_model.safetensors")
    for name in ("other", "third"):
        assert torch.equal(output(graft.PeftModel.from_pretrained(make("llama"), second, name).eval(), batch), want)


@pytest.mark.parametrize("old, new", [("pfeiffer", "seq_bn"), ("houlsby", "double_seq_bn")])
def test_presets_have_the_names_of_their_papers_too(old, new):
    assert graft.BottleneckConfig.preset(old) == graft.BottleneckConfig.preset(new)


def test_the_page_lists_the_presets():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in page] == []


@pytest.mark.parametrize(("how", "std", "bound"), [("bert", 0.02, None), ("houlsby", 0.01, 0.02)])
def test_initial_values_have_the_spread_of_their_source(how, std, bound):
    from graft.methods.bottleneck import init_projection

    with seeded(0):
        module = nn.Linear(300, 300)
        init_projection(module, how)
    W = module.weight.detach()
    if bound is None:
        assert abs(W.std().item() / std - 1) < 0.02
    else:  # a normal distribution cut at two deviations has 0.88 of its spread
        assert abs(W.std().item() / (0.88 * std) - 1) < 0.02 and W.abs().max() <= bound
    assert not module.bias.any()


def test_a_model_of_one_block_gets_one_bottleneck():
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    model = graft.get_peft_model(base, graft.BottleneckConfig.preset("seq_bn"))
    assert len(layers(model)) == 1
