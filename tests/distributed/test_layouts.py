# SPDX-License-Identifier: Apache-2.0
"""Layouts of several processes, each against one process: `make test-distributed` runs them all.

One test starts two processes, which run all checks of its layouts: imports take longer than the checks.
"""

import os

import pytest

from tests.distributed.checks import checks_of
from tests.distributed.processes import run

QUICK = [("ddp", "fsdp2")]
OTHERS = [
    ("fsdp2-kept", "fsdp2-checkpointing", "fsdp2-mixed", "fsdp2-offload"),
    ("fsdp1", "fsdp1-flat"),
    ("zero2", "zero3"),
]
DEEPSPEED = os.environ.get("GRAFT_DEEPSPEED", "")  # the folder it is in, apart from the other packages


@pytest.mark.parametrize("layouts", [*QUICK, *(OTHERS if DEEPSPEED else ())], ids="-".join)
def test_layouts(layouts, tmp_path):
    path = os.pathsep.join(filter(None, [DEEPSPEED and os.path.abspath(DEEPSPEED), os.environ.get("PYTHONPATH")]))
    variables = dict(GRAFT_PATIENCE="5", DS_ACCELERATOR="cpu", PYTHONPATH=path)
    found = run("tests.distributed.checks", tmp_path, *layouts, timeout=420, **variables)
    failed = {name: text for name, text in found.items() if text}
    assert not failed, "\n\n".join(f"{name}\n{text}" for name, text in failed.items())
    assert list(found) == [name for layout in layouts for name, _ in checks_of(layout)]
