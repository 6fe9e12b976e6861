# SPDX-License-Identifier: Apache-2.0
"""Laws of effects on whole modules, and of those that act on outputs: parts of a rewrite, branches, taps.

The methods are made here, of one effect each, so that a law shows what the core makes of the effect alone.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from graft.core.effect import Rewrite, Tap, Update
from graft.core.errors import RoutingError
from graft.core.method import Method
from graft.core.rows import Rows
from graft.methods.ln_tuning import LNTuning
from tests.looks import get_registry, layers
from tests.models import seeded
from tests.threads import at_once

WIDTH = 6
ROWS = ["b", "__base__", "a", "b", "a"]


class Inner(nn.Module):
    """A module with two inputs, which returns a tensor, or a tuple."""

    def __init__(self, tuples):
        super().__init__()
        self.linear, self.tuples, self.runs = nn.Linear(WIDTH, WIDTH), tuples, 0

    def forward(self, hidden, scale=1.0):
        self.runs += 1
        y = torch.tanh(self.linear(hidden)) * scale
        return (y, hidden) if self.tuples else y


class Net(nn.Module):
    """Two blocks: a norm, a module with two inputs, and what goes by them."""

    def __init__(self, tuples=False):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.inner = nn.ModuleList([Inner(tuples) for _ in range(2)])
        self.reentrant = None

    def block(self, i, x):
        y = self.inner[i](hidden=self.norms[i](x), scale=0.7)
        return x + (y[0] if isinstance(y, tuple) else y)

    def forward(self, x):
        for i in range(2):
            if self.reentrant is None:
                x = self.block(i, x)
            else:
                x = checkpoint(self.block, i, x, use_reentrant=self.reentrant)
        return x


class Toy(LNTuning):
    """A method of one effect; its tensor is a square matrix."""

    compresses_targets = False

    ln_tuning_layers: nn.Parameter

    check = Method.check

    def build(self, shared):
        return dict(ln_tuning_layers=nn.Parameter(torch.randn(WIDTH, WIDTH)))

    def u(self, x, y):
        return torch.tanh(x + 2 * y) @ self.ln_tuning_layers


def u(model, key, name, x, y):
    return torch.tanh(x + 2 * y) @ layers(model)[key].ln_tuning_layers[name]


class Before(Toy):
    def describe(self):
        return Rewrite(pre=lambda x: x + self.u(x, x), block=not self.site.op.known)


class After(Toy):
    def describe(self):
        return Rewrite(post=lambda x, y: y + self.u(x, y), block=not self.site.op.known)


class Part(Toy):
    def describe(self):
        return Rewrite(part=self.u, block=not self.site.op.known)


class Beside(Toy):
    def describe(self):
        return Update(branch=lambda x: self.u(x, x), input_of=lambda module, call: call["hidden"] * call["scale"])


class Reader(Toy):
    """A module that gets what goes into the norm before it."""

    def describe(self):
        reader = self.site.key.replace("norms", "inner")
        return Rewrite(part=self.u, block=True, tapped=True) if self.site.key == reader else Tap((reader,))


TARGETS = {
    Before: ["inner.0", "inner.1"],
    After: ["inner.0", "inner.1"],
    Part: ["inner.0", "inner.1"],
    Beside: ["inner.0", "inner.1"],
    Reader: ["norms.0", "norms.1", "inner.0", "inner.1"],
}
KINDS = list(TARGETS)


@pytest.fixture
def made(monkeypatch):
    def make(kind, tuples=False, targets=None, base=None):
        monkeypatch.setattr(LNTuning, "variant", classmethod(lambda c, cfg: kind))
        with seeded(1):
            config = graft.LNTuningConfig(target_modules=targets or TARGETS[kind])
            model = graft.get_peft_model(base or Net(tuples), config, "a")
            model.add_adapter("b", config)
        return model.eval()

    return make


def inputs(rows=5):
    with seeded(2):
        return torch.randn(rows, 3, WIDTH)


def by_hand(model, kind, names, x):
    """The model's output with adapters, by the formulas alone."""
    net = model.get_base_model()
    for i in range(2):
        key = f"inner.{i}"
        h = base_of(net.norms[i])(x)
        inside = h
        for name in reversed(names if kind is Before else ()):
            inside = inside + u(model, key, name, inside, inside)
        y = base_of(net.inner[i])(inside, 0.7)
        y = y[0] if isinstance(y, tuple) else y
        for name in names:
            if kind is Beside:
                y = y + u(model, key, name, 0.7 * h, 0.7 * h)
            elif kind is not Before:
                y = y + u(model, key, name, x if kind is Reader else h, y)
        x = x + y
    return x


