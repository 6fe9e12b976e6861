# SPDX-License-Identifier: Apache-2.0
"""Trainer with `graft.train.Resumable` on two processes: a resumed training has the bits of one that went on."""

from tests.distributed.processes import started
from tests.distributed.run import free_port


def test_copies_and_parts_on_two_processes(tmp_path):
    module, port = "tests.distributed.resumed_trainer", str(free_port())
    command = lambda rank: ["tests.distributed.processes", module, str(tmp_path), str(rank), "2"]
    found = started(command, tmp_path, 2, 300, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert found == dict.fromkeys(["ddp", "untold", "fsdp2", "fsdp2-before"], ""), found
