# SPDX-License-Identifier: Apache-2.0
"""Small files that would take gigabytes or never end, and pipes in a file's place: an error at once."""

import json
import os
import shutil
import signal
import struct
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graft.config.pair import describe_whole_model, read_tensor_names
from graft.config.reading import MOST_CONTAINERS, open_file, parse_json, read_object
from graft.core.errors import CheckpointError, NonFiniteError, PeftError
from graft.files import formats
from graft.files.base import read_base_files
from graft.files.formats import gguf_file
from graft.files.sources import read_licence
from tests.files.test_formats import FIXTURES, NAMES, base_for

GGUF = FIXTURES / "gguf_llama" / "adapter.gguf"
GUARD = 5  # seconds


@contextmanager
def at_once():
    """Fail if the block takes longer than `GUARD`, as a read of a pipe would."""

    def late(*_):
        raise AssertionError(f"it takes more than {GUARD} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(GUARD)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", [*NAMES, "gguf_llama"])
def test_a_pipe_in_place_of_each_file_of_a_format(name, tmp_path):
    base = None if name == "gguf_llama" else base_for(name)
    for file in sorted((FIXTURES / name).iterdir()):
        shutil.copytree(FIXTURES / name, tmp_path / file.name)
        (tmp_path / file.name / file.name).unlink()
        os.mkfifo(tmp_path / file.name / file.name)
        with at_once(), pytest.raises(CheckpointError):
            formats.read(tmp_path / file.name, base)
        with at_once(), pytest.raises(CheckpointError, match="is a pipe or device"):
            formats.read(tmp_path / file.name / file.name, base)


def test_pipes_and_devices_elsewhere(tmp_path):
    for name in ("config.json", "README.md", "model.safetensors.index.json"):
        os.mkfifo(tmp_path / name)
    shutil.copy(FIXTURES / "base_net" / "model.safetensors", tmp_path)
    with at_once():
        for read in (open_file, read_object):
            for path in (tmp_path / "config.json", "/dev/zero", tmp_path):
                with pytest.raises(CheckpointError, match="folder, pipe or device"):
                    read(path)
        with pytest.raises(CheckpointError, match="folder, pipe or device"):
            read_base_files(tmp_path)
        assert read_licence(tmp_path) is None and "whole model" in describe_whole_model(tmp_path)


@pytest.mark.parametrize(
    "text", ["a: &a [1, 1]\nb: [*a, *a]", "lora_r: 4\nlora_r: 5", "[" * 5000, "a: !!python/name:os.system ''",
             "a: !!bool x", "a: 2001-99-99", "a: .nan", "- a", f"a: {'9' * 5000}", "a: !!int ''", f"a: {'x' * 2**16}",
             f"lora_r: 4\nlora_alpha: {10**400}", "lora_r: true\nlora_alpha: 4", "\0"],
)  # fmt: skip
@pytest.mark.parametrize("file", ["hyperparameters.yaml", "model_config.yaml"])
def test_yaml_that_grows_or_is_none(file, text, tmp_path):
    shutil.copytree(FIXTURES / "litgpt_lora", tmp_path / "a")
    (tmp_path / "a" / file).write_text(text)
    with at_once(), pytest.raises(CheckpointError, match=f"{file}|mlp_class_name|the MLP None"):
        formats.read(tmp_path / "a", base_for("litgpt_lora"))


