# SPDX-License-Identifier: Apache-2.0
"""The registry of a model's adapters stays right: layers that lost all of theirs, two PeftModels on one base, adapters
that come while all are switched off, values loaded into an adapter of another config, names of rows."""

import warnings

import peft
import pytest
import torch
from torch import nn

import graft
from graft.model.functional import delete_adapter
from tests.looks import get_registry, layers
from tests.models import adapted, disturb, seeded
from tests.raised import refuses

X = torch.linspace(-1, 1, 18).view(3, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.inner, self.head = nn.Embedding(9, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x, scale=None):
        return self.head(self.inner(x))


def net():
    with seeded(0):
        return Net().eval()


def lora(*targets, **options):
    return graft.LoraConfig(**{"r": 2, "target_modules": list(targets or ["0"]), **options})


def filled(model):
    with seeded(2), torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.normal_()


def kinds(model):
    return {name: type(m).__name__ for name, m in model.named_modules()}


# layers and wrappers that lost all of their adapters

KINDS = {
    "LoRA": lambda: lora("head"),
    "IA3": lambda: graft.IA3Config(target_modules=["head"], feedforward_modules=[]),
    "LoHa": lambda: graft.LoHaConfig(target_modules=["head"], r=2),
    "whole": lambda: lora("0", modules_to_save=["head"]),
    "rows": lambda: lora("0", trainable_token_indices={"head": [1]}),
}


@pytest.mark.differs("a layer whose adapters were all deleted")
@pytest.mark.parametrize("then", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_layer_without_adapters_gives_way(first, then):
    model, plain = net(), net()
    graft.inject_adapter_in_model(KINDS[first](), model, "first")
    delete_adapter(model, "first")
    assert torch.equal(model(X), plain(X))
    graft.inject_adapter_in_model(KINDS[then](), model, "then")
    fresh = graft.inject_adapter_in_model(KINDS[then](), net(), "then")
    assert kinds(model) == kinds(fresh) and model.state_dict().keys() == fresh.state_dict().keys()
    filled(model)
    filled(fresh)
    assert torch.equal(model(X), fresh(X)) and not torch.equal(model(X), plain(X))
    assert set(graft.get_peft_model_state_dict(model, adapter_name="then"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in fresh.named_parameters() if p.requires_grad}


def test_an_injection_that_fails_leaves_layers_without_adapters():
    model = net()
    graft.inject_adapter_in_model(KINDS["IA3"](), model, "first")
    delete_adapter(model, "first")
    before = kinds(model)
    refuses(graft.UnsupportedLayerError, "Tanh", graft.inject_adapter_in_model, lora("head", "inner.1"), model, "then")
    assert kinds(model) == before


def test_a_layer_with_adapters_of_another_method_does_not_give_way():
    model = graft.inject_adapter_in_model(KINDS["IA3"](), net(), "first")
    with pytest.raises(graft.UnsupportedLayerError, match="already carries IA3 adapters"):
        graft.inject_adapter_in_model(lora("head"), model, "then")


def test_the_registry_of_a_peft_model_forgets_them():
    model = adapted(net(), {"first": lora(modules_to_save=["head"])})
    model.delete_adapter("first")
    model.add_adapter("then", lora("head"))
    assert list(layers(model)) == ["head"] and not get_registry(model).wrappers
    assert type(model.get_base_model().inner[0]) is nn.Linear
    model.set_adapter("then")
    assert not torch.equal(disturb(model)(X), net()(X))
    assert list(model.unload().state_dict()) == list(net().state_dict())


def test_a_head_of_another_size_takes_the_place_of_adapters_that_are_gone(tmp_path):
    with seeded(3):
        heads = {"head": nn.Linear(8, 5)}
        graft.get_peft_model(net(), lora(modules_to_save=["head"]), heads=heads).save_pretrained(tmp_path)
    model = graft.get_peft_model(net(), lora("head"), "first")
    model.delete_adapter("first")
    model.load_adapter(tmp_path, "default")
    model.set_adapter("default")
    assert model(X).shape == (3, 5)


def test_all_linear_leaves_a_head_out_that_lost_its_adapters():
    from tests import models

    base = models.make("gpt2")
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["lm_head"]))
    model.delete_adapter("default")
    model.add_adapter("all", graft.LoraConfig(target_modules="all-linear"))
    assert type(base.lm_head) is nn.Linear and len(layers(model)) > 1


@pytest.mark.differs("targets inside a module that another adapter trains whole")
@pytest.mark.differs("`modules_to_save` around a module that carries another adapter")
def test_a_module_cannot_be_trained_whole_around_other_adapters():
    model = adapted(net(), lora())
    before = kinds(model)
    with pytest.raises(graft.UnsupportedLayerError, match=r"'inner': 'inner.0' inside it carries other.*'b'"):
        model.add_adapter("b", lora("head", modules_to_save=["inner"]))
    assert kinds(model) == before
    model.delete_adapter("default")
    model.add_adapter("b", lora("head", modules_to_save=["inner"]))
    assert not any("lora" in name for name, _ in model.get_base_model().inner.named_parameters())


# another PeftModel on the same base


@pytest.mark.differs("a second `PeftModel` on a base that has adapters of another one")
@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("how", ["from_pretrained", "get_peft_model", "PeftModel", "LoraModel"])
def test_a_base_with_adapters_of_another_peft_model(how, name, tmp_path):
    """Each would keep its own registry of which adapters are active."""
    adapted(net(), lora()).save_pretrained(tmp_path)
    base = net()
    model = graft.PeftModel.from_pretrained(base, tmp_path, "one")
    expected, before = model(X), kinds(base)
    make = {
        "from_pretrained": lambda: graft.PeftModel.from_pretrained(base, tmp_path, name),
        "get_peft_model": lambda: graft.get_peft_model(base, lora(), name),
        "PeftModel": lambda: graft.PeftModel(base, lora(), name),
        "LoraModel": lambda: graft.LoraModel(base, lora(), name),
    }
    refuses(graft.AlreadyInjectedError, r"add_adapter\(\).*unload\(\)", make[how])
    assert kinds(base) == before and torch.equal(model(X), expected)
    model.load_adapter(tmp_path, "two")
    assert list(model.peft_config) == ["one", "two"]
    other = graft.PeftModel.from_pretrained(model.unload(), tmp_path, name)
    assert list(other.peft_config) == [name] and torch.equal(other(X), expected)


def test_adapters_of_a_model_without_a_wrapper_are_taken_over(tmp_path):
    adapted(net(), lora()).save_pretrained(tmp_path)
    base = graft.inject_adapter_in_model(lora(), net(), "one")
    model = graft.PeftModel.from_pretrained(base, tmp_path, "two")
    assert sorted(model.peft_config) == ["one", "two"] and model.active_adapters == ["two"]
    model.set_adapter("one")
    assert torch.equal(model(X), net()(X))


# switched off


@pytest.mark.differs("an adapter that is added while adapters are disabled")
@pytest.mark.parametrize("within", [True, False], ids=["block", "until enabled"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}, {"trainable_token_indices": {"head": [1]}}])
def test_an_adapter_that_comes_while_all_are_off_is_off(options, within):
    model = adapted(net(), lora())
    with model.disable_adapter():
        if not within:
            model.base_model.disable_adapter_layers()
        model.add_adapter("b", lora("0", *([] if options else ["head"]), **options))
        model.set_adapter("b")
        disturb(model)
        assert torch.equal(model(X), net()(X))
        assert {part.disable_adapters for part in get_registry(model).carriers()} == {True}
    if not within:
        model.base_model.enable_adapter_layers()
    assert {part.disable_adapters for part in get_registry(model).carriers()} == {False}
    assert not torch.equal(model(X), net()(X))


