# SPDX-License-Identifier: Apache-2.0
"""`graft.save_training` and `graft.resume`: the bits of an uninterrupted training, or an error."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import graft
from graft.config import atomic
from graft.core.errors import AdapterKeyError, BaseModelMismatchError, CheckpointError, ConfigError
from graft.train.resuming import FILE, NOTE
from tests import fresh, models
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


class Loader:
    """Counts, and can be told."""

    def __init__(self):
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


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
    return repr(
        (training.values(), state, training.scheduler and training.scheduler.state_dict(), torch.get_rng_state())
    )


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


def test_another_rank_begins_anew(saved):
    training = Training(r=2)
    done = graft.resume(saved, *training.parts, strict=False)
    assert len(done.fresh) == 4 and all("lora_" in n for n in done.fresh)
    training.run(1)


def test_another_optimizer_begins_anew(saved):
    training = Training("sgd")
    done = graft.resume(saved, *training.parts, strict=False)
    assert done.fresh == ["optimizer", "scheduler"]
    assert same(training.values(), Training().run(4).values())


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
    with pytest.raises(ConfigError, match=r"Group 0 of the optimizer has a parameter of shape \(2,\)"):
        graft.save_training(tmp_path / "a", training.model, SGD([torch.nn.Parameter(torch.zeros(2))], 0.1), step=1)
    with pytest.raises(ConfigError, match="extra, 'x': object cannot be written"):
        graft.save_training(tmp_path / "a", *training.parts, step=1, extra={"x": object()})
    with pytest.raises(TypeError, match="step must be an int, got '1'"):
        graft.save_training(tmp_path / "a", *training.parts, step="1")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "order, text",
    [
        ((1, 0, 2), r"needs a PeftModel.* got AdamW"),
        ((0, 2, 1), r"is no optimizer: that comes second"),
        ((0, 1, 3), r"A list is no scheduler: that comes third, then the loader"),
    ],
)
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
    calls, sync, training, found = [], atomic.sync, Training(), []
    monkeypatch.setattr(atomic, "sync", lambda path: (calls.append(path), sync(path)))
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
