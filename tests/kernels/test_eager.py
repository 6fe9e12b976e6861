# SPDX-License-Identifier: Apache-2.0
"""Short cuts are taken only where nobody can tell: hooks, tracers, derivatives and modes see what they would see."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as modules
from torch.testing import assert_close

import graft
from graft.kernels import eager
from graft.kernels.low_rank import FUSED_FROM
from tests.models import seeded

ROWS, IN = FUSED_FROM + 6, 40
ON = dict(target_modules=["0", "2"])
CONFIGS = {
    "LORA": lambda **o: graft.LoraConfig(**ON, r=3, lora_alpha=4, **o),
    "DORA": lambda **o: graft.LoraConfig(**ON, r=3, lora_alpha=4, use_dora=True, **o),
    "VERA": lambda **o: graft.VeraConfig(**ON, r=6, **o),
    "ADALORA": lambda **o: graft.AdaLoraConfig(**ON, init_r=4, target_r=2, lora_alpha=5, total_step=9, **o),
    "LOHA-narrow": lambda **o: graft.LoHaConfig(**ON, r=2, alpha=2, **o),
    "LOHA-wide": lambda **o: graft.LoHaConfig(**ON, r=5, alpha=5, **o),
    "OFT": lambda **o: graft.OFTConfig(**ON, oft_block_size=4, **o),
    "HRA": lambda **o: graft.HRAConfig(**ON, r=4, **o),
    "HIRA": lambda **o: graft.HiraConfig(**ON, r=4, **o),
    "MISS": lambda **o: graft.MissConfig(**ON, r=6, **o),
    "MISS-bat": lambda **o: graft.MissConfig(**ON, r=4, init_weights="bat", **o),
    "VBLORA": lambda **o: graft.VBLoRAConfig(**ON, r=3, num_vectors=9, vector_length=4, **o),
    "GRALORA": lambda **o: graft.GraloraConfig(**ON, r=4, alpha=5, **o),
    "DELORA": lambda **o: graft.DeloraConfig(**ON, r=4, delora_lambda=2, **o),
    "C3A": lambda **o: graft.C3AConfig(**ON, block_size=4, **o),
    "FOURIERFT": lambda **o: graft.FourierFTConfig(**ON, n_frequency=70, scaling=40, **o),
    "LOKR": lambda **o: graft.LoKrConfig(**ON, r=2, alpha=3, **o),
    "WAVEFT": lambda **o: graft.WaveFTConfig(**ON, n_frequency=70, scaling=1, **o),
}
DROPOUT = {
    "LORA": "lora_dropout",
    "DORA": "lora_dropout",
    "VERA": "vera_dropout",
    "ADALORA": "lora_dropout",
    "HIRA": "hira_dropout",
    "MISS": "miss_dropout",
    "VBLORA": "vblora_dropout",
    "GRALORA": "gralora_dropout",
}
every = pytest.mark.parametrize("name", CONFIGS)
dropping = pytest.mark.parametrize("name", DROPOUT)


def model(name, dropout=0.0, dtype=torch.float32):
    with seeded(0):
        base = nn.Sequential(nn.Linear(IN, 28), nn.Tanh(), nn.Linear(28, 32)).to(dtype)
        options = {DROPOUT[name]: dropout} if dropout else {}
        made = graft.get_peft_model(base, CONFIGS[name](**options))
        with torch.no_grad():
            for key, p in made.named_parameters():
                if p.requires_grad and "base_layer" not in key:
                    p.add_(torch.randn(p.shape).to(p.dtype), alpha=0.2)
    return made


def inputs(dtype=torch.float32, rows=ROWS):
    with seeded(2):
        return torch.randn(rows, IN).to(dtype)


def gradients(made, y):
    made.zero_grad()
    y.float().square().sum().backward()
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


@dropping
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_hook_on_the_dropout_is_called_and_counts(name, share, training):
    made = model(name, share).train(training)
    layer, calls = made.base_model.model[0], []
    expected = layer.base_layer(inputs())
    dropout = getattr(layer, DROPOUT[name])["default"]
    handle = dropout.register_forward_hook(lambda _m, _x, y: calls.append(y) or y * 0)
    y = layer(inputs())
    assert len(calls) == 1
    if name != "DORA":  # which scales what the base layer makes of it, too
        assert_close(y, expected)
    handle.remove()
    assert not torch.equal(layer(inputs()), y) and len(calls) == 1


@pytest.mark.differs("a hook on `lora_magnitude_vector`")
def test_a_hook_on_the_magnitudes_is_called_and_counts():
    made = model("DORA")
    layer = made.base_model.model[0]
    y, b = layer(inputs()), layer.base_layer.bias
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda _m, _x, m: 2 * m)
    assert_close(layer(inputs()) - b, 2 * (y - b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "MISS-bat"])  # whose weight is folded
@pytest.mark.parametrize("gradient", [True, False])
def test_hooks_on_all_modules_see_inputs_and_outputs(name, gradient):
    made = model(name)
    layer, seen = made.base_model.model[0], []
    expected = made(inputs()).detach()

    def see(module, args, y):
        if module is layer.base_layer:
            seen.append((args[0], y))

    handle = modules.register_module_forward_hook(see)
    with nullcontext() if gradient else torch.no_grad():
        found = made(inputs())
    handle.remove()
    assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
    ((x, y),) = seen
    assert torch.equal(y, nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


@pytest.mark.parametrize(
    "register",
    [
        lambda: modules.register_module_forward_pre_hook(lambda *_: None),
        lambda: modules.register_module_full_backward_hook(lambda *_: None),
        lambda: modules.register_module_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_other_hooks_on_all_modules(register):
    assert eager.eager()
    handle = register()
    assert not eager.eager()
    handle.remove()
    assert eager.eager()


def test_gradients_of_several_uses_are_summed_before_others_are_added():
    """1e8 - 1e8 + 1: in another order the 1 would be lost."""
    x = torch.ones(3, requires_grad=True)
    inner = eager.once(x)
    (inner * 1e8 - inner * 1e8 + x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.parametrize("trains", [True, False], ids=["with a gradient", "without"])
@pytest.mark.parametrize("records", [True, False], ids=["recorded", "no_grad"])
def test_a_base_layer_gets_the_very_input_if_it_records_no_gradient(trains, records):
    """As without the adapter; else a view."""
    made, seen = model("LORA"), []
    layer = made.base_model.model[0]
    layer.base_layer.register_forward_pre_hook(lambda _m, args: seen.extend(args))
    x = inputs().requires_grad_(trains)
    with torch.set_grad_enabled(records):
        made(x)
    assert (seen[0] is x) == (not (trains and records)) and seen[0].data_ptr() == x.data_ptr()


@every
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_meta(name, share):
    if share and name not in DROPOUT:
        return
    made = model(name, share).to("meta")
    y = made(inputs().to("meta"))
    y.sum().backward()
    assert y.is_meta and all(p.grad is not None for p in made.parameters() if p.requires_grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert made(inputs().to("meta")).shape == (ROWS, 32)


@dropping
def test_a_default_device_that_holds_no_values(name):
    made, x = model(name, 0.3), inputs()
    with torch.device("meta"):
        gradients(made, made(x))


@dropping
def test_fake_tensors(name):
    made = model(name, 0.3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = made(torch.randn(ROWS, IN))
        y.sum().backward()
    assert y.shape == (ROWS, 32)


@every
@pytest.mark.parametrize("gradient", [True, False])
def test_forward_mode_derivatives(name, gradient):
    made = model(name).double().eval()
    x = inputs(torch.float64)
    with seeded(4):
        direction = torch.randn_like(x)
    with forward_ad.dual_level(), nullcontext() if gradient else torch.no_grad():
        _, tangent = forward_ad.unpack_dual(made(forward_ad.make_dual(x, direction)))
    step = 1e-5
    expected = (made(x + step * direction) - made(x - step * direction)) / (2 * step)
    assert_close(tangent, expected, rtol=1e-5, atol=1e-6)


@every
def test_tracing(name):
    made = model(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        traced = torch.jit.trace(made, (inputs(),))
    x = inputs().flip(0)
    assert_close(traced(x), made(x), rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("inside", [True, False], ids=["forward inside", "forward outside"])
def test_autocast_around_backward_changes_nothing(name, inside):
    made = model(name, dtype=torch.bfloat16).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        expected, y = made(inputs(torch.bfloat16)), made(inputs(torch.bfloat16))
    exact = gradients(made, expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(made, y)
    assert found.keys() == exact.keys()
    for key, g in exact.items():
        assert found[key].dtype == g.dtype
        assert_close(found[key], g, rtol=0.05, atol=0.02 * g.abs().max().item())


def test_every_function_of_a_kernel_has_a_backward_pass_that_autocast_leaves_alone():
    def below(cls):
        return {cls, *(c for sub in cls.__subclasses__() for c in below(sub))}

    ours = {c for c in below(torch.autograd.Function) if c.__module__.startswith(("graft.kernels", "graft.storage"))}
    assert len(ours) > 8 and ours == below(eager.Function)


@dropping
@pytest.mark.parametrize("rows", [4, ROWS])
def test_dropout_of_everything(name, rows):
    made = model(name, 1.0).train()
    layer, x = made.base_model.model[0], inputs(rows=rows)
    if name == "DORA":
        assert_close(layer(x), layer.base_layer(x))
    gradients(made, made(x))
    assert_close(layer(x), layer.base_layer(x))
