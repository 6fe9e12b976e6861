# SPDX-License-Identifier: Apache-2.0
"""Modules trained whole: a copy per adapter, heads of different sizes on one base."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close

import graft
from tests import models
from tests.models import disturb, seeded
from tests.raised import refuses

BASE, FEW, MANY = 3, 2, 5  # labels of the base, of "default", of "many"


def config(**options):
    return graft.LoraConfig(target_modules=["query", "value"], r=2, task_type="SEQ_CLS", **options)


def head(n):
    with seeded(n):
        return nn.Linear(24, n)


def two_heads(**options):
    """BERT with an adapter of 2 labels and one of 5."""
    with seeded(1):
        model = graft.get_peft_model(models.make("bert-seq"), config(), heads={"classifier": head(FEW)}, **options)
        model.add_adapter("many", config(), heads={"classifier": head(MANY)})
    return disturb(model).eval()


def batch(n=4, labels=None):
    return {**models.inputs("bert-seq", n), **({} if labels is None else {"labels": torch.tensor(labels)})}


def number_of_labels(model):
    base = model.get_base_model()
    return base.config.num_labels, base.num_labels


def test_it_is_the_class_of_its_task():
    assert type(two_heads()) is graft.PeftModelForSequenceClassification


# switching


def test_the_head_switches_with_the_adapter():
    model = two_heads()
    for name, n in (("default", FEW), ("many", MANY), ("default", FEW)):
        model.set_adapter(name)
        assert number_of_labels(model) == (n, n)
        assert model(**batch()).logits.shape == (4, n)
    with model.disable_adapter():
        assert number_of_labels(model) == (BASE, BASE)
        assert torch.equal(model(**batch()).logits, models.make("bert-seq")(**batch()).logits)
    assert number_of_labels(model) == (FEW, FEW)


@pytest.mark.parametrize(
    "switch, labels",
    [
        (lambda m: m.base_model.set_adapter("many"), MANY),
        (lambda m: m.base_model.set_adapter(["many"]), MANY),
        (lambda m: m.base_model.disable_adapter_layers(), BASE),
        (lambda m: m.disable_adapter_layers(), BASE),
        (lambda m: (m.disable_adapter_layers(), m.enable_adapter_layers()), FEW),
        (lambda m: m.base_model.delete_adapter("default"), MANY),
    ],
    ids=["set", "set list", "disable", "disable on the model", "enable", "delete"],
)
def test_the_head_switches_through_the_tuner_as_well(switch, labels):
    model = two_heads()
    switch(model)
    assert number_of_labels(model) == (labels, labels)
    assert model(**batch(labels=[0, 1, 1, 0])).loss.isfinite()


def test_the_loss_is_that_of_the_active_head():
    model = two_heads()
    for name, labels in (("default", [1, 0, 1, 1]), ("many", [4, 0, 3, 2])):
        model.set_adapter(name)
        out = model(**batch(labels=labels))
        assert_close(out.loss, cross_entropy(out.logits, torch.tensor(labels)))
        refuses(IndexError, None, model, **batch(labels=[MANY, 0, 0, 0]))
    with model.disable_adapter():
        out = model(**batch(labels=[2, 0, 1, 1]))
        assert_close(out.loss, cross_entropy(out.logits, torch.tensor([2, 0, 1, 1])))


def test_a_regression_beside_a_classification():
    model = two_heads()
    model(**batch(labels=[1, 0, 1, 1]))  # transformers decides on the kind of loss in the first call
    model.add_adapter("degree", config(), heads={"classifier": head(1)})
    model.set_adapter("degree")
    targets = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out = model(**batch(), labels=targets)
    assert_close(out.loss, mse_loss(out.logits.squeeze(), targets))
    model.set_adapter("many")
    out = model(**batch(labels=[4, 0, 3, 2]))
    assert_close(out.loss, cross_entropy(out.logits, torch.tensor([4, 0, 3, 2])))


def test_names_of_labels_follow_the_head():
    base = models.make("bert-seq")
    base.config.id2label = {0: "low", 1: "middle", 2: "high"}
    named = dict(base.config.id2label)
    model = graft.get_peft_model(base, config())
    model.add_adapter("many", config(), heads={"classifier": head(MANY)})
    model.set_adapter("many")
    assert len(base.config.id2label) == MANY
    model.set_adapter("default")
    assert base.config.id2label == named


def test_only_the_active_copy_trains():
    model = two_heads().train()
    classifier = model.get_base_model().classifier
    for name, other in (("default", "many"), ("many", "default")):
        model.set_adapter(name)
        model.zero_grad()
        model(**batch(labels=[1, 0, 1, 1])).loss.backward()
        own, others = classifier.modules_to_save[name], classifier.modules_to_save[other]
        assert own.weight.requires_grad and own.weight.grad.abs().sum() > 0
        assert not others.weight.requires_grad and others.weight.grad is None
        assert not classifier.original_module.weight.requires_grad


def test_only_one_copy_can_be_active():
    model = two_heads()
    with pytest.raises(ValueError, match=r"Only one adapter can be set at a time for ModulesToSaveWrapper.*classifier"):
        model.base_model.set_adapter(["default", "many"])
    assert model.active_adapters == ["default"] and number_of_labels(model) == (FEW, FEW)
    assert model(**batch()).logits.shape == (4, FEW)


def test_an_adapter_without_a_head_uses_the_original():
    model = graft.get_peft_model(models.make("mlp"), graft.LoraConfig(target_modules=["fc1"], modules_to_save=["head"]))
    model.add_adapter("plain", graft.LoraConfig(target_modules=["fc1"]))
    disturb(model)
    with torch.no_grad():
        model.get_base_model().head.modules_to_save["default"].weight.zero_()
    x = models.inputs("mlp")["x"]
    changed = model(x)
    model.set_adapter("plain")
    wrapper = model.get_base_model().head
    assert wrapper.active is wrapper.original_module
    assert (model(x) - changed).abs().max() > 1e-3
    assert wrapper.weight is wrapper.original_module.weight, "attributes are those of the module that runs"


# heads


def test_a_head_is_used_and_not_copied():
    mine = head(MANY)
    model = graft.get_peft_model(models.make("bert-seq"), config(), heads={"classifier": mine})
    assert model.get_base_model().classifier.modules_to_save["default"] is mine and mine.weight.requires_grad
    assert model.get_base_model().classifier.original_module.out_features == BASE


def test_a_head_takes_the_dtype_and_mode_of_the_original():
    base = models.make("bert-seq").bfloat16().eval()
    model = graft.get_peft_model(base, config(), heads={"classifier": head(MANY).train()})
    own = model.get_base_model().classifier.modules_to_save["default"]
    assert own.weight.dtype == torch.bfloat16 and not own.training
    assert model(**batch()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "heads, text",
    [
        ({"clasifier": head(2)}, r"heads\['clasifier'\] must name one of the modules in modules_to_save.*classifier"),
        ({"classifier": 2}, "must be an nn.Module, got int"),
        ([head(2)], "heads must be modules by name, .* got list"),
        ({"classifier": nn.Linear(7, 2)}, r"heads\['classifier'\] takes 7 features, and 'classifier' has 24"),
    ],
    ids=["unknown", "no module", "list", "width"],
)
def test_heads_that_fit_nothing_are_refused_and_nothing_changes(heads, text):
    base = models.make("bert-seq")
    names = base.state_dict().keys()
    refuses(graft.ConfigError, text, graft.get_peft_model, base, config(), heads=heads)
    assert base.state_dict().keys() == names and all(p.requires_grad for p in base.parameters())
    model = two_heads()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    refuses(graft.ConfigError, text, model.add_adapter, "third", config(), heads=heads)
    assert list(model.peft_config) == ["default", "many"] and number_of_labels(model) == (FEW, FEW)
    assert model.state_dict().keys() == before.keys()


def test_a_head_is_of_one_adapter():
    """Else it would train with another, or with the base."""
    model = two_heads()
    wrapper = model.get_base_model().classifier
    for held in (wrapper.original_module, wrapper.modules_to_save["many"], nn.Sequential(wrapper.original_module)):
        with pytest.raises(graft.ConfigError, match=r"heads\['classifier'\] is in the model already.*give a copy"):
            model.add_adapter("third", config(), heads={"classifier": held})
    model.add_adapter("third", config(), heads={"classifier": copy.deepcopy(wrapper.modules_to_save["many"])})


def test_what_cannot_be_trained_whole_is_refused():
    with pytest.raises(TypeError, match=r"modules_to_save cannot be applied to modules of type.*ModuleList.*layers"):
        graft.get_peft_model(models.make("mlp"), graft.LoraConfig(target_modules=["lin0"], modules_to_save=["layers"]))


def test_modules_to_save_that_match_nothing_are_reported():
    base = models.make("mlp")
    report = graft.plan(base, graft.LoraConfig(target_modules=["fc1"], modules_to_save=["hed"]))
    assert "head" in str(report.unmatched_targets)


# mixed batches


NAMES = ["many", "default", "__base__", "many"]


def test_rows_of_narrower_heads_are_padded():
    model = two_heads()
    logits = model(**batch(), adapter_names=NAMES).logits
    assert logits.shape == (4, MANY)
    for i, (name, n) in enumerate(zip(NAMES, (MANY, FEW, BASE, MANY))):
        model.base_model.enable_adapter_layers()
        model.set_adapter("default" if name == "__base__" else name)
        if name == "__base__":
            model.base_model.disable_adapter_layers()
        one = {k: v[i : i + 1] for k, v in batch().items()}
        assert_close(logits[i, :n], model.get_base_model()(**one).logits[0], rtol=1e-5, atol=1e-5)
        assert (logits[i, n:] == float("-inf")).all()
    probabilities = logits.softmax(-1)
    assert_close(probabilities.sum(-1), torch.ones(4)) and probabilities.isfinite().all()


def test_a_mixed_batch_leaves_the_number_of_labels():
    model = two_heads()
    model(**batch(), adapter_names=NAMES)
    assert number_of_labels(model) == (FEW, FEW)
    refuses(graft.RoutingError, None, model, **batch(), adapter_names=["zz"] * 4)
    refuses(IndexError, None, model, **batch(labels=[7, 0, 0, 0]), adapter_names=NAMES)
    assert number_of_labels(model) == (FEW, FEW) and model(**batch()).logits.shape == (4, FEW)


def test_training_both_heads_in_one_batch():
    model = two_heads().train()
    model.set_requires_grad(["default", "many"])
    labels = [4, 1, 0, 2]
    names = ["many", "default", "default", "many"]
    out = model(**batch(labels=labels), adapter_names=names)
    assert_close(out.loss, cross_entropy(out.logits, torch.tensor(labels)))
    out.loss.backward()
    mixed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name in ("default", "many"):
        index = [i for i, n in enumerate(names) if n == name]
        model.set_adapter(name)
        rows = {k: v[index] for k, v in batch(labels=labels).items()}
        (model(**rows).loss / 2).backward()
    apart = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == apart.keys() and any("classifier" in n for n in mixed)
    for name, grad in apart.items():
        assert_close(mixed[name], grad, rtol=1e-4, atol=1e-6)


# files


def test_heads_are_saved_and_loaded_with_their_adapters(tmp_path):
    model = two_heads()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make("bert-seq"), tmp_path)
    report = loaded.load_adapter(tmp_path / "many", "many")
    assert type(loaded) is graft.PeftModelForSequenceClassification
    assert not report.missing_keys and not report.unexpected_keys
    assert any(key.endswith("classifier.weight") for key in report.loaded)
    for name, n in (("default", FEW), ("many", MANY)):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert number_of_labels(loaded) == (n, n)
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
        wrapper = loaded.get_base_model().classifier.modules_to_save[name]
        assert wrapper.out_features == n and not hasattr(wrapper, "num_embeddings")
    assert_close(loaded(**batch(), adapter_names=NAMES), model(**batch(), adapter_names=NAMES))


def test_the_larger_head_first(tmp_path):
    model = two_heads()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make("bert-seq"), tmp_path / "many", "many")
    loaded.load_adapter(tmp_path, "default")
    assert number_of_labels(loaded) == (MANY, MANY)
    loaded.set_adapter("default")
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_loading_on_a_base_whose_labels_already_fit(tmp_path):
    two_heads().save_pretrained(tmp_path, selected_adapters=["many"])
    base = models.make("bert-seq")
    base.classifier, base.num_labels, base.config.num_labels = head(MANY), MANY, MANY
    loaded = graft.PeftModel.from_pretrained(base, tmp_path / "many")
    assert loaded.get_base_model().classifier.modules_to_save["default"].out_features == MANY


def test_loading_other_labels_into_an_existing_adapter_is_refused(tmp_path):
    two_heads().save_pretrained(tmp_path)
    model = two_heads()
    before = model(**batch()).logits
    refuses(graft.AdapterKeyError, r"size mismatch for .*classifier", model.load_adapter, tmp_path / "many", "default")
    assert torch.equal(model(**batch()).logits, before) and number_of_labels(model) == (FEW, FEW)


# going away


def test_deleting_takes_the_head_along():
    model = two_heads()
    model.delete_adapter("default")
    wrapper = model.get_base_model().classifier
    assert list(wrapper.modules_to_save) == ["many"] and model.active_adapters == ["many"]
    assert number_of_labels(model) == (MANY, MANY)
    model.delete_adapter("many")
    assert number_of_labels(model) == (BASE, BASE)
    assert torch.equal(model(**batch()).logits, models.make("bert-seq")(**batch()).logits)


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("name, n", [("default", FEW), ("many", MANY)])
def test_unloading_takes_the_active_copy(how, name, n):
    model = two_heads()
    model.set_adapter(name)
    expected, own = model(**batch()).logits, model.get_base_model().classifier.modules_to_save[name]
    plain = getattr(model, how)()
    assert plain.classifier is own and plain.config.num_labels == plain.num_labels == n
    logits = plain(**batch(labels=[1, 0, 1, 1])).logits
    assert logits.shape == (4, n)
    if how == "merge_and_unload":
        assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_keeps_its_heads():
    model = two_heads()
    other = copy.deepcopy(model)
    other.set_adapter("many")
    assert number_of_labels(other) == (MANY, MANY) and number_of_labels(model) == (FEW, FEW)
    assert model(**batch(labels=[1, 0, 1, 1])).loss.isfinite()


# other tasks


def test_token_classification():
    with seeded(1):
        first = graft.LoraConfig(target_modules=["query"], r=2, task_type="TOKEN_CLS")
        model = graft.get_peft_model(models.make("bert-tok"), first)
        second = graft.LoraConfig(target_modules=["query"], r=2, task_type="TOKEN_CLS")
        model.add_adapter("wide", second, heads={"classifier": head(9)})
    inputs = models.inputs("bert-tok", 2)
    logits = model(**inputs, adapter_names=["wide", "default"]).logits
    assert logits.shape[-1] == 9 and (logits[1, :, 4:] == float("-inf")).all() and logits[0].isfinite().all()
    model.set_adapter("wide")
    labels = torch.full(inputs["input_ids"].shape, 8)
    out = model(**inputs, labels=labels)
    assert_close(out.loss, cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.differs("QUESTION_ANS etc. `modules_to_save`")
def test_question_answering_saves_its_head(tmp_path):
    with seeded(1):
        made = graft.LoraConfig(target_modules=["query"], r=2, task_type="QUESTION_ANS")
        model = graft.get_peft_model(models.make("bert-qa"), made)
    with torch.no_grad():
        model.get_base_model().qa_outputs.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make("bert-qa"), tmp_path)
    inputs = models.inputs("bert-qa")
    assert torch.equal(models.output(loaded, inputs), models.output(model, inputs))


class Multiplied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, factor):
        return self.inner(x) * factor


class MultipliedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.last = nn.Linear(4, 4), Multiplied()

    def forward(self, x):
        return self.last(self.q(x), 3.0)


def test_a_copy_gets_all_positional_arguments_of_its_module():
    base = MultipliedNet()
    x = torch.randn(2, 4)
    expected = base(x)
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["q"], modules_to_save=["last"]))
    assert_close(model.train()(x), expected)
