# SPDX-License-Identifier: Apache-2.0
"""Experts in bitsandbytes' 4 bits: LoRA as on the dequantized base, one matrix dense at a time."""

import copy

import pytest
import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit

import graft
from graft.core.errors import UnsupportedLayerError
from graft.kernels import experts as kernel
from graft.storage import stacks
from tests.families import IDS
from tests.storage.packed_experts import BOTH, blocks, gpt_oss, made, mixtral
from tests.storage.test_experts import holds_one_matrix, merges_and_unmerges, results, same, with_lora

NAMES = ("gate_up_proj", "down_proj")
WIDTH = 128  # on a CPU, the package reads stacks wrong of which a row is no multiple of a block
KINDS = {"nf4": {}, "fp4": dict(quant_type="fp4"), "nested": dict(compress_statistics=True, blocksize=32)}


def packed(make, **options):
    model = made(make, width=WIDTH)
    for _, m in blocks(model):
        for name in NAMES:
            replace_parameter_4bit(m, name, **options)
    return model


def twin(model, make):
    """Return a dense model with what the package dequantizes."""
    dense = made(make, width=WIDTH)
    for (_, m), (_, source) in zip(blocks(dense), blocks(model)):
        for name in NAMES:
            getattr(m, name).data = getattr(source, name).clone()
    return dense


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_dequantized_base(kind, make, monkeypatch):
    base = packed(make, **KINDS[kind])
    for _, m in blocks(base):
        for name in NAMES:
            held = stacks.find_matrices(m, name)
            W = held.dense([0, 2], torch.float32)
            assert torch.equal(W, (getattr(m, name).mT if held.flipped else getattr(m, name))[[0, 2]])
    dense = with_lora(twin(base, make))
    expected = results(dense)
    model = with_lora(base)
    monkeypatch.setattr(Bnb4bitParametrization, "forward", lambda *_: pytest.fail("dequantized a whole stack"))
    same(results(model), expected)
    monkeypatch.setattr(kernel, "BUDGET", 1)
    same(results(copy.deepcopy(model)), expected)
    for which in (model, dense):
        which.delete_adapter("default")
        which.add_adapter("attention", graft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        which.set_adapter("attention")
    dense.load_state_dict({n: p for n, p in model.state_dict().items() if "lora" in n}, strict=False)
    same(results(model), results(dense))


def test_without_adapters_the_package_runs():
    base = packed(mixtral)
    expected = base(IDS).logits
    model = with_lora(base)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model.unload()(IDS).logits, expected)


def test_blocks_that_reach_over_matrices_are_refused():
    base = made(mixtral)
    for _, m in blocks(base):
        m.down_proj.data = m.down_proj.data[:, :31, :31].contiguous()
        replace_parameter_4bit(m, "down_proj")
    with pytest.raises(UnsupportedLayerError, match=r"blocks reach from one matrix to the next.*another blocksize"):
        with_lora(base, target_parameters=BOTH[1:])
    assert not any(p.requires_grad for n, p in base.named_parameters() if "original" in n)
    assert all("forward" not in m.__dict__ for _, m in blocks(base))


@pytest.mark.parametrize("kind", ["nf4", "nested"])
def test_merging_keeps_what_it_says_and_gives_the_bits_back(kind):
    merges_and_unmerges(packed(mixtral, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_has_one_matrix_dense_at_a_time(kind):
    holds_one_matrix(packed(mixtral, **KINDS[kind]))


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_by_matrix_has_the_bits_of_the_package(kind, make):
    dense, base = made(make, width=WIDTH), packed(make, **KINDS[kind])
    (_, m), (_, source) = blocks(base)[0], blocks(dense)[0]
    for name in NAMES:
        W, held = getattr(source, name).data, stacks.find_matrices(m, name)
        other = held.remake(lambda e, W=W, flipped=held.flipped: (W[e].T if flipped else W[e]).exp())
        found = other.remake(lambda e, W=W, flipped=held.flipped: W[e].T if flipped else W[e])
        assert torch.equal(found.weight, held.weight) and not torch.equal(other.weight, held.weight)
        before, after = held.state.as_dict(), found.state.as_dict()
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(after[key], value) if isinstance(value, torch.Tensor) else after[key] == value, key
