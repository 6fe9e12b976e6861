# SPDX-License-Identifier: Apache-2.0
"""`inject_adapter` of tuners replaced by clients: every injection asks it, in both libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graft
from tests.compat.test_steps import GRAFT, LINEAR, PEFT, X, base

ORIGINAL = vars(GRAFT.base)["inject_adapter"]


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert vars(GRAFT.base)["inject_adapter"] is ORIGINAL


@pytest.mark.parametrize("lib", [PEFT, GRAFT], ids=["peft", "graft"])
def test_what_it_is_asked(lib, monkeypatch):
    """In the form of a client's that has the arguments of another function: it hands them on as they come."""
    seen, original = [], lib.base.inject_adapter

    def inject_adapter(self, config, model, adapter_name="default", *args, **kwargs):
        seen.append((config is self.model, model, adapter_name, args, kwargs, self.peft_config[model].r))
        self.peft_config[model].target_modules = {"k"}
        return original(self, config, model, adapter_name, *args, **kwargs)

    monkeypatch.setattr(lib.base, "inject_adapter", inject_adapter)
    model = lib.wrap(base(), LINEAR)
    model.add_adapter("other", lib.api.LoraConfig(**LINEAR, r=4))
    lib.get("peft.mapping", "inject_adapter_in_model")(lib.api.LoraConfig(**LINEAR), base())
    first = (True, "default", "default", (), {"low_cpu_mem_usage": False, "state_dict": None}, 8)
    assert seen == [first, (True, "other", "default", (), {"low_cpu_mem_usage": False}, 4), first]
    assert {n for n, m in model.named_modules() if hasattr(m, "lora_A")} == {
        f"base_model.model.blocks.{i}.k" for i in range(2)
    }


def never(*args: Any, **kwargs: Any) -> None:
    pass


def afterwards(*args: Any, **kwargs: Any) -> None:
    ORIGINAL(*args, **kwargs)
    raise LookupError("mine")


def twice(*args: Any, **kwargs: Any) -> None:
    ORIGINAL(*args, **kwargs)
    ORIGINAL(*args, **kwargs)


BAD = {
    never: (graft.UnsupportedLayerError, "replaced by tests.compat.test_replaced_inj.*never, which has not called"),
    afterwards: (LookupError, "mine"),
    twice: (KeyError, "already exists"),
}


@pytest.mark.differs("a replaced `inject_adapter` that never calls the original, or raises after it")
@pytest.mark.filterwarnings("ignore:PiSSA changes")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("config", [LINEAR, {"target_modules": ["k"], "r": 2, "init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("further", [False, True])
def test_one_that_raises_changes_nothing(bad, config, further, monkeypatch):
    model: nn.Module = base()
    model.blocks[0].v.weight.requires_grad_(False)
    wrapped = GRAFT.wrap(model, LINEAR, adapter_name="first") if further else None
    before = {name: (p, p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    kind, text = BAD[bad]
    add = (lambda: GRAFT.wrap(model, config)) if wrapped is None else (
        lambda: wrapped.add_adapter("default", graft.LoraConfig(**config))
    )  # fmt: skip
    with monkeypatch.context() as within:
        within.setattr(GRAFT.base, "inject_adapter", bad)
        with pytest.raises(kind, match=text):
            add()
    now = dict(model.named_parameters())
    assert now.keys() == before.keys() and hasattr(model, "peft_config") == further
    for name, (p, value, trains) in before.items():
        assert now[name] is p and torch.equal(p, value) and p.requires_grad == trains
    assert wrapped is None or list(wrapped.peft_config) == ["first"]
    add()
    model(X)
