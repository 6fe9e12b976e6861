# SPDX-License-Identifier: Apache-2.0
"""Names, shapes, dtypes and trainability in memory are PEFT's."""

from tests.pair import both, shapes, trainable
from tests.samples import SAMPLES, over


@over(SAMPLES)
def test_a_fresh_model_looks_like_pefts(sample):
    ours, theirs = both(sample)
    assert shapes(ours) == shapes(theirs)
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}

    assert trainable(ours) == trainable(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    # optimizer states are stored by position: a training run can move from one library to the other
    in_order = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (ours, theirs)]
    assert in_order[0] == in_order[1]

    assert list(ours.targeted_module_names) == list(theirs.targeted_module_names)
    # injection leaves the mode of the base; whether new modules start in training mode is graft's own affair
    assert not any(m.training for n, m in ours.named_modules() if "base_layer" in n)
