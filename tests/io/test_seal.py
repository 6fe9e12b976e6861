# SPDX-License-Identifier: Apache-2.0
"""The digest of a file's tensors: what a load, a swap and slots say of a file in which a byte has changed."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.core.errors import CheckpointError
from graft.files.convert import convert_adapter_file
from graft.files.formats import read
from graft.io.tensors import digest_tensors, write_safetensors
from graft.serving import AdapterSlots
from tests.models import seeded
from tests.raised import refuses

NAME = "adapter_model.safetensors"


def base():
    with seeded(0):
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()


def config():
    return graft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)


@pytest.fixture
def folder(tmp_path):
    graft.get_peft_model(base(), config()).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def flip(folder, place=-9):
    path = Path(folder) / NAME
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def from_pretrained(folder, **options):
    graft.PeftModel.from_pretrained(base(), folder, **options)


def load_adapter(folder, **options):
    graft.get_peft_model(base(), config()).load_adapter(folder, "new", **options)


def load_over(folder, **options):
    graft.get_peft_model(base(), config()).load_adapter(folder, "default", **options)


def hotswap(folder, **options):
    graft.hotswap_adapter(graft.get_peft_model(base(), config()), folder, "default", **options)


def slots(folder, **options):
    AdapterSlots(base(), 2, 2, ["0", "1"]).load("new", folder, **options)


def slots_with_config(folder, **options):
    AdapterSlots(base(), 2, 2, ["0", "1"]).load("new", folder, config=config(), **options)


def plain(folder, **options):
    graft.load_peft_weights(folder, **options)


LOADS = [from_pretrained, load_adapter, load_over, hotswap, slots, slots_with_config, plain]


@pytest.mark.differs("a weights file in which a byte has changed")
@pytest.mark.parametrize("load", LOADS, ids=lambda f: f.__name__)
def test_a_flipped_byte_does_not_load(folder, load):
    load(folder)
    flip(folder)
    remedy = rf"{re.escape(str(folder / NAME))} is damaged.*check_digest=False"
    refuses(CheckpointError, remedy, load, folder)
    load(folder, check_digest=False)


def test_a_flipped_byte_goes_into_no_other_file(folder, tmp_path):
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base" / "model.safetensors")
    flip(folder)
    for act in (
        lambda: convert_adapter_file(folder, "peft", tmp_path / "out"),
        lambda: graft.merge_files(tmp_path / "base", [folder], tmp_path / "out"),
        lambda: graft.load_adapter(base(), folder),
        lambda: read(folder),
    ):
        refuses(CheckpointError, rf"{re.escape(str(folder / NAME))} is damaged", act)
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]


@pytest.mark.parametrize("place", [-1, -200, -513], ids=str)
def test_every_place_is_seen(folder, place):
    flip(folder, place)
    refuses(CheckpointError, "damaged", plain, folder)


def test_a_name_and_a_shape_are_seen(folder):
    path = folder / NAME
    whole = path.read_bytes()
    for old, new in ((b"0.lora_A", b"9.lora_A"), (b"[2,8]", b"[4,4]")):
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        refuses(CheckpointError, "damaged", plain, folder)


def test_a_file_without_a_digest_loads_as_before(folder):
    path = folder / NAME
    save_file(load_file(path), path, {"format": "pt"})
    flip(folder)
    for load in LOADS:
        load(folder)


def test_a_digest_of_another_kind_is_a_later_versions(folder):
    path = folder / NAME
    path.write_bytes(re.sub(rb'"crc32:........"', b'"md5:0123456789"', path.read_bytes()))
    plain(folder)


def test_another_order_of_the_same_tensors_is_the_same(folder):
    path = folder / NAME
    with safe_open(path, "pt") as f:
        notes = f.metadata()
    tensors = load_file(path)
    save_file(dict(reversed(tensors.items())), path, notes)
    plain(folder)


def test_saves_are_the_same_bytes(folder, tmp_path):
    graft.PeftModel.from_pretrained(base(), folder).save_pretrained(tmp_path / "b")
    assert (folder / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_dtypes_and_tensors_without_numbers(tmp_path, dtype):
    path = str(tmp_path / NAME)
    tensors = {"a": torch.ones(3, 5).to(dtype), "b": torch.empty(0, 8).to(dtype)}
    write_safetensors(path, tensors, {"format": "pt", "graft_digest": digest_tensors(tensors)})
    plain(tmp_path)
    flip(tmp_path, -1)
    refuses(CheckpointError, "damaged", plain, tmp_path)


def test_a_torch_file_has_one_as_well(tmp_path):
    graft.get_peft_model(base(), config()).save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "adapter_model.bin"
    data, value = path.read_bytes(), load_values(path)
    place = data.index(value)
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    refuses(CheckpointError, r"is damaged.*check_digest=False", plain, tmp_path)
    plain(tmp_path, check_digest=False)


def load_values(path):
    return next(iter(torch.load(path, weights_only=True).values())).numpy().tobytes()
