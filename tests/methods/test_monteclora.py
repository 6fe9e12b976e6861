# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA beyond the matrix and the comparison of samples: draws and loss are PEFT's; nothing random elsewhere."""

from __future__ import annotations

import copy
import json

import peft
import peft.helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from graft.methods.lora.monteclora import wishart_diagonal
from graft.train import MontecloraTrainerMixin
from tests.models import seeded
from tests.raised import refuses

LIBS = (graft, peft)
SETTINGS = dict(num_samples=3, sample_scaler=0.3, kl_loss_weight=0.2, use_entropy=True, dirichlet_prior=0.4)


def net() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))


def with_monteclora(lib=graft, adapters=("default",), seed=1, lora=None, **settings):
    """PEFT draws ahead; its buffers of one draw are used up, so that it draws when a layer runs, as graft does."""
    config = lambda: lib.LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=["0", "2"],
        monteclora_config=lib.MontecloraConfig(**SETTINGS | settings, buffer_size=1),
        **(lora or {}),
    )
    with seeded(seed):
        model = lib.get_peft_model(net(), config(), adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, config())
    for module in model.modules():
        if hasattr(getattr(module, "sampler", None), "_refill_buffer"):
            module.sampler.index = 1
    with torch.no_grad():  # PEFT's first buffer comes between the initial values of the layers
        for name, p in model.named_parameters():
            if "lora_" in name:
                with seeded(sum(map(ord, name))):
                    p.copy_(torch.randn(p.shape) * 0.3)
    return model.eval()


def inputs(seed=2):
    with seeded(seed):
        return torch.randn(70, 10)


def trained_step(model, seed=5):
    torch.manual_seed(seed)
    model.zero_grad()
    y = model.train()(inputs())
    loss = model._get_monteclora_loss()
    (y.square().mean() + loss).backward()
    return y, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, dict(num_samples=1), dict(use_entropy=False)], ids=str)
def test_draws_loss_and_gradients_are_pefts(settings):
    ours, theirs = (trained_step(with_monteclora(lib, **settings)) for lib in LIBS)
    assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    assert ours[2].keys() == theirs[2].keys() and any("std_prior" in name for name in ours[2])
    for name, g in theirs[2].items():
        assert_close(ours[2][name], g, rtol=1e-4, atol=1e-5, msg=name)


def test_small_variances_are_pefts():
    models = [with_monteclora(lib) for lib in LIBS]
    for model in models:
        for name, p in model.named_parameters():
            if "std_prior" in name:
                p.data.fill_(-9.0)
    ours, theirs = map(trained_step, models)
    assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


def test_the_state_after_a_step_is_pefts():
    models = [with_monteclora(lib) for lib in LIBS]
    for model in models:
        trained_step(model)
    ours, theirs = (m.state_dict() for m in models)
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert_close(ours[name], t.detach(), rtol=1e-5, atol=1e-6)


def test_initial_values_are_pefts():
    config = lambda lib: lib.LoraConfig(r=4, target_modules=["0"], monteclora_config=lib.MontecloraConfig())
    found = []
    for lib in LIBS:
        base = net()
        torch.manual_seed(3)
        found.append(lib.get_peft_model(base, config(lib)).state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())


def test_the_diagonal_of_a_wishart_matrix():
    torch.manual_seed(0)
    wishart = torch.distributions.Wishart(torch.tensor(5.0), scale_tril=torch.eye(5))
    torch.manual_seed(1)
    expected = wishart._bartlett_sampling(torch.Size()).diagonal()
    torch.manual_seed(1)
    assert_close(wishart_diagonal(5, torch.zeros(5)), expected)


# the loss


def test_the_loss_is_of_the_adapters_that_are_asked_for_and_train():
    model = with_monteclora(adapters=("default", "b")).train()
    one, other = model._get_monteclora_loss(), model._get_monteclora_loss("b")
    assert one != other
    assert_close(model._get_monteclora_loss(["default", "b"]), (one + other) / 2)
    refuses(ValueError, "zz", model._get_monteclora_loss, "zz")
    assert model.eval()._get_monteclora_loss() == 0.0
    plain = graft.get_peft_model(net(), graft.LoraConfig(target_modules=["0"])).train()
    assert plain._get_monteclora_loss() == 0.0


def test_the_trainer_adds_it():
    class Trainer:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            y = model(inputs["x"])
            loss = y.square().mean() * num_items_in_batch
            return (loss, y) if return_outputs else loss

    losses = []
    for lib, mixin in ((graft, MontecloraTrainerMixin), (peft, peft.helpers.MontecloraTrainerMixin)):
        trainer, model = type("T", (mixin, Trainer), {})(), with_monteclora(lib).train()
        torch.manual_seed(5)
        loss, y = trainer.compute_loss(model, {"x": inputs()}, return_outputs=True, num_items_in_batch=2)
        assert_close(loss, y.square().mean() * 2 + model._get_monteclora_loss())
        torch.manual_seed(5)
        assert torch.equal(trainer.compute_loss(model, {"x": inputs()}, num_items_in_batch=2), loss) or lib is peft
        losses.append(loss)
        model.eval()
        assert_close(
            trainer.compute_loss(model, {"x": inputs()}, num_items_in_batch=1), model(inputs()).square().mean()
        )
    assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.differs("`MontecloraTrainerMixin` with gradient accumulation")
