# SPDX-License-Identifier: Apache-2.0
"""Merging into quantized checkpoints: read as their own packages read them, written dense or in their own form."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

import graft
from graft.core.errors import UnsupportedLayerError
from graft.files.base import read_base_files
from graft.files.merging.merge import merge_adapters
from graft.files.merging.weights import find_base_weights
from tests.leaves_out import FP8_ON_CPUS

NAME = "model.layers.0.self_attn.q_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.fixture
def plain(tmp_path):
    """A small model in bfloat16 and an adapter of it, in folders; its tensors."""
    config = LlamaConfig(hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64)  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    model = graft.get_peft_model(model, graft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "adapter")
    return load_file(tmp_path / "plain/model.safetensors")


def put(folder, tensors, quantization):
    (folder / "base").mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "base/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "plain/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder / "base"


def quantized(name):
    return "proj" in name


def delta(folder):
    held = load_file(folder / "adapter/adapter_model.safetensors")
    key = f"base_model.model.{NAME.removesuffix('.weight')}.lora_"
    return 2 * held[f"{key}B.weight"].float() @ held[f"{key}A.weight"].float()


def fp8(folder, tensors, kind=torch.float32):
    made = {}
    for name, W in tensors.items():
        made[name] = W
        if quantized(name):
            (rows, columns), pad = W.shape, torch.nn.functional.pad
            blocks = pad(W.float(), (0, -columns % 128, 0, -rows % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            scale = (blocks.abs().amax((1, 3)) / 448).to(kind)
            codes = (blocks / scale.float()[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
            made |= {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    return put(folder, made, FP8)


def of_bitsandbytes(folder, tensors, kind="nf4", nested=False):
    """Return the folder, and the weights as bitsandbytes reads them."""
    functional = pytest.importorskip("bitsandbytes.functional")
    made, read = {}, {}
    for name, W in tensors.items():
        made[name] = W
        if quantized(name):
            made[name], state = functional.quantize_4bit(W, quant_type=kind, compress_statistics=nested)
            read[name] = functional.dequantize_4bit(made[name], state)
            made |= {f"{name}.{end}": t for end, t in state.as_dict(packed=True).items()}
    return put(folder, made, {"quant_method": "bitsandbytes", "load_in_4bit": True}), read


def of_compressed_tensors(folder, tensors, bits, group, symmetric):
    """Return the folder, and the weights as compressed-tensors reads them."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    fields = {"num_bits": bits, "symmetric": symmetric, "strategy": "group" if group else "channel"}
    args = QuantizationArgs(**fields, **({"group_size": group} if group else {}))
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    kind = "pack-quantized" if bits == 4 else "int-quantized"
    own = compressors.PackedQuantizationCompressor if bits == 4 else compressors.IntQuantizationCompressor
    made, read = {}, {}
    for name, W in tensors.items():
        made[name] = W
        if quantized(name):
            parts = W.float().unflatten(1, (-1, group or W.shape[1]))
            low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
            top = 2 ** (bits - 1) - 1
            scale = (parts.abs().amax(2) / top) if symmetric else (high - low) / (2 * top + 1)
            held = {"weight": W, "weight_scale": scale.to(W.dtype)}
            if not symmetric:
                held["weight_zero_point"] = (-top - 1 - low / scale).round().clamp(-top - 1, top).to(torch.int8)
            compressed = own.compress(held, scheme)
            read[name] = own.decompress(dict(compressed), scheme)["weight"]
            del made[name]
            made |= {f"{name.removesuffix('weight')}{end}": t for end, t in compressed.items()}
    groups = {"group_0": {"targets": ["Linear"], "weights": fields | {"group_size": group}}}
    config = {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}
    return put(folder, made, config), read


def assert_merges(folder, plain, base, read):
    """Dense: the weight that was read, plus ΔW, rounded once. Kept: the same to a step of the form."""
    held = find_base_weights(read_base_files(base))
    assert {n for n in read if not torch.equal(held.read(n).to(read[n].dtype), read[n])} == set()
    exact = held.read(NAME) + delta(folder)
    account = merge_adapters(base, [folder / "adapter"], folder / "dense", certificate=True)
    dense = load_file(folder / "dense/model.safetensors")
    assert torch.equal(dense[NAME], exact.bfloat16())
    assert all(t.dtype == torch.bfloat16 for t in dense.values())
    model = LlamaForCausalLM.from_pretrained(folder / "dense")
    assert dense.keys() == model.state_dict().keys() and not hasattr(model.config, "quantization_config")
    merge_adapters(base, [folder / "adapter"], folder / "kept", certificate=True, keep_quantized=True)
    before, after = load_file(base / "model.safetensors"), load_file(folder / "kept/model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    differ = {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))}
    assert differ and all("q_proj" in n or "up_proj" in n for n in differ)
    again = find_base_weights(read_base_files(folder / "kept")).read(NAME)
    noise = (held.read(NAME) - plain[NAME].float()).norm()  # of the quantization by the package itself
    assert (again - exact).norm() < 1.2 * noise
    row = json.loads((folder / "kept/merge.json").read_text())["tensors"][NAME]
    assert row["largest_difference"] == pytest.approx(float((again - exact).abs().max()), rel=1e-3)
    assert account.tensors[NAME]["largest_difference"] < row["largest_difference"]


@FP8_ON_CPUS
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_block_fp8(kind, plain, tmp_path):
    base = fp8(tmp_path, plain, kind)
    theirs = LlamaForCausalLM.from_pretrained(
        base, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    assert_merges(tmp_path, plain, base, theirs.state_dict())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(kind, nested, plain, tmp_path):
    assert_merges(tmp_path, plain, *of_bitsandbytes(tmp_path, plain, kind, nested))


@pytest.mark.parametrize("bits, group, symmetric", [(8, None, True), (4, 32, True), (4, None, True), (4, 64, False)])
def test_compressed_tensors(bits, group, symmetric, plain, tmp_path):
    assert_merges(tmp_path, plain, *of_compressed_tensors(tmp_path, plain, bits, group, symmetric))


@pytest.mark.parametrize(
    "config, why",
    [({"quant_method": "gptq"}, "gptq"),
     ({"quant_method": "compressed-tensors", "config_groups": {"a": {"format": "nvfp4-pack-quantized"}}}, "nvfp4")],
)  # fmt: skip
def test_other_forms_are_refused(config, why, plain, tmp_path):
    base = put(tmp_path, plain, config)
    with pytest.raises(UnsupportedLayerError, match=why):
        merge_adapters(base, [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
