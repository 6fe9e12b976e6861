# SPDX-License-Identifier: Apache-2.0
"""Random sequences of calls of the public API, after each of which a model does what a dense reference does.

`GRAFT_TESTS=all` runs them at length; `GRAFT_SEQUENCES=2000` says how many.
"""

import copy
import io
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import graft
from tests.looks import registry_of
from tests.models import seeded
from tests.trust.dense import CONTAINERS, LAYERS, Adapter, Reference

LONG = os.environ.get("GRAFT_TESTS") == "all"
SEQUENCES = int(os.environ.get("GRAFT_SEQUENCES", 300 if LONG else 30))
NAMES = ("a", "0", "first", "weight_b")
KINDS = tuple(CONTAINERS)
X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).sin()

some_name, some_kind = st.sampled_from(NAMES), st.sampled_from(KINDS)
some_targets = st.sampled_from([["first"], ["second"], ["first", "second"]])
seeds = st.integers(0, 2**16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(i, o, dtype=torch.float64) for o, i in LAYERS.values())

    def forward(self, x):
        return self.second(self.first(x).tanh()).tanh()


def config(kind: str, targets: list[str]):
    if kind == "LORA":
        return graft.LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    if kind == "LOHA":
        return graft.LoHaConfig(r=2, alpha=5, target_modules=targets)
    return graft.IA3Config(target_modules=targets, feedforward_modules=[])


