# SPDX-License-Identifier: Apache-2.0
"""A base's folder may come from elsewhere: none of its code runs, nobody is asked, and no host is."""

from __future__ import annotations

import builtins
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    TrOCRConfig,
)

import graft
from graft.command import app
from graft.command.models import load_base
from graft.core.errors import CheckpointError, ConfigError
from graft.files.bases import open_base
from graft.files.merging.merge import merge_files
from graft.files.skeleton import build_meta_model, build_model_config, find_model_class
from tests.models import adapted
from tests.raised import refuses

LLAMA = Path(__file__).parents[1] / "files" / "fixtures" / "base_llama"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("RAN").write_text("")
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def asked(monkeypatch):
    """What is asked on the terminal, where somebody says yes, and which hosts are."""
    found = []
    monkeypatch.setattr(builtins, "input", lambda text="": found.append(text) or "y")
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: [] if host == "127.0.0.1" else found.append(host))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return found


@pytest.fixture
def base(tmp_path, asked):
    """A folder with a model and code; afterwards that has not run, and nobody was asked."""
    folder = tmp_path / "base"
    shutil.copytree(LLAMA, folder)
    (folder / "own.py").write_text(CODE)
    yield folder
    assert asked == [] and not [*tmp_path.rglob("RAN")]
    assert not any("transformers_modules" in name and "own" in name for name in sys.modules)


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters of that model: the first is merged by the model, the second by names alone."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, kind in ("hra", graft.HRAConfig), ("lora", graft.LoraConfig):
        adapted(load_base(LLAMA), kind(r=2, target_modules=["q_proj"])).save_pretrained(folder / name)
    return folder


