# SPDX-License-Identifier: Apache-2.0
"""Config classes of clients that write and read a file of their own, and configs as clients make them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

import peft
import pytest
import torch
from peft.config import PeftConfigMixin
from torch import nn

import graft
from tests.pair import LIBS
from tests.raised import refuses, warns

LIB = pytest.mark.parametrize("lib", LIBS, ids=lambda lib: lib.__name__)
MORE = "more.json"


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def own(lib):
    """A config class with a field in a file of its own, which its `from_pretrained` reads."""
    mixin = PeftConfigMixin if lib is peft else graft.PeftConfig
    origin = mixin.from_pretrained

    @dataclass
    class Own(lib.LoraConfig):
        ratio: float = 1.0

        def save_pretrained(self, save_directory, **kwargs):
            values = asdict(self)
            values.pop("ratio")
            lib.LoraConfig(**values).save_pretrained(save_directory, **kwargs)
            with open(os.path.join(save_directory, MORE), "w") as f:
                json.dump({"ratio": self.ratio}, f)

        @classmethod
        def from_pretrained(cls, where, subfolder=None, **kwargs):
            read = origin(where, subfolder, **kwargs)
            made = cls(**{k: v for k, v in read.to_dict().items() if k != "runtime_config"})
            with open(os.path.join(where, subfolder or "", MORE)) as f:
                made.ratio = json.load(f)["ratio"]
            return made

    return Own


@pytest.fixture
def reads(monkeypatch):
    """A function that makes the class and has its `from_pretrained` in the mixin's place."""

    def replace(lib):
        cls = own(lib)
        mixin = PeftConfigMixin if lib is peft else graft.PeftConfig
        monkeypatch.setattr(mixin, "from_pretrained", cls.from_pretrained)
        return cls

    return replace


def tree(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "README.md"}


@LIB
def test_a_file_of_its_own_is_written_and_read(lib, reads, tmp_path):
    cls = reads(lib)
    model = lib.get_peft_model(base(), cls(r=2, target_modules=["0"], ratio=3.0))
    model.add_adapter("b", cls(r=2, target_modules=["1"], ratio=5.0))
    model.save_pretrained(tmp_path)
    for folder, ratio in (tmp_path, 3.0), (tmp_path / "b", 5.0):
        assert {f.name for f in folder.iterdir() if f.is_file()} - {"README.md"} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            MORE,
        }
        assert json.loads((folder / MORE).read_text()) == {"ratio": ratio}
        stored = json.loads((folder / "adapter_config.json").read_text())
        assert "ratio" not in stored and stored["inference_mode"] and stored["auto_mapping"] is not None
    again = lib.PeftModel.from_pretrained(base(), str(tmp_path))
    again.load_adapter(str(tmp_path), "b", subfolder="b")
    assert [(type(c), c.ratio) for c in again.peft_config.values()] == [(cls, 3.0), (cls, 5.0)]
    x = torch.randn(5, 3)
    for name in ("default", "b"):
        model.set_adapter(name), again.set_adapter(name)
        assert torch.equal(model.eval()(x), again(x))


@pytest.mark.parametrize("writer, reader", [LIBS, LIBS[::-1]], ids=["from graft", "from peft"])
def test_such_files_go_both_ways(writer, reader, reads, tmp_path):
    writer.get_peft_model(base(), reads(writer)(target_modules=["0"], ratio=7.0)).save_pretrained(tmp_path)
    assert reader.PeftModel.from_pretrained(base(), str(tmp_path)).peft_config["default"].r == 8
    cls = reads(reader)
    made = reader.PeftModel.from_pretrained(base(), str(tmp_path)).peft_config["default"]
    assert type(made) is cls and made.ratio == 7.0


def fails(self, folder, **_):
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        f.write("{}")
    raise RuntimeError("the disk is blue")


def forgets(self, folder, **_):
    pass


