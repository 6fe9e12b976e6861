# SPDX-License-Identifier: Apache-2.0
"""`graft convert` as people call it: what it prints, and the exit code of each kind of refusal."""

import json
from pathlib import Path

import pytest

from tests import fresh

FIXTURES = Path(__file__).parents[1] / "files" / "fixtures"


def graft(*words, check=0):
    done = fresh.run("-m", "graft", *words)
    assert done.returncode == check, done.stderr
    return done


def test_a_file_becomes_another(tmp_path):
    base = FIXTURES / "base_llama"
    done = graft("convert", FIXTURES / "mlx_lora", "--to", "kohya", "-o", tmp_path / "a.safetensors")
    assert done.stdout == f"mlx → kohya: 3 modules, in {tmp_path / 'a.safetensors'}\n"
    words = ("convert", tmp_path / "a.safetensors", "--to", "peft", "--base", base, "-o", tmp_path / "b")
    shown = json.loads(graft(*words, "--json").stdout)
    assert (shown["of"], shown["to"], shown["modules"], shown["lost"]) == ("kohya", "peft", 3, [])
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_alpha"] == 12  # scale 3, rank 4
    assert graft(*words, "--force", "-q").stdout == ""


@pytest.mark.parametrize(
    "words, code, said",
    [
        (
            ["mlx_dora", "--to", "adapterhub", "--base", "base_llama"],
            5,
            "DoRA's magnitude: model.layers.1.mlp.down_proj",
        ),
        (["mlx_lora", "--to", "torchtune"], 2, "The format 'torchtune' is read, and not written. Formats"),
        (["lycoris_locon", "--to", "peft"], 2, "--base"),
        (["lycoris_locon", "--to", "peft", "--base", "base_llama"], 4, "has no modules for"),
        (["base_net", "--to", "peft"], 3, "no adapter of a format that graft reads"),
        (["mlx_lora", "--to", "onnx"], 2, "There is no format 'onnx'"),
    ],
)
def test_refusals(tmp_path, words, code, said):
    words = [FIXTURES / word if (FIXTURES / word).exists() else word for word in words]
    done = graft("convert", *words, "-o", tmp_path / "out", check=code)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and said in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_lossy_says_what_it_leaves_out(tmp_path):
    base = FIXTURES / "base_llama"
    done = graft(
        "convert", FIXTURES / "mlx_dora", "--to", "adapterhub", "--base", base, "--lossy", "-o", tmp_path / "out"
    )
    assert done.stdout.startswith("mlx → adapterhub: 3 modules,")
    assert "lost: DoRA's magnitude: model.layers.1.mlp.down_proj\n" in done.stdout
