# SPDX-License-Identifier: Apache-2.0
"""Mixtures of low-rank experts by their formulas, expert by expert and token by token."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.looks import layers
from tests.models import seeded
from tests.raised import refuses


def linear(config, names=("default",)):
    """A model of one layer with adapters whose every value is random."""
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(nn.Linear(4, 5)), config, names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        for p in layers(model)["0"].parameters():
            p.data.normal_()
    return model.eval()


def inputs(*shape):
    with seeded(1):
        return torch.randn(*shape, 4)


# EWoRA


def ewora(**options):
    return graft.EworaConfig(target_modules=["0"], **{"r": 3, "num_experts": 2, **options})


def test_ewora_weighs_experts_by_all_their_ranks():
    model, x = linear(ewora()), inputs(2, 3)
    layer = layers(model)["0"]
    A, B, W = (getattr(layer, f"ewora_{name}")["default"] for name in ("As", "Bs", "weighting"))
    assert (A.shape, B.shape, W.weight.shape) == ((2, 4, 3), (2, 3, 5), (2, 6))
    y = model(x)
    for row, token in ((0, 0), (1, 2)):
        own = x[row, token]
        g = W.weight @ torch.cat([own @ A[0], own @ A[1]]).clamp_min(0) + W.bias
        expected = layer.base_layer(own) + g[0] * (own @ A[0] @ B[0]) + g[1] * (own @ A[1] @ B[1])
        assert_close(y[row, token], expected)


def test_how_ewora_begins():
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(nn.Linear(400, 5)), ewora(r=4, num_experts=8))
    layer = layers(model)["0"]
    A, B, W = (getattr(layer, f"ewora_{name}")["default"] for name in ("As", "Bs", "weighting"))
    bounds = {0.025: A, 0.01: W.weight}  # 1 / √(400 · 4), whatever kaiming's rule for two dimensions
    for bound, t in bounds.items():
        assert 0.9 * bound < t.abs().max() <= bound
    assert not B.any() and 0 < W.bias.abs().max() <= 32**-0.5


def test_eworas_experts_lose_inputs_of_their_own():
    model, x = linear(ewora(ewora_dropout=0.5)).train(), inputs(1)
    layer = layers(model)["0"]
    A, B, W = (getattr(layer, f"ewora_{name}")["default"] for name in ("As", "Bs", "weighting"))
    W.weight.data.zero_()
    W.bias.data.copy_(torch.tensor([1.0, -1.0]))
    A.data[1], B.data[1] = A.data[0], B.data[0]
    assert (model(x) - layer.base_layer(x)).abs().max() > 1e-3, "of equal experts that lose the same, nothing is left"
    assert_close(model.eval()(x), layer.base_layer(x))


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(num_experts=0), "num_experts"),
        (dict(r=0), "`r`"),
        (dict(ewora_dropout=1.0), "ewora_dropout"),
        (dict(use_dora=True), "`use_dora` means nothing"),
        (dict(megatron_config={"a": 1}), "`megatron_config` means nothing"),
        (dict(layer_replication=[(0, 2)]), "`layer_replication` means nothing"),
        (dict(rank_pattern={"0": -1}), "rank_pattern"),
    ],
    ids=str,
)
def test_what_ewora_refuses(options, text):
    refuses(graft.ConfigError, text, ewora, **options)


# MoE-LoRA


def moelora(**options):
    values = {"r": 3, "lora_alpha": 6, "num_experts": 4, **options}
    return graft.MoeLoraConfig(target_modules=["0"], **values)


def experts(layer, name="default"):
    return *(getattr(layer, f"moelora_{t}")[name] for t in "AB"), layer.moelora_router[name].weight


@pytest.mark.parametrize("top_k, shared", [(2, False), (1, False), (4, False), (None, False), (None, True)])
def test_a_router_weighs_the_experts_of_each_token(top_k, shared):
    model, x = linear(moelora(top_k=top_k, shared_A=shared)), inputs(2, 3)
    layer = layers(model)["0"]
    A, B, G = experts(layer)
    assert (A.shape, B.shape, G.shape) == ((1 if shared else 4, 3, 4), (4, 5, 3), (4, 4))
    y = model(x)
    for row, token in ((0, 0), (1, 2)):
        own = x[row, token]
        p = (G @ own).softmax(0)
        chosen = p.argsort(descending=True)[: top_k or 4]
        expected = layer.base_layer(own)
        for e in chosen:
            expected = expected + 2 * p[e] / p[chosen].sum() * (B[e] @ A[0 if shared else e] @ own)
        assert_close(y[row, token], expected)


def wave(*shape):
    return torch.sin(torch.arange(torch.Size(shape).numel()) * 1.7).view(shape)


MOLA = [  # of MolaSparseMoe in moe-peft 2.0.2
    [0.541978, -0.628320, -1.016960, -0.140456, 0.910781],
    [0.740466, -0.221078, -0.907591, -0.465021, 0.556055],
    [-0.487404, -0.851199, -0.156060, 0.733220, 0.710340],
    [-0.201709, -0.981634, -0.540355, 0.573144, 0.973626],
    [0.148197, -0.974058, -0.884532, 0.305384, 1.115390],
    [0.567291, -0.734124, -1.122248, -0.114252, 1.035881],
]
MOLA_LOSSES = 0.218290, 0.210966  # of its MolaRouterLoss, without a mask and with one


def test_as_moe_peft_computes():
    model, x = linear(moelora(router_loss=True, router_aux_loss_coef=0.1)).train(), wave(2, 3, 4)
    layer = layers(model)["0"]
    for t, values in zip(experts(layer), (wave(4, 3, 4) / 2, wave(4, 5, 3) * 0.7, wave(4, 4) + 0.3)):
        t.data.copy_(values)
    y = layer(x) - layer.base_layer(x)
    assert_close(y.flatten(0, 1), torch.tensor(MOLA), rtol=0, atol=1e-5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for loss, kwargs in zip(MOLA_LOSSES, ({}, dict(attention_mask=mask))):
        model.base_model.model.forward = lambda x, attention_mask=None: layer(x)
        model(x, **kwargs)
        assert_close(model.auxiliary_loss().item(), loss, rtol=0, atol=1e-6)


def test_how_a_mixture_begins():
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(nn.Linear(400, 5)), moelora())
    A, B, G = experts(layers(model)["0"])
    assert not B.any()
    for t in (*A, G):
        assert 0.9 * 400**-0.5 < t.abs().max() <= 400**-0.5


def test_experts_by_layer():
    """MoLA: more of them in the upper layers."""
    config = graft.MoeLoraConfig(target_modules=["0", "2"], num_experts=2, experts_pattern={"2": 6}, r=2)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    report = graft.plan(net, config)
    model = graft.get_peft_model(net, config)
    found = {key: len(experts(layer)[1]) for key, layer in layers(model).items()}
    assert found == {"0": 2, "2": 6}
    sizes = [2 * (2 * 4 + 4 * 2 + 4), 6 * (2 * 4 + 3 * 2 + 4)]
    assert [one.parameters for one in report.matched] == sizes
    assert model.get_nb_trainable_parameters()[0] == sum(sizes)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, attention_mask=None):
        return self.b(self.a(x).tanh())


def balanced(model, x, real, k, together=True):
    """E Σ f P by the definition, of each router or of all of them as one."""
    found, inside, losses = layers(model), x, []
    routed = {}
    for key in "ab":
        routed[key] = (inside @ experts(found[key])[2].T).softmax(-1)[real]
        inside = found[key](inside).tanh()
    for p in [torch.cat(list(routed.values()))] if together else routed.values():
        f = torch.stack([(p.argsort(-1, descending=True)[:, :k] == e).any(1).float().mean() for e in range(p.shape[1])])
        losses.append(p.shape[1] * (f * p.mean(0)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("pattern", [{}, {"b": 3}], ids=["", "unequal"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_of_routers(k, pattern):
    options = dict(num_experts=4, experts_pattern=pattern, top_k=k, router_loss=True, router_aux_loss_coef=0.3)
    with seeded(0):
        model = graft.get_peft_model(Two(), graft.MoeLoraConfig(target_modules=["a", "b"], r=2, **options)).train()
        for p in model.parameters():
            p.data.normal_()
    x, real = inputs(3, 5), torch.ones(3, 5, dtype=torch.bool)
    for mask in ({}, dict(attention_mask=real)):
        model(x, **mask)
        loss = model.auxiliary_loss()
        assert_close(loss, 0.3 * balanced(model, x, real, k, not pattern))
        real[0, :2] = real[2, 4] = False
    loss.backward()
    assert all(experts(layers(model)[key])[2].grad.abs().max() > 1e-4 for key in "ab"), "so do the routers learn"
    model(x, attention_mask=torch.zeros(3, 5))
    assert model.auxiliary_loss() == 0.0
    model.set_requires_grad("default", False)
    model(x)
    assert model.auxiliary_loss() == 0.0, "of routers that do not train"


def test_without_router_loss_there_is_none():
    model = linear(moelora()).train()
    model(inputs(2))
    assert model.auxiliary_loss() == 0.0


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(top_k=5), "`top_k` is 5.*all of its experts: 4"),
        (dict(top_k=0), "`top_k` is 0"),
        (dict(experts_pattern={"0": 1}), r"`top_k` is 2.*: 1 in experts_pattern\['0'\]"),
        (
            dict(experts_pattern={"0": 0}, top_k=None),
            r"`num_experts` must be positive, got 0 in experts_pattern\['0'\]",
        ),
        (dict(num_experts=0), "`num_experts` must be positive"),
        (dict(r=0), "`r`"),
        (dict(lora_dropout=-0.1), "lora_dropout"),
        (dict(router_aux_loss_coef=-1.0), "router_aux_loss_coef"),
        (dict(router_aux_loss_coef=float("nan")), "router_aux_loss_coef"),
        (dict(router_loss=True, top_k=None), "a router that chooses"),
    ],
    ids=str,
)
def test_what_a_mixture_refuses(options, text):
    refuses(graft.ConfigError, text, moelora, **options)
