# SPDX-License-Identifier: Apache-2.0
"""`accelerate launch` on two processes, with a script that imports `peft`: graft runs it by `-m graft.compat.peft`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.clients import tiny
from tests.clients.pair import ROOT, scenario


def launch(name: str, folder: Path) -> dict:
    """Run a script of this folder on two processes, and return what it found."""
    import torch

    script = [str(ROOT / "tests/clients" / name), str(folder)]
    if tiny.library() == "graft":
        script = ["-m", "graft.compat.peft", *script]
    begin = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    options = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    done = subprocess.run(
        [sys.executable, "-m", *begin, *options, *script],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    found = torch.load(folder / "found.pt", weights_only=True)
    (folder / "found.pt").unlink()
    return found


@scenario
def test_two_processes(folder):
    """DDP over gloo: losses of both, values equal on both, saved once, a state saved and loaded."""
    found = launch("launched.py", folder)
    assert found["kind"] == ["MULTI_CPU", 2, "DistributedDataParallel"]
    assert found["equal on all"] == [True, True]
    assert found["losses"][-1] != found["losses"][0]
    return {**found, "files": tiny.held(folder)}


@scenario
def test_sft_on_a_base_sharded_at_load(folder):
    """SFTTrainer with accumulation and clipping: losses, norms, values equal on both processes, and the file."""
    found = launch("sharded.py", folder)
    assert found["sharded"] == ["DTensor"] and found["equal on all"] == [True, True]
    return {**found, "saved": tiny.held(folder / "saved")}
