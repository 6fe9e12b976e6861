# SPDX-License-Identifier: Apache-2.0
"""Runs trained by calls: `backward` and `step` against plain loops, from threads, with bad input, from files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from time import monotonic, sleep
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import graft
from graft.core.errors import AdapterNotFoundError, CheckpointError, ConfigError
from graft.many import MultiTrain
from graft.many.joint import OutputSplitter
from graft.serving import AdapterSlots
from tests import models
from tests.many.alone import SPECS, alone, as_alone, batches, lora, one_run, same, tiny


class Output(NamedTuple):
    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]


def test_a_named_tuple_is_split_into_named_tuples():
    x = torch.arange(24.0).view(3, 4, 2)
    first, second = OutputSplitter([2, 1], [4, 3]).split(Output(x, (x,)))
    assert type(first) is type(second) is Output and torch.equal(first.logits, x[:2])
    assert torch.equal(second.logits, x[2:, :3]) and torch.equal(second.states[0], x[2:, :3])


# losses


def log_probs(output, batch):
    """The log-probability of each next token, (rows, tokens - 1)."""
    logits, ids = output["logits"][:, :-1], batch["input_ids"][:, 1:]
    return -cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def weighted(output, batch):
    """Supervised, with a weight for each token, as a sum."""
    values = log_probs(output, batch)
    return -(values * batch["weights"]).sum(), {"log_probs": values}


def policy_gradient(output, batch):
    values = log_probs(output, batch)
    ratio = (values - batch["old"]).exp()
    return -(ratio * batch["advantages"]).sum(), {"ratio": ratio, "log_probs": values}


def ppo(output, batch):
    values = log_probs(output, batch)
    ratio = (values - batch["old"]).exp()
    least = torch.minimum(ratio * batch["advantages"], ratio.clamp(0.8, 1.2) * batch["advantages"])
    return -least.mean(), {"clipped": (ratio - 1).abs() > 0.2}


def noisy(output, batch):
    """A loss that draws random numbers."""
    return (log_probs(output, batch) * torch.rand(len(batch["input_ids"]), 1)).mean().neg()


class Plan(NamedTuple):
    """A run, its loss, and how many batches a step has, as a sum or a mean."""

    config: Any
    loss: Callable[..., Any] | None
    calls: int = 1
    mean: bool = False
    lr: float = 1e-2
    clip: float | None = None
    seed: int = 0
    schedule: Any = None

    @property
    def mean_of(self):
        return self.calls if self.mean else 1

    def batches(self, steps):
        found = batches(steps * self.calls, self.seed)
        if self.loss is None:
            return found
        with models.seeded(self.seed):
            return [
                {
                    "input_ids": b["input_ids"], "weights": torch.rand(4, 6), "advantages": torch.randn(4, 6),
                    "old": -4 + torch.rand(4, 6),
                }
                for b in found
            ]  # fmt: skip

    def add(self, runs, name):
        optimizer = partial(AdamW, lr=self.lr)
        return runs.add(name, self.config, optimizer=optimizer, clip=self.clip, seed=self.seed, schedule=self.schedule)


PLANS = {
    "model": Plan(lora(r=4), None, seed=1),
    "supervised": Plan(lora(r=4, lora_dropout=0.2), weighted, calls=3, clip=1.0, seed=2),
    "policy": Plan(lora(r=8, target_modules=["q_proj", "down_proj"]), policy_gradient, calls=2, mean=True, seed=3),
    "ppo": Plan(lora(r=2), ppo, lr=3e-3, seed=4, schedule=partial(CosineAnnealingLR, T_max=4)),
    "noisy": Plan(lora(r=4, lora_dropout=0.1), noisy, calls=2, clip=0.5, seed=5),
}
STEPS = 4


def plain_loop(plan, steps=STEPS, rates=()):
    """Train by plain torch; return parameters, what the losses returned with them, norms."""
    model, its_batches, outputs, norms = tiny(), iter(plan.batches(steps)), [], []
    with models.seeded(plan.seed):
        model = graft.get_peft_model(model, copy.deepcopy(plan.config)).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = AdamW(parameters, lr=plan.lr)
        schedule = plan.schedule(optimizer) if plan.schedule else None
        for i in range(steps):
            for _ in range(plan.calls):
                batch = next(its_batches)
                if plan.loss is None:
                    loss, more = model(**batch).loss, {}
                else:
                    loss = plan.loss(model(batch["input_ids"]), batch)
                    loss, more = loss if isinstance(loss, tuple) else (loss, {})
                outputs.append((loss.detach(), {k: v.detach() for k, v in more.items()}))
                (loss / plan.mean_of).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, plan.clip or 1e9).item())
            if rates:
                optimizer.param_groups[0]["lr"] = rates[i]
            optimizer.step()
            if schedule:
                schedule.step()
            optimizer.zero_grad()
    return parameters, outputs, norms


def train_by_calls(runs, plan, name, its_batches=None):
    """Train one run of `runs`; return what the calls returned, and the norms."""
    its_batches, found, norms = iter(its_batches or plan.batches(STEPS)), [], []
    for _ in range(STEPS):
        for _ in range(plan.calls):
            found.append(runs.backward({name: next(its_batches)}, plan.loss, plan.mean_of)[name])
        norms.append(runs.gradient_norm(name))
        assert runs.step(name).norm == norms[-1]
    return found, norms


def assert_as_plain(run, plan, found, norms):
    parameters, outputs, wanted = plain_loop(plan)
    assert as_alone(run.parameters, parameters), run.name
    assert as_alone([r.loss for r in found], [loss for loss, _ in outputs])
    for result, (_, more) in zip(found, outputs):
        assert result.outputs.keys() == more.keys()
        for key, value in more.items():
            assert not result.outputs[key].requires_grad and as_alone([result.outputs[key]], [value])
    assert norms == pytest.approx(wanted, rel=1e-6)
    assert run.step == STEPS == len(run.curve) and run.state == "running"


@pytest.mark.parametrize("name", PLANS)
def test_one_run_is_as_a_plain_loop(name):
    runs, plan = MultiTrain(tiny()), PLANS[name]
    run = plan.add(runs, name)
    assert_as_plain(run, plan, *train_by_calls(runs, plan, name))


def test_several_runs_in_one_call_are_as_plain_loops():
    """Batches of one loss share a call; some runs make their step while others add up."""
    runs, found, norms = MultiTrain(tiny()), {}, {}
    plans = {name: plan._replace(loss=ppo) for name, plan in PLANS.items()}
    its_batches = {name: iter(plan.batches(STEPS)) for name, plan in plans.items()}
    for name, plan in plans.items():
        plan.add(runs, name)
        found[name], norms[name] = [], []
    for turn in range(STEPS * 3):
        for mean_of in (1, 2):
            call = {
                name: next(its_batches[name])
                for name, plan in plans.items()
                if plan.mean_of == mean_of and turn < STEPS * plan.calls
            }
            results = runs.backward(call, ppo, mean_of) if call else {}
            assert list(results) == list(call)
            for name, result in results.items():
                found[name].append(result)
                assert result.tokens == 4 * 7
        for name, plan in plans.items():
            if turn < STEPS * plan.calls and turn % plan.calls == plan.calls - 1:
                norms[name].append(runs.step(name).norm)
    for name, plan in plans.items():
        assert_as_plain(runs[name], plan, found[name], norms[name])


def test_calls_beside_the_loop():
    """Gradients wait while the loop makes rounds, and while runs come and go."""
    runs, plan = MultiTrain(tiny()), PLANS["supervised"]
    looped = SPECS["plain"]
    runs.add("looped", looped.config, **looped.options(12))
    run = plan.add(runs, "called")
    its_batches, found, norms = iter(plan.batches(STEPS)), [], []
    for i in range(STEPS):
        for j in range(plan.calls):
            found.append(runs.backward({"called": next(its_batches)}, plan.loss)["called"])
            if i == 1 and j == 0:
                runs.add("later", lora(r=4), data=batches(2))
            runs.step()
        norms.append(runs.gradient_norm("called"))
        runs.step("called")
        if i == 2:
            runs.remove("later")
    assert_as_plain(run, plan, found, norms)
    assert as_alone(runs["looped"].parameters, alone(looped, 12)[0]) and runs["looped"].state == "ended"


def test_settings_of_a_step():
    """They hold until others are given."""
    runs, plan, rates = MultiTrain(tiny()), PLANS["model"], [1e-2, 1e-3, 1e-3, 5e-2]
    run = plan.add(runs, "x")
    for batch, settings in zip(plan.batches(STEPS), ({}, {"lr": 1e-3}, {}, {"lr": 5e-2, "betas": (0.9, 0.999)})):
        runs.backward({"x": batch})
        assert runs.step("x", **settings).lr == run.optimizer.param_groups[0]["lr"]
    assert [point.lr for point in run.curve] == rates
    assert as_alone(run.parameters, plain_loop(plan, rates=rates)[0])


class TwoOutputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x):
        return {"one": self.one(x), "two": self.two(x)}


class Mine(SGD):
    """An optimizer that may see the shapes of its tensors, so that it gets them."""


@pytest.mark.parametrize("optimizer", [Mine, AdamW])
def test_parameters_without_a_gradient(optimizer):
    """One batch leads to one output, the next to the other, and the last step has gradients for half of the tensors."""

    def loss(output, batch):
        return output[batch["key"]].square().mean()

    optimizer = partial(optimizer, lr=0.1)
    with models.seeded(0):
        base, data = TwoOutputs(), [(key, torch.randn(8, 32)) for key in ("one", "two", "two", "one", "two")]
    config, found = lora(r=4, target_modules=["one", "two"]), []
    with models.seeded(0):
        model = graft.get_peft_model(copy.deepcopy(base), config).train()
        its_optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        for i, (key, x) in enumerate(data):
            loss(model(x), {"key": key}).backward()
            if i % 2 == 1 or i == 4:
                its_optimizer.step()
                its_optimizer.zero_grad()
        found.append([p.detach() for p in model.parameters() if p.requires_grad])
    runs = MultiTrain(base)
    runs.add("other", config, optimizer=optimizer, seed=1)
    run = runs.add("x", config, optimizer=optimizer)
    for i, (key, x) in enumerate(data):
        batch = {"key": key, "x": x}
        runs.backward({"other": batch, "x": batch}, loss)
        if i % 2 == 1 or i == 4:
            runs.step("x")
        runs.step("other")
    assert same(run.parameters, found[0])


# threads


def wait_until(condition):
    end = monotonic() + 30
    while not condition():
        assert monotonic() < end
        sleep(0.001)


def count_passes(runs):
    passes = []
    runs.model.register_forward_pre_hook(lambda *_, **__: passes.append(1))
    return passes


def test_threads_get_the_results_of_plain_loops():
    runs, barrier = MultiTrain(tiny()), Barrier(len(PLANS))
    its_batches = {name: plan.batches(STEPS) for name, plan in PLANS.items()}  # to make them draws random numbers
    for name, plan in PLANS.items():
        plan.add(runs, name)

    def train(name):
        barrier.wait()
        return train_by_calls(runs, PLANS[name], name, its_batches[name])

    with ThreadPoolExecutor(len(PLANS)) as pool:
        found = dict(zip(PLANS, pool.map(train, PLANS)))
    for name, plan in PLANS.items():
        assert_as_plain(runs[name], plan, *found[name])


def test_calls_that_wait_share_a_pass():
    """One call waits for each run, and a second one for the first run: that takes a pass of its own, afterwards."""
    runs = MultiTrain(tiny())
    for name in ("a1", "b1", "c1"):
        runs.add(name, lora(r=4), optimizer=partial(SGD, lr=0.1))
    passes = count_passes(runs)
    with ThreadPoolExecutor(4) as pool:
        with runs.lock_steps():
            calls = []
            for i, name in enumerate(("a1", "b1", "a1", "c1")):
                calls.append(pool.submit(runs.backward, {name: batches(4)[i]}))
                wait_until(lambda i=i: len(runs._waiting) == i + 1)
        results = [call.result() for call in calls]
    assert [list(result) for result in results] == [["a1"], ["b1"], ["a1"], ["c1"]] and len(passes) == 2
    assert torch.equal(results[2]["a1"].loss, runs.backward({"b1": batches(4)[2]})["b1"].loss)
    alone = MultiTrain(tiny())
    alone.add("a1", lora(r=4), optimizer=partial(SGD, lr=0.1))
    for i in (0, 2):
        alone.backward({"a1": batches(4)[i]})
    assert runs.gradient_norm("a1") == alone.gradient_norm("a1")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_is_of_its_call_alone(error):
    """An interrupt is of the thread that makes the pass; the other call gets its results in the next pass."""
    runs, raised, good = MultiTrain(tiny()), [], batches(1)[0]
    for name in ("a1", "b1", "c1"):
        runs.add(name, lora(r=4, lora_dropout=0.5), optimizer=partial(SGD, lr=0.1))

    def fails(output, batch):
        torch.rand(3)
        raised.append(1)
        if len(raised) < 2:
            raise error("of a loss")
        return output["logits"].mean()

    runs.backward({"c1": good})
    before, states = runs.gradient_norm("c1"), runs["c1"].draws.states
    with ThreadPoolExecutor(2) as pool:
        with runs.lock_steps():
            calls = [pool.submit(runs.backward, {"a1": good, "c1": good}, fails)]
            wait_until(lambda: len(runs._waiting) == 1)
            calls.append(pool.submit(runs.backward, {"b1": good}))
            wait_until(lambda: len(runs._waiting) == 2)
        errors = [call.exception() for call in calls]
    assert not runs._waiting
    if error is ValueError:
        assert isinstance(errors[0], ValueError) and errors[1] is None
        assert runs.gradient_norm("c1") == before and same(runs["c1"].draws.states, states)
    else:
        assert {type(e) for e in errors} == {KeyboardInterrupt, type(None)}
    for call, e, names in zip(calls, errors, (["a1"], ["b1"])):
        if e is None:
            assert runs.step(names[0]).step == 1 and names[0] in call.result()
        else:
            with pytest.raises(RuntimeError, match=f"Run '{names[0]}' has no gradients"):
                runs.step(names[0])
            runs.backward(dict.fromkeys(names, good))  # it has drawn nothing yet
    alone = MultiTrain(tiny())
    alone.add("b1", lora(r=4, lora_dropout=0.5), optimizer=partial(SGD, lr=0.1))
    wanted = alone.backward({"b1": good})["b1"].loss
    assert error is not ValueError or torch.equal(calls[1].result()["b1"].loss, wanted)


def test_calls_within_a_loss_are_refused():
    runs = MultiTrain(tiny())
    runs.add("a1", lora(r=4))

    def loss(output, batch):
        for call in (
            lambda: runs.backward({"a1": batches(1)[0]}),
            lambda: runs.step("a1"),
            lambda: runs.snapshot("a1"),
            lambda: runs.add("b1", lora()),
        ):
            with pytest.raises(RuntimeError, match="A step is under way"):
                call()
        return output["logits"].mean()

    runs.backward({"a1": batches(1)[0]}, loss)
    assert not runs._waiting and runs.step("a1").step == 1


def test_runs_come_and_go_while_others_train():
    runs, plan = MultiTrain(tiny()), PLANS["supervised"]
    plan.add(runs, "x")
    batch = batches(1)[0]  # it seeds torch's generator, which no thread may do while another is in a pass
    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(train_by_calls, runs, plan, "x", plan.batches(STEPS))
        while not training.done():
            pool.submit(runs.add, "other", lora(r=4)).result()
            pool.submit(runs.backward, {"other": batch}).result()
            runs.remove("other")
    assert_as_plain(runs["x"], plan, *training.result())


# bad input


def test_what_a_run_without_data_cannot_have():
    runs = MultiTrain(tiny())
    with pytest.raises(ConfigError, match=r"Run 'x' has no data, so steps, accumulate cannot be used\. Pass data"):
        runs.add("x", lora(), steps=3, accumulate=2)
    assert runs.model is None
    runs.add("x", lora())
    assert [*runs] == []
    with pytest.raises(ConfigError, match="no run has data"):
        runs.run()


def test_bad_calls_change_nothing():
    runs, good = MultiTrain(tiny()), batches(1)[0]
    run = runs.add("x", lora(r=4, lora_dropout=0.5))
    runs.add("timed", lora(r=4), schedule=partial(CosineAnnealingLR, T_max=4))
    runs.add("groups", lora(r=4), optimizer=lambda ps: SGD([{"params": ps[:2], "lr": 0.1}, {"params": ps[2:]}], lr=1.0))
    runs.add("looped", lora(r=4), data=batches(1))
    for name in ("x", "timed", "groups"):
        runs.backward({name: good})
    before = runs.gradient_norm("x"), run.draws.states, [p.detach().clone() for p in run.parameters]
    cases = [
        (lambda: runs.backward({"x": good, "y": good}), AdapterNotFoundError, "no run 'y'. Runs: x, timed"),
        (lambda: runs.backward({"x": good, "looped": good}), ConfigError, "Run 'looped' has data"),
        (lambda: runs.backward({}), ConfigError, "batches must be like"),
        (lambda: runs.backward([good]), ConfigError, "batches must be like"),
        (lambda: runs.backward({"x": good["input_ids"]}), ConfigError, "batches must be like"),
        (lambda: runs.backward({"x": good}, mean_of=0), ConfigError, "mean_of=0"),
        (lambda: runs.backward({"x": good}, loss="ppo"), ConfigError, "loss='ppo'"),
        (lambda: runs.backward({"x": good | {"maks": good["labels"]}}), ConfigError, "Run 'x': .* take no 'maks'"),
        (lambda: runs.backward({"x": {"input_ids": good["input_ids"]}}), ConfigError, "Run 'x': a batch has no labels"),
        (lambda: runs.backward({"x": {"labels": good["labels"]}}), ConfigError, "Run 'x': the model takes"),
        (lambda: runs.backward({"x": {"input_ids": good["input_ids"][:0]}}, ppo), ConfigError, "a batch has no rows"),
        (lambda: runs.backward({"x": {"input_ids": good["input_ids"] + 1000}}, ppo), IndexError, "out of range"),
        (lambda: runs.backward({"x": good}, lambda output, batch: 1.0), ConfigError, "its loss is 1.0"),
        (lambda: runs.backward({"x": good}, lambda output, _: output["logits"]), ConfigError, "has the shape"),
        (lambda: runs.backward({"x": good}, lambda o, _: o["logits"].detach().mean()), ConfigError, "no gradient"),
        (lambda: runs.step("y"), AdapterNotFoundError, "no run 'y'"),
        (lambda: runs.step("looped"), ConfigError, "Run 'looped' has data"),
        (lambda: runs.step("x", momentum=0.1), ConfigError, "its AdamW has no setting 'momentum'.* lr"),
        (lambda: runs.step("x", fused=True), ConfigError, "no setting 'fused'"),
        (lambda: runs.step("x", lr=-1.0), ConfigError, "Run 'x': Invalid learning rate"),
        (lambda: runs.step("timed", lr=1.0), ConfigError, "its schedule sets lr"),
        (lambda: runs.step("groups", lr=1.0), ConfigError, "groups of its parameters have different lr"),
        (lambda: runs.step(lr=1.0), TypeError, "takes 'lr' only with the name of a run"),
        (lambda: runs.gradient_norm("looped"), ConfigError, "Run 'looped' has data"),
        (lambda: runs.snapshot("y"), AdapterNotFoundError, "no run 'y'"),
        (lambda: runs.load_run("x", "nowhere"), CheckpointError, "nowhere holds no run 'x'"),
        (lambda: runs.load_run("looped", "nowhere"), ConfigError, "Run 'looped' has data"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
        assert runs.gradient_norm("x") == before[0] and same(run.draws.states, before[1])
        assert same(run.parameters, before[2]) and run.step == 0
    assert runs.step("x").norm == before[0]
    with pytest.raises(RuntimeError, match=r"Run 'x' has no gradients for a step. Call backward\(\) first"):
        runs.step("x")
    assert run.step == 1 and runs.step().number == 1


def test_a_model_without_a_loss():
    runs, x = MultiTrain(torch.nn.Sequential(torch.nn.Linear(4, 4))), torch.randn(3, 4)
    runs.add("x", lora(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"Run 'x' has no loss, nor has the model"):
        runs.backward({"x": {"input": x}})
    assert runs.backward({"x": {"input": x}}, lambda output, _: output.square().mean())["x"].tokens > 0


def test_numbers_that_are_not_finite_make_no_step():
    runs, good = MultiTrain(tiny()), batches(1)[0]
    run = runs.add("x", lora(r=4))
    before = [p.detach().clone() for p in run.parameters]
    result = runs.backward({"x": good}, lambda output, _: output["logits"].mean() * float("inf"))["x"]
    assert not result.loss.isfinite()
    with pytest.raises(FloatingPointError, match=r"Run 'x': loss -?inf and gradient norm .* at step 1"):
        runs.step("x", lr=1.0)
    assert same(run.parameters, before) and run.step == 0 and run.lr == 1e-3
    with pytest.raises(RuntimeError, match="has no gradients"):
        runs.step("x")
    runs.backward({"x": good})
    assert runs.step("x").step == 1


def test_a_run_that_failed_is_loaded_again(tmp_path):
    class Breaks(AdamW):
        def step(self, closure=None):
            if broken:
                raise ValueError("of an optimizer")
            return super().step(closure)

    runs, good, broken = MultiTrain(tiny()), batches(1)[0], []
    run = runs.add("x", lora(r=4), optimizer=Breaks)
    runs.save_run("x", tmp_path)
    before = [p.detach().clone() for p in run.parameters]
    runs.backward({"x": good})
    broken.append(1)
    with pytest.raises(ValueError, match="of an optimizer"):
        runs.step("x")
    broken.clear()
    for call in (lambda: runs.backward({"x": good}), lambda: runs.step("x"), lambda: runs.gradient_norm("x")):
        with pytest.raises(RuntimeError, match=r"Run 'x' failed at step 1: an error stopped its optimizer.*load_run"):
            call()
    assert runs.load_run("x", tmp_path).state == "running" and same(run.parameters, before)
    runs.backward({"x": good})
    assert runs.step("x").step == 1


# files and snapshots


@pytest.mark.parametrize("name", PLANS)
def test_a_run_goes_on_from_its_file(name, tmp_path):
    """Within a step; in the same object after other steps, in a new one, and by `resume`."""
    plan = PLANS[name]
    parameters = plain_loop(plan)[0]
    its_batches = plan.batches(STEPS)
    runs = MultiTrain(tiny())
    run = plan.add(runs, name)
    runs.add("beside", lora(r=4))
    at = 2 * plan.calls - 1

    def train(runs, start, stop):
        for i, batch in enumerate(its_batches[start:stop], start):
            runs.backward({name: batch}, plan.loss, plan.mean_of)
            if i % plan.calls == plan.calls - 1:
                runs.step(name)

    train(runs, 0, at)
    norm = runs.gradient_norm(name) if plan.calls > 1 else None
    runs.save_run(name, tmp_path)
    train(runs, at, len(its_batches))
    assert as_alone(run.parameters, parameters)
    for kind in ("same", "new", "resume"):
        if kind == "new":
            runs = MultiTrain(tiny())
            plan.add(runs, name)
        if kind == "resume":
            runs = MultiTrain.resume(tiny(), tmp_path)
            plan.add(runs, name)
        else:
            assert runs.load_run(name, tmp_path) is runs[name]
        assert runs[name].step == (1 if at >= plan.calls else 0)
        assert norm is None or runs.gradient_norm(name) == norm
        train(runs, at, len(its_batches))
        assert as_alone(runs[name].parameters, parameters), kind
        assert len(runs[name].curve) == STEPS


def test_a_run_of_the_loop_goes_on_by_calls(tmp_path):
    """As one that was trained by calls all the time."""
    data, found = batches(4), []
    runs = one_run(lora(r=4), data=data[:2])
    runs.run().save(tmp_path)
    for begins in (0, 2):
        runs = MultiTrain(tiny())
        run = runs.add("x", lora(r=4))
        if begins:
            runs.load_run("x", tmp_path)
        for batch in data[begins:]:
            runs.backward({"x": batch})
            runs.step("x")
        found.append([p.detach() for p in run.parameters])
    assert same(*found)


def test_a_file_of_another_run_changes_nothing(tmp_path):
    runs = one_run(lora(r=4), seed=3)
    runs.save_run("x", tmp_path)
    runs = MultiTrain(tiny())
    run = runs.add("x", lora(r=4))
    runs.backward({"x": batches(1)[0]})
    norm, before = runs.gradient_norm("x"), [p.detach().clone() for p in run.parameters]
    with pytest.raises(ConfigError, match="seed = 3, now 0"):
        runs.load_run("x", tmp_path)
    assert runs.gradient_norm("x") == norm and same(run.parameters, before) and runs.step("x").step == 1


class Picky(CosineAnnealingLR):
    """A schedule that takes a part of a state, and refuses one after another number of steps."""

    def load_state_dict(self, state):
        self.last_epoch = state["last_epoch"]
        if state["T_max"] != self.T_max or state["last_epoch"] == 3:
            raise KeyError("last_epoch")
        super().load_state_dict(state)


def test_a_schedule_that_refuses_its_state_changes_nothing(tmp_path):
    runs, batch = MultiTrain(tiny()), batches(1)[0]
    run = runs.add("x", lora(r=4), optimizer=partial(AdamW, lr=1e-2), schedule=partial(Picky, T_max=9))
    for _ in range(3):
        runs.backward({"x": batch})
        runs.step("x")
    runs.save_run("x", tmp_path)
    runs.backward({"x": batch})
    runs.step("x")
    before = copy.deepcopy([run.optimizer_state_dict(), run.schedule.state_dict()])
    values = [p.detach().clone() for p in run.parameters]
    with pytest.raises(CheckpointError, match="a Picky refuses its state"):
        runs.load_run("x", tmp_path)
    after = [run.optimizer_state_dict(), run.schedule.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert same(run.parameters, values) and run.step == 4


def test_a_snapshot_without_any_run(tmp_path):
    for call in MultiTrain(tiny()).snapshot, partial(MultiTrain(tiny()).save_adapter, folder=tmp_path):
        with pytest.raises(AdapterNotFoundError, match=r"no run 'x'\. Runs: none"):
            call("x")


def test_a_snapshot_stays_as_it_was(tmp_path):
    runs, batch = MultiTrain(tiny()), batches(1)[0]
    runs.add("x", lora(r=4, init_lora_weights=False))
    runs.add("y", lora(r=4))
    runs.model.eval()
    with torch.no_grad():
        wanted = runs.model(**batch, adapter_names=["x"] * 4).logits
    snapshot = runs.snapshot("x")
    for _ in range(2):
        runs.backward({"x": batch, "y": batch})
        runs.step("x", lr=0.1)
    snapshot.save_pretrained(tmp_path)
    slots = AdapterSlots(tiny(), max_adapters=2, max_rank=4, targets=["q_proj", "v_proj"])
    for version, its in ("old", snapshot), ("new", runs.snapshot("x")):
        slots.load(version, its.tensors, config=its.config)
    with torch.no_grad():
        model = graft.PeftModel.from_pretrained(tiny(), tmp_path)
        assert torch.equal(model(**batch).logits, wanted)
        torch.testing.assert_close(slots(**batch, adapter_names="old").logits, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(slots(**batch, adapter_names="new").logits, wanted, rtol=1e-3, atol=1e-3)


def test_another_thread_draws_random_numbers():
    """As a sampler does, which is no fault of the base."""
    runs, plan = MultiTrain(tiny()), PLANS["supervised"]
    plan.add(runs, "x")
    its_batches, found, drawn = plan.batches(STEPS), [], []
    plan.add(runs, "first")
    runs.backward({"first": its_batches[0]}, plan.loss)
    runs["first"].drop_partial_step()

    def draw(*_):
        with ThreadPoolExecutor(1) as pool:
            drawn.append(pool.submit(torch.rand, 3).result())

    runs.base.model.layers[1].register_forward_pre_hook(draw)
    found = train_by_calls(runs, plan, "x", its_batches)
    assert_as_plain(runs["x"], plan, *found)
    assert len(drawn) == len(its_batches)


def test_snapshots_while_another_thread_trains():
    """Each has the values of all tensors after one step: with SGD and a loss that gives each entry the gradient 1."""
    runs = MultiTrain(tiny())
    run = runs.add("x", lora(r=4), optimizer=partial(SGD, lr=1.0))
    start = runs.snapshot("x").tensors

    def ones(output, batch):
        return output["logits"].sum() * 0 + sum(p.sum() for p in run.parameters)

    def train():
        for _ in range(20):
            runs.backward({"x": batches(1)[0]}, ones)
            runs.step("x")

    with ThreadPoolExecutor(1) as pool:
        training, steps = pool.submit(train), set()
        while not training.done():
            tensors = runs.snapshot("x").tensors
            moved = {round((start[key] - t).mean().item()) for key, t in tensors.items()}
            assert len(moved) == 1
            steps |= moved
        training.result()
    assert steps <= set(range(21)) and runs["x"].step == 20


def test_parameters_that_move_between_backward_and_step():
    """As `model.to()` moves them: gradients go with them."""
    found = []
    for moves in (False, True):
        runs = MultiTrain(tiny())
        for name in ("x", "y"):
            runs.add(name, lora(r=4), optimizer=partial(AdamW, lr=1e-2))
        for batch in batches(3):
            runs.backward({"x": batch, "y": batch})
            for p in runs["x"].parameters if moves else ():
                p.data = p.data.clone()
            norm = runs.gradient_norm("x")
            assert runs.step("x").norm == norm > 0 and runs.step("y").norm == norm
        assert same(runs["x"].parameters, runs["y"].parameters)
        found.append([p.detach() for p in runs["x"].parameters])
    assert same(*found)
