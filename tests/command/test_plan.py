# SPDX-License-Identifier: Apache-2.0
"""`graft plan`: layers, memory and what fits."""

import json
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from typer.testing import CliRunner

import graft
from graft.command import plan  # noqa: F401  it registers itself
from graft.command.app import app
from graft.files.errors import OptionError
from tests.leaves_out import PLANS

pytestmark = PLANS
BASE = Path(__file__).parents[1] / "files" / "fixtures" / "base_llama"


def run(*args):
    return CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)


def test_plan_shows_layers_memory_and_what_fits():
    args = ["plan", BASE, "--targets", "q_proj,v_proj", "-r", "4", "--batch", "2", "--seq", "16"]
    found = json.loads(run(*args, "--gpu", "2GB", "--json").stdout)
    assert found["layers"] == 4 and found["trainable"] == 2 * (4 * 32 + 4 * 24)
    assert found["memory"]["total"] > found["memory"]["weights"] > 0
    assert found["gpu"] == {"bytes": 2 * 10**9, "fits": True}
    text = run(*args, "--gpu", "2GB").stdout
    assert "activations" in text and "It fits into 2 GB." in text
    text = run(*args, "--gpu", "600MB").stdout  # less than a context takes
    assert "It does not fit into 0.6 GB: try --checkpointing" in " ".join(text.split())


def test_plan_of_packed_experts(tmp_path):
    from tests.storage.packed_experts import gpt_oss

    config = gpt_oss().config
    config.save_pretrained(tmp_path)
    options = ["--targets", "q_proj", "--parameters", "experts.down_proj", "-r", "2", "--seq", "8", "--json"]
    args = ["plan", tmp_path, *options]
    plain = json.loads(run(*args).stdout)
    assert plain["memory"]["base"] is None and plain["layers"] == 4
    named = json.loads(run(*args, "--base", "mxfp4").stdout)
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    found = json.loads(run(*args).stdout)
    assert found["memory"]["base"] == "mxfp4" and found["trainable"] == plain["trainable"]
    assert found["memory"]["weights"] == named["memory"]["weights"] < plain["memory"]["weights"]
    assert json.loads(run(*args, "--base", "none").stdout)["memory"]["weights"] == plain["memory"]["weights"]
    with pytest.raises(OptionError, match="one of nf4"):
        run(*args, "--base", "q4")


def test_plan_of_a_model_whose_language_part_has_its_own_config(tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)
    text = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=64)
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    found = json.loads(run("plan", tmp_path, "--seq", "16", "--json").stdout)
    assert found["blocks"]["LlamaDecoderLayer"] == {"all": 4, "adapted": 4} and found["memory"]["kept"] > 0


@pytest.mark.parametrize(
    "method, layers",
    [("SHADOW", 2), ("LN_TUNING", 5), ("BOTTLENECK", 2), ("BEFT", 2), ("IA3", 6), ("POLY", 14), ("MTLLORA", 14)],
)
def test_a_method_has_its_own_places(method, layers):
    """Blocks, norms or some projections; methods like LoRA get all linear layers."""
    words = "plan", BASE, "--seq", "8", "--json", "--method", method
    found = json.loads(run(*words, "--rank", "4").stdout)
    assert (found["method"], found["layers"]) == (method, layers) and found["memory"]["total"] > 0
    if method == "IA3":
        assert json.loads(run(*words, "--targets", "all-linear").stdout)["layers"] == 14


def test_a_prompt_gets_the_task_of_the_model(tmp_path):
    graft.PromptTuningConfig(num_virtual_tokens=3).save_pretrained(tmp_path)
    found = json.loads(run("plan", BASE, "--config", tmp_path, "--seq", "8", "--json").stdout)
    assert found["trainable"] == 3 * 16


SETTINGS = {
    "ADALORA": ["total_step=100"],
    "ADAPTION_PROMPT": ["adapter_len=3", "adapter_layers=1"],
    "CARTRIDGE": ["num_virtual_tokens=3"],
    "MULTITASK_PROMPT_TUNING": ["num_virtual_tokens=3", "num_tasks=2"],
    "P_TUNING": ["num_virtual_tokens=3", "encoder_reparameterization_type=LSTM"],
    "PREFIX_TUNING": ["num_virtual_tokens=3", "prefix_projection=true"],
    "PROMPT_TUNING": ["num_virtual_tokens=3"],
    "TLORA": ["r=4"],
    "TRAINABLE_TOKENS": ["token_indices=[1, 2]"],
}


@pytest.mark.parametrize("method", SETTINGS)
def test_plan_of_a_method_whose_config_needs_more(method):
    settings = [word for text in SETTINGS[method] for word in ("--set", text)]
    args = ["plan", BASE, "--method", method, "--seq", "8", *settings]
    found = json.loads(run(*args, "--json").stdout)
    assert found["method"] == method and found["trainable"] > 0
    assert found["memory"]["adapter"] > 0 and found["memory"]["kept"] > 0


def test_plan_names_the_option_for_a_field_that_is_missing():
    args = ["plan", BASE, "--seq", "8", "--method"]
    fields = {"prompt_tuning": "num_virtual_tokens", "adalora": "total_step", "sdt": "target_modules"}
    for method, field in fields.items():
        with pytest.raises(OptionError, match=rf"{field}.* {method.upper()}'s config: --set name=value, .*--config"):
            run(*args, method)
    for text in ("r", "=3", "a b=3"):
        with pytest.raises(OptionError, match="Write it as --set"):
            run(*args, "lora", "--set", text)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rr'"):
        run(*args, "lora", "--set", "rr=3")
