# SPDX-License-Identifier: Apache-2.0
"""Modules that get dictionaries for hooks when they are asked for: in all else they are torch's."""

import copy
import pickle

import pytest
import torch
from torch import nn

from graft.core.lean import Identity, Linear, ModuleDict, new_lean
from graft.core.ops import make_linear

HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def test_hooks_come_when_asked_for_and_stay():
    m = make_linear(3, 2, bias=True)
    assert HOOKS and not set(HOOKS) & set(vars(m))
    for name in HOOKS:
        assert getattr(m, name) is getattr(m, name) and type(getattr(m, name)) is type(vars(nn.Module())[name])
    other = make_linear(3, 2, bias=True)
    other.register_forward_hook(lambda *_: None)
    assert not m._forward_hooks and len(other._forward_hooks) == 1


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_run_and_can_be_removed(kind):
    m, calls = make_linear(3, 2, bias=True), []
    handle = getattr(m, f"register_{kind}")(lambda *_: calls.append(kind))
    m(torch.ones(1, 3, requires_grad=True)).sum().backward()
    handle.remove()
    m(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert calls == [kind]


def test_hooks_of_state_dicts_run():
    m, calls = make_linear(3, 2, bias=False), []
    m.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    m.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    m.load_state_dict(m.state_dict())
    assert calls == ["saved", "loaded"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole(duplicate):
    m = new_lean(ModuleDict)
    m["a"], m["b"] = make_linear(3, 2, bias=True), new_lean(Identity)
    other = duplicate(m)
    assert repr(other) == repr(m) and isinstance(other["a"], Linear) and isinstance(other["a"], nn.Linear)
    assert torch.equal(other["a"](torch.ones(3)), m["a"](torch.ones(3)))
    other["a"].register_forward_hook(lambda *_: None)
    assert not m["a"]._forward_hooks


@pytest.mark.differs("type of `lora_A.default`")
def test_a_lean_linear_is_torchs():
    torch.manual_seed(0)
    ours = make_linear(3, 2, bias=True)
    torch.manual_seed(0)
    theirs = nn.Linear(3, 2)
    assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    with_hooks = {k: getattr(ours, k) for k in HOOKS} | vars(ours)
    assert with_hooks.keys() == vars(theirs).keys()
