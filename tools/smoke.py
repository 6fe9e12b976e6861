# SPDX-License-Identifier: Apache-2.0
"""A user's first minute with an installed graft: run by `make dist` outside of the source tree, with no extra."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import tempfile
import warnings

import torch
from torch import nn

import graft

EXTRAS = {"sklearn", "transformers"}  # what a module may miss when graft alone is installed
OURS = ("benchmarks", "examples", "tests", "tools")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def installed() -> None:
    """graft comes from where packages are installed, under one version, and brings nothing else."""
    assert "site-packages" in graft.__file__, f"graft came from {graft.__file__}, not from what was installed"
    assert graft.__version__ == importlib.metadata.version("graft-adapters")
    assert any(str(file).endswith("graft/py.typed") for file in importlib.metadata.files("graft-adapters") or ())
    for name in OURS:
        assert importlib.util.find_spec(name) is None, f"{name} was installed beside graft"


def imports() -> int:
    """Every module imports with the declared dependencies, or misses what an extra brings."""
    names = [module.name for module in pkgutil.walk_packages(graft.__path__, "graft.")]
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in EXTRAS:
                raise
    return len(names)


def story() -> None:
    """An adapter is made, trained, saved, loaded into a fresh base and merged; outputs agree."""
    x = torch.randn(5, 8)
    model = graft.get_peft_model(tiny(), graft.LoraConfig(r=2, target_modules=["first", "second"]))
    torch.testing.assert_close(model(x), tiny()(x))  # a fresh adapter changes nothing
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    wanted = model.eval()(x)
    assert not torch.allclose(wanted, tiny()(x)), "training changed nothing"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = graft.PeftModel.from_pretrained(tiny(), folder)
    torch.testing.assert_close(loaded(x), wanted)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, Tiny) and type(merged.first) is nn.Linear
    torch.testing.assert_close(merged(x), wanted)


def check_device() -> None:
    """`graft device-report` needs no tests: its laws hold for LoRA, on the CPU."""
    from graft.command import device_checks

    device_checks.METHODS = {"LORA": graft.LoraConfig}
    results = device_checks.check_device(torch.device("cpu"), print)
    assert not results["failed"] and not results["skipped"] and results["passed"] == 13, results


if __name__ == "__main__":
    warnings.simplefilter("error", graft.PeftWarning)  # nothing here deserves one
    installed()
    story()
    check_device()
    print(f"graft {graft.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}: {imports()} modules")
