# SPDX-License-Identifier: Apache-2.0
"""The frame of the command: every kind of error has its exit code, and one line of text."""

import pytest

from graft.command import app
from graft.core.errors import BaseModelMismatchError, CheckpointError, ConfigError, PeftError
from graft.files.errors import BaseNeededError, LossError, OutputExistsError


@pytest.mark.parametrize(
    "error, code",
    [(CheckpointError, 3), (BaseModelMismatchError, 4), (LossError, 5), (OutputExistsError, 2), (ConfigError, 3),
     (PeftError, 1), (FileNotFoundError, 3), (BaseNeededError, 2)],
)  # fmt: skip
def test_an_error_is_one_line_and_a_code(error, code, monkeypatch, capsys):
    def fail(**_):
        raise error("what is wrong")

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(app, "VERBS", ())
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == code
    assert capsys.readouterr().err == "graft: what is wrong\n"


def test_other_errors_are_bugs_and_show_their_trace(monkeypatch):
    monkeypatch.setattr(app, "app", lambda **_: 1 // 0)
    monkeypatch.setattr(app, "VERBS", ())
    with pytest.raises(ZeroDivisionError):
        app.main()
