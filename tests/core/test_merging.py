# SPDX-License-Identifier: Apache-2.0
"""Merging beside everything else that can be done meanwhile: switching, disabling, moving, computed weights, shards."""

import copy
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import graft
from graft.core import merging
from graft.core.effect import Rewrite, Update
from graft.core.errors import UnsupportedLayerError
from graft.methods.lora.lora import LoRA
from graft.model import functional
from tests.core.test_layer import Net, X, config, net_with, same, weights
from tests.leaves_out import FSDP2_ON_CPUS
from tests.looks import layers, merged
from tests.models import disturb, seeded
from tests.raised import refuses, warns


def said(record):
    return [str(w.message) for w in record]


# switching


def test_switching_to_what_is_active_takes_out_others_that_are_merged():
    model = net_with("x", "y")
    model.set_adapter("x")
    y = model(X)
    warns(UserWarning, "no effect", model.merge_adapter, ["y"])
    warns(UserWarning, "Unmerging the model first", model.set_adapter, "x")
    assert not merged(model)
    assert_close(model(X), y)


def test_switching_without_a_wrapper_takes_out_others_that_are_merged():
    model = graft.inject_adapter_in_model(config(), Net().eval(), "x")
    graft.inject_adapter_in_model(config(), model, "y")
    functional.set_adapter(model, "x")
    y = model(X)
    model.one.merge(adapter_names=["y"])
    warns(UserWarning, "Unmerging the model first", functional.set_adapter, model, "x")
    assert not model.one.merged
    assert_close(model(X), y)


@pytest.mark.differs("`set_adapter` of exactly the adapters that are active and merged")
def test_a_model_can_be_copied_after_a_merge_of_nothing():
    model = net_with("x")
    model.delete_adapter("x")
    model.merge_adapter()
    assert copy.deepcopy(model).peft_config == {}


def test_what_is_active_and_merged_may_stay_so():
    model = net_with("x", "y")
    model.base_model.set_adapter(["x", "y"])
    model.merge_adapter()
    y, before = model(X), weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.base_model.set_adapter(["x", "y"])
    assert merged(model) == ["x", "y"] and same(weights(model), before)
    assert_close(model(X), y)


def test_merging_says_who_falls_silent_and_only_that():
    model = graft.get_peft_model(Net().eval(), config(targets=["one"]), "x")
    model.add_adapter("y", config(targets=["two"]))
    model.set_adapter("x")
    y = model(X)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model.merge_adapter(["y"])
    assert not said(record), "no layer carries both"
    assert_close(model(X), y)
    model.unmerge_adapter()
    model.add_adapter("z", config())
    with pytest.warns(UserWarning, match=r"\['x'\] are not merged: in layers that carry z, they have no effect until"):
        model.merge_adapter(["z"])
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match=r"\['x'\] are not merged: the merged model is without them"):
        model.merge_and_unload(adapter_names=["y"])


# disabled


@pytest.mark.differs("merging while disabled")
@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_what_is_disabled_cannot_be_merged(method):
    model = net_with("x", method=method)
    base = weights(model)
    with model.disable_adapter():
        y = model(X)
        refuses(ValueError, r"\['x'\] into layer 'one' while adapters are disabled.*Enable", model.merge_adapter)
        refuses(ValueError, "while adapters are disabled", model.base_model.model.one.merge)
        assert torch.equal(model(X), y) and same(weights(model), base)
    model.merge_adapter()
    assert merged(model) == ["x"]


def test_merging_for_good_works_while_disabled_and_keeps_what_was_trained():
    model = net_with("x", targets=["one"], modules_to_save=["two"])
    model.base_model.model.two.modules_to_save["x"].weight.data.mul_(2)
    y = model(X)
    model.base_model.disable_adapter_layers()
    assert not torch.allclose(model(X), y)
    assert_close(model.merge_and_unload()(X), y)


def test_unloading_while_disabled_keeps_what_was_trained():
    model = net_with("x", targets=["one"], modules_to_save=["two"])
    head = model.base_model.model.two.modules_to_save["x"]
    model.base_model.disable_adapter_layers()
    assert model.unload().two is head


# moving


