# SPDX-License-Identifier: Apache-2.0
"""AutoPeftModel… for adapters that record no task: the class of the base is the one that the file names."""

from __future__ import annotations

import json

import pytest
import torch
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


@pytest.mark.parametrize("beside", ["", "french"], ids=["around", "beside"])
def test_an_adapter_in_a_subfolder(beside, tmp_path):
    """Where saves put adapters with names. The base has no such folder; a larger tokenizer stands in either."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    models.make("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    words = WordLevel({str(i): i for i in range(models.VOCAB + 3)}, unk_token="0")
    base.resize_token_embeddings(models.VOCAB + 3)
    config = graft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = graft.get_peft_model(base, config, "french").eval()
    model.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="0")
    tokenizer.save_pretrained(tmp_path / "adapters" / beside)
    loaded = graft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapters"), subfolder="french")
    assert loaded.get_input_embeddings().num_embeddings == models.VOCAB + 3
    expected, found = (
        graft.get_peft_model_state_dict(m, adapter_name=name, save_embedding_layers=False)
        for m, name in ((model, "french"), (loaded, "default"))
    )
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


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
    monkeypatch.setattr(tasks, "fetch_file", lambda *args, **kwargs: "tokenizer_config.json")

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
