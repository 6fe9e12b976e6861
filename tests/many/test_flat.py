# SPDX-License-Identifier: Apache-2.0
"""Optimizers over one vector: the bits of the same over separate tensors, and the same state in files."""

from functools import partial

import pytest
import torch
from torch import nn, optim

from graft.many import MultiTrain
from graft.many.bank import Banks
from graft.many.flat import ELEMENTWISE, FlatParameters, can_flatten, order_by_group
from tests.many.alone import BITS, SPECS, Spec, alone, as_alone, lora, tiny
from tests.models import seeded

SHAPES = [(3, 7), (33,), (5, 1, 11), (64, 9), (1,)]
OPTIONS = [
    (optim.SGD, {"lr": 0.1}), (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.Adam, {}), (optim.Adam, {"amsgrad": True, "weight_decay": 0.1}), (optim.AdamW, {"foreach": True}),
    (optim.AdamW, {"fused": True, "amsgrad": True}), (optim.AdamW, {"maximize": True}), (optim.NAdam, {}),
    (optim.RAdam, {}), (optim.Adamax, {}), (optim.Adagrad, {"initial_accumulator_value": 0.1}), (optim.Adadelta, {}),
    (optim.RMSprop, {"momentum": 0.9, "centered": True}), (optim.Rprop, {}), (optim.ASGD, {"t0": 2}),
]  # fmt: skip
each = pytest.mark.parametrize("kind, options", OPTIONS, ids=lambda v: getattr(v, "__name__", None) or "+".join(v))


def tensors(shapes=SHAPES):
    with seeded(0):
        return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def gradients(shapes):
    with seeded(1):
        return [[torch.randn(shape) * 10.0 ** torch.randint(-3, 2, ()).item() for shape in shapes] for _ in range(6)]


def made(kind, options, parameters):
    """An optimizer of two groups, whose tensors do not stand in the order of the model."""
    return kind([{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.03}], **options)


def flat(optimizer, parameters):
    assert can_flatten(optimizer, parameters)
    row = Banks({"u": (order_by_group(optimizer, parameters), parameters)}, ()).rows["u"]
    found = FlatParameters.try_flatten(optimizer, row)
    assert found is not None and [len(g["params"]) for g in optimizer.param_groups] == [1, 1]
    return found, dict(zip(map(id, row.parameters), row.gradients))


def step(optimizer, parameters, grads, into=None):
    for p, g in zip(parameters, grads):
        if into is None:
            p.grad = g.clone()
        else:
            into[id(p)].copy_(g)
    optimizer.step()


def test_all_kinds_are_here():
    assert {kind for kind, _ in OPTIONS} == ELEMENTWISE


@each
def test_a_vector_has_the_bits_of_its_tensors(kind, options):
    shapes = [(4, 24), (16,), (64, 9)] if "fused" in options else SHAPES
    apart, together = tensors(shapes), tensors(shapes)
    one, other = made(kind, options, apart), made(kind, options, together)
    for t, grads in enumerate(gradients(shapes)):
        if t in (0, 3):  # from the beginning; and with a state that was loaded, as files hold it
            vector, into = flat(other, together)
        step(one, apart, grads)
        step(other, together, grads, into)
        assert all(map(torch.equal, apart, together)), t
        if t == 2:
            with vector.show_parameters():
                held = other.state_dict()
            torch.testing.assert_close(held, one.state_dict(), rtol=0, atol=0)
            vector.restore_parameters()
            other.load_state_dict(held)
    vector.restore_parameters()
    step(one, apart, grads)
    step(other, together, grads)
    assert all(map(torch.equal, apart, together)), "again by tensor"


def test_a_fused_kernel_gets_whole_vectors():
    parameters = tensors()
    assert not can_flatten(optim.AdamW(parameters, fused=True), parameters)


