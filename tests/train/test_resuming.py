# SPDX-License-Identifier: Apache-2.0
"""`graft.save_training` and `graft.resume`: the bits of an uninterrupted training, or an error."""

from __future__ import annotations

import json
import random
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load
from torch.optim import SGD, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR

import graft
from graft import optim
from graft.config import atomic
from graft.config.seal import KEY
from graft.core.errors import AdapterKeyError, BaseModelMismatchError, CheckpointError, ConfigError
from graft.io.tensors import digest_tensors, write_safetensors
from graft.train import resuming, state_file
from graft.train.resuming import FILE, NOTE
from tests import fresh, models
from tests.golden.continued import Loader
from tests.train.resumed_loop import CASES, Training

ROOT = Path(__file__).parents[2]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def saved(tmp_path):
    training = Training().run(4)
    graft.save_training(tmp_path, *training.parts, step=4, extra={"seen": 20, "best": torch.tensor(0.5)})
    return tmp_path


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch's own SequentialLR calls it so
@pytest.mark.parametrize("case", CASES)
def test_bits_of_an_uninterrupted_run(case, tmp_path):
    whole = Training(case).run(9)
    first = Training(case).run(4)
    graft.save_training(tmp_path, *first.parts, step=4)
    first.run(2)  # and is lost
    again = Training(case, seed=5)
    done = graft.resume(tmp_path, *again.parts)
    assert (done.step, done.fresh, done.missing) == (4, [], [])
    again.run(5)
    assert again.losses == whole.losses[4:] and same(again.values(), whole.values())
    assert [g["lr"] for g in again.optimizer.param_groups] == [g["lr"] for g in whole.optimizer.param_groups]


def test_a_model_that_is_loaded_from_the_folder(saved):
    whole, again = Training().run(7), Training(seed=3)
    base = Training().model.unload()
    again.model = graft.PeftModel.from_pretrained(base, saved, is_trainable=True).train()
    named = [(n, p) for n, p in again.model.named_parameters() if p.requires_grad]
    groups = [[p for n, p in named if ("lora_A" in n) == wanted] for wanted in (True, False)]
    for group, params in zip(again.optimizer.param_groups, groups):
        group["params"] = params
    done = graft.resume(saved, *again.parts)
    assert done.extra["seen"] == 20 and done.extra["best"].item() == 0.5
    assert same(again.run(3).values(), whole.values())


def test_all_generators(tmp_path):
    training = Training()
    graft.save_training(tmp_path, *training.parts, step=0)
    wanted = random.random(), np.random.rand(), torch.rand(1)
    graft.resume(tmp_path, *training.parts)
    assert (random.random(), np.random.rand(), torch.rand(1)) == wanted


def test_what_the_files_say(saved):
    note = json.loads((saved / NOTE).read_text())
    assert [g["initial_lr"] for g in note["groups"]] == [1e-2, 3e-3] and note["groups"][0]["lr"] < 1e-2
    with safe_open(saved / FILE, "pt") as f:
        keys = set(f.keys())
    name = "base_model.model.first.lora_A.default.weight"
    assert {f"exp_avg/{name}", f"step/{name}", f"value/{name}", "generator/cpu"} <= keys
    assert not [p for p in saved.iterdir() if p.suffix not in (".safetensors", ".json", ".md")]


def test_another_order_of_parameters(saved):
    """The state finds its parameter by name, whatever its index."""
    whole, again = Training().run(6), Training(seed=3)
    for group in again.optimizer.param_groups:
        group["params"].reverse()
    graft.resume(saved, *again.parts)
    values = again.run(2).values()
    assert all(torch.allclose(values[n], t, atol=1e-7) for n, t in whole.values().items())


def test_a_loader(tmp_path):
    training, loader = Training(), Loader()
    loader.at = 7
    graft.save_training(tmp_path, *training.parts, loader, step=7)
    with pytest.raises(ConfigError, match="state of a loader, and none is passed"):
        graft.resume(tmp_path, *training.parts)
    loader.at = 0
    graft.resume(tmp_path, *training.parts, loader)
    assert loader.at == 7
    with pytest.raises(ConfigError, match=r"The loader .list. has no state_dict"):
        graft.save_training(tmp_path, *training.parts, [1], step=7)


# what does not fit


