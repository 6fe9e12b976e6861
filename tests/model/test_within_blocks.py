# SPDX-License-Identifier: Apache-2.0
"""Layers within a block that carries an adapter: it does not matter which of the two came first."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import graft
from graft.core.rows import Rows
from graft.inject.parts import get_registry
from tests.models import make, seeded

BLOCKS = {"residual": graft.ReftConfig(r=2), "narrow": graft.BottleneckConfig(reduction_factor=4)}
WITHIN = {
    "first": graft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "second": graft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
    "third": graft.FineGatesConfig(target_modules=["v_proj"], init_weights=False),
}
IDS = torch.arange(16).view(2, 8)


def made(names):
    """A model with these adapters, whose values depend on their names alone."""
    model = None
    for name in names:
        config = {**BLOCKS, **WITHIN}[name]
        if model is None:
            model = graft.PeftMixedModel(make("llama"), config, name)
        else:
            model.add_adapter(name, config)
    for key, p in sorted(model.named_parameters()):
        name = next((n for n in names if f".{n}" in key), None)
        if name is not None:
            with seeded(len(key.replace("base_layer.", ""))):
                p.data.normal_(std=0.1)
    return model.eval()


def outputs(model, names):
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(model(IDS).logits)
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_order_does_not_matter(block):
    names = [*WITHIN, block]
    one, other = made(names), made(names[::-1])
    for a, b in zip(outputs(one, names), outputs(other, names)):
        torch.testing.assert_close(a, b)
    assert not torch.equal(*outputs(one, ["first", block]))
    for model in (one, other):
        model.set_adapter(["first", block])
        both = model(IDS).logits
        rows = model(IDS, adapter_names=["third", block]).logits
        model.set_adapter("third")
        torch.testing.assert_close(rows[:1], model(IDS[:1]).logits)
        model.set_adapter(block)
        torch.testing.assert_close(rows[1:], model(IDS[1:]).logits)
        assert not torch.equal(both, model(IDS).logits)


@pytest.mark.parametrize("block", BLOCKS)
def test_unload_and_merge(block):
    base = make("llama")
    plain = made([block, "first"]).unload().eval()
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(plain(IDS).logits, base(IDS).logits)

    model = made([block, "first", "second"])
    model.set_adapter(["first", "second"])
    expected = model(IDS).logits
    model.delete_adapter(block)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(merged(IDS).logits, expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_names_in_a_file_do_not_say_what_is_around(block):
    within = made([block, "first"])
    alone = graft.get_peft_model(make("llama"), WITHIN["first"], "first")
    state = graft.get_peft_model_state_dict(within, adapter_name="first")
    assert state.keys() == graft.get_peft_model_state_dict(alone, adapter_name="first").keys()
    assert not graft.set_peft_model_state_dict(alone, state, adapter_name="first").unexpected_keys
    torch.testing.assert_close(alone.eval()(IDS).logits, outputs(within, ["first"])[0])


class Pair(NamedTuple):
    y: torch.Tensor
    rest: int


class Block(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.lin, self.form = nn.Linear(8, 8), form

    def forward(self, hidden_states):
        return self.form(self.lin(hidden_states))


@pytest.mark.parametrize("form", [
    lambda y: [y, 1], lambda y: (y, 1), lambda y: Pair(y, 1), lambda y: BaseModelOutput(last_hidden_state=y),
    lambda y: {"y": y, "rest": 1},
], ids=["list", "tuple", "named tuple", "model output", "dict"])  # fmt: skip
def test_the_output_keeps_its_class(form):
    x, base = torch.randn(2, 3, 8), nn.Sequential(Block(form))
    base.config = SimpleNamespace(hidden_size=8, to_dict=lambda: {"hidden_size": 8})
    model = graft.get_peft_model(base, graft.SteeringConfig(target_modules=["0"]))
    block, call = model.base_model.model[0], get_registry(model).call
    next(iter(block.parameters_of("default"))).data.fill_(1)
    plain = block.base_layer(x)
    mixed = call.context._replace(rows=Rows.from_names(["default", "__base__"], torch.device("cpu")))
    for context, changed in ((call.context, [True, True]), (mixed, [True, False])):
        with call.use_context(context):
            out = block(x)
        assert type(out) is type(plain) and len(out) == len(plain)
        y, before = (next(iter(o.values())) if hasattr(o, "values") else o[0] for o in (out, plain))
        assert [not torch.equal(a, b) for a, b in zip(y, before)] == changed
