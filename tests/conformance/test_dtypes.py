# SPDX-License-Identifier: Apache-2.0
"""Adapters whose trainable tensors somebody has cast, while frozen ones keep their dtype."""

import pytest
import torch
from torch.testing import assert_close

from graft.core.folding import compute_change
from tests.conformance import samples

LINEAR = [cell for cell in samples.CELLS if cell.layer.name == "linear" and cell.store.name == "dense"]
CALLED = [samples.Cell(sample, LINEAR[0].layer, LINEAR[0].store) for sample in samples.CALLED]
CELLS = [cell for cell in (*LINEAR, *CALLED) if cell.sample.method != "LN_TUNING"]  # a module whole, as torch runs it


def cast(cell, base, adapter):
    model = cell.trained()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = p.data.to(adapter)
        elif "base_layer" in name or name.endswith((".before", ".after")):
            p.data = p.data.to(base)
    return model


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: str(cell.sample))
def test_trainable_tensors_in_another_dtype_run_train_and_have_an_update(cell, base):
    plain, model, x = cell.trained(), cast(cell, base, torch.bfloat16), cell.inputs()
    with torch.no_grad():
        expected = plain(x)
        y = model(x.to(base))
    assert y.dtype == base
    assert_close(y.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    layer = model.get_base_model().layer
    try:
        delta = layer.get_delta_weight("default")
    except NotImplementedError:
        pass
    else:
        full = plain.get_base_model().layer.get_delta_weight("default")
        assert_close(delta.float(), full, rtol=0.1, atol=0.1 * full.abs().max().item())
    model.train()(x.to(base)).float().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None for p in trained)
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in trained)


@pytest.mark.parametrize("value", [0, 1])
def test_factors_of_one_task_in_another_dtype(value):
    cell = next(c for c in CALLED if c.sample.method == "MTLLORA")
    layers = [model.get_base_model().layer for model in (cell.trained(), cast(cell, torch.float32, torch.bfloat16))]
    A, B = zip(*(compute_change(m, m.effect_at(value))[:2] for m in (layer.methods["default"] for layer in layers)))
    for factors in (A, B):
        assert_close(factors[1], factors[0], rtol=0.05, atol=0.05)
