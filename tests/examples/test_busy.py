# SPDX-License-Identifier: Apache-2.0
"""The demos where other processes run, and where no terminal shows their progress."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from examples import cores
from examples.demo import display

ROOT = Path(__file__).parents[2]
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
ASK = "import examples.demo, os, torch; print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'])"


def ask(**settings: str) -> list[str]:
    """Return the threads of torch, and how they wait, in a process with these settings."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=kept | settings, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


# threads


@pytest.mark.parametrize(
    "allowed, machine, load, expected",
    [
        (2, 2, 0.0, 2),
        (2, 2, 0.4, 2),
        (2, 2, 0.6, 1),  # another process has a core
        (2, 2, 1.0, 1),
        (2, 2, 20.0, 1),
        (1, 2, 0.0, 1),  # a container of one core
        (4, 64, 40.0, 4),  # enough are idle
        (4, 64, 62.0, 2),
    ],
)
def test_threads_are_those_that_find_a_core(allowed, machine, load, expected):
    assert cores.threads(allowed, machine, load) == expected


def test_a_program_on_a_busy_machine_takes_one_thread(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "load", lambda: 50.0 + (os.cpu_count() or 1))
    monkeypatch.delitem(sys.modules, "torch")
    settings: dict[str, str] = {}
    cores.settle(settings)
    assert settings == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def test_torch_obeys_what_is_settled_before_it_is_loaded():
    threads, waiting = ask()
    assert waiting == "PASSIVE"
    assert 1 <= int(threads) <= cores.allowed()


@pytest.mark.slow
def test_what_the_user_has_set_stays():
    every = str(cores.allowed())  # torch takes no more than there are
    assert ask(OMP_NUM_THREADS=every, OMP_WAIT_POLICY="ACTIVE") == [every, "ACTIVE"]
    assert ask(OMP_NUM_THREADS="1")[0] == "1"


def test_a_program_that_has_loaded_torch_keeps_its_threads():
    settings: dict[str, str] = {}
    cores.settle(settings)
    assert settings == {}


@pytest.mark.parametrize("text, expected", [("200000 100000", 2), ("150000 100000", 1.5), ("max 100000", sys.maxsize)])
def test_the_quota_of_a_container(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert cores.quota(tmp_path) == expected


@pytest.mark.parametrize("quota, expected", [("50000", 0.5), ("-1", sys.maxsize)])
def test_the_quota_of_an_older_container(tmp_path, quota, expected):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.quota(tmp_path) == expected


def test_no_control_groups_no_limit(tmp_path, monkeypatch):
    assert cores.quota(tmp_path) == sys.maxsize
    (tmp_path / "cpu.max").write_text("100000 100000")
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    assert cores.allowed() == 1


# progress


@pytest.fixture
def plain(monkeypatch):
    """What the demos print, where it is not a terminal."""
    text = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=text, width=120))
    return text


def test_without_a_terminal_lines_come_at_intervals(plain):
    now = 0.0
    with display.Steps("training", 60, clock=lambda: now) as shown:
        for step in range(1, 60):
            now += 1.0
            shown.update(step, f"loss {1 / step:.2f}")
            if step == 30:
                halfway = plain.getvalue()
        now += 1.0
        shown.update(60, "loss 0.02")
    lines = plain.getvalue().splitlines()
    assert lines[0] == "training: 0/60, 0 s"
    assert lines[1] == "training: 10/60, loss 0.10, 10 s"
    assert lines[-1] == "training: 60/60, loss 0.02, 60 s"
    assert len(lines) == 7, "one at the start, and one every ten seconds; none twice"
    assert halfway.count("\n") == 4, "they come while it runs"


def test_a_run_that_fails_says_how_far_it_came(plain):
    with pytest.raises(RuntimeError), display.Steps("training", 5) as shown:
        shown.update(2, "loss 0.5")
        raise RuntimeError
    assert plain.getvalue().splitlines()[-1].startswith("training: 2/5, loss 0.5")


def test_losses_are_collected_on_the_way(plain):
    assert display.progress(iter([0.5, 0.25]), "spam", 2) == [0.5, 0.25]
    assert "training spam: 2/2, loss 0.250" in plain.getvalue()


def test_what_takes_long_is_said_before_it_starts(plain):
    with display.waiting("reading"):
        assert plain.getvalue() == "reading …\n"


def test_a_terminal_has_a_bar(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=text, width=120, force_terminal=True))
    assert display.progress(iter([0.5, 0.25]), "spam", 2) == [0.5, 0.25]
    assert "━" in text.getvalue() and "2/2" in text.getvalue() and "loss 0.250" in text.getvalue()