class Sequences(RuleBasedStateMachine):
    """One method, or all of them on one model."""

    kind: str | None = None  # None: all

    @initialize(kind=some_kind, where=some_targets, seed=seeds)
    def begin(self, kind, where, seed):
        with seeded(0):
            net = Net()
        self.folder, self.saved = Path(tempfile.mkdtemp()), {}
        self.reference = Reference(
            {key: (getattr(net, key).weight.detach(), getattr(net, key).bias.detach()) for key in LAYERS}
        )
        kind = self.kind or kind
        self.model = graft.get_peft_model(net, config(kind, where), "a", mixed=self.kind is None).eval()
        self.fill("a", kind, seed)
        self.reference.active = ["a"]

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    # what is in the model

    @property
    def names(self):
        return list(self.reference.adapters)

    def tensors(self, name: str, kind: str) -> dict[str, list[torch.Tensor]]:
        """The adapter's own tensors, by layer."""
        layers = registry_of(self.model).layers
        found = {}
        for key, layer in layers.items():
            if name in layer.methods:
                held = [getattr(layer, c)[name] for c in CONTAINERS[kind]]
                found[key] = [t.weight if isinstance(t, nn.Module) else t for t in held]
        return found

    def fill(self, name, kind, seed):
        with seeded(seed), torch.no_grad():
            held = self.tensors(name, kind)
            for ts in held.values():
                for t in ts:
                    t.copy_(torch.randn(t.shape, dtype=t.dtype) * 0.5)
        self.remember(name, kind)

    def remember(self, name, kind):
        held = self.tensors(name, kind)
        self.reference.add(name, Adapter(kind, {key: [t.detach().clone() for t in ts] for key, ts in held.items()}))

    def chosen(self, data, least=1, most=3):
        names = st.lists(st.sampled_from(self.names), min_size=least, max_size=most, unique=True)
        return data.draw(names, "names")

    # adapters come and go

    @rule(name=some_name, kind=some_kind, where=some_targets, seed=seeds)
    def add(self, name, kind, where, seed):
        kind = self.kind or kind
        if name in self.names:
            with pytest.raises(graft.AdapterNameError):
                self.model.add_adapter(name, config(kind, where))
            return
        self.model.add_adapter(name, config(kind, where))
        self.fill(name, kind, seed)

    @rule(name=some_name)
    def delete(self, name):
        if name not in self.names or name in self.reference.merged:
            with pytest.raises(ValueError):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        self.reference.delete(name)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def activate(self, data):
        names = self.chosen(data)
        self.model.base_model.set_adapter(names)
        self.reference.set(names)

    @rule(name=some_name)
    def activate_one(self, name):
        if name not in self.names:
            with pytest.raises(graft.AdapterNotFoundError):
                self.model.set_adapter(name)
            return
        self.model.set_adapter(name)
        self.reference.set([name])

    # on, off, merged

    @rule(off=st.booleans())
    def switch(self, off):
        tuner = self.model.base_model
        (tuner.disable_adapter_layers if off else tuner.enable_adapter_layers)()
        self.reference.disable(off)

    @rule()
    def within_a_block(self):
        before = self.reference.disabled
        with self.model.disable_adapter():
            torch.testing.assert_close(self.model(X), self.reference.run(X, []))
        self.reference.disable(True)  # which unmerges
        self.reference.disable(before)

    @precondition(lambda self: self.names)
    @rule(data=st.data(), safe=st.booleans(), active=st.booleans())
    def merge(self, data, safe, active):
        names = None if active else self.chosen(data)
        wanted = [n for n in (self.reference.active if names is None else names) if n not in self.reference.merged]
        if self.reference.disabled and wanted:
            with pytest.raises(ValueError, match="while adapters are disabled"):
                self.model.base_model.merge_adapter(names, safe_merge=safe)
            return
        self.model.base_model.merge_adapter(names, safe_merge=safe)
        self.reference.merged = self.reference.merged + wanted

    @precondition(lambda self: self.names)
    @rule(data=st.data(), bad=st.sampled_from([float("nan"), float("inf")]))
    def merge_what_is_broken(self, data, bad):
        name = self.chosen(data, most=1)[0]
        if name in self.reference.merged or self.reference.disabled:
            return
        first = next(iter(self.tensors(name, self.reference.adapters[name].kind).values()))[0].data.view(-1)
        value = first[0].item()
        first[0] = bad
        with pytest.raises(ValueError, match="NaNs detected"):
            self.model.base_model.merge_adapter([name])
        first[0] = value

    @rule()
    def unmerge(self):
        self.model.base_model.unmerge_adapter()
        self.reference.merged = []

    # training

    @precondition(lambda self: self.reference.active and not self.reference.disabled and not self.reference.merged)
    @rule(seed=seeds)
    def train(self, seed):
        with seeded(seed):
            x = torch.randn(6, 5, dtype=torch.float64)
        mine = [t for n in self.reference.active for ts in self.reference.adapters[n].tensors.values() for t in ts]
        for t in mine:
            t.requires_grad_()
        wanted = torch.autograd.grad(self.reference.run(x).square().sum(), mine)
        for t, grad in zip(mine, wanted):
            t.requires_grad_(False).sub_(grad, alpha=0.03)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.03)
        self.model.train()(x).square().sum().backward()
        assert len(parameters) == len(mine) and all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        self.model.eval()

    # rows

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def rows(self, data):
        names = data.draw(st.lists(st.sampled_from([*self.names, "__base__"]), min_size=4, max_size=4), "rows")
        if self.reference.merged:
            with pytest.raises(graft.RoutingError):
                self.model(X, adapter_names=names)
            return
        acting = [[] if self.reference.disabled or n == "__base__" else [n] for n in names]
        wanted = torch.cat([self.reference.run(x[None], names) for x, names in zip(X, acting)])
        torch.testing.assert_close(self.model(X, adapter_names=names), wanted)

    # files, copies, dtypes

    @precondition(lambda self: self.names)
    @rule(data=st.data(), number=st.integers(0, 2))
    def save(self, data, number):
        name = self.chosen(data, most=1)[0]
        path = self.folder / str(number)
        shutil.rmtree(path, ignore_errors=True)
        self.model.save_pretrained(path, selected_adapters=[name])
        self.saved[number] = (path / name, self.reference.adapters[name].copy())

    @rule(name=some_name, number=st.integers(0, 2), train=st.booleans())
    def load(self, name, number, train):
        if number not in self.saved:
            return
        path, adapter = self.saved[number]
        mine = self.reference.adapters.get(name)
        if mine is not None and (mine.kind, mine.tensors.keys()) != (adapter.kind, adapter.tensors.keys()):
            with pytest.raises((graft.PeftError, ValueError)):
                self.model.load_adapter(path, name)
            self.model.eval()
            return
        self.model.load_adapter(path, name, is_trainable=train)
        if mine is None:
            self.reference.add(name, adapter.copy())
        else:
            mine.tensors = adapter.copy().tensors
        if train and name not in self.reference.active:  # it trains all the same; take that back
            held = [layer for layer in registry_of(self.model).layers.values() if name in layer.methods]
            assert all(p.requires_grad for layer in held for p in layer.parameters_of(name))
            self.model.set_requires_grad(name, False)

    @rule(how=st.sampled_from(["deepcopy", "torch.save"]))
    def copied(self, how):
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        else:
            stream = io.BytesIO()
            torch.save(self.model, stream)
            stream.seek(0)
            self.model = torch.load(stream, weights_only=False)

    @precondition(lambda self: not self.reference.merged)
    @rule()
    def cast(self):
        self.model.float().double()
        self.reference.round()

    # out of the model

    @rule()
    def unload(self):
        plain = copy.deepcopy(self.model).base_model.unload()
        torch.testing.assert_close(plain(X), self.reference.run(X, self.reference.merged))
        assert type(plain) is Net and plain.state_dict().keys() == Net().state_dict().keys()
        assert all(p.requires_grad for p in plain.parameters())

    @precondition(lambda self: self.reference.active)
    @rule(safe=st.booleans())
    def merge_and_unload(self, safe):
        plain = copy.deepcopy(self.model).base_model.merge_and_unload(safe_merge=safe)
        merged = self.reference.merged
        both = [*merged, *(n for n in self.reference.active if n not in merged)]
        torch.testing.assert_close(plain(X), self.reference.run(X, both))

    @precondition(lambda self: self.kind in ("LORA", "LOHA"))
    @rule(data=st.data(), name=some_name, kind=st.sampled_from(["cat", "svd", "exact"]))
    def combine(self, data, name, kind):
        held = self.reference.adapters
        if not self.names or name in self.names or (self.kind == "LOHA" and kind == "cat"):
            return
        names = self.chosen(data, most=2)
        weights = [0.5, -1.25][: len(names)]
        options = {"svd_rank": 8} if kind == "svd" else {}
        self.model.base_model.add_weighted_adapter(names, weights, name, combination_type=kind, **options)
        for key, layer in registry_of(self.model).layers.items():
            if name in layer.methods:
                wanted = sum(w * held[n].delta(key) for n, w in zip(names, weights) if key in held[n].tensors)
                torch.testing.assert_close(layer.get_delta_weight(name), wanted)
        self.model.delete_adapter(name)

    # what holds after every call

    @invariant()
    def same_as_the_reference(self):
        if not hasattr(self, "model"):
            return
        reference, registry = self.reference, registry_of(self.model)
        torch.testing.assert_close(self.model(X), reference.run(X))
        assert set(registry.peft_config) == set(self.names)
        assert registry.active_adapters == reference.active
        assert set(registry.merged_adapters) == set(reference.merged)
        for key, layer in registry.layers.items():
            torch.testing.assert_close(layer.W0, reference.base[key][0])
            for name in layer.methods:
                trains = {p.requires_grad for p in layer.parameters_of(name)}
                assert trains == {name in reference.active}, (key, name)


def machine(kind):
    name = kind or "MIXED"
    made = type(name, (Sequences,), {"kind": kind})
    made.TestCase.settings = settings(
        max_examples=SEQUENCES, stateful_step_count=40 if LONG else 25, deadline=None, derandomize=not LONG,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    return made.TestCase


class TestLora(machine("LORA")):
    pass


class TestLoha(machine("LOHA")):
    pass


class TestIA3(machine("IA3")):
    pass


class TestMixed(machine(None)):
    pass
