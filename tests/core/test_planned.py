# SPDX-License-Identifier: Apache-2.0
"""Models that have run, so that their layers have plans: a change does what it does before the first call.

And models that are compiled or captured: blocks that are equal share graphs, as they do without adapters.
"""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import graft
from graft.core import fused
from graft.core.effect import Factors
from tests.leaves_out import WHOLE_GRAPHS
from tests.looks import layers
from tests.models import disturb, seeded

BLOCKS = 12
X = torch.linspace(-1, 1, 3 * 4 * 12).view(3, 4, 12).sin()
TARGETS = dict(target_modules=["fc1", "fc2"])
CONFIGS = {  # one of each way in which a layer runs
    "LORA": graft.LoraConfig(r=2, lora_alpha=3, **TARGETS),
    "DORA": graft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "LOHA": graft.LoHaConfig(r=2, alpha=3, **TARGETS),
    "HIRA": graft.HiraConfig(r=2, **TARGETS),
    "IA3": graft.IA3Config(target_modules=["fc1", "fc2"], feedforward_modules=["fc2"]),
    "OFT": graft.OFTConfig(r=0, oft_block_size=4, **TARGETS),
    "MISS": graft.MissConfig(r=2, **TARGETS),
    "FOURIERFT": graft.FourierFTConfig(n_frequency=5, **TARGETS),
    "VERA": graft.VeraConfig(r=2, target_modules=["fc1"]),
    "BOTTLENECK": graft.BottleneckConfig(reduction_factor=4, target_modules=["fc2"]),
}
every = pytest.mark.parametrize("kind", CONFIGS)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def fresh(kind, blocks=2):
    """A model with adapters that act, which has not run."""
    with seeded(0):
        model = graft.get_peft_model(Net(blocks), copy.deepcopy(CONFIGS[kind]))
    return disturb(model).eval()


def planned(kind):
    """The same model after calls of every kind."""
    model = fresh(kind)
    for training in (True, False):
        model.train(training)(X).sum().backward()
        with torch.no_grad():
            model(X)
        with torch.inference_mode():
            model(X)
    model.zero_grad()
    return model


def outcome(model, x=X):
    """The output, and all gradients."""
    x = x.clone().requires_grad_()
    y = model(x)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum(), [x, *named.values()])
    return {"output": y.detach(), "x": grads[0], **dict(zip(named, grads[1:]))}


def other_values(model):
    """Other values for all that trains, by name."""
    with seeded(9):
        return {name: p + torch.randn(p.shape) * 0.3 for name, p in model.named_parameters() if p.requires_grad}


def assign(model):
    missing, unexpected = model.load_state_dict(other_values(model), assign=True, strict=False)
    assert missing and not unexpected
    for p in model.parameters():
        p.requires_grad_(p.requires_grad)


def put_data(model):
    for name, value in other_values(model).items():
        model.get_parameter(name).data = value.detach()


def put_parameters(model):
    for name, value in other_values(model).items():
        *path, leaf = name.split(".")
        owner = model.get_submodule(".".join(path))
        setattr(owner, leaf, nn.Parameter(value.detach()))


def hook_of_base(model):
    for layer in layers(model).values():
        layer.base_layer.register_forward_hook(lambda _module, _args, y: 2 * y)


def hook_before_base(model):
    for layer in layers(model).values():
        layer.base_layer.register_forward_pre_hook(lambda _module, args: (args[0] / 2,))


def hook_of_layer(model):
    for layer in layers(model).values():
        layer.register_forward_hook(lambda _module, _args, y: y.sin())


def hook_of_adapter(model):
    """On every module that an adapter has for itself."""
    own = [
        m
        for layer in layers(model).values()
        for name, m in layer.named_modules()
        if name.rpartition(".")[2] == "default"
    ]
    if not any(isinstance(m, nn.Linear) for m in own):
        pytest.skip("the method holds parameters, and no modules that run")
    for m in own:
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda _module, _args, y: 2 * y)


def replaced_forward(model):
    for layer in layers(model).values():
        before = layer.base_layer.forward
        layer.base_layer.forward = lambda x, before=before: before(x).cos()