def everything(training):
    state = training.optimizer.state_dict()
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()
    return repr((training.values(), state, training.scheduler and training.scheduler.state_dict(), drawn))


@pytest.mark.parametrize("other, error, text", [
    ({"r": 2}, AdapterKeyError, r"'.*first.lora_A.default.weight' has shape \(4, 8\) there and \(2, 8\) here.*rank"),
    ({"target_modules": ["first"]}, AdapterKeyError, "here is no .*second.lora_A.*other targets"),
    ({"target_modules": ["first", "second"], "modules_to_save": None}, AdapterKeyError, "here is no .*head"),
    ({"target_modules": ["first", "second"], "use_dora": True}, AdapterKeyError, "does not hold .*magnitude"),
    ({"case": "sgd"}, ConfigError, "optimizer is a torch.optim.adamw.AdamW, and here is a torch.optim.sgd.SGD"),
    ({"case": "amsgrad"}, ConfigError, "its scheduler is .*Cosine.*, and here is None"),
    ({"case": "sequential"}, ConfigError, "its scheduler is .*Cosine.*, and here is .*Sequential"),
    ({"base_seed": 9}, BaseModelMismatchError, "adapter 'default'.*on another base: its weights have other values"),
], ids=str)  # fmt: skip
def test_another_training(saved, other, error, text):
    training = Training(**other).run(1)
    before = everything(training)
    with pytest.raises(error, match=text):
        graft.resume(saved, *training.parts)
    assert everything(training) == before


def halved(step):
    return 0.5**step


def divided(step):
    return 1 / (step + 1)


def test_another_rule_of_a_scheduler(tmp_path):
    """Its state does not say which function it was told; Trainer's schedules are all of one class."""
    training = Training()
    graft.save_training(tmp_path, *training.parts[:2], LambdaLR(training.optimizer, partial(halved)), step=1)
    again = Training()
    with pytest.raises(ConfigError, match=r"scheduler is .*LambdaLR\(halved\), and here is .*LambdaLR\(divided\)"):
        graft.resume(tmp_path, *again.parts[:2], LambdaLR(again.optimizer, divided))
    graft.resume(tmp_path, *again.parts[:2], LambdaLR(again.optimizer, halved))


def test_other_groups(saved):
    training = Training()
    training.optimizer = torch.optim.AdamW([p for p in training.model.parameters() if p.requires_grad])
    with pytest.raises(ConfigError, match=r"2 groups of \[2, 4\] parameters, and here are 1 of \[6\]"):
        graft.resume(saved, training.model, training.optimizer, training.scheduler)


def test_another_rank_or_optimizer_begins_anew(saved):
    training = Training(r=2)
    done = graft.resume(saved, *training.parts, strict=False)
    assert len(done.fresh) == 4 and all("lora_" in n for n in done.fresh)
    training.run(1)
    training = Training("sgd")
    assert graft.resume(saved, *training.parts, strict=False).fresh == ["optimizer", "scheduler"]
    assert same(training.values(), Training().run(4).values())


def test_what_is_new_begins_anew(saved):
    training = Training(target_modules=["first", "head"], modules_to_save=None)
    kept = training.values()
    done = graft.resume(saved, *training.parts, strict=False)
    assert all("head.lora_" in n for n in done.fresh) and len(done.fresh) == 2
    assert {n.split(".")[2] for n in done.missing} == {"second", "head"}
    for n, p in training.model.named_parameters():
        if n in done.fresh:
            assert p not in training.optimizer.state and torch.equal(p, kept[n])
        elif p.requires_grad:
            assert training.optimizer.state[p]["step"] == 4
    training.run(1)
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {1, 5}


