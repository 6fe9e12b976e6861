# SPDX-License-Identifier: Apache-2.0
"""Runs that see the same batches: the blocks below the adapters run once for all, and each gets what it gets alone."""

import math
from functools import partial

import pytest
import torch
import transformers as t

from graft.many import MultiTrain
from tests import models
from tests.many.alone import batches, lora, tiny

TOP = {"layers_to_transform": [1]}
VALID = batches(2, seed=9)  # runs look together at one set of data
RUNS = {
    "one": (lora(r=4, **TOP), 1e-2),
    "two": (lora(r=8, lora_dropout=0.3, target_modules=["q_proj", "down_proj"], **TOP), 3e-3),
    "three": (lora(r=4, **TOP), 2e-2),
}


def made(*names, base=tiny, shift=0, runs=RUNS, **options):
    """Train runs on the same batches. shift: in which row the second run's differ from the others'."""
    together = MultiTrain(base(), **options)
    for i, name in enumerate(names):
        config, lr = runs[name]
        data = batches(3)
        if shift and i == 1:
            data[1]["input_ids"][0, 0] += shift
        optimizer = partial(torch.optim.AdamW, lr=lr)
        together.add(name, config, data=data, optimizer=optimizer, seed=len(name), valid=VALID, every=2)
    return together


def rows_of(together):
    """Return the rows that each block gets, call by call."""
    found = {}
    for i, block in enumerate(together.base.model.layers):
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: found.setdefault(i, []).append(len(kwargs["hidden_states"])), with_kwargs=True
        )
    return found


def assert_equal(together, *names, **options):
    for name in names:
        alone = made(name, **options).run()
        assert all(map(torch.equal, together[name].parameters, alone[name].parameters)), name
        assert together[name].curve == alone[name].curve and together[name].valid == alone[name].valid, name


def test_each_is_as_alone_and_what_they_share_runs_once():
    together = made(*RUNS)
    rows = rows_of(together)
    together.run()
    assert {*rows[0]} == {4} and {*rows[1]} == {12}
    assert_equal(together, *RUNS)
    assert not any(block._forward_pre_hooks for block in together.base.model.layers)


def checkpointed(reentrant):
    model = tiny()
    models.checkpoint(model, reentrant)
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_run_again_in_the_backward_pass(reentrant):
    base = partial(checkpointed, reentrant)
    together = made("one", "two", base=base)
    rows = rows_of(together)
    together.run()
    assert {*rows[0]} == {4} and {*rows[1]} == {8}
    assert_equal(together, "one", "two", base=base)


def test_other_batches_are_not_taken_for_the_same():
    together = made("one", "three", shift=1)
    rows = rows_of(together)
    together.run()
    assert rows[0].count(8) == 1, "the second step"
    assert_equal(together, "one")


@pytest.mark.parametrize("config", [lora(r=4), lora(r=4, target_modules=r".*(embed_tokens|1\.self_attn\.q_proj)")])
def test_adapters_at_the_bottom_leave_nothing_to_share(config):
    runs = RUNS | {"low": (config, 1e-2)}
    together = made("one", "low", runs=runs)
    rows = rows_of(together)
    together.run()
    assert {*rows[0]} == {8}
    assert_equal(together, "one", "low", runs=runs)


def test_a_run_that_comes_later_changes_where_rows_are_repeated():
    together = made("one", "three")
    rows = rows_of(together)
    together.step()
    config = lora(r=2)
    together.add("low", config, data=batches(3)[1:], seed=3)
    together.step()
    assert rows[0][:2] == [4, 12]


def test_a_neighbour_that_diverges():
    runs = RUNS | {"wild": (lora(r=4, **TOP), math.inf)}
    together = made("one", "wild", "three", runs=runs)
    with pytest.warns(UserWarning, match="not finite"):
        together.run()
    assert together["wild"].state == "failed"
    assert_equal(together, "one", "three")


SIZES = dict(vocab_size=models.VOCAB, hidden_size=32)
LAYERS = dict(SIZES, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def build(cls, **options):
    with models.seeded(0):
        return cls(cls.config_class(**options)).eval()


bloom = partial(build, t.BloomForCausalLM, **SIZES, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)
# its blocks get a tensor of four heads, as many as a batch has rows
mpt = partial(build, t.MptForCausalLM, vocab_size=models.VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)
# it picks one token of as many rows as its input has
classifier = partial(build, t.LlamaForSequenceClassification, **LAYERS, num_labels=3, pad_token_id=0)
# it picks a token of each row by an index made of its input
clip = partial(build, t.CLIPTextModelWithProjection, **LAYERS, projection_dim=8, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize("base, target", [(bloom, "query_key_value"), (mpt, "Wqkv")], ids=["bloom", "mpt"])
def test_blocks_whose_input_cannot_be_repeated(base, target):
    runs = {name: (lora(r=4, target_modules=[target], lora_dropout=0.1, **TOP), 1e-2) for name in RUNS}
    together = made(*RUNS, base=base, runs=runs).run()
    assert_equal(together, *RUNS, base=base, runs=runs)


@pytest.mark.parametrize("base, key", [(classifier, "logits"), (clip, "text_embeds")], ids=["classifier", "clip"])
def test_rows_that_a_model_picks_by_its_input(base, key):
    """Each run gets rows of its own adapter, in training and at looks."""

    def trained(*names):
        runs = MultiTrain(base())
        for i, name in enumerate(RUNS):
            if name in names:
                options = dict(valid=VALID, every=2, seed=i, optimizer=partial(torch.optim.AdamW, lr=RUNS[name][1]))
                run = runs.add(name, lora(r=4, **TOP), data=batches(3), loss=of_key, **options)
                run.validation_loss = of_key
        return runs.run()

    def of_key(output, batch):
        return output[key].square().mean()

    together = trained(*RUNS)
    for name in RUNS:
        alone = trained(name)
        assert together[name].curve == alone[name].curve and together[name].valid == alone[name].valid, name
        assert all(map(torch.equal, together[name].parameters, alone[name].parameters)), name
