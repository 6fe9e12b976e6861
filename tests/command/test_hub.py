# SPDX-License-Identifier: Apache-2.0
"""`graft push`, `pull`, `card`, against a hub that records: what was sent, and what a download would give."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig
from typer.testing import CliRunner

import graft
from graft.command import hub, plan  # noqa: F401  they register themselves
from graft.command.app import app
from graft.core.errors import CheckpointError, HubError
from graft.files.errors import OptionError, OutputExistsError
from graft.files.sources import licence_in


@pytest.fixture
def adapter(tmp_path):
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=96)  # fmt: skip
    model = graft.get_peft_model(LlamaForCausalLM(config), graft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    config.save_pretrained(tmp_path / "base")
    return tmp_path / "adapter"


def run(*args):
    return CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)


@pytest.fixture
def recorded(monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, exist_ok, private=None):
            sent.update(repo=repo_id, private=private)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, repo_id, commit_message):
            found = {p.relative_to(folder_path): p for p in Path(folder_path).rglob("*") if p.is_file()}
            sent.update(files={name.as_posix(): p.read_bytes() for name, p in found.items()}, message=commit_message)
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return sent


def test_push_sends_the_folder_as_it_is_and_nothing_hidden(adapter, recorded):
    (adapter / ".secret").write_text("token")
    done = run("push", adapter, "me/it", "--private", "-m", "first", "--json")
    assert json.loads(done.stdout)["url"] == "https://hub/commit"
    assert (recorded["repo"], recorded["private"], recorded["message"]) == ("me/it", True, "first")
    assert recorded["files"] == {p.name: p.read_bytes() for p in adapter.iterdir() if p.name != ".secret"}


def test_push_refuses_what_is_no_adapter_and_a_dry_run_sends_nothing(adapter, recorded, tmp_path):
    assert run("push", adapter, "me/it", "--dry-run").stdout.startswith("Would push")
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError):
        run("push", adapter, "me/it")
    assert recorded == {}


def test_pull_brings_an_adapter_and_leaves_pickles(adapter, monkeypatch, tmp_path):
    (adapter / "training.bin").write_bytes(b"a pickle")
    asked = {}

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision)
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    run("pull", "me/it@v1", "-o", tmp_path / "got")
    assert asked == {"repo": "me/it", "revision": "v1"}
    names = {p.name for p in (tmp_path / "got").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "training.bin" not in names
    with pytest.raises(OutputExistsError):
        run("pull", "me/it", "-o", tmp_path / "got")
    shutil.rmtree(adapter)
    adapter.mkdir()
    with pytest.raises(CheckpointError):
        run("pull", "me/it", "-o", tmp_path / "got", "--force")
    assert {p.name for p in (tmp_path / "got").iterdir()} == names


def test_a_pipeline_goes_there_and_back_with_all_its_parts(adapter, recorded, monkeypatch, tmp_path):
    whole, there = tmp_path / "pipeline", tmp_path / "there"
    for part in "unet", "text_encoder_2":
        shutil.copytree(adapter, whole / part)
    shutil.copytree(adapter, whole / "unet" / "checkpoint-1")
    done = run("push", whole, "me/it", "--json")
    names = {f"{part}/{p.name}" for part in ("unet", "text_encoder_2") for p in adapter.iterdir()}
    assert recorded["files"].keys() == names == {*json.loads(done.stdout)["files"]}

    def download(repo, revision, allow_patterns):
        for name in huggingface_hub.utils.filter_repo_objects(recorded["files"], allow_patterns=allow_patterns):
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            (there / name).write_bytes(recorded["files"][name])
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    run("pull", "me/it", "-o", tmp_path / "got")
    found = {p.relative_to(tmp_path / "got").as_posix(): p.read_bytes() for p in (tmp_path / "got").rglob("*.*")}
    assert found == recorded["files"]


def test_pull_says_why_the_hub_gives_nothing(monkeypatch, tmp_path):
    def download(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HubError, match="no network"):
        run("pull", "me/it", "-o", tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_a_card_says_what_the_adapter_is_and_keeps_a_text(adapter):
    (adapter / "README.md").unlink(missing_ok=True)
    run("card", adapter, "--base", "maker/model", "--license", "apache-2.0")
    card = huggingface_hub.ModelCard((adapter / "README.md").read_text())
    assert card.data["base_model"] == "maker/model" and card.data["license"] == "apache-2.0"
    assert card.data["library_name"] == "peft" and card.data["tags"] == ["lora"] and "rank: 4" in card.text
    text = (adapter / "README.md").read_text().replace("rank: 4", "rank: 4, trained on poems")
    (adapter / "README.md").write_text(text)
    run("card", adapter, "--license", "mit")
    card = huggingface_hub.ModelCard((adapter / "README.md").read_text())
    assert "trained on poems" in card.text and card.data["license"] == "mit"
    assert card.data["base_model"] == "maker/model"


def test_a_card_that_begins_with_a_byte_order_mark_keeps_its_head(adapter):
    card = adapter / "README.md"
    card.write_text("---\nlicense: mit\ntags: [poems]\n---\nA text\n", encoding="utf-8-sig")
    assert licence_in(str(adapter)) == "mit"
    run("card", adapter)
    made = huggingface_hub.ModelCard(card.read_text(encoding="utf-8"))
    assert made.data["license"] == "mit" and "poems" in made.data["tags"] and made.text.strip() == "A text"


def test_a_card_that_is_no_text_is_told_and_stays(adapter):
    card = adapter / "README.md"
    card.write_bytes(before := "---\nlicense: mit\n---\nÄ\n".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"README\.md is no text in UTF-8"):
        run("card", adapter)
    assert card.read_bytes() == before


def test_a_card_names_no_path_of_this_machine(adapter, tmp_path):
    (adapter / "README.md").unlink(missing_ok=True)
    done = run("card", adapter, "--base", str(tmp_path / "base"), "--dry-run")
    assert "base_model" not in huggingface_hub.ModelCard(done.stdout).data.to_dict()
    assert not (adapter / "README.md").exists()


def test_plan_shows_layers_memory_and_what_fits(adapter, tmp_path):
    args = ["plan", tmp_path / "base", "--targets", "q_proj,v_proj", "-r", "4", "--batch", "2", "--seq", "16"]
    found = json.loads(run(*args, "--gpu", "2GB", "--json").stdout)
    assert found["layers"] == 4 and found["trainable"] == 2 * (4 * 64 + 4 * 48)
    assert found["memory"]["total"] > found["memory"]["weights"] > 0
    ways = {(w["checkpointing"], w["bits"]): w for w in found["gpu"]["fits"]}
    assert ways[True, None]["least"] < ways[False, None]["least"] and ways[False, None]["largest_batch"] > 2
    assert found["gpu"]["largest_rank"] == 1024
    small = json.loads(run(*args, "--gpu", "600MB", "--json").stdout)["gpu"]  # less than a context takes
    assert small["largest_rank"] == 0 and not any(w["largest_batch"] for w in small["fits"])
    text = run(*args, "--gpu", "2GB", "--trial").stdout
    assert "batches up to" in text and "activations" in text and "Time on cpu" in text


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
    found = json.loads(run(*args, "--gpu", "2GB").stdout)
    assert found["memory"]["base"] == "mxfp4" and found["trainable"] == plain["trainable"]
    assert found["memory"]["weights"] == named["memory"]["weights"] < plain["memory"]["weights"]
    assert {w["bits"] for w in found["gpu"]["fits"]} == {"mxfp4"}
    assert json.loads(run(*args, "--base", "none").stdout)["memory"]["weights"] == plain["memory"]["weights"]
    with pytest.raises(OptionError, match="--base is one of nf4"):
        run(*args, "--base", "q4")


def test_plan_of_a_model_whose_language_part_has_its_own_config(tmp_path):
    text = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                                    vocab_size=64)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                           num_attention_heads=4, image_size=16, patch_size=8)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    found = json.loads(run("plan", tmp_path, "--seq", "16", "--json").stdout)
    assert found["blocks"]["LlamaDecoderLayer"] == {"all": 4, "adapted": 4} and found["memory"]["kept"] > 0
