# SPDX-License-Identifier: Apache-2.0
"""The look at trainers' sources finds what graft neither has nor tells, and nothing else."""

import zipfile

import pytest

from tests.compat import trainers

pytestmark = pytest.mark.slow

SOURCE = """
import torch, peft
from peft import LoraConfig, PeftModel, tuners

class Own:
    def batch_rows(self):
        return self._replace_module

class Derived(tuners.lora.LoraModel):
    def asks(self):
        return self._replace_module

def use(model, ctx):
    LoraConfig(r=8, lora_alpha=4)
    model.merge_and_unload(safe_merge=True)
    ctx.lora_ga_init = model.rank_pattern, model.weight, Own().batch_rows
"""


@pytest.fixture(scope="module")
def known():
    return trainers.Known()


def found(tmp_path, known, more=""):
    path = tmp_path / "trainer-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("trainer/use.py", SOURCE + more)
    return trainers.look("trainer", path, known)


def test_what_is_answered(tmp_path, known):
    count, missing = found(tmp_path, known)
    assert count > 4 and not missing


@pytest.mark.parametrize(
    "more, finding",
    [
        ("PeftModel._no_such", None),  # PEFT has no such name either
        ("model._replace_module(1)", "._replace_module"),
        ("getattr(model, '_replace_module', None)", "._replace_module"),
        ("peft.tuners.lora.LoraLayer.set_scale", None),
        ("peft.tuners.tuners_utils.BaseTuner._replace_module", "peft.tuners.tuners_utils.BaseTuner._replace_module"),
    ],
)
def test_what_is_found(tmp_path, known, more, finding):
    assert found(tmp_path, known, more)[1] == ([finding] if finding else [])
