# SPDX-License-Identifier: Apache-2.0
"""Adapters on a half precision base: kept in float32 unless told otherwise; the output keeps the base's dtype."""

import pytest
import torch

import graft
from tests import models
from tests.pair import LIBS, adapt, close, close_dicts, gradients, output, randomize, shapes
from tests.samples import alike, each, mergeable, over

HALF = [
    s
    for s in alike("forward")
    if s.name in ("plain", "head", "bias_all", "tokens", "gaussian", "pissa", "kasa", "unsaved", "random")
]


def rounding(sample) -> float:
    """KaSA takes components out of the weight, where PEFT adds up the others: the last bit may differ."""
    return 2**-7 if sample.name == "kasa" else 0


def low(sample, dtype=torch.bfloat16):
    return models.make(sample.model).to(dtype)


def batch(sample, dtype=torch.bfloat16):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in models.inputs(sample.model).items()}


@pytest.mark.parametrize("autocast", [True, False])
@over(HALF)
def test_dtypes_and_values(sample, autocast):
    """Initial values too: some are drawn in float32 and rounded."""
    ours, theirs = (adapt(lib, sample, base=low(sample), autocast_adapter_dtype=autocast) for lib in LIBS)
    assert shapes(ours) == shapes(theirs)
    if "init" not in sample.unlike:
        close_dicts(dict(ours.state_dict()), dict(theirs.state_dict()), rounding(sample))


INJECTABLE = [s for s in HALF if not graft.method_of(s.method).shares and "init" not in s.unlike]


@over(INJECTABLE)
def test_without_a_peft_model(sample):
    """Then it stays half precision: transformers' and diffusers' add_adapter inject so."""
    seen = []
    for lib in LIBS:
        models.seed(1)
        seen.append(lib.inject_adapter_in_model(sample.config(lib), low(sample)))
    assert shapes(seen[0]) == shapes(seen[1])
    close_dicts(*(dict(m.state_dict()) for m in seen), rounding(sample))


@pytest.mark.parametrize("autocast", [True, False])
@over(HALF)
def test_outputs(sample, autocast):
    ours, theirs = (
        randomize(adapt(lib, sample, base=low(sample), autocast_adapter_dtype=autocast), sample).eval() for lib in LIBS
    )
    a, b = (models.output(m, batch(sample)) for m in (ours, theirs))
    assert a.dtype == b.dtype
    # three steps of bfloat16: the order of the casts may differ. FRoD's whole weight is a product of three matrices
    assert (a.float() - b.float()).square().mean().sqrt() < (0.04 if sample.method == "FROD" else 0.025)


OTHER = [
    (sample, dtype)
    for sample in each(models="mlp")
    for dtype in (torch.float16, torch.float64)
    if not (sample.method == "PSOFT" and dtype is torch.float64)  # of which PEFT computes no basis
]


@pytest.mark.parametrize("sample, dtype", OTHER, ids=str)
def test_other_dtypes(sample, dtype):
    ours, theirs = (randomize(adapt(lib, sample, base=low(sample, dtype)), sample).eval() for lib in LIBS)
    assert shapes(ours) == shapes(theirs)
    a, b = (models.output(m, batch(sample, dtype)) for m in (ours, theirs))
    assert a.dtype == b.dtype
    close(a.float(), b.float(), 1e-5 if dtype is torch.float64 else 1e-2)


@over(mergeable(each()))
@pytest.mark.filterwarnings("ignore:Merging has lost")  # of bfloat16
def test_merge_keeps_the_dtype(sample):
    ours, theirs = (randomize(adapt(lib, sample, base=low(sample)), sample).merge_and_unload() for lib in LIBS)
    assert shapes(ours) == shapes(theirs)
    a, b = ({k: v.float() for k, v in m.state_dict().items()} for m in (ours, theirs))
    close_dicts(a, b, 0.02)


@over(each())
def test_loading_into_a_half_precision_base(sample, tmp_path):
    adapt(LIBS[1], sample, base=low(sample)).save_pretrained(tmp_path)
    for options in ({}, {"autocast_adapter_dtype": False}):
        ours, theirs = (lib.PeftModel.from_pretrained(low(sample), tmp_path, **options) for lib in LIBS)
        assert shapes(ours) == shapes(theirs)
        close_dicts(dict(ours.state_dict()), dict(theirs.state_dict()), 0)


@over([s for s in each() if "autocast" not in s.unlike])
def test_autocast(sample):
    """Float32 weights under bfloat16 autocast."""
    results = []
    for lib in LIBS:
        model = randomize(adapt(lib, sample), sample).eval()
        with torch.autocast("cpu", torch.bfloat16):
            results.append((output(model, sample), gradients(model, sample)))
    assert results[0][0].dtype == results[1][0].dtype
    close(results[0][0].float(), results[1][0].float(), 0.1)
    assert results[0][1].keys() == results[1][1].keys()


MOVED = [s for s in each(models="llama") if s.method != "ADAMSS"]  # which in PEFT keeps to the dtype of its start


@over(MOVED)
def test_moving_the_model_afterwards(sample):
    """`.to(dtype)` reaches adapters as well; nothing holds on to the old tensors."""
    ours, theirs = (randomize(adapt(lib, sample), sample).to(torch.float64).eval() for lib in LIBS)
    assert shapes(ours) == shapes(theirs)
    close(output(ours, sample), output(theirs, sample))
