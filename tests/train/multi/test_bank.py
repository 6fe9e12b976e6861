# SPDX-License-Identifier: Apache-2.0
"""The bank: Parameters keep their names and values, optimizers see one vector, results are those of training alone."""

import pytest
import torch

from graft.core.errors import ConfigError
from graft.kernels.segments import spread
from graft.train.multi.bank import Bank, banks_of
from tests.model.test_isolation import Run, Training, alone, lora, model_with

RUNS = {name: Run(lora()) for name in "uvw"}


def bank_of(model, names):
    return Bank({name: list(model.adapter_parameters(name)) for name in names})


def test_a_bank_trains_its_adapters_to_the_bits_of_each_alone():
    model = model_with(RUNS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bank = bank_of(model, RUNS)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.set_requires_grad(list(RUNS))
    trainings = {name: Training(model, name, run, sum(map(ord, name))) for name, run in RUNS.items()}
    optimizers = [torch.optim.AdamW([bank.flat[name]], run.rate) for name, run in RUNS.items()]
    for parts in zip(*(t.batches for t in trainings.values())):
        logits = model(input_ids=torch.cat(parts), adapter_names=list(RUNS)).logits
        sum(t.loss(y, ids) for t, y, ids in zip(trainings.values(), logits.split(1), parts)).backward()
        for optimizer in optimizers:
            optimizer.step()
        bank.zero()
    for name, run in RUNS.items():
        assert all(map(torch.equal, (p for _, p in model.adapter_parameters(name)), alone(name, run)))


def test_factors_lie_at_equal_distances():
    model = model_with(RUNS)
    bank = bank_of(model, RUNS)
    for tensors in zip(*bank.parameters.values()):
        view = spread(tensors)
        assert view.data_ptr() == tensors[0].data_ptr() and all(map(torch.equal, view, tensors))
        assert all(t.data_ptr() % 64 == bank.values.data_ptr() % 64 for t in tensors)


def test_gradients_of_one_adapter_are_zeroed_apart_from_those_of_others():
    bank = bank_of(model_with(RUNS), RUNS)
    bank.gradients.fill_(1)
    bank.zero(["v"])
    assert [p.grad.unique().tolist() for p in bank.flat.values()] == [[1], [0], [1]]
    next(iter(bank.parameters["u"])).grad = None
    bank.attach()
    assert all((p.grad == 1).all() for p in bank.parameters["u"])


def test_other_shapes_have_banks_of_their_own():
    runs = {**RUNS, "x": Run(lora(r=2))}
    model = model_with(runs)
    named = {name: list(model.adapter_parameters(name)) for name in runs}
    assert [list(bank.flat) for bank in banks_of(named)] == [["u", "v", "w"], ["x"]]
    with pytest.raises(ConfigError, match="'u' and 'x' have tensors of other shapes"):
        Bank(named)
    with pytest.raises(ConfigError, match="share tensors"):
        Bank({"u": named["u"], "again": named["u"]})
