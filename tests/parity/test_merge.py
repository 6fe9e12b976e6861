# SPDX-License-Identifier: Apache-2.0
"""Merged weights are PEFT's; unmerging and unloading give the base back."""

import pytest
import torch

from tests import models
from tests.covering import Case, Sometimes, law
from tests.pair import LIBS, adapt, both, close, close_dicts, outcome, output, randomize
from tests.raised import refuses
from tests.samples import alike, each, first, mergeable, over


def without_norms(samples):
    """LN tuning swaps modules instead of computing weights."""
    return [s for s in samples if s.method != "LN_TUNING"]


def module_types(model):
    return {name: type(m) for name, m in model.named_modules()}


@over(mergeable(alike("merge")))
def test_merge_and_unload(sample):
    pair = [randomize(m, sample).eval() for m in both(sample)]
    ours, theirs = (outcome(m.merge_and_unload) for m in pair)
    if theirs.error:
        assert isinstance(ours.error, theirs.kind) and str(theirs.error)[:22] in str(
            ours.error
        )  # a convolution with groups cannot absorb LoRA
        return
    close_dicts(ours.value.state_dict(), theirs.value.state_dict())
    assert module_types(ours.value) == module_types(theirs.value)
    close(output(ours.value, sample), output(theirs.value, sample), 3e-5)  # two decompositions each


IN_PLACE = [
    Case((sample, safe))
    for sample in mergeable(each(models="mlp llama conv1D conv1d conv2d conv3d embedding t5"))
    if "unmerge" not in sample.unlike
    for safe in (False, True)
]


@law(
    "sample, safe",
    IN_PLACE,
    lambda case: [(case[0].method, case[1]), (case[0].model, case[1]), Sometimes((case[0].method, case[0].model), 2)],
)
def test_merge_and_unmerge_in_place(sample, safe):
    results = []
    for model in (randomize(m, sample).eval() for m in both(sample)):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        plain = output(model, sample)
        model.merge_adapter(safe_merge=safe)
        merged = output(model, sample)
        close(merged, plain, 1e-4)
        results.append(({k: v.clone() for k, v in model.state_dict().items()}, merged))
        model.unmerge_adapter()
        close_dicts(dict(model.state_dict()), before, 1e-4)
        close(output(model, sample), plain, 1e-4)
    close_dicts(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


@over(each() + without_norms(each("head lm_head")))
def test_unload_gives_the_base_back(sample):
    ours, theirs = (randomize(m, sample).unload() for m in both(sample))
    close_dicts(dict(ours.state_dict()), dict(theirs.state_dict()), 0)
    assert module_types(ours) == module_types(theirs) == module_types(models.make(sample.model))
    assert not hasattr(ours, "peft_config")


@over(mergeable(each(models="mlp")))
def test_merge_one_of_two(sample):
    """Merging names the adapters; what is not merged stays out of the result."""
    merged = []
    for lib, model in zip(LIBS, both(sample)):
        model.add_adapter("b", sample.config(lib))
        randomize(model, sample)
        merged.append(model.merge_and_unload(adapter_names=["b"]).state_dict())
    close_dicts(*map(dict, merged))


def break_one_layer(model):
    """Make the last layer's adapter infinite, or what layers share if it has no more; returns how to mend it."""
    found = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    broken = ([p for n, p in found if "layers.2" in n] or [p for _, p in found])[-1]
    kept = broken.detach().clone()
    broken.data.fill_(torch.inf)
    return lambda: broken.data.copy_(kept)


@pytest.mark.parametrize("lib", LIBS)
@over(without_norms(mergeable(each(models="mlp"))))
def test_safe_merge_refuses_what_is_not_finite(sample, lib):
    model = randomize(adapt(lib, sample), sample)
    break_one_layer(model)
    refuses(ValueError, r"NaNs detected in the merged weights.*default", model.merge_adapter, safe_merge=True)


@pytest.mark.differs("a failed safe merge")
@pytest.mark.graft_only
@over(without_norms(mergeable(each(models="mlp"))))
def test_refused_merge_changes_nothing(sample):
    """PEFT leaves the layers before the broken one merged."""
    model = randomize(adapt(LIBS[0], sample), sample)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mend = break_one_layer(model)
    refuses(ValueError, None, model.merge_adapter, safe_merge=True)
    mend()
    close_dicts(dict(model.state_dict()), before, 0)
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize("lib", LIBS)
def test_merge_reports_what_it_skips(lib):
    sample = first("LORA")
    model = adapt(lib, sample)
    model.merge_adapter()
    again = outcome(model.merge_adapter)
    assert again.warned("All adapters are already merged, nothing to do")
    model.unmerge_adapter()
    assert outcome(model.unmerge_adapter).warned("Already unmerged. Nothing to do.")