def test_tensors_that_have_made_other_numbers_of_steps_stay_apart():
    parameters = tensors()
    optimizer = made(optim.AdamW, {}, parameters)
    parameters[0].grad = torch.ones(SHAPES[0])
    optimizer.step()
    row = Banks({"u": (order_by_group(optimizer, parameters), parameters)}, ()).rows["u"]
    assert FlatParameters.try_flatten(optimizer, row) is None
    assert optimizer.param_groups[0]["params"] == parameters[::2] and optimizer.state[parameters[0]]["step"] == 1


@pytest.mark.parametrize("kind", [optim.Adafactor, type("Mine", (optim.SGD,), {})])
def test_optimizers_that_may_see_shapes_stay_apart(kind):
    parameters = tensors()
    assert not can_flatten(kind(parameters, lr=0.1), parameters)


def test_steps_that_somebody_watches_stay_apart():
    parameters = tensors()
    optimizer = optim.SGD(parameters, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    assert not can_flatten(optimizer, parameters)


def test_a_hook_that_comes_later_sees_the_gradients_of_tensors():
    """It clips by value, which nobody else does."""
    spec, found = SPECS["plain"], []

    def clip(optimizer, args, kwargs):
        nn.utils.clip_grad_value_([p for group in optimizer.param_groups for p in group["params"]], 1e-3)
        seen.append([p.grad is not None for p in run.parameters])

    for hooked_at in (0, 2):
        runs, seen = MultiTrain(tiny()), []
        run = runs.add("x", spec.config, **spec.options(6))
        if hooked_at:
            runs.step()
            runs.step()
        run.optimizer.register_step_pre_hook(clip)
        runs.run()
        assert seen == [[True] * len(run.parameters)] * (6 - hooked_at)
        found.append(run.curve)
    assert found[0][0] == found[1][0] and found[0] != found[1]


@pytest.mark.parametrize("at_once", [4096, 60])
def test_runs_of_one_shape_are_each_as_alone(at_once):
    """They share products, in one pass or several; one ends early, one accumulates, one clips."""
    specs = {f"s{i}": Spec(lora(), lr=1e-2 * (i + 1), seed=i, clip=0.1 if i == 2 else None) for i in range(5)}
    specs["s3"] = specs["s3"]._replace(accumulate=3)
    steps = {name: 7 if name == "s1" else 12 for name in specs}
    runs = MultiTrain(tiny(), at_once=at_once)
    for name, spec in specs.items():
        runs.add(name, spec.config, **spec.options(steps[name]))
    runs.run()
    for name, spec in specs.items():
        parameters, losses = alone(spec, steps[name])
        assert as_alone(runs[name].parameters, parameters), name
        if spec.accumulate == 1:
            assert [p.loss for p in runs[name].curve] == pytest.approx(losses, rel=0 if BITS else 1e-4)


def test_a_parameter_without_gradients_is_left_alone():
    """As a lone optimizer leaves it: no decay of its weight."""
    spec = SPECS["plain"]
    runs = MultiTrain(tiny())
    decay = partial(optim.AdamW, lr=1e-2, weight_decay=0.5)
    first = runs.add("first", lora(), **spec.options(6) | {"optimizer": decay})
    runs.add("second", lora(), **spec.options(6) | {"optimizer": decay})
    unused = first.parameters[-1]
    unused.data.fill_(1.0)
    layer = next(m for m in runs.model.modules() if getattr(m, "weight", None) is unused)
    layer.forward = lambda x: nn.functional.linear(x, unused.detach())
    runs.run()
    assert torch.equal(unused, torch.ones_like(unused)) and not torch.equal(
        first.parameters[0], runs["second"].parameters[0]
    )
    assert first.optimizer.param_groups[0]["params"] == first.parameters, "by tensor from then on"
    assert len(runs["second"].optimizer.param_groups[0]["params"]) == 1


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_somebody_zeroes_between_steps(to_none):
    """As loops do; a run has none between its steps."""
    spec, found = SPECS["gathers"], []
    for zeroes in (False, True):
        runs = MultiTrain(tiny())
        run = runs.add("x", spec.config, **spec.options(3))
        for _ in runs:
            if zeroes:
                run.optimizer.zero_grad(set_to_none=to_none)
        found.append((run.curve, [p.detach() for p in run.parameters]))
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))
