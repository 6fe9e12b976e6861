# SPDX-License-Identifier: Apache-2.0
"""Banks: Parameters keep their names and values, gradients come to their rows, and who does not fit is left out."""

import pytest
import torch
from torch.nn.utils import get_total_norm

from graft.many.bank import Banks
from tests.model import test_isolation
from tests.model.test_isolation import Run, lora
from tests.models import seeded

RUNS = {name: Run(lora()) for name in "uvw"}


def model_with(runs):
    model = test_isolation.model_with(runs)
    model.set_requires_grad(list(runs))
    return model


def banks_of(model, names):
    named = {name: [p for _, p in model.adapter_parameters(name)] for name in names}
    return Banks({name: (own[::-1], own) for name, own in named.items()}, (*model.parameters(), *model.buffers()))


def test_parameters_keep_names_and_values():
    model = model_with(RUNS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    banks = banks_of(model, RUNS)
    (bank,) = banks.banks
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    inside = {bank.values.untyped_storage().data_ptr()}
    assert {p.untyped_storage().data_ptr() for row in banks.rows.values() for p in row.parameters} == inside
    assert all((p.data_ptr() - bank.values.data_ptr()) % 64 == 0 for p in banks.rows["v"].parameters)
    banks.separate_memory()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {p.untyped_storage().data_ptr() for row in banks.rows.values() for p in row.parameters}.isdisjoint(inside)


def test_what_follows_what():
    model = model_with(RUNS)
    banks = banks_of(model, RUNS)
    (u, v, w), other = ([row.parameters[k] for row in banks.rows.values()] for k in (0, 1))
    assert banks.follows(u, v) and banks.follows(v, w)
    assert not banks.follows(u, w) and not banks.follows(v, u) and not banks.follows(u, other[1])
    stack = banks.stack(v, 2)
    assert stack.is_leaf and stack.requires_grad and all(map(torch.equal, stack, (v, w)))
    assert stack is banks.stack(v, 2)


def test_gradients_come_from_stacks_and_from_parameters():
    model = model_with(RUNS)
    banks = banks_of(model, RUNS)
    banks.drop_gradients("uv")
    first, second = (banks.rows["u"].parameters[k] for k in (0, 1))
    (banks.stack(first, 2).sum() + 2 * first.sum() + 3 * second.sum()).backward()
    banks.collect_gradients("uv")
    u, v = banks.rows["u"], banks.rows["v"]
    assert u.gradients[0].unique().tolist() == [3] and u.gradients[1].unique().tolist() == [3]
    assert v.gradients[0].unique().tolist() == [1]
    assert (sum(u.received), sum(v.received), u.is_complete) == (2, 1, False)
    assert first.grad is None
    kept = u.copy_gradients()
    banks.drop_gradients("uv")
    first.sum().backward()
    banks.collect_gradients("uv")
    u.add_gradients(kept)
    assert [u.gradients[k].unique().tolist() for k in (0, 1)] == [[4], [3]] and sum(u.received) == 2


def test_norms_have_the_bits_of_torch():
    model = model_with({name: Run(lora(r=5)) for name in "uvw"})
    banks = banks_of(model, "uvw")
    with seeded(1):
        for row in banks.rows.values():
            for gradient in row.gradients:
                gradient.normal_()
            row.received = [True] * len(row.received)
    expected = [get_total_norm([row.gradients[i] for i in row.model_order]) for row in banks.rows.values()]
    assert all(map(torch.equal, banks.compute_norms(dict.fromkeys("uvw", True)), expected))
    assert torch.equal(banks.compute_norms({"v": True})[0], expected[1])
    for names in ("uvw", "wu", "v"):
        found = dict(zip(names, banks.compute_norms({name: name == "w" for name in names})))
        for name, norm in zip("uvw", expected):
            assert name not in found or (torch.equal if name == "w" else torch.allclose)(found[name], norm)


def other_shapes(model):
    model.add_adapter("x", lora(r=2)())
    model.set_requires_grad("x")
    return [["u", "v", "w"], ["x"]]


def in_other_dtypes(model):
    next(p for _, p in model.adapter_parameters("v")).data = torch.zeros(8, 32, dtype=torch.bfloat16)
    return [["u", "w"]]


def on_one_memory(model):
    u, v = (next(p for _, p in model.adapter_parameters(name)) for name in "uv")
    v.data = u.data
    return [["w"]]


def hooked(model):
    next(p for _, p in model.adapter_parameters("u")).register_hook(lambda g: None)
    return [["v", "w"]]


@pytest.mark.parametrize("change", [other_shapes, in_other_dtypes, on_one_memory, hooked])
def test_which_share_a_bank(change):
    model = model_with(RUNS)
    expected = change(model)
    banks = banks_of(model, model.peft_config)
    names = {id(row): name for name, row in banks.rows.items()}
    assert [[names[id(row)] for row in bank.rows] for bank in banks.banks] == expected


def freeze(p):
    p.requires_grad_(False)


def move(p):
    p.data = p.data.clone()


def hook(p):
    p.register_post_accumulate_grad_hook(lambda p: None)


@pytest.mark.parametrize("change", [freeze, move, hook])
def test_changes_from_elsewhere_are_seen(change):
    banks = banks_of(model_with(RUNS), RUNS)
    assert banks.is_intact()
    change(banks.rows["v"].parameters[3])
    assert not banks.is_intact()


def test_sinks_that_overlap_add_up():
    """Stacks of one tensor that share adapters, a later gradient of one, a single parameter, and its `grad`."""
    model = model_with(RUNS)
    banks = banks_of(model, RUNS)
    u, v, w = (row.parameters[0] for row in banks.rows.values())
    for turn in (1, 2):
        banks.drop_gradients("uvw")
        for sink, value in (
            (banks.sink(banks.stack(u, 2)), 1), (banks.sink(banks.stack(v, 2)), 10), (banks.sink(v), 100),
        ):  # fmt: skip
            sink.claim().fill_(value * turn)
            assert sink.claim() is None
        banks.sink(banks.stack(u, 2)).add(torch.full((2, *u.shape), 1000.0))
        w.grad = torch.full_like(w, 5.0)
        banks.collect_gradients("uvw")
        sums = [row.gradients[0].unique().tolist() for row in banks.rows.values()]
        assert sums == [[1000 + turn], [1000 + 111 * turn], [5 + 10 * turn]]
        assert all(row.received[0] and not any(row.received[1:]) for row in banks.rows.values())
    banks.drop_gradients("uvw")
    banks.sink(banks.stack(u, 2)).claim().fill_(7)
    banks.drop_gradients("uvw")
    banks.collect_gradients("uvw")
    assert not any(row.received[0] for row in banks.rows.values())
    assert banks.sink(torch.zeros(1)) is None
