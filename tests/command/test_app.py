# SPDX-License-Identifier: Apache-2.0
"""The frame of the command: every kind of error has its exit code, and one line of text."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import graft
from graft.command import app, plan
from graft.core.errors import BaseModelMismatchError, CheckpointError, ConfigError, LossError, PeftError
from graft.files.errors import BaseNeededError, OutputExistsError

MLX = Path(__file__).parents[1] / "files" / "fixtures" / "mlx_lora"


@pytest.mark.parametrize(
    "error, code",
    [(CheckpointError, 3), (BaseModelMismatchError, 4), (LossError, 5), (OutputExistsError, 2), (ConfigError, 3),
     (PeftError, 3), (FileNotFoundError, 3), (BaseNeededError, 2)],
)  # fmt: skip
def test_an_error_is_one_line_and_a_code(error, code, monkeypatch, capsys):
    def fail(**_):
        raise error("what is wrong. Pass lossy=True (--lossy).")

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(app, "VERBS", ())
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == code
    assert capsys.readouterr().err == "graft: what is wrong. Pass --lossy.\n"


def test_other_errors_are_bugs_and_show_their_trace(monkeypatch):
    monkeypatch.setattr(app, "app", lambda **_: 1 // 0)
    monkeypatch.setattr(app, "VERBS", ())
    with pytest.raises(ZeroDivisionError):
        app.main()


def documents(*words):
    """Run the command itself; return its exit code and the document on standard output."""
    done = subprocess.run([sys.executable, "-m", "graft", *map(str, words)], capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name)), done.stderr


def test_an_error_is_a_document_with_json(tmp_path):
    for words, code, says in (
        (["inspect", tmp_path / "none"], 3, "does not exist"), (["inspect"], 2, "Missing argument"),
        (["lint", MLX, "--nope"], 2, "No such option"), (["nothing"], 2, "No such command"),
        (["resize", MLX, "-o", tmp_path / "r"], 2, "Give one of rank"),
    ):  # fmt: skip
        found, document, said = documents(*words, "--json")
        assert (found, document["exit_code"]) == (code, code) and says in document["error"]
        assert said == f"graft: {document['error']}\n"


def test_json_has_no_nan(tmp_path):
    shutil.copytree(MLX, tmp_path / "a")
    held = load_file(tmp_path / "a" / "adapters.safetensors")
    save_file({name: t * float("nan") for name, t in held.items()}, tmp_path / "a" / "adapters.safetensors")
    code, document, _ = documents("inspect", tmp_path / "a", "--json")
    assert code == 0 and {m["norm"] for m in document["modules"]} == {None}
    code, document, _ = documents("lint", tmp_path / "a", "--json")
    assert code == 1 and "nan" in {f["rule"] for f in document["findings"]}


def test_names_that_are_no_text_are_printed_all_the_same(tmp_path):
    odd = tmp_path / os.fsdecode(b"\xff \xe2\x86\x92")
    shutil.copytree(MLX, odd)
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "graft", "inspect", odd], capture_output=True, env=ascii_only)
    assert done.returncode == 0 and rb"\xff" in done.stdout.replace(rb"\udcff", rb"\xff"), done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_options_and_names(tmp_path):
    """By the script that `--show-completion` prints."""
    (tmp_path / "graft").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m graft "$@"\n')
    (tmp_path / "graft").chmod(0o755)
    asked = [["graft", "ins"], ["graft", "inspect", "--sp"], ["graft", "convert", "--to", "gg"],
             ["graft", "check", "--for", "vllm,sg"]]  # fmt: skip
    script = 'eval "$(graft --show-completion bash)"\n' + "".join(
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _graft_completion graft; "
        'echo "${COMPREPLY[*]}"\n' for words in asked
    )  # fmt: skip
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["inspect", "--spectrum", "gguf", "vllm,sglang"], done.stderr


def test_version(run):
    assert run("--version") == (0, f"graft {graft.__version__}\n", "")


def test_a_pattern_is_shown_as_it_is_written():
    """Stars in a help text are Markdown's."""
    done = subprocess.run([sys.executable, "-m", "graft", "extract", "--help"], capture_output=True, text=True)
    assert "*.mlp.*" in done.stdout


def test_a_plan_is_of_training(tmp_path):
    """Whatever the mode that a saved config is in; the rank of a method that has another size is its own."""
    graft.LoraConfig(target_modules=["q_proj"], inference_mode=True).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_config.json"):
        assert plan.make_adapter_config(path, "LORA", None, "").inference_mode is False
    assert plan.make_adapter_config(None, "LORA", None, "all-linear").r == 16
    oft = [plan.make_adapter_config(None, "OFT", rank, "all-linear") for rank in (None, 4)]
    assert [(c.r, c.oft_block_size) for c in oft] == [(0, 32), (4, 0)]


def test_a_list_by_commas_may_have_spaces():
    config = plan.make_adapter_config(None, "LORA", 4, "q_proj, v_proj,", "experts.down_proj, experts.up_proj")
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.target_parameters == ["experts.down_proj", "experts.up_proj"]
