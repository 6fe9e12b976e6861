# SPDX-License-Identifier: Apache-2.0
"""The command in this process, for tests that need no process of their own."""

import sys

import pytest

from graft.command import app


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command with words, and returns its exit code, its output and its errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as left:
            app.main()
        return left.value.code or 0, *capsys.readouterr()

    return call
