# SPDX-License-Identifier: Apache-2.0
"""What trainers do with single layers, as with PEFT's: make them by hand, start them again, mark their classes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft.tuners.adaption_prompt import layer as their_attention
from peft.tuners.adaption_prompt import utils as their_rotary
from peft.tuners.lora import layer as theirs
from peft.utils import other
from torch import nn

import graft
from graft.compat.peft import clients, shims
from graft.compat.peft.layers import layer_class
from tests import fresh, models
from tests.pair import LIBS, adapt, randomize
from tests.raised import refuses
from tests.samples import first

PAIRS = pytest.mark.parametrize("name", ["Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"])
BASES = {
    "Linear": lambda: nn.Linear(6, 4),
    "Conv1d": lambda: nn.Conv1d(6, 4, 3, bias=False),
    "Conv2d": lambda: nn.Conv2d(6, 4, 3),
    "Conv3d": lambda: nn.Conv3d(6, 4, 2),
    "Embedding": lambda: nn.Embedding(6, 4),
}
SHAPES = {"Linear": (3, 6), "Conv1d": (2, 6, 5), "Conv2d": (2, 6, 5, 5), "Conv3d": (1, 6, 3, 3, 3), "Embedding": (3, 2)}


def pair(name):
    return layer_class("LORA", name), getattr(theirs, name)


def fill(layer, adapter):
    g = torch.Generator().manual_seed(3)
    for part, p in sorted(layer.named_parameters()):
        if f".{adapter}" in part and "magnitude" not in part:
            p.data = torch.randn(p.shape, generator=g)


@pytest.mark.differs('`lora.Linear(base, "a", config=…, r=…)`, a layer made by hand')
@PAIRS
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_layers_made_by_hand(name, options):
    """The values that PEFT draws, its ΔW, outputs and merged weights, on the module that was given."""
    found = []
    for lib, cls in zip(LIBS, pair(name)):
        torch.manual_seed(0)
        base = BASES[name]()
        before = base.weight.detach().clone()
        layer = cls(base, "a", lib.LoraConfig(**options), 3, lora_alpha=5)
        assert isinstance(layer, cls) and layer.base_layer is base and base.weight.requires_grad
        started = {k: v.clone() for k, v in layer.state_dict().items()}
        fill(layer, "a")
        x = torch.randint(6, SHAPES[name]) if name == "Embedding" else torch.randn(SHAPES[name])
        y, delta = layer(x), layer.get_delta_weight("a")
        y.square().sum().backward()
        grads = {k: p.grad for k, p in layer.named_parameters() if "lora_" in k}
        layer.merge(adapter_names=["a"])
        assert layer.merged_adapters == ["a"]
        found.append((started, y.detach(), delta.detach(), grads, base.weight.detach() - before, layer.scaling["a"]))
        layer.unmerge()
        assert torch.allclose(base.weight, before, atol=1e-5)
    (start, *ours), (their_start, *theirs_) = found
    assert start.keys() == their_start.keys()
    assert all(torch.equal(start[k], their_start[k]) for k in start)
    for a, b in zip(ours, theirs_):
        for x, y in zip(a.values(), b.values()) if isinstance(a, dict) else [(a, b)]:
            assert torch.allclose(torch.as_tensor(x), torch.as_tensor(y), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("shape", [(2, 4, 6), (3, 5, 5), (4, 6)], ids=str)
def test_layers_of_tensors_made_by_hand(shape, transposed):
    found = []
    for lib, cls in zip(LIBS, pair("ParamWrapper")):
        torch.manual_seed(0)
        module = nn.Module()
        module.weight, module.is_transposed = nn.Parameter(torch.randn(shape), requires_grad=False), transposed
        layer = cls(module, "a", "weight", lib.LoraConfig(r=2), r=2, lora_alpha=4)
        assert layer._did_swap_in_out_features is (len(shape) > 2 and not transposed)
        assert isinstance(layer, cls) and layer.parameter_name == "weight"
        assert layer.get_param() is module.weight and not module.weight.requires_grad
        fill(layer, "a")
        found.append(layer.get_delta_weight("a"))
    assert found[0].shape == found[1].shape and torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("of_models", [
    {"layers_to_transform": [1], "layers_pattern": "layers"}, {"layer_replication": [[0, 1]]},
    {"trainable_token_indices": [1]}, {"modules_to_save": ["head"], "ensure_weight_tying": True},
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_what_a_config_says_of_a_whole_model_has_no_effect(of_models):
    for lib, cls in zip(LIBS, pair("Linear")):
        layer = cls(nn.Linear(6, 4), "a", config=lib.LoraConfig(r=2, target_modules=["q_proj"], **of_models), r=2)
        names = [name for name, p in layer.named_parameters() if p.requires_grad]
        assert names == ["base_layer.weight", "base_layer.bias", "lora_A.a.weight", "lora_B.a.weight"]


def test_what_cannot_be_made_by_hand():
    linear, config = nn.Linear(3, 2), graft.LoraConfig()
    Linear, Conv = layer_class("LORA", "Linear"), layer_class("LORA", "Conv2d")
    for cls, options in (Conv, {"config": config}), (Linear, {}), (Linear, {"config": graft.IA3Config()}):
        refuses(TypeError, None, cls, linear, "a", **options)
    refuses(TypeError, "only for isinstance", type("Own", (Linear,), {}), linear, "a", config=config)
    refuses(graft.ConfigError, None, Linear, linear, "a", config=config, r=-1)
    assert type(linear) is nn.Linear and linear.weight.requires_grad and list(linear.state_dict()) == ["weight", "bias"]


def test_only_layers_of_tensors_have_get_param_and_a_parameter_name():
    """By that clients tell them from others."""
    layers = [cls(nn.Linear(3, 2), "a", config=lib.LoraConfig(), r=8) for lib, cls in zip(LIBS, pair("Linear"))]
    assert not any(hasattr(layer, name) for layer in layers for name in ("get_param", "parameter_name"))


def test_get_param_replaced_on_the_class():
    cls = layer_class("LORA", "ParamWrapper")
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(2, 4, 6))
    layer = cls(module, "a", "weight", config=graft.LoraConfig(r=2))
    origin = cls.get_param
    cls.get_param = lambda self: origin(self).shape
    try:
        assert layer.get_param() == (2, 4, 6)
    finally:
        cls.get_param = origin
    assert layer.get_param() is module.weight and layer.num_experts == 2


# a start again


@PAIRS
@pytest.mark.parametrize("how", [True, False, "gaussian"], ids=str)
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_reset_lora_parameters(name, how, options):
    """The values that PEFT draws; parameters stay the same objects, so that optimizers know them."""
    found = []
    if name == "Embedding" and (how == "gaussian" or options.get("lora_bias")):
        pytest.skip("PEFT starts embeddings in one way, and without a bias")
    for lib, cls in zip(LIBS, pair(name)):
        torch.manual_seed(0)
        layer = cls(BASES[name](), "a", config=lib.LoraConfig(r=3, **options), r=3, lora_alpha=5)
        fill(layer, "a")
        held = dict(layer.named_parameters())
        torch.manual_seed(1)
        layer.reset_lora_parameters("a", how)
        assert all(p is held[k] for k, p in layer.named_parameters())
        found.append({k: v.clone() for k, v in layer.state_dict().items()})
        for known in layer.lora_A, layer.lora_embedding_A:  # as ReLoRA goes through them
            [layer.reset_lora_parameters(n, True) for n in known]
    assert found[0].keys() == found[1].keys() and all(torch.equal(v, found[1][k]) for k, v in found[0].items())


@pytest.mark.differs("`layer.reset_lora_parameters` of a merged adapter; of an adapter that is not there")
def test_reset_lora_parameters_of_what_is_merged():
    """The merge is that of the new values, and comes out again."""
    base = nn.Linear(6, 4)
    before = base.weight.detach().clone()
    layer = layer_class("LORA", "Linear")(base, "a", config=graft.LoraConfig())
    fill(layer, "a")
    layer.merge()
    layer.reset_lora_parameters("a", True)
    assert layer.merged and torch.allclose(base.weight, before, atol=1e-6)
    layer.unmerge()
    assert torch.allclose(base.weight, before, atol=1e-6)


def test_reset_lora_parameters_with_bad_input():
    layers = [cls(nn.Linear(6, 4), "a", config=lib.LoraConfig(), r=8) for lib, cls in zip(LIBS, pair("Linear"))]
    for layer in layers:
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        for how in ("pissa", "nothing"):
            refuses(ValueError, "Unknown initialization", layer.reset_lora_parameters, "a", how)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    refuses(graft.AdapterNotFoundError, None, layers[0].reset_lora_parameters, "b", True)  # PEFT does nothing
    vera = graft.get_peft_model(
        nn.Sequential(nn.Linear(6, 4)), graft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    refuses(graft.ConfigError, "IA3", vera.base_model.model[0].reset_lora_parameters, "default", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_an_adapter_to_its_base(dtype):
    """Dtypes as in PEFT, whole numbers stay, parameters stay the same objects."""
    found = []
    for lib, cls in zip(LIBS, pair("Linear")):
        torch.manual_seed(0)
        layer = cls(nn.Linear(6, 4), "a", config=lib.LoraConfig(use_dora=True), r=2)
        layer.base_layer.to(dtype)
        held = dict(layer.named_parameters())
        layer._move_adapter_to_device_of_base_layer("a")
        layer._move_adapter_to_device_of_base_layer("missing")
        assert all(p is held[k] for k, p in layer.named_parameters())
        found.append({k: v for k, v in layer.state_dict().items() if "lora" in k})
        assert {v.dtype for v in found[-1].values()} == {dtype}
        layer._move_adapter_to_device_of_base_layer("a", torch.device("cpu"))
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


# the base model's configs


@pytest.mark.parametrize("lib", LIBS, ids=lambda lib: lib.__name__)
def test_the_base_model_shows_the_configs(lib, tmp_path):
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    config = lib.LoraConfig(target_modules=["0"])
    model = lib.get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    assert list(model.model.peft_config) == ["a", "b"] and model.model.peft_config["a"] is model.peft_config["a"]
    model.set_adapter("b")
    model.delete_adapter("a")
    assert list(model.model.peft_config) == ["b"]
    assert list(copy.deepcopy(model).model.peft_config) == ["b"]
    model.save_pretrained(tmp_path)
    assert not hasattr(model.unload(), "peft_config")
    loaded = lib.PeftModel.from_pretrained(base, str(tmp_path / "b"), "c")
    assert list(loaded.model.peft_config) == ["c"]
    assert not hasattr(loaded.merge_and_unload(), "peft_config")


def test_the_configs_that_a_base_shows_are_no_adapters_of_its_own():
    """A second PeftModel on the base is an error as before; a failed injection leaves nothing."""
    base = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(graft.NoMatchingPeftModuleError):
        graft.get_peft_model(base, graft.LoraConfig(target_modules=["none"]))
    assert not hasattr(base, "peft_config")
    config = graft.LoraConfig(target_modules=["0"])
    model = graft.get_peft_model(base, config)
    for make in (graft.get_peft_model, graft.PeftModel, lambda b, c: graft.LoraModel(b, c, "other")):
        refuses(graft.AlreadyInjectedError, None, make, base, config)
    assert list(base.peft_config) == ["default"] and list(pickle.loads(pickle.dumps(base.peft_config))) == ["default"]
    assert type(model.unload()) is nn.Sequential
    injected = graft.inject_adapter_in_model(config, base, "x")
    assert list(graft.PeftModel(injected, config, "y").peft_config) == ["x", "y"]


# names


def test_rotary_helpers():
    q, position_ids = torch.randn(2, 3, 4, 8), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 6]])
    cos, sin = torch.randn(9, 8), torch.randn(9, 8)
    assert torch.equal(clients.llama_rotate_half(q), their_rotary.llama_rotate_half(q))
    for shape in (9, 8), (1, 1, 9, 8):
        args = q, cos.view(shape), sin.view(shape), position_ids
        assert torch.equal(clients.llama_apply_rotary_pos_emb(*args), their_rotary.llama_apply_rotary_pos_emb(*args))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_adapted_attentions(model):
    found = []
    for lib, classes in zip(LIBS, (None, their_attention)):
        config = lib.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
        made = lib.get_peft_model(models.make(model), config)
        names = "AdaptedAttention", "AdaptedAttentionGPT"
        kinds = [getattr(classes, n) if classes else layer_class("ADAPTION_PROMPT", n) for n in names]
        found.append([sum(isinstance(m, kind) for m in made.modules()) for kind in kinds])
    assert found[0][model == "gpt2"] == found[1][model == "gpt2"] == 1
    if model == "llama":
        assert found[0] == found[1]


def run(code):
    done = fresh.run("-W", "error::UserWarning", "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.differs(
    "making a `RankAllocator` or `DoraLinearLayer`, calling `dispatch_default`, `lora_ga_init` and their like"
)
def test_names_that_clients_import_mark_and_replace():
    run(
        """
