# SPDX-License-Identifier: Apache-2.0
"""Initial values under a seed, outputs and gradients are PEFT's, fresh and with arbitrary adapter values."""

import torch

from tests import models
from tests.pair import LIBS, adapt, both, close, close_dicts, gradients, output, randomize
from tests.parity.test_init import assert_same_start
from tests.samples import SAMPLES, alike, over_all

DROPOUT = [s for s in SAMPLES if any("dropout" in key for key in s.kwargs)]
# the others draw for each layer and call even when nothing is dropped, or never drop: test_differences.py
SEEDED = ("LORA", "VERA", "HIRA", "MISS", "VBLORA", "RANDLORA", "UNILORA", "TINYLORA", "FROD", "GRALORA")
SAME_MASKS = [s for s in DROPOUT if s.method in SEEDED]


@over_all(alike("forward"))
def test_outputs_and_gradients(sample):
    made = [(adapt(lib, sample), torch.get_rng_state()) for lib in LIBS]
    if "init" not in sample.unlike:
        assert_same_start(sample, *made)
    ours, theirs = (m.eval() for m, _ in made)
    fresh, tolerance = output(theirs, sample), 5e-5 if "kasa" in sample.name else 1e-5  # a decomposed base
    if fresh.isfinite().all():  # PEFT's Gram-Schmidt of HRA's doubled initial columns divides by zero
        close(output(ours, sample), fresh, tolerance)

    randomize(ours, sample), randomize(theirs, sample)
    changed = output(theirs, sample)
    assert not torch.allclose(fresh, changed, atol=1e-3)  # or the next line would say nothing
    close(output(ours, sample), changed, tolerance)
    if sample.kwargs.get("inference_mode") or "gradients" in sample.unlike:
        return
    if sample not in DROPOUT:
        ours.train(), theirs.train()
    close_dicts(gradients(ours, sample), gradients(theirs, sample), tolerance)


@over_all(SAME_MASKS)
def test_dropout_under_a_seed(sample):
    """Training mode draws the same masks in the same order."""
    results = []
    for model in both(sample):
        randomize(model, sample).train()
        models.seed(5)
        results.append((output(model, sample), gradients(model, sample)))
    close(results[0][0], results[1][0])
    close_dicts(results[0][1], results[1][1])
