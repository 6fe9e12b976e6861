# SPDX-License-Identifier: Apache-2.0
"""SHiRA: masks of one's own, places in files, and what a file cannot hold."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.methods.shira import random_mask
from tests import models
from tests.looks import layers
from tests.pair import LIBS, adapt, close, outcome, output, randomize
from tests.raised import refuses
from tests.samples import Sample, first

WEIGHTS = "adapter_model.safetensors"
OWN = Sample("SHIRA", "own", "mlp", dict(target_modules=["lin0", "fc1"], r=2, mask_type="largest"))


def largest(base_layer, r, **kwargs):
    """The entries of largest magnitude."""
    W = base_layer.weight.detach()
    n = r * sum(W.shape)
    return torch.zeros_like(W).view(-1).index_fill(0, W.abs().flatten().topk(n).indices, 1).view(W.shape)


def with_mask(lib, mask=largest):
    config = OWN.config(lib)
    config.mask_fn = mask
    return lib.get_peft_model(models.make("mlp"), config)


@pytest.mark.parametrize("lib", LIBS)
def test_places_of_the_random_mask(lib):
    for seed in (None, 5):
        model = adapt(lib, Sample("SHIRA", "seed", "mlp", dict(target_modules=["fc1"], r=2, random_seed=seed)))
        layer = model.base_model.model.layers[0].fc1
        indices = layer.shira_indices["default"]
        assert indices.dtype == torch.int32 and indices.shape == (2, 2 * (12 + 20))
        mask = random_mask(layer.base_layer, 2, random_seed=seed)
        assert torch.equal(mask.nonzero().T, indices.long())


def test_a_mask_of_ones_own_acts_as_in_peft(tmp_path):
    sample = first("SHIRA")
    ours, theirs = (randomize(with_mask(lib), sample).eval() for lib in LIBS)
    close(output(ours, sample), output(theirs, sample))
    theirs.save_pretrained(tmp_path)
    for lib in LIBS:  # the file holds the places
        loaded = outcome(lambda lib=lib: lib.PeftModel.from_pretrained(models.make("mlp"), tmp_path))
        close(output(loaded.value, sample), output(theirs, sample))
        assert not loaded.warned("mask_type")


@pytest.mark.differs("a `mask_fn` of SHiRA while another adapter is merged")
def test_a_mask_sees_the_weight_without_adapters():
    model = with_mask(graft)
    randomize(model, first("SHIRA"))
    model.merge_adapter()
    config = OWN.config(graft)
    config.mask_fn = largest
    model.add_adapter("b", config)
    for layer in layers(model).values():
        assert torch.equal(layer.shira_indices["b"], layer.shira_indices["default"])
        assert layer.merged_adapters == ["default"]


@pytest.mark.differs('SHiRA without a mask (`mask_type` other than "random", no `mask_fn`)')
@pytest.mark.parametrize(
    "mask, reason",
    [
        (None, "has no mask"),
        (lambda base, r, **_: torch.ones(3), "shape"),
        (lambda base, r, **_: torch.ones_like(base.weight), "ones"),
    ],
)
def test_masks_that_do_not_fit(mask, reason):
    base = models.make("mlp")
    config = OWN.config(graft)
    config.mask_fn = mask
    refuses(graft.ConfigError, rf"{reason}", graft.get_peft_model, base, config)
    assert not any(hasattr(m, "base_layer") for m in base.modules())


@pytest.mark.parametrize("lib", LIBS)
def test_more_numbers_than_the_weight_has(lib):
    made = outcome(lambda: lib.get_peft_model(models.make("mlp"), lib.ShiraConfig(r=12, target_modules=["lin0"])))
    assert made.kind is ValueError and "shira params" in str(made.error)


def test_places_are_checked_where_they_are():
    sample = first("SHIRA")
    model = adapt(graft, sample)
    tensors = graft.get_peft_model_state_dict(model)
    with torch.device("meta"):  # stands for a device other than that of the tensors
        report = graft.set_peft_model_state_dict(model, tensors)
    assert not report.missing_keys


def test_places_as_floats(tmp_path):
    """As PEFT writes them on Windows."""
    sample = first("SHIRA")
    model = randomize(adapt(LIBS[1], sample), sample).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors = {k: t.float() for k, t in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
    close(output(loaded, sample), output(model, sample))
    assert layers(loaded)["lin0"].shira_indices["default"].dtype == torch.int32


def test_a_gathered_state_dict_has_no_places(tmp_path):
    """FSDP gathers what the state dict holds; the places come from the model."""
    sample = first("SHIRA")
    model = randomize(adapt(graft, sample), sample).eval()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", state_dict=model.state_dict())
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_scale():
    model = graft.get_peft_model(nn.Sequential(nn.Linear(9, 8)), graft.ShiraConfig(r=2, target_modules=["0"]))
    layer = layers(model)["0"]
    layer.shira_weight["default"].data.normal_()
    before = layer.get_delta_weight("default")
    layer.set_scale("default", 0.37)
    close(layer.get_delta_weight("default"), before * 0.37)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_few_and_many_rows(rows, dtype):
    """By the gathered inputs, and by one product with the sum."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 30)).to(dtype)
    model = graft.get_peft_model(base, graft.ShiraConfig(r=1, target_modules=["0"]))
    layer = layers(model)["0"]
    layer.shira_weight["default"].data.normal_()
    x, g = torch.randn(rows, 40, dtype=dtype, requires_grad=True), torch.randn(rows, 30)
    y = model(x)
    (y * g).sum().backward()
    exact = copy.deepcopy(model).double()
    x2 = x.detach().double().requires_grad_()
    W = layers(exact)["0"].base_layer.weight + layers(exact)["0"].get_delta_weight("default")
    expected = x2 @ W.T + layers(exact)["0"].base_layer.bias
    (expected * g.double()).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    close(y.double(), expected, tolerance)
    close(x.grad.double(), x2.grad, tolerance * 3)
    rows_, cols = layer.shira_indices["default"].long()
    full = g.double().T @ x2.detach()
    close(layer.shira_weight["default"].grad.double(), full[rows_, cols], tolerance * 10)
