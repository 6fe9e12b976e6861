# SPDX-License-Identifier: Apache-2.0
"""Tensors in files: safetensors' own library reads what is written, and what it writes is read."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.core.errors import CheckpointError
from graft.files.tensors import make_tensor, read_header, write_safetensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_safetensors_writes(tmp_path, dtype):
    values = (torch.randn(3, 5) * 4).to(dtype)
    save_file({"x": values, "empty": values[:0]}, tmp_path / "a.safetensors", {"k": "v"})
    held, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"k": "v"} and held["x"].shape == (3, 5) and held["empty"].read().size == 0
    wanted = values.float() if dtype in (torch.float16, torch.bfloat16) else values
    assert np.array_equal(held["x"].read(), wanted.numpy())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_every_value_of_8_bits(tmp_path, dtype):
    values = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    save_file({"x": values}, tmp_path / "a.safetensors")
    read = read_header(tmp_path / "a.safetensors")[0]["x"].read()
    assert np.array_equal(read, values.float().numpy(), equal_nan=True)


def test_safetensors_reads_what_is_written(tmp_path):
    values = torch.randn(4, 7) * torch.logspace(-30, 30, 28).view(4, 7)
    values[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    path = str(tmp_path / "b.safetensors")
    write_safetensors(path, {name: make_tensor(values.numpy(), name) for name in names}, {"z": "1", "a": "2"})
    for name, held in load_file(path).items():
        assert torch.equal(held.nan_to_num(7), values.to(names[name]).nan_to_num(7)), name


def test_what_is_read_after_another_save_is_not_mixed_with_what_was_read_before(tmp_path):
    path = str(tmp_path / "a.safetensors")
    save = lambda value: write_safetensors(path, {name: make_tensor(np.full(4, value, "f4")) for name in "AB"}, {})
    save(1.0)
    held, _ = read_header(path)
    assert held["A"].read().tolist() == [1.0] * 4
    os.utime(path, ns=(0, 0))  # it was there before
    held, _ = read_header(path)
    save(2.0)
    with pytest.raises(CheckpointError, match=r"a\.safetensors was replaced"):
        held["B"].read()


@pytest.mark.parametrize("cut", [0, 4, 9, 40, -1])
def test_a_file_that_is_cut_is_damaged(tmp_path, cut):
    path = tmp_path / "c.safetensors"
    save_file({"x": torch.ones(8), "y": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        read_header(path)


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(tmp_path / "x.safetensors")


def test_tensors_that_overlap_are_damage(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({"x": torch.ones(8), "y": torch.ones(8)}, path)
    path.write_bytes(path.read_bytes().replace(b"[32,64]", b"[16,48]"))
    with pytest.raises(CheckpointError, match="'y' is not where its header says"):
        read_header(path)


def test_a_number_alone_has_no_dimension(tmp_path):
    write_safetensors(str(tmp_path / "e.safetensors"), {"alpha": make_tensor(np.array(3, "f4"))}, {})
    assert load_file(tmp_path / "e.safetensors")["alpha"].shape == ()
