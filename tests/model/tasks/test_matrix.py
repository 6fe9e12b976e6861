# SPDX-License-Identifier: Apache-2.0
"""Every method with every model of every task: training, generating, saving and loading."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import graft
from graft.config.base import TASK_HEADS
from graft.core.errors import ConfigError
from graft.methods import ROWS, method_of
from graft.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from tests.covering import law
from tests.model.tasks.models import (
    CELLS,
    EXPLICIT,
    GENERATING,
    METHODS,
    MODELS,
    PRODUCT,
    STEPS,
    TASKS,
    Cell,
    make,
    refusal,
)
from tests.models import output

OWN_LOSS = ("ADALORA", "CPT", "MOELORA")  # more, or other, than the cross entropy of the labels
CANCELS = "qa_outputs.modules_to_save.default.bias"  # the same for all positions, so a softmax over them ignores it
WITHOUT_HEADS = ("TRAINABLE_TOKENS",)  # its config, as PEFT's, has no modules_to_save

every = law("cell", CELLS, lambda cell: cell.features)


def test_every_cell_is_there():
    # of three architectures, with task ids, timesteps, experts, MLPs: each has a file of its own
    others = {"ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA", "TLORA", "MTLLORA", "MIXLORA", "ADAPTER_FUSION"}
    assert set(METHODS) == set(ROWS) - others
    assert {model.task for model in MODELS.values()} == set(MODEL_TYPE_TO_PEFT_MODEL_MAPPING) == set(TASKS)
    n = len(METHODS)
    assert len(MODELS) == 20 and len(PRODUCT) == 20 * n
    assert Counter(cell.task for cell in CELLS) == {  # CPT has one task; two methods need a cache, which DeBERTa lacks
        "CAUSAL_LM": 7 * n,
        "SEQ_2_SEQ_LM": 2 * (n - 1),
        "SEQ_CLS": 3 * (n - 1) - 2,
        "TOKEN_CLS": 3 * (n - 1) - 2,
        "QUESTION_ANS": 3 * (n - 1) - 2,
        "FEATURE_EXTRACTION": 2 * (n - 1),
    }


@pytest.mark.parametrize("method", EXPLICIT)
def test_targets_are_given_only_where_there_are_no_defaults(method):
    types = {make(name).config.model_type for name in MODELS}
    assert set(EXPLICIT[method]) == types - set(method_of(method).targets)


@pytest.mark.parametrize("cell", [c for c in PRODUCT if refusal(c)], ids=str)
def test_a_refusal_says_why_and_changes_nothing(cell):
    base = make(cell.model)
    before = [(name, p.requires_grad) for name, p in base.named_parameters()]
    with pytest.raises(ConfigError, match=refusal(cell)):
        graft.get_peft_model(base, cell.config(graft))
    assert [(name, p.requires_grad) for name, p in base.named_parameters()] == before
    assert not any(m._forward_pre_hooks for m in base.modules())


def own(model: nn.Module, cell: Cell) -> set[str]:
    """Names of what the adapter trains: all that is its own, but what is frozen for good."""
    return {name for name, _ in model.named_parameters() if "default" in name.split(".") and not cell.frozen(name)}


PLAIN = "LORA"  # a method that asks for nothing beside the model's inputs


@cache
def base_loss(model: str) -> Tensor:
    cell = Cell(model, PLAIN)
    return TASKS[cell.task].loss(make(model)(**cell.labelled()), cell.labels()).detach()


@every
def test_training_reaches_the_adapter_and_nothing_else(cell):
    model, batch, labels, task = cell.trained().train(), cell.labelled(), cell.labels(), TASKS[cell.task]
    out = model(**batch)
    loss, expected = out.loss if labels else task.loss(out, labels), task.loss(out, labels)
    assert loss.isfinite()
    if cell.method not in OWN_LOSS:
        assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base_loss(cell.model)).abs() > 1e-4, "the adapter acts"

    loss.backward()
    trains = own(model, cell)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == trains
    zero = {name for name in reached if not model.get_parameter(name).grad.abs().sum() > 0}
    assert {name for name in zero if not name.endswith(CANCELS)} == set()
    heads = {head for head in TASK_HEADS.get(cell.task, ()) for n in trains if f"{head}.modules_to_save.default." in n}
    assert len(heads) == (cell.task in TASK_HEADS and cell.method not in WITHOUT_HEADS)


@cache
def base_continues(model: str) -> Tensor:
    return make(model).generate(**Cell(model, PLAIN).start(), max_new_tokens=STEPS, do_sample=False)


def continues(model: nn.Module, cell: Cell, row: int) -> Tensor:
    """Greedy decoding of one row alone, without padding, and whole in every step."""
    start = {name: value[row] for name, value in cell.start().items()}
    given = {"input_ids": start["input_ids"][start["attention_mask"] > 0][None]}
    given |= {name: start[name][None] for name in cell.arguments(2)}
    name = "input_ids"
    if cell.task == "SEQ_2_SEQ_LM":
        name = "decoder_input_ids"
        given[name] = torch.tensor([[model.config.decoder_start_token_id]])
    for _ in range(STEPS):
        token = model(**given, use_cache=False).logits[:, -1:].argmax(-1)
        given[name] = torch.cat([given[name], token], dim=1)
    return given[name][0, -STEPS:]


GENERATE = [
    c
    for c in CELLS
    if c.task in GENERATING and c.method != "LILY"  # which mixes what a whole call needs
]


@law("cell", GENERATE, lambda cell: cell.features)
@torch.no_grad()
def test_generating_is_decoding_without_padding_and_cache(cell):
    model = cell.trained()
    generated = model.generate(**cell.start(), max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(generated[:, -STEPS:], torch.stack([continues(model, cell, row) for row in range(2)]))
    assert not torch.equal(generated, base_continues(cell.model)), "the adapter acts"


@every
@torch.no_grad()
def test_a_saved_adapter_computes_the_same_on_a_fresh_base(cell, tmp_path):
    model = cell.trained()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(make(cell.model), tmp_path)
    assert type(loaded) is type(model) is MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cell.task]
    assert not any(p.requires_grad for p in loaded.parameters())
    for batch in (cell.inputs(), cell.labelled()):
        ours, theirs = model(**batch), loaded(**batch)
        assert torch.equal(output(lambda out=theirs: out, {}), output(lambda out=ours: out, {}))
        assert ("loss" in ours) == ("loss" in theirs)
        if "loss" in ours:
            assert torch.equal(theirs.loss, ours.loss)
