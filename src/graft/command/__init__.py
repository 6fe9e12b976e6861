# SPDX-License-Identifier: Apache-2.0
"""The command `graft VERB`: a thin layer over `graft.files`.

It starts without torch: a verb imports its modules when it runs. Entry point: `main`.

- `app.py`: the list of verbs, exit codes, and errors as one line.
- `show.py`: tables, numbers and lines as text.
- `models.py`: loads models with transformers, for the verbs that run one.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Run `app.main`, imported after the signal handlers are set.

    SIGTERM and SIGHUP exit with 128 + the signal's number (`exit_on_signal`), unless their handler is not the default
    one. Ctrl-C exits with 130.
    """
    for number in STOPS:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup makes the process ignore SIGHUP
            signal.signal(number, exit_on_signal)
    try:
        from graft.command import app  # after the handlers are set, since the import is slow

        app.main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def exit_on_signal(number: int, _: FrameType | None) -> None:
    """Raise SystemExit with 128 + the signal's number, so that `finally` blocks delete unfinished files."""
    sys.exit(128 + number)


__all__ = ["main"]
