# SPDX-License-Identifier: Apache-2.0
"""Any number of processes save into one folder, and others read it: each finds one adapter, whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import graft
from graft.config import atomic
from graft.io import files as adapter_files
from tests.covering import EVERYTHING
from tests.threads import in_child, start
from tests.trust.folders import BIN, CARD, CONFIG, TENSORS, adapter, files, held, killed, net

ROUNDS = 25 if EVERYTHING else 6


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Wait less for a save that was cut short."""
    monkeypatch.setattr("graft.config.pair.PATIENCE", 0.02, raising=False)


def ended(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def at_once(begin: Path) -> None:
    while not begin.exists():
        time.sleep(0.0005)


def writers(folder: Path, begin: Path, numbers: list[int], rounds: int, safe=lambda number: True) -> list[int]:
    """Start a process for each number, which saves the adapter of that number again and again once `begin` is there."""

    def write(number):
        at_once(begin)
        for _ in range(rounds):
            adapter(number).save_pretrained(folder, safe_serialization=safe(number))

    for number in numbers:
        adapter(number)
    return [start(lambda number=number: write(number)) for number in numbers]


def test_all_processes_of_a_job_save_the_same_adapter(tmp_path):
    adapter(1).save_pretrained(tmp_path / "alone")
    for turn in range(3):
        begin = tmp_path / f"begin{turn}"
        pids = writers(tmp_path / "folder", begin, [1, 1, 1, 1], ROUNDS // 3)
        begin.touch()
        assert ended(pids) == [0, 0, 0, 0], "without an error"
        assert files(tmp_path / "folder") == files(tmp_path / "alone"), "and without litter"


@pytest.mark.parametrize("numbers", [[1, 2], [1, 2, 3, 4]], ids=len)
def test_processes_save_different_adapters_and_one_is_left(tmp_path, numbers):
    for turn in range(ROUNDS // 2):
        folder, begin = tmp_path / "folder", tmp_path / f"begin{turn}"
        pids = writers(folder, begin, numbers, 1)
        begin.touch()
        assert ended(pids) == [0] * len(numbers)
        assert set(os.listdir(folder)) == {TENSORS, CONFIG, CARD}
        assert held(folder) in {(n, n) for n in numbers}


def test_processes_save_in_different_formats(tmp_path):
    for turn in range(ROUNDS // 2):
        folder, begin = tmp_path / "folder", tmp_path / f"begin{turn}"
        pids = writers(folder, begin, [1, 2, 3], 2, lambda number: number != 2)
        begin.touch()
        assert ended(pids) == [0, 0, 0]
        assert held(folder) in {(1, 1), (2, 2), (3, 3)}


@pytest.mark.differs("several processes that save into one folder, and readers beside them")
@pytest.mark.parametrize(
    "safe", [lambda n: True, lambda n: False, lambda n: n == 1], ids=["safetensors", "bin", "both"]
)
def test_a_reader_beside_writers_gets_one_adapter(tmp_path, safe, recwarn):
    folder, begin = tmp_path / "folder", tmp_path / "begin"
    adapter(1).save_pretrained(folder, safe_serialization=safe(1))
    pids = writers(folder, begin, [1, 2], ROUNDS, safe)
    begin.touch()
    seen, running = set(), set(pids)
    while running:
        seen.add(held(folder))
        running -= {pid for pid in running if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)}
    assert ended(pids) == [0, 0]
    assert seen <= {(1, 1), (2, 2)} and seen


# every order of two, one after the other


def saves_at(monkeypatch, name: str, before: bool, save) -> list[str]:
    """Let another save come when this process renames something to `name`."""
    real, came = os.replace, []

    def replace(source, target):
        mine = os.path.basename(target) == name and not came
        if mine:
            came.append(name)
            if before:
                save()
        real(source, target)
        if mine and not before:
            save()

    monkeypatch.setattr(os, "replace", replace)
    return came


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", [TENSORS, BIN, CONFIG])
@pytest.mark.parametrize("theirs", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("old", [True, False, None], ids=["over safetensors", "over bin", "over nothing"])
def test_a_save_within_a_save(tmp_path, monkeypatch, before, name, theirs, old):
    if old is not None:
        adapter(1).save_pretrained(tmp_path, safe_serialization=old)

    def save():
        adapter(3).save_pretrained(tmp_path, safe_serialization=theirs)

    with monkeypatch.context() as patch:
        assert not saves_at(patch, name, before, save)
        adapter(2).save_pretrained(tmp_path, safe_serialization=name != BIN)
    assert held(tmp_path) in {(2, 2), (3, 3)}
    assert not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


@pytest.mark.parametrize("then", ["before", "after"])
def test_a_save_that_was_overtaken_and_killed(tmp_path, then):
    """Its config would stand beside the other's weights: the mark tells."""
    adapter(1).save_pretrained(tmp_path)

    def run():
        real = os.replace

        def replace(source, target):
            if os.path.basename(target) == CONFIG:
                os.replace = real
                adapter(3).save_pretrained(tmp_path)
                if then == "after":
                    real(source, target)
                killed(None)
            real(source, target)

        os.replace = replace
        adapter(2).save_pretrained(tmp_path)

    assert in_child(run) == 9
    assert held(tmp_path) == (3, 3)
    assert graft.PeftConfig.from_pretrained(tmp_path).lora_alpha == 3
    adapter(2).save_pretrained(tmp_path)
    assert held(tmp_path) == (2, 2) and len(os.listdir(tmp_path)) == 3


def test_a_save_that_was_overtaken_twice_and_killed(tmp_path):
    """It puts right the config for the second save while a third one comes."""
    adapter(1).save_pretrained(tmp_path)

    def run():
        real, others = os.replace, [4, 3]

        def replace(source, target):
            if os.path.basename(target) != CONFIG:
                return real(source, target)
            os.replace = real
            adapter(others.pop()).save_pretrained(tmp_path)
            os.replace = replace
            real(source, target)
            if not others:
                killed(None)

        os.replace = replace
        adapter(2).save_pretrained(tmp_path)

    assert in_child(run) == 9
    assert held(tmp_path) == (4, 4)


def test_weights_that_others_of_a_better_format_replaced_while_they_were_read(tmp_path, monkeypatch):
    adapter(2).save_pretrained(tmp_path)
    before = (tmp_path / CONFIG).read_bytes()
    adapter(1).save_pretrained(tmp_path, safe_serialization=False)
    os.link(tmp_path / BIN, tmp_path / "kept")
    (tmp_path / CONFIG).write_bytes(before)  # the second save has yet to replace it
    real = adapter_files.load_weights

    def load(*args, **options):
        made = real(*args, **options)
        adapter(2).save_pretrained(tmp_path)
        os.link(tmp_path / "kept", tmp_path / BIN)  # as if it had come back from a save at the same time
        return made

    with monkeypatch.context() as patch:
        patch.setattr(adapter_files, "load_weights", load)
        assert held(tmp_path) == (1, 1)
    assert held(tmp_path) == (2, 2)


@pytest.mark.parametrize("old", [True, False, None], ids=["safetensors", "bin", "PEFT's"])
@pytest.mark.parametrize("new", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("when", ["before the weights", "after the weights", "between the formats"])
def test_a_save_within_a_load(tmp_path, monkeypatch, recwarn, old, new, when):
    adapter(1).save_pretrained(tmp_path, safe_serialization=old is not False)
    if old is None:
        import peft

        peft.PeftModel.from_pretrained(net(), tmp_path).save_pretrained(tmp_path)
    came = []

    def save():
        if not came:
            came.append(True)
            adapter(2).save_pretrained(tmp_path, safe_serialization=new)

    with monkeypatch.context() as patch:
        if when == "between the formats":
            for name in ("read_safetensors", "read_torch"):
                real = getattr(adapter_files, name)
                patch.setattr(adapter_files, name, lambda *a, real=real, **k: (save(), real(*a, **k))[1])
        else:
            real = adapter_files.load_weights

            def load(*args, **options):
                if when == "before the weights":
                    save()
                made = real(*args, **options)
                save()
                return made

            patch.setattr(adapter_files, "load_weights", load)
        first = held(tmp_path)
    assert came and first in {(1, 1), (2, 2)} and held(tmp_path) == (2, 2)
    assert not [w for w in recwarn if "saved with" in str(w.message) or "cut short" in str(w.message)]


def test_a_temporary_file_of_a_living_process_is_not_touched(tmp_path, monkeypatch):
    theirs = []

    def run(path):
        theirs.extend(n for n in os.listdir(tmp_path) if n.endswith(".tmp"))
        assert in_child(lambda: adapter(3).save_pretrained(tmp_path)) == 0
        assert set(theirs) <= set(os.listdir(tmp_path))

    atomic.replace_file(str(tmp_path / "mine"), run)
    assert len(theirs) == 1 and held(tmp_path) == (3, 3)
