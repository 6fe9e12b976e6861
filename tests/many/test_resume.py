# SPDX-License-Identifier: Apache-2.0
"""Runs that are saved, killed and resumed, alone or in other company: the bits of a run that nobody disturbed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import graft
from graft.core.errors import BaseModelMismatchError, CheckpointError, ConfigError
from graft.many import MultiTrain, run_file
from graft.many.draws import Draws
from graft.many.loader import Loader, digest_batch
from graft.train import state_file
from tests import fresh, models
from tests.many.alone import SPECS, Spec, batches, lora, one_run, rows, same, started, tiny
from tests.many.killed import STEPS
from tests.train.test_resuming import edited, forge, torch_state

ROOT = Path(__file__).parents[2]


def undisturbed(name):
    return started([name], STEPS).run()[name]


def child(folder, at, *names):
    return fresh.run("-m", "tests.many.killed", folder, at, *names, cwd=ROOT)


@pytest.mark.slow
def test_killed_and_resumed_in_other_company(tmp_path):
    """Killed in the middle of a save; then resumed by another process with others, and finished here alone."""
    folder = tmp_path / "runs"
    assert child(folder, 5, "plain", "gathers", "timed").returncode == -9
    steps = {name: run_file.load_run(name, str(folder))["step"] for name in ("plain", "gathers", "timed")}
    assert steps == {"plain": 5, "gathers": 1, "timed": 4}  # the last file was not renamed
    assert child(folder, 3, "gathers", "wide").returncode == -9
    for name in ("plain", "gathers", "timed", "wide"):
        runs = MultiTrain.resume(tiny(), folder)
        run = runs.add(name, SPECS[name].config, **SPECS[name].options(STEPS))
        assert 0 < run.step < STEPS
        runs.run()
        whole = undisturbed(name)
        assert run.curve == whole.curve and same(run.parameters, whole.parameters), name


class Augmented(torch.utils.data.Dataset):
    """Draws when a sample is read."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        ids = torch.randint(3, models.VOCAB, (7,))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("make", [
    lambda: DataLoader(rows(1), 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    lambda: DataLoader(Augmented(), 3, shuffle=True),
    lambda: iter(batches(9)),
    lambda: batches(3),
], ids=["own generator", "drawn samples", "an iterator", "a list"])  # fmt: skip
@pytest.mark.parametrize("at", [2, 5])
def test_the_position_of_a_loader(tmp_path, make, at):
    """Two runs may share one loader, with its generator."""
    found = []
    for resumed in (False, True):
        runs, data = MultiTrain(tiny()), make()
        one_only = hasattr(data, "__next__")
        for step_at in [at, None] if resumed else [None]:
            for name in ("first",) if one_only else ("first", "second"):
                runs.add(name, lora(), data=data, steps=8, seed=len(name), optimizer=partial(torch.optim.SGD, lr=0.5))
            for step in runs:
                if step.number == step_at:
                    break
            if step_at is not None:
                runs.save(tmp_path)
                runs, data = MultiTrain.resume(tiny(), tmp_path), make()
        found.append([(run.curve, [p.detach() for p in run.parameters]) for run in runs.list_runs()])
    for (curve, values), (again, theirs) in zip(*found):
        assert curve == again and len(curve) == 8 and same(values, theirs)


def test_two_share_a_loaders_generator_and_each_has_it_alone():
    def made():
        return DataLoader(rows(1), 4, shuffle=True, generator=torch.Generator().manual_seed(5))

    data = made()
    two = [Loader(name, data, Draws(0, data), once=False) for name in ("one", "other")]
    wanted, alone = [], made()
    for _ in range(3):
        wanted += [batch["input_ids"] for batch in alone]
    found = [[loader.next_batch()["input_ids"] for loader in two] for _ in wanted]
    assert all(torch.equal(batch, want) for pair, want in zip(found, wanted, strict=True) for batch in pair)