def test_a_prompt_without_the_network_that_computed_it_begins_anew(tmp_path):
    """A load leaves the prompt itself, of the name and shape of what the network begins with."""

    def parts(model):
        return model, SGD([p for p in model.parameters() if p.requires_grad], 0.1)

    config = graft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=4, task_type="CAUSAL_LM")
    network = parts(graft.get_peft_model(models.make("llama"), config))
    graft.save_training(tmp_path, *network, step=4)
    model = graft.get_peft_model(models.make("llama"), config)
    with pytest.warns(graft.PeftWarning, match=r"delete optimizer\.pt .*Resumable\(strict=False\)"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    prompt = parts(model)
    weight = model.prompt_encoder["default"].embedding.weight
    before = weight.detach().clone()
    for there, here, other in ((prompt, network, "here"), (network, prompt, "there")):
        graft.save_training(tmp_path, *there, step=4)
        with pytest.raises(AdapterKeyError, match=f"{other} a network computes the prompt of adapter 'default'"):
            graft.resume(tmp_path, *here)
    done = graft.resume(tmp_path, *prompt, strict=False)
    assert torch.equal(weight, before)
    assert done.fresh == ["prompt_encoder.default.embedding.weight"] and {*done.fresh} < {*done.missing}


def test_a_weight_of_the_base_that_trains_with_an_adapter_merged_into_it(tmp_path):
    """It would be saved with the adapter in it, or take the place of what is merged."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    config = graft.LoraConfig(r=2, target_modules=["0"], bias="lora_only", init_lora_weights=False)
    model = graft.get_peft_model(net, config).requires_grad_()
    optimizer = SGD(model.parameters(), lr=0.1)
    graft.save_training(tmp_path, model, optimizer, step=1)
    before = (tmp_path / FILE).read_bytes()
    model.merge_adapter()
    merged = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"0\.base_layer\.weight' is in the optimizer, and .* default are merged"):
        graft.save_training(tmp_path, model, optimizer, step=2)
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        graft.resume(tmp_path, model, optimizer)
    assert (tmp_path / FILE).read_bytes() == before and same(merged, model.state_dict())
    rest = SGD([p for n, p in model.named_parameters() if n.endswith("bias") or "lora_" in n], lr=0.1)
    graft.save_training(tmp_path, model, rest, step=2)  # biases are as they were


def test_what_cannot_be_saved(tmp_path):
    training = Training()
    other = training.model, SGD([torch.nn.Parameter(torch.zeros(2))], 0.1)
    for parts, options, error, text in (
        (other, {}, ConfigError, r"Group 0 of the optimizer has a parameter of shape \(2,\)"),
        (training.parts, {"extra": {"x": object()}}, ConfigError, "extra, 'x': object cannot be written"),
        (training.parts, {"step": "1"}, TypeError, "step must be an int, got '1'"),
    ):
        with pytest.raises(error, match=text):
            graft.save_training(tmp_path / "a", *parts, **{"step": 1} | options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("order, text", [
    ((1, 0, 2), r"needs a PeftModel.* got AdamW"), ((0, 2, 1), r"is no optimizer\. Pass the optimizer second"),
    ((0, 1, 3), r"A list is no scheduler\. Pass the scheduler third, then the loader"),
])  # fmt: skip
def test_parts_in_another_order(order, text, saved):
    training = Training()
    parts = [[*training.parts, [1, 2]][i] for i in order]
    with pytest.raises(ConfigError, match=text):
        graft.save_training(saved / "a", *parts, step=1)
    with pytest.raises(ConfigError, match=text):
        graft.resume(saved, *parts)
    assert not (saved / "a").exists()


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
], ids=["cut", "bit"])  # fmt: skip
def test_damaged_files(saved, damage):
    (saved / FILE).write_bytes(damage((saved / FILE).read_bytes()))
    with pytest.raises(CheckpointError, match=FILE) as error:
        graft.resume(saved, *Training().parts)
    assert "check_digest" not in str(error.value), "resume has no such argument"


def test_a_folder_without_a_training(tmp_path):
    Training().model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no training\.safetensors"):
        graft.resume(tmp_path, *Training().parts)


@pytest.fixture
def syncs(tmp_path, monkeypatch):
    """How often each of two saves has the disk confirm something: a file before it is renamed, its folder after."""
    calls, sync, training, found = [], atomic.sync_file, Training(), []
    monkeypatch.setattr(atomic, "sync_file", lambda path: (calls.append(path), sync(path)))
    for step in (1, 2):
        graft.save_training(tmp_path / "counted", *training.run(1).parts, step=step)
        found.append(len(calls) - sum(found))
    return found


@pytest.mark.parametrize(("saves", "moment", "left"), [(0, -2, None), (1, 2, 1), (1, -2, 1), (1, -1, 2)])
def test_killed_at_any_moment(saves, moment, left, syncs, tmp_path):
    """In the first save; in the second among the adapter's files, before the last file has its name, and after."""
    at = sum(syncs[:saves]) + moment % syncs[saves]
    done = fresh.run("-m", "tests.train.resumed_loop", tmp_path, at, cwd=ROOT)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / FILE).exists() == (left is not None)
    if left is not None:
        again = Training(seed=7)
        assert graft.resume(tmp_path, *again.parts).step == left
        assert same(again.run(5 - left).values(), Training().run(5).values())


