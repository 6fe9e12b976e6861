# SPDX-License-Identifier: Apache-2.0
"""Uni-LoRA: the places of the numbers, and what files depend on."""

import numpy as np
import torch

import graft
from tests import models
from tests.pair import LIBS, adapt, close, close_dicts, output, randomize
from tests.raised import refuses
from tests.samples import Sample, first

SAMPLE = first("UNILORA")


def layers(model):
    return [m for m in model.modules() if isinstance(m, graft.AdapterLayer)]


def test_each_number_has_as_many_places_as_the_others():
    model = adapt(graft, SAMPLE)
    index = torch.cat([getattr(m, f"unilora_indices_{x}")["default"].flatten() for m in layers(model) for x in "AB"])
    counts = index.bincount(minlength=50)
    assert counts.max() - counts.min() <= 1
    scales = torch.cat([getattr(m, f"unilora_scales_{x}")["default"].flatten() for m in layers(model) for x in "AB"])
    close(scales, counts[index].rsqrt())


def test_draws_do_not_touch_numpys_generator():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    adapt(graft, SAMPLE)
    assert (np.random.get_state()[1] == before).all()


def test_a_file_with_indices_does_not_depend_on_other_layers(tmp_path):
    sample = Sample("UNILORA", "x", "mlp", dict(SAMPLE.kwargs, save_indices=True))
    model = randomize(adapt(graft, sample), sample).eval()
    model.save_pretrained(tmp_path)
    for lib in LIBS:
        loaded = lib.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
        close(output(loaded, sample), output(model, sample))


def test_adapters_have_their_own_vectors():
    model = adapt(graft, SAMPLE)
    model.add_adapter("b", SAMPLE.config(graft, r=2, theta_d_length=20, proj_seed=1))
    assert [len(model.base_model.unilora_theta_d[n]) for n in ("default", "b")] == [50, 20]
    refuses(graft.ConfigError, "save_indices", model.add_adapter, "c", SAMPLE.config(graft, save_indices=True))
    model.set_adapter("b")
    assert [p for p in model.parameters() if p.requires_grad] == [model.base_model.unilora_theta_d["b"]]


def test_half_precision_rounds_scales_as_in_peft():
    states = [dict(adapt(lib, SAMPLE, base=models.make("mlp").to(torch.bfloat16)).state_dict()) for lib in LIBS]
    close_dicts(*states, tolerance=0)
