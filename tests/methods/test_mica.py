# SPDX-License-Identifier: Apache-2.0
"""MiCA beyond the matrix and the comparison of samples: B, which never trains, and refusals."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests import models
from tests.models import seeded

LIBS = (graft, peft)


def net(layer=None) -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(layer or nn.Linear(10, 12))


def config(lib=graft, **options):
    return lib.LoraConfig(**dict(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights="mica") | options)


@pytest.mark.differs("MonteCLoRA on embeddings and convolutions, MiCA on convolutions")
@pytest.mark.parametrize(
    "layer", [nn.Linear(10, 12), nn.Embedding(11, 6), nn.Conv2d(4, 6, 3)], ids=lambda m: str(m)[:6]
)
def test_b_has_the_singular_vectors_that_count_least(layer):
    """PEFT: a ValueError for a convolution."""
    model = graft.get_peft_model(net(layer), config())
    lora = model.base_model.model[0]
    A, B = (p.detach().flatten(1) for p in lora.methods["default"].pair)
    W = lora.W0.flatten(1)
    S = torch.linalg.svdvals(W)
    assert_close(B.T @ B, torch.eye(3))
    assert_close((B.T @ W).norm(dim=1), S[-3:])
    assert not A.any()


def test_b_never_trains(tmp_path):
    model = graft.get_peft_model(net(), config())
    layer = model.base_model.model[0]
    B = layer.lora_B["default"].weight
    trains = lambda: [name for name, p in model.named_parameters() if p.requires_grad]
    (only,) = trains()
    assert "lora_A" in only
    model.set_requires_grad("default")
    model.set_adapter("default")
    graft.get_peft_model(net(), config())
    assert trains() == [only] and not B.requires_grad
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(net(nn.Linear(10, 12)), tmp_path, is_trainable=True)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [only]
    assert torch.equal(loaded.base_model.model[0].lora_B["default"].weight, B), "of the file, not of the other weight"


def test_on_meta_it_waits_for_values():
    with torch.device("meta"):
        base = net(nn.Linear(10, 12))
    model = graft.get_peft_model(base, config())
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.differs('`init_lora_weights="MiCA"`')
def test_another_spelling_freezes_b_too():
    """PEFT initialises as for "mica", and trains B."""
    model = graft.get_peft_model(net(), config(init_lora_weights="MiCA"))
    assert not model.base_model.model[0].lora_B["default"].weight.requires_grad


@pytest.mark.differs("MiCA on float64 or a quantized base")
def test_float64():
    """PEFT: TypeError."""
    model = graft.get_peft_model(net().double(), config())
    B = model.base_model.model[0].lora_B["default"].weight
    assert B.dtype == torch.float64
    assert_close(B.T @ B, torch.eye(3, dtype=torch.float64))


@pytest.mark.differs("MiCA, MonteCLoRA on tied layers (`ensure_weight_tying`)")
def test_tied_layers_are_refused():
    """PEFT freezes the head's B, which is the embedding's A, and trains B through the head."""
    base = models.make("opt")
    before = type(base.get_input_embeddings())
    with pytest.raises(graft.ConfigError, match="MiCA freezes B, which the tied layer 'lm_head' would have as its A"):
        graft.get_peft_model(base, config(target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert type(base.get_input_embeddings()) is before
