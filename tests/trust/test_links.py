# SPDX-License-Identifier: Apache-2.0
"""A folder from elsewhere may hold links: nothing is written through one, and nothing it leads to gets published."""

from __future__ import annotations

import json
import os
import time

import pytest

import graft
from graft.config import atomic
from graft.many import MultiTrain, run_file
from graft.many.sweep import TABLE
from tests.many.alone import SPECS, tiny
from tests.many.test_sweep import swept
from tests.raised import refuses
from tests.threads import in_child
from tests.trust.folders import BIN, CARD, CONFIG, TENSORS, adapter, files, held, killed

SECRET = b"not for others"


@pytest.fixture
def places(tmp_path):
    """A folder to save to, and a file and a folder elsewhere that must stay as they are."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_bytes(SECRET)
    (tmp_path / "folder").mkdir()
    yield tmp_path / "folder", tmp_path / "elsewhere"
    assert files(tmp_path / "elsewhere") == {"secret": SECRET}


@pytest.mark.differs("symbolic links in the folder to save to")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("target", ["secret", "dangling", "loop"])
@pytest.mark.parametrize("name", [TENSORS, BIN, CONFIG, CARD])
def test_a_link_under_a_final_name_is_replaced(places, name, target, safe):
    folder, elsewhere = places
    (folder / name).symlink_to(folder / name if target == "loop" else elsewhere / target)
    adapter(2).save_pretrained(folder, safe_serialization=safe)
    assert held(folder) == (2, 2)
    own = [folder / n for n in (CONFIG, CARD, TENSORS if safe else BIN)]
    assert not any(path.is_symlink() or SECRET in path.read_bytes() for path in own)
    left = set(folder.iterdir()) - {*own}
    assert not left or (target != "secret" and left == {folder / name}), "what leads nowhere is no stale adapter"


@pytest.mark.parametrize("target", ["secret", "dangling"])
@pytest.mark.parametrize("name", [".tmp", ".old"])
def test_links_under_names_that_can_be_guessed(places, name, target):
    folder, elsewhere = places
    for final in (TENSORS, CONFIG, CARD):
        (folder / f"{final}{name}").symlink_to(elsewhere / target)
    adapter(1).save_pretrained(folder)
    adapter(2).save_pretrained(folder)
    assert held(folder) == (2, 2)


@pytest.mark.parametrize("target", ["secret", "dangling"])
def test_a_link_under_the_temporary_name_is_never_opened(places, monkeypatch, target):
    """Even if somebody guesses the random number."""
    folder, elsewhere = places
    monkeypatch.setattr("os.urandom", bytes)
    for of in (TENSORS, CONFIG):
        name = f".{of}.{atomic.machine_token()}-{os.getpid()}-{'0' * 16}.tmp"
        (folder / name).symlink_to(elsewhere / target)
        refuses(FileExistsError, None, adapter(2).save_pretrained, folder)
        assert set(files(folder)) <= {name}


def test_an_adapters_own_folder_may_not_be_a_link(places):
    folder, elsewhere = places
    for target in ("", "dangling"):
        (folder / "mine").symlink_to(elsewhere / target)
        refuses(graft.CheckpointError, r"'.*mine' is a symbolic link", adapter(2, "mine").save_pretrained, folder)
        (folder / "mine").unlink()
    (folder.parent / "link").symlink_to(folder)  # which the user names
    adapter(2).save_pretrained(folder.parent / "link")
    assert held(folder) == (2, 2)


def test_a_pipe_in_place_of_the_card_does_not_hang(places):
    folder, _ = places
    os.mkfifo(folder / CARD)
    with pytest.warns(graft.PeftWarning, match="a pipe, and stays as it is"):
        adapter(2).save_pretrained(folder)
    assert held(folder) == (2, 2) and (folder / CARD).is_fifo()


# folders of runs and sweeps


def begun():
    runs = MultiTrain(tiny())
    runs.add("plain", SPECS["plain"].config, **SPECS["plain"].options(4))
    return runs


def test_a_run_is_not_saved_through_a_link(places):
    folder, elsewhere = places
    for save in (lambda: begun().save(folder), lambda: begun().run(save=folder)):
        for link in ("plain", ".locks"):
            (folder / link).symlink_to(elsewhere)
            refuses(graft.CheckpointError, f"{link}' is a symbolic link", save)
            (folder / link).unlink()
        (folder / ".locks").mkdir()
        (folder / ".locks" / "plain.lock").symlink_to(elsewhere / "secret")
        refuses(graft.CheckpointError, "lock' is a symbolic link", save)
        (folder / ".locks" / "plain.lock").unlink()
        (folder / ".locks").rmdir()
    assert not [*folder.iterdir()]


@pytest.mark.parametrize("name", ["s0", "s4", TABLE, ".locks"])
def test_a_sweep_writes_and_deletes_nothing_through_a_link(places, name):
    folder, elsewhere = places
    (folder / name).symlink_to(elsewhere / ("secret" if name == TABLE else ""))
    refuses(graft.CheckpointError, f"{name}' is a symbolic link", swept, folder)
    assert {*os.listdir(folder)} - {".locks"} == {name} - {".locks"}  # files of locks stay


def test_a_table_of_others_names_no_folder_outside(places):
    """What a sweep deletes, and where it saves, follows from its own settings."""
    folder, elsewhere = places
    swept(folder)
    (elsewhere / run_file.FILE).write_bytes(SECRET)
    document = json.loads((folder / TABLE).read_text())
    for row in document["trials"]:
        row["name"] = "../elsewhere"
    (folder / TABLE).write_text(json.dumps(document))
    refuses(graft.CheckpointError, "rows of other names", swept, folder)
    assert (elsewhere / run_file.FILE).read_bytes() == SECRET
    run_file.delete_run("link", str(folder))
    (folder / "link").symlink_to(elsewhere)
    run_file.delete_run("link", str(folder))
    (elsewhere / run_file.FILE).unlink()  # which is there


# what processes leave behind


def name_of(of, machine, pid):
    return f".{of}.{machine}-{pid}-{'0' * 16}.tmp"


def test_left_over_files_are_cleared_and_not_followed(places):
    folder, elsewhere = places
    gone, here = 999_999_999, atomic.machine_token()
    cleared = [name_of(of, here, gone) for of in (TENSORS, CONFIG, CARD, "saving-1-2")]
    for name in cleared[:2]:
        (folder / name).write_bytes(b"x" * 100)
    (folder / cleared[2]).symlink_to(elsewhere / "secret")
    (folder / cleared[3]).symlink_to(elsewhere / "dangling")
    old = name_of(TENSORS, "00000000", 1)
    (folder / old).write_bytes(b"")
    os.utime(folder / old, (time.time() - 2 * atomic.LONGEST,) * 2)
    kept = [name_of(TENSORS, "00000000", 2), name_of(TENSORS, here, os.getpid()), name_of(TENSORS, here, 1)]
    kept += ["notes.tmp", f"{TENSORS}.tmp", ".hidden"]
    for name in kept:
        (folder / name).write_bytes(b"of others")
    adapter(2).save_pretrained(folder)
    assert set(os.listdir(folder)) == {TENSORS, CONFIG, CARD, *kept}
    assert all((folder / name).read_bytes() == b"of others" for name in kept)


def test_a_killed_process_leaves_what_the_next_save_clears(places, monkeypatch):
    folder, _ = places

    def run():
        monkeypatch.setattr("graft.io.files.write_safetensors", lambda *_: killed(None))
        adapter(1).save_pretrained(folder)

    assert in_child(run) == 9
    assert len(os.listdir(folder)) == 1
    adapter(2).save_pretrained(folder)
    assert set(os.listdir(folder)) == {TENSORS, CONFIG, CARD}
