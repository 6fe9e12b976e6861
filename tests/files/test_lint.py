# SPDX-License-Identifier: Apache-2.0
"""Each rule finds what it is for, in a file that was good before, and finds nothing in the good one."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.files.base import read_base_files
from graft.files.formats import read
from graft.files.lint import RULES, lint_adapter
from graft.files.sources import read_licence
from tests import models
from tests.models import inputs
from tests.pair import adapt, output, randomize
from tests.samples import first

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An adapter without a fault, on a base without one."""
    folder = tmp_path_factory.mktemp("good")
    base = models.make("llama")
    base.save_pretrained(folder / "base")
    (folder / "base" / CARD).write_text("---\nlicense: mit\n---\n")
    base.name_or_path = "someone/model"
    torch.manual_seed(0)
    config = graft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj", "down_proj"], base_model_name_or_path="someone/model"
    )
    model = graft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    model.save_pretrained(folder / "a")
    (folder / "a" / CARD).write_text("---\nlicense: mit\n---\n")
    return folder


def spoiled(good, to, tensors=None, config=None):
    """Copy the good adapter as PEFT would have written it; change tensors or config on the way."""
    os.makedirs(to)
    held = load_file(good / "a" / WEIGHTS)
    fields = json.loads((good / "a" / CONFIG).read_text())
    if tensors:
        held = tensors(held) or held
    fields |= config or {}
    save_file(held, to / WEIGHTS)
    (to / CONFIG).write_text(json.dumps(fields))
    (to / CARD).write_text((good / "a" / CARD).read_text())
    return to


def rules(folder, base=None):
    return {f.rule for f in lint_adapter(read(folder), base)}


def b_of(held, part=""):
    return [k for k in held if "lora_B" in k and part in k]


def set_to(value, part=""):
    def change(held):
        for key in b_of(held, part)[:1]:
            held[key].view(-1)[3] = value

    return change


def zeroed(held):
    held[b_of(held)[0]].zero_()


def loud(held):
    held[b_of(held)[0]] *= 1e3


def strange(held):
    held["base_model.model.model.norm.hada_w1"] = torch.ones(2)


def whole_norm(held):
    held["base_model.model.model.norm.weight"] = torch.ones(24)


def of_another(held):
    key = next(k for k in held if "down_proj.lora_A" in k)
    held[key] = torch.randn(8, 17)


def in_one_direction(held):
    """A change far larger than the weight, as far as can be from all directions that the weight has."""
    key = b_of(held, "q_proj")[0]
    name = key.removeprefix("base_model.model.").replace("lora_B.", "")
    U = torch.linalg.svd(models.make("llama").state_dict()[name]).U
    held[key].zero_()[:, 0] = 10 * U.mean(1)


def test_a_good_adapter_has_no_finding(good):
    assert not lint_adapter(read(good / "a"), read_base_files(good / "base"))
    assert not lint_adapter(read(good / "a"))


SPOILED = [
    ("nan", set_to(float("nan")), {}), ("inf", set_to(float("inf")), {}), ("zero-B", zeroed, {}),
    ("outlier", loud, {}), ("unused-target", None, {"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}),
    ("unused-target", None, {"target_parameters": ["experts.down_proj"]}),
    ("not-whole", None, {"use_dora": True}),
    ("orphan-key", strange, {}), ("orphan-key", whole_norm, {}),
    ("base-mismatch", of_another, {}), ("base-name", None, {"base_model_name_or_path": "/home/me/model"}),
    ("base-name", None, {"base_model_name_or_path": "unsloth/model-bnb-4bit"}),
    ("base-name", None, {"base_model_name_or_path": None}),
    ("intruder", in_one_direction, {}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule, tensors, config", SPOILED, ids=[f"{s[0]}-{i}" for i, s in enumerate(SPOILED)])
def test_each_rule_finds_its_fault(rule, tensors, config, good, tmp_path):
    base = read_base_files(good / "base")
    folder = spoiled(good, tmp_path / "a", tensors, config)
    found = rules(folder, base)
    # what a fault brings along
    along = {"outlier": {"intruder"}, "intruder": {"outlier"}, "unused-target": {"not-whole"},
             "not-whole": {"unused-target"}}  # fmt: skip
    assert rule in found and found - {rule} <= along.get(rule, set())
    of_base = next(r for r in RULES if r.name == rule).needs_base
    assert (rule in rules(folder)) is not of_base


def test_files_beside_the_adapter(good, tmp_path):
    folder = spoiled(good, tmp_path / "a")
    (folder / CARD).write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8-sig")  # some editors' first bytes
    assert read_licence(str(folder)) == "apache-2.0" and not rules(folder)
    os.remove(folder / CARD)
    assert rules(folder) == {"no-card"}
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    os.remove(folder / WEIGHTS)
    assert rules(folder) == {"no-card", "pickle"}


def test_every_rule_has_a_test_and_a_remedy():
    tested = {name for name, _, _ in SPOILED} | {"no-card", "pickle"}
    assert {r.name for r in RULES} == tested
    assert all(re.match(r"[A-Z].*\.$", r.remedy) for r in RULES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["LOHA", "IA3", "OFT", "VERA", "LN_TUNING"])
def test_other_methods_have_no_error(method, tmp_path):
    sample = first(method, "llama")
    model = randomize(adapt(graft, sample), sample)
    assert output(model, sample) is not None and inputs("llama")
    model.save_pretrained(tmp_path)
    assert not {f.rule for f in lint_adapter(read(tmp_path)) if f.severity != "note"}
