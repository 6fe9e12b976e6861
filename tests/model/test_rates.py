# SPDX-License-Identifier: Apache-2.0
"""Learning rates as data: what is suggested, from what; and the audit of an optimizer's rates."""

import pytest
import torch
from torch import nn

import graft
from graft.methods import ROWS, method_of
from graft.methods.lora import lora
from graft.model import rates
from tests.models import adapted

GRID = [1e-4, 1e-3, 1e-2, 1e-1]


def row(adapter="LoRA", config=None, means=(0.5, 0.3, 0.29, None), spreads=(0.01, 0.02, 0.01, None), **other):
    return rates.RateSearch(
        method=adapter, adapter=adapter, config=config or {"r": 4}, task="spam", model="tiny", model_type="bert",
        steps=9, batch=2, seeds=3, date="2026-01-01", rates=GRID, means=list(means), spreads=list(spreads),
    ) | other  # fmt: skip


@pytest.fixture
def found(monkeypatch):
    """Return a function that puts rows in place of the package's."""
    return lambda *rows: monkeypatch.setattr(rates, "read_searches", lambda: rows)


def test_a_measured_rate_with_what_is_as_good(found):
    found(row())
    told = graft.suggest_lr(graft.LoraConfig(r=4))
    assert (told.lr, told.low, told.high, told.tested) == (1e-2, 1e-3, 1e-2, (1e-4, 1e-1))
    assert told.tested and "9 steps of 2" in str(told) and "arXiv 2106.09685" in str(told)


def test_rates_by_size_and_the_closest_size(found):
    small, large = row(), row(config={"r": 64}, means=(0.4, 0.2, 0.9, None))
    found(small, large)
    told = graft.suggest_lr(graft.LoraConfig(r=48))
    assert told.lr == 1e-3 and told.by_size == {"r 4": 1e-2}


def test_what_is_not_said_is_the_default(found):
    """Rank 8 and alpha 8, from which rank 64 is further than from 32, and 9 nearer than to 32."""
    found(row(config={"seed": 0}), row(config={"r": 32, "lora_alpha": 8}, means=(0.1, 0.2, 0.3, 0.4)))
    assert graft.suggest_lr(graft.LoraConfig(r=64)).lr == 1e-4
    assert graft.suggest_lr(graft.LoraConfig(r=9)).lr == 1e-2
    assert graft.suggest_lr(graft.LoraConfig(r=32, lora_dropout=0.1)).lr == 1e-4


@pytest.mark.parametrize("options", [{"target_modules": "all-linear"}, {"init_lora_weights": "pissa"}])
def test_words_that_nobody_has_measured(found, options):
    """Not the rates of adapters with other flags, which the size would be nearer to."""
    found(row(), row(config={"r": 64, "use_rslora": True}, means=(0.1, 0.2, 0.3, 0.4)))
    assert graft.suggest_lr(graft.LoraConfig(r=64, **options)).lr == 1e-2
    assert graft.suggest_lr(graft.LoraConfig(r=64, use_rslora=True, **options)).lr == 1e-4


def test_a_start_that_nobody_has_measured_has_the_rates_of_none(found):
    """Not those of all starts that were measured."""
    found(row(), row(config={"r": 4, "init_lora_weights": "lora_ga"}, means=(0.1, 0.2, 0.3, 0.4)))
    for start in (False, "gaussian", "orthogonal"):
        told = graft.suggest_lr(graft.LoraConfig(r=4, init_lora_weights=start))
        assert told.lr == 1e-2 and len(told.found_on) == 1


def test_the_iterations_of_pissa_are_no_start_of_their_own(found):
    found(row(), row(config={"r": 4, "init_lora_weights": "pissa_niter_4"}, means=(0.1, 0.2, 0.3, 0.4)))
    for start in ("pissa", "pissa_niter_16"):
        told = graft.suggest_lr(graft.LoraConfig(r=4, init_lora_weights=start))
        assert told.lr == 1e-4 and "r 4, init_lora_weights pissa_niter_4: 0.0001" in str(told)


def test_rates_of_short_runs_say_so(found):
    found(row(), row(task="topics") | {"steps": 32}, row("LNTuning", config={}))
    told = graft.suggest_lr(graft.LoraConfig(r=4))
    assert told.steps == (9, 32)
    assert "rates of runs of 9 to 32 steps; for thousands of steps begin with its source's rates" in str(told)
    told = graft.suggest_lr(graft.LNTuningConfig())  # its source has none
    assert "rates of runs of 9 steps; for thousands of steps begin below the least of these rates" in str(told)
    found()
    told = graft.suggest_lr(graft.LoraConfig(r=4))
    assert told.steps is None and "steps" not in str(told)