def test_without_an_active_adapter_there_is_no_active_config():
    model = adapted(net(), lora())
    assert model.active_peft_config is model.peft_config["default"]
    model.delete_adapter("default")
    with pytest.raises(graft.AdapterNotFoundError, match=r"No adapter is active.*none"):
        model.active_peft_config  # noqa: B018


# values for an adapter that there is


def changed(tmp_path, **options):
    adapted(net(), lora()).save_pretrained(tmp_path)
    return adapted(net(), lora(**options))


@pytest.mark.differs(
    "`load_adapter` into a name that is taken, by a file of another config (alpha, rsLoRA, dropout, …)"
)
@pytest.mark.parametrize(
    "options, text",
    [
        ({"lora_alpha": 3}, r"'default'.*keeps its own config.*lora_alpha \(3, in the file 8\).*delete_adapter"),
        ({"use_rslora": True, "lora_dropout": 0.5}, r"lora_dropout \(0.5, in the file 0.0\), use_rslora \(True, in"),
        ({"alpha_pattern": {"0": 4}}, r"alpha_pattern \(\{'0': 4\}, in the file \{\}\)"),
    ],
    ids=["alpha", "rslora and dropout", "pattern"],
)
def test_values_of_another_config_are_said(options, text, tmp_path):
    """The adapter keeps its scaling, so that it does not do what the saved one did."""
    model = changed(tmp_path, **options)
    with pytest.warns(graft.PeftWarning, match=text) as caught:
        model.load_adapter(tmp_path, "default")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("default")
        model.load_adapter(tmp_path, "default")
    model.set_adapter("default")
    assert torch.equal(model(X), adapted(net(), lora())(X))


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "gaussian"}, {"target_modules": ["inner.0"]}], ids=str)
def test_values_of_the_same_config_are_loaded_without_a_word(options, tmp_path):
    """What is only about how an adapter begins, and where, is settled once it is there."""
    model = changed(tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(X), adapted(net(), lora())(X))