def trained_base(model):
    next(iter(layers(model).values())).base_layer.weight.requires_grad_()


def scaled(model):
    for layer in layers(model).values():
        if "default" in getattr(layer, "scaling", ()):
            layer.set_scale("default", 3.0)


CHANGES = {
    "load_state_dict(assign=True)": assign, "data": put_data, "parameters": put_parameters,
    "hook of the base": hook_of_base, "hook before the base": hook_before_base, "hook of the layer": hook_of_layer,
    "hook of the adapter": hook_of_adapter, "forward of the base": replaced_forward, "base that trains": trained_base,
    "double": lambda model: model.double(), "bfloat16": lambda model: model.bfloat16(),
}  # fmt: skip
WITH_MODULES = ("LORA", "DORA", "BOTTLENECK")  # whose adapters hold modules that run; the others hold parameters
CASES = [
    (kind, change) for kind in CONFIGS for change in CHANGES if change != "hook of the adapter" or kind in WITH_MODULES
]
SILENT = ("base that trains", "double")  # the output stays, but for rounding


@pytest.mark.parametrize("kind, change", CASES)
def test_a_change_after_calls_is_one_before_them(kind, change):
    first, later = fresh(kind), planned(kind)
    before = outcome(later)
    assert_close(outcome(first), before, rtol=0, atol=0)
    for model in first, later:
        CHANGES[change](model)
    x = X.to(next(later.parameters()).dtype)
    after = outcome(later, x)
    assert_close(after, outcome(first, x), rtol=0, atol=0)
    same = torch.allclose(after["output"].float(), before["output"], atol=1e-5)
    assert same == (change in SILENT)


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_after_calls_and_changes(kind, how):
    model = planned(kind)
    assign(model)
    hook_of_layer(model) if how is copy.deepcopy else None
    copied, before = how(model), outcome(model)
    assert_close(outcome(copied), before, rtol=0, atol=0)
    put_data(copied)
    assert_close(outcome(model), before, rtol=0, atol=0)
    assert not torch.allclose(outcome(copied)["output"], before["output"])


@every
def test_functional_calls_take_the_values_of_the_call(kind):
    model, wanted = planned(kind), fresh(kind)
    put_data(wanted)
    values = {name: p.detach() for name, p in wanted.named_parameters() if p.requires_grad}
    before = outcome(model)

    def loss(values, x):
        y = torch.func.functional_call(model, values, (x,))
        return (y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum(), y.detach()

    found, y = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(values, X)
    assert_close({"output": y, "x": found[1], **found[0]}, outcome(wanted), rtol=1e-5, atol=1e-5)
    assert_close(outcome(model), before, rtol=0, atol=0)


@every
def test_offload_after_calls(kind):
    """Of base layers, or of all below the model if the adapter's parameters are modules that are called."""
    expected = outcome(fresh(kind))
    for whole in (False, True) if kind in ("LORA", "BOTTLENECK") else (False,):
        model = planned(kind)
        for part in [model.get_base_model()] if whole else [layer.base_layer for layer in layers(model).values()]:
            accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
        assert all(layer.base_layer.weight.is_meta for layer in layers(model).values())
        assert_close(model(X), expected["output"])
        if not whole:
            assert_close(outcome(model), expected)


@every
def test_captured_after_calls(kind):
    """What a tracer takes down computes as the model does, for inputs of other values."""
    model = planned(kind)
    with torch.no_grad():
        traced = make_fx(model)(X)
        assert_close(traced(2 * X), model(2 * X), rtol=1e-5, atol=1e-5)


# compiled


def graphs(net, run):
    """Compile the blocks of a net one by one; return the number of graphs after one run, and after another."""
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True)
    run()
    first = counter.frame_count
    run()
    return first, counter.frame_count


def run_of(model, trains):
    def run():
        with torch.set_grad_enabled(trains):
            y = model.train(trains)(X)
        if trains:
            y.sum().backward()

    return run