OWN = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}
CONFIGS = {
    "unknown": {"model_type": "own", "auto_map": OWN, "architectures": ["Model"]},
    "known": {"auto_map": OWN},
    "other class": {"auto_map": OWN, "architectures": ["Model"]},
    "elsewhere": {"model_type": "own", "auto_map": {k: f"me/it--{v}" for k, v in OWN.items()}},
    "kernel": {"attn_implementation": "kernels-community/flash-attn2"},
}
VERBS = [
    "plan {base} --rank 2", "merge {base} {adapter} -o {out}", "inspect {adapter} --base {base}",
    "convert {adapter} --to peft --base {base} -o {out}", "lint {adapter} --base {base}",
    "export {lora} --for vllm --base {base} -o {out}", "check {lora} --for vllm --base {base}",
    "export {adapter} --for vllm --base {base} -o {out} --rank 2", "extract {base} {base} -o {out}",
    "verify --url http://127.0.0.1:9 --adapter {lora} --base {base}",
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_no_verb_runs_code_of_a_base(base, adapters, tmp_path, monkeypatch, capsys, kind, verb):
    edit(base, **CONFIGS[kind])
    line = verb.format(base=base, adapter=adapters / "hra", lora=adapters / "lora", out=tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["graft", *line.split()])
    with pytest.raises(SystemExit) as left:
        app.main()
    said = capsys.readouterr()
    assert left.value.code in (None, 0, 1, 2, 3, 4, 5) and "Traceback" not in said.err


def test_a_config_with_code_is_read_without_it(base, adapters, tmp_path):
    edit(base, **CONFIGS["known"], attn_implementation="kernels-community/flash-attn2")
    config = build_model_config(str(base))
    assert config.model_type == "llama" and not hasattr(config, "auto_map")
    assert config._attn_implementation is None and config._name_or_path == str(base)
    assert type(build_meta_model(str(base))).__name__ == "LlamaForCausalLM"
    loaded = load_base(base)
    assert type(loaded).__name__ == "LlamaForCausalLM" and loaded.config._attn_implementation != "kernels-community"
    account = merge_files(base, adapters / "hra", tmp_path / "out")
    assert account.tensors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == OWN  # for who trusts it


def test_code_that_a_part_of_a_config_names_does_not_run(base):
    """transformers itself asks for that of a part, though it was told not to run any."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = TrOCRConfig(vocab_size=32, d_model=8, decoder_layers=1, decoder_ffn_dim=8, decoder_attention_heads=2)
    fields = LlavaConfig(vision_config=vision, text_config=text).to_dict()
    fields["text_config"]["auto_map"] = {"AutoModel": f"{base}--own.Model"}
    fields["architectures"] = ["LlavaForConditionalGeneration"]
    (base / "config.json").write_text(json.dumps(fields, default=str))
    refuses(CheckpointError, "transformers cannot build the model", build_meta_model, str(base))
    refuses(CheckpointError, None, load_base, base)


@pytest.mark.parametrize(
    "names", [["pipeline"], ["Trainer"], ["AutoModel"], ["__name__"], ["set_seed"], ["LlamaConfig"], [5], 5, [["x"]]]
)
def test_an_architecture_is_a_class_of_models(base, names):
    edit(base, architectures=names)
    assert type(build_meta_model(str(base))).__name__ == "LlamaModel"
    (base / "model.safetensors").rename(base / "weights")
    assert open_base(base).shapes
    (base / "weights").rename(base / "model.safetensors")
    refuses(ConfigError, r"transformers \S+ cannot build the model", load_base, base)


def test_an_adapter_in_the_folder_does_not_lead_to_another_base(base, adapters):
    """transformers would load the one that its config names."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapters / "lora" / name, base)
    refuses(CheckpointError, "a model and an adapter", load_base, base)


def test_names_that_are_classes_of_models():
    assert find_model_class("LlamaModel").__name__ == "LlamaModel"
    assert find_model_class("PreTrainedModel") and not any(
        map(find_model_class, ("pipeline", "Trainer", "", None, 5, "NoSuch"))
    )


def test_a_model_of_diffusers_is_a_class_of_models(base):
    pytest.importorskip("diffusers")
    (base / "model.safetensors").unlink()
    for name in ("StableDiffusionPipeline", "logging", "DDIMScheduler", "NoSuch", 5):
        edit(base, _class_name=name)
        refuses(CheckpointError, "no model can be made", open_base, base)


@pytest.mark.parametrize(
    "fields",
    [{"num_hidden_layers": 10**9}, {"num_labels": 10**12}, {"text_config": {"num_local_experts": 10**8}},
     {"model_type": "detr", "backbone": "me/it", "use_timm_backbone": False}],
)  # fmt: skip
def test_a_config_that_would_take_hours_or_ask_elsewhere(base, fields):
    edit(base, **fields)
    refuses(CheckpointError, r"config\.json (says|names)", build_meta_model, str(base))


@pytest.mark.parametrize("fields", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"rope_scaling": 5},
                                    {"vocab_size": -1}, {"model_type": ["llama"]}, {"layer_types": {}}])  # fmt: skip
def test_a_config_of_wrong_values_is_told_or_of_no_known_model(base, fields):
    edit(base, **fields)
    try:
        build_meta_model(str(base))
    except CheckpointError as e:
        assert str(base) in str(e)


def test_a_config_with_infinity(tmp_path):
    """As Mamba2's files have it, by releases of transformers that write it so."""
    config = Mamba2Config(
        hidden_size=8, num_hidden_layers=1, vocab_size=16, state_size=4, num_heads=4, head_dim=4, expand=2, n_groups=1
    )
    Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_step_limit": [0.0, float("inf")]}))
    assert "Infinity" in path.read_text()
    assert (
        type(build_meta_model(str(tmp_path))).__name__ == "Mamba2ForCausalLM"
        and open_base(tmp_path).config["model_type"]
    )
    model = graft.get_peft_model(load_base(tmp_path), graft.LoraConfig(r=2, target_modules=["in_proj"]))
    model.save_pretrained(tmp_path / "adapter")


def test_the_class_of_a_config_stays_what_it_was(tmp_path):
    """What is left out says nothing of the model."""
    config = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    config.save_pretrained(tmp_path)
    ours, theirs = build_model_config(str(tmp_path)), AutoConfig.from_pretrained(tmp_path)
    assert ours.to_dict() == theirs.to_dict() and type(ours) is type(theirs)
