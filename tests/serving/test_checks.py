# SPDX-License-Identifier: Apache-2.0
"""Hot-swaps and slots look at a file as `load_adapter` does: is it whole, and is it for this base?"""

import re

import pytest
from torch import nn

import graft
from graft.core.errors import CheckpointError, PeftWarning
from graft.serving import AdapterSlots
from tests.models import adapted, seeded

TENSORS = "adapter_model.safetensors"


def net(number=0):
    with seeded(number):
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()


def with_lora(base):
    return adapted(base, graft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False), scale=0)


def load(base, folder):
    with_lora(base).load_adapter(folder, "other")


def swap(base, folder):
    graft.hotswap_adapter(with_lora(base), folder, "default")


def fill(base, folder):
    AdapterSlots(base, 2, 2, ["0"]).load("x", folder)


WAYS = pytest.mark.parametrize("way", [load, swap, fill])


@pytest.fixture
def folder(tmp_path):
    with seeded(1):
        with_lora(net()).save_pretrained(tmp_path)
    return str(tmp_path)


@WAYS
def test_a_flipped_bit_is_found(way, folder):
    way(net(), folder)
    path = f"{folder}/{TENSORS}"
    with open(path, "r+b") as f:
        f.seek(-3, 2)
        byte = f.read(1)[0]
        f.seek(-3, 2)
        f.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{re.escape(path)} is damaged"):
        way(net(), folder)


@WAYS
def test_another_base_is_told(way, folder):
    with pytest.warns(PeftWarning, match="same architecture but with other weights"):
        way(net(5), folder)
