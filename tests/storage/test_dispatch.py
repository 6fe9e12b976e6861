# SPDX-License-Identifier: Apache-2.0
"""Experts that transformers dispatches to processes (`ep_size`), here to the only one; `distributed/sharded.py` has
the laws of two.
"""

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import graft
from graft.core.errors import RoutingError
from tests.distributed.sharded import EXPERTS, expert_parallel
from tests.families import IDS, base
from tests.looks import layers
from tests.models import adapted
from tests.raised import refuses

pytest.importorskip("transformers.distributed.expert_parallel")
ROWS = ["one", "other"]


@pytest.fixture
def both():
    """A model with all experts in place, and one whose experts are dispatched; each with two adapters on stacks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = graft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
    yield [adapted(model, dict.fromkeys(ROWS, config)) for model in (base("mixtral"), expert_parallel())]
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", [None, ROWS, ["one", "one"]], ids=str)
def test_adapters_act_as_where_no_token_is_dispatched(both, rows):
    found = []
    for model in both:
        y = model(IDS, adapter_names=rows).logits
        y.sin().sum().backward()
        found.append({"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    expected, dispatched = found
    assert layers(both[1])["model.layers.0.mlp.experts.down_proj"].site.experts.dispatch is not None
    assert dispatched.keys() == expected.keys() and len(expected) > 1 and all(map(torch.any, expected.values()))
    for name, t in expected.items():
        assert_close(dispatched[name], t, rtol=1e-4, atol=1e-6)


def test_a_row_with_several_adapters_is_refused(both):
    rows = [graft.Average(*ROWS), "other"]
    refuses(RoutingError, "expert parallelism.*fsdp_size", both[1], IDS, adapter_names=rows)
