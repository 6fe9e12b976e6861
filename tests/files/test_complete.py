# SPDX-License-Identifier: Apache-2.0
"""Files that are not whole: every verb says so where a model in memory refuses them, and calls no whole file so."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.core.errors import CheckpointError, LossError
from graft.files.base import read_base_files
from graft.files.convert import convert_adapter_file
from graft.files.export import export_adapter_file
from graft.files.formats import read
from graft.files.lint import lint_adapter, list_gaps
from graft.files.resize import resize_adapter
from graft.files.serving import check_servers, list_servers
from tests import models
from tests.families import base as family
from tests.leaves_out import FUSED_EXPERTS
from tests.model.test_adapter_tensors import with_experts
from tests.pair import adapt
from tests.samples import SAMPLES, over

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DAMAGE = {  # what is gone → fields of the config, what stays of the file, what the verbs say
    "magnitudes": (dict(use_dora=True), lambda key: "magnitude" not in key, "the magnitude of model.layers.0"),
    "biases of B": (dict(lora_bias=True), lambda key: "lora_B.bias" not in key, "the bias of model.layers.0"),
    "half of the layers": ({}, lambda key: "layers.1" not in key, "model.layers.1"),
    "a target": ({}, lambda key: "q_proj" not in key, "q_proj"),
    "one target of a layer": ({}, lambda key: "layers.1.self_attn.q_proj" not in key, "layers.1.self_attn.q_proj"),
    "a head": (dict(modules_to_save=["lm_head"]), lambda key: "lm_head" not in key, "lm_head of modules_to_save"),
    "rows": (dict(trainable_token_indices=[1, 2]), lambda key: "token" not in key, "trainable_token_indices"),
    "all": ({}, lambda key: False, "every tensor"),
    "B": ({}, lambda key: "lora_B" not in key, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete") / "base"
    models.make("llama").save_pretrained(folder)
    return folder


def damaged(folder, fields, keeps):
    """Save an adapter of PEFT, and take tensors out of its file."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=2, init_lora_weights=False, **fields)
    peft.get_peft_model(models.make("llama"), config).save_pretrained(folder)
    tensors = {key: t for key, t in load_file(folder / WEIGHTS).items() if keeps(key)}
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("name", DAMAGE)
def test_what_a_model_in_memory_refuses_every_verb_tells(name, base, tmp_path):
    fields, keeps, says = DAMAGE[name]
    damaged(tmp_path / "a", fields, keeps)
    files = read_base_files(base)
    adapter = read(tmp_path / "a", files)
    with pytest.raises((graft.AdapterKeyError, CheckpointError)):
        graft.PeftModel.from_pretrained(models.make("llama"), tmp_path / "a")
    errors = {f.rule: f.text for f in lint_adapter(adapter, files) if f.severity == "error"}
    assert errors.keys() == {"not-whole" if says else "orphan-key"} and (says or "lora_A") in next(
        iter(errors.values())
    )
    for server in list_servers():
        found = {f.condition: f for f in check_servers(adapter, [server], files)}
        told = found["not_whole" if says else "unknown_keys"]
        assert not told.ok and (says or "lora_A") in told.what
    for verb in (
        lambda: graft.merge_files(base, tmp_path / "a", tmp_path / "out"),
        lambda: export_adapter_file(adapter, "vllm", files, str(tmp_path / "out")),
        lambda: convert_adapter_file(tmp_path / "a", "mlx", tmp_path / "out", base),
        lambda: convert_adapter_file(tmp_path / "a", "peft", tmp_path / "out", base),
    ):
        with pytest.raises((CheckpointError, LossError)) as raised:
            verb()
        assert says is None or says in str(raised.value) or name == "all"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["magnitudes", "biases of B", "a head", "rows", "all"])
def test_what_is_seen_without_a_base(name, tmp_path):
    fields, keeps, says = DAMAGE[name]
    damaged(tmp_path / "a", fields, keeps)
    adapter = read(tmp_path / "a")
    assert says in " ".join(list_gaps(adapter))
    with pytest.raises(CheckpointError, match="is not whole: it lacks"):
        resize_adapter(adapter, rank=1)


