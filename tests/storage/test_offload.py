# SPDX-License-Identifier: Apache-2.0
"""Bases whose weights accelerate keeps elsewhere between calls."""

from functools import partial

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.wrappers import end_offloading
from tests.conformance import samples
from tests.core.test_layer import CONFIGS, Net, X, config
from tests.models import adapted, disturb, inputs, make, output, seeded
from tests.raised import refuses
from tests.threads import at_once

CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", "disk"])
def offload(request, tmp_path):
    if request.param == "cpu":
        return lambda model: accelerate.cpu_offload(model, execution_device=CPU)
    return lambda model: accelerate.disk_offload(model, str(tmp_path), execution_device=CPU)


def net():
    with seeded(0):
        return Net().eval()


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_an_offloaded_base_runs_merges_and_unmerges(method, wrapped_first, offload):
    base = net()
    plain, expected = base(X), adapted(net(), config(method))(X)
    if wrapped_first:
        model = adapted(base, config(method))
        offload(model)
    else:
        offload(base)
        model = adapted(base, config(method))
    assert base.one.base_layer.weight.is_meta
    assert_close(model(X), expected)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert base.one.base_layer.weight.is_meta
        assert_close(model(X), expected)
        model.unmerge_adapter()
        assert_close(model(X), expected)
    with model.disable_adapter():
        assert_close(model(X), plain)
    model.merge_and_unload()
    assert type(base.one) is nn.Linear and base.one.weight.is_meta
    assert_close(base(X), expected)


@torch.no_grad()
def test_an_offloaded_weight_in_half_precision_comes_back_bit_for_bit(offload):
    base = net().bfloat16()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    offload(base)
    model = adapted(base, config("LORA"))
    model.merge_adapter()
    kept = base.one.state.undo[0][1]
    assert kept.device == CPU and kept.dtype == torch.bfloat16
    model.unmerge_adapter()
    hook = base.one.base_layer._hf_hook
    for name in ("weight", "bias"):
        assert torch.equal(hook.weights_map[name], before[f"one.{name}"])


@torch.no_grad()
def test_merging_leaves_what_others_offloaded(offload):
    """The tensors that accelerate was given may be those of another model as well."""
    base, twin = net(), net()
    twin.one.weight = base.one.weight
    before = twin.one.weight.clone()
    model = adapted(base, config("LORA"))
    offload(model)
    model.merge_adapter()
    assert torch.equal(twin.one.weight, before)


NEED_THE_WEIGHT = {
    "dora": lambda: graft.LoraConfig(r=2, use_dora=True, target_modules=["one", "two"]),
    "pissa": lambda: graft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["one", "two"]),
    "hira": lambda: graft.HiraConfig(r=2, target_modules=["one", "two"]),
    "osf": lambda: graft.OSFConfig(target_modules=["one"], effective_rank=2),
    "hra": lambda: graft.HRAConfig(r=2, target_modules=["one", "two"]),
}


@pytest.mark.differs("a method that needs the weight (DoRA, PiSSA, token rows) on a base that accelerate offloads")
@pytest.mark.parametrize("name", NEED_THE_WEIGHT)
def test_what_needs_the_weight_reads_it_where_it_is(name, offload):
    results = []
    for base in (net(), net()):
        if results:
            offload(base)
        with seeded(1):
            model = graft.get_peft_model(base, NEED_THE_WEIGHT[name]())
        disturb(model).train()
        loss = model(X).square().sum()
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.eval()
        outputs = [model(X).detach()]
        model.merge_adapter()
        outputs.append(model(X).detach())
        model.unmerge_adapter()
        outputs.append(model(X).detach())
        with model.disable_adapter():
            outputs.append(model(X).detach())
        results.append([*outputs, gradients])
    assert base.one.base_layer.weight.is_meta
    for one, here in zip(*results):
        assert_close(here, one)


def test_an_initialisation_that_fails_leaves_the_offloaded_weight(offload):
    base = net()
    before = base.one.weight.clone()
    with torch.no_grad():
        base.two.weight.fill_(float("nan"))  # which has no singular values
    offload(base)
    config = graft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["one", "two"])
    refuses((RuntimeError, ValueError), None, graft.get_peft_model, base, config)
    assert torch.equal(base.one._hf_hook.weights_map["weight"], before)


def test_a_tied_weight_that_is_offloaded_refuses_merging():
    base = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    base[1].weight = base[0].weight
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["1"]))
    accelerate.cpu_offload(model, execution_device=CPU)
    base[1].base_layer._hf_hook.tied_params_names.add("weight")  # as dispatch_model writes down
    refuses(NotImplementedError, "tied to that of another module", model.merge_adapter)


