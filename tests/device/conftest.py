# SPDX-License-Identifier: Apache-2.0
"""Tests on a device that is not the CPU: a simulated one, or with `GRAFT_TESTS_DEVICE=cuda` the real one."""

import os
from pathlib import Path

import pytest

from tests.device import simulated

REAL = os.environ.get("GRAFT_TESTS_DEVICE")
HERE = Path(__file__).parent


def missing() -> str | None:
    """Return the reason for which there is no device, or None."""
    if not REAL:
        return simulated.WHY_NOT
    import torch  # not where the file is read: the process that only gives out tests needs none

    return None if getattr(torch, REAL).is_available() else f"this machine has no device '{REAL}'"


def pytest_collection_modifyitems(items):
    why = missing()
    for item in items:
        if HERE in item.path.parents and why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def seeded():
    if missing() is None:
        import torch

        getattr(torch, REAL or "cuda").manual_seed_all(0)