# names of rows


NAMES = ["a", "b", "__base__"]


@pytest.mark.parametrize("kind", [list, tuple, iter], ids=lambda k: k.__name__)
def test_any_iterable_of_names_will_do(kind):
    model = adapted(net(), dict.fromkeys("ab", lora(modules_to_save=["head"])))
    assert torch.equal(model(X, adapter_names=kind(NAMES)), model(X, adapter_names=NAMES))


@pytest.mark.differs("`adapter_names`")
@pytest.mark.parametrize(
    "names, text",
    [
        ("a", r"got the string 'a': pass \['a', …\], or set_adapter\('a'\)"),
        (["a", None, "b"], r"\{1: None\}.*__base__"),
    ],
    ids=["str", "None"],
)
def test_what_are_no_names(names, text):
    model = adapted(net(), dict.fromkeys("ab", lora()))
    refuses(TypeError, text, model, X, adapter_names=names)
    assert not get_registry(model).call.open


@pytest.mark.parametrize("first", [torch.ones(1), torch.ones(1, 4), torch.tensor(2.0)], ids=["1", "1x4", "scalar"])
def test_an_argument_that_all_rows_share_does_not_count_them(first):
    model = adapted(net(), dict.fromkeys("ab", lora()))
    assert torch.equal(model(scale=first, x=X, adapter_names=NAMES), model(X, adapter_names=NAMES))
    refuses(graft.RoutingError, "but got 2 and 3", model, x=X, scale=torch.ones(3), adapter_names=["a", "b"])


@pytest.mark.differs("`layers_to_transform=[]` beside `layers_pattern`")
def test_the_layer_of_the_first_index_alone():
    with seeded(0):
        base = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(3, 3)}) for _ in range(3)])})
    model = graft.get_peft_model(base, lora("q", layers_to_transform=0, layers_pattern="layers"))
    assert list(layers(model)) == ["layers.0.q"]
    for none in (None, []):
        with pytest.raises(graft.ConfigError, match="`layers_to_transform` must also be specified"):
            lora("q", layers_to_transform=none, layers_pattern="layers")


def test_errors_name_the_adapter():
    model = adapted(net(), lora())
    for options in (
        dict(target_modules=["zz"]),
        dict(exclude_modules=["0"]),
        dict(trainable_token_indices={"zz": [1]}),
    ):
        refuses(graft.NoMatchingPeftModuleError, "'second'", model.add_adapter, "second", lora(**options))


@pytest.mark.parametrize("lib", [graft, peft])
def test_an_adapter_without_biases_beside_one_that_trains_them(lib):
    model = lib.get_peft_model(nn.Sequential(nn.Linear(4, 4)), lib.LoraConfig(target_modules=["0"], bias="all"))
    model.add_adapter("b", lib.LoraConfig(target_modules=["0"]))
    bias = next(p for n, p in model.named_parameters() if n.endswith("bias"))
    assert bias.requires_grad
    model.set_adapter("b")
    assert bias.requires_grad
