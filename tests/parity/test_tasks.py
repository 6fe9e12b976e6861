# SPDX-License-Identifier: Apache-2.0
"""The task classes: chosen by task_type, with their heads, their arguments and generation."""

import inspect
import pickle
from copy import deepcopy

import pytest
import torch

from tests import models
from tests.covering import Case, law
from tests.pair import LIBS, adapt, both, close, close_dicts, gradients, json_of, output, randomize
from tests.raised import refuses
from tests.samples import DRAWS, SAMPLES, each, first, over

TASKS = [s for s in SAMPLES if s.name in ("tasks", "classify")]


@over(TASKS)
def test_class_and_head(sample):
    ours, theirs = both(sample)
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.modules_to_save == theirs.modules_to_save
    assert ours.peft_config["default"].modules_to_save == theirs.peft_config["default"].modules_to_save


@over([s for s in TASKS if s.name == "tasks"])
def test_arguments_by_place(sample):
    """Their order is PEFT's; more than there are, and one that is there twice, are refused as Python does."""
    ours, theirs = both(sample)
    own, there = (list(inspect.signature(m.forward).parameters)[:-1] for m in (ours, theirs))
    assert own[: len(there)] == there
    rest = dict(models.inputs(sample.model))
    ids = rest.pop("input_ids")
    for model in (ours.eval(), theirs.eval()):
        close(model(ids, **rest)[0], model(input_ids=ids, **rest)[0])
        refuses(TypeError, "multiple values for argument", model, ids, input_ids=ids)
        refuses(TypeError, "positional", model, *[None] * 20)


LABELS = {
    "SEQ_CLS": lambda: {"labels": torch.tensor([0, 2, 1])},
    "TOKEN_CLS": lambda: {"labels": torch.randint(0, 4, (3, models.LENGTH))},
    "CAUSAL_LM": lambda: {"labels": torch.randint(0, models.VOCAB, (3, models.LENGTH))},
    "SEQ_2_SEQ_LM": lambda: {"labels": torch.randint(0, models.VOCAB, (3, 5))},
    "QUESTION_ANS": lambda: {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 3, 3])},
    "FEATURE_EXTRACTION": lambda: {},
}


@over(TASKS)
def test_forward_with_labels(sample):
    batch = models.inputs(sample.model)
    with models.seeded(4):
        labels = LABELS[sample.kwargs["task_type"]]()
    results = []
    for model in (randomize(m, sample).eval() for m in both(sample)):
        out = model(**batch, **labels, output_hidden_states=True)
        results.append(out)
    assert list(results[0].keys()) == list(results[1].keys())
    if labels:
        close(results[0].loss, results[1].loss)
    as_tuple = randomize(adapt(LIBS[0], sample), sample).eval()(**batch, **labels, return_dict=False)
    assert isinstance(as_tuple, tuple)


@over([s for s in TASKS if s.model not in ("t5",)])
def test_forward_from_embeddings(sample):
    batch = models.inputs(sample.model)
    results = []
    for model in (randomize(m, sample).eval() for m in both(sample)):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        results.append(models.output(model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}))
    close(*results)


GENERATORS = [s for s in SAMPLES if s.name in ("plain", "tasks", "tokens") and s.model in ("llama", "gpt2", "t5")]


@over(GENERATORS)
def test_generate(sample):
    ids = models.inputs(sample.model)["input_ids"].clamp(min=3)
    results = []
    for model in (randomize(m, sample).eval() for m in both(sample)):
        results.append(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, num_beams=1))
        results.append(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, num_beams=2))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("sample", [first("LORA", "llama", "tasks"), first("LORA", "t5", "tasks")], ids=str)
def test_generate_with_another_adapter_per_row(sample):
    ids = models.inputs(sample.model)["input_ids"].clamp(min=3)
    results = []
    for lib, model in zip(LIBS, both(sample)):
        model.add_adapter("b", sample.config(lib))
        randomize(model, sample).eval()
        for beams in (1, 2):
            results.append(
                model.generate(
                    input_ids=ids,
                    max_new_tokens=3,
                    do_sample=False,
                    num_beams=beams,
                    adapter_names=["b", "__base__", "default"],
                )
            )
        results.append(output(model, sample))  # nothing of the rows is left behind
    assert torch.equal(results[0], results[3]) and torch.equal(results[1], results[4])
    close(results[2], results[5])


CHECKPOINTED = [s for s in each(models="llama t5") if s.method not in DRAWS and "gradients" not in s.unlike]


@law(
    "sample, reentrant",
    [Case((sample, reentrant)) for sample in CHECKPOINTED for reentrant in (True, False)],
    lambda case: [case[0].method, (case[0].model, case[1])],
)
def test_gradient_checkpointing(sample, reentrant):
    results = []
    for model in (randomize(m, sample) for m in both(sample)):
        model.train()
        results.append(gradients(model, sample))
        model.enable_input_require_grads()
        models.checkpoint(model, reentrant)
        results.append(gradients(model, sample, use_cache=False))
    close_dicts(results[1], results[3])
    close_dicts(results[1], results[0])


def test_gradient_checkpointing_enabled_before():
    """The base was prepared for checkpointing: its inputs must require gradients."""
    sample, results = first("LORA", "llama"), []
    for lib in LIBS:
        base = models.make("llama")
        models.checkpoint(base, True)
        results.append(gradients(randomize(adapt(lib, sample, base=base), sample).train(), sample, use_cache=False))
    close_dicts(*results)
    assert any(g is not None for g in results[0].values())


@over(each() + each("head", "mlp") + each("tokens", "gpt2") + each("classify", "bert-seq"))
def test_copies_and_pickles(sample):
    model = randomize(adapt(LIBS[0], sample), sample).eval()
    expected = output(model, sample)
    copied, thawed = deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, thawed):
        close(output(other, sample), expected, 0)
        assert other.active_adapters == model.active_adapters
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    close(output(model, sample), expected, 0)


@over(TASKS)
def test_auto_classes(sample, tmp_path):
    """The base is found through the adapter's configuration."""
    name = {
        "CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification",
        "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering",
        "FEATURE_EXTRACTION": "FeatureExtraction",
    }[sample.kwargs["task_type"]]  # fmt: skip
    base = models.make(sample.model)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = randomize(adapt(LIBS[1], sample, base=base), sample)
    model.save_pretrained(tmp_path / "adapter")
    ours, theirs = (getattr(lib, f"AutoPeftModelFor{name}").from_pretrained(str(tmp_path / "adapter")) for lib in LIBS)
    assert type(ours).__name__ == type(theirs).__name__
    close(output(ours.eval(), sample), output(theirs.eval(), sample))


def test_auto_model_of_a_custom_class(tmp_path):
    """Without a task type the base's class is in the file."""
    sample = first("LORA", "llama")
    models.make("llama").save_pretrained(tmp_path / "base")
    base = type(models.make("llama")).from_pretrained(tmp_path / "base")
    for lib, name in zip(LIBS, ("ours", "theirs")):
        adapt(lib, sample, base=type(base).from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / name)
    assert json_of(tmp_path / "ours") == json_of(tmp_path / "theirs")
    assert json_of(tmp_path / "ours")["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    ours, theirs = (lib.AutoPeftModel.from_pretrained(str(tmp_path / "theirs")) for lib in LIBS)
    assert type(ours).__name__ == type(theirs).__name__ == "PeftModel"
    close(output(ours, sample), output(theirs, sample))