def test_more_steps_than_before(tmp_path):
    runs = started(["plain"], 4)
    runs.run(save=tmp_path)
    again = MultiTrain.resume(tiny(), tmp_path)
    ended = again.add("plain", SPECS["plain"].config, **SPECS["plain"].options(4))
    assert (ended.state, ended.step, list(again)) == ("ended", 4, [])
    again.save(tmp_path)  # with the place in its data
    again = MultiTrain.resume(tiny(), tmp_path)
    run = again.add("plain", SPECS["plain"].config, **SPECS["plain"].options(STEPS))
    again.run()
    assert same(run.parameters, undisturbed("plain").parameters)


def test_a_look_and_a_stop_that_are_still_to_come(tmp_path):
    """The file of a run whose last step nobody has looked at, or asked `stop` about."""

    def added(runs, save=None, valid=None):
        options = dict(data=batches(9), steps=3)
        runs.add("saves", lora(), **options, stop=save)
        runs.add("looks", lora(), **options, valid=valid or batches(1))
        runs.add("asked", lora(), **options, stop=lambda run: run.step == 2)
        return runs

    class Lost(list):
        def __iter__(self):
            raise OSError("lost")

    runs = added(MultiTrain(tiny()), save=lambda run: run.step == 2 and runs.save(tmp_path / "in a stop"))
    runs.run()
    wanted = [(run.step, run.state, run.valid) for run in runs.list_runs()]
    assert [(step, len(valid)) for step, _, valid in wanted] == [(3, 0), (3, 1), (2, 0)]
    runs = added(MultiTrain(tiny()), valid=Lost([0]))
    with pytest.raises(OSError, match="lost"):
        runs.run()
    runs.save(tmp_path / "after an error")
    for folder in tmp_path.iterdir():
        runs = added(MultiTrain.resume(tiny(), folder)).run()
        assert [(run.step, run.state, run.valid) for run in runs.list_runs()] == wanted, folder


def test_a_failed_run_stays_failed(tmp_path):
    runs = MultiTrain(tiny())
    options = {"data": batches(2), "loss": lambda output, _: output["logits"].mean() / 0.0}
    runs.add("x", lora(), **options)
    with pytest.warns(graft.PeftWarning, match="not finite"):
        runs.run(save=tmp_path)
    run = MultiTrain.resume(tiny(), tmp_path).add("x", lora(), **options)
    assert run.state == "failed" and "Run 'x' failed at step 1" in run.why


# what cannot be resumed


@pytest.fixture
def saved(tmp_path):
    runs = started(["plain"], 4)
    next(iter(runs))
    runs.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("change, text", [
    ({"lr": 0.5}, r"'lr': 0.01.*now .*'lr': 0.5"),
    ({"clip": 2.0}, "clip = None, now 2.0"),
    ({"accumulate": 2}, "accumulate = 1, now 2"),
    ({"seed": 7}, "seed = 1, now 7"),
    ({"config": lora(r=5)}, "r = 4, now 5"),
    ({"schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=2)}, r"schedule = None, now \['StepLR'"),
])  # fmt: skip
def test_other_settings(saved, change, text):
    spec = SPECS["plain"]._replace(**change)
    runs = MultiTrain.resume(tiny(), saved)
    with pytest.raises(ConfigError, match=f"Run 'plain' in .* was begun with .*{text}"):
        runs.add("plain", spec.config, **spec.options(4))
    assert runs.model is None and runs.names == []
    runs.add("other", spec.config, **spec.options(4))  # a new one


def test_another_schedule(tmp_path):
    """A file holds all of a schedule, which would go before what is given now, without a word."""
    runs, spec = MultiTrain(tiny()), SPECS["timed"]
    runs.add("x", spec.config, **spec.options(4))
    runs.step()
    runs.save(tmp_path)
    for schedule in (None, partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=40)):
        again = MultiTrain.resume(tiny(), tmp_path)
        with pytest.raises(ConfigError, match=r"was begun with .*schedule = \['CosineAnnealingLR', .*'T_max': 12"):
            again.add("x", spec.config, **spec.options(4) | {"schedule": schedule})
    assert again.model is None


def test_a_rate_that_is_a_tensor(tmp_path):
    """Its schedule changes it in place."""
    options = SPECS["timed"].options(6)
    options |= {"optimizer": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2))}
    found = []
    for until in (None, 3):
        runs = MultiTrain(tiny())
        run = runs.add("x", lora(), **options)
        run.until = until
        runs.run(save=tmp_path / str(until))
        if until is not None:
            runs = MultiTrain.resume(tiny(), tmp_path / "3")
            run = runs.add("x", lora(), **options | {"data": SPECS["timed"].data()})
            assert run.step == 3
            runs.run()
        found.append(run)
    assert found[0].curve == found[1].curve and same(found[0].parameters, found[1].parameters)


