# SPDX-License-Identifier: Apache-2.0
"""Short cuts of the life cycle leave nothing behind: the garbage collector, files, remembered flags."""

import copy
import gc
import io
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.inject import parts
from graft.inject.job import Options
from graft.io.files import read_safetensors
from tests.looks import get_registry
from tests.models import seeded


def net():
    with seeded(0):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def config(**options):
    return graft.LoraConfig(r=2, target_modules=["0", "2"], **options)


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def of(name):
    return {f"base_model.model.{i}.lora_{x}.{name}.weight" for i in (0, 2) for x in "AB"}


# the collector


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_collector_is_as_it_was(enabled, fails):
    was, threshold = gc.isenabled(), gc.get_threshold()
    (gc.enable if enabled else gc.disable)()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="on the way"):
                model = graft.get_peft_model(net(), config())
                get_registry(model).add_adapter("b", config(), Options(values=Failing()))
        else:
            graft.get_peft_model(net(), config())
        assert gc.isenabled() is enabled and gc.get_threshold() == threshold
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize(
    "enabled, objects, frozen, calls",
    [
        (True, 10_001, 0, ["disable", "freeze", "unfreeze", "enable"]),
        (True, 10_000, 0, ["disable", "enable"]),
        (True, 10_001, 5, ["disable", "enable"]),  # unfreeze() would undo the caller's freeze
        (False, 10_001, 0, ["disable"]),
    ],
)
def test_many_new_objects_count_as_old_unless_the_caller_froze_some(monkeypatch, enabled, objects, frozen, calls):
    counts, seen = iter([(7, 0, 0), (7 + objects, 0, 0)]), []
    answers = {"isenabled": lambda: enabled, "get_count": lambda: next(counts), "get_freeze_count": lambda: frozen}
    noted = {name: partial(seen.append, name) for name in ("disable", "enable", "freeze", "unfreeze")}
    monkeypatch.setattr(parts, "gc", SimpleNamespace(**answers, **noted))
    with parts.pause_collector():
        assert seen == ["disable"]
    assert seen == calls


class Failing:
    """Values that do not come."""

    names = ()

    def make_head(self, key, module):
        return None

    def check_room(self, numbers):
        pass

    def match_entries(self, parts, adapter):
        raise RuntimeError("on the way")


# files


def test_a_file_holds_what_safetensors_reads(tmp_path):
    path = str(tmp_path / "x.safetensors")
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
    made = {f"k{i}": (torch.randn(3, i + 1) * 9).to(dtype) for i, dtype in enumerate(kinds)}
    save_file(made, path, metadata={"format": "pt"})
    ours, theirs = read_safetensors(path).tensors, load_file(path)
    assert ours.keys() == theirs.keys()
    for key, t in theirs.items():
        assert ours[key].dtype == t.dtype and torch.equal(ours[key], t)
    assert len({t.untyped_storage().data_ptr() for t in ours.values()}) == len(ours)


def test_writing_to_what_was_read_leaves_the_file(tmp_path):
    path = str(tmp_path / "x.safetensors")
    save_file({"a": torch.ones(4)}, path)
    read_safetensors(path).tensors["a"].add_(1)
    assert torch.equal(load_file(path)["a"], torch.ones(4))


@pytest.mark.parametrize("what", ["overwritten", "truncated"])
def test_a_running_model_does_not_depend_on_the_file_it_came_from(what, tmp_path):
    made = graft.get_peft_model(net(), config(init_lora_weights=False))
    swapped = graft.get_peft_model(net(), config())
    x, path = torch.randn(2, 6), tmp_path / "adapter_model.safetensors"
    made.save_pretrained(tmp_path)
    model = graft.PeftModel.from_pretrained(net(), tmp_path)
    graft.hotswap_adapter(swapped, tmp_path, "default")
    with open(path, "r+b") as f:  # in place, as `cp` does it
        f.write(b"\0" * path.stat().st_size) if what == "overwritten" else f.truncate(0)
    assert torch.equal(model(x), made(x)) and torch.equal(swapped(x), made(x))


@pytest.mark.parametrize("odd", ["empty", "bool"])
def test_tensors_that_no_adapter_has_are_read(odd, tmp_path):
    path = str(tmp_path / "x.safetensors")
    made = {"a": torch.ones(4), "b": torch.empty(0, 3) if odd == "empty" else torch.tensor([True, False])}
    save_file(made, path)
    held = read_safetensors(path).tensors
    assert held.keys() == made.keys() and all(torch.equal(held[k], t) for k, t in made.items())


# which parameters train


@pytest.mark.parametrize("change", ["double", "deepcopy", "pickle", "reload"])
def test_switching_reaches_parameters_that_were_replaced(change, tmp_path):
    model = graft.get_peft_model(net(), config(), "a")
    model.add_adapter("b", config())
    model.set_adapter("b")
    model.set_adapter("a")
    if change == "double":
        for module in list(model.modules()):  # new Parameter objects, as sharding makes them
            for name, p in list(module._parameters.items()):
                if p is not None:
                    setattr(module, name, nn.Parameter(p.data.double(), p.requires_grad))
    elif change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "pickle":
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        model = torch.load(stream, weights_only=False)
    else:
        model.save_pretrained(tmp_path)
        model.delete_adapter("b")
        model.load_adapter(tmp_path / "b", "b")
    model.set_adapter("b")
    assert training(model) == of("b")
    model.set_adapter("a")
    assert training(model) == of("a")
    model.set_adapter("b", inference_mode=True)
    assert training(model) == set()


def test_several_active_adapters_train_together():
    model = graft.get_peft_model(net(), config(), "a")
    model.add_adapter("b", config())
    model.base_model.set_adapter(["a", "b"])
    assert training(model) == of("a") | of("b")


@pytest.mark.differs("a base on the meta device")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_nothing_is_drawn_for_a_base_on_meta():
    with torch.device("meta"):
        base = nn.Linear(6, 8)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = graft.get_peft_model(nn.Sequential(base), graft.LoraConfig(r=2, target_modules=["0"]))
    graft.set_peft_model_state_dict(model, {})  # what got no value stays on meta
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta for p in model.parameters())
