# SPDX-License-Identifier: Apache-2.0
"""A tensor without values: facts are readable, all else raises."""

import torch

from graft.kernels.withheld import Withheld
from tests.raised import refuses


def test_facts_are_readable_and_operations_raise():
    like = torch.zeros(3, 5)[:, ::2]
    t = Withheld(like, lambda: KeyError("withheld"))
    assert (t.size(dim=1), t.stride(dim=1), t.size(), t.stride()) == (3, 2, (3, 3), (5, 2))
    for act in (lambda: t + 1, lambda: torch.cat([like, t]), lambda: torch.add(input=like, other=t)):
        refuses(KeyError, "withheld", act)
