# SPDX-License-Identifier: Apache-2.0
"""Tests of packages that quantize models: test_<name>*.py, with what pip installs for them in <name>.txt.

`make test-storages` installs each into a folder of its own and runs its tests. `make test` leaves out the files
whose package cannot be imported. A line `# import a.b` in <name>.txt names what to import, where it is not <name>.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEMANDED = os.environ.get("GRAFT_TESTS_PACKAGE")  # its tests run, or fail


def module(name):
    lines = (HERE / f"{name}.txt").read_text().splitlines()
    return next((line.split()[-1] for line in lines if line.startswith("# import ")), name)


def is_there(module):
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


names = [file.stem for file in HERE.glob("*.txt")]
missing = [name for name in names if name != DEMANDED and not is_there(module(name))]
collect_ignore_glob = [f"test_{name}*.py" for name in missing]


# packages warn of each other in ways that change with their releases: only what graft says, to the test that called it,
# is an error here


def pytest_configure(config):
    if DEMANDED:
        config.addinivalue_line("filterwarnings", "ignore")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore", "error:::tests"))
