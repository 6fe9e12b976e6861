# SPDX-License-Identifier: Apache-2.0
"""Loading and saving."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from zlib import crc32

import numpy as np
from safetensors.torch import load, load_file, save_file
from torch import Tensor

import graft
from benchmarks.measure import Bench, Goal, Turns
from benchmarks.models import lora, randomize, smollm

FOLDER = tempfile.TemporaryDirectory()  # gone with the process
WEIGHTS = "adapter_model.safetensors"


@cache
def saved() -> str:
    """A folder that both libraries load."""
    folder = os.path.join(FOLDER.name, "saved")
    randomize(graft.get_peft_model(smollm(), lora(graft))).save_pretrained(folder)
    return folder


def from_pretrained(lib: Any) -> Turns:
    while True:
        yield partial(lib.PeftModel.from_pretrained, smollm(values=False), saved())


def load_adapter(nth: int) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        model = lib.PeftModel.from_pretrained(smollm(), saved())
        for n in range(2, nth):
            model.load_adapter(saved(), f"a{n}")
        while True:
            yield lambda: model.load_adapter(saved(), "another")
            model.delete_adapter("another")

    return turns


def checked(folder: str) -> dict[str, Tensor]:
    """What no load can do without: to read the file, to check that its bytes are those that were saved and its numbers
    finite, and to copy these into tensors."""
    with open(os.path.join(folder, WEIGHTS), "rb") as f:
        data = f.read()
    begin = 8 + int.from_bytes(data[:8], "little")
    crc32(memoryview(data)[begin:])
    np.isfinite(np.frombuffer(data, "<f4", offset=begin).sum())
    return load(data)


def read() -> Turns:
    while True:
        yield partial(checked, saved())


def save(lib: Any) -> Turns:
    model = lib.PeftModel.from_pretrained(smollm(), saved())
    while True:
        yield lambda: model.save_pretrained(os.path.join(FOLDER.name, lib.__name__))


def write() -> Turns:
    tensors = load_file(os.path.join(saved(), WEIGHTS))
    while True:
        yield lambda: save_file(tensors, os.path.join(FOLDER.name, "written"))


LOAD = Goal(1, 1.5)  # 210 layers are injected in the time of 3 × their bare modules, which is half of the floor's
BENCHES = [
    Bench("from_pretrained (floor: read, check, copy)", from_pretrained, LOAD, read),
    Bench("load_adapter, 2nd", load_adapter(2), LOAD, read),
    Bench("load_adapter, 10th", load_adapter(10), LOAD, read, long=True),
    Bench("save_pretrained (floor: save_file)", save, Goal(over_floor=1.2), write),
]
