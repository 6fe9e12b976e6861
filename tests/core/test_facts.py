# SPDX-License-Identifier: Apache-2.0
"""Facts of a call: a value for each row, which methods read in their layers wherever these run."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.call import Call
from graft.core.rows import BASE, NO_FACTS, CallContext, Rows
from graft.methods.tasks import TASKS
from tests.looks import get_registry, layers
from tests.models import seeded
from tests.raised import refuses
from tests.threads import at_once

X = torch.linspace(-1, 1, 24).view(4, 6)
FACT = torch.tensor([0, 1, 2, 1])


def poly(*others):
    with seeded(1):
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
        config = graft.PolyConfig(target_modules=["0", "2"], n_tasks=3, init_weights=False)
        model = graft.get_peft_model(net, config, mixed=bool(others))
        for name, other in others:
            model.add_adapter(name, other)
        for layer in layers(model).values():
            for name in layer.adapters:
                for p in layer.parameters_of(name):
                    p.data.add_(torch.randn(p.shape), alpha=0.4)
    return model.eval()


def test_facts_and_gates_stand_within_the_block():
    call, gates = Call(), object()
    assert not call.open and call.fact("a") is None and call.current_gates() is None
    with call.extend_context(facts={"a": FACT}):
        with pytest.raises(KeyError), call.extend_context(gates, {"b": FACT + 1}):  # type: ignore[arg-type]
            assert call.fact("a") is FACT and call.current_gates() is gates
            assert torch.equal(call.fact("b"), FACT + 1)
            raise KeyError
        assert call.fact("b") is None and call.current_gates() is None and call.fact("a") is FACT
    assert not call.open and not call.context


def test_rows_see_their_own():
    call = Call()
    with call.extend_context(facts={"a": FACT}):
        with call.set_in_block("narrow", call.current_context().narrow(torch.tensor([2, 0]))):
            assert call.fact("a").tolist() == [2, 0]
        assert call.fact("a") is FACT


def test_copies_of_rows_have_what_the_rows_have():
    rows = Rows.from_names(["b", BASE, "a", "b"])
    once = CallContext(rows, None, {"a": FACT})
    twice = once.repeat(2)
    assert twice.facts["a"].tolist() == [0, 0, 1, 1, 2, 2, 1, 1]
    named = {name: index.tolist() for name, index in twice.rows.segments}
    assert named == {"b": [0, 1, 6, 7], None: [2, 3], "a": [4, 5]}
    assert CallContext(None, None, NO_FACTS).repeat(3) == CallContext()


@pytest.mark.parametrize("method", ["LORA", "OFT"])
def test_rows_of_several_methods(method):
    """LoRA only adds, so the base runs once; OFT turns the input, so each adapter runs by itself."""
    options = {"LORA": dict(r=2), "OFT": dict(oft_block_size=2)}[method]
    model = poly(("other", graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["0", "2"], **options)))
    names = ["default", "other", BASE, "default"]
    mixed = model(X, task_ids=FACT, adapter_names=names)
    for row, name in enumerate(names):
        one = {"task_ids": FACT[row : row + 1]}
        if name == BASE:
            with model.disable_adapter():
                expected = model(X[row : row + 1])
        else:
            model.set_adapter(name)
            expected = model(X[row : row + 1], **(one if name == "default" else {}))
        assert_close(mixed[row], expected[0], rtol=1e-5, atol=1e-5)
    assert not get_registry(model).call.context


def test_each_thread_has_its_own():
    model = poly()
    facts = [FACT, FACT.flip(0), FACT * 0]
    expected, found = [model(X, task_ids=f) for f in facts], []

    def work(i):
        found.extend((i, model(X, task_ids=facts[i])) for _ in range(60))

    at_once(*(partial(work, i) for i in range(3)))
    assert len(found) == 180 and all(torch.equal(y, expected[i]) for i, y in found)
    assert not get_registry(model).call.open


def test_a_layer_past_the_models_own_forward_knows_nothing():
    model = poly()
    model(X, task_ids=FACT)
    refuses(graft.RoutingError, "task_ids should not be None", model.get_base_model(), X)
    for p in model.parameters():
        p.requires_grad = False  # so that nothing in the output tells of a backward pass
    model(X, task_ids=FACT)
    refuses(graft.RoutingError, "task_ids should not be None", model.get_base_model(), X)
    assert get_registry(copy.deepcopy(model)).call.fact(TASKS) is None
