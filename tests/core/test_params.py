# SPDX-License-Identifier: Apache-2.0
"""Containers keyed by adapter."""

import copy

import pytest
import torch
from torch import nn

from graft.core.containers import BufferDict, Transient, container_for, tensors_of


def test_a_buffer_dict_is_a_dict():
    d = BufferDict({"a": torch.ones(2)})
    d["b"] = torch.zeros(3)
    assert list(d) == list(d.keys()) == ["a", "b"] and len(d) == 2
    assert "a" in d and "c" not in d
    assert [k for k, _ in d.items()] == ["a", "b"] and d.values() and torch.equal(d["b"], torch.zeros(3))
    d["a"] = torch.full((2,), 5.0)
    assert torch.equal(d.pop("a"), torch.full((2,), 5.0))
    del d["b"]
    assert len(d) == 0
    with pytest.raises(KeyError):
        d["a"]


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_dict_moves_with_its_module_and_is_saved_if_persistent(persistent):
    module = nn.Module()
    module.held = BufferDict({"a": torch.ones(2), "ids": torch.arange(2)}, persistent=persistent)
    module.double()
    assert module.held["a"].dtype == torch.float64 and module.held["ids"].dtype == torch.int64
    assert set(module.state_dict()) == ({"held.a", "held.ids"} if persistent else set())
    other = copy.deepcopy(module)
    other.held["a"].zero_()
    assert module.held["a"].sum() == 2


def test_the_container_follows_from_the_value():
    kinds = {
        nn.ModuleDict: nn.Linear(1, 1),
        nn.ParameterDict: nn.Parameter(torch.ones(1)),
        BufferDict: torch.ones(1),
        dict: 3.0,
    }
    for kind, value in kinds.items():
        assert isinstance(container_for(value), kind)
    assert container_for(torch.ones(1)).persistent
    assert not container_for(Transient(torch.ones(1))).persistent


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
        self.own = nn.Parameter(torch.ones(4))
        self.register_buffer("kept", torch.ones(5))
        self.register_buffer("scratch", torch.ones(6), persistent=False)


def test_tensors_of_a_module_are_its_state_dict():
    held = nn.ModuleDict({"a": Deep(), "b": Deep()})
    found = {path: tensor for path, _, _, tensor in tensors_of(held, "a")}
    state = held["a"].state_dict()
    assert found.keys() == state.keys()
    for path, owner, attribute, tensor in tensors_of(held, "a"):
        assert getattr(owner, attribute) is tensor and tensor.data_ptr() == state[path].data_ptr()
    assert list(tensors_of(held, "c")) == []


def test_tensors_of_plain_containers():
    p, b = nn.Parameter(torch.ones(1)), torch.ones(2)
    parameters = nn.ParameterDict({"a": p})
    assert list(tensors_of(parameters, "a")) == [("", parameters, "a", p)]
    buffers = BufferDict({"a": b}, persistent=True)
    assert list(tensors_of(buffers, "a")) == [("", buffers, "a", b)]
    assert list(tensors_of(BufferDict({"a": b}), "a")) == [], "a checkpoint does not hold it"
    assert list(tensors_of({"a": 3.0}, "a")) == []