import graft.compat.peft
graft.compat.peft.install()
import warnings
from peft.tuners.adalora import RankAllocator
from peft.tuners.adalora.layer import RankAllocator as same
from peft.tuners.adaption_prompt.layer import AdaptedAttention
from peft.tuners.adaption_prompt.utils import llama_apply_rotary_pos_emb, llama_rotate_half
from peft.tuners.lora import Linear, LoraLayer, layer, model
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import MiCALinearVariant
from peft.tuners.lora.bnb import dispatch_bnb_4bit, dispatch_bnb_8bit
from peft.tuners.lora.layer import ParamWrapper, dispatch_default
from peft.tuners.lora.te import TeLinear, dispatch_transformer_engine
from peft.tuners.lora.torchao import dispatch_torchao
from peft.tuners.lora.tp_layer import dispatch_megatron
from torch import nn

assert same is RankAllocator and model.dispatch_torchao is dispatch_torchao and "dispatch_default" in dir(layer)

def fails(kind, text, call):
    try:
        call()
    except kind as e:
        assert text in str(e), e
    else:
        raise AssertionError(text)

base = nn.Linear(3, 2)
for dispatch in dispatch_default, dispatch_torchao, dispatch_bnb_4bit, dispatch_transformer_engine, dispatch_megatron:
    fails(NotImplementedError, dispatch.__name__ + "()", lambda: dispatch(base, "default"))
