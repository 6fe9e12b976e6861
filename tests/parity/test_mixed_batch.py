# SPDX-License-Identifier: Apache-2.0
"""One batch, another adapter per row."""

import pytest
import torch

from tests import models
from tests.covering import Case, Sometimes, law
from tests.pair import LIBS, adapt, close, close_dicts, outcome, output, randomize
from tests.samples import DRAWS, SAMPLES, by_row, each, first, over

NAMES = ["b", "__base__", "default"]
ROWS = {"all": NAMES, "one": ["default"] * 4, "repeated": ["b", "b", "__base__", "default", "b"]}
# PEFT implements mixed batches for LoRA and RoAd; on the other methods it runs the wrong adapter in silence
LORA = [
    s
    for s in SAMPLES
    if s.method == "LORA"
    and s.name in ("plain", "dropout", "lora_bias", "rslora", "tokens", "embed", "tasks", "lm_head", "kasa")
    and s.model not in ("conv3d", "bert", "deberta", "opt")
]
# whose own heads do not see the rows, as LoRA's do
ROAD = [s for s in SAMPLES if s.method == "ROAD" and s.name not in ("inference", "head", "classify")]
HEADS = [first("LORA", "mlp", "head"), first("LORA", "bert-seq", "classify")]


def two_adapters(lib, sample):
    model = adapt(lib, sample)
    model.add_adapter("b", sample.config(lib))
    return randomize(model, sample).eval()


@over(LORA + ROAD + HEADS)
def test_mixed_batch(sample):
    ours, theirs = (output(two_adapters(lib, sample), sample, adapter_names=NAMES) for lib in LIBS)
    close(ours, theirs, 5e-5 if sample.name == "kasa" else 1e-5)  # of which PEFT truncates the base twice


def row_by_row(model, sample, names):
    """The slow truth: each row alone, with its adapter active."""
    rows = []
    batch = models.inputs(sample.model, len(names))
    for i, name in enumerate(names):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(models.output(model, one))
        else:
            model.set_adapter(name)
            model.set_requires_grad(["default", "b"])
            rows.append(models.output(model, one))
    return torch.cat(rows, dim=1 if sample.model == "bert-qa" else 0)


EVERY = [
    s
    for s in by_row(SAMPLES)
    if s.name in ("plain", "kernel", "dilated", "grouped") and s.model not in ("opt", "deberta")
]


@pytest.mark.graft_only
@law(
    "sample, rows",
    [Case((s, rows)) for s in EVERY + HEADS for rows in ROWS],
    lambda case: [case[0].method, (case[0].model, case[0].name), Sometimes((case[0].method, case[1]), 3), case[1]],
)
def test_equals_row_by_row(sample, rows):
    model, names = two_adapters(LIBS[0], sample), ROWS[rows]
    expected = row_by_row(model, sample, names)
    mixed = models.output(model, {**models.inputs(sample.model, len(names)), "adapter_names": names})
    close(mixed, expected)


@pytest.mark.graft_only
@pytest.mark.parametrize("model_name", ["opt", "deberta"])
def test_layers_that_do_not_see_rows(model_name):
    """OPT flattens rows and tokens before fc1, DeBERTa projects positions: right or refused, never wrong."""
    sample = first("LORA", model_name)
    model = two_adapters(LIBS[0], sample)
    mixed = outcome(lambda: output(model, sample, adapter_names=NAMES))
    if mixed.error:
        assert mixed.kind is ValueError and ("fc2" in str(mixed.error) or "query_proj" in str(mixed.error))
    else:
        close(mixed.value, row_by_row(model, sample, NAMES))


@pytest.mark.differs("mixed batches (`adapter_names`)")
@pytest.mark.graft_only
@over(by_row(each(models="mlp llama")) + HEADS)
def test_trains_several_adapters_at_once(sample):
    """Each adapter's gradient comes from its own rows and no others. PEFT refuses mixed batches in training."""
    model = two_adapters(LIBS[0], sample).train(sample.method not in DRAWS)
    model.set_requires_grad(["default", "b"])
    gradients = []
    for y in (output(model, sample, adapter_names=NAMES), row_by_row(model, sample, NAMES)):
        model.zero_grad()
        model.set_requires_grad(["default", "b"])  # switching froze one of them
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (y * weights).mean().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        )
    assert {"default", "b"} <= {part for name in gradients[0] for part in name.split(".")}
    close_dicts(*gradients)
