# SPDX-License-Identifier: Apache-2.0
"""Trainer with `graft.train.Resumable` on two processes: a resumed training has the bits of one that went on."""

from tests.distributed.processes import run


def test_copies_and_parts_on_two_processes(tmp_path):
    found = run("tests.distributed.resumed_trainer", tmp_path)
    assert found == dict.fromkeys(["ddp", "untold", "fsdp2", "fsdp2-before"], ""), found
