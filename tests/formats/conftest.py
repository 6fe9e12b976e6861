# SPDX-License-Identifier: Apache-2.0
"""Tests with the packages of other formats, in an environment of their own: `make test-formats`."""

import os

collect_ignore_glob = [] if os.environ.get("GRAFT_TESTS_FORMATS") else ["test_*.py"]
