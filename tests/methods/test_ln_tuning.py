# SPDX-License-Identifier: Apache-2.0
"""LN tuning whose trained copy someone cast to another dtype than the layer's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import graft
from tests.models import seeded

LAYERS = {
    "layer norm": lambda: nn.LayerNorm(8),
    "llama": lambda: LlamaRMSNorm(8),
    "batch norm": lambda: nn.BatchNorm1d(8),
    "linear": lambda: nn.Linear(8, 8),
    "block": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
    "embedding": lambda: nn.Embedding(5, 8),
}
DTYPES = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)]


def cast_copy(kind, dtype, copy_dtype):
    """The layer whose copy was trained and cast, before a linear layer; inputs; and the layer with its values."""
    with seeded(0):
        layer = LAYERS[kind]()
        model = nn.Sequential(layer, nn.Linear(8, 4)).to(dtype)
        x = torch.randint(0, 5, (3,)) if kind == "embedding" else torch.randn(3, 8, dtype=dtype)
        plain = copy.deepcopy(model)
        model = graft.get_peft_model(model, graft.LNTuningConfig(target_modules=["0"]))
        trained = model.base_model.model[0].ln_tuning_layers["default"].to(copy_dtype)
        for p in trained.parameters():
            p.data += torch.rand_like(p) / 2
    plain[0].load_state_dict(trained.state_dict())
    return model, trained, x, plain


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    model, _, x, plain = cast_copy("llama", torch.bfloat16, torch.float32)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), plain(x), rtol=0, atol=0)


@pytest.mark.differs("LN tuning whose copy was cast to another dtype than the layer's")
@pytest.mark.parametrize("dtype, copy_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_it_runs_and_merges_as_the_layer_in_its_dtype(kind, dtype, copy_dtype):
    model, trained, x, plain = cast_copy(kind, dtype, copy_dtype)
    layer, values = model.base_model.model[0], {n: t.clone() for n, t in trained.state_dict().items()}
    for mode in (True, False):
        out = model.train(mode)(x)
        assert_close(out, plain.train(mode)(x), rtol=0, atol=0)
        assert_close(
            dict(layer.ln_tuning_layers["default"].named_buffers()), dict(plain[0].named_buffers()), check_dtype=False
        )
    out.sum().backward()
    assert all(p.grad is not None and p.dtype == p.grad.dtype == copy_dtype for p in trained.parameters())
    values |= {n: t.clone() for n, t in trained.named_buffers()}
    saved = graft.get_peft_model_state_dict(model)
    model.merge_adapter()
    assert_close(model(x), out, rtol=0, atol=0)
    assert {p.dtype for p in layer.base_layer.parameters()} == {dtype}
    assert_close(graft.get_peft_model_state_dict(model), saved, rtol=0, atol=0)
    model.unmerge_adapter()
    assert layer.ln_tuning_layers["default"] is trained
    assert_close(dict(trained.state_dict()), values, rtol=0, atol=0)
    assert_close(model(x), out, rtol=0, atol=0)
    merged = model.merge_and_unload()
    assert_close(merged(x), out, rtol=0, atol=0)
    assert {p.dtype for p in merged.parameters()} == {dtype}
