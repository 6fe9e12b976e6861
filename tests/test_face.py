# SPDX-License-Identifier: Apache-2.0
"""The types of the public names: the stub is today's, and type checkers find right and wrong in users' code."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import graft
from tools.face import FILE, write_face

RIGHT = """
import torch
from torch import nn
import graft
from graft import LoraConfig, PeftModel, TaskType, get_peft_model

base = nn.Sequential(nn.Linear(4, 4))
config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], task_type=TaskType.CAUSAL_LM)
rank: int = config.r
model: PeftModel = get_peft_model(base, config)
model.print_trainable_parameters()
model.add_adapter("other", graft.IA3Config(target_modules="all-linear"))
model.set_adapter("other")
with model.disable_adapter():
    model(torch.ones(1, 4))
model.save_pretrained("folder")
again: PeftModel = PeftModel.from_pretrained(base, "folder", adapter_name="a", is_trainable=True)
again.merge_and_unload()
configs: dict[str, graft.PeftConfig] = again.peft_config
runs: graft.MultiTrain = graft.MultiTrain(base)
"""
WRONG = """
from torch import nn
import graft

graft.nonsense
graft.LoraConfig(rr=3)
graft.LoraConfig(r="8")
graft.get_peft_model(nn.Linear(2, 2))
graft.get_peft_model(nn.Linear(2, 2), graft.LoraConfig(), adapter=3)
"""


def test_the_stub_is_that_of_today():
    assert FILE.read_text() == write_face(), "run python -m tools.face"


@pytest.mark.parametrize(
    "config, name, field",
    [
        ("LoraConfig", "rank", "r"), ("LoraConfig", "alpha", "lora_alpha"), ("OFTConfig", "rank", "r"),
        ("LoraConfig", "target_module", "target_modules"), ("PromptTuningConfig", "tokens", "num_virtual_tokens"),
    ],
)  # fmt: skip
def test_a_keyword_that_is_no_field_names_the_one_that_is_meant(config, name, field):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'. Did you mean '{field}'\?"):
        getattr(graft, config)(**{name: 8})


def test_a_config_of_another_library_may_take_more():
    class Config(graft.LoraConfig):
        def __init__(self, more, **values):
            super().__init__(**values)
            self.more = more

    assert Config(more=3, r=4).more == 3


@pytest.fixture
def files(tmp_path):
    for name, text in ("right", RIGHT), ("wrong", WRONG):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.slow
def test_mypy_reads_users_code(files):
    env = {**os.environ, "MYPYPATH": str(Path(graft.__file__).parents[1])}
    words = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", files / "cache", "right.py"]
    done = subprocess.run([*words, "wrong.py"], cwd=files, env=env, capture_output=True, text=True)
    assert [int(n) for n in re.findall(r"^wrong\.py:(\d+): error", done.stdout, re.M)] == [5, 6, 7, 8, 9], done.stdout
    assert "right.py" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not find_spec("basedpyright"), reason="the extra `types` is not installed: make test-clients runs it"
)
def test_pyright_reads_users_code(files):
    (files / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(Path(graft.__file__).parents[1])], "typeCheckingMode": "standard"})
    )
    words = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", "."]
    done = subprocess.run(words, cwd=files, capture_output=True, text=True)
    errors = [e for e in json.loads(done.stdout)["generalDiagnostics"] if e["severity"] == "error"]
    assert [(Path(e["file"]).name, e["range"]["start"]["line"] + 1) for e in errors] == [
        ("wrong.py", line) for line in (5, 6, 7, 8, 9)
    ]
