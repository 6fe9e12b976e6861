# SPDX-License-Identifier: Apache-2.0
"""T-LoRA in diffusers' models: the timestep that a UNet, a DiT and a pipeline give it."""

import pytest
import torch
from torch.testing import assert_close

import graft

pytest.importorskip("diffusers")

from diffusers import DiTTransformer2DModel

from tests.clients.test_diffusers import pictures, stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
ATTENTION = ["to_q", "to_v", "to_out.0"]


def unet():
    return stable_diffusion().unet.eval()


def dit():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip


def inputs(rows=3):
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, 8, 8, generator=g), torch.randn(rows, 5, 16, generator=g)


BASES = {
    "unet": (unet, [*ATTENTION, "conv1"], lambda model, x, text, t: model(x, t, text).sample),
    "dit": (dit, ATTENTION, lambda m, x, _, t: m(x, t.expand(len(x)), torch.arange(len(x))).sample),
}


@pytest.mark.parametrize("name", BASES)
def test_each_row_has_its_ranks(name):
    make, targets, run = BASES[name]
    x, text = inputs()
    t = torch.tensor([10, 500, 990])
    fresh = graft.get_peft_model(make(), graft.TLoraConfig(target_modules=targets, r=3)).eval()
    assert_close(run(fresh, x, text, t), run(make(), x, text, t))
    config = graft.TLoraConfig(target_modules=targets, r=3, init_weights=False, lora_alpha=6)
    model = graft.get_peft_model(make(), config).eval()
    together = run(model, x, text, t)
    for i in range(3):
        rows = slice(i, i + 1)
        if name == "unet":
            assert_close(together[rows], run(model, x[rows], text[rows], t[i]), atol=1e-5, rtol=1e-4)
        with model.timestep(t[i]):  # whatever the model is told
            assert_close(together[rows], run(model, x, text, t)[rows], atol=1e-5, rtol=1e-4)
    with model.timestep(990):
        assert not torch.allclose(together[:1], run(model, x, text, t)[:1], atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_it_trains_with_checkpointing(name):
    make, targets, run = BASES[name]
    x, text = inputs()
    config = graft.TLoraConfig(target_modules=targets, r=3, init_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = graft.get_peft_model(make(), config).eval()  # a DiT drops labels in training
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.get_base_model().enable_gradient_checkpointing()
        model.zero_grad()
        run(model, x.requires_grad_(), text, torch.tensor([10, 500, 990])).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(g.any() for g in grads[0].values())
    assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_a_pipeline_denoises_with_it():
    pipe = stable_diffusion()
    plain = pictures(pipe)
    pipe.unet = graft.get_peft_model(pipe.unet, graft.TLoraConfig(target_modules=ATTENTION, r=3))
    assert_close(pictures(pipe), plain)
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            if "tlora_lambda" in name:
                p.add_(1)
    assert not torch.allclose(pictures(pipe), plain, atol=1e-4)
