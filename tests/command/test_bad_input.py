# SPDX-License-Identifier: Apache-2.0
"""Inputs that are none, damaged, or of something else: exit code and message of each verb, and sources as they were."""

import hashlib
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from graft.files.convert import convert_adapter_file

FIXTURES = Path(__file__).parents[1] / "files" / "fixtures"
LLAMA, BERT, KOHYA, MLX = (FIXTURES / name for name in ("base_llama", "base_bert", "kohya_sd", "mlx_lora"))
RAN = []


class Code:
    def __reduce__(self):
        return RAN.append, ("it ran",)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files by the names that the words below have for them."""
    made = tmp_path_factory.mktemp("bad")
    shutil.copytree(LLAMA, made / "BASE")
    shutil.copytree(MLX, made / "MLX")
    convert_adapter_file(MLX, "peft", made / "GOOD")
    convert_adapter_file(FIXTURES / "mlx_dora", "peft", made / "DORA")
    for name in ("CUT", "CODE", "REGEX", "SEVERAL/one", "SEVERAL/two"):
        shutil.copytree(made / "GOOD", made / name)
    weights = made / "CUT" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    (made / "CODE" / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.a.lora_A.weight": Code()}, made / "CODE" / "adapter_model.bin", pickle_module=pickle)
    torch.save({"lora_unet_a.lora_down.weight": Code()}, made / "CODE.pt", pickle_module=pickle)
    (made / "OTHERS").mkdir()
    (made / "OTHERS" / "letter.txt").write_text("Dear")
    return made


def contents(folder):
    return {p: hashlib.sha256(p.read_bytes()).digest() for p in sorted(folder.rglob("*")) if p.is_file()}


READERS = (
    "inspect {}", "lint {}", "diff GOOD {}", "resize {} -o OUT --rank 1", "convert {} --to kohya -o OUT",
    "merge BASE {} -o OUT", "check {} --for vllm", "export {} --for vllm --base BASE -o OUT",
)  # fmt: skip


@pytest.mark.parametrize(
    "source, says",
    [
        ("BASE", "holds a model, and no adapter"), ("BASE/model.safetensors", "holds a model, and no adapter"),
        ("CUT", "damaged or cut off"), ("CODE", "nothing of it has been run"), ("NOWHERE", "does not exist"),
        ("CODE.pt", "nothing of it has been run"), ("OTHERS", "is no adapter"),
        ("SEVERAL", "holds some in the folders ['one', 'two']: give one of them"),
    ],
)  # fmt: skip
def test_no_verb_takes_what_is_no_adapter(source, says, places, run, tmp_path):
    before = contents(places)
    for verb in READERS:
        code, out, said = run(*words(verb.format(source), places, tmp_path))
        assert (code, out, says in said, said.count("\n")) == (3, "", True, 1), (verb, said)
    assert contents(places) == before and not [*tmp_path.iterdir()] and RAN == []


def words(line, places, tmp_path):
    for word in line.split():
        first = word.partition("/")[0].partition(".")[0]
        named = (first.isupper() and (places / first).exists()) or first in ("NOWHERE", "CODE")
        yield tmp_path / "out" if word == "OUT" else places / word if named else word


@pytest.mark.parametrize(
    "line, code, says",
    [
        # a base of another architecture, or of other sizes
        ("inspect GOOD --base BERT", 4, "no weight for"),
        ("lint GOOD --base BERT", 1, "base-mismatch"),
        ("convert GOOD --to mlx --base BERT -o OUT", 4, "Give the base that the adapter was trained on"),
        ("merge BERT GOOD -o OUT", 4, "checkpoint does not hold"),
        ("export GOOD --for vllm --base BERT -o OUT", 4, "has no module"),
        ("convert KOHYA --to peft --base BASE -o OUT", 4, "has no modules for"),
        ("extract BERT BASE -o OUT", 4, "is not a fine-tuned"),
        ("check GOOD --for vllm --base BERT", 1, "refused"),
        ("export GOOD --for vllm --base WIDE -o OUT", 4, "of other shapes"),
        ("check GOOD --for vllm --base WIDE", 4, "of other shapes"),
        # names that only a base explains
        ("convert KOHYA --to peft -o OUT", 2, "--base"),
        ("resize KOHYA --rank 1 -o OUT", 2, "--base"),
        ("merge BASE KOHYA -o OUT", 4, "has no modules for"),
        # no base
        ("inspect GOOD --base NOWHERE", 3, "no folder with a model"),
        ("merge OTHERS GOOD -o OUT", 3, "no safetensors files of a model"),
        ("plan NOWHERE", 3, "no config.json"),
        ("check GOOD --for vllm --base GOOD", 3, "no safetensors files of a model"),
        ("inspect GOOD --base OTHERS", 3, "no safetensors files of a model"),
        ("extract GOOD BASE -o OUT", 3, "no safetensors files of a model"),
        ("extract BASE BASE -o OUT", 3, "have no difference"),
        # what another form cannot hold
        ("convert DORA --to adapterhub --base BASE -o OUT", 5, "DoRA's magnitude: model.layers.1.mlp.down_proj"),
        ("convert MLX --to torchtune -o OUT", 2, "The format 'torchtune' is read, and not written. Formats"),
        ("export DORA --for vllm --base BASE -o OUT", 5, "graft merge"),
        # outputs
        ("resize GOOD --rank 1 -o GOOD --force", 2, "the source"),
        ("convert GOOD --to kohya -o GOOD", 2, "the source"),
        ("convert GOOD --to mlx --base BASE -o BASE --force", 2, "the source"),
        ("convert CODE.pt --to kohya -o CODE.pt --force", 2, "the source"),
        ("convert GOOD --to mlx --base BASE -o GOOD/inner", 2, "one lies in the other"),
        ("merge BASE GOOD -o GOOD/inner", 2, "one lies in the other"),
        ("export GOOD --for vllm --base BASE -o BASE --force", 2, "the source"),
        ("export GOOD --for vllm --base BASE -o GOOD", 2, "the source"),
        ("export GOOD --for vllm --base BASE -o GOOD --force", 2, "the source"),
        ("extract BASE BASE -o BASE/inner", 2, "the source"),
        ("resize GOOD --rank 1 -o MLX", 2, "--force"),
        ("resize GOOD --rank 1 -o OTHERS --force", 2, "holds [letter.txt], which is no file of an adapter"),
        ("merge BASE GOOD -o OTHERS --force", 2, "holds [letter.txt], which is no file of a model"),
        ("inspect GOOD --plot OTHERS/letter.txt", 2, "is no picture"),
        # words
        ("resize GOOD -o OUT", 2, "Give one of rank"),
        ("resize GOOD -o OUT --max-mb inf", 2, "a size above 0"),
        ("resize GOOD -o OUT --ratio nan", 2, "a ratio above 1"),
        ("merge BASE GOOD -o OUT --weights nan", 2, "finite numbers"),
        ("diff GOOD GOOD --tol nan", 2, "at least 0"),
        ("convert GOOD --to word -o OUT", 2, "no format 'word'"),
        ("check GOOD --for ollama", 2, "ollama"),
        ("check GOOD --for ,", 2, "--for names no server"),
        ("check GOOD", 2, "Choose one of vllm, sglang, llama.cpp"),
        ("export GOOD --for vllm --base BASE -o OUT --rank x", 2, "--rank x"),
        ("export GOOD --for vllm --base BASE -o OUT --rank 0", 2, "--rank 0 is not possible"),
        ("export GOOD --for vllm --base BASE -o OUT --rank 1.5", 2, "--rank 1.5 is not possible"),
        ("export GOOD --for vllm --base BASE -o OUT --rank 99", 2, "The layer is 'model."),
        ("export GOOD --for vllm --base BASE -o OUT --rank nan", 2, "--rank nan is not possible"),
        ("plan BASE --gpu much", 2, "much"),
        ("verify --url ftp://x --adapter GOOD --base BASE", 2, "no address"),
        ("verify --adapter GOOD --base BASE", 2, "--url"),
        ("inspect no-one/has-this", 3, "There is no adapter at"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_is_said(line, code, says, places, run, tmp_path):
    if not (places / "WIDE").exists():
        for name, source in (("BERT", BERT), ("KOHYA", KOHYA), ("WIDE", LLAMA)):
            shutil.copytree(source, places / name)
        widen(places / "WIDE" / "model.safetensors")
    before = contents(places)
    found, out, err = run(*words(line, places, tmp_path))
    assert (found, says in out + err) == (code, True), out + err
    assert out == "" or code == 1
    assert contents(places) == before and not [*tmp_path.iterdir()]


def widen(path):
    from safetensors.torch import load_file, save_file

    save_file({k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in load_file(path).items()}, path)


@pytest.mark.filterwarnings("ignore")  # which says that it was edited
def test_a_config_that_selects_nothing_is_found(places, run):
    config = places / "REGEX" / "adapter_config.json"
    config.write_text(config.read_text().replace('"target_modules": [', '"target_modules": "((", "_": ['))
    assert "unused-target" in run("lint", places / "REGEX", "--strict")[1]


@pytest.mark.parametrize(
    "line", ["resize GOOD --rank 2", "convert GOOD --to mlx --base BASE", "convert GOOD --to kohya --base BASE",
             "convert GOOD --to adapterhub --base BASE", "convert GOOD --to gguf --base BASE"],
)  # fmt: skip
def test_a_full_disk_leaves_nothing(line, places, run, tmp_path, monkeypatch):
    """In a process whose files may have a kilobyte: what writes them does not always say so."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python's would be cut off, and raise at the next import
    resource = pytest.importorskip("resource")
    if "gguf" in line:
        pytest.importorskip("gguf.constants")
    before, limits = contents(places), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        code, _, said = run(*words(line, places, tmp_path), "-o", tmp_path / "a" / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 3 and str(tmp_path / "a" / "b") in said, said
    assert contents(places) == before and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("line", [
    "resize GOOD --rank 1 -o {} --force", "convert GOOD --to kohya --base BASE -o {} --force",
    "convert GOOD --to mlx --base BASE -o {} --force", "merge BASE GOOD -o {} --force", "inspect GOOD --plot {}.png",
])  # fmt: skip
def test_a_pipe_is_no_output(line, places, run, tmp_path):
    """As root a rename would put a folder in the place of /dev/null."""
    pipe = tmp_path / ("pipe.png" if "plot" in line else "pipe")
    os.mkfifo(pipe)
    code, _, said = run(*words(line.format(tmp_path / "pipe"), places, tmp_path))
    assert code in (2, 3) and str(pipe) in said and "stays as it is" in said.lower(), said
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


@pytest.mark.parametrize(
    "line", ["resize GOOD --rank 1 -o", "convert GOOD --to mlx --base BASE -o", "extract BASE BASE -o",
             "export GOOD --for vllm --base BASE -o", "merge BASE GOOD -o"],
)  # fmt: skip
def test_an_output_without_a_name_is_none(line, places, run, tmp_path, monkeypatch):
    """And not the folder that one is in, with all there is in it."""
    (tmp_path / "thesis.txt").write_text("years")
    monkeypatch.chdir(tmp_path)
    for force in ([], ["--force"]):
        code, *_ = run(*words(line, places, tmp_path), "", *force)
        assert code in (2, 3, 4) and [p.name for p in Path.cwd().iterdir()] == ["thesis.txt"]
        assert Path.cwd().samefile(tmp_path)
