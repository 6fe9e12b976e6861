# SPDX-License-Identifier: Apache-2.0
"""Averages of gradients on a sharded base, and its store, as one process sees them; tests/distributed has several."""

import gc
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graft
from graft.inject.parts import get_registry
from graft.model import averaging
from graft.model.averaging import MARK, Averager
from graft.storage.fsdp2 import Sharding
from graft.storage.meeting import Meeting
from tests.leaves_out import FSDP2_ON_CPUS

GROUP = object()
CONFIG = dict(r=2, target_modules=["up", "down"], init_lora_weights=False)


def net():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.up, model.down = nn.Linear(8, 6), nn.Linear(6, 4)
    return model


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def halves(monkeypatch):
    """A model with an averager, and the row of numbers that a second process adds to its own."""
    model = graft.get_peft_model(net(), graft.LoraConfig(**CONFIG)).train()
    registry, rows = get_registry(model), []
    sums = lambda row, group: (rows.append(row.clone()), row.add_(theirs(row)))
    theirs = lambda row: torch.zeros_like(row)
    monkeypatch.setattr(averaging.dist, "all_reduce", lambda row, group: sums(row, group))
    monkeypatch.setattr(averaging.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(Averager, "agree", lambda self: None)
    registry.averager = Averager(registry, Sharding([], [0, 1], [], [GROUP]))
    registry.averager.find_parameters()
    return model, registry.averager, rows


def test_a_pass_has_one_sum_of_all_gradients_and_a_flag_for_each(halves):
    model, averager, rows = halves
    one = graft.get_peft_model(net(), graft.LoraConfig(**CONFIG)).train()
    one.load_state_dict(model.state_dict())
    x = torch.randn(3, 8)
    for m in (one, model):
        m(x).square().sum().backward()
    parameters = averager.parameters
    assert len(rows) == 1 and len(rows[0]) == sum(p.numel() for p in parameters) + len(parameters)
    assert all(getattr(p, MARK) for p in parameters)
    for a, b in zip(one.parameters(), model.parameters()):
        assert a.grad is None or torch.allclose(a.grad / 2, b.grad)  # the other process has zeros
    model.get_base_model()(x).sum().backward()  # a call that the PeftModel does not see
    assert len(rows) == 2


def test_a_gradient_that_nobody_has_stays_none(halves, monkeypatch):
    _, averager, _ = halves
    A, B, *others = averager.parameters
    A.grad = torch.ones_like(A)
    averager._on_end()
    assert torch.equal(A.grad, torch.full_like(A, 0.5)) and all(p.grad is None for p in (B, *others))

    def add(row, group):
        row[A.numel() : A.numel() + B.numel()] += 3
        row[-len(averager.parameters) + 1] += 1  # the flag of B

    monkeypatch.setattr(averaging.dist, "all_reduce", add)
    averager._on_end()
    assert torch.equal(B.grad, torch.full_like(B, 1.5)) and all(p.grad is None for p in others)


def test_half_precision_is_summed_in_float32(halves):
    _, averager, rows = halves
    A, B, *_ = averager.parameters
    for p in (A, B):
        p.data = p.data.half()
        p.grad = torch.full_like(p, 60_000.0)
    averager._on_end()
    assert [row.dtype for row in rows] == [torch.float32]
    assert A.grad.dtype == torch.float16 and torch.equal(A.grad, torch.full_like(A, 30_000.0))


def test_a_pass_that_breaks_off_is_forgotten(halves):
    model, averager, rows = halves
    y = model(torch.randn(3, 8))
    averager._on_end, end = lambda: None, averager._on_end  # as if autograd had raised before the end
    y.sum().backward()
    averager._on_end = end
    assert averager.follows and not rows
    model(torch.randn(3, 8)).sum().backward()
    assert len(rows) == 1 and not averager.follows


def test_an_unsynchronized_pass_waits_for_the_next(halves):
    model, averager, rows = halves
    averager.sharding.parameter_groups.append(unit := type("Group", (), {"reduce_grads": False, "fsdp_params": ()})())
    for syncs in (False, True):
        unit.reduce_grads = syncs
        model(torch.randn(3, 8)).sum().backward()
    assert len(rows) == 1


@FSDP2_ON_CPUS
@pytest.mark.parametrize("method", [graft.LoraConfig, lambda **config: graft.LoraConfig(use_dora=True, **config)])
def test_a_sharded_base_merges_after_a_call_that_left_it_whole(group, method):
    from torch.distributed.fsdp import fully_shard

    base = net()
    fully_shard(base.up)
    fully_shard(base, reshard_after_forward=False)
    model, x = graft.get_peft_model(base, method(**CONFIG)).eval(), torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)  # the outer unit keeps its weights whole
        model.merge_adapter()
        assert torch.allclose(model(x), before, atol=1e-6)
        model.unmerge_adapter()
        assert torch.equal(model(x), before)
        plain = model.merge_and_unload()
        assert torch.allclose(plain(x), before, atol=1e-6)


@FSDP2_ON_CPUS
@pytest.mark.parametrize(  # DoRA's start reads weights
    "more", [{}, {"use_dora": True}, {"bias": "all"}], ids=["LORA", "DORA", "biases"]
)
def test_a_base_that_was_called_before_is_frozen_in_both_forms(group, more):
    from torch.distributed.fsdp import fully_shard

    base, x = net(), torch.randn(3, 8)
    fully_shard(base.up)
    fully_shard(base, reshard_after_forward=False)
    base(x)  # the outer unit keeps its weights whole
    model = graft.get_peft_model(base, graft.LoraConfig(**CONFIG, **more)).train()
    model(x).sum().backward()
    names = [name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None]
    assert names and all("lora_" in name or ("bias" in more and name.endswith("bias")) for name in names)
    assert any(name.endswith("bias") for name in names) == ("bias" in more)
    base.reshard()
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(p.requires_grad for p in model.unload().parameters())


@FSDP2_ON_CPUS
def test_adapters_without_a_peft_model_are_averaged(group, monkeypatch):
    from torch.distributed.fsdp import fully_shard

    model, sums = fully_shard(net()), []
    monkeypatch.setattr(Averager, "_average", lambda self, parameters, *_: sums.append(len(parameters)))
    for i, name in enumerate(("a", "b"), 1):
        model = graft.inject_adapter_in_model(graft.LoraConfig(**CONFIG), model, name).train()
        gc.collect()  # no tuner is left
        model(torch.randn(3, 8)).sum().backward()
        assert len(sums) == i


@FSDP2_ON_CPUS
def test_hooks_keep_no_model_in_memory(group):
    from torch.distributed.fsdp import fully_shard

    model = graft.get_peft_model(fully_shard(net()), graft.LoraConfig(**CONFIG)).train()
    model(torch.randn(3, 8)).sum().backward()
    kept = [ref(model), ref(next(p for p in model.parameters() if p.requires_grad))]
    del model
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_a_meeting_tells_who_came_with_a_text(monkeypatch):
    shelf = dist.HashStore()
    monkeypatch.setattr("graft.storage.meeting.get_store", lambda: shelf)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    meetings = [Meeting("a call", text, [0], compares=False) for text in ("", "no gradient")]
    assert [meeting.list_ranks_with_task() for meeting in meetings] == [[], [0]]
    keys = shelf.num_keys()
    meetings[0].clear()
    assert shelf.num_keys() < keys and meetings[1].list_ranks_with_task() == [0]
