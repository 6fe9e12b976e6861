# SPDX-License-Identifier: Apache-2.0
"""OFT whose rotations are constrained (`coft`): projected gradient descent gives PEFT's parameters, step by step."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from tests.covering import law, pairs, product
from tests.leaves_out import WHOLE_GRAPHS
from tests.models import seeded

LIBS = (graft, peft)
EPS = 0.2
SHAPES = {  # what the rotations are given by
    "blocks": dict(oft_block_size=4),
    "shared": dict(oft_block_size=4, block_share=True),
    "exact": dict(oft_block_size=6, use_cayley_neumann=False),
}
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.3),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.05),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.out = nn.Embedding(11, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.lin(self.emb(ids))))


def with_blocks(lib, **options):
    config = lib.OFTConfig(target_modules=["emb", "lin"], coft=True, eps=EPS, **options)
    with seeded(0):
        model = lib.get_peft_model(Net(), config)
    with torch.no_grad(), seeded(1):
        for p in trainable(model).values():  # most blocks begin outside
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batch(i: int):
    with seeded(100 + i):
        return torch.randint(0, 11, (6, 5)), torch.randn(6, 5, 3)


def loss(model, i: int, run=None):
    ids, target = batch(i)
    return ((model(ids) if run is None else run(ids)) - target).square().mean()


def outside(model) -> bool:
    """Whether a block is outside its ball."""
    return any((p.norm(dim=1) * 2**0.5 > EPS / len(p) ** 0.5 * (1 + 1e-5)).any() for p in trainable(model).values())


def train(model, optimizer="SGD", steps=6, parts=1, mode=True, run=None):
    """Some steps; in each, gradients of several batches are added up."""
    model.train(mode)
    descent = OPTIMIZERS[optimizer](trainable(model).values())
    for step in range(steps):
        descent.zero_grad()
        for part in range(parts):
            loss(model, 10 * step + part, run and run(model)).backward()
        descent.step()
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def same(ours, theirs, tolerance=2e-5):
    assert ours.keys() == theirs.keys() and ours
    for name, p in theirs.items():
        assert_close(ours[name], p, rtol=tolerance, atol=tolerance)


@law("shape, optimizer, parts, mode", product(SHAPES, OPTIMIZERS, (1, 3), (True, False)), pairs)
def test_training_gives_pefts_parameters(shape, optimizer, parts, mode):
    models = [with_blocks(lib, **SHAPES[shape]) for lib in LIBS]
    assert outside(models[0])
    ours, theirs = (train(model, optimizer, parts=parts, mode=mode) for model in models)
    same(ours, theirs)
    assert outside(models[0]), "the constraint has to act in the end as well, or this says nothing"
    ids, _ = batch(0)
    assert_close(models[0](ids), models[1](ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_with_checkpoints(reentrant):
    def recomputed(model):
        inner = model.base_model.model

        def run(ids):
            x = inner.emb(ids)
            x = checkpoint(lambda x: torch.tanh(inner.lin(x)), x, use_reentrant=reentrant)
            return inner.out(x)

        return run

    options = SHAPES["blocks"]
    same(train(with_blocks(graft, **options), run=recomputed), train(with_blocks(peft, **options)))


@WHOLE_GRAPHS
def test_training_compiled():
    torch._dynamo.reset()
    compiled = lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    options = SHAPES["blocks"]
    same(train(with_blocks(graft, **options), run=compiled), train(with_blocks(peft, **options)))


def test_a_step_starts_from_the_projected_point():
    """v ← P(v) - lr · gradient at P(v), arXiv 2306.07280."""
    model = with_blocks(graft, **SHAPES["blocks"])
    inside = copy.deepcopy(model)
    with torch.no_grad():
        for p in trainable(inside).values():
            p.mul_((EPS / len(p) ** 0.5 / (p.norm(dim=1, keepdim=True) * 2**0.5)).clamp(max=1))
    assert not outside(inside)
    loss(inside, 0).backward()
    expected = {name: p.detach() - 0.3 * p.grad for name, p in trainable(inside).items()}
    same(train(model, steps=1), expected, 1e-6)


@pytest.mark.differs("OFT with `coft`")
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_forward_pass_writes_nothing(mode):
    """PEFT's moves the parameters, in evaluation as well. What is computed and saved is the same in both."""
    model = with_blocks(graft, **SHAPES["blocks"]).train(mode)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    ids, _ = batch(0)
    y = model(ids)
    with torch.no_grad():
        assert_close(model(ids), y, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        model(ids)
    model.merge_adapter(safe_merge=True)
    assert_close(model(ids), y, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    after = trainable(model)
    assert all(torch.equal(p, before[name]) for name, p in after.items()) and outside(model)
    y.square().sum().backward()
    assert not outside(model)
    assert_close(model(ids), y, rtol=1e-5, atol=1e-6)


def test_a_frozen_adapter_is_left_alone():
    model = with_blocks(graft, **SHAPES["blocks"])
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    model.requires_grad_(False)
    x = torch.randn(4, 12, requires_grad=True)
    model.base_model.model.lin(x).sum().backward()
    assert x.grad is not None
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())


def test_functional_transforms_write_nothing():
    model = with_blocks(graft, **SHAPES["blocks"])
    values = {name: p.detach().clone() for name, p in trainable(model).items()}
    ids, target = batch(0)
    loss(model, 0).backward()
    gradients = {name: p.grad for name, p in trainable(model).items()}
    before = copy.deepcopy(values)

    def value(values):
        return (torch.func.functional_call(model, values, (ids,)) - target).square().mean()

    same(torch.func.grad(value)(values), gradients, 1e-5)
    assert all(torch.equal(values[name], p) for name, p in before.items())


def test_dropped_blocks_keep_the_dtype_of_the_rotation():
    model = graft.get_peft_model(
        nn.Sequential(nn.Linear(8, 3)), graft.OFTConfig(r=0, oft_block_size=4, module_dropout=0.5, target_modules=["0"])
    )
    m = model.base_model.model[0].methods["default"]
    torch.set_default_dtype(torch.float64)
    try:
        assert m.R().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
