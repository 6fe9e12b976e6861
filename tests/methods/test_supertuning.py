# SPDX-License-Identifier: Apache-2.0
"""Super-Tuning: which entries train, files without their places, and the low-rank update beside them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.kernels import sparse
from tests import models
from tests.kernels import references
from tests.looks import layers
from tests.pair import LIBS, adapt, close, outcome, output, randomize
from tests.raised import refuses
from tests.samples import Sample, first


def config(lib, **options):
    return lib.SupertuningConfig(target_modules=["0"], **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(sparsity=1.0),
        dict(sparsity=-0.1),
        dict(lora_alpha=3.0),
        dict(r=0),
        dict(r=2, lora_dropout=1.0),
        dict(sparsity=0.9999),
    ],
)
@pytest.mark.parametrize("lib", LIBS)
def test_settings_that_cannot_be(lib, options):
    made = outcome(lambda: lib.get_peft_model(nn.Sequential(nn.Linear(9, 8)), config(lib, **options)))
    assert made.kind is ValueError


@pytest.mark.parametrize("top", [True, False])
def test_which_entries_train(top):
    found = []
    for lib in LIBS:
        torch.manual_seed(0)
        model = lib.get_peft_model(nn.Sequential(nn.Linear(18, 16)), config(lib, sparsity=0.9, select_top=top))
        found.append(model.base_model.model[0].supertuning_indices["default"])
    assert torch.equal(*found) and found[0].dtype == torch.int32 and len(found[0]) == 28
    W = model.base_model.model[0].base_layer.weight.detach().abs().flatten()
    chosen = torch.zeros(len(W), dtype=torch.bool).index_fill(0, found[0].long(), True)
    assert (W[chosen].min() >= W[~chosen].max()) if top else (W[chosen].max() <= W[~chosen].min())


def test_files_without_places(tmp_path):
    sample = first("SUPERTUNING", name="unsaved")
    for lib in LIBS:
        model = randomize(adapt(lib, sample), sample).eval()
        model.save_pretrained(tmp_path / lib.__name__)
        assert not any("indices" in name for name in lib.get_peft_model_state_dict(model))
        for reader in LIBS:
            loaded = reader.PeftModel.from_pretrained(models.make("mlp"), tmp_path / lib.__name__)
            close(output(loaded, sample), output(model, sample))


@pytest.mark.parametrize("lib", LIBS)
def test_all_adapters_save_places_or_none(lib):
    model = lib.get_peft_model(nn.Sequential(nn.Linear(18, 16)), config(lib))
    made = outcome(lambda: model.add_adapter("b", config(lib, save_precomputed_indices=False)))
    assert made.kind is ValueError and "must be saved for all adapters or none" in str(made.error)


@pytest.mark.differs("Super-Tuning on other layers than linear ones; beside a merged adapter")
def test_places_of_an_adapter_made_while_another_is_merged():
    sample = first("SUPERTUNING")
    model = randomize(adapt(graft, sample), sample)
    model.merge_adapter()
    model.add_adapter("b", sample.config(graft))
    for layer in layers(model).values():
        assert torch.equal(layer.supertuning_indices["b"], layer.supertuning_indices["default"])


@pytest.mark.parametrize("sparsity", [0.99, 0.8])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_with_few_entries(rows, sparsity, transposed):
    """By the entries alone or by full products: the same numbers."""
    torch.manual_seed(0)
    W = (torch.randn(50, 40).T if transposed else torch.randn(40, 50)).double()
    k = int(2000 * (1 - sparsity))
    places, values = torch.randperm(2000)[:k], torch.randn(k, dtype=torch.float64, requires_grad=True)
    x = torch.randn(rows, 50, dtype=torch.float64, requires_grad=True)
    g = torch.randn(rows, 40, dtype=torch.float64)
    delta = sparse.Scattered(values, places, (40, 50))
    expected = references.plain_linear_with(
        W, None, x, torch.zeros(2000).double().index_put((places,), values).view(W.shape)
    )
    call, back = nn.functional.linear, lambda g, W: g @ W
    found = [delta.linear_with(W, None, x, call, back)]
    part = delta.product(x)
    if part is not None:
        found.append(x @ W.T + part)
    wanted = torch.autograd.grad((expected * g).sum(), (x, values))
    for y in found:
        close(y, expected)
        for a, b in zip(torch.autograd.grad((y * g).sum(), (x, values)), wanted):
            close(a, b)


@pytest.mark.differs("places of SHiRA in a file that are outside of the weight")
@pytest.mark.parametrize("place", [-1, 10**6])
@pytest.mark.parametrize(
    "cfg, name",
    [
        (lambda: graft.ShiraConfig(r=1, target_modules=["0"]), "shira_indices"),
        (lambda: graft.FrodConfig(sparse_rate=0.1, target_modules=["0"]), r"frod_s_indices.0"),
        (lambda: graft.SupertuningConfig(sparsity=0.8, target_modules=["0"]), "supertuning_indices"),
        (lambda: graft.SvftConfig(target_modules=["0"]), "svft_places"),
        (lambda: graft.UniLoraConfig(target_modules=["0"], save_indices=True), "unilora_indices_B"),
    ],
)
def test_places_in_a_file_that_are_outside(cfg, name, place, tmp_path):
    """Of other methods as well."""
    model = graft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), cfg())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith(name))
    tensors[key].view(-1)[0] = place
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    text = f"{name} of layer '0' are outside"
    refuses(graft.CheckpointError, text, model.load_adapter, tmp_path, "default")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    refuses(graft.CheckpointError, text, graft.PeftModel.from_pretrained, nn.Sequential(nn.Linear(8, 8)), tmp_path)


def test_dropout_acts_on_the_low_rank_update_alone():
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(18, 16)), config(graft, sparsity=0.9, r=2, lora_dropout=0.5))
    layer, x = layers(model)["0"], torch.randn(4, 18)
    layer.supertuning_values["default"].data.normal_()
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    close(model.train()(x), expected)  # B is zero
    layer.supertuning_lora_B["default"].weight.data.normal_()
    assert not torch.allclose(model(x), model.eval()(x))


def test_low_rank_updates_of_other_layers():
    for name, target in (("embedding", "emb"), ("conv2d", "conv"), ("conv2d", "grouped"), ("conv1D", "c_fc")):
        sample = Sample("SUPERTUNING", "any", name, dict(target_modules=[target], sparsity=0.9, r=2, lora_alpha=3))
        model = randomize(adapt(graft, sample), sample).eval()
        expected = output(model, sample)
        model.merge_adapter()
        close(output(model, sample), expected)


@pytest.mark.parametrize("shape", [(256, 24), (3, 10), (5, 7), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_are_transposed_bit_for_bit(shape, dtype):
    block = torch.randn(shape).bfloat16()
    block.view(-1)[:3] = torch.tensor([float("nan"), -0.0, 1e-40])[: block.numel()]
    for x in (block, block[1:], block[:, 1:]):
        found, wanted = sparse.transpose_block(x, dtype), x.T.to(dtype).contiguous()
        assert found.dtype == dtype and found.is_contiguous()
        assert torch.equal(found.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8))


def test_an_order_is_kept_while_it_sorts():
    places, orders = torch.tensor([5, 1, 3]), []
    first = sparse.find_order(places, orders)
    assert first.tolist() == [1, 2, 0] and sparse.find_order(places + 2, orders) is first
    assert sparse.find_order(places.flip(0), orders).tolist() == [1, 0, 2] and orders[0] is not first
    assert sparse.find_order(places.sort().values, orders) is None


@pytest.mark.parametrize("r", [None, 2])
def test_a_layer_has_a_rank_only_with_factors(r):
    config = graft.SupertuningConfig(target_modules=["0"], r=r, sparsity=0.5)
    layer = graft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).base_model.model[0]
    assert hasattr(layer, "r") == (r is not None)
