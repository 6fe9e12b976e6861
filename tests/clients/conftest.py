# SPDX-License-Identifier: Apache-2.0
"""Tests with the real clients of PEFT: `make test-clients` installs them apart; other runs skip these tests."""

import os
from pathlib import Path

import pytest

from tests.clients.pair import Pair

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if not os.environ.get("GRAFT_TESTS_CLIENTS"):
        for item in items:
            if item.path.parent == HERE and "pair" in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason="`make test-clients` runs it"))


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """Two processes that run the selected scenarios of a file."""
    names = [item.originalname for item in request.session.items if item.getparent(pytest.Module) is request.node]
    running = Pair(request.module.__name__, names, tmp_path_factory.mktemp("pair"))
    yield running
    running.end()
