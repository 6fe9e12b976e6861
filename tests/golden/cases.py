# SPDX-License-Identifier: Apache-2.0
"""Golden files: folders that an earlier state of graft wrote, packed in archives, and how one is loaded and run.

`make.py` writes the archives of a state; the tests of this folder load them by the code of today.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import safetensors.torch
import torch
from torch import Tensor, nn

import graft
from tests import models

HERE = Path(__file__).parent
CASES, BASES, OUTPUTS = "cases.json", "bases", "outputs.safetensors"


class Case(TypedDict):
    """An adapter in files, and the call whose output is recorded."""

    base: str
    config: dict[str, Any]  # changes of the base's config
    adapters: list[list[str]]  # name and path of each, in the order in which they are loaded
    reader: str  # "peft", "mixed" for a PeftMixedModel, or "foreign" for formats of other libraries
    call: dict[str, Any]  # arguments of the call next to the base's inputs
    names: list[str]  # names of the loaded model's state dict
    keys: list[str]  # names of the last adapter's tensors in a file


# archives


def pack(folder: Path, archive: Path) -> None:
    """Write the files of a folder into an archive whose bytes depend on nothing but theirs; the cases come first."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.name != CASES, p)):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            tar.addfile(entry, io.BytesIO(path.read_bytes()))
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(gzip.compress(packed.getvalue(), mtime=0))


def unpack(archive: Path, folder: Path) -> Path:
    """Write the files of an archive into a folder; return the folder."""
    with tarfile.open(archive) as tar:
        for entry in tar:
            path, data = folder / entry.name, tar.extractfile(entry)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"" if data is None else data.read())
    return folder


# base models


class Net(nn.Module):
    """One layer between two frozen factors."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.before, self.after = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return self.layer(x * self.before if x.is_floating_point() else x) * self.after


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(12), nn.Linear(12, 20)
        self.fc2 = nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.head = nn.Linear(10, 12), nn.Linear(12, 5)
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor, **_: object) -> Tensor:
        x = self.lin0(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 10)


PLAIN: dict[str, Callable[[], nn.Module]] = {  # the others are transformers' models, saved with their config
    "linear": lambda: Net(nn.Linear(10, 6)),
    "Conv1D": lambda: Net(conv1d_of_transformers()),
    "embedding": lambda: Net(nn.Embedding(11, 6, padding_idx=2)),
    "conv1d": lambda: Net(nn.Conv1d(6, 9, 3, stride=2, padding=1)),
    "conv2d": lambda: Net(nn.Conv2d(4, 6, 3, padding=1)),
    "conv2d-grouped": lambda: Net(nn.Conv2d(4, 6, 3, groups=2)),
    "conv3d": lambda: Net(nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=1)),
    "norm": lambda: Net(nn.LayerNorm(10)),
    "mlp": MLP,
}


@cache
def stored_base(folder: Path) -> nn.Module:
    """Return the base model that a folder holds, in eval mode."""
    if folder.name in PLAIN:
        model = PLAIN[folder.name]()
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        return model.eval()
    import transformers

    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model = cls.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    return model.eval()


def base_at(folder: Path) -> nn.Module:
    """Return a copy of the base model that a folder holds; its name is the folder's."""
    model = models.clone(stored_base(folder), {})
    if hasattr(model, "name_or_path"):
        model.name_or_path = folder.name
    return model


def inputs_at(folder: Path) -> dict[str, Tensor]:
    """Return the inputs that stand next to a base model."""
    return safetensors.torch.load_file(folder / "inputs.safetensors")


# adapters


def load(case: Case, root: Path) -> Any:
    """Load the adapters of a case onto its base, the last of which is active; return the model in eval mode."""
    model: Any = base_at(root / BASES / case["base"])
    if case["config"]:
        model.config.update(case["config"])
    mixed = case["reader"] == "mixed"
    for number, (name, path) in enumerate(case["adapters"]):
        if case["reader"] == "foreign":
            model = graft.load_adapter(model, root / path, name)
        elif number:
            model.load_adapter(root / path, name)
        else:
            model = (graft.PeftMixedModel if mixed else graft.PeftModel).from_pretrained(model, root / path, name)
    if len(case["adapters"]) > 1:
        model.set_adapter(case["adapters"][-1][0])
    return model.eval()


@torch.no_grad()
def run(model: Any, case: Case, root: Path) -> Tensor:
    """Return the output of the call of a case."""
    call = {key: torch.tensor(v["tensor"]) if isinstance(v, dict) else v for key, v in case["call"].items()}
    return models.output(model, inputs_at(root / BASES / case["base"]) | call)


def sampled(output: Tensor) -> Tensor:
    """Return 64 numbers of an output, and the length of the whole."""
    flat = output.detach().double().flatten()
    picked = flat[:: max(1, flat.numel() // 64)][:64]
    return torch.cat([picked, flat.norm()[None]]).float()
