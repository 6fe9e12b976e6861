# SPDX-License-Identifier: Apache-2.0
"""LoRA of diffusers' image and video models, tiny: its own `load_lora_weights` says what a file does to each weight."""

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

import graft
from graft.files.base import read_base_files
from graft.files.convert import convert_adapter_file
from graft.files.formats import read
from graft.files.serving import check_servers

diffusers = pytest.importorskip("diffusers")

ATTENTION = ["to_q", "to_out.0", "add_q_proj", "ff.net.0.proj"]
HEADS = dict(num_attention_heads=2, attention_head_dim=8)
FAMILIES = {  # pipeline, its transformer, how that is made small, targets
    "flux": ("FluxPipeline", "FluxTransformer2DModel", dict(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2), **HEADS), [*ATTENTION, "proj_mlp", "proj_out", "norm1.linear"]),
    "flux2": ("Flux2Pipeline", "Flux2Transformer2DModel", dict(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=[4, 4, 4, 4]), [*ATTENTION, "to_qkv_mlp_proj", "linear_in"]),
    "sd3": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", dict(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=16, out_channels=4, **HEADS), ATTENTION),
    "wan": ("WanPipeline", "WanTransformer3DModel", dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32), ["to_q", "to_out.0", "ffn.net.2"]),
    "qwen-image": ("QwenImagePipeline", "QwenImageTransformer2DModel", dict(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4)), [*ATTENTION, "txt_mlp.net.2", "img_mod.1"]),
    "z-image": ("ZImagePipeline", "ZImageTransformer2DModel", dict(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]), [*ATTENTION, "w1"]),
    "hunyuan-video": ("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4)),
        [*ATTENTION, "proj_mlp"]),
    "ltx-video": ("LTXPipeline", "LTXVideoTransformer3DModel", dict(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=32), ATTENTION),
    "sana": ("SanaPipeline", "SanaTransformer2DModel", dict(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32), [*ATTENTION, "conv_inverted"]),
    "hidream": ("HiDreamImagePipeline", "HiDreamImageTransformer2DModel", dict(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1)),
        ["to_q", "to_out", "to_q_t", "w1"]),
}  # fmt: skip
FIRST = {  # names of the model's first release, as kohya's scripts and musubi-tuner write them → (out, in)
    "flux": {"double_blocks_0_img_attn_qkv": (48, 16), "double_blocks_0_img_attn_proj": (16, 16),
             "double_blocks_0_txt_mlp_0": (64, 16), "single_blocks_0_linear2": (16, 80)},
    "wan": {f"blocks_{i}_{kind}_attn_{of}": (24, 24) for i in (0, 1) for kind in ("self", "cross") for of in "qkvo"}
    | {f"blocks_{i}_ffn_{n}": (32, 24) if n == 0 else (24, 32) for i in (0, 1) for n in (0, 2)},
}  # fmt: skip


def transformer(name):
    torch.manual_seed(0)
    return getattr(diffusers, FAMILIES[name][1])(**FAMILIES[name][2]).eval()


def pipeline(name):
    """A pipeline of nothing but its transformer."""
    kind = getattr(diffusers, FAMILIES[name][0])
    asked = [p for p in inspect.signature(kind.__init__).parameters.values() if p.name != "self"]
    parts = {p.name: None if p.default is p.empty else p.default for p in asked}
    return kind(**parts | {"transformer": transformer(name)})


def changes(model, change):
    """What `change` does to the weights of a model."""
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    after = change(model).state_dict()
    found = {name: after[name] - before[name] for name in before}
    return {name: d for name, d in found.items() if d.abs().max() > 0}


def by_diffusers(name, file):
    pipe = pipeline(name)

    def change(model):
        pipe.load_lora_weights(str(file))
        pipe.fuse_lora(components=["transformer"])
        pipe.unload_lora_weights()
        return model

    return changes(pipe.transformer, change)


def by_graft(name, file):
    return changes(transformer(name), lambda model: graft.load_adapter(model, file).merge_and_unload())


def assert_same(found, wanted):
    assert wanted and found.keys() == wanted.keys()
    for name, d in found.items():
        assert (d - wanted[name]).abs().max() <= 2e-6 * wanted[name].abs().max().clamp(min=1), name


@pytest.fixture
def base(request, tmp_path):
    """The folder of a pipeline with the transformer's files."""
    name = request.node.callspec.params["name"]
    transformer(name).save_pretrained(tmp_path / "base" / "transformer")
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"_class_name": FAMILIES[name][0]}))
    return tmp_path / "base"


def trained(name, folder):
    """Have the pipeline save an adapter of ranks and scales that differ."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(name)
    ranks = dict(rank_pattern={"to_q": 2}, alpha_pattern={"to_out.0": 3})
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=FAMILIES[name][3], **ranks))
    torch.manual_seed(1)
    for key, p in pipe.transformer.named_parameters():
        if ".lora_" in key:
            p.data.copy_(torch.randn_like(p) * 0.2)
    layers = get_peft_model_state_dict(pipe.transformer)
    of_parts = _collate_lora_metadata({"transformer": pipe.transformer})
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers, **of_parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, base, tmp_path):
    trained(name, tmp_path / "theirs")
    wanted = by_diffusers(name, tmp_path / "theirs")
    assert_same(by_graft(name, tmp_path / "theirs"), wanted)
    for way in ("kohya", "peft"):
        made = convert_adapter_file(tmp_path / "theirs", way, tmp_path / way, base)
        assert_same(by_graft(name, made.path), wanted)
        back = convert_adapter_file(made.path, "diffusers", tmp_path / f"{way}-back.safetensors", base)
        assert_same(by_diffusers(name, back.path), wanted)


@pytest.mark.parametrize("name", FIRST)
def test_names_of_a_first_release(name, base, tmp_path):
    torch.manual_seed(2)
    tensors = {}
    for n, (path, (rows, columns)) in enumerate(FIRST[name].items()):
        stem = f"lora_unet_{path}"
        tensors |= {f"{stem}.lora_down.weight": torch.randn(2, columns), f"{stem}.lora_up.weight": torch.randn(rows, 2)}
        tensors[f"{stem}.alpha"] = torch.tensor(n + 1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    wanted = by_diffusers(name, tmp_path / "a.safetensors")
    assert_same(by_graft(name, tmp_path / "a.safetensors"), wanted)
    for known in (base, base / "transformer"):
        made = convert_adapter_file(
            tmp_path / "a.safetensors", "diffusers", tmp_path / f"{known.name}.safetensors", known
        )
        assert made.of == "kohya"
        assert_same(by_diffusers(name, made.path), wanted)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_what_check_says_of_names_that_diffusers_does_not_know(name, base, tmp_path):
    trained(name, tmp_path / "theirs")
    made = convert_adapter_file(tmp_path / "theirs", "kohya", tmp_path / "a", base)
    assert by_diffusers(name, made.path) == {}
    found = check_servers(read(made.path), ["diffusers"], read_base_files(base / "transformer"))
    assert {f.verdict for f in found if f.condition == "transformer_of_kohya"} == {"ignored"}
