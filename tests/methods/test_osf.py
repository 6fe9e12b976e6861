# SPDX-License-Identifier: Apache-2.0
"""OSF: gradients outside of the space of the large components, in every dtype, and what PEFT does otherwise."""

import copy

import peft
import pytest
import torch
from torch import nn

import graft
from graft.kernels.narrow import _project_by_sum, project_gradient_inside, project_gradient_outside
from tests import models
from tests.looks import layers
from tests.pair import LIBS, adapt, close, outcome, output, randomize
from tests.samples import Sample, first

SHAPES = {"tall": (9, 6), "wide": (6, 9), "square": (7, 7)}


def base(shape, dtype=torch.float32):
    torch.manual_seed(0)
    out, n = SHAPES[shape]
    return nn.Sequential(nn.Linear(n, out)).to(dtype)


def gradients(lib, shape, dtype=torch.float32, **options):
    model = lib.get_peft_model(base(shape, dtype), lib.OSFConfig(target_modules=["0"], **options))
    torch.manual_seed(1)
    x, g = torch.randn(5, SHAPES[shape][1], dtype=dtype), torch.randn(5, SHAPES[shape][0], dtype=dtype)
    (model(x) * g).sum().backward()
    params = model.base_model.model[0].osf_svd_params["default"]
    return model, {name: p.grad for name, p in params.named_parameters()}


def large(model):
    """The singular vectors that stay, as columns."""
    W = layers(model)["0"].base_layer.weight.detach().float()
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    k = min(W.shape) // 2
    return U[:, :k], V[:k].T


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_pefts(shape):
    (_, ours), (_, theirs) = (gradients(lib, shape) for lib in LIBS)
    for name, g in theirs.items():
        close(ours[name], g)


