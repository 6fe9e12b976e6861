# SPDX-License-Identifier: Apache-2.0
"""Tensors that all layers of a model share (VeRA's projections): held once, by all adapters, in every copy."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.looks import layers
from tests.models import adapted, seeded
from tests.pair import LIBS

X = torch.linspace(-1, 1, 12).view(2, 6)


class Net(nn.Module):
    """Layers of different widths."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.last = nn.Linear(6, 4), nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.wide(torch.tanh(self.narrow(x)))))


def config(**options):
    return graft.VeraConfig(**{"target_modules": ["narrow", "wide", "last"], "r": 3, **options})


def net_with(*names, **options):
    return adapted(Net, dict.fromkeys(names, config(**options)), seed=0)


def projections(model):
    return model.base_model.vera_A, model.base_model.vera_B


def test_they_are_as_large_as_the_widest_layer_and_held_once():
    model = net_with("a", "b")
    A, B = projections(model)
    assert A["a"].shape == (3, 9) and B["a"].shape == (9, 3)
    assert A["a"].data_ptr() == A["b"].data_ptr()
    for layer in layers(model).values():
        assert layer.vera_A is A and layer.vera_B is B
    assert not any("vera_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_shares_its_own(how):
    model = net_with("a", "b")
    other = how(model)
    A, _ = projections(other)
    assert all(layer.vera_A is A for layer in layers(other).values())
    assert A is not projections(model)[0] and A["a"].data_ptr() == A["b"].data_ptr()
    assert torch.equal(other(X), model(X))


def test_they_move_together():
    model = net_with("a").double()
    A, B = projections(model)
    assert A["a"].dtype == B["a"].dtype == torch.float64
    assert model(X.double()).dtype == torch.float64


def test_an_adapter_outlives_the_one_that_came_before():
    model = net_with("a", "b")
    model.set_adapter("b")
    expected = model(X)
    model.delete_adapter("a")
    assert list(projections(model)[0]) == ["b"] and torch.equal(model(X), expected)
    model.add_adapter("c", config())
    assert projections(model)[0]["c"].data_ptr() == projections(model)[0]["b"].data_ptr()


def test_they_are_saved_once_and_loaded(tmp_path):
    model = net_with("a", "b")
    model.save_pretrained(tmp_path)
    keys = set(graft.load_peft_weights(tmp_path / "b"))
    assert {"base_model.vera_A", "base_model.vera_B"} <= keys and len(keys) == 2 + 3 * 2
    loaded = graft.PeftModel.from_pretrained(copy.deepcopy(net_with("a").unload()), tmp_path / "b", "b")
    model.set_adapter("b")
    assert torch.equal(loaded(X), model(X))
    loaded.load_adapter(tmp_path / "a", "a")
    assert all(held["a"] is held["b"] for held in projections(loaded)), "held once"
    loaded.set_adapter("a")
    model.set_adapter("a")
    assert torch.equal(loaded(X), model(X))


SHARING = {
    "vera_A": lambda lib: lib.VeraConfig(target_modules=["narrow", "wide"], r=3),
    "randlora_A": lambda lib: lib.RandLoraConfig(target_modules=["narrow", "wide"], r=3),
    "frod_V": lambda lib: lib.FrodConfig(target_modules=["narrow", "wide"]),
}


@pytest.mark.differs(
    "loading an adapter of VeRA, RandLoRA or FRoD whose file has other shared tensors than an adapter that is there"
)
@pytest.mark.parametrize("name", SHARING)
def test_a_file_with_others_leaves_those_of_other_adapters_alone(name, tmp_path):
    unchanged = []
    for lib in LIBS:
        with seeded(0):
            base = Net().eval()
            model = lib.get_peft_model(copy.deepcopy(base), SHARING[name](lib), "a").eval()
            for p in model.parameters():
                p.data = torch.randn_like(p) if p.requires_grad else p
        other = copy.deepcopy(model)
        for key, buffer in other.named_buffers():
            if name in key.split("."):
                buffer.data.mul_(torch.linspace(0.5, 1.5, buffer.shape[-1]))  # RandLoRA takes a common factor out
        other.save_pretrained(tmp_path / lib.__name__)
        before = model(X)
        model.load_adapter(tmp_path / lib.__name__ / "a", "b")
        unchanged.append(torch.equal(model(X), before))
        model.set_adapter("b")
        assert_close(model(X), lib.PeftModel.from_pretrained(base, tmp_path / lib.__name__ / "a")(X))
    assert unchanged == [True, False]


def test_unsaved_they_are_drawn_again(tmp_path):
    model = net_with("a", save_projection=False)
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    assert not any("vera_A" in key for key in graft.load_peft_weights(tmp_path / "a"))
    loaded = graft.PeftModel.from_pretrained(net_with("a").unload(), tmp_path / "a")
    assert torch.equal(loaded(X), model(X))


@pytest.mark.differs("VeRA, PVeRA adapters of a smaller `r` beside a larger one")
def test_a_second_adapter_must_fit_them():
    model = net_with("a", target_modules=["narrow"])
    before = set(model.state_dict())
    with pytest.raises(graft.ConfigError, match=r"vera_A has a size of 6 but 9 or greater is required"):
        model.add_adapter("wide", config())
    for changes in (dict(projection_prng_key=1), dict(r=4), dict(save_projection=False)):
        with pytest.raises(graft.ConfigError, match=f"{next(iter(changes))} is .*adapter 'a'"):
            model.add_adapter("other", config(target_modules=["narrow"], **changes))
    assert list(model.peft_config) == ["a"] and set(model.state_dict()) == before
    model.add_adapter("narrow", config(target_modules=["narrow"]))


@pytest.mark.differs("RandLoRA by `inject_adapter_in_model`")
def test_without_a_wrapper_there_is_no_place_for_them():
    net = Net()
    with pytest.raises(ValueError, match="shared state stored on the tuner"):
        graft.inject_adapter_in_model(config(), net)
    assert type(net.narrow) is nn.Linear


def test_merging_and_unloading_leaves_none_behind():
    model = net_with("a")
    expected = model(X)
    plain = model.merge_and_unload()
    assert set(plain.state_dict()) == set(Net().state_dict())
    assert_close(plain(X), expected, rtol=1e-5, atol=1e-5)
