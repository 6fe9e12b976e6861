# SPDX-License-Identifier: Apache-2.0
"""MiSS: its three variants, beside each other and with two adapters."""

import warnings

import pytest
import torch

import graft
from graft.kernels.structured import Repeated, Shards
from tests import models
from tests.pair import LIBS, close, output, randomize
from tests.samples import Sample, first

VARIANTS = {"plain": {}, "mini": dict(init_weights="mini", mini_r=2), "bat": dict(init_weights="bat")}


def config(lib, variant):
    return lib.MissConfig(target_modules=["lin0", "fc1"], r=2, **VARIANTS[variant])


@pytest.mark.parametrize("fan_in", [12, 13, 15])
def test_a_sum_of_shards_is_a_product_with_ones(fan_in):
    x = torch.linspace(-1, 1, 6 * fan_in).view(2, 3, fan_in)
    shards = Shards(4, fan_in, x)
    close(shards(x), x @ shards.weight.T)
    assert shards.weight.shape == (4, fan_in) and set(shards.weight.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("times", [1, 3])
def test_a_repeated_block_is_a_matrix(times):
    z, D = torch.linspace(-1, 1, 24).view(2, 3, 4), torch.linspace(0, 1, 20).view(4, 5)
    block = Repeated(D, times)
    close(block(z), z @ block.weight.T)
    assert block.weight.shape == (5 * times, 4)


@pytest.mark.differs("MiSS adapters of different variants on one layer")
def test_variants_share_a_layer(tmp_path):
    """PEFT runs the variant of the first adapter for all, and fails."""
    sample = Sample("MISS", "all", "mlp", {})
    model = graft.get_peft_model(models.make("mlp"), config(graft, "plain"), "plain")
    for name in ("mini", "bat"):
        model.add_adapter(name, config(graft, name))
    randomize(model, sample).eval()
    model.save_pretrained(tmp_path)
    for name in VARIANTS:
        model.set_adapter(name)
        alone = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path / name)
        close(output(alone, sample), output(model, sample))
    model.base_model.set_adapter(list(VARIANTS))
    together = output(model, sample)
    model.merge_adapter()
    close(output(model, sample), together)
    model.unmerge_adapter()
    names = ["bat", "plain", "mini"]
    mixed = output(model, sample, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        close(mixed[row], output(model, sample)[row])


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_adapters_act_as_in_peft(variant):
    """Those of "bat" one on the other."""
    outputs, merged = [], []
    for lib in LIBS:
        sample = first("MISS")
        model = lib.get_peft_model(models.make("mlp"), config(lib, variant))
        model.add_adapter("b", config(lib, variant))
        randomize(model, sample).eval().base_model.set_adapter(["default", "b"])
        outputs.append(output(model, sample))
        model.merge_adapter()
        merged.append(output(model, sample))
    for found in (*outputs[1:], *merged):
        close(found, outputs[0])


@pytest.mark.differs('MiSS with `init_weights="bat"` and `miss_dropout`')
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_without_effect_is_said(variant):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        graft.MissConfig(miss_dropout=0.1, **VARIANTS[variant])
    assert any("miss_dropout has no effect" in str(w.message) for w in seen) == (variant == "bat")