# contents that no training could go on with


def forge(folder, change, of=resuming):
    """Change the note and the tensors of a file, and give it the digest that fits."""
    tensors = load((folder / of.FILE).read_bytes())
    note = json.loads(tensors.pop(of.NOTE).numpy().tobytes())
    change(note, tensors)
    state_file.write_state_file(str(folder / of.FILE), of.NOTE, note, tensors)


def edited(*path, value):
    """Return a function that sets a place in the note."""

    def change(note, tensors):
        place = note
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def torch_state(state, left, place):
    """Return a state of torch's generator with other positions."""
    data = bytearray(state.numpy().tobytes())
    struct.pack_into("<i", data, 8, left)
    struct.pack_into("<Q", data, 16, place)
    return torch.frombuffer(data, dtype=torch.uint8)


def replaced(start, of, every=True):
    def change(note, tensors):
        for name in [name for name in tensors if name.startswith(start)][: None if every else 1]:
            tensors[name] = of(tensors[name])

    return change


A = "base_model.model.first.lora_A.default.weight"
NUMPY, PYTHON = ("random", "numpy", "__tuple__"), ("random", "python", "__tuple__")
nan = float("nan")
FORGED = {
    "position of numpy": edited(*NUMPY, 2, value=2**31 - 1),
    "position of numpy behind its numbers": edited(*NUMPY, 2, value=700),
    "position of numpy before its numbers": edited(*NUMPY, 2, value=-1),
    "numbers of numpy": edited(*NUMPY, 1, value=[1] * 5),
    "kind of numpy": edited(*NUMPY, 0, value="PCG64"),
    "normal of numpy": edited(*NUMPY, 4, value=nan),
    "position of python": edited(*PYTHON, 1, "__tuple__", 624, value=2**31),
    "normal of python": edited(*PYTHON, 2, value="x"),
    "random states": edited("random", value=[]),
    "position of torch": replaced("generator/cpu", lambda t: torch_state(t, 624, 600)),
    "position of torch behind its numbers": replaced("generator/cpu", lambda t: torch_state(t, 1, 700)),
    "state of torch": replaced("generator/cpu", lambda t: t[:100]),
    "dtype of torch's state": replaced("generator/cpu", lambda t: t.float()),
    "no state of torch": lambda note, tensors: tensors.pop("generator/cpu"),
    "rate": edited("groups", 0, "lr", value=1e30),
    "rate below 0": edited("groups", 0, "lr", value=-1.0),
    "rate NaN": edited("groups", 1, "lr", value=nan),
    "rate as text": edited("groups", 0, "lr", value="0.1"),
    "first rate": edited("groups", 0, "initial_lr", value=1e30),
    "betas": edited("groups", 0, "betas", value={"__tuple__": [0.9, 1.5]}),
    "one beta": edited("groups", 0, "betas", value={"__tuple__": [0.9]}),
    "decay": edited("groups", 0, "weight_decay", value=[0.1]),
    "flag": edited("groups", 0, "amsgrad", value="no"),
    "params": edited("groups", 0, "params", value="x"),
    "groups": edited("groups", value={}),
    "names of params": edited("groups", 0, "params", 0, value=[1]),
    "no moment": lambda note, tensors: note["states"][A].pop("exp_avg"),
    "moment of another parameter": edited(
        "states", A, "exp_avg", value={"__tensor__": "exp_avg/" + A.replace("_A", "_B")}
    ),
    "moment as number": edited("states", A, "exp_avg", value=3.0),
    "moments NaN": replaced("exp_avg/", lambda t: t * nan),
    "squares below 0": replaced("exp_avg_sq/", lambda t: -t),
    "moments in half precision": replaced("exp_avg/", lambda t: t.half()),
    "moments in double precision": replaced("exp_avg/", lambda t: t.double(), every=False),
    "moment of integers": replaced("exp_avg/", lambda t: t.long(), every=False),
    "steps": replaced("step/", lambda t: t + 1e30),
    "steps below 0": replaced("step/", lambda t: t - 100),
    "steps as number": edited("states", A, "step", value=3),
    "shape of steps": replaced("step/", lambda t: t.expand(3).clone(), every=False),
    "states": edited("states", value=[]),
    "state": edited("states", A, value=[1]),
    "others": edited("others", value=[1]),
    "values NaN": replaced("value/", lambda t: t * nan, every=False),
    "schedule": edited("schedule", value=[1]),
    "text in the schedule": edited("schedule", "base_lrs", value="x"),
    "rates of the schedule": edited("schedule", "base_lrs", value=[1e30, 1e30]),
    "one text among rates": edited("schedule", "_last_lr", value=[0.1, "x"]),
    "epoch of the schedule": edited("schedule", "last_epoch", value=nan),
    "negative epoch": edited("schedule", "last_epoch", value=-3),
    "T_max": edited("schedule", "T_max", value="9"),
    "step": edited("step", value="4"),
    "negative step": edited("step", value=-4),
    "extra": edited("extra", value=[]),
    "base": edited("bases", "default", value={"weights": {"a": ["x"]}}),
    "bases": edited("bases", value=[]),
    "processes": edited("processes", value=0),
    "states of processes": edited("of_ranks", value=[{"random": {}, "loader": None}]),
    "no tensor of that name": edited("extra", value={"a": {"__tensor__": "x"}}),
    "tensor by number": edited("extra", value={"a": {"__tensor__": [1]}}),
    "pairs": edited("extra", value={"a": {"__pairs__": [[[1], 2]]}}),
    "half a pair": edited("extra", value={"a": {"__pairs__": [[1]]}}),
    "tuple": edited("extra", value={"a": {"__tuple__": 3}}),
    "depth": edited("extra", value={"a": json.loads("[" * 300 + "]" * 300)}),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_contents_change_nothing(saved, name):
    training = Training(seed=5).run(1)
    forge(saved, lambda note, tensors: None)  # stays a good one
    assert graft.resume(saved, *Training().parts).step == 4
    forge(saved, FORGED[name])
    before = everything(training)
    for strict in (True, False):
        with pytest.raises(CheckpointError):
            graft.resume(saved, *training.parts, strict=strict)
        assert everything(training) == before
    training.run(1)


@pytest.mark.parametrize(
    "note", [b"[]", b"3", b"{", b"\xff", b'{"format": 1}', b"[" * 100_000, b'{"format": 1, "format": 1}']
)
def test_a_note_that_is_none(saved, note):
    tensors = load((saved / FILE).read_bytes())
    tensors[NOTE] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
    write_safetensors(saved / FILE, tensors, {KEY: digest_tensors(tensors)})
    with pytest.raises(CheckpointError):
        graft.resume(saved, *Training().parts)


def test_a_digest_is_needed(saved):
    tensors = load((saved / FILE).read_bytes())
    for metadata, text in ({}, "has no digest"), ({KEY: "sha1:3"}, "of a later graft"):
        write_safetensors(saved / FILE, tensors, metadata)
        with pytest.raises(CheckpointError, match=text):
            graft.resume(saved, *Training().parts)


class Refuses:
    """Takes the first part of its state, and then raises."""

    def __init__(self):
        self.at = {"first": 0, "second": 0}

    def state_dict(self):
        return self.at

    def load_state_dict(self, state):
        self.at["first"] = state["first"]
        raise KeyError("second")


def test_a_loader_or_scheduler_that_refuses_leaves_all_as_it_was(tmp_path):
    loader = Refuses()
    training = Training().run(2)
    graft.save_training(tmp_path, *training.parts, loader, step=2)
    again = Training(seed=5).run(1)
    loader.at = {"first": 7, "second": 7}
    before = everything(again)
    with pytest.raises(CheckpointError, match=r"a Refuses refuses the state in training\.safetensors .KeyError"):
        graft.resume(tmp_path, *again.parts, loader)
    assert everything(again) == before and loader.at == {"first": 7, "second": 7}


def adamw_of_a_tensor(parameters):
    return torch.optim.AdamW(parameters, lr=torch.tensor(0.1))


@pytest.mark.parametrize(
    "make", [
        partial(torch.optim.Adagrad, lr=0.1), partial(torch.optim.RMSprop, lr=0.1, momentum=0.5, centered=True),
        partial(torch.optim.Adadelta, lr=0.1), partial(torch.optim.Adamax, lr=0.1), partial(torch.optim.ASGD, lr=0.1),
        partial(torch.optim.Rprop, lr=0.1), partial(torch.optim.NAdam, lr=0.1), partial(torch.optim.RAdam, lr=0.1),
        partial(torch.optim.Adam, lr=0.1, amsgrad=True), partial(SGD, lr=0.1), partial(torch.optim.Adafactor, lr=0.1),
        adamw_of_a_tensor, "lorafa", "muon", "loraplus", "lorapro",
    ], ids=lambda make: getattr(make, "__name__", str(make)),
)  # fmt: skip
def test_every_optimizer_of_torch_and_graft_goes_on(make, tmp_path):
    """What the checks know of each class is what it keeps: names, types and shapes."""

    def parts():
        training = Training(modules_to_save=None)
        if make in ("loraplus", "lorapro"):
            more = {"loraplus_lr_ratio": 4} if make == "loraplus" else {}
            create = getattr(optim, f"create_{make}_optimizer")
            training.optimizer = create(training.model, torch.optim.AdamW, lr=0.1, **more)
        elif isinstance(make, str):
            training.optimizer = getattr(optim, f"create_{make}_optimizer")(training.model, lr=0.1)
        else:
            training.optimizer = make([p for p in training.model.parameters() if p.requires_grad])
        training.scheduler = lr_scheduler.MultiStepLR(training.optimizer, [2, 4])
        return training

    assert_goes_on(parts, tmp_path)


def assert_goes_on(parts, folder):
    """A training of two halves has the bits of one whole."""
    whole = parts().run(5)
    graft.save_training(folder, *parts().run(3).parts, step=3)
    again = parts()
    graft.resume(folder, *again.parts)
    assert same(again.run(2).values(), whole.values())


@pytest.mark.parametrize("make", [
    lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9), lambda o: lr_scheduler.PolynomialLR(o, 9),
    lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2), lambda o: lr_scheduler.MultiplicativeLR(o, halved),
    lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
    lambda o: transformers.get_cosine_schedule_with_warmup(o, 2, 9), transformers.get_constant_schedule,
])  # fmt: skip
def test_every_schedule_goes_on(make, tmp_path):
    def parts():
        training = Training()
        training.scheduler = make(training.optimizer)
        return training

    assert_goes_on(parts, tmp_path)