@pytest.mark.parametrize("method", ["LORA", "IA3", "LOHA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_follows_the_model_to_another_device(method, dtype):
    model = net_with("x", method=method, base=Net().to(dtype).eval())
    model.merge_adapter()
    model.to("meta")  # the one other device there is everywhere
    model.unmerge_adapter()
    assert not merged(model)


def test_dora_under_a_merge_follows_the_model_to_another_device():
    model = net_with("x", "y", base=Net().bfloat16().eval(), use_dora=True)
    model.merge_adapter(["x"])
    model.to("meta")
    assert model.base_model.model.one.methods["y"].factors().gain.is_meta


# half precision


class Words(nn.Module):
    """A model whose head may have the embedding's weight."""

    def __init__(self, tie):
        super().__init__()
        self.emb, self.lin, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        if tie:
            self.head.weight = self.emb.weight

    def get_input_embeddings(self):
        return self.emb

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.lin(self.emb(ids)))


def words(*others, tie, **options):
    with seeded(0):
        base = Words(tie).bfloat16().eval()
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["emb", "lin"], **options), "x")
    for name in others:
        model.add_adapter(name, graft.LoraConfig(r=2, target_modules=["emb", "lin"], use_dora=True))
    return disturb(model)


def test_tied_weights_in_half_precision_come_back_bit_for_bit():
    model, ids = words("y", tie=True), torch.arange(9)
    before, y = weights(model), model(ids)
    for names in (["x"], ["y"], ["x", "y"]):
        model.merge_adapter(names)
        model.unmerge_adapter()
        assert same(weights(model), before)
    assert torch.equal(model(ids), y)
    base = model.base_model.model
    assert base.emb.base_layer.weight is base.head.weight


def test_what_is_saved_of_a_base_in_half_precision_is_as_it_was(tmp_path):
    model = words(bias="all", tie=False)
    folders = tmp_path / "plain", tmp_path / "merged"
    for folder in folders:
        if folder.name == "merged":
            model.merge_adapter(["x"])
        model.save_pretrained(folder, save_embedding_layers=True)
    plain, merged_one = (load_file(next(folder.rglob("*.safetensors"))) for folder in folders)
    assert any(".emb." in key and "lora" not in key for key in plain)
    assert same(merged_one, plain)


def test_a_later_merge_needs_no_copy_of_its_own():
    model = net_with("x", "y", base=Net().bfloat16().eval())
    model.merge_adapter(["x"])
    model.merge_adapter(["y"])
    kept = [kept for _, kept, _ in model.base_model.model.one.state.undo]
    assert [t is not None for t in kept] == [True, False]


# errors on the way


@pytest.mark.parametrize("make", ["LoRA with DoRA", "HRA"])
@pytest.mark.parametrize("after", [False, True], ids=["before it writes", "after it has written"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_on_one_layer_leaves_all_as_they_were(make, after, dtype, monkeypatch):
    """On the second, which has another adapter merged that has to come out first."""
    with seeded(0):
        base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(dtype)
        model = graft.get_peft_model(base, ORDERED[make](["0", "1"]), "a").eval()
        model.add_adapter("b", ORDERED[make](["0", "1"]))
        disturb(model)
        x = torch.randn(4, 6).to(dtype)
    model.base_model.set_adapter(["a", "b"])
    y, base = model(x), weights(model)
    warns(UserWarning, "no effect", model.merge_adapter, ["b"])
    before, write = model(x), merging._write_merge

    def fails(layer, names, *args):
        if layer.site.key != "1" or names != ["b", "a"]:
            return write(layer, names, *args)
        if after:
            write(layer, names, *args)
        raise MemoryError("no room")

    monkeypatch.setattr(merging, "_write_merge", fails)
    with pytest.warns(UserWarning, match="additionally"), pytest.raises(MemoryError):
        model.merge_adapter(["a"])
    assert merged(model) == ["b"] and all(layer.merged_adapters == ["b"] for layer in layers(model).values())
    assert torch.equal(model(x), before)
    model.unmerge_adapter()
    assert same(weights(model), base) and torch.equal(model(x), y)


@torch.no_grad()
def test_a_weight_that_cannot_be_written_notes_no_merge():
    model = net_with("x")
    layer = layers(model)["two"]
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight[:, :1].expand(-1, 8))  # one number in many places
    before, y = weights(model), model(X)
    refuses(RuntimeError, "single memory location", model.merge_adapter)
    assert not merged(model) and not any(layer.state.undo for layer in layers(model).values())
    assert torch.equal(layer.W0, layer.base_layer.weight)
    assert_close(model(X), y)
    for name, t in weights(model).items():
        assert_close(t, before[name])


# weights that are computed

COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "prune": lambda m: prune.random_unstructured(m, "weight", amount=0.5),
}


