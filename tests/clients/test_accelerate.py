# SPDX-License-Identifier: Apache-2.0
"""`accelerate launch` on two processes, with a script that imports `peft`: graft runs it by `-m graft.compat.peft`."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.clients import tiny
from tests.clients.pair import ROOT, scenario


@scenario
def test_two_processes(folder):
    """DDP over gloo: losses of both, values equal on both, saved once, a state saved and loaded."""
    import torch

    script = [str(ROOT / "tests/clients/launched.py"), str(folder)]
    if tiny.library() == "graft":
        script = ["-m", "graft.compat.peft", *script]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    options = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *options, *script],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    found = torch.load(folder / "found.pt", weights_only=True)
    (folder / "found.pt").unlink()
    assert found["kind"] == ["MULTI_CPU", 2, "DistributedDataParallel"]
    assert found["equal on all"] == [True, True]
    assert found["losses"][-1] != found["losses"][0]
    return {**found, "files": tiny.held(folder)}
