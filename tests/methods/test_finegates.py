# SPDX-License-Identifier: Apache-2.0
"""FineGates by its formulas."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.train import FineGatesTrainerMixin
from tests.models import seeded
from tests.raised import refuses, warns

Z = torch.tensor([-2.0, -0.2, 0.1, 0.5, 3.0])


def made(**options):
    options = dict(gate_init_mean=0.2, gate_init_std=0.3) | options
    with seeded(0):
        return graft.get_peft_model(
            nn.Sequential(nn.Linear(4, 5)), graft.FineGatesConfig(target_modules=["0"], **options)
        )


def layer(model):
    return model.base_model.model[0]


def test_outputs_are_those_of_gates():
    model, x = made().eval(), torch.linspace(-1, 1, 12).view(3, 4)
    layer(model).finegates_rows["default"].data.copy_(Z)
    layer(model).finegates_columns["default"].data.copy_(Z[1:])
    gates = [min(1.0, max(0.0, math.tanh(z) + 0.5)) for z in Z.tolist()]
    assert gates[0] == 0 and gates[-1] == 1
    r, c = torch.tensor(gates), torch.tensor(gates[1:])
    assert_close(model(x), r * layer(model).base_layer(c * x))
    stats = model.base_model.get_finegates_compression_stats()
    assert stats == pytest.approx(dict(rows=0.2, columns=0.0, entries=0.2))


def test_the_loss():
    model = made(target_sparsity=0.3, sparsity_loss_weight=0.5)
    layer(model).finegates_rows["default"].data.copy_(Z)
    layer(model).finegates_columns["default"].data.copy_(Z[1:])
    phi = lambda z: 0.5 * (1 + math.erf((math.tanh(z) + 0.5) / 0.5 / math.sqrt(2)))
    shares = [sum(map(phi, zs)) / len(zs) for zs in (Z.tolist(), Z[1:].tolist())]
    wanted = 0.5 * 0.5 * sum(abs(share - 0.7) for share in shares)
    loss = model.base_model._get_finegates_loss()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert layer(model).finegates_rows["default"].grad.abs().min() > 0
    model.add_adapter("other", graft.FineGatesConfig(target_modules=["0"], gate_init_mean=0.1))
    both = sum(model.base_model._get_finegates_loss(name).item() for name in ("default", "other")) / 2
    assert model.base_model._get_finegates_loss(["default", "other"]).item() == pytest.approx(both)
    refuses(graft.AdapterNotFoundError, "zz", model.base_model._get_finegates_loss, "zz")


def test_noise_is_for_training_alone():
    model, x = made(gate_noise_std=0.1), torch.ones(2, 4)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_shares_are_those_of_gates_without_noise():
    model = made(gate_noise_std=1.0).train()
    layer(model).finegates_rows["default"].data.copy_(Z)
    layer(model).finegates_columns["default"].data.copy_(Z[:4])
    before = torch.get_rng_state()
    stats = model.base_model.get_finegates_compression_stats()
    assert stats == pytest.approx(dict(rows=0.2, columns=0.25, entries=0.4))
    assert torch.equal(torch.get_rng_state(), before), "looking draws nothing"


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.ones(3, 5, 4))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.stack)


def test_loss_and_shares_count_the_matrices_of_a_stack():
    cfg = graft.FineGatesConfig(target_modules=[], target_parameters=["0.stack"], gate_init_mean=0.2)
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(Experts()), cfg)
    apart = [made() for _ in range(3)]
    rows, columns = (layer(model).finegates_rows["default"], layer(model).finegates_columns["default"])
    rows.data[1, :2] = -2.0
    for one, r, c in zip(apart, rows, columns):
        layer(one).finegates_rows["default"].data.copy_(r)
        layer(one).finegates_columns["default"].data.copy_(c)
    loss = model.base_model._get_finegates_loss()
    assert_close(loss, sum(one.base_model._get_finegates_loss() for one in apart) / 3)
    loss.backward()
    assert rows.grad.abs().sum() > 0
    stats = model.base_model.get_finegates_compression_stats()
    assert stats == pytest.approx(dict(rows=2 / 15, columns=0.0, entries=2 / 15))
    assert model.base_model.get_finegates_compression_stats([]) == dict(rows=0.0, columns=0.0, entries=0.0)


def test_gates_that_cannot_learn_are_said():
    warns(UserWarning, "Nearly all gates of '0' are open.*gate_noise_std", made, gate_init_mean=0.9, gate_init_std=0.1)
    made(gate_init_mean=0.9, gate_init_std=0.1, gate_noise_std=0.1)


class Trainer:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(inputs).sum()
        return (loss, inputs) if return_outputs else loss


class GatesTrainer(FineGatesTrainerMixin, Trainer):
    pass


def test_a_trainer_adds_the_loss():
    model, x = made(), torch.ones(2, 4)
    own = model.base_model._get_finegates_loss()
    assert_close(GatesTrainer().compute_loss(model, x), model(x).sum() + own)
    assert_close(GatesTrainer().compute_loss(model, x, return_outputs=True)[0], model(x).sum() + own)
    assert_close(GatesTrainer().compute_loss(model.eval(), x), model(x).sum())


def test_batches_that_accumulate_add_the_loss_once():
    """By transformers: a loss that was divided by the items of all batches of the step is divided by nothing more."""
    model, x = made(), torch.ones(2, 4)
    own = model.base_model._get_finegates_loss()
    trainer = GatesTrainer()
    trainer.model_accepts_loss_kwargs, trainer.current_gradient_accumulation_steps = True, 4
    assert_close(trainer.compute_loss(model, x, num_items_in_batch=torch.tensor(8)), model(x).sum() + own / 4)
    assert_close(trainer.compute_loss(model, x), model(x).sum() + own)  # the Trainer divides
    trainer.loss_is_scaled_for_ga = False
    assert_close(trainer.compute_loss(model, x, num_items_in_batch=torch.tensor(8)), model(x).sum() + own)


@pytest.mark.parametrize("options", [dict(target_sparsity=1.2), dict(gate_noise_std=-1.0)])
def test_numbers_that_cannot_be(options):
    refuses(graft.ConfigError, next(iter(options)), made, **options)
