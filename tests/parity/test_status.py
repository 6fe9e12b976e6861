# SPDX-License-Identifier: Apache-2.0
"""What the models say about themselves: layer and model status, parameter counts, properties."""

from dataclasses import asdict

import pytest

from tests import models
from tests.covering import Case, Sometimes, law
from tests.pair import LIBS, adapt, both, trainable
from tests.samples import METHODS, SAMPLES, each, first, mergeable, over

STATES = {
    "fresh": lambda lib, m, s: None,
    "two": lambda lib, m, s: m.add_adapter("b", s.config(lib)),
    "switched": lambda lib, m, s: (m.add_adapter("b", s.config(lib)), m.set_adapter("b")),
    "merged": lambda lib, m, s: m.merge_adapter(),
    "disabled": lambda lib, m, s: m.base_model.disable_adapter_layers(),
    "all_trainable": lambda lib, m, s: (m.add_adapter("b", s.config(lib)), m.set_requires_grad(["default", "b"])),
    "deleted": lambda lib, m, s: (m.add_adapter("b", s.config(lib)), m.delete_adapter("default")),
}


# freezing adapters while they are disabled is PEFT's way of disabling: test_disabling_freezes_nothing
GRADIENTS = ("requires_grad", "trainable_params")


def status(lib, model, without=()):
    """Model status, and layer status by name."""
    whole = asdict(lib.get_model_status(model))
    layers = {layer.name: asdict(layer) for layer in lib.get_layer_status(model)}
    for found in (whole, *layers.values()):
        for key in without:
            found.pop(key, None)
        if not str(found.get("module_type", "lora.")).startswith("lora."):
            found.pop("module_type")  # PEFT has a class for each method and layer type: tests of graft.compat
    return whole, layers


STATUS_OF = [*each("plain", "mlp llama conv2d embedding"), first("LORA", "mlp", "head"), first("IA3", "mlp", "head")]


@law(
    "sample, state",
    # merged norms are swapped modules, of which PEFT reports the base's flags
    [
        Case((s, state))
        for s in STATUS_OF
        for state in STATES
        if state != "merged" or (s.method != "LN_TUNING" and mergeable([s]))
    ],
    lambda case: [
        (case[1], case[0].model),
        (case[0].method, case[0].model, case[0].name),
        Sometimes((case[1], case[0].method), 3),
    ],
)
def test_status(sample, state):
    found = []
    for lib, model in zip(LIBS, both(sample)):
        STATES[state](lib, model, sample)
        found.append(status(lib, model, GRADIENTS if state == "disabled" else ()))
        assert asdict(model.get_model_status()) == asdict(lib.get_model_status(model))
    ours, theirs = found
    assert ours[0] == theirs[0]
    assert list(ours[1]) == list(theirs[1])
    for name, layer in theirs[1].items():
        assert ours[1][name] == layer


@pytest.mark.differs("`disable_adapter`")
@pytest.mark.graft_only
@over(each(models="mlp"))
def test_disabling_freezes_nothing(sample):
    """PEFT freezes on disabling and makes all trainable on enabling, also what was frozen before."""
    model = adapt(LIBS[0], sample)
    next(p for p in model.parameters() if p.requires_grad).requires_grad = False
    before = trainable(model)
    with model.disable_adapter():
        assert trainable(model) == before
    assert trainable(model) == before


def test_irregular_status():
    """Layers that disagree: one frozen, one merged, one disabled."""
    sample, found = first("LORA"), []
    for lib, model in zip(LIBS, both(sample)):
        layers = model.base_model.model
        layers.lin0.lora_A["default"].weight.requires_grad = False
        layers.layers[0].fc1.merge()
        layers.layers[1].fc1.enable_adapters(False)
        found.append(status(lib, model, GRADIENTS))
        whole = lib.get_model_status(model)
        assert whole.enabled == whole.merged_adapters == whole.requires_grad["default"] == "irregular"
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_status_of_an_injected_model(name):
    sample, found = first("LORA", name), []
    for lib in LIBS:
        found.append(status(lib, lib.inject_adapter_in_model(sample.config(lib), models.make(name))))
    assert found[0] == found[1]


@over([s for s in SAMPLES if s.name in ("plain", "head", "tokens", "bias_all")])
def test_printed_counts(sample, capsys):
    printed = []
    for model in both(sample):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].startswith("trainable params: ")


PROPERTIES = [
    "active_adapter",
    "active_adapters",
    "modules_to_save",
    "has_active_enabled_adapter",
    "base_model_torch_dtype",
]


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("sample", [first("LORA"), first("LORA", "mlp", "head"), first("LORA", "llama")], ids=str)
def test_properties(sample, name):
    ours, theirs = (getattr(m, name) for m in both(sample))
    assert ours == theirs


