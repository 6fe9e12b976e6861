# SPDX-License-Identifier: Apache-2.0
"""PeftMixedModel: adapters of several methods on one model, active at once."""

import warnings

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.rows import Run
from graft.methods import METHODS
from graft.methods.adalora.allocator import orthogonal_losses
from tests.covering import Sometimes, law
from tests.leaves_out import WHOLE_GRAPHS
from tests.looks import get_registry, layers, merged
from tests.models import seeded
from tests.raised import refuses

X = torch.linspace(-1, 1, 30).view(5, 6)
CONFIGS = {
    "LORA": dict(r=2, lora_alpha=6),
    "ADALORA": dict(init_r=3, target_r=2, total_step=9),
    "LOHA": dict(r=2, alpha=3),
    "IA3": dict(feedforward_modules=["two"]),
    "VERA": dict(r=3),
    "OFT": dict(oft_block_size=2),
    "HRA": dict(r=2),
    "HIRA": dict(r=2),
    "MISS": dict(r=2),
    "VBLORA": dict(r=2, num_vectors=5, vector_length=2),
    "GRALORA": dict(r=2, alpha=3),
    "DELORA": dict(r=2, delora_lambda=2),
    "C3A": dict(block_size=2),
    "FOURIERFT": dict(n_frequency=9, scaling=11),
    "WAVEFT": dict(n_frequency=9, scaling=2),
    "LOKR": dict(r=1, alpha=1.3),
    "ROAD": dict(group_size=2),
    "PVERA": dict(r=3),
    "RANDLORA": dict(r=2, randlora_alpha=3),
    "UNILORA": dict(r=2, theta_d_length=9),
    "TINYLORA": dict(u=5),
    "GLORA": dict(r=2),
    "PEANUT": dict(r=2, act_fn="tanh"),
    "ADAMSS": dict(r=4, num_subspaces=2),
    "FROD": dict(sparse_rate=0.2),
}
NAMES = [name for name in CONFIGS if name in METHODS]
PAIRS = [(a, b) for a in NAMES for b in NAMES]


