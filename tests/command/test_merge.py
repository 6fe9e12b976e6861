# SPDX-License-Identifier: Apache-2.0
"""`graft merge` as people run it."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from graft.command.change import parse_size, parse_weights
from graft.files.errors import OptionError
from tests import fresh


def run(*args):
    return fresh.run("-m", "graft", *args)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=96)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    model = graft.get_peft_model(model, graft.HRAConfig(r=4, target_modules=["q_proj"]))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder / "adapter")
    return folder


def test_a_merge_with_its_certificate(folders):
    done = run("merge", folders / "base", folders / "adapter", "-o", folders / "out", "--certificate", "--json")
    assert done.returncode == 0, done.stderr
    told, held = json.loads(done.stdout), json.loads((folders / "out/merge.json").read_text())
    assert set(told["tensors"]) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert held["tensors"] == told["tensors"]


def test_text_for_people_and_codes_for_programs(folders):
    args = ["merge", folders / "base", folders / "adapter", "-o", folders / "text"]
    dry = run(*args, "--dry-run")
    assert dry.returncode == 0 and dry.stdout.startswith("Would merge into 2 tensors")
    assert not (folders / "text").exists()
    assert run(*args, "-q").stdout == "" and (folders / "text/config.json").exists()
    again = run(*args)
    assert again.returncode == 2 and again.stderr.startswith("graft: ") and "--force" in again.stderr
    (folders / "empty").mkdir(exist_ok=True)
    nothing = run("merge", folders / "base", folders / "empty", "-o", folders / "no")
    assert nothing.returncode == 3 and "Traceback" not in nothing.stderr
    assert run("merge", folders / "base", folders / "adapter").returncode == 2


def test_sizes_and_weights_are_read_or_refused():
    assert (parse_size("5GB"), parse_size("1.5 mb"), parse_size("200"), parse_size("2K")) == (
        5 * 10**9,
        1_500_000,
        200,
        2000,
    )
    assert parse_weights("0.5,-1") == [0.5, -1.0]
    for text in ("five", "5 GiB", "0", "-1GB"):
        with pytest.raises(OptionError, match="The size"):
            parse_size(text)
    with pytest.raises(OptionError, match="--weights"):
        parse_weights("a,b")
