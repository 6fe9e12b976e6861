# SPDX-License-Identifier: Apache-2.0
"""`PeftModel.load_adapter` replaced by clients: `from_pretrained` asks the replacement, in both libraries."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import graft
from tests import models
from tests.compat.test_steps import GRAFT, LINEAR, PEFT, STACKS, Library, X, base
from tests.models import nudged
from tests.raised import refuses

BOTH = pytest.mark.parametrize("lib", [PEFT, GRAFT], ids=["peft", "graft"])
ORIGINAL = graft.PeftModel.load_adapter


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert graft.PeftModel.load_adapter is ORIGINAL


def saved(folder: Any, seed: int = 1, **config: Any) -> Any:
    """A folder with an adapter of PEFT's."""
    torch.manual_seed(seed)
    nudged(PEFT.wrap(base(), LINEAR | config)).save_pretrained(folder)
    return folder


def noting(seen: list, original: Any) -> Any:
    def load_adapter(self, model_id, *args, **kwargs):
        config = self.peft_config[args[0]]
        seen.append((model_id, args, kwargs, config.r, hasattr(self.base_model.model.blocks[0].k, "lora_A")))
        report = original(self, model_id, *args, **kwargs)
        seen.append((list(report.missing_keys), list(report.unexpected_keys)))
        return report

    return load_adapter


@BOTH
def test_what_it_is_asked(lib, tmp_path, monkeypatch):
    """What PEFT's from_pretrained hands on, the adapter being there, and what the original answers."""
    folder, seen = saved(tmp_path), []
    monkeypatch.setattr(lib.api.PeftModel, "load_adapter", noting(seen, lib.api.PeftModel.load_adapter))
    model = lib.api.PeftModel.from_pretrained(base(), folder, is_trainable=True)
    where, args, kwargs, *there = seen[0]
    told = dict(is_trainable=True, autocast_adapter_dtype=True, low_cpu_mem_usage=False)
    assert (where, args, *there) == (folder, ("default",), 8, True)
    assert kwargs == {**told, "key_mapping": {} if lib.theirs else None}
    assert lib.theirs or seen[1] == ([], [])
    monkeypatch.undo()
    assert_close(model(X), lib.api.PeftModel.from_pretrained(base(), folder)(X))


def test_two_wrappers_and_one_taken_away(tmp_path, monkeypatch):
    """Each calls what it found; without them nothing remembers them."""
    folder, seen = saved(tmp_path), []
    expected = graft.PeftModel.from_pretrained(base(), folder)(X)
    for mark in "ab":
        original = graft.PeftModel.load_adapter

        def load_adapter(self, *args, _mark=mark, _original=original, **kwargs):
            seen.append(_mark)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(graft.PeftModel, "load_adapter", load_adapter)
    model = graft.PeftModel.from_pretrained(base(), folder)
    assert seen == ["b", "a"]
    assert torch.equal(model(X), expected)
    monkeypatch.undo()
    assert torch.equal(graft.PeftModel.from_pretrained(base(), folder)(X), expected) and len(seen) == 2
    model.load_adapter(folder, "other")
    assert list(model.peft_config) == ["default", "other"]


@BOTH
def test_another_folder_and_an_option_of_its_own(lib, tmp_path, monkeypatch):
    """It may load something else, and take a keyword that the original does not know."""
    folder, other = saved(tmp_path / "a"), saved(tmp_path / "b", 2)
    expected = lib.api.PeftModel.from_pretrained(base(), other)(X)
    original = lib.api.PeftModel.load_adapter

    def load_adapter(self, model_id, *args, elsewhere=None, **kwargs):
        return original(self, elsewhere or model_id, *args, **kwargs)

    monkeypatch.setattr(lib.api.PeftModel, "load_adapter", load_adapter)
    model = lib.api.PeftModel.from_pretrained(base(), folder, elsewhere=other)
    assert_close(model(X), expected)


@BOTH
def test_a_class_that_overrides_it(lib, tmp_path):
    seen: list = []
    cls = type("Mine", (lib.api.PeftModel,), {"load_adapter": noting(seen, lib.api.PeftModel.load_adapter)})
    model = cls.from_pretrained(base(), saved(tmp_path))
    assert type(model) is cls and len(seen) == 2


def test_one_that_never_calls_the_original(tmp_path, monkeypatch):
    """It may set the values itself; it is told that the file's are there."""
    folder = saved(tmp_path)
    values = {k: v + 1 for k, v in load_file(folder / "adapter_model.safetensors").items()}

    def load_adapter(self, model_id, adapter_name, **kwargs):
        graft.set_peft_model_state_dict(self, values, adapter_name)

    expected = graft.PeftModel.from_pretrained(base(), folder)
    graft.set_peft_model_state_dict(expected, values)
    monkeypatch.setattr(graft.PeftModel, "load_adapter", load_adapter)
    with pytest.warns(graft.PeftWarning, match=r"test_replaced_load.*has not called the original"):
        model = graft.PeftModel.from_pretrained(base(), folder)
    assert torch.equal(model(X), expected(X))


