# SPDX-License-Identifier: Apache-2.0
"""The law of stacks of matrices: a method on a stack is the same method on each of its matrices as a linear layer."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.errors import PeftError
from tests.conformance.samples import ADAPTERS, CALLED, SAMPLES
from tests.covering import Sometimes, law
from tests.leaves_out import FUSED_EXPERTS
from tests.looks import layers, layers_of
from tests.models import adapted, disturb, seeded

pytestmark = FUSED_EXPERTS
COUNT, WIDE, NARROW, TOKENS = 3, 10, 6, 9
X = torch.linspace(-2, 2, 4 * TOKENS * WIDE).sin().view(4, TOKENS, WIDE)

# samples and methods → why they have no stack
NO_CALL = "used without a call of the layer"
REFUSED = {
    **dict.fromkeys(
        ("BEFT-bias", "BOTTLENECK", "EWORA", "LILY", "LN_TUNING", "MOELORA", "MTLLORA", "POLY", "REFT", "STEERING",
         "TLORA", "TRAINABLE_TOKENS"), NO_CALL,
    ),
    "ADAMSS": "another shape for each matrix", "FROD": "made of their weights",
    "LORAXS-sb": "measures linear layers only",
}  # fmt: skip


class Experts(nn.Module):
    """Experts as transformers' decorator marks them."""

    has_gate = has_bias = is_transposed = False
    num_experts = COUNT

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(COUNT, NARROW, WIDE) * 0.4)
        self.down_proj = nn.Parameter(torch.randn(COUNT, WIDE, NARROW) * 0.4)

    act_fn = _apply_gate = staticmethod(torch.tanh)

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for e in range(COUNT):
            token, k = (index == e).nonzero(as_tuple=True)
            z = self.act_fn(x[token] @ self.up_proj[e].T) @ self.down_proj[e].T
            y = y.index_add(0, token, z * weights[token, k, None])
        return y


class Modules(nn.Module):
    """The same experts as linear layers."""

    def __init__(self, experts):
        super().__init__()
        self.up = nn.ModuleList(linear(W) for W in experts.up_proj)
        self.down = nn.ModuleList(linear(W) for W in experts.down_proj)

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down)):
            token, k = (index == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, down(torch.tanh(up(x[token]))) * weights[token, k, None])
        return y


def linear(W):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data = W.detach().clone()
    return layer


