# SPDX-License-Identifier: Apache-2.0
"""Laws of what acts only where a call, or other adapters, bring something along: aLoRA, Poly, T-LoRA, Arrow, X-LoRA.

aLoRA, Poly and T-LoRA are in the matrix as well (`CALLED`). Arrow needs experts on its layer, X-LoRA a model with
hidden states. Formulas and PEFT are in methods/test_alora.py, test_poly.py, test_arrow.py and test_xlora.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.conformance.samples import CALLED_CELLS, LAYERS, SAMPLES, STORES, Cell, features
from tests.covering import law
from tests.looks import get_registry, layers, merged
from tests.methods import test_xlora as xlora
from tests.models import disturb, seeded
from tests.raised import refuses, warns

folder = xlora.folder  # of experts

LINEAR = [layer for layer in LAYERS if layer.name in ("linear", "linear-no-bias", "Conv1D")]
OTHERS = [layer for layer in LAYERS if layer not in LINEAR]
PLAIN = dict(r=3, target_modules=["layer"], init_lora_weights=False)


def cell_of(layer):
    return Cell(SAMPLES[0], layer, STORES[0])


DENSE = [cell for cell in CALLED_CELLS if cell.store is STORES[0]]


def close(ours, theirs, tolerance=1e-5):
    assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# aLoRA, Poly, T-LoRA


def beside(cell, merge):
    """The adapter beside a plain one, which is merged when it comes or not."""
    with seeded(1):
        model = graft.get_peft_model(cell.base(), graft.LoraConfig(**PLAIN), "plain", mixed=True)
    if merge:
        model.base_model.merge_adapter()
    with seeded(2):
        model.add_adapter("default", cell.sample.make())
    return cell.sample.called(disturb(model).eval())


@law("cell", DENSE, features)
@torch.no_grad()
def test_beside_an_adapter_that_is_merged(cell):
    model, x = beside(cell, False), cell.inputs()
    plain = model(x)
    model.set_adapter("default")
    alone = model(x)
    model.set_adapter(["plain", "default"])
    both = model(x)
    close(both, plain + alone - cell.base()(x))
    error, reason = cell.unmergeable
    refuses(error, reason, model.base_model.merge_adapter, ["default"])
    assert merged(model) == []
    with pytest.warns(UserWarning, match=r"\['default'\] are not merged: .*have no effect until unmerge_adapter"):
        model.base_model.merge_adapter(["plain"])
    close(model(x), plain)
    assert merged(model) == ["plain"]
    model.base_model.unmerge_adapter()
    close(model(x), both)
    model.delete_adapter("plain")
    close(model(x), alone)
    model.delete_adapter("default")
    close(model(x), cell.base()(x))


@law("cell", DENSE, features)
@torch.no_grad()
def test_made_while_another_is_merged_it_is_the_same(cell):
    made = []
    for merge in (False, True):
        model = beside(cell, merge)
        if merge:
            assert merged(model) == ["plain"]
            model.base_model.unmerge_adapter()
        model.set_adapter("default")
        made.append(model(cell.inputs()))
    close(*made)


@law("cell", [cell for cell in DENSE if not cell.layer.ids], features)
def test_gradients_are_derivatives(cell):
    model = disturb(cell.fresh(base=cell.base().double())).double()
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x = cell.inputs().double().requires_grad_()

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(held, values)), (x,))

    assert len(held) >= 2 and torch.autograd.gradcheck(run, (x, *held.values()), fast_mode=True)


# Arrow


def routed(layer, dtype=torch.float32, general=False):
    """Three experts, a general adapter and a router, which is active."""
    base = cell_of(layer).base().to(dtype)
    with seeded(1):
        model = graft.get_peft_model(base, graft.LoraConfig(**PLAIN, lora_alpha=4), "x")
        for name, alpha in (("y", 2), ("z", 7), ("gks_0", 3)):
            model.add_adapter(name, graft.LoraConfig(**PLAIN, lora_alpha=alpha))
        arrow = graft.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=general, rng_seed=5)
        model.add_adapter("router", graft.LoraConfig(r=3, target_modules=["layer"], arrow_config=arrow))
    disturb(model).set_adapter("router")
    return model.eval()


def by_hand(model, x, general):
    """Σ of the two experts whose directions a token has most of, in their shares."""
    layer = layers(model)["layer"]
    pairs = {n: [p.detach() for p in m.pair] for n, m in layer.methods.items() if n != "router"}
    if general:
        pairs = {n: [M - G for M, G in zip(pair, pairs["gks_0"])] for n, pair in pairs.items()}
    deltas = torch.stack([layer.scaling[n] * pairs[n][1] @ pairs[n][0] for n in "xyz"])
    score = (x @ layer.lora_arrow["router"].prototypes.T).abs()
    kept = score.topk(2, dim=-1)
    share = torch.zeros_like(score).scatter(-1, kept.indices, (kept.values / 0.7).softmax(-1))
    return layer.base_layer(x) + torch.einsum("...i,eoi,...e->...o", x, deltas, share)


@pytest.mark.parametrize("general", [False, True], ids=["plain", "general"])
@pytest.mark.parametrize("layer", LINEAR, ids=str)
@torch.no_grad()
def test_a_router_adds_the_experts_of_each_token(layer, general):
    model, x = routed(layer, general=general), cell_of(layer).inputs()
    close(model(x), by_hand(model, x * 1.3, general) * 0.7)
    directions = layers(model)["layer"].lora_arrow["router"].prototypes
    close(directions.norm(dim=-1), torch.ones(3))
    again = routed(layer, general=general)
    with torch.device("meta"):  # directions are drawn on the CPU, wherever torch would
        assert torch.equal(again(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), cell_of(layer).base()(x))


@pytest.mark.parametrize("layer", LINEAR, ids=str)
def test_gradients_of_a_routers_input(layer):
    model = routed(layer, torch.float64).double()
    x = cell_of(layer).inputs().double().requires_grad_()
    assert torch.autograd.gradcheck(model, (x,), fast_mode=True)
    model.set_requires_grad(["x", "y", "z"])
    model.set_requires_grad("router", False)  # which has nothing that trains
    model(x).sum().backward()
    got = {n.split(".")[-2] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == {"x", "y", "z"}, "an expert may train with the router"


@pytest.mark.parametrize("layer", LINEAR, ids=str)
@torch.no_grad()
def test_a_routers_rows_and_experts_that_are_merged(layer):
    model, x = routed(layer), cell_of(layer).inputs()
    names, alone = ["router", "__base__", "y", "router", "gks_0"], {}
    for name in ("router", "y", "gks_0"):
        model.set_adapter(name)
        alone[name] = model(x)
    alone["__base__"] = cell_of(layer).base()(x)
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        close(mixed[row], alone[name][row])
    model.base_model.set_adapter(["router", "y"])
    both = model(x)
    close(both, alone["router"] + alone["y"] - alone["__base__"])
    refuses(RuntimeError, "Cannot merge an active Arrow router adapter", model.merge_adapter, ["router"])
    assert merged(model) == []
    with pytest.warns(UserWarning, match=r"\['router'\] are not merged: .*have no effect until unmerge_adapter"):
        model.merge_adapter(["y"])
    close(model(x), alone["y"])
    assert merged(model) == ["y"]
    model.unmerge_adapter()
    close(model(x), both)
    model.set_adapter("router")
    close(model(x), alone["router"])


@pytest.mark.parametrize("layer", LINEAR, ids=str)
@torch.no_grad()
def test_a_router_in_half_precision_stays_close_to_double(layer):
    model, x = routed(layer, torch.bfloat16), cell_of(layer).inputs().bfloat16()
    y, expected = model(x), copy.deepcopy(model).double()(x.double())
    assert y.dtype == torch.bfloat16
    # a token between two directions may go the other way
    near = (y.double() - expected).abs() / expected.abs().max() < 0.03
    assert near.float().mean() > 0.9


@torch.no_grad()
def test_a_router_saved_with_its_experts_copied_and_deleted(tmp_path):
    cell = cell_of(LINEAR[0])
    model, x = routed(cell.layer), cell.inputs()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(cell.base(), tmp_path / "x", "x")
    for name in ("y", "z", "gks_0", "router"):
        loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter("router")
    close(loaded(x), expected)
    model.delete_adapter("z")  # two are left, and both act on each token
    assert (model(x) - expected).abs().max() > 1e-3
    warns(UserWarning, "router was active which is now deleted", model.delete_adapter, "router")
    model.set_adapter("x")
    alone = model(x)
    loaded.set_adapter("x")
    close(alone, loaded(x))
    assert not get_registry(model).call.context


@pytest.mark.parametrize("layer", OTHERS, ids=str)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to Conv")
def test_a_router_is_refused_where_no_token_has_a_direction(layer):
    base = cell_of(layer).base()
    before = {n: p.requires_grad for n, p in base.named_parameters()}
    with pytest.raises(graft.UnsupportedLayerError, match=r"linear layers only|not supported"):
        graft.get_peft_model(base, graft.LoraConfig(r=4, target_modules=["layer"], arrow_config={"top_k": 1}))
    assert {n: p.requires_grad for n, p in base.named_parameters()} == before
    assert not any(isinstance(m, graft.AdapterLayer) for m in base.modules())


# X-LoRA


@torch.no_grad()
def test_xlora_in_half_precision_stays_close_to_double(folder):
    model = xlora.mixture(graft, folder, on=xlora.base().bfloat16(), layerwise_scalings=True)
    y, expected = xlora.output(model), xlora.output(copy.deepcopy(model).double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() / expected.abs().max() < 0.05


@pytest.mark.parametrize("how", [{}, dict(layerwise_scalings=True), dict(scaling_pass_value=0.4)], ids=str)
def test_gradients_of_xloras_classifier_are_derivatives(how, folder):
    """In one direction. The model's norms compute in float32, whatever its dtype."""
    model = xlora.mixture(graft, folder, on=xlora.base().double(), **how).double()
    held = [p for p in model.parameters() if p.requires_grad]
    with seeded(3):
        weight = torch.randn_like(xlora.output(model))
        way = [torch.randn_like(p) for p in held]
    (xlora.output(model) * weight).sum().backward()
    found = sum((p.grad * v).sum() for p, v in zip(held, way))

    @torch.no_grad()
    def at(step):
        for p, v in zip(held, way):
            p.add_(v, alpha=step)
        y = (xlora.output(model) * weight).sum()
        for p, v in zip(held, way):
            p.sub_(v, alpha=step)
        return y

    assert len(held) == 2
    assert_close((at(1e-3) - at(-1e-3)) / 2e-3, found, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_an_expert_of_xlora_that_was_merged_counts_once(folder):
    model = xlora.mixture(graft, folder)
    expected = xlora.output(model)
    model.set_adapter("1")
    alone = xlora.output(model)
    model.merge_adapter(["1"])
    close(xlora.output(model), alone, 1e-4)
    warns(UserWarning, "Unmerging the model first", model.set_adapter, "default")
    assert merged(model) == []
    close(xlora.output(model), expected, 1e-4)
    with model.disable_adapter():
        close(xlora.output(model), xlora.output(xlora.base()), 1e-4)


class Patches(nn.Module):
    """Layers at which a weight for each token means nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.lin = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(self.conv(x).mT)


def test_an_expert_that_xlora_cannot_weigh_is_refused(tmp_path):
    with seeded(1):
        base = Patches()
    graft.get_peft_model(copy.deepcopy(base), graft.LoraConfig(r=2, target_modules=["conv"])).save_pretrained(tmp_path)
    with pytest.raises(graft.ConfigError, match=r"weighs the updates of experts.*layer 'conv'.*expert 'one'"):
        graft.get_peft_model(base, graft.XLoraConfig(hidden_size=4, adapters={"one": str(tmp_path)}))
    assert type(base.conv) is nn.Conv1d and all(p.requires_grad for p in base.parameters())
