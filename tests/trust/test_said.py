# SPDX-License-Identifier: Apache-2.0
"""What makes an adapter dead or wrong is done right, refused or said where it happens."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graft
from graft.model import functional
from graft.optim import create_lorafa_optimizer
from tests.looks import get_registry, layers
from tests.models import adapted, seeded
from tests.raised import refuses

X = torch.linspace(-1, 1, 18).view(3, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.inner(x)))


def net():
    with seeded(0):
        return Net().eval()


def lora(**options):
    return graft.LoraConfig(**{"r": 2, "target_modules": ["inner", "head"], **options})


def net_with(*names, config=lora, **options):
    return adapted(net(), dict.fromkeys(names, config(**options)))


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if issubclass(w.category, graft.PeftWarning)]


# loading over what is there

KINDS = {
    "lora": lora,
    "loha": lambda **o: graft.LoHaConfig(r=2, target_modules=["inner", "head"], **o),
    "ln": lambda **o: graft.LNTuningConfig(target_modules=["norm"], **o),
    "rows": lambda **o: lora(target_modules=["inner"], trainable_token_indices={"head": [1]}, **o),
}


@pytest.mark.differs("`load_adapter` over an adapter that is merged")
@pytest.mark.parametrize("how", ["load_adapter", "set_peft_model_state_dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_for_an_adapter_that_is_merged(kind, how, tmp_path):
    """They act at once, and unmerging gives the base back."""
    other = net_with("default", config=KINDS[kind])
    for layer in layers(other).values():
        for p in layer.parameters_of("default"):
            p.data.mul_(0.5)
    other.save_pretrained(tmp_path)
    model, base = net_with("default", config=KINDS[kind]), net()
    model.base_model.merge_adapter()
    if how == "load_adapter":
        model.load_adapter(tmp_path, "default")
    else:
        graft.set_peft_model_state_dict(model, graft.load_peft_weights(tmp_path), strict=True)
    assert get_registry(model).merged_adapters == ["default"]
    torch.testing.assert_close(model(X), other(X))
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(model(X), other(X))
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base(X))


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.differs("`load_adapter(is_trainable=True)` over an adapter that is frozen")
def test_loading_to_train_lets_an_adapter_train_that_was_frozen(tmp_path):
    net_with("default").save_pretrained(tmp_path)
    model = graft.PeftModel.from_pretrained(net(), tmp_path)
    assert not training(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert training(model) == training(net_with("default"))
    assert not model.peft_config["default"].inference_mode


def test_loading_to_train_leaves_what_is_frozen_of_an_adapter_that_trains(tmp_path):
    """As Trainer resumes: the optimizer that it makes next is to have the parameters of before."""
    model = net_with("default")
    model.save_pretrained(tmp_path)
    create_lorafa_optimizer(model)
    before = training(model)
    assert before == {n for n in training(net_with("default")) if "lora_B" in n}
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert training(model) == before


def test_loading_to_train_beside_an_adapter_that_trains_alone(tmp_path):
    config = lambda **o: graft.AdaLoraConfig(total_step=9, target_modules=["inner"], **o)
    net_with("default", config=config).save_pretrained(tmp_path)
    model = net_with("default", config=config)
    model.load_adapter(tmp_path, "b")
    before = model.peft_config["b"].inference_mode
    with pytest.raises(graft.ConfigError, match=r"supports only 1 trainable adapter.*\['default'\]"):
        model.load_adapter(tmp_path, "b", is_trainable=True)
    assert before and model.peft_config["b"].inference_mode


@pytest.mark.differs("`load_adapter` for inference into a model in training")
def test_loading_for_inference_into_a_model_in_training_says_that_training_stops(tmp_path):
    net_with("default").save_pretrained(tmp_path)
    model = net_with("default").train()
    (warned,) = said(lambda: model.load_adapter(tmp_path, "b"))
    assert "eval mode" in str(warned.message) and "model.train()" in str(warned.message)
    assert warned.filename == __file__ and not model.training
    model = net_with("default")
    for load in (
        lambda: model.load_adapter(tmp_path, "b"),
        lambda: model.load_adapter(tmp_path, "c", is_trainable=True),
        lambda: model.train().load_adapter(tmp_path, "d", is_trainable=True),
        lambda: model.load_adapter(tmp_path, "default"),
    ):
        assert said(load) == []


@pytest.mark.differs("`unload()`, `merge_and_unload()`")
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_unloading_lets_the_base_train_as_it_did_before(how):
    plain = net()
    plain.norm.requires_grad_(False)
    before = training(plain)
    model = graft.get_peft_model(plain, lora(modules_to_save=["norm"]))
    model.delete_adapter("default")
    model.add_adapter("b", lora(target_modules=["inner"], modules_to_save=["head"]))
    model.set_adapter("b")
    assert (
        training(getattr(model.base_model, how)())
        == before
        == {f"{m}.{p}" for m in ("inner", "head") for p in ("weight", "bias")}
    )
    frozen = net().requires_grad_(False)
    assert not training(getattr(graft.get_peft_model(frozen, lora()).base_model, how)())


# values


@pytest.mark.differs("merging values that are not finite")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lora", "loha", "ln"])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "layer"])
def test_merging_values_that_are_not_finite(how, kind, value):
    """Subtracting them again would leave the base without its weights."""
    model, base = net_with("default", config=KINDS[kind]), net()
    last = list(layers(model).values())[-1]
    slot = list(last.slots("default"))[-1]
    slot.tensor.data.flatten()[-1] = value
    key, name = last.site.key, f"{slot.container}.default"
    with pytest.raises(ValueError, match=f"NaNs detected.*layer '{key}': '{name}' holds values that are not finite"):
        last.merge() if how == "layer" else getattr(model.base_model, how)()
    assert not get_registry(model).merged_adapters
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))


def test_infinite_parameters_of_which_a_method_makes_finite_weights():
    """A file with VB-LoRA's largest logits alone leaves the others at -inf."""
    config = graft.VBLoRAConfig(
        r=2, num_vectors=9, vector_length=3, topk=2, target_modules=["inner"], save_only_topk_weights=True
    )
    model = graft.get_peft_model(net(), config)
    logits = layers(model)["inner"].vblora_logits_A["default"].data
    logits.scatter_(-1, logits.argmin(-1, keepdim=True), float("-inf"))
    expected = model(X)
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(X), expected)


