# SPDX-License-Identifier: Apache-2.0
"""Errors in the middle of a step, of a loss, a loader, an optimizer, a look; runs that come and go; threads: who goes
on has the bits of runs that nobody disturbed."""

from __future__ import annotations

import gc
import re
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import graft
from graft.many import MultiTrain
from tests import models
from tests.covering import law, pairs, product
from tests.many.alone import SPECS, batches, lora, one_run, rows, same, started, tiny

NAMES = ("plain", "gathers", "timed", "long", "drops")  # of which "long" has passes of its own, and some draw
STEPS = 6


class Broken(Exception):
    pass


ERRORS = (Broken, KeyboardInterrupt)


class Once:
    """Raises at the call of a number, and then never again."""

    def __init__(self, at, error=Broken):
        self.left, self.error = at, error

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise self.error


def added(runs, name, **more):
    options = SPECS[name].options(STEPS) | more
    return runs.add(name, options.pop("config", SPECS[name].config), **options)


def company(base=None, **more):
    """Runs of `NAMES`; `more`: options of one, by its name."""
    runs = MultiTrain(base or tiny())
    for name in NAMES:
        added(runs, name, **more.get(name, {}))
    return runs


@pytest.fixture(scope="module")
def undisturbed():
    return company().run()


def go_on(runs, error=Broken):
    """Run to the end; return how often an error has stopped it."""
    stopped = 0
    while any(run.joins_next_round for run in runs.list_runs()):
        try:
            runs.run()
        except error:
            stopped += 1
    return stopped


def assert_as(undisturbed, runs, *names):
    for name in names:
        assert runs[name].curve == undisturbed[name].curve, name
        assert same(runs[name].parameters, undisturbed[name].parameters), name


def own(base, check):
    """The model's own loss, which may raise."""

    def loss(output, batch):
        check()
        logits = output["logits"]
        return base.loss_function(logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1])

    return loss


@law("at, who, error", product((1, 5), ("plain", "gathers", "long"), ERRORS), pairs)
def test_a_loss_that_raises(undisturbed, who, at, error):
    """In the first pass of a round or the last, within a step or at its end."""
    base = tiny()
    runs = company(base, **{who: {"loss": own(base, Once(at, error))}})
    assert go_on(runs, error) == 1
    assert_as(undisturbed, runs, *NAMES)


def test_who_raises_always_is_removed_and_the_others_go_on(undisturbed):
    runs = company()
    added(runs, "wide", loss=own(runs.base, Once(1)), seed=3)
    with pytest.raises(Broken):
        runs.step()
    runs.remove("wide")
    runs.run()
    assert_as(undisturbed, runs, *NAMES)


def test_saved_after_an_error(undisturbed, tmp_path):
    """The file has the state before the round that an error has stopped."""
    base = tiny()
    runs = company(base, long={"loss": own(base, Once(3))})
    with pytest.raises(Broken):
        runs.run()
    runs.save(tmp_path)
    for names in (NAMES[:2], NAMES[2:]):
        again = MultiTrain.resume(tiny(), tmp_path)
        for name in names:
            added(again, name, **({"loss": own(again.base, lambda: None)} if name == "long" else {}))
        assert_as(undisturbed, again.run(), *names)


class Samples(torch.utils.data.Dataset):
    def __init__(self, check):
        self.rows, self.check = rows(1), check

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.check()
        return self.rows[i]


@pytest.mark.parametrize("at", [2, 11])
def test_a_loader_that_raises(undisturbed, at):
    runs = company(plain={"data": DataLoader(Samples(Once(at)), 4, shuffle=True)})
    assert go_on(runs) == 1
    assert_as(undisturbed, runs, *NAMES)


class Stumbles(torch.optim.AdamW):
    def __init__(self, parameters, check, **options):
        super().__init__(parameters, **options)
        self.check = check

    def step(self, closure=None):
        self.check()
        return super().step(closure)


def test_an_optimizer_that_raises_ends_its_run(undisturbed):
    """Nobody knows which of its tensors it has stepped."""
    runs = company(gathers={"optimizer": partial(Stumbles, check=Once(3), lr=1e-2)})
    with pytest.raises(Broken):
        runs.run()
    runs.run()
    assert runs["gathers"].state == "failed" and runs["gathers"].step == 2
    assert "Run 'gathers' failed at step 3: an error stopped its optimizer" in runs["gathers"].why
    assert_as(undisturbed, runs, *(name for name in NAMES if name != "gathers"))