@pytest.mark.parametrize("sample", [first("LORA", "mlp", "head"), *each("tokens", "gpt2")], ids=str)
def test_type_of_the_active_adapter(sample):
    """A name on a PeftModel and on wrappers, a list on the tuner and on layers: others iterate over it."""
    wrappers = ("ModulesToSaveWrapper", "TrainableTokensWrapper")
    seen = []
    for model in both(sample):
        parts = [m for m in model.modules() if type(m).__name__ in wrappers or hasattr(m, "base_layer")]
        assert len(parts) > 2
        bare = LIBS[len(seen)].inject_adapter_in_model(sample.config(LIBS[len(seen)]), models.make(sample.model), "z")
        parts += [m for m in bare.modules() if hasattr(m, "base_layer")]
        seen.append([model.active_adapter, model.base_model.active_adapter, *(m.active_adapter for m in parts)])
    assert seen[0] == seen[1]


@pytest.mark.differs("`PeftModel.active_adapter` where several are active")
def test_setting_the_active_adapter():
    """PEFT only notes the name."""
    model = adapt(LIBS[0], first("LORA"))
    model.add_adapter("other", first("LORA").config(LIBS[0]))
    model.active_adapter = "other"
    assert model.active_adapter == "other" and model.base_model.active_adapters == ["other"]
    model.base_model.active_adapter = ["default", "other"]
    assert model.active_adapter == "default" and model.active_adapters == ["default", "other"]
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert model.active_adapter is None


@over(each())
def test_structure(sample):
    """PeftModel, tuner, base model; attributes fall through to the base."""
    base = models.make(sample.model)
    model = adapt(LIBS[0], sample, base=base)
    assert model.get_base_model() is base is model.base_model.model
    assert type(model.base_model).__name__ == type(adapt(LIBS[1], sample).base_model).__name__
    assert model.peft_type == sample.method
    assert model.base_model.prefix == adapt(LIBS[1], sample).base_model.prefix
    assert getattr(model, "head" if sample.model == "mlp" else "lm_head") is not None
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute


ATTRIBUTES = dict.fromkeys(METHODS, "active_adapters merged merged_adapters disable_adapters")
ATTRIBUTES["LORA"] += " r lora_alpha scaling use_rslora in_features out_features fan_in_fan_out"
ATTRIBUTES["HIRA"] += " r in_features out_features"
ATTRIBUTES["MISS"] += " miss_r miss_mini_r in_features out_features"
ATTRIBUTES["VBLORA"] += " r topk in_features out_features fan_in_fan_out"
ATTRIBUTES["LOHA"] += " r alpha scaling rank_dropout module_dropout"
ATTRIBUTES["GRALORA"] += " r alpha scaling gralora_k hybrid_r"
ATTRIBUTES["DELORA"] += " r"
ATTRIBUTES["C3A"] += " block_size"
ATTRIBUTES["FOURIERFT"] += " fourierft_n_frequency fourierft_scaling fourierft_random_loc_seed"
ATTRIBUTES["WAVEFT"] += (
    " waveft_n_frequency waveft_scaling waveft_random_loc_seed waveft_wavelet_family waveft_use_idwt"
)
ATTRIBUTES["LOKR"] += " r alpha scaling rank_dropout module_dropout rank_dropout_scale"
ATTRIBUTES["ROAD"] += " variant group_size"
for _name in METHODS.keys() & {"PVERA", "RANDLORA", "UNILORA", "TINYLORA"}:
    ATTRIBUTES[_name] += " r scaling in_features out_features fan_in_fan_out"


@over(each(models="mlp conv1D conv2d embedding"))
def test_layer_attributes(sample):
    """What other libraries read off a layer."""
    ours, theirs = (dict(m.base_model.model.named_modules()) for m in both(sample))
    layers = [name for name, layer in theirs.items() if hasattr(layer, "base_layer")]
    assert layers
    for name in layers:
        for attribute in ATTRIBUTES[sample.method].split():
            if hasattr(theirs[name], attribute):
                assert getattr(ours[name], attribute) == getattr(theirs[name], attribute), (name, attribute)
        assert any("default" in getattr(ours[name], container) for container in ours[name].adapter_layer_names)


@pytest.mark.parametrize("sample", [first("LORA"), first("LORA", "embedding")], ids=str)
def test_containers_of_lora(sample):
    """Other libraries ask `adapter in layer.lora_embedding_A` of any LoRA layer."""
    for lib in LIBS:
        for layer in adapt(lib, sample).modules():
            if hasattr(layer, "lora_dropout"):
                for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
                    assert list(getattr(layer, name)) in ([], ["default"])


def test_requires_grad_survives_a_second_adapter():
    sample, found = first("LORA"), []
    for lib, model in zip(LIBS, both(sample)):
        model.base_model.model.head.weight.requires_grad = True
        model.add_adapter("b", sample.config(lib))
        found.append(trainable(model))
    assert found[0] == found[1] and "base_model.model.head.weight" in found[0]
