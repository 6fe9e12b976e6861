# SPDX-License-Identifier: Apache-2.0
"""AdaMSS: clusters of rows in files, the bias, and the choice of the subspaces that train."""

import copy
import pickle
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.methods.adamss import Allocator
from tests import models
from tests.looks import get_registry
from tests.models import seeded
from tests.pair import LIBS, adapt, close, output, randomize
from tests.raised import refuses, warns
from tests.samples import first

pytest.importorskip("sklearn")
SAMPLE = first("ADAMSS")
FILE = "adapter_model.safetensors"
ASA = dict(r=7, num_subspaces=4, subspace_rank=2, use_asa=True, asa_target_subspaces=3)


def small(lib, **config):
    with seeded(0):
        base = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 12, bias=False))
        model = lib.get_peft_model(base, lib.AdamssConfig(target_modules=["0", "1"], **{**ASA, **config}))
        for name, p in model.named_parameters():
            if "adamss_" in name:
                p.data.normal_()
    return model


def spaces(model):
    """The matrices A of all subspaces."""
    return [p for name, p in model.named_parameters() if "adamss_A" in name]


def train(model, steps, seed=7):
    """Random gradients; return how many subspaces train after each step, and which."""
    g, seen = torch.Generator().manual_seed(seed), []
    for step in steps:
        for name, p in model.named_parameters():
            if "adamss_" in name:
                grad = torch.randn(p.shape, generator=g)
                p.grad = grad if p.requires_grad else None
        model.base_model.update_and_allocate(step)
        seen.append([p.requires_grad for p in spaces(model)])
    return seen


@pytest.mark.differs("AdaMSS: how many subspaces train after a choice (`use_asa`)")
def test_the_choice_is_that_of_peft_but_for_one():
    """PEFT's threshold is itself a score, so that the last of the k does not train."""
    config = dict(init_warmup=2, final_warmup=8, mask_interval=6)
    ours, theirs = (train(small(lib, **config), range(9)) for lib in LIBS)
    assert ours[:6] == theirs[:6] and all(all(mask) for mask in ours[:6])
    assert sum(ours[-1]) == sum(theirs[-1]) + 1
    assert all(a or not b for a, b in zip(ours[-1], theirs[-1])), "all that PEFT keeps"


@pytest.mark.parametrize("exponent", [1.0, 3.0])
def test_the_number_falls_to_the_target(exponent):
    model = small(graft, init_warmup=0, final_warmup=10, mask_interval=1, asa_schedule_exponent=exponent)
    numbers = [sum(mask) for mask in train(model, range(14))]
    assert numbers[0] == 8 and numbers == sorted(numbers, reverse=True) and numbers[10:] == [3] * 4
    assert numbers[5] == (5 if exponent == 1 else 3)


def test_equal_scores_freeze_nobody_more_than_the_budget():
    """With B = 0 all scores are 0: PEFT freezes everything."""
    frozen = []
    for lib in LIBS:
        model = small(lib, init_warmup=0, final_warmup=4, mask_interval=4)
        for name, p in model.named_parameters():
            if "adamss_" in name:
                p.data.zero_()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.base_model.update_and_allocate(4)
        frozen.append([p.requires_grad for p in spaces(model)].count(True))
    assert frozen == [3, 0]


@pytest.mark.differs("AdaMSS: `set_adapter` after a choice")
def test_switching_adapters_does_not_let_pruned_subspaces_train():
    counts = []
    for lib in LIBS:
        model = small(lib, init_warmup=0, final_warmup=4, mask_interval=4)
        train(model, range(5))
        model.add_adapter("b", lib.AdamssConfig(target_modules=["0", "1"], r=7))
        model.set_adapter("b")
        model.set_adapter("default")
        counts.append(sum(p.requires_grad for n, p in model.named_parameters() if "adamss_A.default" in n))
    assert counts == [3, 8]


@pytest.mark.differs("AdaMSS: `update_and_allocate` without gradients")
def test_gradients_must_be_there():
    model = small(graft, init_warmup=0)
    with pytest.raises(ValueError, match=r"update_and_allocate\(3\): AdaMSS adapter 'default' has no gradients"):
        model.base_model.update_and_allocate(3)
    small(graft, use_asa=False).base_model.update_and_allocate(3)