@pytest.mark.differs("an `alpha` of 0")
@pytest.mark.parametrize(
    "config",
    [
        dict(lora_alpha=0),
        dict(alpha_pattern={"head": 0}),
        lambda: graft.LoHaConfig(r=2, alpha=0, target_modules=["inner", "head"]),
    ],
    ids=["lora", "pattern", "loha"],
)
def test_an_alpha_of_0_is_said_when_the_adapter_is_made(config):
    config = config() if callable(config) else lora(**config)
    (warned,) = said(lambda: graft.get_peft_model(net(), config))
    assert re.search(r"'default' has a scaling of 0 on \d of 2 layers, such as '(inner|head)'", str(warned.message))
    assert warned.filename == __file__
    assert said(lambda: net_with("default")) == []


# names

TWICE = {
    "set_adapter": lambda model, names, tmp: model.base_model.set_adapter(names),
    "functional set_adapter": lambda model, names, tmp: functional.set_adapter(model, names),
    "layer.set_adapter": lambda model, names, tmp: layers(model)["head"].set_adapter(names),
    "set_requires_grad": lambda model, names, tmp: model.set_requires_grad(names),
    "merge_adapter": lambda model, names, tmp: model.base_model.merge_adapter(names),
    "merge_and_unload": lambda model, names, tmp: model.base_model.merge_and_unload(adapter_names=names),
    "layer.merge": lambda model, names, tmp: layers(model)["head"].merge(adapter_names=names),
    "selected_adapters": lambda model, names, tmp: model.save_pretrained(tmp, selected_adapters=names),
}


@pytest.mark.differs("a name twice in `set_adapter`, `merge_adapter`, `selected_adapters`")
@pytest.mark.parametrize("call", TWICE)
def test_a_name_twice(call, tmp_path):
    model = net_with("a", "b")
    before = model(X)
    refuses(ValueError, r"holds \['b'\] twice", TWICE[call], model, ["b", "a", "b"], tmp_path)
    assert torch.equal(model(X), before) and not list(tmp_path.iterdir())
    refuses(TypeError, "takes names of adapters, got 3 of type int", TWICE[call], model, ["a", 3], tmp_path)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "layer.merge", "selected_adapters"])
def test_a_string_where_a_list_is_meant(call, tmp_path):
    with pytest.raises(TypeError, match=r"should be a list of strings, got 'a'. Write \['a'\]"):
        TWICE[call](net_with("a", "b"), "a", tmp_path)
    assert not list(tmp_path.iterdir())


# AdaLoRA without its allocator


class WithoutLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x)


def adalora():
    return graft.AdaLoraConfig(total_step=9, target_modules=["inner"])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("through", ["PeftModel", "tuner", "PeftMixedModel", "a tuner of its own"])
def test_adalora_without_its_allocator_is_said_in_any_loop(through, mode):
    if through == "a tuner of its own":
        model = graft.AdaLoraModel(WithoutLoss(), adalora(), "default")
    else:
        model = graft.get_peft_model(WithoutLoss(), adalora(), mixed=through == "PeftMixedModel")
    run = model.base_model if through == "tuner" else model
    getattr(model, mode)()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def loop():
        for _ in range(3):
            run(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    (warned,) = said(loop)
    assert "without update_and_allocate()" in str(warned.message)
    assert ("no allocator" in str(warned.message)) == (through == "PeftMixedModel")
    assert said(loop) == []


@pytest.mark.differs("AdaLoRA's regularisation")
def test_adaloras_loss_beside_an_adapter_of_another_method():
    class WithLoss(WithoutLoss):
        def forward(self, x):
            return SimpleNamespace(loss=self.inner(x).square().mean())

    model = graft.get_peft_model(WithLoss(), lora(target_modules=["inner"]), "a", mixed=True)
    model.add_adapter("b", adalora())
    model.set_adapter(["a", "b"])
    plain = model.eval()(X).loss
    assert model.train()(X).loss > plain


def test_adalora_with_its_allocator_and_after_a_load_says_nothing(tmp_path):
    model = graft.get_peft_model(WithoutLoss(), adalora())
    model.save_pretrained(tmp_path)
    assert said(lambda: model(X)) == []
    model.load_adapter(tmp_path, "default", is_trainable=True)  # new values, but no step
    assert said(lambda: model(X)) == []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert said(lambda: model(X)) == []