def base_of(module):
    return getattr(module, "base_layer", module)


def runs(model):
    """How often a module has run since the last time."""
    module = base_of(model.get_base_model().inner[0])
    n, module.runs = module.runs, 0
    return n


@pytest.mark.parametrize("tuples", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_module_with_several_inputs_follows_the_formula(kind, tuples, made):
    model, x = made(kind, tuples), inputs()
    base = Net(tuples)
    base.load_state_dict(graft.get_base_model_state_dict(model))
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(names)
        assert_close(model(x), by_hand(model, kind, names, x))
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert not get_registry(model).call.thread_state.tapped
    with pytest.raises(NotImplementedError, match=r"Cannot merge.*(inner|norms)"):
        model.merge_adapter()


@pytest.mark.parametrize("tuples", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_of_a_mixed_batch_run_the_module_once(kind, tuples, made):
    model, x = made(kind, tuples), inputs()
    alone = {"__base__": by_hand(model, kind, [], x)}
    for name in "ab":
        alone[name] = by_hand(model, kind, [name], x)
    runs(model)
    mixed = model(x, adapter_names=ROWS)
    assert runs(model) == 1
    for row, name in enumerate(ROWS):
        assert_close(mixed[row], alone[name][row])
    assert not get_registry(model).call.thread_state.tapped


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("rows", [None, ROWS], ids=["", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_the_backward_pass_runs_again(kind, rows, reentrant, made):
    grads = []
    for again in (None, reentrant):
        model = made(kind, True)
        for name in "ab":
            model.set_requires_grad(name)
        model.get_base_model().reentrant = again
        x = inputs().requires_grad_()
        model.train()(x, **({} if rows is None else dict(adapter_names=rows))).square().sum().backward()
        grads.append({n: p.grad for n, p in [*model.named_parameters(), ("x", x)] if p.grad is not None})
        assert not get_registry(model).call.thread_state.tapped
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 2
    assert_close(grads[0], grads[1])


class ByRow:
    def __init__(self, weights):
        self.weights = weights  # adapter → (batch,)

    def apply(self, layer, adapter, part):
        return part * self.weights[adapter].view(-1, 1, 1)

    def rows(self, index):
        return ByRow({name: w[index] for name, w in self.weights.items()})


GATES = ByRow({"a": torch.tensor([0.0, 1.0, 0.3, 2.0, 1.0]), "b": torch.tensor([1.0, 0.0, 0.5, -1.0, 1.0])})


@pytest.mark.parametrize("rows", [None, ROWS], ids=["", "mixed"])
@pytest.mark.parametrize("kind", [Part, Beside, Reader])
@torch.no_grad()
def test_gates_weigh_parts_of_one_output(kind, rows, made):
    model, x = made(kind), inputs()
    model.base_model.set_adapter(["a", "b"])
    with get_registry(model).call.extend_context(GATES):
        gated = model(x, **({} if rows is None else dict(adapter_names=rows)))
    net, h = model.get_base_model(), x
    for i in range(2):
        key, inside = f"inner.{i}", base_of(net.norms[i])(h)
        y = base_of(net.inner[i])(inside, 0.7)
        given = {Part: (inside, y), Beside: (0.7 * inside, 0.7 * inside), Reader: (h, y)}[kind]
        total = y
        for name in "ab":
            own = torch.tensor([rows is None or row == name for row in rows or ROWS]).view(-1, 1, 1)
            total = total + own * GATES.apply(None, name, u(model, key, name, *given))
        h = h + total
    assert_close(gated, h)


@pytest.mark.parametrize("rows", [None, ROWS], ids=["", "mixed"])
@pytest.mark.parametrize("kind", [Before, After])
def test_gates_that_cannot_weigh_are_refused(kind, rows, made):
    model = made(kind)
    with get_registry(model).call.extend_context(GATES), pytest.raises(RoutingError, match=r"gates .*cannot weigh"):
        model(inputs(), **({} if rows is None else dict(adapter_names=rows)))


@pytest.mark.parametrize("kind", [After, Part])
@torch.no_grad()
def test_what_acts_on_the_output_of_a_linear_layer(kind, made):
    """In a mixed batch the layer runs once; beside LoRA it acts on the layer that LoRA made."""
    keys = ["inner.0.linear", "inner.1.linear"]
    model, x = made(kind, targets=keys), inputs()
    alone = {"__base__": Net()}
    alone["__base__"].load_state_dict(graft.get_base_model_state_dict(model))
    alone["__base__"] = alone["__base__"](x)
    for name in "ab":
        model.set_adapter(name)
        alone[name] = model(x)
    seen = []
    base_of(model.get_base_model().inner[0].linear).register_forward_hook(lambda *_: seen.append(1))
    mixed = model(x, adapter_names=ROWS)
    assert len(seen) == 1
    for row, name in enumerate(ROWS):
        assert_close(mixed[row], alone[name][row])
    model.set_adapter("a")
    layer, h = layers(model)[keys[0]], inputs()
    y = layer.base_layer(h)
    assert_close(layer(h), y + u(model, keys[0], "a", h, y))


@torch.no_grad()
def test_a_linear_layers_part_beside_lora(monkeypatch):
    monkeypatch.setattr(LNTuning, "variant", classmethod(lambda c, cfg: Part))
    with seeded(1):
        model = graft.get_peft_model(Net(), graft.LoraConfig(target_modules=["linear"], r=2), "low", mixed=True)
        model.add_adapter("a", graft.LNTuningConfig(target_modules=["inner.0.linear"]))
        for layer in layers(model).values():
            layer.lora_B["low"].weight.data.normal_()
    layer, x = layers(model)["inner.0.linear"], inputs()
    model.set_adapter("low")
    y = layer(x)
    model.base_model.set_adapter(["a", "low"])
    assert_close(layer(x), y + u(model, "inner.0.linear", "a", x, y))
    mixed = layer_rows(model, layer, x, ["low", "a", "a", "__base__", "low"])
    assert_close(mixed[[0, 4]], y[[0, 4]])
    base = layer.base_layer(x)
    assert_close(mixed[[1, 2]], (base + u(model, "inner.0.linear", "a", x, base))[[1, 2]])


def layer_rows(model, layer, x, names):
    with get_registry(model).call.use_rows(Rows.from_names(names)):
        return layer(x)


@torch.no_grad()
def test_an_input_that_was_never_kept_is_asked_for(made):
    model = made(Reader)
    with pytest.raises(RoutingError, match=r"'a' of layer 'inner.0' needs the input of a layer that runs before"):
        model.get_base_model().inner[0](inputs())


@torch.no_grad()
def test_threads_keep_inputs_of_their_own(made):
    model, many = made(Reader), [inputs(rows) for rows in (2, 3, 5, 7)]
    expected = [model(x) for x in many]
    found = {}

    def run(i):
        with torch.no_grad():
            found[i] = [model(many[i]) for _ in range(5)]

    at_once(*[partial(run, i) for i in range(len(many))])
    for i, y in enumerate(expected):
        assert len(found[i]) == 5
        for ours in found[i]:
            assert_close(ours, y)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_modules_with_several_inputs_compile(kind, made):
    torch._dynamo.reset()
    model, x = made(kind), inputs()
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
