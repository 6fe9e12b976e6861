# SPDX-License-Identifier: Apache-2.0
"""The same seed gives the same initial values, bit for bit, and leaves the generator in the same state.

test_forward.py asks it of the models that it compares anyway.
"""

import torch

from tests.pair import LIBS, adapt, both, close_dicts
from tests.samples import alike, first, over_all


def assert_same_start(sample, ours, theirs):
    """Compare two models, each with the state in which it left the generator."""
    (ours, state), (theirs, their_state) = ours, theirs
    factored = str(sample.kwargs.get("init_lora_weights")).startswith(("pissa", "olora")) or "kasa" in sample.name
    tolerance = 3e-6 if factored else 0  # a residual of the weight: the last bit is the layout's
    close_dicts(ours.state_dict(), theirs.state_dict(), tolerance)
    assert torch.equal(state, their_state) or "rng" in sample.unlike


@over_all([s for s in alike("init") if "forward" in s.unlike])
def test_seeded_initial_values(sample):
    assert_same_start(sample, *((adapt(lib, sample), torch.get_rng_state()) for lib in LIBS))


def test_random_rows_of_tokens():
    ours, theirs = both(first("TRAINABLE_TOKENS", "embedding", "random"))
    key = "base_model.model.emb.trainable_tokens_delta.default"
    assert torch.equal(ours.state_dict()[key], theirs.state_dict()[key])
