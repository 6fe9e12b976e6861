# SPDX-License-Identifier: Apache-2.0
"""GGUF by the package gguf: transformers, which reads models of GGUF, gives names and order of what is expected."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import graft
from graft.core.errors import BaseModelMismatchError, CheckpointError, LossError
from graft.files import formats
from graft.files.bases import open_base
from graft.files.convert import convert_adapter_file
from graft.files.errors import BaseNeededError, PackageNeededError
from tests.files.dense import changes
from tests.files.test_formats import FIXTURES, assert_same, wanted

FILE, LLAMA = FIXTURES / "gguf_llama" / "adapter.gguf", FIXTURES / "base_llama"


def test_reads_names_and_order_as_transformers_does():
    base = open_base(LLAMA)
    assert_same(changes(formats.read(FILE, base), base), wanted("gguf_llama"))


def test_peft_and_back_is_the_same_file(tmp_path):
    convert_adapter_file(FILE, "peft", tmp_path / "peft", LLAMA)
    convert_adapter_file(tmp_path / "peft", "gguf", tmp_path / "back.gguf", LLAMA)
    held = [
        {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors} for path in (FILE, tmp_path / "back.gguf")
    ]
    assert held[0].keys() == held[1].keys()
    assert all(np.array_equal(held[0][name], held[1][name]) for name in held[0])
    fields = gguf.GGUFReader(tmp_path / "back.gguf").fields
    found = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    assert found == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mlx_lora", "torchtune_lora", "litgpt_lora"])
def test_files_of_others_there_and_back(tmp_path, name):
    base = open_base(LLAMA)
    done = convert_adapter_file(FIXTURES / name, "gguf", tmp_path / "a.gguf", base)
    assert done.lost == []
    assert_same(changes(formats.read(tmp_path / "a.gguf", base), base), wanted(name))


def test_onto_a_model(tmp_path):
    from tests.files.test_load import llama

    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merged = graft.load_adapter(model, FILE).merge_and_unload().state_dict()
    for path, change in wanted("gguf_llama").items():
        got = (merged[f"{path}.weight"] - before[f"{path}.weight"]).double()
        assert (got - torch.from_numpy(change)).abs().max() < 4e-6, path


def test_an_alora_keeps_the_tokens_from_which_it_acts(tmp_path, monkeypatch):
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layers.0.self_attn.q_proj"]}
    stem, rng = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    source = tmp_path / "alora"
    source.mkdir()
    factors = {"A": (2, 16), "B": (16, 2)}
    tensors = {f"{stem}.lora_{name}.weight": rng.standard_normal(size).astype("f4") for name, size in factors.items()}
    save_file(tensors, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps(fields | {"alora_invocation_tokens": [5, 7]}))
    convert_adapter_file(source, "gguf", tmp_path / "a.gguf", LLAMA)
    field = gguf.GGUFReader(tmp_path / "a.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32] and field.contents() == [5, 7]
    convert_adapter_file(tmp_path / "a.gguf", "peft", tmp_path / "back", LLAMA)
    back = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert back["alora_invocation_tokens"] == [5, 7]
    with pytest.raises(LossError, match=r"tokens after which aLoRA begins to act: \[5, 7\]"):
        convert_adapter_file(tmp_path / "a.gguf", "kohya", tmp_path / "a.safetensors", LLAMA)
    add = gguf.GGUFWriter.add_key_value  # which had one argument less until 2025
    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", lambda self, key, val, vtype: add(self, key, val, vtype))
    with pytest.raises(PackageNeededError, match="a later version of gguf"):
        convert_adapter_file(source, "gguf", tmp_path / "old.gguf", LLAMA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "alora", "back"]


def test_refusals(tmp_path):
    with pytest.raises(LossError, match=r"DoRA's magnitude"):
        convert_adapter_file(FIXTURES / "mlx_dora", "gguf", tmp_path / "a.gguf", LLAMA)
    with pytest.raises(BaseNeededError, match="architecture"):
        convert_adapter_file(FIXTURES / "mlx_lora", "gguf", tmp_path / "a.gguf")
    with pytest.raises(BaseNeededError, match="--base"):
        convert_adapter_file(FILE, "peft", tmp_path / "a")
    with pytest.raises(LossError, match=r"does not know how llama\.cpp converts"):
        convert_adapter_file(FILE, "peft", tmp_path / "a", FIXTURES / "base_bert")
    other = tmp_path / "qwen"
    shutil.copytree(LLAMA, other)
    (other / "config.json").write_text((LLAMA / "config.json").read_text().replace("LlamaFor", "Qwen2For"))
    with pytest.raises(BaseModelMismatchError, match=r"'llama', and .* is 'qwen2'"):
        convert_adapter_file(FILE, "peft", tmp_path / "a", other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qwen"]


def test_a_model_is_no_adapter(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("model")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 4), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="is a model"):
        formats.read(tmp_path / "model.gguf")


def test_a_type_that_the_package_does_not_know(tmp_path):
    path, name = tmp_path / "adapter.gguf", b"blk.0.attn_q.weight.lora_a"
    data = bytearray((FIXTURES / "gguf_llama" / "adapter.gguf").read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8  # the number of dimensions, and two of them
    data[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="of type 99"):
        formats.read(path)


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.99])
def test_a_file_that_is_cut_off(tmp_path, keep):
    whole = FILE.read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        convert_adapter_file(tmp_path / "a.gguf", "peft", tmp_path / "out", LLAMA)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_dtypes(tmp_path, kind):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((32, 16)).astype("f4"), rng.standard_normal((16, 32)).astype("f4")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")  # and no alpha: s = 1
    q = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("blk.1.attn_output.weight.lora_a", A)
    writer.add_tensor("blk.1.attn_output.weight.lora_b", gguf.quants.quantize(B, q), raw_dtype=q)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = open_base(LLAMA)
    found = changes(formats.read(tmp_path / "a.gguf", base), base)["model.layers.1.self_attn.o_proj"]
    exact = gguf.quants.dequantize(gguf.quants.quantize(B, q), q).astype("f8") @ A
    assert np.abs(found - exact).max() < 1e-5 and np.abs(found - B.astype("f8") @ A).max() < 0.3


def test_an_embedding_and_one_alpha_for_several_scales(tmp_path):
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.random.default_rng(0).standard_normal((2, 32)),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.random.default_rng(1).standard_normal((16, 2)),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.random.default_rng(2).standard_normal(
            (3, 16)
        ),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.random.default_rng(3).standard_normal(
            (16, 3)
        ),
    }
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file({k: v.astype("f4") for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 7, "use_rslora": true, "rank_pattern": {"q_proj": 3}, '
        '"target_modules": ["layers.0.self_attn.q_proj", "embed_tokens"]}'
    )
    base = open_base(LLAMA)
    done = convert_adapter_file(folder, "gguf", tmp_path / "a.gguf", base)
    assert 0 < done.rounding < 1e-7
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert shapes["token_embd.weight.lora_a"] == (32, 2) and shapes["token_embd.weight.lora_b"] == (16, 2)
    assert_same(changes(formats.read(tmp_path / "a.gguf", base), base), changes(formats.read(folder, base), base))