def field(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def gguf(*fields, tensors=b"", count=0, version=3):
    body = b"".join(fields)
    return b"GGUF" + struct.pack("<IQQ", version, count, len(fields)) + body + tensors


TYPE = field(b"general.type", 8, struct.pack("<Q", 7) + b"adapter")
LORA = field(b"adapter.type", 8, struct.pack("<Q", 4) + b"lora")
HUGE = {
    "numbers": gguf(field(b"a", 9, struct.pack("<IQ", 0, 2**60))),
    "texts": gguf(field(b"a", 9, struct.pack("<IQ", 8, 2**60))),
    "arrays": gguf(field(b"a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1) * 1000)),
    "text": gguf(field(b"a", 8, struct.pack("<Q", 2**63))),
    "fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "tensors": gguf(count=2**60),
    "dimensions": gguf(count=1, tensors=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31)),
    "shape": gguf(count=1, tensors=struct.pack("<Q", 1) + b"a" + struct.pack("<I4QIQ", 4, *[2**62] * 4, 0, 0)),
    "offset": gguf(count=1, tensors=struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 1, 0, 2**63)),
    "twice": gguf(TYPE, TYPE),
    "alignment": gguf(TYPE, field(b"general.alignment", 4, struct.pack("<I", 0))),
    "no UTF-8": gguf(field(b"\xff", 4, struct.pack("<I", 0))),
    "type": gguf(field(b"a", 77, struct.pack("<I", 0))),
    "version": gguf(TYPE, version=1),
    "alpha": gguf(TYPE, LORA, field(b"adapter.lora.alpha", 6, struct.pack("<f", float("nan")))),
    "alpha as text": gguf(TYPE, LORA, field(b"adapter.lora.alpha", 8, struct.pack("<Q", 1) + b"x")),
    "tokens": gguf(TYPE, LORA, field(b"adapter.alora.invocation_tokens", 4, struct.pack("<I", 3))),
    "many entries": gguf(field(b"a", 9, struct.pack("<IQ", 0, 2**21) + bytes(2**21))),
}


@pytest.mark.parametrize("name", HUGE)
def test_gguf_that_states_what_it_has_not(name, tmp_path):
    (tmp_path / "a.gguf").write_bytes(HUGE[name])
    with at_once(), pytest.raises(CheckpointError, match=r"a\.gguf"):
        formats.read(tmp_path / "a.gguf")


def test_gguf_is_read_without_the_package(tmp_path):
    """Its values are those that the package wrote; of a file that ends anywhere is said that it does."""
    fields, tensors = gguf_file.read_contents(str(GGUF))
    assert fields["general.type"] == "adapter" and fields["adapter.lora.alpha"] == 6.0
    wanted = load_file(FIXTURES / "gguf_llama.delta.safetensors")
    adapter = formats.read(GGUF)
    product = adapter.modules["blk.1.ffn_down"]
    found = product.B.read() @ product.A.read() * product.scale
    assert abs(found - wanted["model.layers.1.mlp.down_proj"]).max() < 1e-6 and len(tensors) == 2 * len(adapter.modules)
    data = GGUF.read_bytes()
    for end in (3, 20, 60, 200, len(data) // 2, len(data) - 33):
        (tmp_path / "a.gguf").write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            formats.read(tmp_path / "a.gguf")


def test_json_of_many_lists_and_tensors_of_many_dimensions(tmp_path):
    text = b"[" + b"[]," * MOST_CONTAINERS + b"[]]"
    with at_once(), pytest.raises(CheckpointError, match="lists and objects"):
        parse_json(text, "x")
    entry = {"dtype": "F32", "shape": [10**299] * 3000, "data_offsets": [0, 0]}
    for header in ({"a": entry}, {"a": entry | {"shape": [2**63]}}, [], {"a": []}):
        data = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
        with at_once(), pytest.raises(CheckpointError, match="is damaged"):
            formats.read(tmp_path / "a.safetensors")
    twice = (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    )
    (tmp_path / "a.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice)
    with pytest.raises(CheckpointError, match="'a' stands twice"):
        formats.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name, field, value", [("mlx_lora", "model", {"a": 1}), ("torchtune_lora", "base_model_name_or_path", [1])]
)
def test_a_base_whose_name_is_no_text(name, field, value, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match="as its base model"):
        formats.read(tmp_path / "a", base_for(name))


def test_a_scale_that_is_not_finite(tmp_path):
    tensors = load_file(FIXTURES / "lycoris_locon" / "adapter.safetensors")
    name = next(name for name in tensors if name.endswith(".alpha"))
    for value in (np.nan, np.inf):
        save_file(tensors | {name: np.array([value], "f4")}, tmp_path / "a.safetensors")
        with pytest.raises(NonFiniteError, match="the scale of"):
            formats.read(tmp_path / "a.safetensors", base_for("lycoris_locon"))


def test_an_index_of_odd_files(tmp_path):
    shutil.copy(FIXTURES / "base_net" / "model.safetensors", tmp_path / "part.safetensors")
    for document in ({}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../x"}}, [], {"a": [[]]}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(document))
        with pytest.raises(PeftError, match=r"index\.json"):
            read_base_files(tmp_path)


def test_numbers_of_thousands_of_digits_in_names(tmp_path):
    """Python reads no such number: of a block in a config of pyreft, of a control vector, of an AdapterHub's key."""
    pyreft = FIXTURES.parents[1] / "methods" / "fixtures" / "pyreft" / "loreft"
    shutil.copytree(pyreft, tmp_path / "pyreft")
    config = tmp_path / "pyreft" / "config.json"
    fields = json.loads(config.read_text())
    fields["representations"] = [[None, f"model.layers[{'9' * 5000}].output", "pos", 1]] * len(fields["sorted_keys"])
    config.write_text(json.dumps(fields))
    llama = base_for("mlx_lora")
    with pytest.raises(CheckpointError, match="has an intervention"):
        formats.read(tmp_path / "pyreft", llama)
    architecture = field(b"general.architecture", 8, struct.pack("<Q", 13) + b"controlvector")
    name = b"direction." + b"9" * 5000
    info = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 0, 0, 0)
    (tmp_path / "a.gguf").write_bytes(gguf(architecture, count=1, tensors=info) + bytes(64))
    with pytest.raises(CheckpointError, match="without a direction"):
        formats.read(tmp_path / "a.gguf", llama)


def test_the_metadata_is_no_tensor(tmp_path):
    save_file({"a": np.zeros(2, "f4")}, tmp_path / "model.safetensors", {"format": "np"})
    assert read_tensor_names(str(tmp_path / "model.safetensors")) == ["a"]
