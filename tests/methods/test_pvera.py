# SPDX-License-Identifier: Apache-2.0
"""PVeRA: what is random in it, and when."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import graft
from tests import models
from tests.pair import LIBS, adapt, close, close_dicts, gradients, output, randomize
from tests.samples import Sample, first

SEEDED = first("PVERA")  # a generator for each layer


def unseeded(**config):
    return Sample("PVERA", "x", "mlp", dict(target_modules=["lin0", "fc1"], r=5, **config))


def test_training_draws_the_values_of_peft():
    """From a generator of the layer, so that a second pass draws others."""
    passes = []
    for lib in LIBS:
        model = randomize(adapt(lib, SEEDED), SEEDED).train()
        passes.append([output(model, SEEDED), output(model, SEEDED), gradients(model, SEEDED)])
    (first_ours, second_ours, ours), (first_theirs, second_theirs, theirs) = passes
    close(first_ours, first_theirs)
    close(second_ours, second_theirs)
    close_dicts(ours, theirs)
    assert not torch.allclose(first_ours, second_ours, atol=1e-3)


def test_without_a_seed_torchs_generator_draws():
    sample = unseeded()
    results = []
    for lib in LIBS:
        model = randomize(adapt(lib, sample), sample).train()
        models.seed(5)
        results.append(output(model, sample))
    close(*results)


def test_the_mean_of_the_draws_is_what_evaluation_computes():
    sample = unseeded()
    model = randomize(adapt(graft, sample), sample)
    layer, x = model.get_submodule("base_model.model.lin0"), torch.randn(1, 10)
    expected = layer.eval()(x)
    layer.train()
    close(torch.stack([layer(x) for _ in range(3000)]).mean(0), expected, 0.15)
    model.merge_adapter()
    close(layer.base_layer(x), expected)


def test_sampling_at_inference():
    sample = unseeded(sample_at_inference=True)
    model = randomize(adapt(graft, sample), sample).eval()
    assert not torch.allclose(output(model, sample), output(model, sample), atol=1e-3)
    model.merge_adapter()
    assert torch.equal(output(model, sample), output(model, sample))


@pytest.mark.differs("PVeRA with `generator_seed` under gradient checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_draw_the_same_again(reentrant):
    """PEFT's generator goes on: gradients are of another function than the output."""
    model = randomize(adapt(graft, SEEDED), SEEDED).train()
    layer = model.get_submodule("base_model.model.lin0")
    other = copy.deepcopy(layer)
    x = torch.randn(4, 10, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    expected, x.grad = x.grad, None
    again = checkpoint(other, x, use_reentrant=reentrant)
    close(again, y, 0)
    again.sum().backward()
    close(x.grad, expected, 1e-6)
    close_dicts(
        {n: p.grad for n, p in other.named_parameters()}, {n: p.grad for n, p in layer.named_parameters()}, 1e-6
    )
    assert not torch.equal(layer(x), y) and torch.equal(layer(x), other(x)) is False


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_of_several_passes_each_draws_its_own_again(reentrant, together):
    model = randomize(adapt(graft, SEEDED), SEEDED).train()
    plain = model.get_submodule("base_model.model.lin0")
    other = copy.deepcopy(plain)
    inputs = [torch.randn(4, 10, requires_grad=True) for _ in range(3)]
    losses = [plain(x).square().sum() for x in inputs]
    sum(losses).backward()
    expected = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    losses = [checkpoint(other, x, use_reentrant=reentrant).square().sum() for x in inputs]
    for loss in [sum(losses)] if together else losses:
        loss.backward()
    for x, grad in zip(inputs, expected):
        close(x.grad, grad, 1e-6)
    close(other(inputs[0]), plain(inputs[0]), 0)