@pytest.mark.parametrize("config", [{}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["v"]}], ids=str)
@pytest.mark.parametrize("after", [True, False])
def test_one_that_raises_leaves_the_base_as_it_was(config, after, tmp_path, monkeypatch):
    model, start = base().train(), base()
    model.blocks[0].v.weight.requires_grad_(False)
    model.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    config = {"target_modules": ["k"], "r": 2} | config
    GRAFT.wrap(base(), config).save_pretrained(tmp_path)
    before = {name: (p, p.clone(), p.requires_grad) for name, p in model.named_parameters()}

    def load_adapter(self, *args, **kwargs):
        if after:
            ORIGINAL(self, *args, **kwargs)
        raise LookupError("mine")

    with monkeypatch.context() as within:
        within.setattr(graft.PeftModel, "load_adapter", load_adapter)
        refuses(LookupError, "mine", graft.PeftModel.from_pretrained, model, tmp_path)
    now = dict(model.named_parameters())
    assert now.keys() == before.keys() and not hasattr(model, "peft_config")
    for name, (p, value, trains) in before.items():
        assert now[name] is p and torch.equal(p, value) and p.requires_grad == trains
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model(X), start(X))
    graft.PeftModel.from_pretrained(model, tmp_path)


def test_threads_load_side_by_side(tmp_path, monkeypatch):
    """Which model a call of the original is about is the model's own business."""
    folders = [saved(tmp_path / str(i), i) for i in range(4)]
    expected = [graft.PeftModel.from_pretrained(base(), folder)(X) for folder in folders]
    models, found = [base() for _ in folders], {}
    monkeypatch.setattr(graft.PeftModel, "load_adapter", noting([], ORIGINAL))

    def load(i):
        found[i] = graft.PeftModel.from_pretrained(models[i], folders[i])

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i](X), expected[i]) for i in range(4))


# the order of the columns of B


def by_expert(B: torch.Tensor, n: int, back: bool = False) -> torch.Tensor:
    """B (out, n r) with the columns of an expert next to each other; or `back`."""
    sizes = (n, -1) if back else (-1, n)
    return B.view(len(B), *sizes).transpose(1, 2).flatten(1)


def reordering(original: Any) -> Any:
    """A wrapper that puts B in order where the file notes another, as PEFT, which does not, lets it."""

    def load_adapter(self, model_id, adapter_name, *args, **kwargs):
        report = original(self, model_id, adapter_name, *args, **kwargs)
        if json.loads((model_id / "adapter_config.json").read_text()).get("lora_B_layout") == "grouped_by_expert":
            for module in self.modules():
                if getattr(module, "parameter_name", None):
                    B = module.lora_B[adapter_name].weight
                    B.data.copy_(by_expert(B.data, module.num_experts, back=True))
        return report

    return load_adapter


@pytest.fixture
def noted(tmp_path):
    """A folder whose file holds B by expert, and the model that it is of."""
    torch.manual_seed(5)
    model = nudged(PEFT.wrap(base(), STACKS | {"r": 2}))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: by_expert(v, 3) if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_B_layout": "grouped_by_expert"}))
    return tmp_path, model


def loaded(lib: Library, folder: Any, how: str) -> nn.Module:
    if how == "from_pretrained":
        return lib.api.PeftModel.from_pretrained(base(), folder)
    model = lib.wrap(base(), STACKS | {"r": 2}, adapter_name="first")
    model.load_adapter(folder, "default", is_trainable=True)
    model.set_adapter("default")
    return model


@pytest.mark.differs("files that hold B of experts in Unsloth's old order, where `PeftModel.load_adapter` was replaced")
@pytest.mark.filterwarnings("ignore:.*different config|.*peft_version")
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_columns_are_put_in_order_once(how, noted, monkeypatch):
    """By graft where nobody else does; by the replacement where there is one; the caller may say that it does not."""
    folder, model = noted
    expected = model(X)
    assert_close(loaded(GRAFT, folder, how)(X), expected, rtol=1e-4, atol=1e-3)
    for lib in (PEFT, GRAFT):
        monkeypatch.setattr(lib.api.PeftModel, "load_adapter", reordering(lib.api.PeftModel.load_adapter))
    assert_close(loaded(PEFT, folder, how)(X), expected, rtol=1e-4, atol=1e-3)
    with pytest.warns(graft.PeftWarning, match="left to tests.compat.test_replaced_load"):
        assert_close(loaded(GRAFT, folder, how)(X), expected, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(graft.PeftModel, "load_adapter", lambda self, *a, **k: ORIGINAL(self, *a, **k))
    with pytest.warns(graft.PeftWarning, match="left to"):
        assert not torch.allclose(loaded(GRAFT, folder, how)(X), expected, rtol=1e-2)
    if how == "from_pretrained":
        with pytest.warns(graft.PeftWarning, match="leave expert_layout out"):
            model = graft.PeftModel.from_pretrained(base(), folder, expert_layout="grouped_by_expert")
        assert_close(model(X), expected, rtol=1e-4, atol=1e-3)


def llama() -> nn.Module:
    return models.make("llama")


def test_one_that_raises_for_a_prompt(tmp_path, monkeypatch):
    ids, config = torch.arange(5)[None], graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    config.modules_to_save = ["lm_head"]
    graft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    before, trains = model(ids).logits, [p.requires_grad for p in model.parameters()]
    with monkeypatch.context() as within:
        within.setattr(graft.PeftModel, "load_adapter", lambda *args, **kwargs: json.loads("not JSON"))
        refuses(ValueError, "Expecting value", graft.PeftModel.from_pretrained, model, tmp_path)
    assert torch.equal(model(ids).logits, before) and [p.requires_grad for p in model.parameters()] == trains
    assert type(model.lm_head) is nn.Linear
    assert graft.PeftModel.from_pretrained(model, tmp_path)(ids).logits.shape[1] >= 5
