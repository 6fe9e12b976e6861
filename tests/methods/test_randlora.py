# SPDX-License-Identifier: Apache-2.0
"""RandLoRA: its files, adapters beside each other, and full rank."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.kernels import structured
from tests import models
from tests.pair import LIBS, adapt, close, output, randomize
from tests.samples import first

SAMPLE = first("RANDLORA")
FILE = "adapter_model.safetensors"


@pytest.mark.differs("RandLoRA's projections in files")
def test_a_file_holds_the_projections_once(tmp_path):
    """PEFT's has a copy for each layer, of full size."""
    ours, theirs = (randomize(adapt(lib, SAMPLE), SAMPLE) for lib in LIBS)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    few, many = (load_file(tmp_path / name / FILE) for name in ("ours", "theirs"))
    assert few.keys() < many.keys()
    assert all(name.endswith(("randlora_A", "randlora_B")) for name in many.keys() - few.keys())
    for name in ("ours", "theirs"):
        for lib in LIBS:
            loaded = lib.PeftModel.from_pretrained(models.make("mlp"), tmp_path / name)
            close(output(loaded, SAMPLE), output(theirs.eval(), SAMPLE))


def test_a_file_with_the_copies_alone(tmp_path):
    model = randomize(adapt(graft, SAMPLE), SAMPLE).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    for x in "AB":
        t = tensors.pop(f"base_model.randlora_{x}")
        tensors[f"base_model.model.lin0.randlora_{x}"] = t
    save_file(tensors, tmp_path / FILE)
    (tmp_path / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
    close(output(loaded, SAMPLE), output(model, SAMPLE), 0)


@pytest.mark.differs("RandLoRA adapters of different `r` on one model")
def test_adapters_share_projections_of_one_rank():
    """PEFT overwrites the number of bases: the earlier adapter fails."""
    model = adapt(graft, SAMPLE)
    with pytest.raises(graft.ConfigError, match="r is 3, but adapter 'default' has 5"):
        model.add_adapter("b", SAMPLE.config(graft, r=3))
    with pytest.raises(graft.ConfigError, match="projection_prng_key"):
        model.add_adapter("b", SAMPLE.config(graft, projection_prng_key=9))
    model.add_adapter("b", SAMPLE.config(graft))
    assert model.base_model.randlora_A["b"] is model.base_model.randlora_A["default"]


def test_updates_have_full_rank():
    model = randomize(adapt(graft, SAMPLE), SAMPLE)
    layer = model.get_submodule("base_model.model.lin0")
    assert int(torch.linalg.matrix_rank(layer.get_delta_weight("default"))) == min(layer.base_layer.weight.shape)


def test_the_matrix_between_diagonals():
    g = torch.Generator().manual_seed(0)
    left, A, right = (
        torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((3, 2), (3, 5), (2, 5))
    )
    A.requires_grad_(False)
    close(structured.between_diagonals(left, A, right), structured.plain_diagonals(left, A, right), 0)
    assert torch.autograd.gradcheck(lambda a, b: structured.between_diagonals(a, A, b), (left, right))


@pytest.mark.parametrize("options", [dict(sparse=True), dict(sparse=True, very_sparse=True)], ids=["sparse", "very"])
def test_projections_of_three_values_are_pefts(options):
    outputs = []
    for lib in LIBS:
        config = lib.RandLoraConfig(target_modules=["lin0"], r=4, **options)
        model = randomize(lib.get_peft_model(models.make("mlp"), config), SAMPLE).eval()
        outputs.append(output(model, SAMPLE))
        A = model.base_model.model.lin0.randlora_A["default"]
        assert 2 <= len(A.unique()) <= 3
    close(*outputs, 1e-5)
