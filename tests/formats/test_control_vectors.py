# SPDX-License-Identifier: Apache-2.0
"""Steering vectors as control vectors of GGUF: repeng's file, and graft's read by the package gguf."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

import graft
from graft.core.errors import BaseModelMismatchError, LossError
from graft.files import formats
from graft.files.convert import convert_adapter_file
from graft.files.errors import BaseNeededError
from tests.looks import layers

HERE = Path(__file__).parents[1] / "methods" / "fixtures"
BASE, FILE = HERE / "adapterhub" / "llama", HERE / "repeng" / "vector.gguf"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def base():
    return AutoModel.from_pretrained(BASE, attn_implementation="eager").eval()


def saved(where, **options):
    model = graft.get_peft_model(base(), graft.SteeringConfig(**options))
    with torch.no_grad():
        for i, layer in enumerate(layers(model).values()):
            layer.steering_vector["default"].copy_(torch.arange(8.0) - i)
    model.save_pretrained(where)
    return model.eval()


@torch.no_grad()
def test_a_file_of_repeng_computes_what_it_computes_there():
    model = graft.load_adapter(base(), FILE).eval()
    y = model(IDS, steering_coefficient=1.5).last_hidden_state
    assert_close(y, load_file(HERE / "repeng" / "outputs.safetensors")["plain"], rtol=2e-5, atol=2e-5)


def test_there_and_back(tmp_path):
    convert_adapter_file(FILE, "peft", tmp_path / "peft", BASE)
    convert_adapter_file(tmp_path / "peft", "gguf", tmp_path / "back.gguf", BASE)
    assert (tmp_path / "back.gguf").read_bytes() == FILE.read_bytes()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    """The package itself is silent where the values go nowhere."""
    convert_adapter_file(FILE, "peft", tmp_path / "peft", BASE)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", lambda *_, **__: None)
    with pytest.raises(OSError, match="disk is full"):
        convert_adapter_file(tmp_path / "peft", "gguf", tmp_path / "back.gguf", BASE)
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]


@torch.no_grad()
def test_the_coefficient_is_in_the_file(tmp_path):
    model = saved(tmp_path / "own", layers=[1], coefficient=-2.0)
    convert_adapter_file(tmp_path / "own", "gguf", tmp_path / "own.gguf", BASE)
    reader = gguf.GGUFReader(tmp_path / "own.gguf")
    assert [t.name for t in reader.tensors] == ["direction.1"]
    assert np.array_equal(reader.tensors[0].data, -2 * np.arange(8, dtype="f4"))
    loaded = graft.load_adapter(base(), tmp_path / "own.gguf").eval()
    assert_close(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state, rtol=0, atol=0)


def test_what_a_file_cannot_hold(tmp_path):
    saved(tmp_path / "both")
    with pytest.raises(LossError, match=r"layers.0, which is the first block"):
        convert_adapter_file(tmp_path / "both", "gguf", tmp_path / "out.gguf", BASE)
    done = convert_adapter_file(tmp_path / "both", "gguf", tmp_path / "out.gguf", BASE, lossy=True)
    assert len(done.lost) == 1 and done.modules == 1
    saved(tmp_path / "late", layers=[1], min_token_index=2)
    with pytest.raises(LossError, match="min_token_index=2"):
        convert_adapter_file(tmp_path / "late", "gguf", tmp_path / "late.gguf", BASE)
    with pytest.raises(BaseNeededError, match="Give the base model"):
        formats.read(FILE)
    other = gguf.GGUFWriter(tmp_path / "wide.gguf", "controlvector")
    other.add_tensor("direction.1", np.zeros(9, "f4"))
    for write in (other.write_header_to_file, other.write_kv_data_to_file, other.write_tensors_to_file, other.close):
        write()
    with pytest.raises(BaseModelMismatchError, match=r"direction.1 of shape \(9,\).*2 blocks of width 8"):
        graft.load_adapter(base(), tmp_path / "wide.gguf")