def test_fewer_steps_than_were_made(saved):
    runs = MultiTrain.resume(tiny(), saved)
    run = runs.add("plain", SPECS["plain"].config, **SPECS["plain"].options(4))
    run.until = 3
    runs.run(save=saved)
    with pytest.raises(ConfigError, match="has made 3 steps, and is to make 2"):
        MultiTrain.resume(tiny(), saved).add("plain", SPECS["plain"].config, **SPECS["plain"].options(2))


def test_an_adapter_that_was_there_keeps_its_values_if_its_run_cannot_go_on(tmp_path):
    def model():
        with models.seeded(1):
            return graft.get_peft_model(tiny(), lora(r=4))

    runs = MultiTrain(model())
    runs.add("default", data=batches(4))
    runs.step()
    runs.step()
    runs.save(tmp_path)
    again = MultiTrain.resume(model(), tmp_path)
    with pytest.raises(ConfigError, match="saved after 2 batches of an epoch, and its data holds 1"):
        again.add("default", data=batches(4)[:1])
    own = [p for _, p in again.model.adapter_parameters("default")]
    assert same(own, [p for _, p in model().adapter_parameters("default")])


def test_a_disk_that_is_full_leaves_the_old_files(saved):
    """Each file whole, and no other file."""
    import resource

    runs = MultiTrain.resume(tiny(), saved)
    run = runs.add("plain", SPECS["plain"].config, **SPECS["plain"].options(4))
    runs.step()
    path, limits = saved / "plain" / run_file.FILE, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            runs.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [run_file.FILE]
    runs.save(saved)
    assert run_file.load_run("plain", str(saved))["step"] == run.step == 2


def test_another_base(saved):
    base = tiny()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    with pytest.raises(BaseModelMismatchError, match=r"Run 'plain'.*its weights have other values"):
        MultiTrain.resume(base, saved).add("plain", SPECS["plain"].config, **SPECS["plain"].options(4))


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data.replace(json.dumps("seed").encode(), b'"sead"'),
    lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
], ids=["cut", "note", "bit"])  # fmt: skip
def test_damaged_files(saved, damage):
    path = saved / "plain" / run_file.FILE
    path.write_bytes(damage(path.read_bytes()))
    runs = MultiTrain.resume(tiny(), saved)
    with pytest.raises(CheckpointError, match=str(path)):
        runs.add("plain", SPECS["plain"].config, **SPECS["plain"].options(4))
    assert runs.model is None


