# SPDX-License-Identifier: Apache-2.0
"""VeLoRA beyond the matrix and the comparison of samples: its gradient, what it keeps, the direction's source."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from graft.kernels.low_rank import grouped, mean_direction, sketched_product
from tests.leaves_out import WHOLE_GRAPHS
from tests.models import adapted, nudged, seeded

LIBS = (graft, peft)


def net(n=10) -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(n, 12), nn.Tanh(), nn.Linear(12, 8))


def with_velora(lib=graft, n=10, targets=("0", "2"), **options):
    velora = lib.VeloraConfig(**dict(num_groups=4, scale=0.8) | options)
    config = lib.LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), velora_config=velora)
    return nudged(adapted(net(n), config, lib=lib, scale=0)).train()


def inputs(n=10, seed=2):
    with seeded(seed):
        return torch.randn(70, n)


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def embeds(model):
    return {name: t.clone() for name, t in model.state_dict().items() if "velora_embed" in name}


# the kernel


def reconstructed(x, v, groups):
    """x with each group projected onto v: it stands for x in the gradient of A."""
    c = grouped(x, groups) @ v
    return (c[..., None] * v).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.differs("VeLoRA: the gradient of A")
@pytest.mark.parametrize("groups, n", [(4, 12), (4, 10), (5, 3), (1, 7)])
def test_the_gradient_is_that_of_what_was_put_together_again(groups, n):
    with seeded(0):
        x, A, g = torch.randn(2, 5, n, requires_grad=True), torch.randn(3, n, requires_grad=True), torch.randn(2, 5, 3)
    v = mean_direction(x.detach(), groups)
    assert_close(v.norm(), torch.tensor(1.0))
    sketched_product(x, A, v, groups, 0.7).backward(g)
    assert_close(x.grad, g @ A)
    assert_close(A.grad, 0.7 * torch.einsum("...r,...n->rn", g, reconstructed(x.detach(), v, groups)))


def test_as_many_groups_as_numbers_lose_nothing():
    with seeded(0):
        x = torch.randn(5, 7)
    assert_close(reconstructed(x, mean_direction(x, 7).abs(), 7), x)


# against PEFT


@pytest.mark.parametrize("how", ["batch_average", "batch_average_once", "random"])
def test_training_goes_as_pefts(how):
    """Three steps, each on another batch: the direction, and with it the gradient, changes or stays as there."""
    trained = []
    for lib in LIBS:
        model = with_velora(lib, init_type=how)
        steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for i in range(3):
            steps.zero_grad()
            model(inputs(seed=i)).square().mean().backward()
            steps.step()
        trained.append({name: t for name, t in model.state_dict().items() if "lora_" in name})
    assert trained[0].keys() == trained[1].keys()
    for name, t in trained[1].items():
        assert_close(trained[0][name], t, rtol=1e-5, atol=1e-6)


def test_in_eval_mode_gradients_are_loras():
    model = with_velora()
    before = embeds(model)
    exact = gradients(model.eval(), inputs())
    assert all(torch.equal(t, before[name]) for name, t in embeds(model).items()), "and the direction stays"
    approximate = gradients(model.train(), inputs())
    A = next(name for name in exact if "lora_A" in name)
    assert (exact[A] - approximate[A]).abs().max() > 1e-3


# what is kept


def kept(model, x) -> int:
    """Bytes of tensors that the backward pass gets, parameters aside."""
    own = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.update({t.data_ptr(): t.nbytes}), t)[1], lambda t: t):
        y = model(x * 1.0)
        y.sum()
    return sum(size for where, size in seen.items() if where not in own)


def test_it_keeps_projections_in_place_of_inputs():
    plain = graft.get_peft_model(net(512), graft.LoraConfig(r=3, target_modules=["0"])).train()
    x = inputs(512)
    velora = with_velora(n=512, targets=["0"])
    assert kept(plain, x) - kept(velora, x) > 0.9 * x.nbytes


def test_checkpointing_gives_the_same_gradients():
    found = []
    for through in (False, True):
        model = with_velora()
        x = inputs().requires_grad_()
        (checkpoint(model, x, use_reentrant=False) if through else model(x)).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_two_forward_passes_before_a_backward_pass_keep_their_own_directions():
    model = with_velora()
    apart = [gradients(model, inputs(seed=i)) for i in range(2)]
    model.zero_grad()
    losses = [model(inputs(seed=i)).square().mean() for i in range(2)]
    sum(losses).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, apart[0][name] + apart[1][name])


# the direction


@pytest.mark.differs('VeLoRA: "batch_average_once" after loading')
def test_once_stays_once_after_loading(tmp_path):
    """PEFT does not save that there is a direction, and takes another from the first batch after loading."""
    model = with_velora(init_type="batch_average_once")
    model(inputs()).sum().backward()
    before = embeds(model)
    assert all(t.any() for t in before.values())
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True).train()
    loaded(inputs(seed=7)).sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in embeds(loaded).items())


def test_a_batch_of_mean_zero_has_a_direction():
    v = mean_direction(torch.zeros(3, 8), 2)
    assert_close(v, torch.full((4,), 0.5))


@WHOLE_GRAPHS
def test_it_trains_under_autocast_and_compiled():
    model, x = with_velora(), inputs()
    expected = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(p.grad / 2, expected[name], rtol=0.1, atol=0.05)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, g in gradients(compiled, x).items():
        assert_close(g, expected[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize("lib", LIBS)
@pytest.mark.parametrize(
    "options, text",
    [
        (dict(num_groups=0), "`num_groups` should be positive, got 0."),
        (dict(scale=-1.0), "`scale` should be positive, got -1.0."),
        (dict(init_type="mean"), "Unsupported `init_type` 'mean'. Supported values are"),
    ],
)
def test_refused(options, text, lib):
    with pytest.raises(ValueError, match=text):
        lib.VeloraConfig(**options)