def test_keys_with_the_adapters_name(base, tmp_path):
    """As a state dict has them, and no file that anything reads."""
    damaged(tmp_path / "a", {}, lambda key: True)
    tensors = {key.replace(".weight", ".default.weight"): t for key, t in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    files = read_base_files(base)
    adapter = read(tmp_path / "a", files)
    for server in list_servers():
        assert "default" in {f.condition: f.what for f in check_servers(adapter, [server], files)}["unknown_keys"]
    assert "orphan-key" in {f.rule for f in lint_adapter(adapter)}


def gaps(base, adapted, folder):
    """What the files of an adapter lack, beside those of a base."""
    base.save_pretrained(folder / "base")
    adapted.save_pretrained(folder / "a")
    files = read_base_files(folder / "base")
    return list_gaps(read(folder / "a", files), files)


SELECTED = [s for s in SAMPLES if "forward" not in s.unlike]


@over(SELECTED)
def test_a_whole_file_lacks_nothing(sample, tmp_path):
    model, made = adapt(graft, sample), models.make(sample.model)
    if hasattr(made, "save_pretrained"):
        assert gaps(made, model, tmp_path) == []
    else:
        model.save_pretrained(tmp_path / "a")
        assert list_gaps(read(tmp_path / "a")) == []


@pytest.mark.parametrize("change", [
    {"target_modules": "all-linear"}, {"target_modules": r".*layers\.1\..*(q|v)_proj"}, {"layers_to_transform": [1]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"]}, {"exclude_modules": r".*layers\.0\..*"},
    {"target_modules": ["q_proj", "nowhere"]}, {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    {"bias": "all"}, {"bias": "lora_only"}, {"layer_replication": [[0, 2], [1, 2]]},
])  # fmt: skip
def test_configs_that_select_less(change, base, tmp_path):
    options = {"target_modules": ["q_proj", "v_proj"]} | change
    model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(r=2, **options))
    model.save_pretrained(tmp_path / "a")
    files = read_base_files(base)
    assert list_gaps(read(tmp_path / "a", files), files) == []


def test_a_text_models_adapter_on_files_of_a_multimodal_one(tmp_path):
    """Its targets have names in the vision tower, too."""
    config = graft.LoraConfig(r=2, target_modules=["q_proj", "fc1"])
    assert gaps(family("llava"), graft.get_peft_model(family("llava").model.language_model, config), tmp_path) == []


def test_a_classifiers_head_is_there_under_one_of_its_names(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = BertForSequenceClassification(BertConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    config = graft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    graft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    assert {"classifier", "score"} <= {*json.loads((tmp_path / "a" / CONFIG).read_text())["modules_to_save"]}
    files = read_base_files(tmp_path / "base")
    assert list_gaps(read(tmp_path / "a")) == list_gaps(read(tmp_path / "a", files), files) == []


@FUSED_EXPERTS
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_stacks_of_experts(name, tmp_path):
    """vLLM takes PEFT's stacks for some models only, and export none: what it says is how to write them."""
    family(name).save_pretrained(tmp_path / "base")
    with_experts(name).save_pretrained(tmp_path / "a")
    files = read_base_files(tmp_path / "base")
    adapter = read(tmp_path / "a", files)
    assert list_gaps(adapter, files) == []
    found = {f.condition: f for f in check_servers(adapter, ["vllm"], files)}
    assert ("stacks_of_peft" in found) == (name != "gpt_oss")
    assert "stacks_of_peft" in {f.condition for f in check_servers(adapter, ["vllm"])}
    assert name == "gpt_oss" or "save_pretrained" in found["stacks_of_peft"].remedy
    with pytest.raises(LossError, match=r"save_pretrained\(…, layout='vllm'\)"):
        export_adapter_file(adapter, "vllm", files, str(tmp_path / "out"))
    graft.adapter_tensors(with_experts(name), layout="vllm").save(tmp_path / "served")
    served = read(tmp_path / "served", files)
    assert list_gaps(served, files) == []
    shutil.rmtree(tmp_path / "a")
    tensors = load_file(tmp_path / "served" / WEIGHTS)
    assert all(torch.isfinite(t).all() for t in tensors.values())