def test_a_module_may_have_a_child_that_is_none():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.randn(4, 4))
            self.register_module("norm", None)

        def forward(self, x):
            return x @ self.weights.T

    config = graft.LoraConfig(r=2, target_modules=[], target_parameters=["inner.weights"], init_lora_weights=False)
    model = graft.get_peft_model(nn.ModuleDict({"inner": Table()}), config)
    x = torch.randn(2, 4)
    layer = model.get_base_model()["inner"]
    y = layer(x)
    model.merge_adapter()
    assert_close(layer(x), y)


CELLS = [cell for cell in samples.CELLS if cell.layer.name == "linear" and cell.store.name == "dense"]
CALLED = [samples.Cell(sample, cell.layer, cell.store) for sample in samples.CALLED for cell in CELLS[:1]]


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("cell", [*CELLS, *CALLED], ids=lambda cell: str(cell.sample))
def test_an_adapted_model_that_is_offloaded_runs_trains_and_merges(cell, offload):
    """Accelerate brings in what modules hold that are called; torch multiplies by what is away without an error."""
    model, x = cell.trained(), cell.inputs()
    with torch.no_grad():
        expected = model(x)
        with model.disable_adapter():
            plain = model(x)
    offload(model.get_base_model())
    with model.disable_adapter():
        assert_close(model(x), plain)
    y = model(x)
    assert_close(y, expected)
    y.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    if cell.sample in samples.CALLED or cell.unmergeable:
        return
    model = cell.trained()
    offload(model.get_base_model())
    with torch.no_grad():
        model.merge_adapter()
        assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


WHERE_ELSE = {  # in blocks, before the input, at single rows, in networks beside
    "ADAPTION_PROMPT": lambda: graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    "BOTTLENECK": lambda: graft.BottleneckConfig.preset("adapter_plus"),
    "CARTRIDGE": lambda: graft.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "CPT": lambda: graft.CPTConfig(
        cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1], task_type="CAUSAL_LM"
    ),
    "LORA": lambda: graft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 4, 7]),
    "MIXLORA": lambda: graft.MixLoraConfig(r=2),
    "P_TUNING": lambda: graft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: graft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": lambda: graft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "REFT": lambda: graft.ReftConfig(),
    "SHADOW": lambda: graft.ShadowConfig(shadow_dropout=0.0, target_modules=["layers.1"], task_type="CAUSAL_LM"),
    "STEERING": lambda: graft.SteeringConfig(),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("method", WHERE_ELSE)
@torch.no_grad()
def test_an_adapted_language_model_that_is_offloaded_computes_the_same(method, whole, tmp_path):
    model = adapted(make("llama"), WHERE_ELSE[method]())
    expected = output(model, inputs("llama"))
    model.save_pretrained(tmp_path / "here")
    accelerate.cpu_offload(model if whole else model.get_base_model(), execution_device=CPU)
    model.save_pretrained(tmp_path / "away")
    here, away = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("here", "away"))
    assert_close(away, here, rtol=0, atol=0)
    assert_close(output(model, inputs("llama")), expected)


@torch.no_grad()
def test_threads_that_call_first_bring_adapters_in_once():
    model = adapted(net(), graft.LoHaConfig(r=2, target_modules=["one", "two"]))
    expected = model(X)
    for _ in range(5):
        model = adapted(net(), graft.LoHaConfig(r=2, target_modules=["one", "two"]))
        accelerate.cpu_offload(model.base_model.model.one, execution_device=CPU)
        outputs = [None] * 8

        def call(i, model=model, outputs=outputs):
            model.base_model.model.one.end_offloading()
            outputs[i] = model.base_model.model.one.hada_w1_a["default"].is_meta

        at_once(*[partial(call, i) for i in range(8)])
        assert outputs == [False] * 8
        accelerate.hooks.remove_hook_from_module(model.base_model.model.one, recurse=True)
        assert_close(model(X), expected)


def test_an_adapter_may_be_added_while_another_thread_looks_for_hooks(monkeypatch):
    root = nn.ModuleDict({"ann": nn.Linear(2, 2), "bob": nn.Linear(2, 2)})
    seen = []

    def look(m):
        seen.append(m)
        if m is root["bob"]:
            root["new"] = nn.Linear(2, 2)  # as a load does
        return []

    monkeypatch.setattr("graft.core.wrappers.find_offload_hooks", look)
    end_offloading(root)
    assert {*seen} == {root, root["ann"], root["bob"]}
