# SPDX-License-Identifier: Apache-2.0
"""BD-LoRA beyond the matrix and the comparison of samples: its matrices, what it is combined into, refusals."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import graft
from tests.models import adapted, nudged, seeded
from tests.raised import refuses, warns

LIBS = (graft, peft)
A, B = dict(target_modules_bd_a=["down"], nblocks=2), dict(target_modules_bd_b=["down"], nblocks=2)


def net(layer=None) -> nn.Module:
    with seeded(0):
        return nn.ModuleDict({"down": layer or nn.Linear(10, 12)})


def with_blocks(blocks, lib=graft, base=None, adapters=("default",), **options):
    config = lib.LoraConfig(
        r=4, lora_alpha=6, target_modules=["down"], use_bdlora=lib.BdLoraConfig(**blocks), **options
    )
    return nudged(adapted(base or net(), dict.fromkeys(adapters, config), lib=lib, scale=0))


def inputs(rows=70):
    with seeded(2):
        return torch.randn(rows, 10)


@pytest.mark.differs("BD-LoRA: `get_delta_weight`, combining, hot-swapping")
@pytest.mark.parametrize("blocks, zero", [(A, "A"), (B, "B")])
def test_the_update_is_that_of_block_diagonal_matrices(blocks, zero):
    """PEFT's `get_delta_weight` fails: it multiplies what is kept of the factors."""
    layer = with_blocks(blocks).base_model.model["down"]
    parts = {side: getattr(layer, f"lora_{side}")["default"].weight for side in "AB"}
    whole = torch.zeros(4, 10) if zero == "A" else torch.zeros(12, 4)
    rows, columns = whole.shape[0] // 2, whole.shape[1] // 2
    assert parts[zero].shape == (whole.shape[0], columns)
    for k in range(2):
        whole[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] = parts[zero][k * rows : (k + 1) * rows]
    parts[zero] = whole
    assert_close(layer.get_delta_weight("default"), parts["B"] @ parts["A"] * 1.5)


@pytest.mark.parametrize("blocks", [A, B], ids="AB")
def test_hooks_on_the_factors_run(blocks):
    model, x, seen = with_blocks(blocks), inputs(), []
    plain = model.base_model.model["down"](x)
    for side in "AB":
        factor = getattr(model.base_model.model["down"], f"lora_{side}")["default"]
        factor.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    assert_close(model.base_model.model["down"](x), plain)
    assert seen == [(70, 4), (70, 12)]


@pytest.mark.differs("BD-LoRA on Conv1D")
def test_it_adapts_what_stores_its_weight_transposed():
    """PEFT: AttributeError."""
    model = warns(UserWarning, "fan_in_fan_out", with_blocks, A, base=net(Conv1D(12, 10)))
    layer, x = model.base_model.model["down"], inputs()
    y = layer(x)
    layer.merge()
    assert_close(layer.base_layer(x), y)


def test_without_a_pattern_that_fits_and_not_strict_it_is_lora():
    model = with_blocks(dict(target_modules_bd_a=["up"], nblocks=3, match_strict=False))
    layer = model.base_model.model["down"]
    assert layer.lora_A["default"].weight.shape == (4, 10) and layer.lora_B["default"].weight.shape == (12, 4)


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_a_combination_is_plain_lora(kind, tmp_path):
    model = with_blocks(A, adapters=("default", "b"))
    layer = model.base_model.model["down"]
    wanted = 0.6 * layer.get_delta_weight("default") + 0.8 * layer.get_delta_weight("b")
    model.add_weighted_adapter(["default", "b"], [0.6, 0.8], "sum", kind)
    assert model.peft_config["sum"].use_bdlora is None and model.peft_config["default"].use_bdlora is not None
    if kind == "cat":
        assert_close(layer.get_delta_weight("sum"), wanted, rtol=1e-5, atol=1e-6)
    model.set_adapter("sum")
    x, y = inputs(), layer(inputs())
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert_close(graft.PeftModel.from_pretrained(net(), tmp_path / "sum").base_model.model["down"](x), y)


def test_blocks_are_not_swapped_in(tmp_path):
    model = with_blocks(A)
    model.save_pretrained(tmp_path)
    plain = graft.get_peft_model(net(), graft.LoraConfig(r=4, target_modules=["down"]))
    for carrier in (model, plain):
        refuses(graft.ConfigError, "block-diagonal factors", graft.hotswap_adapter, carrier, str(tmp_path), "default")
    refuses(graft.ConfigError, "block-diagonal factors", graft.prepare_model_for_compiled_hotswap, model, target_rank=8)


@pytest.mark.parametrize("lib", LIBS)
def test_blocks_of_b_start_at_zero_also_where_a_plain_b_would_not(lib):
    options = dict(r=4, target_modules=["down"], init_lora_weights=False)
    zero = []
    for blocks in A, B:
        config = lib.LoraConfig(use_bdlora=lib.BdLoraConfig(**blocks), **options)
        model = lib.get_peft_model(net(), config)
        zero.append(not model.base_model.model["down"].lora_B["default"].weight.any())
    assert zero == [False, True]


REFUSED = {
    "overlap": (dict(target_modules_bd_a=["down"], target_modules_bd_b=["down"]), {}, "Found overlapping modules"),
    "both": (dict(target_modules_bd_a=["down"], target_modules_bd_b=["dow"]), {}, "matches both A and B"),
    "neither": (dict(target_modules_bd_a=["up"]), {}, "matches neither A nor B block-diagonal patterns"),
    "features": (dict(target_modules_bd_a=["down"], nblocks=4), {}, "not divisible by 4"),
    "rank": (dict(target_modules_bd_b=["down"], nblocks=3), {}, "not divisible by 3"),
}


@pytest.mark.parametrize("lib", LIBS)
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, lib):
    blocks, options, text = REFUSED[case]
    refuses(ValueError, text, with_blocks, blocks, lib, **options)


@pytest.mark.differs("BD-LoRA or QA-LoRA with PiSSA, OLoRA and their like")
@pytest.mark.differs("BD-LoRA with `lora_bias` where B has blocks")
@pytest.mark.parametrize(
    "blocks, options, text",
    [
        (A, dict(init_lora_weights="pissa"), "init_lora_weights='pissa' cannot fill"),
        (B, dict(lora_bias=True), "The block-diagonal B of layer"),
        (A, dict(use_dora=True), r"unsupported variant combination: \('use_bdlora', 'use_dora'\)"),
        (dict(nblocks=0), {}, "`nblocks` should be positive"),
    ],
)
def test_refused_where_peft_goes_wrong(blocks, options, text):
    """PEFT shifts the base by PiSSA's factors and draws others; drops the bias; divides by zero."""
    base = net()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    refuses(graft.ConfigError, text, with_blocks, blocks, base=base, **options)
    assert type(base["down"]) is nn.Linear
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
