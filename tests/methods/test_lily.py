# SPDX-License-Identifier: Apache-2.0
"""Lily: which layers share what, for every adapter, in memory and in files."""

import warnings

import pytest
import torch
from torch import nn

import graft
from tests.models import seeded
from tests.pair import LIBS, close

X = torch.linspace(-1, 1, 30).view(5, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict(dict(up=nn.Linear(6, 8), down=nn.Linear(8, 6))) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


def net() -> Net:
    with seeded(0):
        return Net().eval()


def config(lib=graft, **options):
    return lib.LilyConfig(**{"target_modules": ["up", "down"], "r": 3, "stride_A": 2, "num_B": 3} | options)


@torch.no_grad()
def disturbed(model):
    with seeded(3):
        for p in {id(p): p for n, p in model.named_parameters() if "lily_" in n}.values():
            p.add_(torch.randn(p.shape), alpha=0.3)
    return model.eval()


def shared(model, adapter: str) -> dict[str, list[int]]:
    """By container: for each `up` layer, which tensor it has, counted in the order of layers."""
    out = {}
    for name in ("lily_A", "lily_B", "lily_router"):
        ids = [id(getattr(layer["up"], name)[adapter].weight) for layer in model.base_model.model.layers]
        out[name] = [list(dict.fromkeys(ids)).index(i) for i in ids]
    return out


EXPECTED = {"lily_A": [0, 0, 1, 1, 2], "lily_B": [0] * 5, "lily_router": [0, 1, 2, 3, 4]}


def test_which_layers_share_is_as_in_peft():
    assert [shared(lib.get_peft_model(net(), config(lib)), "default") for lib in LIBS] == [EXPECTED] * 2


@pytest.mark.differs("Lily: adapters beyond a model's first")
def test_every_adapter_shares(tmp_path):
    """PEFT shares for the first one only."""
    model = graft.get_peft_model(net(), config())
    model.add_adapter("b", config())
    disturbed(model)
    assert shared(model, "b") == EXPECTED
    first, second = (model.base_model.model.layers[0]["up"].lily_B[a].weight for a in ("default", "b"))
    assert first is not second
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "b", "c")
    assert shared(model, "c") == EXPECTED
    fresh = graft.PeftModel.from_pretrained(net(), tmp_path / "b")
    assert shared(fresh, "default") == EXPECTED
    model.set_adapter("b")
    close(fresh(X), model(X), 0)
    model.set_adapter("c")
    close(fresh(X), model(X), 0)
    theirs = LIBS[1].get_peft_model(net(), config(LIBS[1]))
    theirs.add_adapter("b", config(LIBS[1]))
    assert shared(theirs, "b")["lily_B"] == [0, 1, 2, 3, 4]


def test_training_keeps_what_is_shared_shared():
    model = disturbed(graft.get_peft_model(net(), config())).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2 * (3 + 1 + 5)
    assert model.get_nb_trainable_parameters()[0] == graft.plan(net(), config()).trainable_parameters
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = model(X)
    before.square().sum().backward()
    optimizer.step()
    assert shared(model, "default") == EXPECTED and not torch.equal(model(X), before)


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "over another", "set_peft_model_state_dict"])
def test_a_file_whose_layers_do_not_share(tmp_path, way):
    """As PEFT writes of its second adapter. Its values differ from layer to layer, and so they stay."""
    peft = LIBS[1]
    theirs = peft.get_peft_model(net(), config(peft))
    theirs.add_adapter("b", config(peft))
    theirs.set_adapter("b")
    disturbed(theirs)
    expected = theirs(X)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if way == "from_pretrained":
            model = graft.PeftModel.from_pretrained(net(), tmp_path / "b")
        else:
            model = graft.get_peft_model(net(), config())
            if way == "load_adapter":
                model.load_adapter(tmp_path / "b", "b")
                model.set_adapter("b")
            elif way == "over another":
                model.load_adapter(tmp_path / "b", "default")
            else:
                graft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(theirs, adapter_name="b"))
    assert any("these stay apart" in str(w.message) for w in seen)
    close(model(X), expected)
    if way == "over another":  # and together again
        model.load_adapter(tmp_path, "default")
        assert shared(model, "default") == EXPECTED


def test_the_mixture_depends_on_the_whole_batch():
    """As in PEFT: p is the mean over all tokens. In a mixed batch, over those of the adapter's rows."""
    ours, theirs = (disturbed(lib.get_peft_model(net(), config(lib))) for lib in LIBS)
    theirs.load_state_dict(ours.state_dict())
    close(ours(X), theirs(X))
    assert not torch.allclose(ours(X)[:2], ours(X[:2]), atol=1e-4)
    mixed = ours(X, adapter_names=["default", "__base__", "default", "default", "__base__"])
    close(mixed[[0, 2, 3]], ours(X[[0, 2, 3]]))


@pytest.mark.differs("Lily: a layer that several entries of `target_modules` name")
def test_entries_that_name_one_layer():
    """The longest decides; in PEFT that depends on the order of a set of strings, which changes from run to run."""
    model = graft.get_peft_model(net(), config(target_modules=["up", "0.up", "layers.1.up"], stride_A=9))
    assert shared(model, "default")["lily_B"] == [0, 1, 2, 2, 2]
    model = graft.get_peft_model(net(), config(target_modules=r"layers\.\d\.(up|down)", stride_A=9))
    assert shared(model, "default")["lily_B"] == [0] * 5, "a regex is one entry; shapes differ"