class Rule:
    """A function of a schedule that remembers."""

    def __init__(self):
        self.seen, self.best = [], None

    def __call__(self, step):
        self.seen.append(step)
        self.best = 0.5
        return 0.9**step


def test_objects_and_numbers_of_others_go_on(tmp_path):
    """A rule with a state that grows, rates of NumPy's, and back to a save before the first look at a loss."""

    def parts():
        training = Training()
        for group in training.optimizer.param_groups:
            group["lr"] = np.float64(group["lr"])
        training.scheduler = LambdaLR(training.optimizer, Rule())
        return training

    training, again = parts().run(3), parts()
    graft.save_training(tmp_path, *training.parts, step=3)
    graft.resume(tmp_path, *again.parts)
    seen = [made.scheduler.lr_lambdas[0].seen for made in (training, again)]
    assert seen[0] == seen[1] == [0, 0, 1, 1, 2, 2, 3, 3]
    training.scheduler = lr_scheduler.ReduceLROnPlateau(training.optimizer)
    graft.save_training(tmp_path, *training.parts, step=3)
    training.scheduler.step(0.3)
    graft.resume(tmp_path, *training.parts)
    assert training.scheduler.best == float("inf")


def test_a_schedule_that_waits_for_a_better_loss(tmp_path):
    """Its best loss is infinite before the first."""
    for steps in (0, 2):
        training, again = Training(), Training()
        for made in (training, again):
            made.scheduler = lr_scheduler.ReduceLROnPlateau(made.optimizer)
        for _ in range(steps):
            training.scheduler.step(0.3)
        graft.save_training(tmp_path, *training.parts, step=steps)
        graft.resume(tmp_path, *again.parts)
        assert again.scheduler.best == training.scheduler.best
