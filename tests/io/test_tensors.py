# SPDX-License-Identifier: Apache-2.0
"""The safetensors files that graft writes are those of safetensors, but for the order of metadata."""

import ctypes
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

import graft
from graft.config.atomic import write_pieces
from graft.config.seal import digest_file
from graft.io.tensors import PackedTensors, digest_tensors, write_safetensors

DTYPES = ["float64", "float32", "bfloat16", "bool", "float16", "int64", "uint8", "float8_e4m3fn"]


@pytest.mark.parametrize("dtypes", [DTYPES[:4], DTYPES], ids=["a dtype of each width", "all dtypes"])
def test_files_equal_those_of_safetensors(tmp_path, dtypes):
    made = {f"b{i}": (torch.arange(3 * i) % 2).to(getattr(torch, d)).reshape(3, i) for i, d in enumerate(dtypes)}
    made |= {"a": torch.randn(4, 3).t(), 'é\n"': nn.Parameter(torch.randn(1)), "scalar": torch.tensor(2.0)}
    made["tied"] = made["b1"]
    write_safetensors(str(tmp_path / "x"), made, {"format": "pt"})
    plain = {key: t.detach().contiguous() for key, t in made.items()} | {"tied": made["b1"].clone()}
    if dtypes != DTYPES:  # of one width, it puts them in the order in which it declares them
        assert (tmp_path / "x").read_bytes() == save(plain, {"format": "pt"})
    read = load_file(tmp_path / "x")
    assert read.keys() == plain.keys()
    assert all(t.dtype == plain[key].dtype and torch.equal(t, plain[key]) for key, t in read.items())


def test_copies_have_the_digest_of_their_file_and_later_changes_do_not_reach_them(tmp_path):
    class Named(torch.Tensor):
        """A subclass with values of its own."""

    made = {f'é"{i}': torch.ones(i, 2).to(getattr(torch, d)) for i, d in enumerate(DTYPES)}
    made |= {"w": nn.Parameter(torch.randn(2, 3)), "s": torch.randn(3).as_subclass(Named), "scalar": torch.tensor(1.5)}
    plain = {key: t.detach().clone().as_subclass(torch.Tensor) for key, t in made.items()}
    packed = PackedTensors.copy(made)
    for t in made.values():
        t.data.zero_()
    write_safetensors(str(tmp_path / "x"), packed, {"format": "pt"})
    assert packed.digest() == digest_tensors(plain) == digest_file((tmp_path / "x").read_bytes())
    read = load_file(tmp_path / "x")
    assert read.keys() == plain.keys() and all(torch.equal(t, plain[key]) for key, t in read.items())


@pytest.mark.parametrize("reserves", [True, False])
def test_a_file_in_pieces_replaces_an_older_one(tmp_path, reserves, monkeypatch):
    """Also where the system reserves no blocks, and where a piece takes several calls."""
    monkeypatch.setattr("graft.config.atomic.CHUNK", 2)
    if not reserves:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    path = tmp_path / "x"
    path.write_bytes(b"older and longer")
    write_pieces(str(path), [b"ab", memoryview(b""), memoryview(b"cde")])
    assert path.read_bytes() == b"abcde"
    write_pieces(str(path), [b""])
    assert path.read_bytes() == b""


def test_metadata_is_in_order(tmp_path):
    write_safetensors(str(tmp_path / "x"), {"a": torch.ones(1)}, {k: 'ß"' for k in "zyxabc"})
    data = (tmp_path / "x").read_bytes()
    assert list(json.loads(data[8 : 8 + data[0]])["__metadata__"]) == list("abcxyz")


class Hollow(torch.Tensor):
    """A tensor that holds its values elsewhere, as quantized ones do."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return args[0]


def test_a_tensor_without_values_is_refused(tmp_path):
    made = torch.Tensor._make_wrapper_subclass(Hollow, (2, 2))
    with pytest.raises(graft.CheckpointError, match="'a' is a Hollow that holds its values elsewhere"):
        write_safetensors(str(tmp_path / "x"), {"a": made}, {})
