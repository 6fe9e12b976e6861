# SPDX-License-Identifier: Apache-2.0
"""The command `graft VERB`, the toolbox on a command line: a thin layer over `graft.files`.

It starts without torch: a verb imports the modules that it needs when it runs. Entry point: `main`.

- `app.py`: the list of verbs, their exit codes, and errors in one line.
- `show.py`: the options that all verbs share, tables and numbers as text.
- `models.py`: models for the verbs that run one, by transformers.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Run the command; leave the process with its exit code, 128 + the signal's number where one has ended it."""
    for number in STOPS:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, exit_on_signal)
    try:
        from graft.command import app  # after the handlers: it takes a while

        app.main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def exit_on_signal(number: int, _: FrameType | None) -> None:
    """End as an error does, so that what a verb has begun is cleared away."""
    sys.exit(128 + number)


__all__ = ["main"]