def test_batches_that_accumulate_add_the_loss_once():
    class Trainer:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs).square().sum() / num_items_in_batch

    losses = {}
    for lib, mixin in ((graft, MontecloraTrainerMixin), (peft, peft.helpers.MontecloraTrainerMixin)):
        trainer, model = type("T", (mixin, Trainer), {})(), with_monteclora(lib).train()
        trainer.model_accepts_loss_kwargs, trainer.current_gradient_accumulation_steps = True, 4
        torch.manual_seed(5)
        found = trainer.compute_loss(model, inputs(), num_items_in_batch=torch.tensor(8))
        torch.manual_seed(5)
        losses[lib] = found - model(inputs()).square().sum() / 8, model._get_monteclora_loss()
    for lib, share in ((graft, 4), (peft, 1)):
        added, own = losses[lib]
        assert_close(added, own / share, rtol=1e-4, atol=1e-6)


# nothing random elsewhere


def test_merging_in_training_mode_merges_the_mean():
    model = with_monteclora()
    expected = model.eval()(inputs())
    model.train().merge_adapter()
    assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    deltas = [model.base_model.model[0].get_delta_weight("default") for _ in range(2)]
    assert torch.equal(*deltas)


def test_training_is_random_and_evaluation_is_not():
    model, x = with_monteclora().train(), inputs()
    assert (model(x) - model(x)).abs().max() > 1e-3
    model.eval()
    assert torch.equal(model(x), model(x))


def test_checkpointing_draws_the_same_again():
    """PEFT takes the next of its draws, so that the backward pass is that of another forward pass."""
    found = []
    for through in (False, True):
        model, x = with_monteclora().train(), inputs().requires_grad_()
        torch.manual_seed(5)
        y = checkpoint(model, x, use_reentrant=False) if through else model(x)
        y.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@pytest.mark.differs("MonteCLoRA: a copy of a model after a training step; its loss for large concentrations")
def test_a_copy_after_a_step():
    """PEFT's buffers hold a graph, which cannot be copied."""
    model = with_monteclora()
    trained_step(model)
    other = copy.deepcopy(model)
    assert_close(other._get_monteclora_loss(), model._get_monteclora_loss())


@pytest.mark.differs("MonteCLoRA: draws")
def test_nothing_is_drawn_ahead():
    """PEFT keeps 150 draws of each layer, for inference too."""
    model = with_monteclora()
    held = sum(t.numel() for t in model.state_dict().values())
    config = graft.LoraConfig(r=4, target_modules=["0", "2"])
    plain = sum(t.numel() for t in graft.get_peft_model(net(), config).state_dict().values())
    assert held - plain == 2 * (4 + 3 + 4 * 4 + 3)


@pytest.mark.differs("MonteCLoRA with `low_cpu_mem_usage`")
@pytest.mark.parametrize("light", [False, True])
def test_files_go_both_ways(light, tmp_path):
    for writer, reader in (LIBS, LIBS[::-1]):
        model = with_monteclora(writer)
        trained_step(model)
        folder = tmp_path / writer.__name__
        model.save_pretrained(folder)
        values = json.loads((folder / "adapter_config.json").read_text())
        assert values["monteclora_config"]["num_samples"] == 3
        loaded = reader.PeftModel.from_pretrained(net(), folder, low_cpu_mem_usage=light)
        assert loaded.peft_config["default"].monteclora_config.sample_scaler == 0.3
        assert_close(loaded.eval()(inputs()), model.eval()(inputs()), rtol=1e-5, atol=1e-5)
        if not (light and reader is peft):  # which has no samplers yet, and drops their values
            saved, held = (m.state_dict() for m in (model, loaded))
            assert all(torch.equal(held[name], t) for name, t in saved.items() if "monteclora" in name)


def test_tied_layers_are_refused():
    from tests import models

    config = graft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, monteclora_config={})
    with pytest.raises(graft.ConfigError, match="MonteCLoRA draws A of an embedding, which the tied layer 'lm_head'"):
        graft.get_peft_model(models.make("opt"), config)


@pytest.mark.parametrize("lib", LIBS)
@pytest.mark.parametrize("name", ["num_samples", "dirichlet_prior", "buffer_size"])
def test_refused(name, lib):
    refuses(ValueError, f"`{name}` must be greater than 0.", lib.MontecloraConfig, **{name: 0})


def test_a_load_that_fails_beside_plain_lora_leaves_no_container(tmp_path):
    """The plain adapter's own attribute `lora_monteclora_sampler`, empty, comes back."""
    with_monteclora().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "sampler" not in k}, path)
    model = graft.get_peft_model(net(), graft.LoraConfig(target_modules=["0", "2"]))
    before, has = dict(model.named_modules()), vars(model.base_model.model[0]).keys()
    refuses(graft.AdapterKeyError, None, model.load_adapter, tmp_path, "other")
    assert dict(model.named_modules()) == before and vars(model.base_model.model[0]).keys() == has
    with_monteclora().save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert model.base_model.model[0].lora_monteclora_sampler.keys() == {"other"}