class Net(nn.Module):
    """Tokens of which each uses two of three experts."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.before = experts, nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        flat = x.flatten(0, -2) * self.before
        index = torch.arange(2 * TOKENS).view(-1, 2).repeat(len(x), 1) % COUNT
        weights = torch.linspace(0.2, 1, 2 * TOKENS, dtype=x.dtype).view(-1, 2).repeat(len(x), 1)
        return self.experts(flat, index, weights).view(x.shape)


def base():
    with seeded(0):
        return Net(Experts()).eval()


def config(sample, adapter, **targets):
    made = sample.make(adapter)
    made.target_modules = set()
    for name, value in targets.items():
        setattr(made, name, value)
        if getattr(made, "feedforward_modules", None):
            made.feedforward_modules = set(value)
    return made


def with_sample(model, sample, adapters, **targets):
    return adapted(model, {name: config(sample, name, **targets) for name in adapters}, scale=0)


def pair(sample, adapters=("default",)):
    """Return a model with adapters on a stack, and one with the same on linear layers."""
    stack = disturb(with_sample(base(), sample, adapters, target_parameters=["experts.up_proj"]))
    twin = with_sample(
        Net(Modules(base().experts)).eval(), sample, adapters, target_modules={f"up.{e}" for e in range(COUNT)}
    )
    (whole,) = layers(stack).values()
    with torch.no_grad():
        for e, layer in enumerate(layers(twin).values()):
            for name in adapters:
                for ours, theirs in zip(whole.slots(name), layer.slots(name), strict=True):
                    assert ours.path == theirs.path and ours.tensor.shape == (COUNT, *theirs.tensor.shape)
                    theirs.tensor.data.copy_(ours.tensor[e])
            for key in whole.attached:
                ours, theirs = (dict(getattr(held, key).named_parameters()) for held in (whole, layer))
                for n, p in theirs.items():
                    p.data.copy_(ours.get(n, next(iter(ours.values()))))  # a group for each of TinyLoRA's layers
    return stack, twin


def results(model, **kwargs):
    model.zero_grad()
    for name in model.peft_config:
        for layer in layers_of(model, name):
            for slot in layer.slots(name):
                slot.tensor.requires_grad_(slot.trains)
    y = model(X, **kwargs)
    y.square().sum().backward()
    return y.detach()


def why_not(sample):
    return REFUSED.get(str(sample)) or REFUSED.get(sample.method)


ALL = [s for s in (*SAMPLES, *CALLED) if s.method not in ("LORA", "ADALORA", "SDT")]  # which have tests of their own
FITS = [s for s in ALL if why_not(s) is None]
some = law("sample", FITS, lambda s: [s.method, Sometimes(str(s), 2)])


@pytest.mark.parametrize("sample", [s for s in ALL if why_not(s)], ids=str)
def test_a_refusal_says_why_and_changes_nothing(sample):
    model = base()
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(PeftError, match=why_not(sample)) as raised:
        with_sample(model, sample, ("default",), target_parameters=["experts.up_proj"])
    assert "experts.up_proj" in str(raised.value) and "default" in str(raised.value)
    assert type(model.experts) is Experts
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


@some
def test_each_matrix_is_adapted_as_a_linear_layer(sample):
    stack, twin = pair(sample)
    found, expected = results(stack), results(twin)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (whole,) = layers(stack).values()
    for e, layer in enumerate(layers(twin).values()):
        for ours, theirs in zip(whole.slots("default"), layer.slots("default")):
            if theirs.trains:
                assert_close(ours.tensor.grad[e], theirs.tensor.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample", [s for s in FITS if not s.label], ids=str)
def test_a_single_square_matrix_in_bfloat16(sample, monkeypatch):
    """No dimension tells which of the three it is, and adapters keep a dtype of their own."""
    float32 = base
    for name, value in dict(COUNT=1, NARROW=WIDE, base=lambda: float32().bfloat16(), X=X.bfloat16()).items():
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setattr(Experts, "num_experts", 1)
    stack, twin = pair(sample)
    found, expected = results(stack), results(twin)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, rtol=5e-2, atol=5e-2)
    (whole,), (layer,) = layers(stack).values(), layers(twin).values()
    for ours, theirs in zip(whole.slots("default"), layer.slots("default")):
        assert ours.tensor.dtype == theirs.tensor.dtype
        if theirs.trains:
            largest = float(theirs.tensor.grad.abs().max())
            assert_close(ours.tensor.grad[0], theirs.tensor.grad, rtol=0.1, atol=0.1 * largest)


@some
def test_merging_files_and_switching_off(sample, tmp_path):
    stack, twin = pair(sample)
    with torch.no_grad():
        plain, expected, before = base()(X), stack(X), base().experts.up_proj
        with stack.disable_adapter():
            assert torch.equal(stack(X), plain)
        stack.merge_adapter()
        twin.merge_adapter()
        (whole,) = layers(stack).values()
        for W, layer in zip(whole.get_base_layer().up_proj, layers(twin).values()):
            assert_close(W, layer.get_base_layer().weight, rtol=1e-5, atol=1e-5)
        assert_close(stack(X), expected, rtol=1e-5, atol=1e-5)
        stack.unmerge_adapter()
        assert torch.equal(whole.get_base_layer().up_proj, before) and torch.equal(stack(X), expected)
        stack.save_pretrained(tmp_path)
        loaded = graft.PeftModel.from_pretrained(base(), tmp_path).eval()
        assert torch.equal(loaded(X), expected) and not torch.equal(expected, plain)
        held = load_file(tmp_path / "adapter_model.safetensors")
        save_file({n: t[:1].contiguous() for n, t in held.items()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(PeftError):
            graft.PeftModel.from_pretrained(base(), tmp_path)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(stack)))
        assert torch.equal(copied(X), expected)


@law("sample", [s for s in FITS if s.together], lambda s: [s.method, Sometimes(str(s), 2)])
def test_rows_of_a_batch(sample):
    model = disturb(with_sample(base(), sample, ADAPTERS, target_parameters=["experts.up_proj"]))
    names = ["other", "__base__", "default", "other"]
    found = results(model, adapter_names=names)
    with torch.no_grad():
        for row, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
            with model.disable_adapter() if name == "__base__" else nullcontext():
                assert_close(found[row], model(X[row : row + 1])[0], rtol=1e-5, atol=1e-5)


@some
def test_conversion_to_lora(sample):
    """Each matrix gets factors of its own, of the highest rank here."""
    model = disturb(with_sample(base(), sample, ("default",), target_parameters=["experts.up_proj"]))
    with torch.no_grad():
        config, tensors = graft.convert_to_lora(model, rank=NARROW)
        made = graft.get_peft_model(base(), config).eval()
        graft.set_peft_model_state_dict(made, tensors)
        assert_close(made(X), model(X), rtol=1e-4, atol=1e-4)
