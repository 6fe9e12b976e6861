# SPDX-License-Identifier: Apache-2.0
"""Parameters that are targets themselves (`target_parameters`), above all stacks of experts, against PEFT."""

import copy
import pickle
import re
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import graft
from graft.core.errors import ConfigError, RoutingError, UnsupportedLayerError
from tests.families import IDS
from tests.families import base as family
from tests.leaves_out import ADDRESSES_OF_EXPERTS, FUSED_EXPERTS
from tests.looks import layers
from tests.models import adapted, checkpoint, seeded
from tests.raised import refuses
from tests.threads import at_once

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# gpt-oss and Llama 4 store (experts, in, out), which PEFT takes for (experts, out, in) of the latter
MODELS = {"mixtral": "mixtral", "qwen": "qwen2_moe", "gpt_oss": "gpt_oss", "llama4": "llama4"}


def base(name, **sizes):
    return family(MODELS[name], **({"decoder_sparse_step": 2} if name == "qwen" else {}) | sizes)


def on_stacks(lib, name, adapter="default", model=None, **config):
    values = dict(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=BOTH, init_lora_weights=False)
    model = base(name) if model is None else model
    return adapted(model, {adapter: lib.LoraConfig(**values | config)}, lib=lib, scale=0)


def logits(model):
    return model(IDS).logits


def delta(layer, adapter="default"):
    return layer.get_delta_weight(adapter)


@pytest.fixture(
    params=[pytest.param(name, marks=FUSED_EXPERTS if name in ("mixtral", "qwen") else ()) for name in MODELS]
)
def name(request):
    return request.param


