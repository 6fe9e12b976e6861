# SPDX-License-Identifier: Apache-2.0
"""What an injection has to say of many layers, it says once."""

import warnings

from torch import nn

import graft
from tests.raised import refuses


def net(*widths: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, 6, bias=bias) for width in widths))


def config(cls, **options):
    return cls(target_modules=r"\d", **options)


def said(model, cfg) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        graft.get_peft_model(model, cfg)
    assert {w.filename for w in seen} <= {__file__}
    return [str(w.message) for w in seen]


def test_a_text_names_one_layer_and_counts_the_others():
    (text,) = said(net(6, 6, 6, bias=False), config(graft.BeftConfig))
    assert text.startswith("Layer '0' (and 2 more) has no bias.")
    (text,) = said(net(6, bias=False), config(graft.BeftConfig))
    assert text.startswith("Layer '0' has no bias.")


def test_other_numbers_are_another_text():
    assert said(net(6, 9, 6), config(graft.OFTConfig, oft_block_size=5)) == [
        "Invalid `oft_block_size` (5) for '0' (and 1 more): adjusted to (6).",
        "Invalid `oft_block_size` (5) for '1': adjusted to (3).",
    ]


def test_a_warning_that_is_an_error_leaves_the_model():
    model = net(6, 6, bias=False)
    before = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuses(graft.PeftWarning, "has no bias", graft.get_peft_model, model, config(graft.BeftConfig))
    assert before == (list(model.state_dict()), [p.requires_grad for p in model.parameters()])
    assert {type(m) for m in model} == {nn.Linear}
    assert len(said(model, config(graft.BeftConfig))) == 1
