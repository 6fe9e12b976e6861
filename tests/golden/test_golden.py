# SPDX-License-Identifier: Apache-2.0
"""Golden files load, with the output that was recorded when they were written."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import defaultdict
from functools import cache

import pytest
import safetensors.torch
import torch

import graft
from tests.golden.cases import BASES, CASES, HERE, OUTPUTS, load, run, sampled, unpack
from tests.golden.continued import CONTINUED
from tests.golden.verbs import GONE, OWN_NUMBERS, VERBS, clear, document, kinds_in, numbers_in
from tests.leaves_out import FUSED_EXPERTS, PLANS

pytestmark = [pytest.mark.graft_only, pytest.mark.filterwarnings("ignore")]
STACKED = ("qwen3_moe", "gpt_oss", "mixtral")  # bases whose experts are stacks of matrices
NOTED = "arrow_config"  # a field that says for people what was there when it was saved


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """Return a function from state and kind of an archive to its folder."""
    return cache(lambda state, kind: unpack(HERE / state / f"{kind}.tar.gz", tmp_path_factory.mktemp("golden")))


def states(kind):
    """Return the states of which there are golden files of a kind."""
    return sorted(path.parent.name for path in HERE.glob(f"*/{kind}.tar.gz"))


def test_a_checkout_has_the_archives():
    if not (HERE.parents[1] / ".git").exists():
        pytest.skip("a source distribution has no archives")
    assert all("40e33481" in states(kind) for kind in ("adapters", "continued", "formats", "verbs"))


@cache
def cases_of(state, kind):
    """Return the cases of an archive, which stand in its first file."""
    with tarfile.open(HERE / state / f"{kind}.tar.gz") as tar:
        entry = tar.next()
        assert entry.name == CASES
        return json.load(tar.extractfile(entry))


def groups(kind):
    """Return state, method and names of cases, by method; those on stacks of experts by themselves."""
    found = defaultdict(list)
    for state in states(kind):
        for name, case in cases_of(state, kind).items():
            found[state, name.partition("-")[0], case["base"] in STACKED].append(name)
    marks = {False: (), True: FUSED_EXPERTS}
    return [
        pytest.param(state, method, names, id=f"{state}-{method}{'-experts' * stacked}", marks=marks[stacked])
        for (state, method, stacked), names in found.items()
    ]


def file_of(folder):
    """Return the config and the tensors of an adapter in PEFT's format."""
    config = json.loads((folder / "adapter_config.json").read_text())
    path = folder / "adapter_model.safetensors"
    if path.exists():
        return config, safetensors.torch.load_file(path)
    return config, torch.load(folder / "adapter_model.bin")


@pytest.mark.parametrize("state, method, names", groups("adapters"))
def test_adapters(state, method, names, unpacked, monkeypatch):
    root = unpacked(state, "adapters")
    outputs = safetensors.torch.load_file(root / OUTPUTS)
    monkeypatch.chdir(root)  # the config of X-LoRA names its experts by relative paths
    for name in names:
        case = cases_of(state, "adapters")[name]
        model = load(case, root)
        where = f"{state}/{name}"
        torch.testing.assert_close(
            sampled(run(model, case, root)),
            outputs[name],
            rtol=2e-5,
            atol=2e-5,
            msg=lambda m: f"{where}: {m}",  # noqa: B023
        )
        assert sorted(model.state_dict()) == case["names"], where
        last, folder = case["adapters"][-1]
        config, tensors = file_of(root / folder)
        state_dict = graft.get_peft_model_state_dict(model, adapter_name=last)
        assert sorted(state_dict) == case["keys"], where
        for key in state_dict.keys() & tensors.keys():
            assert torch.equal(state_dict[key], tensors[key].to(state_dict[key])), f"{where}: {key}"
        saved = json.loads(model.peft_config[last].to_json())
        assert {k: v for k, v in config.items() if k not in saved or (saved[k] != v and k not in NOTED)} == {}, where


@pytest.mark.parametrize("state, form, names", groups("formats"))
def test_formats(state, form, names, unpacked, monkeypatch):
    if form in ("gguf", "llama.cpp"):
        pytest.importorskip("gguf.constants")
    root = unpacked(state, "formats")
    outputs = safetensors.torch.load_file(root / OUTPUTS)
    for name in names:
        case = cases_of(state, "formats")[name]
        found = sampled(run(load(case, root), case, root))
        torch.testing.assert_close(found, outputs[name], rtol=2e-5, atol=2e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize(
    "state, name", [(state, name) for state in states("continued") for name in cases_of(state, "continued")]
)
def test_continued(state, name, unpacked, tmp_path):
    root = unpacked(state, "continued")
    folder = shutil.copytree(root / name, tmp_path / name)  # finishing changes files
    found = CONTINUED[name].finish(folder, root / BASES).detach().float()
    wanted = safetensors.torch.load_file(root / OUTPUTS)[name]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "state, name",
    [
        pytest.param(state, name, marks=PLANS if name == "plan" else ())
        for state in states("verbs")
        for name in cases_of(state, "verbs")
    ],
)
def test_verbs(state, name, unpacked, monkeypatch):
    root, wanted = unpacked(state, "verbs"), cases_of(state, "verbs")[name]
    monkeypatch.chdir(root)
    clear(root)
    found = document(VERBS[name], root)
    kinds = kinds_in(found)  # a document may say more than it did
    held = {at: k for at, k in kinds_in(wanted).items() if not at.startswith(GONE.get(name, ()))}
    assert {at: k for at, k in held.items() if kinds.get(at) != k} == {}
    if name not in OWN_NUMBERS:
        then, now = numbers_in(wanted), numbers_in(found)
        assert {at: now[at] for at in then} == pytest.approx(then, rel=1e-3, abs=1e-6)
