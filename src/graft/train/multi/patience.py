# SPDX-License-Identifier: Apache-2.0
"""When a run stops: after some looks at its validation data without a new best."""

from __future__ import annotations

from graft.core.errors import ConfigError
from graft.train.multi.run import Run


class Patience:
    """Stops a run whose validation loss has no new best: `runs.add(…, valid=…, every=50, stop=Patience(5))`.

    Args:
        looks: so many looks in a row.
        least: by how much a loss has to be lower to be a new best.
    """

    def __init__(self, looks: int, least: float = 0.0):
        self.looks, self.least = looks, least

    def __call__(self, run: Run) -> bool:
        if run.validation is None or run.every is None:
            raise ConfigError(f"Run '{run.name}': Patience looks at validation data; give add() valid= and every=.")
        best, since = float("inf"), 0
        for look in run.valid:
            best, since = (look.loss, 0) if look.loss < best - self.least else (best, since + 1)
        return since >= self.looks
