# SPDX-License-Identifier: Apache-2.0
"""A save has one moment at which it happens: whatever goes wrong, the folder holds the old adapter or the new one."""

from __future__ import annotations

import os
import shutil

import peft
import pytest
import safetensors.torch
import torch

import graft
from tests.covering import EVERYTHING
from tests.threads import in_child
from tests.trust.folders import (
    BIN,
    CARD,
    CONFIG,
    TENSORS,
    adapter,
    denied,
    edit,
    faults,
    files,
    full,
    held,
    interrupted,
    killed,
    net,
)

OLD, NEW, EDITED = 1, 2, 7
READS = ("stat", "lstat", "scandir")  # calls that change nothing


def by_peft(folder):
    """An adapter that holds no notes."""
    adapter(OLD).save_pretrained(folder)
    peft.PeftModel.from_pretrained(net(), folder, is_trainable=True).save_pretrained(folder)


def edited(folder):
    adapter(OLD).save_pretrained(folder)
    edit(folder, lora_alpha=EDITED)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Wait less for a save that was cut short."""
    monkeypatch.setattr("graft.config.pair.PATIENCE", 0.02, raising=False)


FORMATS = {"safetensors": True, "bin": False}
BEFORE = {  # what the folder holds, and what is loaded of it
    "nothing": (lambda folder: None, None),
    "safetensors": (lambda folder: adapter(OLD).save_pretrained(folder), (OLD, OLD)),
    "bin": (lambda folder: adapter(OLD).save_pretrained(folder, safe_serialization=False), (OLD, OLD)),
    "PEFT's": (by_peft, (OLD, OLD)),
    "edited": (edited, (EDITED, OLD)),
}
CASES = [*((before, "safetensors") for before in BEFORE), ("safetensors", "bin"), ("bin", "bin")]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[1]} over {case[0]}")
def case(request, tmp_path_factory):
    """Folders with an old adapter, as many as wanted; what they hold; how to save the new one."""
    before, safe = request.param
    make, old = BEFORE[before]
    root = tmp_path_factory.mktemp("case")
    make(root / "old")

    def fresh():
        shutil.rmtree(root / "now", ignore_errors=True)
        if (root / "old").exists():
            shutil.copytree(root / "old", root / "now")
        return root / "now"

    def save(folder):
        adapter(NEW).save_pretrained(folder, safe_serialization=FORMATS[safe])

    return fresh, old, save


def steps(fresh, save):
    """The calls by which a save reaches the disk."""
    folder = fresh()
    with faults(folder) as seen:
        save(folder)
    assert {"replace", "fsync", "open"} <= {call.split()[0] for call in seen}
    return seen


def now(folder):
    try:
        return held(folder)
    except graft.CheckpointError as e:
        assert f"Can't find '{CONFIG}'" in str(e)
        return None


@pytest.mark.differs("an interrupted or failed save")
def test_a_kill_at_any_call_leaves_one_adapter_whole(case):
    fresh, old, save = case
    ended, made = [], steps(fresh, save)
    for at, step in enumerate(made):
        if step.split()[0] in READS:
            continue
        if not EVERYTHING and (at + len(made)) % 3:  # the others in other cases
            continue
        folder = fresh()

        def run(at=at, folder=folder):
            with faults(folder, at, killed):
                save(folder)

        assert in_child(run) == 9, step
        ended.append(now(folder))
        assert ended[-1] in (old, (NEW, NEW)), step
        save(folder)
        assert now(folder) == (NEW, NEW) and len(files(folder)) == 3, f"{step}: {sorted(files(folder))}"
    first = ended.index((NEW, NEW))
    assert first and set(ended[first:]) == {(NEW, NEW)}, "there is one moment"


@pytest.mark.parametrize("kinds", [(full, denied), (interrupted,)], ids=["error", "interrupt"])
def test_an_error_at_any_call_leaves_one_adapter_whole(case, kinds):
    fresh, old, save = case
    made = steps(fresh, save)
    for at, step in enumerate(made):
        if not EVERYTHING and (at + len(made)) % 2:  # the other half in another case
            continue
        how = kinds[(at + len(made)) // 2 % len(kinds)]  # another one in another case
        folder = fresh()
        before = files(folder) if folder.exists() else {}
        failed = False
        with faults(folder, at, how):
            try:
                save(folder)
            except (OSError, KeyboardInterrupt, graft.CheckpointError):
                failed = True
        ended = now(folder)
        assert ended == (NEW, NEW) or (failed and ended == old), step
        if ended == old:
            assert {name: text for name, text in files(folder).items() if not name.endswith(".tmp")} == before, step


def test_a_save_that_cannot_write_the_config_leaves_the_old_files(tmp_path, monkeypatch):
    adapter(OLD).save_pretrained(tmp_path)
    before, real = files(tmp_path), os.replace

    def replace(source, target):
        if os.path.basename(target) == CONFIG:
            raise PermissionError(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(PermissionError):
            adapter(NEW).save_pretrained(tmp_path)
        assert files(tmp_path) == before
        patch.setattr(os, "link", lambda *_, **__: denied(None))  # as on file systems without hard links
        with pytest.raises(graft.CheckpointError, match=r"is saved.*adapter_config.json is still the old one"):
            adapter(NEW).save_pretrained(tmp_path)
    assert held(tmp_path) == (NEW, NEW)
    with pytest.warns(graft.PeftWarning, match="A save was cut short.*belongs to another adapter"):
        graft.PeftModel.from_pretrained(net(), tmp_path)
    assert graft.PeftConfig.from_pretrained(tmp_path).lora_alpha == NEW


def test_several_adapters_are_each_whole(tmp_path):
    def model(number):
        made = graft.PeftModel(net(), adapter(number).peft_config["default"])
        made.add_adapter("other", adapter(number).peft_config["default"])
        for key, p in made.named_parameters():
            if "lora_" in key:
                p.data.fill_(number)
        return made

    old, new = model(OLD), model(NEW)
    old.save_pretrained(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    with faults(tmp_path / "new") as seen:
        new.save_pretrained(tmp_path / "new")
    ended = set()
    for at, step in enumerate(seen):
        if step.split()[0] in READS or not (EVERYTHING or at % 4 == 0):
            continue
        shutil.rmtree(tmp_path / "new")
        shutil.copytree(tmp_path / "old", tmp_path / "new")

        def run(at=at):
            with faults(tmp_path / "new", at, killed):
                new.save_pretrained(tmp_path / "new")

        assert in_child(run) == 9
        ended.add((held(tmp_path / "new"), held(tmp_path / "new", subfolder="other")))
        assert ended <= {((i, i), (j, j)) for i, j in ((OLD, OLD), (NEW, OLD), (NEW, NEW))}, step
    assert len(ended) == 3


# what people and other libraries do to a folder


@pytest.mark.differs("adapter_config.json that differs from the one the weights were saved with")
@pytest.mark.parametrize("safe", FORMATS.values(), ids=FORMATS)
def test_an_edited_config_counts_and_is_told(tmp_path, safe):
    adapter(OLD).save_pretrained(tmp_path, safe_serialization=safe)
    edit(tmp_path, lora_alpha=EDITED)
    with pytest.warns(graft.PeftWarning, match=r"lora_alpha \(7, saved with 1\)\. The edited values count"):
        assert graft.PeftModel.from_pretrained(net(), tmp_path).peft_config["default"].lora_alpha == EDITED
    assert graft.PeftConfig.from_pretrained(tmp_path).lora_alpha == EDITED
    adapter(NEW).save_pretrained(tmp_path, safe_serialization=safe)
    assert held(tmp_path) == (NEW, NEW)


def test_edits_that_change_nothing_are_not_told(tmp_path, recwarn):
    adapter(OLD).save_pretrained(tmp_path)
    edit(tmp_path, base_model_name_or_path="elsewhere", inference_mode=False, target_modules=["1", "0"], foo=None)
    graft.PeftModel.from_pretrained(net(), tmp_path)
    peft.PeftConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    graft.PeftModel.from_pretrained(net(), tmp_path)
    graft.PeftConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    graft.PeftModel.from_pretrained(net(), tmp_path)
    assert not [w for w in recwarn if "saved with" in str(w.message)]


@pytest.mark.parametrize("safe", FORMATS.values(), ids=FORMATS)
def test_peft_reads_the_folder_and_saves_over_it(tmp_path, safe):
    adapter(OLD).save_pretrained(tmp_path, safe_serialization=safe)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert held(tmp_path, peft.PeftModel.from_pretrained) == (OLD, OLD)
    theirs.peft_config["default"].lora_alpha = NEW
    for key, p in theirs.named_parameters():
        if "lora_" in key:
            p.data.fill_(NEW)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    assert held(tmp_path) == (NEW, NEW)


def test_notes_that_are_damaged(tmp_path):
    adapter(OLD).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    for text in ("{not json", "[1]", "[" * 100_000):
        safetensors.torch.save_file(tensors, tmp_path / TENSORS, {"format": "pt", "graft_config": text})
        with pytest.raises(graft.CheckpointError, match=TENSORS):
            graft.PeftModel.from_pretrained(net(), tmp_path)


@pytest.mark.differs("two saves of one adapter")
@pytest.mark.parametrize("safe", FORMATS.values(), ids=FORMATS)
def test_saves_of_one_adapter_are_equal_bytes(tmp_path, safe):
    for i in range(6):
        adapter(OLD).save_pretrained(tmp_path / str(i), safe_serialization=safe)
    adapter(OLD).save_pretrained(tmp_path / "0", safe_serialization=safe)
    made = [files(tmp_path / str(i)) for i in range(6)]
    assert len(made[0]) == 3 and all(m == made[0] for m in made)


@pytest.mark.parametrize("safe", FORMATS.values(), ids=FORMATS)
def test_a_step_of_training_meanwhile_does_not_spoil_the_file(tmp_path, monkeypatch, safe):
    model = adapter.__wrapped__(OLD)  # others use the cached one
    before = {key: t.clone() for key, t in graft.get_peft_model_state_dict(model).items()}
    save = graft.config.pair.save_pair

    def and_step(*args):
        for t in graft.get_peft_model_state_dict(model).values():
            t.data += 1  # as an optimizer's step in another thread
        save(*args)

    monkeypatch.setattr("graft.config.pair.save_pair", and_step)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    found = graft.get_peft_model_state_dict(graft.PeftModel.from_pretrained(net(), tmp_path))
    assert all(torch.equal(found[key], t) for key, t in before.items())


# what is written


def test_an_adapter_that_is_gone_does_not_replace_a_good_one(tmp_path):
    adapter(OLD).save_pretrained(tmp_path)
    before = files(tmp_path)
    for leave in ("merge_and_unload", "unload", "delete_adapter"):
        model = graft.get_peft_model(net(), graft.LoraConfig(target_modules=["0"]))
        getattr(model, leave)(*(["default"] if leave == "delete_adapter" else []))
        with pytest.raises(graft.CheckpointError, match=r"no (tensor|adapter)|nothing"):
            model.save_pretrained(tmp_path)
        assert files(tmp_path) == before


PARTS = {"slice": lambda t: t[:1], "flat slice": lambda t: t.flatten()[:3], "empty": lambda t: t.new_empty(0)}


@pytest.mark.differs(
    "a shard or an empty tensor in `state_dict`, or in a model that no known layout has spread; no tensor at all, "
    "after `unload()`"
)
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("of", ["lora_A", "modules_to_save", "prompt"])
def test_parts_of_tensors_are_refused(tmp_path, kind, of):
    from tests import models

    if of == "prompt":
        made = graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model, key = graft.get_peft_model(models.make("llama"), made), "prompt_encoder.default.embedding.weight"
    else:
        saved = graft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
        key = {"lora_A": "0.lora_A.default.weight", "modules_to_save": "1.modules_to_save.default.weight"}[of]
        model, key = graft.get_peft_model(net(), saved), f"base_model.model.{key}"
    state = model.state_dict()
    model.save_pretrained(tmp_path, state_dict=state)
    before = files(tmp_path)
    state[key] = PARTS[kind](state[key])
    with pytest.raises(graft.CheckpointError, match=r"Gather the whole tensors.*state_dict=") as told:
        model.save_pretrained(tmp_path, state_dict=state)
    assert key in str(told.value) and files(tmp_path) == before


@pytest.mark.parametrize("kind", ["flat slice", "empty"])
def test_a_model_of_parts_takes_gathered_tensors_only(tmp_path, kind):
    """FSDP with flat parameters leaves slices in the model, ZeRO-3 empty tensors."""
    model = graft.get_peft_model(net(), graft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    whole = {key: t.clone() for key, t in model.state_dict().items()}
    for p in model.parameters():
        p.data = PARTS[kind](p.data)
        if kind == "flat slice":
            p._fsdp_flattened = True
    for state in (None, model.state_dict()):
        with pytest.raises(graft.CheckpointError, match="Gather the whole tensors"):
            model.save_pretrained(tmp_path, state_dict=state)
    assert not files(tmp_path)
    model.save_pretrained(tmp_path, state_dict=whole)
    stored = safetensors.torch.load_file(tmp_path / TENSORS)
    assert torch.equal(stored["base_model.model.0.lora_A.weight"], whole["base_model.model.0.lora_A.default.weight"])


CARDS = {
    "no text": b"\xff\xfe\x00",
    "no YAML": b"---\na: [\n---\n",
    "no mapping": b"---\n- 1\n---\n",
    "tags": b"---\ntags: 3\n---\n",
}


@pytest.mark.differs("README.md that cannot be read or written")
@pytest.mark.parametrize("kind", CARDS)
def test_a_broken_card_does_not_fail_a_save(tmp_path, kind):
    (tmp_path / CARD).write_bytes(CARDS[kind])
    with pytest.warns(graft.PeftWarning, match=r"is saved; .*README.md could not be written"):
        adapter(NEW).save_pretrained(tmp_path)
    assert held(tmp_path) == (NEW, NEW) and (tmp_path / CARD).read_bytes() == CARDS[kind]


def test_a_folder_in_place_of_the_card(tmp_path):
    (tmp_path / CARD).mkdir()
    with pytest.warns(graft.PeftWarning, match="README.md could not be written"):
        adapter(NEW).save_pretrained(tmp_path)
    assert held(tmp_path) == (NEW, NEW) and BIN not in files(tmp_path)
