# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.house.trace` prints how many functions and files of graft its main operations enter.

A reader who follows an operation reads these functions. Calls are counted for the forward pass of one layer.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch
from torch import nn

import graft

PACKAGE = str(Path(graft.__file__).parent)


class Trace(NamedTuple):
    """The functions of graft that an operation entered."""

    calls: int
    functions: int
    files: int


def trace(operation: Callable[[], object]) -> Trace:
    """Run an operation and count the functions of graft that it enters; comprehensions count as their function."""
    entered: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            entered[code] += 1

    sys.setprofile(note)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return Trace(entered.total(), len(entered), len({code.co_filename for code in entered}))


def small_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


CONFIG = graft.LoraConfig(r=4, target_modules=["0", "2"])


def trace_all() -> dict[str, Trace]:
    """Return the traces of the main operations, each done once before, so that nothing is first."""
    x = torch.randn(3, 16)
    with tempfile.TemporaryDirectory() as folder:
        model = graft.get_peft_model(small_base(), CONFIG)
        model.save_pretrained(folder)
        graft.PeftModel.from_pretrained(small_base(), folder)
        layer = model.base_model.model[0]
        layer(x).sum().backward()
        traces = {
            "injection": trace(lambda: graft.get_peft_model(small_base(), CONFIG)),
            "load": trace(lambda: graft.PeftModel.from_pretrained(small_base(), folder)),
            "save": trace(lambda: model.save_pretrained(folder)),
            "layer, training": trace(lambda: layer(x)),
        }
        model.eval()
        layer(x)
        with torch.no_grad():
            layer(x)
            traces["layer, eval"] = trace(lambda: layer(x))
        traces["merge"] = trace(model.merge_adapter)
    return traces


if __name__ == "__main__":
    print(f"{'':18}{'calls':>8}{'functions':>12}{'files':>8}")
    for name, counts in trace_all().items():
        print(f"{name:18}{counts.calls:8}{counts.functions:12}{counts.files:8}")
