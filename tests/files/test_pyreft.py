# SPDX-License-Identifier: Apache-2.0
"""pyreft's folders: what it saved computes here what it computed there, and what graft writes is what it saves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

import graft
from graft.core.errors import BaseModelMismatchError, CheckpointError, LossError, PeftWarning
from graft.files import formats
from graft.files.convert import convert_adapter_file
from graft.files.errors import BaseNeededError
from graft.files.formats.adapterhub_places import make_parametrized
from tests.looks import layers
from tests.methods.make_reft_steering import IDS

HERE = Path(__file__).parents[1] / "methods" / "fixtures"
BASE, SAVED = HERE / "adapterhub" / "llama", HERE / "pyreft"
VERSION = {"transformers_version": "4.45.1"}
AT = {"loreft": (2, 1), "direft": (3, 0)}  # tokens from the first, and to the last


def base():
    return AutoModel.from_pretrained(BASE, attn_implementation="eager").eval()


def loaded(tmp_path, name):
    first, last = AT[name]
    return graft.load_adapter(
        base(), copy(tmp_path, name, graft=dict(prefix_positions=first, suffix_positions=last))
    ).eval()


def copy(tmp_path, name, **fields):
    """A folder whose config says something else."""
    shutil.copytree(SAVED / name, tmp_path / "copy")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | fields))
    return tmp_path / "copy"


@pytest.mark.parametrize("name", AT)
@torch.no_grad()
def test_it_computes_what_it_computed_there(name, tmp_path):
    y = loaded(tmp_path, name)(IDS).last_hidden_state
    assert (y - base()(IDS).last_hidden_state).abs().max() > 0.1
    assert_close(y, load_file(SAVED / name / "outputs.safetensors")["y"], rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_tokens_that_it_does_not_say():
    with pytest.warns(PeftWarning, match="the first 3 of a prompt and the last 3 are taken"):
        model = graft.load_adapter(base(), SAVED / "loreft")
    config = model.peft_config["default"]
    assert (config.prefix_positions, config.suffix_positions, config.layers) == (3, 3, "all")
    with pytest.warns(PeftWarning, match="the first 3 of a prompt are taken"):
        model = graft.load_adapter(base(), SAVED / "direft")
    assert layers(model).keys() == {"layers.1"} and model.peft_config["default"].suffix_positions == 0


def said(file):
    """What a file of an intervention says: torch keeps an orthonormal matrix in one of many forms."""
    held = dict(torch.load(file))
    turned = [key for key in held if "parametrizations" in key]
    if turned:
        parts = {key.rpartition("weight.")[2]: held.pop(key) for key in turned}
        layer = make_parametrized(*parts["original"].shape)
        layer.load_state_dict({f"parametrizations.weight.{key}": t for key, t in parts.items()})
        held["rotate_layer"] = layer.weight.detach()
    return held


@pytest.mark.parametrize("name", AT)
@torch.no_grad()
def test_what_is_written_is_what_it_saves(name, tmp_path):
    model = loaded(tmp_path, name)
    model.save_pretrained(tmp_path / "peft")
    assert convert_adapter_file(tmp_path / "peft", "pyreft", tmp_path / "back", BASE).lost == []
    theirs = sorted(file.name for file in (SAVED / name).glob("*.bin"))
    assert theirs == sorted(file.name for file in (tmp_path / "back").glob("*.bin"))
    for file in theirs:
        assert_close(said(tmp_path / "back" / file), said(SAVED / name / file))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (SAVED / name, tmp_path / "back")]
    assert configs[0] == {key: value for key, value in (configs[1] | VERSION).items() if key != "graft"}
    again = graft.load_adapter(base(), tmp_path / "back").eval()  # it says the positions
    assert_close(again(IDS).last_hidden_state, model(IDS).last_hidden_state)


@pytest.mark.parametrize("preset", ["noreft", "direft"])
@torch.no_grad()
def test_free_projections_there_and_back(preset, tmp_path):
    model = graft.get_peft_model(base(), graft.ReftConfig.preset(preset, r=2, suffix_positions=1, tied_weights=True))
    model.eval().save_pretrained(tmp_path / "peft")
    convert_adapter_file(tmp_path / "peft", "pyreft", tmp_path / "out", BASE)
    again = graft.load_adapter(base(), tmp_path / "out").eval()
    assert_close(again(IDS).last_hidden_state, model(IDS).last_hidden_state, rtol=0, atol=0)


def test_bad_files(tmp_path):
    with pytest.raises(BaseNeededError, match="Give the base model"):
        formats.read(SAVED / "loreft")
    file = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
    config = json.loads((SAVED / "direft/config.json").read_text())
    for fields, error, text in (
        ({"sorted_keys": []}, CheckpointError, "one key and one class for each"),
        ({"intervention_types": ["<class 'pyreft.interventions.ConsreftIntervention'>"]}, CheckpointError, "Consreft"),
        ({"sorted_keys": ["../elsewhere"]}, CheckpointError, "is no name of an intervention"),
        ({"sorted_keys": ["other"]}, CheckpointError, "lacks intkey_other.bin"),
        ({"representations": [[7, *config["representations"][0][1:]]]}, BaseModelMismatchError, "after block 7"),
        ({"representations": [[1, "mlp_output", "pos"]]}, CheckpointError, "of 'mlp_output', by 'pos'"),
    ):
        with pytest.raises(error, match=text):
            graft.load_adapter(base(), copy(tmp_path, "direft", **fields))
        shutil.rmtree(tmp_path / "copy")
    folder = copy(tmp_path, "direft")
    torch.save({"weight": torch.zeros(2, 8)}, folder / file)
    with pytest.raises(CheckpointError, match="does not hold A, b and R"):
        graft.load_adapter(base(), folder)


def test_what_its_files_cannot_hold(tmp_path):
    for options, text in (
        (dict(non_linearity="relu"), "non_linearity=relu"),
        (dict(target_modules=["q_proj"]), "which is no block"),
    ):
        graft.get_peft_model(base(), graft.ReftConfig(r=2, **options)).save_pretrained(tmp_path / "peft")
        with pytest.raises(LossError, match=text):
            convert_adapter_file(tmp_path / "peft", "pyreft", tmp_path / "out", BASE)
        assert not (tmp_path / "out").exists()
    graft.get_peft_model(base(), graft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    with pytest.raises(LossError, match="ReFT alone"):
        convert_adapter_file(tmp_path / "peft", "pyreft", tmp_path / "out", BASE)