def test_the_callback_calls_it():
    from graft.train.callbacks import AdamssAsaCallback

    callback, state = AdamssAsaCallback(), SimpleNamespace(global_step=4)
    assert pickle.loads(pickle.dumps(callback)).__class__ is type(callback)
    model = small(graft, init_warmup=0, final_warmup=4, mask_interval=4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    callback.on_optimizer_step(None, state, None, model=model)
    assert sum(p.requires_grad for p in spaces(model)) == 3
    callback.on_optimizer_step(None, state, None, model=nn.Linear(2, 2))  # not graft's: nothing to do


@pytest.mark.differs("AdaMSS: which rows are in which cluster")
def test_rows_in_the_file_count(tmp_path, monkeypatch):
    """Other versions of scikit-learn may find other clusters; PEFT's files do not say which there were."""
    model = randomize(adapt(graft, SAMPLE), SAMPLE).eval()
    model.save_pretrained(tmp_path)
    from graft.methods import adamss

    real = adamss.find_clusters

    def permuted(*args):
        space, rows, *factors = real(*args)
        return space, rows.flip(0), *factors

    monkeypatch.setattr("graft.methods.adamss.find_clusters", permuted)
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
    close(output(loaded, SAMPLE), output(model, SAMPLE), 0)
    without = {k: t for k, t in load_file(tmp_path / FILE).items() if "adamss_clusters" not in k}
    (tmp_path / "peft").mkdir()
    save_file(without, tmp_path / "peft" / FILE, metadata={"format": "pt"})
    (tmp_path / "peft/adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    monkeypatch.undo()
    for lib in (graft, peft):
        close(
            output(lib.PeftModel.from_pretrained(models.make("mlp"), tmp_path / "peft"), SAMPLE), output(model, SAMPLE)
        )


def test_clusters_that_k_means_has_not_settled_are_those_of_peft():
    """Here it stops after 10 iterations; four more would move six rows."""
    with seeded(0):
        W = torch.randn(200, 20)
    sizes = []
    for lib in LIBS:
        base = nn.Sequential(nn.Linear(20, 200, bias=False))
        base[0].weight.data.copy_(W)
        model = lib.get_peft_model(base, lib.AdamssConfig(target_modules=["0"], r=8, num_subspaces=8))
        sizes.append([p.shape for p in model.base_model.model[0].adamss_B["default"]])
    assert sizes[0] == sizes[1]


def other_base():
    base = models.make("mlp")
    with torch.no_grad():
        base.lin0.weight.copy_(torch.randn(base.lin0.weight.shape, generator=torch.Generator().manual_seed(9)))
    return base


def test_a_file_of_peft_for_other_clusters_is_refused(tmp_path):
    """PEFT takes tensors of any shape in, for rows of whatever cluster is found now."""
    randomize(adapt(peft, SAMPLE), SAMPLE).save_pretrained(tmp_path)
    with pytest.raises(graft.AdapterKeyError, match=r"size mismatch for .*adamss_B"):
        graft.PeftModel.from_pretrained(other_base(), tmp_path)


@pytest.mark.differs("AdaMSS: a file for clusters of other sizes")
def test_clusters_of_other_sizes_come_with_their_file(tmp_path):
    """Another device, or another scikit-learn, may find them."""
    model = randomize(adapt(graft, SAMPLE, base=other_base()), SAMPLE).eval()
    model.save_pretrained(tmp_path)
    loaded = warns(graft.PeftWarning, "other weights", graft.PeftModel.from_pretrained, models.make("mlp"), tmp_path)
    mine, theirs = loaded.base_model.model.lin0, model.base_model.model.lin0
    assert [p.shape for p in mine.adamss_B["default"]] == [p.shape for p in theirs.adamss_B["default"]]
    mine.base_layer.load_state_dict(theirs.base_layer.state_dict())
    close(output(loaded, SAMPLE), output(model, SAMPLE), 0)
    file = tmp_path / FILE
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("lin0.adamss_clusters"))
    save_file(tensors | {key: tensors[key].clone().fill_(0)}, file, metadata={"format": "pt"})
    refuses(graft.AdapterKeyError, "size mismatch", graft.PeftModel.from_pretrained, models.make("mlp"), tmp_path)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_subspaces_of_a_file_train_only_if_the_adapter_does(is_trainable, tmp_path):
    """A load makes new parameters for the clusters of the file."""
    small(graft).save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 12, bias=False))
    model = graft.PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)
    assert {p.requires_grad for p in spaces(model)} == {is_trainable}


def test_the_bias_is_shifted_and_comes_back():
    model = small(graft, use_asa=False).eval()
    x, layer = torch.randn(3, 10), model.base_model.model[0]
    expected, bias = model(x), layer.base_layer.bias.clone()
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.bias, bias)
    close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    refuses(ImportError, r"pip install scikit-learn", adapt, graft, SAMPLE)


def test_init_weights_false_means_none():
    assert graft.AdamssConfig(init_weights=False).init_weights is None
    for bad in (
        dict(init_weights=True),
        dict(use_asa=True, mask_interval=0),
        dict(use_asa=True, init_warmup=9, final_warmup=9),
    ):
        for lib in LIBS:
            refuses(ValueError, None, lib.AdamssConfig, **bad)


@pytest.mark.differs("AdaMSS after `.to(dtype)`, or with autocast")
@pytest.mark.parametrize("autocast, dtype", [(False, torch.float16), (True, torch.float32)])
def test_the_dtype_of_a_loaded_adapter(autocast, dtype, tmp_path):
    base, options = nn.Sequential(nn.Linear(10, 20)).half(), dict(autocast_adapter_dtype=autocast)
    config = graft.AdamssConfig(target_modules=["0"])
    graft.get_peft_model(copy.deepcopy(base), config, **options).save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(base, tmp_path, **options)
    assert {p.dtype for n, p in loaded.named_parameters() if "adamss_" in n} == {dtype}


def test_a_rank_above_the_inputs_is_cut_to_them():
    model = graft.get_peft_model(
        nn.Sequential(nn.Linear(4, 12, bias=False)),
        graft.AdamssConfig(target_modules=["0"], r=9, num_subspaces=2, subspace_rank=1),
    )
    shapes = {tuple(b.shape) for name, b in model.named_buffers() if "newB" in name}
    shapes |= {tuple(p.shape) for name, p in model.named_parameters() if "newB" in name}
    assert shapes == {(4, 4)}


def test_each_choice_begins_a_new_measure_of_importance():
    model = small(graft, init_warmup=0, final_warmup=8, mask_interval=4)
    states = get_registry(model).states
    train(model, [1])
    first = states["default"]
    train(model, [2])
    assert states["default"] is first
    train(model, [4])
    assert vars(states["default"]) == vars(Allocator(first.beta1, first.beta2)) != vars(first)


def test_an_adapter_without_layers_has_nothing_to_choose():
    """As on a stage of a pipeline without its targets."""
    model = small(graft, init_warmup=0, final_warmup=8, mask_interval=4)
    get_registry(model).layers.clear()
    train(model, range(9))
    assert not get_registry(model).states
