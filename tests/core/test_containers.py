# SPDX-License-Identifier: Apache-2.0
"""Containers keyed by adapter, and device and dtype of what they hold."""

import copy

import pytest
import torch
from torch import nn

from graft.core.containers import (
    AnyDict,
    BufferDict,
    CheckpointOnly,
    Transient,
    container_for,
    iter_tensors,
    move_tensor,
    place_tensors,
)

CPU, META = torch.device("cpu"), torch.device("meta")
HALF = [torch.bfloat16, torch.float16]


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
    found = {path: tensor for path, _, _, tensor in iter_tensors(held, "a")}
    state = held["a"].state_dict()
    assert found.keys() == state.keys()
    for path, owner, attribute, tensor in iter_tensors(held, "a"):
        assert getattr(owner, attribute) is tensor and tensor.data_ptr() == state[path].data_ptr()
    assert list(iter_tensors(held, "c")) == []


def test_tensors_of_plain_containers():
    p, b = nn.Parameter(torch.ones(1)), torch.ones(2)
    parameters = nn.ParameterDict({"a": p})
    assert list(iter_tensors(parameters, "a")) == [("", parameters, "a", p)]
    buffers = BufferDict({"a": b}, persistent=True)
    assert list(iter_tensors(buffers, "a")) == [("", buffers, "a", b)]
    assert list(iter_tensors(BufferDict({"a": b}), "a")) == [], "a checkpoint does not hold it"
    assert list(iter_tensors({"a": 3.0}, "a")) == []


# device and dtype


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_trained_in_float32_with_the_rounded_values(dtype):
    t = torch.tensor([1.2345678])
    assert move_tensor(t, CPU, dtype, upcast=True).dtype == torch.float32
    assert torch.equal(move_tensor(t, CPU, dtype, upcast=True), t.to(dtype).float())
    assert move_tensor(t, CPU, dtype, upcast=False).dtype == dtype


def test_what_methods_of_two_kinds_hold_by_one_name_is_widened():
    held = AnyDict(nn.ParameterDict({"a": nn.Parameter(torch.ones(2).bfloat16())}))
    held["b"] = nn.Linear(2, 2).bfloat16()
    for name in "ab":
        place_tensors(held, name, None, None, upcast=True)
    assert held["a"].dtype == held["b"].weight.dtype == torch.float32


@pytest.mark.parametrize("mark", [Transient, CheckpointOnly])
def test_a_plain_value_takes_the_marks_of_a_transient_one_away(mark):
    held = AnyDict(nn.ParameterDict())
    held["a"] = mark(torch.ones(2))
    assert not held.state_dict() and len([*iter_tensors(held, "a")]) == (mark is CheckpointOnly)
    held["a"] = torch.zeros(2)
    assert [*held.state_dict()] == ["a"] and len([*iter_tensors(held, "a")]) == 1
    held["a"] = mark(torch.ones(2))
    held["a"] = mark(nn.Parameter(torch.ones(2)))
    assert [*held.state_dict()] == ["a"] and len([*iter_tensors(held, "a")]) == (mark is CheckpointOnly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_floats_follow_the_base(dtype):
    for upcast in (True, False):
        assert move_tensor(torch.ones(1, dtype=torch.float32), CPU, dtype, upcast).dtype == dtype


def test_float8_bases_are_trained_in_float32():
    t = move_tensor(torch.ones(1), CPU, torch.float8_e4m3fn, upcast=True)
    assert t.dtype == torch.float32


def test_a_base_without_a_float_dtype_leaves_the_adapters():
    assert move_tensor(torch.ones(1), CPU, None, upcast=True).dtype == torch.float32
    assert move_tensor(torch.ones(1, dtype=torch.bfloat16), CPU, None, upcast=True).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_what_is_no_real_float_keeps_its_dtype(dtype):
    t = torch.ones(2, dtype=dtype)
    assert move_tensor(t, CPU, torch.bfloat16, upcast=True) is t


def test_nothing_is_copied_without_need():
    t = torch.ones(2)
    assert move_tensor(t, CPU, torch.float32, upcast=True) is t and move_tensor(t, None, None, upcast=True) is t


def test_meta_stays_meta_until_it_is_loaded():
    assert move_tensor(torch.ones(2, device=META), CPU, torch.bfloat16, upcast=False).is_meta
    assert move_tensor(torch.ones(2), META, torch.float32, upcast=False).is_meta


def test_every_kind_of_container():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    modules = nn.ModuleDict({"a": module, "b": nn.Linear(1, 1)})
    parameters = nn.ParameterDict({"a": nn.Parameter(torch.ones(2), requires_grad=False)})
    buffers = BufferDict({"a": torch.ones(2), "ids": torch.arange(2)})
    facts = {"a": 3.0}
    for container in (modules, parameters, buffers, facts):
        place_tensors(container, "a", CPU, torch.bfloat16, upcast=False)
    place_tensors(buffers, "ids", CPU, torch.bfloat16, upcast=False)
    assert {p.dtype for p in modules["a"].parameters()} == {torch.bfloat16}
    assert modules["a"][1].running_mean.dtype == torch.bfloat16
    assert modules["a"][1].num_batches_tracked.dtype == torch.int64
    assert modules["b"].weight.dtype == torch.float32, "only the one asked for"
    assert parameters["a"].dtype == torch.bfloat16 and not parameters["a"].requires_grad
    assert isinstance(parameters["a"], nn.Parameter)
    assert buffers["a"].dtype == torch.bfloat16 and buffers["ids"].dtype == torch.int64
    assert facts == {"a": 3.0}


def test_a_parameter_already_in_place_is_the_same_object():
    parameters = nn.ParameterDict({"a": nn.Parameter(torch.ones(2))})
    before = parameters["a"]
    place_tensors(parameters, "a", CPU, torch.float32, upcast=True)
    assert parameters["a"] is before
