# SPDX-License-Identifier: Apache-2.0
"""Names, shapes, dtypes and trainability in memory are PEFT's."""

import pytest

from tests.pair import both, shapes, trainable
from tests.samples import SAMPLES, some


@pytest.fixture(scope="module", params=some("names", SAMPLES), ids=str)
def pair(request):
    return both(request.param)


def test_names_and_shapes(pair):
    ours, theirs = pair
    assert shapes(ours) == shapes(theirs)
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}


def test_trainable_parameters(pair):
    ours, theirs = pair
    assert trainable(ours) == trainable(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_order_of_trainable_parameters(pair):
    """Optimizer states are stored by position: a training run can move from one library to the other."""
    ours, theirs = ([n for n, p in m.named_parameters() if p.requires_grad] for m in pair)
    assert ours == theirs


def test_targeted_modules(pair):
    ours, theirs = pair
    assert list(ours.targeted_module_names) == list(theirs.targeted_module_names)


def test_training_mode_of_the_base(pair):
    """Injection leaves it; whether new modules start in training mode is graft's own affair."""
    base = {n.removeprefix("base_model.model."): m.training for n, m in pair[0].named_modules() if "base_layer" in n}
    assert not any(base.values())
