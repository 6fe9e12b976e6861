# SPDX-License-Identifier: Apache-2.0
"""What a merge tells of the update that rounding took: a share for each layer, and a warning with the remedy."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.errors import PeftWarning
from tests.raised import warns
from tests.storage.test_bnb import eight, four, package  # noqa: F401

WIDTH = 64


def model(dtype=torch.float32, hold=lambda m: m):
    torch.manual_seed(0)
    layers = [hold(nn.Linear(WIDTH, WIDTH).requires_grad_(False).to(dtype)) for _ in range(3)]
    return nn.Sequential(*layers).eval()


def with_change(base, size, name="a", **options):
    made = graft.get_peft_model(base, graft.LoraConfig(r=4, target_modules=["0", "2"], **options), name)
    for i, layer in enumerate((made.base_model.model[0], made.base_model.model[2])):
        with torch.no_grad():
            layer.lora_B[name].weight.normal_(std=size / (1 + 9 * i))
    return made


def by_hand(layer, before, delta):
    asked, kept = delta.float(), layer.get_base_weight().float() - before
    return float((kept * asked).sum() / (asked * asked).sum())


@pytest.mark.differs("merging into 4 or 8 bits, bfloat16 or float16")
@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_a_merge_that_rounding_swallows_says_so(kind, options):
    hold = {"4 bits": four, "8 bits": eight}.get(kind, lambda m: m)
    base = model(getattr(torch, kind, torch.float32), hold)
    made = with_change(base, 1e-5, **options)
    layers = [made.base_model.model[i] for i in (0, 2)]
    before = [layer.get_base_weight().float().clone() for layer in layers]
    remedy = r"dequantize=True" if "bits" in kind else r"float32"
    deltas = [] if options else [layer.get_delta_weight("a") for layer in layers]
    with pytest.warns(PeftWarning, match=rf"of 2 layers.*'[02]'.*{remedy}") as said:
        made.merge_adapter()
    assert len(said) == 1
    shares = graft.merge_report(made)
    assert set(shares) == {"0", "2"} and shares == {layer.site.key: layer.share_kept for layer in layers}
    assert min(shares.values()) < (0.9 if options else 0.1)  # DoRA's magnitudes are rounded, too
    for layer, W, delta in zip(layers, before, deltas):
        assert shares[layer.site.key] == pytest.approx(by_hand(layer, W, delta), abs=0.01)
    made.unmerge_adapter()
    assert graft.merge_report(made) == {} and layers[0].share_kept == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_merge_that_does_not_round_says_nothing(dtype):
    made = with_change(model(dtype), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.merge_adapter()
    assert graft.merge_report(made) == {"0": 1.0, "2": 1.0}


def test_an_update_that_is_large_enough_survives_in_half_precision():
    made = with_change(model(torch.bfloat16), 1.0)
    made.merge_adapter()
    assert all(share == pytest.approx(1, abs=0.01) for share in graft.merge_report(made).values())


def test_an_adapter_that_does_nothing_loses_nothing():
    made = with_change(model(hold=four), 0.0)
    made.merge_adapter()
    assert graft.merge_report(made) == {"0": 1.0, "2": 1.0}


def test_what_was_merged_for_good_can_be_read_of_the_peft_model():
    made = with_change(model(hold=four), 1e-5)
    warns(PeftWarning, "dequantize=True", made.merge_and_unload)
    assert graft.merge_report(made)["2"] < 0.5


def test_the_remedy_helps():
    made = with_change(model(hold=four), 1e-3)
    x = torch.randn(5, WIDTH)
    y = made(x)
    plain = made.merge_and_unload(dequantize=True)
    assert graft.merge_report(made) == {"0": 1.0, "2": 1.0}
    assert_close(plain(x), y)


def test_the_share_of_several_merges_is_that_of_all_they_asked_for():
    made = with_change(model(torch.bfloat16), 1.0)
    made.add_adapter("b", graft.LoraConfig(r=4, target_modules=["0", "2"]))
    with torch.no_grad():
        made.base_model.model[0].lora_B["b"].weight.normal_(std=1e-6)
    made.base_model.set_adapter(["a", "b"])
    warns(UserWarning, "not merged", made.merge_adapter, ["a"])
    alone = made.base_model.model[0].share_kept
    warns(UserWarning, "additionally merging", made.merge_adapter, ["b"])
    assert made.base_model.model[0].share_kept == pytest.approx(alone, abs=1e-3)


def test_a_layer_that_is_merged_alone_warns_as_well():
    made = graft.inject_adapter_in_model(graft.LoraConfig(r=4, target_modules=["0"]), model(torch.bfloat16), "a")
    with torch.no_grad():
        made[0].lora_B["a"].weight.normal_(std=1e-6)
    warns(PeftWarning, "1 of 1 layers", made[0].merge)
    assert graft.merge_report(made) == {"0": made[0].share_kept}


def test_a_merge_waits_for_the_shares_of_all_layers_at_once(monkeypatch):
    def waits(n):
        base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(n)]).to(torch.bfloat16)
        made = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=[str(i) for i in range(n)]))
        count, tolist = [], torch.Tensor.tolist
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda t: count.append(1) or tolist(t))
            made.merge_adapter()
            assert len(graft.merge_report(made)) == n
        return len(count)

    assert waits(7) == waits(2) > 0
