# SPDX-License-Identifier: Apache-2.0
"""An adapter on one of two modules that share a weight changes that one alone, merged or not."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.conformance.samples import disturb
from tests.models import seeded

IDS = torch.tensor([[1, 2, 5], [4, 4, 0]])


class Tied(nn.Module):
    """An embedding and a head on its weight."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.lin(self.emb(ids))))


CONFIGS = {
    "LORA": dict(r=2, lora_alpha=6),
    "LOHA": dict(r=2),
    "HRA": dict(r=2),
    "OFT": dict(oft_block_size=2),
    "VERA": dict(r=3),
    "IA3": dict(feedforward_modules=[]),
}


def adapted(method, targets):
    with seeded(0):
        config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=targets, **CONFIGS[method])
        model = graft.get_peft_model(Tied(), config)
        model.add_adapter("b", copy.deepcopy(config))
    return disturb(model).eval()


def parts(model):
    net = model.get_base_model()
    bare = [getattr(m, "base_layer", m) for m in (net.emb, net.head)]
    return (*bare, net)


def tied(model):
    emb, head, _ = parts(model)
    return emb.weight is head.weight


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("targets", [["emb"], ["head"], ["emb", "head"]], ids=str)
def test_merging_leaves_the_other_one(method, targets):
    model = adapted(method, targets)
    emb, head, _ = parts(model)
    weight, before, expected = emb.weight, emb.weight.clone(), model(IDS)
    assert tied(model)
    model.merge_adapter()
    assert not tied(model)
    assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    left = [m for name, m in (("emb", emb), ("head", head)) if name not in targets]
    assert all(m.weight is weight for m in left) and torch.equal(weight, before)
    model.unmerge_adapter()
    assert tied(model) and emb.weight is weight and torch.equal(weight, before)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("method", ["LORA", "HRA"])
def test_merging_in_steps_and_unmerging_ties_again(method):
    model = adapted(method, ["emb"])
    emb, _, _ = parts(model)
    weight, before = emb.weight, emb.weight.clone()
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    model.unmerge_adapter()
    assert tied(model) and emb.weight is weight and torch.equal(weight, before)


def test_a_failed_merge_leaves_them_tied():
    model = adapted("LORA", ["emb", "head"])
    with torch.no_grad():
        model.base_model.layers["head"].lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert tied(model)


def test_a_merged_model_stays_whole_when_it_moves_or_is_copied():
    model = adapted("LORA", ["emb"])
    expected = model(IDS)
    model.merge_adapter()
    other = copy.deepcopy(model).double()
    other.unmerge_adapter()
    assert tied(other)
    assert_close(other(IDS).float(), expected, rtol=1e-5, atol=1e-5)
    assert not tied(model)


def test_unloading_a_merged_transformer_says_that_it_is_no_longer_tied():
    from tests import models

    base = models.make("gpt2")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    assert base.lm_head.weight is base.transformer.wte.weight
    with seeded(0):
        model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["wte"], r=2, task_type="CAUSAL_LM"))
    disturb(model)
    batch = models.inputs("gpt2")
    expected = models.output(model, batch)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    assert_close(models.output(plain, batch), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_was_not_merged_stays_tied():
    from tests import models

    base = models.make("gpt2")
    base.tie_weights()
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["wte"], r=2))
    plain = model.unload()
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.transformer.wte.weight