class Valid(list):
    """Batches to look at, whose iteration may raise."""

    def __init__(self, check):
        super().__init__(batches(2))
        self.check = check

    def __iter__(self):
        self.check()
        return super().__iter__()


@pytest.mark.parametrize("at", [1, 3])
def test_a_look_that_raises_is_made_later(undisturbed, at):
    found = []
    for valid in (batches(2), Valid(Once(at))):
        asked = list[int]()
        look = {"valid": valid, "every": 2, "stop": lambda run, asked=asked: asked.append(run.step)}
        runs = company(plain=look)
        go_on(runs)
        runs.run()
        assert_as(undisturbed, runs, *NAMES)
        found.append((runs["plain"].valid, asked))
    assert found[0] == found[1] and [look.step for look in found[0][0]] == [2, 4, 6]


def test_a_stop_that_raises(undisturbed):
    check = Once(2)
    runs = company(plain={"stop": lambda run: check()})
    assert go_on(runs) == 1
    assert_as(undisturbed, runs, *NAMES)


def test_warnings_that_are_errors():
    """What evicts a run does not disturb the others, also where its warning is an exception."""
    runs = MultiTrain(tiny())
    added(runs, "plain")
    options = SPECS["plain"].options(STEPS) | {"optimizer": partial(torch.optim.SGD, lr=float("inf"))}
    runs.add("wild", lora(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", graft.PeftWarning)
        assert go_on(runs, graft.PeftWarning) == 1
    assert_as(started(["plain"], STEPS).run(), runs, "plain")


@pytest.mark.parametrize("call", [
    lambda runs, folder: runs.save(folder), lambda runs, _: runs.remove("x"), lambda runs, _: runs.unload(),
    lambda runs, _: runs.add("y", lora(), data=batches(1)), lambda runs, folder: runs["x"].save_pretrained(folder),
])  # fmt: skip
def test_within_a_step_nothing_is_saved_or_changed(call, tmp_path):
    runs = MultiTrain(tiny())

    def loss(output, batch):
        with pytest.raises(RuntimeError, match="A step is under way"):
            call(runs, tmp_path)
        return output.logits.square().mean()

    runs.add("x", lora(), data=batches(1), loss=loss)
    runs.run()
    assert runs["x"].step == 1


def test_an_adapter_is_saved_as_it_is_between_steps(tmp_path):
    """Another thread gets no half of a step; `stop`, a loop's body and who comes later get the adapter."""

    def value(run):
        return run.parameters[0].mean().item()

    def save(name):
        runs["x"].save_pretrained(tmp_path / name)
        wanted.append((name, value(runs["x"])))

    class Halfway(torch.optim.SGD):
        def step(self, closure=None):
            with ThreadPoolExecutor(1) as other, pytest.raises(RuntimeError, match="Another thread has the runs x"):
                other.submit(save, "thread").result()
            return super().step(closure)

    runs, wanted = MultiTrain(tiny()), []
    runs.add("x", lora(), data=batches(2), optimizer=partial(Halfway, lr=1.0), stop=lambda run: save(f"stop{run.step}"))
    for step in runs:
        save(f"body{step.number}")
    save("end")
    with ThreadPoolExecutor(1) as other:
        other.submit(save, "later").result()
    assert [name for name, _ in wanted] == ["stop1", "body1", "stop2", "body2", "body3", "end", "later"]
    for name, mean in wanted:
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert mean in [t.mean().item() for t in tensors.values()], name
    assert not (tmp_path / "thread").exists()


def test_a_run_that_was_removed_is_not_saved(tmp_path):
    """Nor the one that has its name now."""
    runs = one_run(data=batches(1))
    removed = runs.remove("x")
    with pytest.raises(graft.AdapterNotFoundError, match="no run 'x'"):
        removed.save_pretrained(tmp_path / "x")
    runs.add("x", lora(r=2), data=batches(1))
    with pytest.raises(graft.AdapterNotFoundError, match="This run 'x' has been removed"):
        removed.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


# who comes and goes


def test_a_name_that_is_used_again_begins_anew():
    """At once, without a step between."""
    spec = SPECS["drops"]
    runs = one_run(lora(r=4), **SPECS["plain"].options(STEPS))
    runs.add("y", lora(r=4), **SPECS["timed"].options(9))
    for step in runs:
        if step.number == 3:
            break
    runs.remove("x")
    runs.add("x", spec.config, **spec.options(STEPS))
    runs.run()
    alone = one_run(spec.config, **spec.options(STEPS))
    assert_as(alone.run(), runs, "x")
    runs.remove("y")
    for out in (lambda: runs.remove("x"), runs.unload):
        out()
        runs.add("x", spec.config, **spec.options(STEPS))
        assert_as(alone, runs.run(), "x")


def test_runs_come_and_go_while_others_gather(undisturbed):
    runs = MultiTrain(tiny())
    added(runs, "gathers")
    for step in runs:
        match step.number:
            case 1:
                added(runs, "plain")
            case 4:
                runs.add("same", lora(r=4), data=batches(30), accumulate=3, steps=9)
            case 5:
                added(runs, "drops")
            case 8:
                runs.remove("same")
            case 10:
                runs.remove("plain")
    assert_as(undisturbed, runs, "gathers", "drops")


@pytest.mark.parametrize("again", [False, True])
def test_a_stop_that_removes_another_run(undisturbed, again):
    """Nobody looks for that one, nor asks its stop, nor takes one of its name for it."""

    def replace(run):
        if run.step == 2:
            runs.remove("other")
            if again:
                runs.add("other", lora(), data=batches(2))

    runs, asked, valid = MultiTrain(tiny()), [], batches(1)
    added(runs, "plain", stop=replace)
    other = runs.add(
        "other", lora(), data=batches(9), valid=valid, stop=lambda run: asked.append(run.step) or run.step > 1
    )
    added(runs, "long", valid=valid, every=2)
    runs.run()
    assert asked == [1] and other.state == "running" and not other.valid
    assert [look.step for look in runs["long"].valid] == [2, 4, 6] and ("other" in runs) == again
    assert_as(undisturbed, runs, "plain", "long")


@pytest.mark.parametrize("end", ["remove", "unload"])
def test_a_stop_that_removes_its_own_run(end):
    runs = MultiTrain(tiny())
    out = {"remove": lambda run: runs.remove("x"), "unload": lambda run: runs.unload()}[end]
    run = runs.add("x", lora(), data=batches(9), valid=batches(1), stop=out)
    runs.run()
    assert run.step == 1 and not runs.names and not any("lora" in name for name, _ in runs.base.named_modules())


def test_who_goes_gives_memory_back():
    """Also where nobody trains any more, and somebody keeps the MultiTrain for its curves, or a run for its own."""
    runs = MultiTrain(tiny())
    for name in ("x", "y", "z"):
        runs.add(name, lora(), data=batches(9), accumulate=2, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    runs.step()
    gone, stays = runs.remove("x"), runs["y"]
    assert all(p.untyped_storage().nbytes() == p.nbytes for run in (gone, stays) for p in run.parameters)
    runs.step()
    assert stays.step == 1
    left = weakref.ref(stays.parameters[0])
    runs.unload()
    del stays
    gc.collect()
    assert left() is None


def test_one_iterator_for_two_runs():
    """Each would get every other batch."""
    runs, data = MultiTrain(tiny()), iter(batches(6))
    runs.add("x", lora(), data=data)
    with pytest.raises(graft.ConfigError, match=r"Run 'y': its iterator, .* is that of run 'x'"):
        runs.add("y", lora(), data=data)
    kept = DataLoader(rows(0), 4, num_workers=1, persistent_workers=True)
    runs.add("z", lora(), data=kept)
    with pytest.raises(graft.ConfigError, match="persistent_workers"):
        runs.add("y", lora(), data=kept)
    assert runs.names == ["x", "z"]


def test_optimizers_and_schedules_of_others():
    runs = MultiTrain(tiny())
    first, weight = runs.add("x", lora(), data=batches(2)), runs.base.lm_head.weight
    for optimizer in (lambda p: first.optimizer, lambda p: torch.optim.SGD([*p, weight], lr=0.1)):
        with pytest.raises(graft.ConfigError, match="holds parameters that are not the run's"):
            runs.add("y", lora(), data=batches(2), optimizer=optimizer)
    shared = torch.optim.lr_scheduler.ConstantLR(first.optimizer)
    with pytest.raises(graft.ConfigError, match="its ConstantLR is of another optimizer"):
        runs.add("y", lora(), data=batches(2), schedule=lambda optimizer: shared)
    assert runs.names == ["x"] == list(runs.model.peft_config)


# looks


def test_the_last_look_is_at_the_end():
    """However a run ends."""
    runs, valid = MultiTrain(tiny()), batches(1)
    runs.add("data", lora(), data=batches(3), valid=valid)
    runs.add("stop", lora(), data=batches(3), valid=valid, every=2, stop=lambda run: run.step == 3, steps=9)
    runs.add("both", lora(), data=batches(4), valid=valid, every=2)
    runs.run()
    assert {run.name: [look.step for look in run.valid] for run in runs.list_runs()} == {
        "data": [3], "stop": [2, 3], "both": [2, 4],
    }  # fmt: skip


def test_what_validation_draws_depends_on_nobody():
    """A shuffled loader that leaves out some rows looks at the same each time, in any company."""
    data = DataLoader(rows(5), 4, shuffle=True, drop_last=True)
    found = []
    for company in (0, 2):
        runs = MultiTrain(tiny())
        for i in range(company):
            runs.add(f"x{i}", lora(), **SPECS["plain"].options(4), valid=[*batches(1)], every=1)
        torch.manual_seed(company)
        runs.add("y", lora(), **SPECS["plain"].options(4) | {"optimizer": partial(torch.optim.SGD, lr=0.0)}, valid=data,
                 every=1)  # fmt: skip
        runs.run()
        found.append([look.loss for look in runs["y"].valid])
    assert len({*found[0]}) == 1 and found[0] == found[1] and len(found[0]) == 4


def test_batches_of_a_step_that_are_left_over():
    runs = one_run(data=batches(5), accumulate=2)
    with pytest.warns(graft.PeftWarning, match="ended at step 2; 1 of the 2 batches of a step were left over"):
        runs.run()
    assert runs["x"].step == 2


def test_batches_without_rows():
    empty = {k: v[:0] for k, v in batches(1)[0].items()}
    runs = started(["plain"], 2)
    runs.add("x", lora(), data=[*batches(1), empty], valid=[empty, *batches(1)], every=1)
    runs.step()
    assert runs["x"].valid[0].loss > 0
    with pytest.warns(graft.PeftWarning, match="Run 'x' failed at step 2: .*Run 'x': a batch has no rows"):
        runs.step()
    assert len(runs.run()["plain"].curve) == 2
    with pytest.raises(graft.ConfigError, match="has no rows"):
        runs.evaluate(["plain"], [empty])


def bad(kind):
    """Batches, the third of which no model of ours takes."""
    data = batches(6)
    third = {k: v.clone() for k, v in data[2].items()}
    if kind == "token":
        third["input_ids"][1, 2] = models.VOCAB
    elif kind == "label":
        third["labels"][1, 2] = models.VOCAB
    elif kind == "mask":
        third["attention_mask"] = torch.ones(3, 7)
    else:
        del third["labels"]
    return [*data[:2], third, *data[3:]]


@pytest.mark.parametrize("kind", ["token", "label", "mask", "no labels"])
@pytest.mark.parametrize("at_once", [4096, 40], ids=["one pass", "several"])
def test_a_bad_batch_ends_its_run_alone(undisturbed, kind, at_once, tmp_path):
    runs = MultiTrain(tiny(), at_once=at_once)
    for name in NAMES[:2]:
        added(runs, name)
    x = runs.add("x", lora(lora_dropout=0.1), data=bad(kind), seed=9)
    for name in NAMES[2:]:
        added(runs, name)
    with pytest.warns(graft.PeftWarning, match="Run 'x' failed at step 3: the model cannot take its batch .*Remove it"):
        runs.run()
    assert_as(undisturbed, runs, *NAMES)
    assert (x.state, x.step, [point.step for point in x.curve]) == ("failed", 2, [1, 2]) and type(
        x.error
    ).__name__ in x.why
    with pytest.raises(type(x.error)):
        raise x.error
    assert sys.version_info < (3, 11) or "Run 'x': the model cannot take its batch." in x.error.__notes__
    alone = one_run(lora(lora_dropout=0.1), data=batches(6), seed=9, steps=2)
    assert same(x.parameters, alone.run()["x"].parameters)
    runs.save(tmp_path)
    again = MultiTrain.resume(tiny(), tmp_path).add("x", lora(lora_dropout=0.1), data=bad(kind), seed=9)
    assert (again.state, again.why, again.error) == ("failed", x.why, None)


def test_a_round_of_bad_batches_raises_and_leaves_all_where_they_were():
    """Nobody waits for these runs; and a mistake in all data is an error at once."""
    runs = MultiTrain(tiny())
    one, two = (runs.add(name, lora(), data=bad("token"), seed=i) for i, name in enumerate(("x", "y")))
    runs.step()
    runs.step()
    for _ in range(2):
        with pytest.raises(IndexError, match="out of range") as caught:
            runs.step()
        assert sys.version_info < (3, 11) or caught.value.__notes__ == ["Run 'x': the model cannot take its batch."]
        assert [(run.state, run.step, run.loader.taken) for run in (one, two)] == [("running", 2, 2)] * 2
    runs.remove("y")
    one.loader.data[2] = batches(6)[2]
    one.loader.set_position(0, 2, one.loader.began, one.draws.states)  # else it has the batch that it took
    assert runs.run()["x"].step == 6


def test_what_no_batch_raises_alone_is_told(monkeypatch):
    runs = MultiTrain(tiny())
    for name in ("plain", "gathers", "timed"):
        added(runs, name)
    forward = type(runs.base).forward

    def few(self, input_ids, **inputs):
        if len(input_ids) > 4:
            raise ValueError("too many rows")
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(type(runs.base), "forward", few)
    runs._arguments = runs._arguments.read_signature(tiny())
    with pytest.warns(graft.PeftWarning, match=r"A pass of \['plain', .*too many rows.*, but no single one did"):
        runs.step()
    assert [run.state for run in runs.list_runs()] == ["running"] * 3


def raises(*_):
    raise Broken


class Rows(list):
    def __iter__(self):
        raise Broken


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
@pytest.mark.parametrize("options, note", [
    ({"loss": raises}, "Run 'x': its loss raised this."),
    ({"data": Rows()}, "Run 'x': reading the data raised this."),
    ({"stop": raises}, "Run 'x': its stop raised this."),
    ({"valid": Rows([0]), "every": 1}, r"The validation data of runs \['x'\]: reading the data raised this."),
    ({"valid": bad("token")[2:], "every": 1}, r"A look at validation data of \['x'\] raised this."),
    ({"optimizer": type("Odd", (torch.optim.SGD,), {"step": raises})}, "Run 'x' failed at step 1: an error"),
])  # fmt: skip
def test_errors_name_the_run(options, note):
    runs = MultiTrain(tiny())
    runs.add("y", lora(), data=batches(2))
    runs.add("x", lora(), **{"data": batches(2)} | options)
    with pytest.raises((Broken, IndexError)) as caught:
        runs.run()
    assert re.match(note, caught.value.__notes__[0])


# threads


def test_two_trainings_in_two_threads():
    """One loader draws, while that of the other thread would."""
    from threading import Event, Thread

    drawn, there = Event(), Event()

    class Slow:
        def __init__(self, wait, tell):
            self.wait, self.tell = wait, tell

        def __iter__(self):
            for _ in range(3):
                first = torch.randint(3, models.VOCAB, (4, 3))
                self.tell.set()
                self.wait.wait(0.2)
                ids = torch.cat([first, torch.randint(3, models.VOCAB, (4, 4))], 1)
                yield {"input_ids": ids, "labels": ids}

    def train(seed, base, wait, tell):
        runs = MultiTrain(base)
        runs.add("x", lora(lora_dropout=0.2), data=Slow(wait, tell), seed=seed)
        found[seed] = runs.run()["x"].curve

    found = {}
    for seed in (1, 2):
        train(seed, tiny(), Event(), Event())
    alone, found = found, {}
    each = [(1, tiny(), drawn, there), (2, tiny(), there, drawn)]
    threads = [Thread(target=train, args=own) for own in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
