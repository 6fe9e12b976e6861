# SPDX-License-Identifier: Apache-2.0
"""Layers in pieces, by two threads that exchange tensors as processes do; tests/distributed has real processes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.core import pieces
from graft.core.errors import CheckpointError, ConfigError, UnsupportedLayerError
from graft.kernels.cuts import Cut
from tests import samples
from tests.distributed.megatron import MegatronNet
from tests.distributed.tensor_parallel import Net, with_sample
from tests.models import disturb, seeded
from tests.threads import at_once

WORLD = 2


class Exchange:
    """The collective functions of two threads, each with the rank that `here` has there."""

    def __init__(self):
        self.here, self.barrier, self.values = threading.local(), threading.Barrier(WORLD, timeout=20), {}
        self.store = dist.HashStore()

    def collect(self, value):
        """Return what the threads passed, by rank."""
        self.values[self.here.rank] = value
        self.barrier.wait()
        values = [self.values[rank] for rank in range(WORLD)]
        self.barrier.wait()
        return values

    def all_reduce(self, t, *_, **__):
        t.copy_(sum(self.collect(t.clone())))

    def all_gather(self, outputs, t, group):
        for output, value in zip(outputs, self.collect(t.clone()), strict=True):
            output.copy_(value)

    def all_gather_object(self, outputs, value, group=None):
        outputs[:] = [pickle.loads(text) for text in self.collect(pickle.dumps(value))]

    def broadcast(self, t, first, group):
        t.copy_(self.collect(t.clone())[first])


@pytest.fixture
def exchange(monkeypatch):
    it = Exchange()
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast"):
        monkeypatch.setattr(dist, name, getattr(it, name))
    monkeypatch.setattr(dist, "is_initialized", lambda: hasattr(it.here, "rank"))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(WORLD)))
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: it.store)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: it.here.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: WORLD)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: rank)
    return it


def on_both(exchange, act):
    """Return the results of `act(rank)` on both ranks."""
    results = {}

    def run(rank):
        exchange.here.rank = rank
        try:
            results[rank] = act(rank)
        except BaseException as error:
            exchange.barrier.abort()
            results[rank] = error

    at_once(*(lambda rank=rank: run(rank) for rank in range(WORLD)))
    for result in sorted(results.values(), key=lambda r: isinstance(r, threading.BrokenBarrierError)):
        if isinstance(result, BaseException):
            raise result
    return [results[rank] for rank in range(WORLD)]


def history(model, x):
    """Return what a model computes: its outputs, gradients, and outputs merged, unmerged and disabled."""
    y = model(x)
    y.square().sum().backward()
    values = {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad(), model.disable_adapter():
        values["disabled"] = model(x)
    try:
        model.merge_adapter()
    except (NotImplementedError, RuntimeError) as error:
        return values | {"refused": type(error)}
    values["merged"] = model(x).detach()
    model.unmerge_adapter()
    return values | {"unmerged": model(x).detach()}


FORMS = [("layer", False), ("after", False), ("after", True)]
CASES = [(sample, *form) for sample in samples.BY_THEMSELVES for form in FORMS if sample.method != "LN_TUNING"]
ON_BIAS = ["BOFT", "BOTTLENECK", "FINEGATES", "IA3", "MISS-bat", "REFT", "ROAD", "STEERING", "TRAINABLE_TOKENS"]


class Masked(nn.Module):
    """A dropout that drops every third number of the whole input."""

    def forward(self, x):
        return x * (torch.arange(x.shape[-1]) % 3 > 0)


def in_pieces(exchange, net, leaves_bias, act):
    """Return the results of `act(net)` on both ranks, each with its copy of the net in pieces."""
    twins = [copy.deepcopy(net) for _ in range(WORLD)]

    def run(rank):
        parallel = MegatronNet(twins[rank], WORLD, leaves_bias)
        parallel.layer.tp_group = parallel.after.tp_group = SimpleNamespace(rank=rank)
        return act(parallel)

    return on_both(exchange, run)


def compare(exchange, inject, leaves_bias=False):
    """Require of `inject(net)` on pieces of a net to compute as on a whole one."""
    with seeded(5):
        x, net = torch.randn(3, 4, 10), Net()
    whole = copy.deepcopy(net)
    one = disturb(inject(whole)).eval()
    adapters = {name: graft.get_peft_model_state_dict(one, adapter_name=name) for name in one.peft_config}

    def act(parallel):
        model = inject(parallel).eval()
        start = {name: graft.get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config}
        starts.append(copy.deepcopy(start))  # before the values change
        for name, tensors in adapters.items():
            graft.set_peft_model_state_dict(model, tensors, name)
        return history(model, x)

    expected, starts = history(one, x), []
    for values in in_pieces(exchange, net, leaves_bias, act):
        assert values.keys() == expected.keys() and values.get("refused") == expected.get("refused")
        for name in values.keys() - {"refused"}:
            assert_close(values[name], expected[name], rtol=1e-4, atol=1e-5)
    assert_close(*starts, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sample, target, leaves_bias", CASES, ids=[f"{s}-{t}-{b}" for s, t, b in CASES])
def test_a_layer_in_pieces_computes_as_a_whole_one(exchange, sample, target, leaves_bias):
    error = None
    if leaves_bias and {sample.method, str(sample)} & set(ON_BIAS):
        error = UnsupportedLayerError("leaves to its caller")
    else:
        try:
            with_sample(Net(), sample, target)
        except (ConfigError, UnsupportedLayerError) as refusal:
            error = refusal
    if error is None:
        compare(exchange, lambda net: with_sample(net, sample, target), leaves_bias)
        return
    with pytest.raises(type(error), match=re.escape(str(error)[-20:])):
        in_pieces(exchange, Net(), leaves_bias, lambda net: with_sample(net, sample, target))


@pytest.mark.parametrize("target", ["layer", "after"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_all_pieces_drop_the_same_inputs(exchange, target, use_dora):
    def inject(net):
        model = graft.get_peft_model(net, graft.LoraConfig(r=3, target_modules=[target], use_dora=use_dora))
        model.get_submodule(f"base_model.model.{target}").lora_dropout["default"] = Masked()
        return model

    compare(exchange, inject)


CHAINS = [
    {"a": graft.OFTConfig(oft_block_size=2), "b": graft.LoraConfig(r=3)},
    {"a": graft.LoraConfig(r=3, use_dora=True), "b": graft.IA3Config(feedforward_modules=[])},
    {"a": graft.RoadConfig(group_size=2), "b": graft.LoHaConfig(r=2)},
]


@pytest.mark.parametrize("target", ["layer", "after"])
@pytest.mark.parametrize("chain", CHAINS, ids=["-".join(type(c).__name__ for c in chain.values()) for chain in CHAINS])
def test_adapters_of_several_methods_on_pieces(exchange, chain, target):
    def inject(net):
        a, b = (dataclasses.replace(config, target_modules=[target]) for config in chain.values())
        model = graft.PeftMixedModel(net, a, "a")
        model.add_adapter("b", b)
        model.set_adapter(["a", "b"])
        return model

    compare(exchange, inject)


def test_processes_with_other_random_states_are_refused(exchange, monkeypatch):
    def act(net):
        model = graft.get_peft_model(net, graft.LoraConfig(r=3, lora_dropout=0.1, target_modules=["layer"]))
        return model.train()(torch.ones(2, 10))

    monkeypatch.setattr(pieces, "read_generator_states", lambda: [torch.tensor([3, 4])])
    in_pieces(exchange, Net(), False, act)
    monkeypatch.setattr(pieces, "read_generator_states", lambda: [torch.tensor([3, exchange.here.rank])])
    with pytest.raises(RuntimeError, match="share layer 'layer' have different random states"):
        in_pieces(exchange, Net(), False, act)


@pytest.mark.parametrize("x, y", [(3, (3, 4)), (3, (3, 6)), (3, (2, 5)), (3, (5,)), (3, None)])
def test_only_plain_tensors_of_all_tokens_are_taken(x, y):
    piece = pieces.LayerPiece("colwise", None, None, Cut(None, 0, 2, 10))
    piece.check(torch.ones(3, 8), torch.ones(3, 5), "fc")
    with pytest.raises(UnsupportedLayerError, match=r"'fc', parallel by the style 'colwise', maps a Tensor\(3, 8\)"):
        piece.check(torch.ones(x, 8), y if y is None else torch.ones(y), "fc")


@pytest.mark.parametrize("config", [graft.LoraConfig(r=3), graft.OFTConfig(oft_block_size=2), graft.VeraConfig(r=3)])
def test_pieces_save_the_files_of_a_whole_model_and_load_them(exchange, config, tmp_path):
    with seeded(5):
        x, net = torch.randn(3, 10), Net()
    config = dataclasses.replace(config, target_modules=["layer", "after"])
    if hasattr(config, "projection_prng_key"):
        config.save_projection = True
    one = disturb(graft.get_peft_model(copy.deepcopy(net), config)).eval()
    one.save_pretrained(tmp_path / "one")

    def act(parallel):
        model = graft.PeftModel.from_pretrained(parallel, tmp_path / "one")
        model.save_pretrained(tmp_path / "all")
        return model(x).detach()

    for y in in_pieces(exchange, net, False, act):
        assert_close(y, one(x), rtol=1e-4, atol=1e-5)
    one, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "all"))
    assert_close(both, one, rtol=0, atol=0)


def test_processes_that_load_other_values_are_named(exchange, tmp_path):
    with seeded(0):
        net = Net()
    for rank in range(WORLD):
        config = graft.LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False)
        graft.get_peft_model(copy.deepcopy(net), config).save_pretrained(tmp_path / str(rank))

    def act(parallel):
        return graft.PeftModel.from_pretrained(parallel, tmp_path / str(exchange.here.rank))

    with pytest.raises(CheckpointError, match=r"'default' has other values on rank\(s\) \[1\] than on rank 0"):
        in_pieces(exchange, net, False, act)
