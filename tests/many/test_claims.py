# SPDX-License-Identifier: Apache-2.0
"""Two processes that would write one folder: the second is refused, until the first has ended, however that ends."""

from __future__ import annotations

import errno
import gc
import os
import signal
from pathlib import Path

import pytest

import graft
from graft.core.errors import FolderInUseError
from graft.many import MultiTrain
from graft.many.claims import LOCKS, Claims
from graft.many.sweep import TABLE
from tests.many.alone import SPECS, batches, started, tiny
from tests.many.test_sweep import swept
from tests.threads import in_child, start


def begun(*names):
    return started(names, 4)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and LOCKS not in path.parts}


def write_until_killed(folder: Path, pipe: int) -> None:
    """Save runs; then sweep to the second rung, write a byte into the pipe, and stop there."""
    runs = begun("plain")
    runs.step()
    runs.save(folder / "runs")
    step, calls = MultiTrain.step, []

    def standing(self):
        calls.append(None)
        if len(calls) == 4:  # in the second rung
            os.write(pipe, b".")
            signal.pause()
        return step(self)

    MultiTrain.step = standing
    swept(folder / "sweep", save_every=1)


def test_another_process_is_refused_until_the_first_is_killed(tmp_path):
    read, write = os.pipe()
    other = start(lambda: write_until_killed(tmp_path, write))
    os.close(write)
    try:
        assert os.read(read, 1) == b"."
        before, model, runs = files(tmp_path), tiny(), begun("wide", "plain")
        with pytest.raises(FolderInUseError, match=rf"Another process is writing '{TABLE}' in .*sweep, .* Let it end"):
            swept(tmp_path / "sweep", model=model)
        with pytest.raises(FolderInUseError, match="Another process is writing 's1'"):
            swept(tmp_path / "sweep", model=model, share=(1, 3), exchange=lambda rows: [rows])
        assert not any("lora" in name for name, _ in model.named_modules())
        for save in (runs.save, lambda folder: runs.run(save=folder)):
            with pytest.raises(FolderInUseError, match="'plain'"):
                save(tmp_path / "runs")
        assert files(tmp_path) == before and runs["wide"].step == 0
        begun("wide").run(save=tmp_path / "runs")  # others may be in there
        resumed = MultiTrain.resume(tiny(), tmp_path / "runs")  # and who reads
        assert resumed.add("plain", SPECS["plain"].config, **SPECS["plain"].options(4)).step == 1
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(read)
    runs.save(tmp_path / "runs")
    found, whole = swept(tmp_path / "sweep"), swept()
    assert found.rows == whole.rows and [t.curve for t in found.trials] == [t.curve for t in whole.trials]


def held(folder, *names):
    """Return which of these another process cannot have."""

    def taken(name):
        return in_child(lambda: Claims().claim(str(folder), [name])) != 0

    return [name for name in names if taken(name)]


def test_shares_of_a_sweep_stand_beside_each_other(tmp_path):
    """Two of three, from the view of another process."""
    seen = []

    def exchange(rows):
        seen.append(held(tmp_path, TABLE, *(f"s{i}" for i in range(6))))
        return [rows]

    with pytest.raises(IndexError):  # nobody plays the other share
        swept(tmp_path, share=(1, 3), exchange=exchange)
    with pytest.raises(IndexError):
        swept(tmp_path, share=(0, 2), exchange=exchange)
    assert seen == [["s1", "s4"], [TABLE, "s0", "s2", "s4"]] and not held(tmp_path, TABLE, "s1", "s4")


def test_within_a_process(tmp_path):
    """A sweep in a sweep is refused; runs may go on in another MultiTrain, as where a notebook begins anew."""
    with pytest.raises(FolderInUseError, match=f"This process is writing '{TABLE}' in {tmp_path}"):
        swept(tmp_path, data=lambda setting: swept(tmp_path) and batches(8))
    found = swept(tmp_path / "other")
    assert swept(tmp_path / "other").rows == found.rows
    runs = [begun("plain"), begun("plain")]
    for one in runs:
        one.save(tmp_path)
    assert held(tmp_path, "plain") == ["plain"]
    del runs[0], one
    gc.collect()
    assert held(tmp_path, "plain") == ["plain"]
    del runs
    gc.collect()
    assert held(tmp_path, "plain") == []


def test_who_lets_go(tmp_path):
    runs = begun("plain", "wide")
    runs.save(tmp_path)
    assert held(tmp_path, "plain", "wide", "other") == ["plain", "wide"]
    runs.remove("plain")
    assert held(tmp_path, "plain", "wide") == ["wide"]
    runs.unload()
    assert held(tmp_path, "plain", "wide") == []


def test_all_names_or_none(tmp_path):
    one, other = Claims(), Claims()
    one.claim(str(tmp_path), ["b"])
    with pytest.raises(FolderInUseError, match="'b'"):
        other.claim(str(tmp_path), ["a", "b"], alone=True)
    assert held(tmp_path, "a", "b") == ["b"]


def test_a_copy_of_the_process_holds_nothing(tmp_path):
    """As the workers of a loader, which may end before their parent or after it."""
    claims = Claims()
    claims.claim(str(tmp_path), ["a"])
    assert in_child(claims.release) == 0 and held(tmp_path, "a") == ["a"]
    assert in_child(lambda: claims.claim(str(tmp_path), ["a"])) != 0
    child = start(signal.pause)
    try:
        claims.release()
        assert held(tmp_path, "a") == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_where_nobody_can_write_there_is_nothing_to_claim(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    one, other = Claims(), Claims()
    with monkeypatch.context() as context:
        context.setattr(Path, "mkdir", refuse)
        one.claim(str(tmp_path), ["a"])
    other.claim(str(tmp_path), ["a"], alone=True)
    assert held(tmp_path, "a") == ["a"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_files_have_no_locks_it_says_so(tmp_path, monkeypatch, number):
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(graft.PeftWarning, match=f"{tmp_path} is on a file system without locks"):
        assert swept(tmp_path, rungs=1).best.state == "kept"