nan = float("nan")
MOMENT = ("optimizer", "state", "__pairs__", 0, 1)
FORGED = {
    **{name: edited(name, value=7) for name in run_file.FIELDS},
    "rate": edited("optimizer", "param_groups", 0, "lr", value=1e30),
    "rate as text": edited("optimizer", "param_groups", 0, "lr", value="x"),
    "parameters": edited("optimizer", "param_groups", 0, "params", value=[0, 0]),
    "group": edited("optimizer", "param_groups", value=[]),
    "states": edited("optimizer", "state", value=[]),
    "state of nobody": edited("optimizer", "state", value={"__pairs__": [[99, {}]]}),
    "no moment": edited(*MOMENT, value={"step": 3}),
    "shape of a moment": edited(*MOMENT, "exp_avg", value={"__tensor__": "NUMBER"}),
    "many steps": edited("step", value=2**60),
    "steps without a curve": edited("step", value=2),
    "curve": edited("curve", 0, value=[1, "x", 0.1, 0.1]),
    "state of a run": edited("state", value=["unknown", None]),
    "long position": edited("position", "taken", value=2**50),
    "epoch": edited("position", "epoch", value=-1),
    "began": edited("position", "began", value=[]),
    "draws": edited("draws", value=[]),
    "losses": edited("under_way", "losses", value=[{"__tensor__": "NUMBER"}] * 9),
    "gradients": edited("under_way", "gradients", value=[]),
    "values": edited("values", value={}),
    "value": lambda note, tensors: note["values"].update({key: {"__tensor__": "NUMBER"} for key in note["values"]}),
    "NaN": lambda note, tensors: tensors.update({k: t * nan for k, t in tensors.items() if t.is_floating_point()}),
    "generator": lambda note, tensors: tensors.update({k: t[:9] for k, t in tensors.items() if t.dtype == torch.uint8}),
    "position of a generator": lambda note, tensors: tensors.update(
        {k: torch_state(t, 624, 600) for k, t in tensors.items() if t.dtype == torch.uint8}
    ),
    "base": edited("base", value={"weights": {"a": ["x"]}}),
    "schedule": edited("schedule", value={"last_epoch": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_contents_change_nothing(saved, name):
    def change(note, tensors):
        tensors["NUMBER"] = torch.tensor(3.0)
        FORGED[name](note, tensors)

    base = tiny()
    before = {key: t.clone() for key, t in base.state_dict().items()}
    drawn = torch.get_rng_state()
    runs = MultiTrain.resume(base, saved)
    forge(saved / "plain", change, run_file)
    with pytest.raises((CheckpointError, ConfigError)):
        runs.add("plain", SPECS["plain"].config, **SPECS["plain"].options(4))
    assert runs.model is None and torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())
    runs.add("other", SPECS["plain"].config, **SPECS["plain"].options(2))
    runs.run()


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        MultiTrain.resume(tiny(), tmp_path)


def test_less_data_than_before(saved):
    options = SPECS["plain"].options(4) | {"data": []}
    with pytest.raises(ConfigError, match="Run 'plain': its data holds no batch"):
        MultiTrain.resume(tiny(), saved).add("plain", SPECS["plain"].config, **options)


def other_data(kind):
    """Data, and others of the kind."""
    return {
        "a loader": (Spec(None, seed=1).data, Spec(None, seed=2).data),
        "an iterator": (lambda: iter(batches(9)), lambda: iter(batches(9, seed=1))),
        "longer rows": (lambda: batches(9), lambda: [{k: v[:, :5] for k, v in b.items()} for b in batches(9)]),
        "other labels": (lambda: batches(9), lambda: [b | {"labels": b["labels"].roll(1)} for b in batches(9)]),
        "more arguments": (lambda: batches(9), lambda: [b | {"use_cache": False} for b in batches(9)]),
    }[kind]


@pytest.mark.parametrize("until", [1, 3, 8], ids=["first epoch", "later", "ended"])
@pytest.mark.parametrize("kind", ["a loader", "an iterator", "longer rows", "other labels", "more arguments"])
def test_other_data_than_before(tmp_path, kind, until):
    same, other = other_data(kind)
    runs = MultiTrain(tiny())
    runs.add("x", lora(), data=same(), steps=8, seed=1).until = until
    runs.run(save=tmp_path)
    again = MultiTrain.resume(tiny(), tmp_path)
    with pytest.raises(ConfigError, match=r"Run 'x' in .* was begun with other data, since the first batch"):
        again.add("x", lora(), data=other(), steps=8, seed=1)
    assert again.model is None
    assert again.add("x", lora(), data=same(), steps=8, seed=1).step == until


def test_a_loaders_generator_that_has_another_state(tmp_path):
    """The file has the states of generators that a run's loader holds."""

    def made(seed):
        return DataLoader(rows(1), 4, shuffle=True, generator=torch.Generator().manual_seed(seed))

    runs = MultiTrain(tiny())
    runs.add("x", lora(), data=made(5), steps=8).until = 2
    runs.run(save=tmp_path)
    run = MultiTrain.resume(tiny(), tmp_path).add("x", lora(), data=made(6), steps=8)
    run.owner.run()
    whole = MultiTrain(tiny())
    whole.add("x", lora(), data=made(5), steps=8)
    assert whole.run()["x"].curve == run.curve


def mean_square(output, batch):
    return output["logits"].square().mean()


def mean(output, batch, x=1):
    return output["logits"].mean()


@pytest.mark.parametrize("one, other, text", [
    (mean_square, mean, "loss = 'mean_square', now 'mean'"), (None, mean, "loss = None, now 'mean'"),
    (partial(mean, x=1), partial(mean, x=2), r"loss = \['mean', {'x': 1}\], now \['mean', {'x': 2}\]"),
    (partial(mean, x={(0, 1): 2}), partial(mean, x=2), r"loss = \['mean', {'x': {}}\], now"),
], ids=["named", "own", "partial", "keys that JSON has not"])  # fmt: skip
def test_another_loss_than_before(tmp_path, one, other, text):
    runs = one_run(data=batches(4), loss=one)
    runs.save(tmp_path)
    again = MultiTrain.resume(tiny(), tmp_path)
    with pytest.raises(ConfigError, match=f"Run 'x' in .* was begun with {text}"):
        again.add("x", lora(), data=batches(4), loss=other)
    again.add("x", lora(), data=batches(4), loss=one)


def test_state_that_is_no_data(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "odd": object()}

    runs = one_run(data=batches(2), optimizer=partial(Odd, lr=0.1))
    with pytest.raises(ConfigError, match="Run 'x', 'optimizer', 'odd': object cannot be written"):
        runs.save(tmp_path)
    assert run_file.list_runs(tmp_path) == []


@pytest.mark.parametrize("value", [
    {"a": 1, 2: (3.5, None)}, [float("inf"), -0.0, True], {(1, 2): {"x": torch.arange(3)}}, "text", (), {},
    {"__tuple__": [1]},
], ids=str)  # fmt: skip
def test_values_as_json_and_back(value):
    tensors = {}
    found = state_file.unpack(json.loads(json.dumps(state_file.pack(value, tensors, ""))), tensors)
    assert repr(found) == repr(value)


def test_specs_differ_in_all_that_a_run_depends_on():
    fields = [f for f in Spec._fields if f not in ("config", "batch", "dropout")]
    assert all(len({str(getattr(spec, f)) for spec in SPECS.values()}) > 1 for f in fields)


def test_digests_of_batches():
    """Of any: what has no bytes to read, and what JSON has not, counts by its class."""
    x, nested = torch.zeros(2, 3), torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged)
    odd = [x.to_sparse(), x.to("meta"), nested, object(), {1: 2, "a": x}]
    digests = [digest_batch({"x": value}) for value in odd]
    assert len({*digests}) == len(odd) - 1  # the first two are of one class
    assert (
        digest_batch({"a": x, "b": 1}) == digest_batch({"b": 1, "a": x.clone()}) != digest_batch({"a": x + 1, "b": 1})
    )
    assert len({digest_batch({"x": t}) for t in (x, x.double(), x.view(3, 2), x.bool(), [x], 0.0)}) == 6
