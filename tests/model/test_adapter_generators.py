# SPDX-License-Identifier: Apache-2.0
"""Parameters of one adapter among several, and the generator from which each draws in a batch that they share."""

import pytest
import torch
from torch import nn

import graft
from graft.core.errors import AdapterNotFoundError, RoutingError
from graft.core.random import AdapterGenerators
from tests.models import seeded
from tests.raised import refuses


class Net(nn.Module):
    def __init__(self, drops: float = 0.0):
        super().__init__()
        self.words, self.drop = nn.Embedding(11, 8), nn.Dropout(drops)
        self.first, self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.drop(self.last(self.first(self.words(ids)).relu())))


def config(dropout: float = 0.5, **options):
    return graft.LoraConfig(
        r=2, target_modules=["first", "last"], lora_dropout=dropout, init_lora_weights=False, **options
    )


def model_of(drops: float = 0.0, **configs):
    with seeded(0):
        (first, cfg), *others = configs.items()
        model = graft.get_peft_model(Net(drops), cfg, first)
        for name, other in others:
            model.add_adapter(name, other)
    return model.train()


IDS = torch.arange(10).view(2, 5)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_layers_draw_apart_where_another_thread_sets_torchs_generator_back():
    draws, found = AdapterGenerators({"b": generator()}), []
    for _ in range(2):
        with seeded(0):
            ticket = draws.ticket()
        with draws.use_generator("b", ticket, torch.device("cpu")):
            found.append(torch.rand(3))
    assert torch.equal(torch.cat(found), torch.rand(6, generator=generator()))


def test_parameters_of_one_adapter_stand_in_the_order_of_the_model():
    model = model_of(b=config(modules_to_save=["head"], trainable_token_indices={"words": [1]}), c=config())
    mine = [name for name, _ in model.adapter_parameters("b")]
    assert mine == [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split(".")[-1] for n in mine} == {"weight", "bias", "b"} and any("tokens" in n for n in mine)
    others = dict(model.adapter_parameters("c"))
    assert len(others) == 4 and all(".c." in name and not p.requires_grad for name, p in others.items())
    refuses(AdapterNotFoundError, r"Adapter d not found. Loaded adapters: b, c", model.adapter_parameters, "d")


def test_biases_are_of_the_adapter_that_trains_them():
    model = model_of(b=config(bias="lora_only"), c=config(modules_to_save=["head"]))
    mine = dict(model.adapter_parameters("b"))
    assert {n for n in mine if "lora" not in n} == {f"base_model.model.{n}.base_layer.bias" for n in ("first", "last")}
    assert set(mine).isdisjoint(dict(model.adapter_parameters("c")))


@pytest.mark.parametrize("rows", [2, 60])  # with few, dropout has no kernel
@pytest.mark.parametrize("names", [["b", "c"], ["c", "b"], ["b", "__base__", "c", "b"]], ids=str)
def test_an_adapter_draws_as_it_does_alone(names, rows):
    model = model_of(b=config(), c=config(0.3))
    ids = IDS[:1].repeat(rows, 1)
    alone = {}
    for name in ("b", "c"):
        model.set_adapter(name)
        torch.manual_seed(ord(name))
        alone[name] = [model(ids.repeat(names.count(name), 1)) for _ in range(3)]
    generators = {name: generator(ord(name)) for name in "bc"}
    batch = [name for name in names for _ in range(rows)]
    for step in range(3):
        y = model(ids.repeat(len(names), 1), adapter_names=batch, adapter_generators=generators)
        for name in "bc":
            mine = torch.tensor([n == name for n in batch])
            assert torch.equal(y[mine], alone[name][step])


def test_checkpointed_layers_draw_the_same_again():
    class Checkpointed(Net):
        def forward(self, ids):
            block = lambda x: self.last(self.first(x).relu())
            return self.head(torch.utils.checkpoint.checkpoint(block, self.words(ids), use_reentrant=self.reentrant))

    grads = {}
    for reentrant in (None, False, True):
        model = model_of(b=config(), c=config(0.3))
        if reentrant is not None:
            model.get_base_model().__class__ = Checkpointed
            model.get_base_model().reentrant = reentrant
            model.get_base_model().words.register_forward_hook(lambda _m, _i, y: y.requires_grad_(True))
        model.set_requires_grad(["b", "c"])
        generators = {name: generator(ord(name)) for name in "bc"}
        for _ in range(2):
            y = model(IDS.repeat(20, 1), adapter_names=["b"] * 20 + ["c"] * 20, adapter_generators=generators)
            y.square().sum().backward()
        grads[reentrant] = [p.grad for name in "bc" for _, p in model.adapter_parameters(name)]
        states = [generators[name].get_state() for name in "bc"]
        assert all(torch.equal(*pair) for pair in zip(states, grads.setdefault("states", states)))
    for reentrant in (False, True):
        torch.testing.assert_close(grads[reentrant], grads[None])


def test_torchs_own_generator_stays_in_use_beside():
    """It moves at each layer, and nothing that an adapter draws depends on it."""
    model, outputs = model_of(b=config(), c=config()), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        generators = {name: generator(ord(name)) for name in "bc"}
        outputs.append(model(IDS, adapter_names=["b", "c"], adapter_generators=generators))
    assert torch.equal(*outputs)


def test_wrong_generators_are_refused_before_anything_is_drawn():
    model, one = model_of(b=config(), c=config()), generator()

    def refused(error, text, generators, **options):
        before = one.get_state()
        refuses(error, text, model, IDS, **{"adapter_names": ["b", "c"], **options}, adapter_generators=generators)
        assert torch.equal(one.get_state(), before)

    refused(RoutingError, r"has none for \['c'\]", {"b": one})
    refused(RoutingError, r"\['b', 'c'\] share a generator", {"b": one, "c": one})
    refused(RoutingError, "need adapter_names", {"b": one}, adapter_names=None)
    refused(TypeError, "takes generators of the CPU", {"b": one, "c": 3})
    refused(TypeError, "takes a torch.Generator by adapter, got a list", [one])


def test_a_base_that_draws_is_refused():
    model, generators = model_of(0.1, b=config(), c=config()), {name: generator(ord(name)) for name in "bc"}
    before = [g.get_state() for g in generators.values()]
    with pytest.raises(RoutingError, match=r"base model drew random numbers for the whole batch.*dropout to 0"):
        model(IDS, adapter_names=["b", "c"], adapter_generators=generators)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators.values(), before))
    model.eval()(IDS, adapter_names=["b", "c"], adapter_generators=generators)