@pytest.mark.differs("merging into a computed weight (`weight_norm`, a parametrization, pruning)")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("method", ["LORA", "IA3", "LOHA"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_computed_weight_refuses_merging_before_anything_has_changed(how, method, safe):
    base = Net().eval()
    COMPUTED[how](base.two)
    model = net_with("x", method=method, base=base)
    y, before = model(X), {n: t.clone() for n, t in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"\['x'\] into layer 'two': its weight is computed.*remove"):
            merge(safe_merge=safe)
    assert same(dict(model.state_dict()), before) and torch.equal(model(X), y)


def test_a_computed_bias_refuses_what_would_shift_it():
    for bias in (False, True):
        base = Net().eval()
        parametrizations.weight_norm(base.one, "bias", dim=None)
        model = net_with("x", base=base, lora_bias=bias)
        if bias:
            refuses(NotImplementedError, "layer 'one': its bias is computed", model.merge_adapter)
        else:
            y = model(X)
            model.merge_adapter()
            assert_close(model(X), y)


def test_an_initialisation_that_changes_the_base_refuses_a_computed_weight():
    base = Net()
    parametrizations.weight_norm(base.two)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    with pytest.raises(UnsupportedLayerError, match="layer 'two', which it would change: its weight is computed"):
        graft.get_peft_model(base, config(init_lora_weights="pissa"))
    assert same(dict(base.state_dict()), before) and type(base.one) is nn.Linear


def test_a_weight_that_is_nowhere_refuses_merging():
    model = graft.get_peft_model(Net().to("meta"), config(), "x")
    refuses(NotImplementedError, "layer 'one': its weight is on the meta device", model.merge_adapter)


# shards


@pytest.fixture
def mesh():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@FSDP2_ON_CPUS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_sharded_weights_merge(mesh, dora, dtype):
    from torch.distributed.fsdp import fully_shard

    model = net_with("x", use_dora=dora, base=Net().to(dtype).eval())
    x = X.to(dtype)
    close = partial(assert_close, **(dict(rtol=0.05, atol=0.05) if dtype is torch.bfloat16 else {}))
    y = model(x)
    for layer in (model.base_model.model.one, model.base_model.model.two):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    close(model(x), y)
    weight = model.base_model.model.one.base_layer.weight
    before = weight.full_tensor().clone()
    with torch.no_grad():
        model.merge_adapter()
        assert not torch.equal(weight.full_tensor(), before)
        close(model(x), y)
        model.unmerge_adapter()
        assert torch.equal(weight.full_tensor(), before)
        close(model(x), y)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_takes_what_is_active_on_each_layer(merge):
    """Callers may have set layers' adapters themselves; `two` goes on with what the model has active."""
    model = net_with("x", "y")
    model.base_model.model.one.set_adapter(["x", "y"])
    y = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = getattr(model, merge)() or model
    assert_close(plain(X), y)


def test_merging_goes_on_with_layers_that_are_not_merged_yet():
    model = net_with("x")
    y = model(X)
    model.base_model.model.one.merge()
    warns(UserWarning, "Already", model.merge_adapter)
    assert merged(model) == ["x"] and model.base_model.model.two.merged
    assert_close(model(X), y)


# the order of adapters that do more than add


ORDERED = {
    "LoRA with DoRA": lambda targets=("0",): graft.LoraConfig(r=2, target_modules=[*targets], use_dora=True),
    "OFT": lambda: graft.OFTConfig(r=0, oft_block_size=3, target_modules=["0"]),
    "HRA": lambda targets=("0",): graft.HRAConfig(r=2, target_modules=[*targets]),
}


@pytest.mark.differs("active [a, b] that do more than add, merged b, then a")
@pytest.mark.parametrize("make", ORDERED.values(), ids=ORDERED)
@pytest.mark.parametrize("steps", [["b", "a"], [["b", "a"]], ["c", "b", "a"]], ids=str)
def test_merging_keeps_the_order_of_the_forward_pass(make, steps):
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), make(), "a").eval()
        for name in ("b", "c"):
            model.add_adapter(name, make())
        for n, p in model.named_parameters():
            if "base_layer" not in n:
                p.data.add_(torch.randn_like(p))
        x = torch.randn(4, 6)
    active = ["a", "b", "c"] if "c" in steps else ["a", "b"]
    model.base_model.set_adapter(active)
    y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for names in steps:
            model.merge_adapter([names] if isinstance(names, str) else names)
    assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_close(model(x), y, rtol=1e-4, atol=1e-4)