@pytest.mark.parametrize("how", ["as made", "half precision", "cast later", "copied", "loaded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_large_space_gets_no_gradient(shape, how, tmp_path):
    """PEFT hooks the parameters, and loses the hooks when it replaces these, as it does on a base in half precision."""
    dtype = torch.bfloat16 if how == "half precision" else torch.float32
    model = graft.get_peft_model(base(shape, dtype), graft.OSFConfig(target_modules=["0"]))
    if how == "cast later":
        model = model.half().float()
    elif how == "copied":
        model = copy.deepcopy(model)
    elif how == "loaded":
        model.save_pretrained(tmp_path)
        model = graft.PeftModel.from_pretrained(base(shape), tmp_path, is_trainable=True)
    model(torch.randn(5, SHAPES[shape][1], dtype=dtype)).float().square().sum().backward()
    p = layers(model)["0"].osf_svd_params["default"]
    U, V = large(model)
    rounded = 0.02 if how in ("half precision", "cast later") else 1e-5
    for basis, g in ((U, p["U_low"].grad), (V, p["V_low"].grad.T)):
        assert (basis.T @ g.float()).norm() <= rounded * g.float().norm() and g.norm() > 0


@pytest.mark.differs("OSF on a base in half precision, or cast, copied or moved to other parameters")
def test_peft_loses_the_projection_in_half_precision():
    """Its defect: the gradients of graft lie outside, those of PEFT do not."""
    _, theirs = gradients(peft, "tall", torch.bfloat16)
    U, _ = large(graft.get_peft_model(base("tall"), graft.OSFConfig(target_modules=["0"])))
    assert (U.T @ theirs["U_low"].float()).norm() > 0.05 * theirs["U_low"].float().norm()


@pytest.mark.parametrize("project, within", [(project_gradient_inside, True), (project_gradient_outside, False)])
def test_a_projected_gradient(project, within):
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q
    p, weight = torch.randn(7, 2, dtype=torch.float64, requires_grad=True), torch.randn(7, 2, dtype=torch.float64)
    assert torch.equal(project(p, Q), p)
    found = []
    for f in (project, lambda p, Q: _project_by_sum(p, Q, within)):
        (grad,) = torch.autograd.grad((f(p, Q).square() * weight).sum(), p)
        found.append(grad)
    close(*found)
    part = Q @ (Q.T @ (2 * p * weight))
    close(found[0], part if within else 2 * p * weight - part)


@pytest.mark.parametrize("rank", [0, -1, 0.01])
@pytest.mark.parametrize("lib", LIBS)
def test_ranks_that_leave_nothing(lib, rank):
    made = outcome(
        lambda: lib.get_peft_model(models.make("mlp"), lib.OSFConfig(target_modules=["lin0"], effective_rank=rank))
    )
    assert made.kind is ValueError


@pytest.mark.differs("OSF: several active adapters; merging twice; unmerging")
def test_merging_twice_is_merging_once():
    """PEFT adds the update twice, and cannot unmerge."""
    sample = first("OSF")
    model = randomize(adapt(graft, sample), sample).eval()
    expected = output(model, sample)
    model.merge_adapter()
    model.merge_adapter()
    close(output(model, sample), expected, 1e-4)
    model.unmerge_adapter()
    close(output(model, sample), expected, 1e-4)


@pytest.mark.differs("OSF on Conv1D (all default targets of GPT-2), embeddings, convolutions")
def test_gpt2_is_adapted():
    """PEFT passes Conv1D by in silence, so that its own default targets adapt nothing."""
    model = graft.get_peft_model(models.make("gpt2"), graft.OSFConfig())
    assert layers(model).keys() == {
        f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    }


def test_a_pattern_anywhere_in_the_path():
    config = dict(target_modules=["fc1"], rank_pattern={"ayers.1": 2, "nowhere": 3})
    heard = outcome(lambda: graft.get_peft_model(models.make("mlp"), graft.OSFConfig(**config)))
    sizes = [layer.osf_svd_params["default"]["S_low"].shape[0] for layer in layers(heard.value).values()]
    theirs = peft.get_peft_model(models.make("mlp"), peft.OSFConfig(**config))
    assert sizes == [len(block.fc1.osf_svd_params["default"]["S_low"]) for block in theirs.base_model.model.layers]
    assert heard.warned("nowhere") and sizes == [6, 10, 6]


@pytest.mark.differs("`target_svd_config` of OSF")
def test_a_setting_without_effect_is_said():
    assert outcome(lambda: graft.OSFConfig(target_svd_config={"lin0": 2})).warned("no effect")


@pytest.mark.parametrize("rows", [1, 200])
def test_few_rows_and_many(rows):
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(24, 20)), graft.OSFConfig(target_modules=["0"]))
    layer = layers(model)["0"]
    p = layer.osf_svd_params["default"]
    with torch.no_grad():
        for t in p.parameters():
            t.add_(torch.randn(t.shape), alpha=0.2)
    x, g = torch.randn(rows, 24, requires_grad=True), torch.randn(rows, 20)
    (model(x) * g).sum().backward()
    W = layer.base_layer.weight + layer.get_delta_weight("default")
    close(model(x), x @ W.T + layer.base_layer.bias, 1e-4)
    close(x.grad, g @ W, 1e-4)
    S = g.T @ x.detach()
    close(p["S_low"].grad, torch.einsum("or,oi,ri->r", p["U_low"], S, p["V_low"]), 1e-3)


@pytest.mark.differs("Super-Tuning with `save_precomputed_indices=False`, OSF on another base than in training")
@pytest.mark.parametrize("method, options", [("OSF", {}), ("PSOFT", dict(r=3))])
def test_the_base_is_told_by_its_values(method, options, tmp_path):
    """What is left out of the file comes from the base weight, so another base is not the same adapter."""
    sample = Sample(method, "plain", "mlp", dict(target_modules=["lin0"], **options))
    adapt(graft, sample).save_pretrained(tmp_path)
    other = models.make("mlp")
    other.lin0.weight.data.mul_(1.5)
    assert outcome(lambda: graft.PeftModel.from_pretrained(other, tmp_path)).warned("other weights")
    same = outcome(lambda: graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path))
    assert not same.warned("other weights")


def test_nothing_is_left_to_train():
    model = graft.get_peft_model(base("tall"), graft.OSFConfig(target_modules=["0"], effective_rank=1.0))
    x = torch.randn(3, 6)
    assert model.get_nb_trainable_parameters()[0] == 0
    close(model(x), base("tall")(x))
    model.merge_adapter()
    close(model(x), base("tall")(x))


@pytest.mark.differs("OSF: a backward pass within an autocast block")
def test_training_under_autocast():
    """PEFT's hooks fail in a backward pass within the block."""
    sample = first("OSF")
    model = randomize(adapt(graft, sample), sample)
    with torch.autocast("cpu", torch.bfloat16):
        output(model, sample).float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
