# SPDX-License-Identifier: Apache-2.0
"""Runs together over a base in bfloat16: no further from training alone than rounding can put them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, MptConfig, MptForCausalLM

from graft.many import MultiTrain, runs
from tests import models
from tests.many.alone import batches, lora, tiny

CONFIGS = {"few": lora(r=4), "wide": lora(r=8, lora_alpha=20, target_modules=["q_proj", "down_proj"])}
ROUNDING = 2**-8  # of a value in bfloat16, relative, at most
PATH = 64  # values in a row, from the tokens through two layers to the loss and back, that are rounded
ERROR = PATH**0.5 * ROUNDING  # their signs are random: 1/32
BOUND = 2 * ERROR  # of both trainings


def base(dtype: torch.dtype) -> nn.Module:
    """Return a model of values in bfloat16 that computes in `dtype`, and does not amplify what a layer gets wrong."""
    model = tiny()
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= 0.5
    return model.to(torch.bfloat16).to(dtype)


def changes(seed: int, dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    """Train runs together for eight steps, in `dtype`; return what changed."""
    together = MultiTrain(base(dtype))
    for name in names:
        optimizer = partial(torch.optim.SGD, lr=0.1)  # Adam's would amplify the errors of small gradients
        together.add(name, CONFIGS[name], data=batches(seed=2 * seed + len(name)), optimizer=optimizer, steps=8)
    begun = {name: flat(together, name) for name in names}
    together.run()
    return {name: flat(together, name) - begun[name] for name in names}


def flat(together: MultiTrain, name: str) -> Tensor:
    return torch.cat([p.detach().flatten().float() for p in together[name].parameters])


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far a is from b, relative to b."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("seed", range(3))
def test_in_bfloat16_each_is_close_to_alone(seed, monkeypatch):
    both = changes(seed, torch.bfloat16, *CONFIGS)
    apart = {name: changes(seed, torch.bfloat16, name)[name] for name in CONFIGS}
    joined = runs.join_batches

    def swap(parts, arguments):
        given, cut = joined(parts, arguments)
        if len(parts) > 1:  # the last row of the first, and the first of the second
            given["input_ids"] = given["input_ids"][[0, 1, 2, 4, 3, 5, 6, 7]]
        return given, cut

    monkeypatch.setattr(runs, "join_batches", swap)
    wrong = changes(seed, torch.bfloat16, *CONFIGS)
    for name in CONFIGS:
        exact = changes(seed, torch.float32, name)[name]
        assert ROUNDING < distance(apart[name], exact) < ERROR, "what bfloat16 does to one training"
        assert distance(both[name], apart[name]) < BOUND
        assert distance(wrong[name], apart[name]) > 4 * BOUND, "one row of the neighbour's is far beyond it"


@pytest.mark.parametrize("rows", [1, 4])
def test_adapters_in_float32_over_a_base_in_bfloat16(rows):
    """Adapters of one shape, which share products over a base in their own dtype."""
    data = [{k: v[:rows].repeat(1, 8 // rows) for k, v in batch.items()} for batch in batches(4)]

    def trained(*names: str) -> MultiTrain:
        together = MultiTrain(tiny().to(torch.bfloat16))
        for name in names:
            together.add(name, lora(r=8), data=data, optimizer=partial(torch.optim.SGD, lr=0.1), seed=len(name))
        return together.run()

    both, alone = trained("one", "other"), trained("other")
    assert {p.dtype for p in both["one"].parameters} == {torch.float32}
    assert distance(flat(both, "other"), flat(alone, "other")) < ROUNDING


def mixtral() -> nn.Module:
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return MixtralForCausalLM(MixtralConfig(vocab_size=models.VOCAB, num_local_experts=4, **sizes))


def mpt() -> nn.Module:
    return MptForCausalLM(MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=32, vocab_size=models.VOCAB))


@pytest.mark.parametrize("make, target", [(mixtral, "q_proj"), (mpt, "Wqkv")])
def test_bases_whose_products_of_one_row_are_others(make, target):
    """Close in float32: experts of the base get a token or two of an adapter; attention of one row has kernels of its
    own."""
    data = {name: [{k: v[:1] for k, v in b.items()} for b in batches(8, seed=i)] for i, name in enumerate("uv")}

    def trained(*names: str) -> dict[str, Tensor]:
        with models.seeded(0):
            together = MultiTrain(make().eval())
        for name in names:
            optimizer = partial(torch.optim.SGD, lr=0.1)
            together.add(name, lora(r=4, target_modules=[target]), data=data[name], optimizer=optimizer)
        begun = {name: flat(together, name) for name in names}
        together.run()
        return {name: flat(together, name) - begun[name] for name in names}

    both = trained("u", "v")
    for name in "uv":
        assert distance(both[name], trained(name)[name]) < 1e-4