def test_names_values_outputs_and_gradients_are_pefts(name):
    ours, theirs = on_stacks(graft, name), on_stacks(peft, name)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert ours.base_model.targeted_parameter_names == theirs.base_model.targeted_parameter_names
    losses = [model(IDS, labels=IDS) for model in (ours, theirs)]
    assert_close(losses[0].logits, losses[1].logits, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.loss.backward()
    grads = {n: p.grad for n, p in ours.named_parameters()}
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert sum("experts" in n for n in wanted) >= 4
    for n, grad in wanted.items():
        assert_close(grads[n], grad, rtol=1e-4, atol=1e-6)


def test_files_go_both_ways(name, tmp_path):
    ours = on_stacks(graft, name)
    ours.save_pretrained(tmp_path / "ours")
    on_stacks(peft, name).save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    expected = logits(ours)
    loaded = graft.PeftModel.from_pretrained(base(name), tmp_path / "theirs", low_cpu_mem_usage=True)
    assert_close(logits(loaded), expected)
    assert_close(logits(peft.PeftModel.from_pretrained(base(name), tmp_path / "ours")), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merging_disabling_and_unloading(name):
    model, plain = on_stacks(graft, name), base(name)
    expected, before = logits(model), {n: p.clone() for n, p in plain.named_parameters()}
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    model.merge_adapter()
    assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    bare = copy.deepcopy(model).unload()
    assert {n for n, _ in bare.named_parameters()} == before.keys() and type(bare) is type(plain)
    assert all(torch.allclose(p, before[n], atol=1e-6) for n, p in bare.named_parameters())
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@FUSED_EXPERTS
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_sees_the_sum(how):
    model = on_stacks(graft, "mixtral")
    model.get_base_model().set_experts_implementation(how)
    expected = logits(copy.deepcopy(model).merge_and_unload())
    assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.differs("the cost of an adapter on a stack of experts")
@ADDRESSES_OF_EXPERTS
@FUSED_EXPERTS
def test_only_experts_in_use_cost_anything(monkeypatch):
    from graft.kernels.summed import Summed

    monkeypatch.setattr(Summed, "materialize", lambda self: pytest.fail("formed the whole stack"))
    for name, how in (("mixtral", "eager"), ("mixtral", "grouped_mm"), ("gpt_oss", "eager"), ("llama4", "eager")):
        model = on_stacks(graft, name)
        if name != "llama4":
            model.get_base_model().set_experts_implementation(how)
        model(IDS, labels=IDS).loss.backward()


def test_half_precision_comes_back_bit_for_bit(name):
    model = on_stacks(graft, name, model=base(name).bfloat16())
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    expected = logits(model)
    model.merge_adapter()
    near, far = ((y - expected).float().abs().mean() for y in (logits(model), logits(base(name).bfloat16())))
    assert near < far / 4
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.differs("`target_parameters`: adapters on different parameters of a model")
@FUSED_EXPERTS
def test_adapters_on_different_parameters_stand_beside_each_other(tmp_path):
    model = on_stacks(graft, "mixtral", target_parameters=BOTH[:1], target_modules=None)
    alone = {"default": logits(model)}
    with seeded(2):
        model.add_adapter("b", graft.LoraConfig(r=3, target_parameters=BOTH[1:], init_lora_weights=False))
        model.add_adapter("c", graft.LoraConfig(r=1, target_parameters=[*BOTH, "gate.weight"], init_lora_weights=False))
    assert torch.equal(logits(model), alone["default"])
    keys = model.state_dict().keys()
    stem = "base_model.model.model.layers.0.mlp.experts."
    assert {f"{stem}base_layer.lora_A.default.weight", f"{stem}lora_A.b.weight", f"{stem}lora_A.c.weight"} <= keys
    for adapter in "bc":
        model.set_adapter(adapter)
        alone[adapter] = logits(model)
    model.base_model.set_adapter(["default", "b", "c"])
    together = logits(model)
    model.merge_adapter()
    assert_close(logits(model), together, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), ("b", tmp_path / "b"), ("c", tmp_path / "c")):
        for lib in (graft, peft):
            assert_close(logits(lib.PeftModel.from_pretrained(base("mixtral"), folder)), alone[adapter],
                         rtol=1e-5, atol=1e-5)  # fmt: skip
    model.delete_adapter("default")
    model.set_adapter("b")
    assert_close(logits(model), alone["b"])
    model.delete_adapter("c")
    with seeded(3):
        model.add_adapter("d", graft.LoraConfig(r=1, target_parameters=BOTH, target_modules=["q_proj"]))
    assert_close(logits(model), alone["b"])
    assert type(model.unload()) is type(base("mixtral"))


FIRST = {
    "module": graft.LoraConfig(r=2, target_modules=["0"]),
    "weight": graft.LoraConfig(r=2, target_parameters=["0.weight"]),
}


@pytest.mark.parametrize("before", FIRST)
@pytest.mark.parametrize("after", FIRST)
def test_a_module_is_adapted_after_its_last_adapter_is_deleted(before, after):
    """By itself or by its parameter, whichever of them was adapted before."""
    model = graft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), FIRST[before], "first")
    model.add_adapter("other", graft.LoraConfig(target_modules=["1"]))
    model.set_adapter("other")
    model.delete_adapter("first")
    model.add_adapter("second", FIRST[after])
    assert {n for n, _ in model.named_parameters() if ".second." in n} == {
        f"base_model.model.0.lora_{factor}.second.weight" for factor in "AB"
    }
    assert isinstance(model.unload()[0], nn.Linear)


@FUSED_EXPERTS
def test_rank_pattern_names_parameters():
    config = dict(rank_pattern={"experts.down_proj": 5}, alpha_pattern={"experts.down_proj": 10})
    ours, theirs = (on_stacks(lib, "mixtral", **config).state_dict() for lib in (graft, peft))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.differs("`target_parameters` with `lora_dropout`; DoRA on a matrix")
@FUSED_EXPERTS
def test_dropout_takes_the_same_inputs_out_of_all_rows():
    """PEFT refuses dropout here. The module reads a weight, so that rows cannot drop inputs of their own."""
    model = on_stacks(graft, "mixtral", lora_dropout=0.5, target_modules=None)
    expected = logits(model)
    model.train()
    draws = []
    for i in range(400):
        with seeded(i), torch.no_grad():
            draws.append(layers(model)["model.layers.0.mlp.experts.down_proj"].state.plan.fold_current()[0])
    layer = layers(model)["model.layers.0.mlp.experts.down_proj"]
    change = torch.stack(draws) - layer.weight_now
    assert_close(change.mean(0), delta(layer), rtol=0.3, atol=0.3)
    assert ((change == 0).all(dim=(1, 2)) | (change != 0).any(dim=(1, 2))).all(), "whole columns of all experts"
    with seeded(5):
        a = logits(model)
    with seeded(5):
        assert torch.equal(logits(model), a)
    assert not torch.equal(a, expected)
    model.eval()
    assert torch.equal(logits(model), expected)


