# SPDX-License-Identifier: Apache-2.0
"""Adapters that show by their values whether a folder holds one of them whole, and faults in the calls of a save."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graft
import graft.io.files

CONFIG, TENSORS, BIN, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"
LAYERS = ["0", "1"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def config(number: int) -> graft.LoraConfig:
    return graft.LoraConfig(r=2, lora_alpha=number, target_modules=LAYERS)


@cache
def adapter(number: int, name: str = "default") -> graft.PeftModel:
    """A model whose adapter has this number as its alpha, and in all its tensors."""
    model = graft.get_peft_model(net(), config(number), name)
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data.fill_(number)
    return model


def held(folder: Any, load: Callable[..., Any] = graft.PeftModel.from_pretrained, **options: Any) -> tuple[int, int]:
    """Load a folder; return the adapter's alpha and its tensors' value, which is one for all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(net(), folder, "x", **options)
    values = {v for key, p in model.named_parameters() if "lora_" in key for v in p.detach().flatten().tolist()}
    assert len(values) == 1, f"tensors of several adapters: {values}"
    return model.peft_config["x"].lora_alpha, int(values.pop())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit(folder: Path, **fields: Any) -> None:
    """Change a config as people do."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# faults

CALLS = {os: "open fsync replace link remove scandir mkdir stat lstat", builtins: "open", io: "open"}
WRITERS = {graft.io.files: "write_safetensors", torch: "save"}  # they write the tensors, in many calls


class Kill(BaseException):
    """Stands for the end of a process, in the process that stays."""


def full(call: Callable[[], Any]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def denied(call: Callable[[], Any]) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def interrupted(call: Callable[[], Any]) -> None:
    call()
    raise KeyboardInterrupt


def killed(call: Callable[[], Any]) -> None:
    os._exit(9)


@contextmanager
def faults(folder: Path, at: int | None = None, how: Callable[[Callable[[], Any]], None] = full) -> Iterator[list[str]]:
    """Let the call of number `at`, of those by which a save reaches the disk, go wrong. Yield the calls that came."""
    seen: list[str] = []
    undo = []

    def patch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            where = next((os.fspath(a) for a in args if isinstance(a, (str, os.PathLike))), "")
            if not where.startswith(str(folder)) and name not in ("fsync", "save"):
                return real(*args, **options)
            seen.append(f"{name} {os.path.basename(where)}")
            if len(seen) - 1 != at:
                return real(*args, **options)
            if module in WRITERS:  # it was in the middle of the file
                with open(where, "wb") if where else nullcontext(args[1]) as f:
                    f.write(b"half a file")
            return how(lambda: real(*args, **options))

        undo.append((module, name, real))
        setattr(module, name, call)

    for module, names in {**CALLS, **WRITERS}.items():
        for name in names.split():
            patch(module, name)
    try:
        yield seen
    finally:
        for module, name, real in undo:
            setattr(module, name, real)
