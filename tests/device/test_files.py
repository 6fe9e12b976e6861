# SPDX-License-Identifier: Apache-2.0
"""Files between devices whose decompositions differ in signs, and whose generators give other numbers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import graft
from graft.core.random import build_on, draw_from_seed, read_generator_states, restore_generator_states
from graft.files import verify
from graft.many import MultiTrain
from graft.serving.fits import _copy_to_host
from tests import models
from tests.conformance.samples import ADAPTERS, CALLED_CELLS, CELLS
from tests.device.simulated import WHY_NOT
from tests.device.test_methods import DEVICE, default
from tests.models import disturb

pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")
ONE_EACH = list({str(cell.sample): cell for cell in reversed(CELLS + CALLED_CELLS)}.values())


@contextlib.contextmanager
def other_signs():
    if WHY_NOT is None:
        torch.ops.simulated.signs(1)
    try:
        yield
    finally:
        if WHY_NOT is None:
            torch.ops.simulated.signs(0)


@pytest.mark.differs("PSOFT: the singular vectors within which R turns")
@pytest.mark.parametrize("cell", ONE_EACH, ids=str)
@pytest.mark.parametrize("there", [True, False], ids=["to the CPU", "from the CPU"])
def test_a_file_computes_the_same_on_another_device(cell, there, tmp_path):
    source, target = (DEVICE, CPU) if there else (CPU, DEVICE)
    with other_signs():
        model = disturb(cell.fresh(ADAPTERS, base=cell.base().to(source)))
        x = cell.inputs()
        wanted = [model(x.to(source))]
        model.set_adapter("other")
        wanted.append(model(x.to(source)))
        model.save_pretrained(tmp_path)
        loaded = graft.PeftModel.from_pretrained(cell.base().to(target), tmp_path)
        report = loaded.load_adapter(tmp_path / "other", "other")
        assert not report.missing_keys and not report.unexpected_keys
        cell.sample.called(loaded)
        for name, theirs in zip(ADAPTERS, wanted):
            loaded.set_adapter(name)
            tolerance = max(cell.store.tolerance, 2e-5)
            assert_close(loaded(x.to(target)).cpu(), theirs.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.differs("Seeded values on a device that is not the CPU, or under a default device")
def test_a_seed_draws_the_same_everywhere():
    for draw in (
        lambda d: torch.randn(5, device=d),
        lambda d: torch.nn.init.kaiming_uniform_(torch.empty(3, 4, device=d)),
        lambda d: torch.empty(7, device=d).normal_(std=2),
        lambda d: torch.svd_lowrank(torch.arange(24.0, device=d).view(4, 6).sin(), q=2)[1],
        lambda d: torch.rand_like(torch.ones(3, device=d)),
        lambda d: torch.bernoulli(torch.full((9,), 0.5, device=d)),
        lambda d: torch.full((9,), 0.1, device=d).multinomial(4),
    ):
        drawn = []
        for device in (CPU, DEVICE):
            before = read_generator_states()
            with draw_from_seed(3):
                drawn.append(draw(device).cpu())
            assert all(torch.equal(a, b) for a, b in zip(before, read_generator_states())), "no generator has moved"
        assert_close(*drawn)


def merged(folder, config):
    """What merging an adapter's file into a folder gives."""
    models.make("llama").save_pretrained(folder / "base")
    with models.seeded(0):
        graft.get_peft_model(models.make("llama"), config).save_pretrained(folder / "adapter")
    graft.merge_files(folder / "base", [folder / "adapter"], folder / "merged")
    return load_file(folder / "merged" / "model.safetensors")


@pytest.mark.parametrize("method", ["LORA", "IA3", "OFT"])
def test_files_merge_on_the_cpu_whatever_the_default_device(method, tmp_path):
    config = {
        "LORA": lambda: graft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
        "IA3": lambda: graft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
        "OFT": lambda: graft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0, init_weights=False),
    }[method]
    here = merged(tmp_path / "here", config())
    with default(DEVICE):
        there = merged(tmp_path / "there", config())
    for name, t in here.items():
        assert torch.equal(there[name], t), name


def test_what_is_kept_or_computed_in_host_memory_is_there_with_a_default_device():
    with default(DEVICE):
        assert _copy_to_host(torch.ones(2)).device == CPU  # of an adapter that waits for a slot
        model = models.make("llama").to(DEVICE)
        found = verify.compute_log_probabilities(model, [[1, 2, 3, 4]], [(0, 1, 2), (0, 2, 5)])
        assert found.device == CPU == verify.stack_values([{(1, 2): 0.5}], [(0, 1, 2)]).device
        runs, ids = MultiTrain(model), torch.randint(3, 30, (4, 6))
        batch = {"input_ids": ids, "labels": ids}
        config = graft.LoraConfig(target_modules=["q_proj"])
        run = runs.add("a", config, data=[batch], valid=[batch, batch], every=1, steps=1)
        runs.run()
    assert len(run.valid) == 1


def test_made_on_leaves_what_a_caller_asks_for():
    with build_on(DEVICE):
        assert torch.empty(2).device == DEVICE and torch.empty(2, device="cpu").device == CPU
        assert torch.zeros(2, device="meta").is_meta and torch.randn(2, device="meta").is_meta
        layer = torch.nn.Linear(2, 3)
        assert {p.device for p in layer.parameters()} == {DEVICE}
    with torch.device("meta"), build_on(DEVICE):
        assert torch.empty(2).is_meta


def test_states_are_those_of_the_devices_generator_as_well():
    before = read_generator_states()
    drawn = torch.randn(3, device=DEVICE), torch.randn(3)
    restore_generator_states(before)
    assert torch.equal(torch.randn(3, device=DEVICE), drawn[0]) and torch.equal(torch.randn(3), drawn[1])
    assert len(before) == 2