@FUSED_EXPERTS
@pytest.mark.filterwarnings("ignore:After the first backward pass")
def test_a_stack_may_train_beside_its_adapter():
    model, found = on_stacks(graft, "mixtral"), []
    for each in (model, copy.deepcopy(model).merge_and_unload()):
        weight = next(p for n, p in each.named_parameters() if n.endswith("down_proj")).requires_grad_()
        y = logits(each)
        y.sin().sum().backward()
        found.append((y.detach(), weight.grad))
    for t, expected in zip(*found):
        assert_close(t, expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_and_compiling():
    model = on_stacks(graft, "gpt_oss")
    model.train()

    def gradients():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    checkpoint(model)
    found = gradients()
    assert expected.keys() == found.keys()
    for n, grad in expected.items():
        assert_close(found[n], grad)


class Stack(nn.Module):
    """Two stacks and a matrix, and a layer below."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 10)), nn.Parameter(torch.randn(3, 10, 6))
        self.flat, self.line = nn.Parameter(torch.randn(10, 10)), nn.Parameter(torch.randn(10))
        self.lin = nn.Linear(10, 10)

    def forward(self, x, which=1):
        x = self.lin(x) @ self.flat + self.line
        return torch.relu(x @ self.up[which].T) @ self.down[which].T


def stack():
    with seeded(0):
        return nn.ModuleDict({"m": Stack(), "out": nn.Linear(10, 10)})


def test_merging_into_a_tied_parameter_leaves_the_other_module_as_it_is():
    net = nn.ModuleDict({"a": stack()["m"], "b": stack()["m"]})
    net["b"].up = net["a"].up
    config = graft.LoraConfig(r=2, target_modules=[], target_parameters=["a.up"], init_lora_weights=False)
    model, tied = graft.get_peft_model(net, config), net["b"]
    expected, other = net["a"](X), tied(X)
    model.merge_adapter()
    assert_close(net["a"](X), expected)
    assert torch.equal(tied(X), other)
    model.unmerge_adapter()
    assert layers(model)["a.up"].get_base_layer().up is tied.up


def run(model, x):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner["out"](inner["m"](x))


X = torch.linspace(-1, 1, 40).view(4, 10)
LAYERS = dict(target_parameters=["m.up", "m.down", "flat"], target_modules=["lin", "out"])


def of_stack(lib=graft, **config):
    values = dict(r=2, lora_alpha=3, init_lora_weights=False, **LAYERS)
    with seeded(1):
        return lib.get_peft_model(stack(), lib.LoraConfig(**values | config))


def test_layers_below_a_module_whose_parameters_are_targets(tmp_path):
    ours, theirs = of_stack(), of_stack(peft)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    expected = run(theirs, X)
    assert_close(run(ours, X), expected)
    ours.save_pretrained(tmp_path)
    assert_close(run(graft.PeftModel.from_pretrained(stack(), tmp_path), X), expected)
    assert_close(run(peft.PeftModel.from_pretrained(stack(), tmp_path), X), expected)
    names = [s.name for s in graft.get_layer_status(ours)]
    assert sorted(names) == sorted(s.name for s in peft.get_layer_status(theirs))
    ours.merge_adapter()
    assert_close(run(ours, X), expected)
    plain = ours.merge_and_unload()
    assert_close(run(plain, X), expected)
    assert plain.state_dict().keys() == stack().state_dict().keys()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@torch.no_grad()
def test_biases_below_a_module_whose_parameters_are_targets(bias, tmp_path):
    """Files call them by the wrappers of the adapter's own parameters, as PEFT's."""
    for lib, targets in ((graft, ["lin"]), (graft, ["out"]), (peft, ["lin"]), (peft, ["out"])):
        model = of_stack(lib, bias=bias, target_parameters=["m.up", "m.down"], target_modules=targets)
        held = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
        assert len(held) == (2 if bias == "all" else 1)
        for p in held:
            p += torch.linspace(-1, 1, len(p))
        folder = tmp_path / f"{lib.__name__}-{targets[0]}"
        model.save_pretrained(folder)
        for reader in (graft, peft):
            if bias == "lora_only" and peft in (lib, reader):
                continue  # PEFT neither writes nor reads these below a parameter's wrapper
            assert_close(run(reader.PeftModel.from_pretrained(stack().eval(), folder), X), run(model, X))


def test_biases_of_experts_are_pefts():
    """`gate_up_proj_bias` and its like are parameters of another name."""
    ours, theirs = (
        {n for n, p in on_stacks(lib, "gpt_oss", bias="all").named_parameters() if p.requires_grad}
        for lib in (graft, peft)
    )
    assert ours == theirs and any(n.endswith("router.bias") for n in ours)


def test_copies_are_equal_and_independent():
    model = of_stack()
    expected = run(model, X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, X), expected)
        with torch.no_grad():
            for n, p in other.named_parameters():
                if "lora_B" in n:
                    p.zero_()
        assert torch.equal(run(model, X), expected) and not torch.equal(run(other, X), expected)


@pytest.mark.differs("threads that run a model with `target_parameters`")
def test_threads_do_not_see_each_others_weights():
    model = of_stack().eval()
    expected = run(model, X)
    with model.disable_adapter():
        plain = run(model, X)
    wrong = []

    def adapted_calls():
        wrong.extend(i for i in range(60) if not torch.equal(run(model, X), expected))

    def plain_calls():
        with model.disable_adapter():
            wrong.extend(i for i in range(60) if not torch.equal(run(model, X), plain))

    with torch.no_grad():
        at_once(adapted_calls, adapted_calls, plain_calls)
    assert not wrong


def test_it_compiles_without_a_break():
    model = of_stack()
    compiled = torch.compile(model.get_base_model()["m"], fullgraph=True, backend="eager")
    assert_close(compiled(X), model.get_base_model()["m"](X))


def test_dora_on_a_matrix():
    """PEFT has none on parameters; the algebra does."""
    model = of_stack(use_dora=True, target_parameters=["flat"])
    with torch.no_grad():
        expected = run(model, X)
        model.merge_adapter()
        assert_close(run(model, X), expected)


REFUSED = [
    (dict(target_parameters=["m.line"]), UnsupportedLayerError, "only 2d and 3d are supported.*'default'"),
    (dict(target_parameters=["lin.weight"]), UnsupportedLayerError,
     "Trying to wrap an `nn.Parameter` of layer 'm.lin' of type Linear, which is not a valid target"),
    (dict(use_dora=True), ConfigError, "lora.ParamWrapper does not work with use_dora"),
    (dict(lora_bias=True), ConfigError, "lora.ParamWrapper does not work with lora_bias"),
    (dict(fan_in_fan_out=True), ConfigError, "lora.ParamWrapper does not work with fan_in_fan_out"),
    (dict(init_lora_weights="pissa"), ConfigError, "does not work with init_lora_weights='pissa'"),
    (dict(alora_invocation_tokens=[1]), UnsupportedLayerError, "does not work with alora_invocation_tokens"),
    (dict(arrow_config={}), UnsupportedLayerError, "does not work with arrow_config"),
    (dict(velora_config={}), UnsupportedLayerError, "does not work with velora_config"),
    (dict(kasa_config={}), UnsupportedLayerError, "KaSA .* linear layers only"),
    (dict(use_bdlora=dict(target_modules_bd_a=["up"], match_strict=False)), UnsupportedLayerError,
     "BD-LoRA.* linear layers only"),
    (dict(monteclora_config={}), ConfigError, "lora.ParamWrapper does not work with monteclora_config"),
    (dict(init_lora_weights="mica"), ConfigError, "lora.ParamWrapper does not work with mica"),
    (dict(init_lora_weights="orthogonal"), ConfigError, "does not work with init_lora_weights='orthogonal'"),
    (dict(use_qalora=True, qalora_group_size=5), ConfigError, "use_qalora=True has no meaning for layer 'm.up'"),
    (dict(target_parameters=["nope"], target_modules=[]), ConfigError, "No `target_modules` passed but also no"),
]  # fmt: skip


@pytest.mark.parametrize("config, error, text", REFUSED, ids=[" ".join(map(str, c)) for c, *_ in REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_a_refusal_changes_nothing(config, error, text):
    model = stack()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    values = dict(r=2, **LAYERS) | config
    refuses((error, ValueError), text, graft.get_peft_model, model, graft.LoraConfig(**values))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert type(model["m"]) is Stack


@pytest.mark.differs("a parametrized parameter")
def test_parametrized_parameters_and_those_of_the_model_itself_are_refused():
    model = stack()
    parametrize.register_parametrization(model["m"], "flat", nn.Tanh())
    with pytest.raises(UnsupportedLayerError, match="remove_parametrizations"):
        graft.get_peft_model(model, graft.LoraConfig(target_parameters=["m.flat"]))
    with pytest.raises(ConfigError, match=r"top-level module is not supported \(parameter 'flat'\)"):
        graft.get_peft_model(Stack(), graft.LoraConfig(target_parameters=["flat"]))
    for lib in (graft, peft):
        refuses(TypeError, "must be a list of strings or None", lib.LoraConfig, target_parameters="flat")


@pytest.mark.parametrize("lib", [graft, peft])
def test_a_state_dict_does_not_tell_which_parameters(lib):
    config = dict(r=2, target_parameters=["m.up"])
    state = lib.get_peft_model_state_dict(of_stack(lib, **config))
    with pytest.raises(ValueError, match="Trying to inject a PEFT adapter from a state_dict but the PEFT config uses"):
        lib.inject_adapter_in_model(lib.LoraConfig(**config), stack(), state_dict=state)


OTHERS = [dict(use_rslora=True), dict(init_lora_weights="gaussian"), dict(init_lora_weights=True)]


@pytest.mark.parametrize("config", OTHERS, ids=str)
def test_other_options_are_pefts(config):
    ours, theirs = of_stack(**config), of_stack(peft, **config)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with torch.no_grad():
        for model in (ours, theirs):
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    assert_close(run(ours, X), run(theirs, X), rtol=1e-4, atol=1e-4)


@pytest.mark.differs("`target_parameters`: `exclude_modules`, `layers_to_transform`")
@FUSED_EXPERTS
def test_exclusions_and_layers_apply_to_parameters():
    """PEFT ignores both for parameters."""
    model = on_stacks(graft, "mixtral", exclude_modules=[BOTH[1]], layers_to_transform=[1])
    assert model.base_model.targeted_parameter_names == ["model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.filterwarnings("ignore")
def test_rows_with_different_adapters_are_refused_where_the_module_does_not_say_whose_tokens_it_gets():
    model = on_stacks(graft, "llama4")
    expected = logits(model)
    refuses(RoutingError, "does not support mixed adapter batches", model, IDS, adapter_names=["default", "__base__"])
    assert torch.equal(model(IDS, adapter_names=["default", "default"]).logits, expected)


@pytest.mark.parametrize("lib", [graft, peft])
def test_a_pattern_for_modules_that_matches_nothing_is_said(lib):
    with pytest.warns(RuntimeWarning, match="target_modules=lin were set but no module was matched"):
        of_stack(lib, target_parameters=["m.up"], target_modules="lin")


@pytest.mark.parametrize("lib", [graft, peft])
@pytest.mark.parametrize(
    "field, parameters, modules, kind",
    [
        ("target_modules={'lim'}", ["m.up"], ["lim"], "module"),
        ("target_parameters=['m.ub']", ["m.ub"], ["lin"], "parameter"),
    ],
)
def test_a_list_of_which_nothing_matches_is_said(lib, field, parameters, modules, kind):
    with pytest.warns(RuntimeWarning, match=re.escape(f"{field} were set but no {kind} was matched")):
        of_stack(lib, target_parameters=parameters, target_modules=modules)


KINDS = {  # options, and the rank for each matrix
    "exact": ({}, {"m.up": 5, "m.down": 5, "m.flat": 5}),
    "cat": ({}, {"m.up": 5, "m.down": 5, "m.flat": 5}),
    "svd": (dict(svd_rank=2), {"m.up": 2, "m.down": 2, "m.flat": 2}),
    "ties_svd": (dict(svd_rank=3, density=1.0), {"m.up": 3, "m.down": 3, "m.flat": 3}),
}


@pytest.mark.differs("adapters with `target_parameters`")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:The density")
@torch.no_grad()
def test_combinations_are_sums_of_each_matrix_of_a_stack(kind, transposed, tmp_path):
    """PEFT refuses them."""
    options, ranks = KINDS[kind]
    base = stack()
    if transposed:
        base["m"].is_transposed = True
        base["m"].forward = lambda x: x
    with seeded(1):
        values = dict(target_parameters=["m.up", "m.down", "flat"], init_lora_weights=False)
        model = graft.get_peft_model(base, graft.LoraConfig(r=2, lora_alpha=3, **values), "x1")
        model.add_adapter("y1", graft.LoraConfig(r=3, lora_alpha=7, **values))
    report = model.add_weighted_adapter(["x1", "y1"], [0.7, -0.4], "both", combination_type=kind, **options)
    for key, layer in layers(model).items():
        wanted = 0.7 * delta(layer, "x1") - 0.4 * delta(layer, "y1")
        made = delta(layer, "both")
        assert made.shape == wanted.shape == getattr(base["m"], key[2:]).shape and report.ranks[key] == ranks[key]
        if kind in ("exact", "cat"):
            assert_close(made, wanted, rtol=1e-4, atol=1e-4)
        elif kind == "svd":  # no matrix of that rank comes closer
            lost = torch.linalg.svdvals(wanted)[..., 2:].square().sum()
            assert_close((made - wanted).square().sum(), lost, rtol=1e-3, atol=1e-4)
    if not transposed:
        model.set_adapter("both")
        model.save_pretrained(tmp_path, selected_adapters=["both"])
        for lib in (graft, peft):
            assert_close(run(lib.PeftModel.from_pretrained(stack(), tmp_path / "both"), X), run(model, X),
                         rtol=1e-4, atol=1e-4)  # fmt: skip


@torch.no_grad()
def test_combinations_on_factors_and_of_other_parameters(tmp_path):
    model = of_stack()
    with seeded(2):
        model.add_adapter("same", graft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **LAYERS))
        model.add_adapter("some", graft.LoraConfig(r=3, init_lora_weights=False, target_parameters=["m.up"]))
    model.add_weighted_adapter(["default", "same"], [0.5, 0.5], "mean", combination_type="linear")
    for layer in layers(model).values():
        for a, b, mean in zip(*(layer.methods[n].pair for n in ("default", "same", "mean"))):
            assert_close(mean, (1.5 * 0.5) ** 0.5 * (a + b))
    model.add_weighted_adapter(["default", "some"], [1.0, -2.0], "sum", combination_type="exact")
    for layer in layers(model).values():
        other = delta(layer, "some") if "some" in layer.adapters else 0
        assert_close(delta(layer, "sum"), delta(layer) - 2 * other, rtol=1e-4, atol=1e-4)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = graft.PeftModel.from_pretrained(stack(), tmp_path / "sum")
    assert_close(run(loaded, X), run(model, X), rtol=1e-4, atol=1e-4)


def test_combinations_with_other_methods_are_refused():
    with seeded(1):
        lora = graft.LoraConfig(r=2, target_parameters=["m.up"], target_modules=["lin"])
        model = graft.get_peft_model(stack(), lora, "x1", mixed=True)
        model.add_adapter("v1", graft.VeraConfig(r=2, target_modules=["lin"]))
    with pytest.raises(ConfigError, match=r"targeting nn\.Parameter .*'x1'.* with adapters of other methods .*VERA"):
        model.add_weighted_adapter(["x1", "v1"], [1.0, 1.0], "both", combination_type="exact")
    assert list(model.peft_config) == ["x1", "v1"]


def test_peft_refuses_combinations():
    model = of_stack(peft)
    model.add_adapter("other", peft.LoraConfig(r=2, **LAYERS))
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")


@FUSED_EXPERTS
def test_what_matches_nothing_is_said():
    with pytest.warns(graft.PeftWarning, match="target_parameters entry 'gate_up' matched nothing"):
        on_stacks(graft, "mixtral", target_parameters=["gate_up", BOTH[1]])


# experts of old names


def old_file(folder, lib_config, parts, block):
    """A checkpoint from before experts were fused: a matrix A and B for each part of each expert."""
    tensors = {}
    with seeded(5):
        for e in range(4):
            for part, (out, fan_in) in parts.items():
                stem = f"base_model.model.model.layers.1.{block}.experts.{e}.{part}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(2, fan_in)
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 2)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    lib_config.save_pretrained(folder)
    return tensors


@FUSED_EXPERTS
@pytest.mark.parametrize("name, names, block, width", [
    ("mixtral", ("w1", "w3", "w2"), "block_sparse_moe", 24), ("qwen", ("gate_proj", "up_proj", "down_proj"), "mlp", 8)
])  # fmt: skip
@torch.no_grad()
def test_old_checkpoints_load_into_stacks(tmp_path, name, names, block, width):
    """PEFT converts Mixtral's, and loses Qwen's without a word."""
    gate, up, down = names
    parts = {gate: (width, 16), up: (width, 16), down: (16, width)}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(names), layers_to_transform=[1])
    tensors = old_file(tmp_path / "old", config, parts, block)
    model = graft.PeftModel.from_pretrained(base(name), tmp_path / "old", strict=False)
    expected = base(name)
    experts = expected.model.layers[1].mlp.experts

    def change(e, part):
        stem = f"base_model.model.model.layers.1.{block}.experts.{e}.{part}"
        return 1.5 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]

    for e in range(4):
        experts.gate_up_proj[e] += torch.cat([change(e, gate), change(e, up)])
        experts.down_proj[e] += change(e, down)
    assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "new")
    assert_close(logits(graft.PeftModel.from_pretrained(base(name), tmp_path / "new")), logits(expected),
                 rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["w1", "w3", "gate", "q_proj"], "all-linear",
                                     r".*\.(w1|w3|q_proj)"], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_old_names_in_a_config_become_pefts_new_ones(targets):
    ours, theirs = (lib.LoraConfig(r=2, lora_alpha=3, target_modules=targets) for lib in (graft, peft))
    with seeded(1):
        a = graft.get_peft_model(base("mixtral"), ours).state_dict()
    with seeded(1):
        b = peft.get_peft_model(base("mixtral"), theirs).state_dict()
    for field in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert a.keys() == b.keys() and {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}


@FUSED_EXPERTS
def test_old_names_where_a_renaming_also_fits_todays_path(monkeypatch):
    """As of DeepSeek-OCR 2: `layers` becomes `language_model.layers`, where `layers` stands again."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

    table = [
        WeightRenaming(r"layers\.", "inner.layers."),
        WeightConverter("experts.*.w2.weight", "experts.down", operations=[MergeModulelist(dim=0)]),
    ]
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", lambda *_: table)
    experts = nn.Module()
    experts.down = nn.Parameter(torch.zeros(4, 8, 6))
    net = nn.ModuleDict({"inner": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": experts})])})})
    net.config = SimpleNamespace(model_type="renamed")
    config = graft.LoraConfig(r=2, target_modules=["w2"])
    model = graft.get_peft_model(net, config)
    assert config.target_parameters == {"down"} and [*layers(model)] == ["inner.layers.0.experts.down"]


@FUSED_EXPERTS
@pytest.mark.parametrize(
    "targets", [["experts.1.w2"], ["experts.1.w2", "experts.3.w2"], r".*experts\.[01]\.w2"], ids=str
)
def test_a_stack_is_adapted_whole_though_some_experts_are_named(targets):
    """As with PEFT, which does not say so; the stack holds these experts' matrices among the others."""
    with pytest.warns(
        graft.PeftWarning, match=r"All experts of model\.layers\.0\.mlp\.experts\.down_proj, .* are adapt"
    ):
        model = graft.get_peft_model(base("mixtral"), graft.LoraConfig(r=2, target_modules=targets))
    assert {path.rpartition(".")[2] for path in layers(model)} == {"down_proj"}


@FUSED_EXPERTS
@pytest.mark.parametrize("targets", [["w2"], [f"experts.{e}.w2" for e in range(4)], r".*experts\.\d+\.w2"], ids=str)
def test_all_experts_of_a_stack_are_named(targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graft.get_peft_model(base("mixtral"), graft.LoraConfig(r=2, target_modules=targets))


@FUSED_EXPERTS
def test_half_of_what_is_fused_cannot_be_adapted():
    with pytest.raises(ValueError, match=r"Cannot convert PEFT target.*w1 without also targeting w3 because they are"):
        graft.get_peft_model(base("mixtral"), graft.LoraConfig(target_modules=["w1"]))


# modules of the caller's own types


class Scaled(nn.Module):
    """Works like a linear layer, and is none."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 10, 6
        self.weight, self.bias = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


@torch.no_grad()
def test_types_of_modules_that_a_config_registers():
    config = graft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    refuses(UnsupportedLayerError, None, graft.get_peft_model, nn.ModuleDict({"layer": Scaled()}), config)
    with pytest.raises(TypeError, match="does not say how Scaled uses its weight"):
        config._register_custom_module({Scaled: peft.tuners.lora.Linear})
    config._register_custom_module({Scaled: nn.Linear})
    model = graft.get_peft_model(nn.ModuleDict({"layer": Scaled()}), config)
    layer = model.get_base_model()["layer"]
    expected = X @ (layer.base_layer.weight + delta(layer)).T + layer.base_layer.bias
    assert_close(layer(X), expected)
    model.merge_adapter()
    assert_close(layer(X), expected)
    assert "_custom_modules" not in config.to_dict()


@FUSED_EXPERTS
def test_methods_that_do_not_adapt_stacks_of_experts():
    model, stacks = base("mixtral"), ["experts.down_proj"]
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    config = graft.AdaLoraConfig(total_step=10, target_modules=["q_proj"], target_parameters=stacks)
    with pytest.raises(ConfigError, match=r"AdaLoRA does not adapt stacks of experts \(layer .*down_proj"):
        graft.get_peft_model(model, config)
    with pytest.raises(ConfigError, match="does not work with use_dora"):
        graft.get_peft_model(model, graft.LoraConfig(target_parameters=stacks, use_dora=True))
    said = r"down_proj \(MixtralExperts\) .*SDT trains A_log of a Mamba's mixer.*name other target_parameters"
    refuses(UnsupportedLayerError, said, graft.get_peft_model, model, graft.SdtConfig(target_parameters=stacks))
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}


@FUSED_EXPERTS
@pytest.mark.differs("`target_parameters` of other methods than LoRA")
@pytest.mark.parametrize("targets", [None, ["q_proj"]], ids=["no modules", "modules"])
@pytest.mark.parametrize("method", ["LOKR", "HRA"])
def test_peft_tells_that_it_does_not_know_stacks_of_other_methods(method, targets, tmp_path):
    config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](r=2, target_modules=targets, target_parameters=BOTH)
    model = graft.get_peft_model(base("mixtral"), config)
    with seeded(3), torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape) if p.requires_grad else 0
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(graft.PeftModel.from_pretrained(base("mixtral"), tmp_path)), logits(model))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'target_parameters'"):
        if targets is None:
            refuses(ValueError, "No `target_modules` passed", peft.PeftModel.from_pretrained, base("mixtral"), tmp_path)
        else:
            peft.PeftModel.from_pretrained(base("mixtral"), tmp_path)
    plain = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](r=2, target_modules=["q_proj"])
    assert "target_parameters" not in plain.to_file_dict()
