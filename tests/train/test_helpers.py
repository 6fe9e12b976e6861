# SPDX-License-Identifier: Apache-2.0
"""Helpers of training scripts and functions on models without a wrapper, against PEFT's."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import peft
import peft.functional
import peft.helpers
import peft.tuners.tuners_utils
import pytest
import torch
from peft.utils import other
from torch import nn

import graft
from graft.compat.peft import shims
from graft.compat.peft.names import import_held
from graft.core.errors import AdapterNotFoundError
from graft.model import functional
from graft.train import helpers
from graft.train.helpers import move_tensors
from graft.train.optimizer_states import place_value
from tests import models
from tests.pair import LIBS, adapt, outcome
from tests.samples import first

LORA = first("LORA", "llama")


def facts(model: nn.Module) -> dict:
    return {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}


# k-bit preparation, dtypes, labels


@pytest.mark.parametrize("mark", [{}, {"is_loaded_in_4bit": True}, {"is_loaded_in_8bit": True}, "gptq", "hqq", "other"])
@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, None], ids=["default", "not reentrant", "off"])
def test_prepare_model_for_kbit_training(mark, options):
    found = []
    for prepare in (helpers.prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training):
        model = models.make("llama").to(torch.bfloat16)
        for name, value in (mark if isinstance(mark, dict) else {"quantization_method": mark}).items():
            setattr(model, name, value)
        assert prepare(model, options is not None, options or None) is model
        hooks = len(model.get_input_embeddings()._forward_hooks)
        name = "is_activation_checkpointing"  # in transformers 5
        on = getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing")
        found.append((facts(model), on, hooks))
    assert found[0] == found[1]


def test_checkpointing_options_that_a_model_does_not_take():
    class Old(nn.Linear):
        is_loaded_in_4bit = True
        called = 0

        def gradient_checkpointing_enable(self):
            self.called += 1

    model = Old(2, 2)
    with pytest.warns(UserWarning, match="gradient_checkpointing_kwargs is not supported"):
        helpers.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.called == 1


def test_cast_mixed_precision_params():
    found = []
    for lib in LIBS:
        model = adapt(lib, LORA, base=models.make("llama").half(), autocast_adapter_dtype=False)
        lib.cast_mixed_precision_params(model, torch.bfloat16)
        found.append(facts(model))
    assert found[0] == found[1] and len(set(found[0].values())) == 2


@pytest.mark.differs("`cast_mixed_precision_params` on a packed base")
def test_codes_are_not_cast():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            codes = torch.tensor([[100_003, 7]])
            self.weight, self.bias = nn.Parameter(codes, requires_grad=False), nn.Parameter(torch.ones(2))

    for lib in LIBS:
        model = nn.Sequential(Packed(), nn.Linear(2, 2).requires_grad_(False))
        lib.cast_mixed_precision_params(model, torch.bfloat16)
        kept = model[0].weight.dtype == torch.int64 and model[0].weight.tolist() == [[100_003, 7]]
        assert kept == (lib is graft)
        assert model[0].bias.dtype == torch.float32 and model[1].weight.dtype == torch.bfloat16


def test_shift_tokens_right():
    labels = torch.tensor([[5, -100, 7, 8], [-100, 3, 2, 1]])
    assert torch.equal(*(lib.shift_tokens_right(labels, 0, 9) for lib in LIBS))
    for lib in LIBS:
        with pytest.raises(ValueError, match="pad_token_id has to be defined"):
            lib.shift_tokens_right(labels, None, 9)


def test_infer_device():
    assert helpers.infer_device() == other.infer_device()


# FSDP


def wrapped(policy, model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=1)}


def test_fsdp_auto_wrap_policy(monkeypatch):
    pairs = [(lib, adapt(lib, LORA)) for lib in LIBS]
    policies = {graft: helpers.fsdp_auto_wrap_policy, peft: other.fsdp_auto_wrap_policy}
    found = [wrapped(policies[lib](model), model) for lib, model in pairs]
    assert found[0] == found[1] and any(n.endswith("lora_A.default") for n in found[0])
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    found = [wrapped(policies[lib](model), model) for lib, model in pairs]
    assert found[0] == found[1] and any(n.endswith(".mlp") for n in found[0])
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NotThere")
    for lib, model in pairs:
        with pytest.raises(TypeError, match="Could not find the transformer layer class to wrap"):
            policies[lib](model)


# adapters of a model without a wrapper


def injected(lib, *adapters: str) -> nn.Module:
    model = models.make("llama")
    for adapter in adapters:
        lib.inject_adapter_in_model(LORA.config(lib), model, adapter)
    return model


SIDES = [(graft, functional), (peft, peft.functional)]


def state(model: nn.Module) -> tuple:
    layers = [m for m in model.modules() if hasattr(m, "active_adapters") and hasattr(m, "lora_A")]
    return facts(model), [(list(m.active_adapters), m.merged, list(m.lora_A)) for m in layers]


@pytest.mark.parametrize("steps", [
    [("set_adapter", "a")], [("set_adapter", ["a", "b"])], [("set_adapter", ["b", "a"], True)],
    [("set_requires_grad", "a")], [("set_requires_grad", ["a", "b"], False)], [("delete_adapter", "a", "lora_")],
    [("delete_adapter", "b", "lora_")], [("set_adapter", ["a", "b"]), ("delete_adapter", "b", "lora_")],
    [("delete_adapter", "a", "lora_"), ("delete_adapter", "b", "lora_")],
], ids=str)  # fmt: skip
def test_functions_on_injected_models(steps):
    found = []
    for lib, functions in SIDES:
        model = injected(lib, "a", "b")
        results = [getattr(functions, name)(model, *args) for name, *args in steps]
        found.append((results if steps[-1][0] == "delete_adapter" else None, *state(model)))
    assert found[0] == found[1]


def test_functions_keep_a_wrappers_registry():
    model = adapt(graft, LORA)
    model.add_adapter("b", LORA.config(graft))
    functional.set_adapter(model, "b")
    assert model.active_adapters == ["b"]
    assert functional.delete_adapter(model, "b") == ["default"]
    assert list(model.peft_config) == ["default"] == model.active_adapters


def test_gradients_are_set_of_all_that_an_adapter_has():
    config = graft.VBLoRAConfig(r=2, num_vectors=4, vector_length=2, topk=2, target_modules="all-linear")
    model = graft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
    functional.set_requires_grad(model, "default", False)
    assert not any(p.requires_grad for p in model.parameters())  # those that layers share among them
    functional.set_requires_grad(model, "default")
    assert all(p.requires_grad for _, p in model.adapter_parameters("default"))


def test_unknown_adapters_are_named():
    model = injected(graft, "a")
    for call in (functional.set_adapter, functional.set_requires_grad):
        with pytest.raises(AdapterNotFoundError, match=r"nope.*a"):
            call(model, "nope")
    with pytest.warns(graft.PeftWarning, match=r"nope.*a"):  # PEFT deletes nothing and goes on
        functional.delete_adapter(model, "nope")


def test_a_merged_adapter_is_not_deleted():
    model = injected(graft, "a")
    for m in model.modules():
        if isinstance(m, graft.AdapterLayer):
            m.merge()
    with pytest.raises(ValueError, match="unmerge"):
        functional.delete_adapter(model, "a")


def test_cast_adapter_dtype():
    found = []
    for lib, functions in SIDES:
        model = adapt(lib, LORA, base=models.make("llama").to(torch.bfloat16), autocast_adapter_dtype=False)
        functions.cast_adapter_dtype(model, "default", False)
        before = facts(model)
        functions.cast_adapter_dtype(model, "default")
        found.append((before, facts(model)))
    assert found[0] == found[1] and found[0][0] != found[0][1]


def scalings(model: nn.Module) -> list[dict[str, float]]:
    return [dict(m.scaling) for m in model.modules() if hasattr(m, "lora_A")]


def test_rescale_adapter_scale():
    found = []
    for lib, rescale in ((graft, functional.rescale_adapter_scale), (peft, peft.helpers.rescale_adapter_scale)):
        model = adapt(lib, LORA)
        before = scalings(model)
        with rescale(model, 1.37):
            inside = scalings(model)
        assert scalings(model) == before
        done = [outcome(rescale(*args).__enter__) for args in ((model, "x"), (nn.Linear(2, 2), 1.5))]
        found.append((before, inside, [(d.kind, str(d.error)[:40]) for d in done]))
    assert found[0] == found[1]


def test_inspect_matched_modules():
    pairs = [(adapt(lib, LORA), inspect_) for lib, inspect_ in zip(LIBS, (functional.inspect_matched_modules, THEIRS))]
    ours, theirs = (function(model.base_model) for model, function in pairs)
    assert ours == functional.inspect_matched_modules(pairs[0][0])  # the PeftModel, as PEFT's users pass
    assert ours["matched"] == theirs["matched"] and set(ours["unmatched"]) <= set(theirs["unmatched"])


THEIRS = peft.tuners.tuners_utils.inspect_matched_modules


def test_check_if_peft_model(tmp_path):
    adapt(graft, LORA).save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter", tmp_path, "not/there"):
        assert functional.check_if_peft_model(str(path)) == peft.helpers.check_if_peft_model(str(path))


# signatures


@pytest.mark.parametrize("method", ["forward", "generate", "all"])
def test_update_signature(method):
    model = adapt(graft, LORA)
    batch = models.inputs("llama")
    before, base = models.output(model, batch), model.get_base_model()
    functional.update_signature(model, method)
    for name in ("forward", "generate"):
        same = inspect.signature(getattr(model, name)) == inspect.signature(getattr(base, name))
        assert same == (method in (name, "all"))
    assert torch.equal(models.output(model, batch), before)
    for module in (functional, peft.helpers):
        with pytest.raises(ValueError, match="not supported please choose one of"):
            module.update_signature(model, "nope")


# PEFT's small functions


def test_shims():
    utils = peft.tuners.tuners_utils
    for config in (dict(target_modules=["q_proj"], exclude_modules=["model.layers.1.self_attn.q_proj"]), LORA.kwargs):
        for key, _ in models.make("llama").named_modules():
            ours = import_held("check_target_module_exists")(graft.LoraConfig(**config), key)
            assert ours == (utils.check_target_module_exists(peft.LoraConfig(**config), key) is True), key
    patterns = ["q_proj", r"layers\.\d+\.mlp"]
    for key in ("model.layers.0.q_proj", "layers.3.mlp", "xq_proj", "q_proj.x"):
        assert shims.get_pattern_key(patterns, key) == other.get_pattern_key(patterns, key)
    for name in ("llama", "gpt2"):
        model = models.make(name)
        assert shims._get_input_embeddings_name(model) == other._get_input_embeddings_name(model)
        tied = other._get_module_names_tied_with_embedding(model)
        assert shims._get_module_names_tied_with_embedding(model) == tied
        assert helpers.find_no_split_classes(model) == other._get_no_split_modules(model)
        names = [
            module._maybe_include_all_linear_layers(lib.LoraConfig(target_modules="all-linear"), model).target_modules
            for module, lib in ((shims, graft), (utils, peft))
        ]
        assert names[0] == names[1]
    model = models.make("mlp")
    assert shims._get_submodules(model, "layers.1.fc1") == other._get_submodules(model, "layers.1.fc1")
    weight = model.lin0.weight
    assert shims.id_tensor_storage(weight) == other.id_tensor_storage(weight)
    assert torch.equal(shims.transpose(weight, True), weight.T) and shims.transpose(weight, False) is weight
    with shims.init_empty_weights():
        assert nn.Linear(2, 2).weight.is_meta


class Pair(NamedTuple):
    x: torch.Tensor
    rest: list[object]


@pytest.mark.parametrize("move", [
    lambda value: move_tensors(value, lambda t: t.to("cpu")), lambda value: place_value(value, torch.ones(1), {}),
], ids=["inputs", "states"])  # fmt: skip
def test_named_tuples_that_are_moved_keep_their_class(move):
    moved = move({"a": (Pair(torch.ones(2), [3]), torch.return_types.max((torch.ones(1), torch.zeros(1)))), "b": ()})
    (pair, largest), empty = moved["a"], moved["b"]
    assert type(pair) is Pair and pair.x.sum() == 2 and pair.rest == [3] and empty == ()
    assert type(largest) is torch.return_types.max and largest.values == 1