# embeddings that shrink the rows they look up


SHRUNK = {
    "LoRA": lambda: graft.LoraConfig(r=2, target_modules=["0"]),
    "OFT": lambda: graft.OFTConfig(r=0, oft_block_size=2, target_modules=["0"]),
    "LoHa": lambda: graft.LoHaConfig(r=2, target_modules=["0"]),
}


def shrunk(config, name="a"):
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(nn.Embedding(8, 6, max_norm=0.5)), config, name).eval()
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p))
    return model


@pytest.mark.differs("merging on an embedding with `max_norm`")
@pytest.mark.parametrize("make", SHRUNK.values(), ids=SHRUNK)
def test_an_embedding_with_a_largest_norm_does_not_take_up_what_acts_behind_it(make):
    model, ids = shrunk(make()), torch.arange(8)
    y = model(ids)
    for merge in (model.merge_adapter, model.merge_and_unload, partial(model.merge_and_unload, dequantize=True)):
        refuses(NotImplementedError, r"'0': .*max_norm=0\.5.*Keep them unmerged, or unload", merge)
    assert torch.equal(model(ids), y)


@pytest.mark.parametrize(
    "config", [graft.TrainableTokensConfig(target_modules=["0"], token_indices=[1, 2]), ORDERED["HRA"]()], ids=str
)
def test_an_embedding_with_a_largest_norm_takes_up_other_rows(config):
    model, ids = shrunk(config), torch.arange(8)
    y = model(ids)
    assert_close(model.merge_and_unload()(ids), y)


# a bias where there is none


@pytest.mark.parametrize("by", ["fold", "delta"])
def test_an_adapter_that_makes_a_bias_is_refused_before_any_layer_is_written(by, monkeypatch):
    class Shifting(LoRA):
        def shift(self):
            return self.lora_B.weight[:, 0] + 1

        def fold(self, W, b):
            return W * 2, self.shift() if b is None else b + self.shift()

        def describe(self):
            return Rewrite(self.fold) if by == "fold" else Update(lambda: torch.ones(6, 6), bias=self.shift)

    monkeypatch.setattr(LoRA, "variant", classmethod(lambda cls, cfg: Shifting))
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["0", "1", "2", "3"], r=2), "a").eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        refuses(NotImplementedError, r"'a'.*layer '2': they shift the bias, and it has none", merge)
    assert not merged(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.differs("a forward pass of LoRA on an embedding with `max_norm`")
@pytest.mark.parametrize("name", ["LORA", "LOHA", "LOKR"])
@pytest.mark.parametrize("training", [False, True])
def test_max_norm_shrinks_the_rows_of_the_weight_alone(name, training):
    make = graft.PEFT_TYPE_TO_CONFIG_MAPPING[name]
    start = "init_lora_weights" if name == "LORA" else "init_weights"
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(8, 6, max_norm=0.5))
    model = graft.get_peft_model(base, make(target_modules=["0"], r=4, **{start: False}), "a").train(training)
    layer, ids = model.base_model.model[0], torch.arange(8)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if "base_layer" not in key}
    y = model(ids)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)
    assert_close(y, layer.base_layer(ids) + layer.get_delta_weight("a"), rtol=1e-5, atol=1e-5)
    y.sum().backward()


def test_a_write_past_the_checks_refuses_a_shift_of_a_missing_bias():
    with pytest.warns(UserWarning, match="no bias"):
        model = graft.get_peft_model(nn.Sequential(nn.Linear(3, 2, bias=False)), graft.BeftConfig(target_modules=["0"]))
    layer = layers(model)["0"]
    with pytest.raises(NotImplementedError, match=r"'default'.*layer '0': they shift the bias, and it has none"):
        layer.merge_checked(["default"], True)
    assert not layer.state.merged and not layer.state.undo and layer.base_layer.bias is None