def writes(name):
    def write(self, folder, **_):
        graft.LoraConfig.save_pretrained(graft.LoraConfig(), folder)
        with open(os.path.join(folder, name), "w") as f:
            f.write("{")

    return write


def makes_a_folder(self, folder, **_):
    graft.LoraConfig.save_pretrained(graft.LoraConfig(), folder)
    os.mkdir(os.path.join(folder, "inside"))


@pytest.mark.differs("a config class whose own `save_pretrained` fails, or writes a weights file or a folder")
@pytest.mark.parametrize(
    "save, text",
    [
        (fails, "RuntimeError: the disk is blue"),
        (forgets, "adapter_config.json"),
        (writes("adapter_config.json"), "not valid JSON"),
        (writes("adapter_model.bin"), "adapter_model.bin"),
        (makes_a_folder, "inside"),
    ],
    ids=["fails", "forgets", "no JSON", "weights", "folder"],
)
def test_a_save_of_its_own_that_fails(save, text, monkeypatch, tmp_path):
    """The old files stay, and another save works."""
    cls = own(graft)
    model = graft.get_peft_model(base(), cls(target_modules=["0"], ratio=3.0))
    model.save_pretrained(tmp_path)
    before = tree(tmp_path)
    nn.init.ones_(model.base_model.model[0].lora_B["default"].weight)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "save_pretrained", save)
        with pytest.raises(graft.CheckpointError, match=rf"Own\.save_pretrained.*nothing was saved.*{text}"):
            model.save_pretrained(tmp_path)
        assert tree(tmp_path) == before
        refuses(graft.CheckpointError, None, model.save_pretrained, tmp_path / "new")
        assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path)
    assert tree(tmp_path) != before


def test_files_beside_that_cannot_be_put_in_place(tmp_path):
    """The adapter is whole, the new one, and its config fits it."""
    cls = own(graft)
    model = graft.get_peft_model(base(), cls(target_modules=["0"]))
    (tmp_path / MORE).mkdir()
    refuses(OSError, None, model.save_pretrained, tmp_path)
    assert graft.PeftModel.from_pretrained(base(), tmp_path).peft_config["default"].target_modules == {"0"}


def test_a_replaced_reader_that_returns_no_config(monkeypatch, tmp_path):
    graft.get_peft_model(base(), graft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    monkeypatch.setattr(graft.PeftConfig, "from_pretrained", classmethod(lambda cls, *_, **__: {"r": 8}))
    model = base()
    names = list(model.state_dict())
    with pytest.raises(graft.ConfigTypeError, match=r"from_pretrained\(\) returned .* no config"):
        graft.PeftModel.from_pretrained(model, tmp_path)
    assert list(model.state_dict()) == names


WITHIN = [
    {},
    {"runtime_config": "LoraRuntimeConfig"},
    {"eva_config": "EvaConfig", "init_lora_weights": "eva"},
    {"velora_config": "VeloraConfig"},
    {"kasa_config": "KasaConfig"},
    {"monteclora_config": "MontecloraConfig"},
    {"lora_ga_config": "LoraGAConfig", "init_lora_weights": "lora_ga"},
]


@pytest.mark.parametrize("within", WITHIN, ids=lambda w: next(iter(w), "plain"))
def test_configs_made_of_their_fields(within):
    """`LoraConfig(**asdict(config))`: the configs inside are dicts."""
    options = {k: getattr(graft, v)() if k.endswith("config") else v for k, v in within.items()}
    config = graft.LoraConfig(target_modules=["0"], **options)
    again = graft.LoraConfig(**asdict(config))
    assert again == config and isinstance(again.runtime_config, graft.LoraRuntimeConfig)
    assert graft.LoraConfig(runtime_config={"ephemeral_gpu_offload": True}).runtime_config.ephemeral_gpu_offload
    warns(UserWarning, r"'ephemeral'.*LoraRuntimeConfig", graft.LoraConfig, runtime_config={"ephemeral": True})
    refuses(graft.ConfigTypeError, "runtime_config", graft.LoraConfig, runtime_config=3)