STATES = {  # of the adapters while blocks are compiled
    "active": lambda model: None,
    "off": lambda model: model.base_model.disable_adapter_layers(),
    "two": lambda model: (model.add_adapter("other", copy.deepcopy(model.peft_config["default"])),
                          model.base_model.set_adapter(["default", "other"])),
    "merged": lambda model: model.merge_adapter(),
}  # fmt: skip


@WHOLE_GRAPHS
@pytest.mark.slow
@every
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_equal_blocks_share_graphs(kind, trains):
    """One graph for all; in training another for the first, whose input needs no gradient."""
    model, net = fresh(kind, BLOCKS), Net(BLOCKS)
    wanted = graphs(net, run_of(net, trains))
    assert wanted == ((2, 2) if trains else (1, 1))
    assert graphs(model.get_base_model(), run_of(model, trains)) == wanted


@WHOLE_GRAPHS
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LORA", "LOHA", "IA3"])
@pytest.mark.parametrize("state", STATES)
def test_equal_blocks_share_graphs_in_every_state(kind, state):
    model = fresh(kind, BLOCKS)
    STATES[state](model)
    expected = model.eval()(X)
    assert graphs(model.get_base_model(), run_of(model, False)) == (1, 1)
    assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


@WHOLE_GRAPHS
@pytest.mark.slow
@every
@pytest.mark.parametrize("change", ["load_state_dict(assign=True)", "data", "double"])
def test_compiled_models_see_changes(kind, change):
    torch._dynamo.reset()
    model = planned(kind)
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(X), model(X), rtol=1e-5, atol=1e-5)
    CHANGES[change](model)
    x = X.to(next(model.parameters()).dtype)
    assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@WHOLE_GRAPHS
@pytest.mark.slow
@every
def test_exported_after_calls(kind):
    model = planned(kind)
    exported = torch.export.export(model.get_base_model(), (X,)).module()
    assert_close(exported(2 * X), model(2 * X), rtol=1e-5, atol=1e-5)


def test_factors_are_unchanged_only_while_their_modules_have_the_same_weights():
    A, B, x = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False), torch.zeros(5, 4)
    f = Factors(A, B, 2.0)
    segment = fused.make_segment(torch.zeros(3, 4), f, x, len(x))
    assert fused.is_unchanged(Factors(A, B, 2.0), f, segment) and not fused.is_unchanged(Factors(A, B, 3.0), f, segment)
    for factor in (A, B):
        before, factor.weight = factor.weight, nn.Parameter(factor.weight.detach().clone())
        assert not fused.is_unchanged(f, f, segment)
        factor.weight = before
    assert fused.is_unchanged(f, f, segment)


@pytest.mark.parametrize("field, size", [("gain", 3), ("inner", 2), ("outer", 3)])
def test_factors_with_a_gain_or_a_vector_share_no_call_of_the_base(field, size):
    A, B, x = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False), torch.zeros(5, 4)
    assert fused.make_segment(torch.zeros(3, 4), Factors(A, B, **{field: torch.ones(size)}), x, len(x)) is None


def test_a_module_in_place_of_the_layer_gets_the_keyword_arguments():
    class Norm(nn.LayerNorm):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm(12)

        def forward(self, x):
            return self.norm(x, scale=3.0)

    base = Holder()
    expected = base(X)
    model = graft.get_peft_model(base, graft.LNTuningConfig(target_modules=["norm"]))
    assert_close(model(X), expected)
    assert not torch.allclose(expected, base.norm(X))


def test_a_gain_of_another_dtype_than_the_output_rounds_once():
    """The base's output, the update and the gain are summed in the adapter's dtype, and rounded at the end."""
    with seeded(0):
        base = nn.Sequential(nn.Linear(12, 20)).to(torch.bfloat16)
        config = graft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["0"])
        model = graft.get_peft_model(base, config).eval()
    layer, x = layers(model)["0"], X.to(torch.bfloat16)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.3, 3, 20))
        f = layer.methods["default"].effect.factors()
        A, B = f.matrices()
        b = layer.base_layer.bias.float()
        expected = (layer.base_layer(x).float() - b + x.float() @ A.T @ B.T) * f.gain + b
        assert A.dtype == torch.float32
        assert_close(model(x), expected.to(torch.bfloat16), rtol=0, atol=0)
