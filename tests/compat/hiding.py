# SPDX-License-Identifier: Apache-2.0
"""An environment without PEFT, for processes of tests: the package is there, and nobody finds it."""

import sys
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder


class Without(PathFinder):
    """Python's own finder, but for peft."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] == "peft" else PathFinder.find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, context=DistributionFinder.Context()):  # noqa: B008
        return (d for d in PathFinder.find_distributions(context) if (d.metadata["Name"] or "").lower() != "peft")


def hide() -> None:
    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