def met(pair):
    """What the pairs of the default run meet: each method first and second, and an eighth of all pairs."""
    return [(1, pair[0]), (2, pair[1]), Sometimes(pair, 8)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def net():
    with seeded(0):
        return Net().eval()


def config(method, lib=graft, targets=("one", "two"), **options):
    mapping = lib.PEFT_TYPE_TO_CONFIG_MAPPING
    key = method if lib is graft else lib.PeftType(method)
    return mapping[key](target_modules=list(targets), **CONFIGS[method] | options)


def mixed(*methods, names="abc", base=None, **options):
    """A model with an adapter of each method, each of which does something. The first is active."""
    with seeded(1):
        model = graft.get_peft_model(net() if base is None else base, config(methods[0]), names[0], mixed=True)
        for name, method in zip(names[1:], methods[1:]):
            kind = dict(inference_mode=True) if method == "ADALORA" else {}
            model.add_adapter(name, config(method, **kind))
    return disturb(model).eval()


@torch.no_grad()
def disturb(model):
    with seeded(2):
        for layer in layers(model).values():
            for name in layer.adapters:
                for slot in layer.slots(name):
                    if slot.trains:
                        slot.tensor.add_(torch.randn(slot.tensor.shape) * 0.3)
        for slot in [s for n in model.peft_config for s in get_registry(model).common_tensors.slots(n) if s.trains]:
            slot.tensor.add_(torch.randn(slot.tensor.shape) * 0.3)
    return model


@pytest.mark.differs("`PeftMixedModel`: which methods")
@law("a, b", PAIRS, met)
def test_every_ordered_pair_acts_and_merges(a, b):
    model, x = mixed(a, b), X
    assert type(model) is graft.PeftMixedModel and model.active_adapters == ["a"]
    alone = {}
    for name in "ab":
        model.set_adapter(name)
        alone[name] = model(x)
    model.set_adapter(["a", "b"])
    both = model(x)
    assert all((both - y).abs().max() > 1e-4 for y in alone.values())
    with model.disable_adapter():
        assert_close(model(x), net()(x))
    rows = model(x, adapter_names=["a", "b", "__base__", "b", "a"])
    for row, y in ((0, alone["a"]), (1, alone["b"]), (2, net()(x)), (4, alone["a"])):
        assert_close(rows[row], y[row], rtol=1e-4, atol=1e-5)
    model.base_model.merge_adapter()
    assert merged(model) == ["a", "b"]
    assert_close(model(x), both, rtol=1e-4, atol=1e-5)
    model.base_model.unmerge_adapter()
    assert_close(model(x), both, rtol=1e-4, atol=1e-5)
    plain = model.merge_and_unload()
    assert type(plain.one) is nn.Linear
    assert_close(plain(x), both, rtol=1e-4, atol=1e-5)


@pytest.mark.differs("`PeftMixedModel`: layers, files, rows")
@law("a, b", [(a, b) for a, b in PAIRS if a < b], lambda pair: [(1, pair[0]), (2, pair[1])])
def test_each_is_saved_as_an_adapter_of_its_own(a, b, tmp_path):
    model = mixed(a, b)
    model.save_pretrained(tmp_path)
    loaded = graft.PeftMixedModel.from_pretrained(net(), tmp_path / "a", "a")
    loaded.load_adapter(tmp_path / "b", "b")
    for name, method in (("a", a), ("b", b)):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert_close(loaded(X), model(X))
        alone = graft.PeftModel.from_pretrained(net(), tmp_path / name)
        assert alone.peft_type == method and not isinstance(alone, graft.PeftMixedModel)
        assert_close(alone(X), model(X))
    for m in (model, loaded):
        m.set_adapter(["a", "b"])
    assert_close(loaded(X), model(X))


THEIRS = ("LORA", "LOHA", "OFT")  # that PEFT mixes, and that graft has


@pytest.mark.parametrize("a, b", [(a, b) for a in THEIRS for b in THEIRS if (a, b) != ("OFT", "OFT")])
def test_two_methods_give_what_peft_gives(a, b):
    ours = mixed(a, b)
    theirs = peft.get_peft_model(net(), config(a, peft), "a", mixed=True)
    theirs.add_adapter("b", config(b, peft))
    found = {n.replace(".base_layer", ""): p for n, p in ours.named_parameters()}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(found[name.replace(".base_layer", "")])
    theirs.set_adapter(["a", "b"])
    ours.set_adapter(["a", "b"])
    assert_close(ours(X), theirs.eval()(X), rtol=1e-5, atol=1e-5)


def test_three_methods_and_two_adapters_of_one():
    model = mixed("LORA", "OFT", "LORA")
    model.set_adapter(["a", "b", "c"])
    y = model(X)
    model.base_model.merge_adapter(["b"])
    model.base_model.merge_adapter(["a", "c"])
    assert_close(model(X), y, rtol=1e-4, atol=1e-5)


def test_what_trains_is_what_is_active():
    model = mixed("LORA", "VERA")
    model.set_adapter(["b", "a"])
    model.train()(X).sum().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any(".vera_lambda_" in n for n in got) and any(".lora_A.a" in n for n in got)
    model.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_methods_that_call_different_things_by_one_name():
    """LoRA's A is a module, AdaLoRA's a parameter."""
    model = mixed("LORA", "ADALORA")
    names = {n for n, _ in model.named_parameters()}
    assert {f"base_model.model.one.lora_A.{n}" for n in ("a.weight", "b")} <= names
    model.double()
    assert model(X.double()).dtype == torch.float64
    model.delete_adapter("a")
    assert {n for n, _ in model.named_parameters() if "lora_A" in n} == {
        f"base_model.model.{key}.lora_A.b" for key in ("one", "two")
    }


def test_two_adapters_of_adalora_train():
    """A mixed model has no budget to divide; the loss has the distances of both."""
    model = graft.get_peft_model(net(), config("ADALORA"), "a", mixed=True)
    model.add_adapter("b", config("ADALORA"))
    model.set_adapter(["a", "b"])
    trains = {n.split(".")[-2 if n.endswith("weight") else -1] for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {"a", "b"}
    run = Run((), {}, {})
    both = orthogonal_losses(get_registry(model), "ab", run)
    for name in "ab":
        model.set_adapter(name)
        single = orthogonal_losses(get_registry(model), model.active_adapters, run)
        assert single.keys() == {name} and both[name]() > 0
        assert_close(both[name](), single[name]())


def test_deleting_several():
    model = mixed("LORA", "OFT", "LOHA")
    model.set_adapter(["a", "c"])
    refuses(ValueError, "zz", model.delete_adapter, ["b", "zz"])
    assert list(model.peft_config) == ["a", "b", "c"]
    model.base_model.merge_adapter()
    refuses(ValueError, r"Cannot delete adapter\(s\) \['a'\] while they are merged", model.delete_adapter, ["a", "b"])
    model.base_model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter(["b", "a"])
    assert list(model.peft_config) == ["c"] and model.active_adapters == ["c"]


def test_what_a_mixed_model_refuses():
    model = mixed("LORA")
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        model.add_adapter("p", graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refuses(ValueError, "'a' already exists", model.add_adapter, "a", config("OFT"))
    refuses(graft.NoMatchingPeftModuleError, None, model.add_adapter, "b", config("OFT", targets=["zz"]))
    refuses(graft.AdapterNotFoundError, "zz", model.set_adapter, ["a", "zz"])
    assert set(model.state_dict()) == before and list(model.peft_config) == ["a"]
    with pytest.raises(graft.ConfigError, match=r"peft types.*'b'.*PeftMixedModel\.from_pretrained.*mixed=True"):
        graft.get_peft_model(net(), config("LORA")).add_adapter("b", config("OFT"))


@pytest.mark.parametrize("lib", [graft, peft])
def test_a_mixed_model_begins_with_an_adapter_on_layers(lib):
    from tests import models

    prompt = lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    base = models.make("llama")
    with pytest.raises(ValueError, match="'PROMPT_TUNING' is not compatible with the `PeftMixedModel`"):
        lib.get_peft_model(base, prompt, mixed=True)
    assert all(p.requires_grad for p in base.parameters())
    refuses(ValueError, "Please specify `target_modules`", lib.get_peft_model, net(), lib.LoraConfig(), mixed=True)
    model = lib.get_peft_model(models.make("llama"), lib.LoraConfig(), mixed=True)
    assert set(model.peft_config["default"].target_modules) == {"q_proj", "v_proj"}


@pytest.mark.differs(
    "`PeftMixedModel`: `get_layer_status`, `get_model_status`, `create_or_update_model_card`; `active_adapter` of "
    "several"
)
def test_what_a_mixed_model_tells(tmp_path):
    """PEFT refuses some of it, counts each layer twice, and gives a list for the active adapter."""
    model = mixed("LORA", "LOHA")
    status = {s.name: s for s in model.get_layer_status()}
    assert set(status) == {"model.one", "model.two"} and status["model.one"].available_adapters == ["a", "b"]
    assert graft.get_model_status(model).peft_types == {"a": "LORA", "b": "LOHA"}
    model.set_adapter(["b", "a"])
    assert model.active_adapters == ["b", "a"] and model.active_adapter == "b"
    model.create_or_update_model_card(tmp_path)
    assert "base_model" in (tmp_path / "README.md").read_text()
    theirs = peft.get_peft_model(net(), config("LORA", peft), "a", mixed=True)
    assert model.get_nb_trainable_parameters()[0] > theirs.get_nb_trainable_parameters()[0]
    model.set_adapter("a")
    assert model.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


def test_loading_keeps_what_is_active(tmp_path):
    for method in ("LORA", "OFT"):
        for lib in (graft, peft):
            lib.get_peft_model(net(), config(method, lib)).save_pretrained(tmp_path / lib.__name__ / method)
    for lib in (graft, peft):
        model = lib.PeftMixedModel.from_pretrained(net(), tmp_path / lib.__name__ / "LORA", "a")
        model.load_adapter(tmp_path / lib.__name__ / "OFT", "b")
        assert model.active_adapters == ["a"] and list(model.peft_config) == ["a", "b"]


def test_a_failed_adapter_of_another_method_leaves_the_first():
    model = mixed("VERA")
    expected, before = model(X), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(graft.UnsupportedLayerError):
        bad = graft.TrainableTokensConfig(token_indices=[99], target_modules=["one"])
        model.add_adapter("b", bad)
    assert torch.equal(model(X), expected)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_mixed_model_has_what_the_models_of_its_methods_have():
    """Methods of one name run for each method; adapters of others are refused."""
    with seeded(1):
        model = graft.get_peft_model(net(), config("ADALORA"), "a", mixed=True)
        assert not hasattr(model, "get_nb_savable_parameters")
        model.add_adapter("b", config("ADAMSS", use_asa=True, init_warmup=0, final_warmup=9, mask_interval=9))
    model.set_adapter(["a", "b"])
    model(X).square().sum().backward()
    model.base_model.update_and_allocate(1)
    states = get_registry(model).states
    assert set(states) == {"a", "b"}
    assert model.trainable_adapter_name == "a"
    with pytest.raises(graft.ConfigError, match="'b' is ADAMSS, which has no `resize_"):
        model.base_model.resize_modules_by_rank_pattern({}, "b")
    model.add_adapter("c", config("VBLORA"))
    alone = graft.get_peft_model(net(), config("VBLORA"), "c")
    assert model.get_nb_savable_parameters("c")[0] == alone.get_nb_savable_parameters("c")[0]


@WHOLE_GRAPHS
def test_a_mixed_model_is_compiled_whole():
    with seeded(1):
        model = graft.get_peft_model(net(), config("ADALORA"), "a", mixed=True)
        model.add_adapter("b", config("ADAMSS", use_asa=True, init_warmup=0, final_warmup=9, mask_interval=9))
    model.set_adapter(["a", "b"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(X), model(X))