fails(NotImplementedError, "update_and_allocate", lambda: RankAllocator(base, None, "default"))
fails(NotImplementedError, "storage", lambda: DoraLinearLayer(False))
fails(NotImplementedError, "init_lora_weights", MiCALinearVariant)
fails(NotImplementedError, "injection", lambda: LoraLayer.lora_ga_init("default", None))
assert not hasattr(Linear, "_other")
fails(TypeError, "config=", lambda: TeLinear(base, "default"))
assert not isinstance(base, TeLinear)

ParamWrapper._marked, Linear._marked = True, 3  # a client's own names
assert ParamWrapper._marked and getattr(Linear, "_marked") == 3 and not getattr(Linear, "_other", False)
fails(AttributeError, "change nothing", lambda: setattr(Linear, "update_layer", lambda self: None))
replaced = (RankAllocator, "mask_to_budget"), (ParamWrapper, "__init__"), (DoraLinearLayer, "update_layer")
for cls, name in replaced:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setattr(cls, name, lambda self, *args: None)
    assert [name in str(w.message) for w in caught] == [True], caught
    assert name in vars(cls)
"""
    )


def test_the_class_that_clients_write_into_configs():
    for lib in LIBS:
        layers = lib.get_peft_model(models.make("llama"), lib.LoraConfig(target_modules=["q_proj"]))
        prompt = lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        prompts = lib.get_peft_model(models.make("llama"), prompt)
        assert layers._get_base_model_class() is prompts._get_base_model_class(is_prompt_tuning=True)
        assert layers._get_base_model_class() is type(models.make("llama"))


def test_marks_of_a_layer():
    sample = first("LORA", "llama")
    model = adapt(graft, sample)
    randomize(model, sample)
    layer = next(m for m in model.modules() if isinstance(m, graft.AdapterLayer))
    batch = models.inputs("llama")
    before = models.output(model, batch)
    layer._marked = layer.name = True
    assert layer._marked and layer.name and torch.equal(models.output(model, batch), before)


@pytest.mark.parametrize("lib", LIBS, ids=lambda lib: lib.__name__)
def test_heads_and_rows_alone(lib):
    """As trainers switch what trains whole, beside layers that they switch by themselves."""
    set_alone = (shims if lib is graft else other)._set_adapter
    model = lib.get_peft_model(models.make("mlp"), lib.LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
    model.add_adapter("other", lib.LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
    model.add_adapter("without", lib.LoraConfig(target_modules=["lin0"]))
    head, layer = model.base_model.model.head, model.base_model.model.lin0
    set_alone(model, "other")
    assert head.active_adapters == ["other"] and layer.active_adapters == ["default"]
    trains = {n for n, p in head.named_parameters() if p.requires_grad}
    assert trains == {"modules_to_save.other.weight", "modules_to_save.other.bias"}
    set_alone(model, "without")
    assert head.active_adapters == [] and not any(p.requires_grad for p in head.parameters())
