# SPDX-License-Identifier: Apache-2.0
"""Merging beside everything else that can be done meanwhile: switching, disabling, moving, computed weights, shards."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import graft
from graft.core.errors import UnsupportedLayerError
from graft.model import functional
from tests.core.test_layer import Net, X, adapted, config, same, weights
from tests.looks import merged


def said(record):
    return [str(w.message) for w in record]


# switching


def test_switching_to_what_is_active_takes_out_others_that_are_merged():
    model = adapted("x", "y")
    model.set_adapter("x")
    y = model(X)
    with pytest.warns(UserWarning, match="no effect"):
        model.merge_adapter(["y"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("x")
    assert not merged(model)
    assert_close(model(X), y)


def test_switching_without_a_wrapper_takes_out_others_that_are_merged():
    model = graft.inject_adapter_in_model(config(), Net().eval(), "x")
    graft.inject_adapter_in_model(config(), model, "y")
    functional.set_adapter(model, "x")
    y = model(X)
    model.one.merge(adapter_names=["y"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        functional.set_adapter(model, "x")
    assert not model.one.merged
    assert_close(model(X), y)


def test_what_is_active_and_merged_may_stay_so():
    model = adapted("x", "y")
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


@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_what_is_disabled_cannot_be_merged(method):
    model = adapted("x", method=method)
    base = weights(model)
    with model.disable_adapter():
        y = model(X)
        with pytest.raises(ValueError, match=r"\['x'\] into layer 'one' while adapters are disabled.*Enable"):
            model.merge_adapter()
        with pytest.raises(ValueError, match="while adapters are disabled"):
            model.base_model.model.one.merge()
        assert torch.equal(model(X), y) and same(weights(model), base)
    model.merge_adapter()
    assert merged(model) == ["x"]


def test_merging_for_good_works_while_disabled_and_keeps_what_was_trained():
    model = adapted("x", targets=["one"], modules_to_save=["two"])
    model.base_model.model.two.modules_to_save["x"].weight.data.mul_(2)
    y = model(X)
    model.base_model.disable_adapter_layers()
    assert not torch.allclose(model(X), y)
    assert_close(model.merge_and_unload()(X), y)


def test_unloading_while_disabled_keeps_what_was_trained():
    model = adapted("x", targets=["one"], modules_to_save=["two"])
    head = model.base_model.model.two.modules_to_save["x"]
    model.base_model.disable_adapter_layers()
    assert model.unload().two is head


# moving


@pytest.mark.parametrize("method", ["LORA", "IA3", "LOHA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_follows_the_model_to_another_device(method, dtype):
    model = adapted("x", method=method, base=Net().to(dtype).eval())
    model.merge_adapter()
    model.to("meta")  # the one other device there is everywhere
    model.unmerge_adapter()
    assert not merged(model)


def test_dora_under_a_merge_follows_the_model_to_another_device():
    model = adapted("x", "y", base=Net().bfloat16().eval(), use_dora=True)
    model.merge_adapter(["x"])
    model.to("meta")
    assert model.base_model.model.one.methods["y"].norm().is_meta


# weights that are computed

COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "prune": lambda m: prune.random_unstructured(m, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("method", ["LORA", "IA3", "LOHA"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_computed_weight_refuses_merging_before_anything_has_changed(how, method, safe):
    base = Net().eval()
    COMPUTED[how](base.two)
    model = adapted("x", method=method, base=base)
    y, before = model(X), {n: t.clone() for n, t in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"\['x'\] into layer 'two': its weight is computed.*remove"):
            merge(safe_merge=safe)
    assert same(dict(model.state_dict()), before) and torch.equal(model(X), y)


def test_a_computed_bias_refuses_what_would_shift_it():
    for bias in (False, True):
        base = Net().eval()
        parametrizations.weight_norm(base.one, "bias", dim=None)
        model = adapted("x", base=base, lora_bias=bias)
        if bias:
            with pytest.raises(NotImplementedError, match="layer 'one': its bias is computed"):
                model.merge_adapter()
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
    with pytest.raises(NotImplementedError, match="layer 'one': its weight is on the meta device"):
        model.merge_adapter()


# shards


@pytest.fixture
def mesh():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dora", [False, True])
def test_sharded_weights_merge(mesh, dora):
    from torch.distributed.fsdp import fully_shard

    model = adapted("x", use_dora=dora)
    y = model(X)
    for layer in (model.base_model.model.one, model.base_model.model.two):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert_close(model(X), y)
    weight = model.base_model.model.one.base_layer.weight
    before = weight.full_tensor().clone()
    with torch.no_grad():
        model.merge_adapter()
        assert not torch.equal(weight.full_tensor(), before)
        assert_close(model(X), y)
        model.unmerge_adapter()
        assert_close(weight.full_tensor(), before)
        assert_close(model(X), y)