def test_tasks_are_weighed_by_their_own_losses(found):
    found(row(means=(9, 8, 10, 12)), row(task="topics", means=(0.4, 0.2, 0.1, 0.9)))
    assert graft.suggest_lr(graft.LoraConfig(r=4)).lr == 1e-2  # 1.25 + 1 against 1 + 2


def test_models_of_the_same_type_come_first(found):
    found(row(), row(model_type="llama", means=(0.1, 0.2, 0.3, 0.4)))
    model = nn.Linear(2, 2)
    model.config = {"model_type": "llama"}
    assert graft.suggest_lr(graft.LoraConfig(r=4), model).lr == 1e-4


def test_rates_of_other_models_do_not_stand_for_the_sources(found):
    """What 9 steps of a small encoder like is too much for a large decoder."""
    found(row(), row("LNTuning", config={}))
    model = nn.Linear(2, 2)
    model.config = {"model_type": "llama"}
    told = graft.suggest_lr(graft.LoraConfig(r=4), model)
    assert not told.tested and told.lr is None and (told.low, told.high) == (6e-5, 5e-4)
    assert "on a model of another type: spam (tiny), r 4: 0.01" in str(told)
    assert graft.suggest_lr(graft.LNTuningConfig(), model).lr == 1e-2  # its source has none


def test_variants_and_flags_have_rates_of_their_own(found):
    found(row(), row(config={"r": 4, "use_rslora": True}, means=(0.1, 0.2, 0.3, 0.4)), row("DoRA", means=(2, 1, 3, 4)))
    assert graft.suggest_lr(graft.LoraConfig(r=4, use_rslora=True)).lr == 1e-4
    assert graft.suggest_lr(graft.LoraConfig(r=4, use_dora=True)).lr == 1e-3


def test_a_method_that_was_not_measured_has_its_sources_range(found):
    found()
    told = graft.suggest_lr(graft.AdaLoraConfig(total_step=10))
    assert not told.tested and told.lr is None and (told.low, told.high) == (5e-4, 2.2e-3)
    assert "not measured here; its source" in str(told)
    assert graft.suggest_lr(graft.IA3Config()).lr == 3e-3  # its source has one


def test_a_method_of_which_nothing_is_known_says_so(found):
    found(row(means=[None] * 4))  # all diverged
    told = graft.suggest_lr(graft.LNTuningConfig())
    assert told.lr is told.low is None and "no rate is known" in str(told)
    assert not graft.suggest_lr(graft.LoraConfig(r=4)).tested


@pytest.mark.parametrize("name", ROWS)
def test_ranges_of_sources(name):
    published = method_of(name).published_lr
    if published is not None:
        assert 0 < published.low <= published.high < 1
        assert "arXiv" in published.source or "comparison" in published.source


def test_the_packages_rows():
    known = {cls.__name__ for cls in (*map(method_of, ROWS), *map(lora.import_beside, lora.VARIANTS.values()))}
    for one in rates.read_searches():
        assert one["adapter"] in known and one["rates"] == sorted(one["rates"])
        assert len(one["rates"]) == len(one["means"]) == len(one["spreads"])
        assert [m is None for m in one["means"]] == [s is None for s in one["spreads"]]
        assert rates.best_lr([one]) in one["rates"] and one["steps"] > 0 and one["seeds"] > 1


# the audit


@pytest.fixture
def model():
    net = nn.Sequential(nn.Linear(4, 4))
    return adapted(net, graft.LoraConfig(target_modules=["0"], r=4), scale=0).train()


def audited(model, optimizer):
    return graft.audit(model, optimizer, loss=lambda: model(torch.ones(1, 4)).sum()).far_rates


@pytest.mark.parametrize(("rate", "said"), [(1e-6, True), (6e-6, False), (1e-2, False), (0.09, False), (0.2, True)])
def test_rates_far_from_what_is_good(found, model, rate, said):
    found(row())  # good up to 1e-2; the source begins with 6e-5
    lines = audited(model, torch.optim.AdamW(model.parameters(), lr=rate))
    assert bool(lines) == said
    if said:
        assert lines == [f"{rate:g} for 'default' (LoRA: 6e-05 to 0.01)"]


def test_a_rate_counts_as_it_is_before_the_schedule(found, model):
    found(row())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0 and len(audited(model, optimizer)) == 1


def test_other_optimizers_and_heads_have_other_rates(found, model):
    found(row())
    assert not audited(model, torch.optim.SGD(model.parameters(), lr=1.0))
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    rest = [p for n, p in model.named_parameters() if "lora_" in n]
    assert not audited(model, torch.optim.Adam([{"params": head, "lr": 1.0}, {"params": rest, "lr": 1e-3}]))
