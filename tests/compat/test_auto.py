# SPDX-License-Identifier: Apache-2.0
"""AutoPeftModel… for adapters that record no task: the class of the base is the one that the file names."""

from __future__ import annotations

import json

import pytest
import transformers

import graft
from graft.model import tasks
from tests import models
from tests.pair import LIBS, adapt, close, outcome, output, randomize
from tests.samples import first

NAMES = {"llama": ("", "ForCausalLM", "ForFeatureExtraction"), "bert-seq": ("", "ForFeatureExtraction")}
CASES = [(model, name) for model, names in NAMES.items() for name in names]


@pytest.fixture
def saved(tmp_path):
    """A function that saves an adapter without a task type, and its base."""

    def save(sample, **changes) -> str:
        base = models.make(sample.model)
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base")
        randomize(adapt(LIBS[1], sample, base=base), sample).save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None} | changes))
        return str(tmp_path / "adapter")

    return save


@pytest.mark.parametrize(("model", "name"), CASES, ids=str)
def test_without_a_task_type(model, name, saved):
    """The base is of the recorded class, not of the class that the loader's name implies, and the wrapper is."""
    sample = first("LORA", model)
    folder = saved(sample)
    ours, theirs = (getattr(lib, f"AutoPeftModel{name}").from_pretrained(folder) for lib in LIBS)
    assert type(ours).__name__ == type(theirs).__name__ == f"PeftModel{name}"
    assert type(ours.get_base_model()) is type(theirs.get_base_model())
    close(output(ours, sample), output(theirs, sample))


REFUSED = {  # changes to the config, loader, what both say
    "no class": ({"auto_mapping": None}, "ForCausalLM", "Cannot infer the auto class from the config"),
    "task without a class": ({"task_type": "CAUSAL_LM"}, "", "Cannot use `AutoPeftModel` with a task type"),
    "another task": (
        {"task_type": "SEQ_CLS"},
        "ForCausalLM",
        "Expected target PEFT class: PeftModelForSequenceClassification, but you have asked for: PeftModelForCausalLM",
    ),
    "unknown library": (
        {"auto_mapping": {"base_model_class": "X", "parent_library": "somewhere.else"}},
        "ForCausalLM",
        "which is not in the import allowlist",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, saved):
    changes, name, text = REFUSED[case]
    folder = saved(first("LORA", "llama"), **changes)
    for lib in LIBS:
        error = outcome(lambda: getattr(lib, f"AutoPeftModel{name}").from_pretrained(folder)).error  # noqa: B023
        assert type(error) is ValueError and text in str(error), (lib, error)


def test_a_tokenizer_that_a_hub_out_of_reach_keeps(monkeypatch):
    """The adapter and a part of the tokenizer are in the cache: the base keeps its size, and a warning says so."""
    monkeypatch.setattr(tasks, "fetch", lambda *args, **kwargs: "tokenizer_config.json")

    def out_of_reach(*args, **kwargs):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", out_of_reach)
    base = models.make("llama")
    with pytest.warns(graft.PeftWarning, match="'org/adapter' has a tokenizer .* not known: We couldn't connect"):
        tasks.AutoPeftModel._fit_vocabulary(base, "org/adapter", False, {})
    with pytest.raises(graft.CheckpointError, match="cannot be loaded"):
        tasks.AutoPeftModel._fit_vocabulary(base, ".", False, {})


def test_a_base_that_is_not_where_it_was(saved):
    folder = saved(first("LORA", "llama"), base_model_name_or_path="/elsewhere/base", task_type="CAUSAL_LM")
    with pytest.raises(
        OSError, match=r"'/elsewhere/base', which the adapter at '.*' names.*PeftModel\.from_pretrained"
    ):
        graft.AutoPeftModelForCausalLM.from_pretrained(folder)
