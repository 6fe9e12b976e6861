# SPDX-License-Identifier: Apache-2.0
"""BOFT: butterfly factors, which PEFT computes on CUDA alone, and blocks that do not fit."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.kernels.orthogonal import butterfly, butterfly_order
from tests import models
from tests.looks import layers
from tests.pair import LIBS, close, outcome


@pytest.mark.parametrize("blocks, size", [(4, 2), (8, 4), (8, 2)])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_orders_are_permutations(blocks, size, level):
    order = butterfly_order(blocks * size, size, level)
    assert sorted(order.tolist()) == list(range(blocks * size))
    if level == 0:
        assert order.tolist() == list(range(blocks * size))


def dense(R, orders):
    """R_F … R_1 as one matrix."""
    n = R.shape[1] * R.shape[2]
    out = torch.eye(n, dtype=R.dtype)
    for blocks, (order, _) in zip(R, orders):
        P = torch.eye(n, dtype=R.dtype)[order].T  # x P takes the channels in this order
        out = P @ torch.block_diag(*blocks) @ P.T @ out
    return out


@pytest.mark.parametrize("transpose", [False, True])
def test_factors_act_as_their_matrices(transpose):
    torch.manual_seed(0)
    R = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    orders = torch.stack([torch.stack((o, o.argsort())) for o in (butterfly_order(16, 4, level) for level in range(3))])
    x, M = torch.randn(5, 16, dtype=torch.float64), dense(R, orders)
    close(butterfly(x, R, orders, transpose), x @ (M.T if transpose else M))


def config(lib, **options):
    return lib.BOFTConfig(target_modules=["0"], **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(boft_block_size=5),
        dict(boft_block_size=0, boft_block_num=5),
        dict(boft_block_size=0, boft_block_num=3, boft_n_butterfly_factor=2),
        dict(boft_block_size=3, boft_n_butterfly_factor=2),
        dict(boft_block_size=4, boft_n_butterfly_factor=4),
    ],
)
def test_blocks_that_do_not_fit(options):
    with pytest.raises(graft.ConfigError, match="layer '0'"):
        graft.get_peft_model(nn.Sequential(nn.Linear(24, 3)), config(graft, **options))


@pytest.mark.parametrize("options", [dict(boft_block_size=0), dict(boft_block_size=4, boft_block_num=2)])
def test_settings_that_contradict(options):
    for lib in LIBS:
        made = outcome(lambda lib=lib: lib.get_peft_model(nn.Sequential(nn.Linear(24, 3)), config(lib, **options)))
        assert made.kind is ValueError


@pytest.mark.differs("`boft_n_butterfly_factor=0`")
def test_no_factor():
    with pytest.raises(graft.ConfigError, match="boft_n_butterfly_factor"):
        config(graft, boft_n_butterfly_factor=0)


class Extension:
    """In place of PEFT's extension for CUDA."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize("factor, size", [(2, 2), (3, 2), (2, 4), (2, 16), (3, 8), (4, 4)])
def test_factors_are_pefts(factor, size, monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: Extension)
    outputs = []
    for lib in LIBS:
        torch.manual_seed(0)
        options = dict(boft_block_size=size, boft_n_butterfly_factor=factor)
        model = lib.get_peft_model(nn.Sequential(nn.Linear(32, 6)), config(lib, **options)).eval()
        layer = model.base_model.model[0]
        with torch.no_grad():
            for p in (layer.boft_R["default"], layer.boft_s["default"]):
                p.copy_(torch.linspace(-1, 1.5, p.numel()).cos().view(p.shape))
            outputs.append(model(torch.linspace(-1, 1, 64).view(2, 32)))
    close(*outputs)


def test_files_that_hold_permutations(tmp_path):
    """PEFT wrote them until 0.12; the config tells them as well."""
    make = lambda: nn.Sequential(nn.Linear(16, 6))
    torch.manual_seed(0)
    base = make()
    model = graft.get_peft_model(copy.deepcopy(base), config(graft, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.0.boft_P": torch.eye(16)[None]}, path)
    loaded = graft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(3, 16)
    close(loaded(x), model(x))
    report = loaded.load_adapter(tmp_path, "again")
    assert not report.unexpected_keys and not report.missing_keys


@pytest.mark.differs("BOFT with several butterfly factors")
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_several_factors(factor, tmp_path):
    """PEFT has them on CUDA with a compiler; elsewhere it falls back to one factor, and such files fail to load."""
    options = dict(boft_block_size=2, boft_n_butterfly_factor=factor)
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(16, 6)), config(graft, **options))
    layer, x = layers(model)["0"], torch.randn(4, 16)
    close(model(x), layer.base_layer(x))
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape), alpha=0.4)
    R = torch.eye(16)
    B = layer.boft_R["default"].detach()
    assert B.shape == (factor, 8, 2, 2)
    S = (B - B.mT) / 2
    blocks = torch.linalg.solve(torch.eye(2) + S, torch.eye(2) - S, left=False)
    orders = [torch.stack((o, o.argsort())) for o in (butterfly_order(16, 2, level) for level in range(factor))]
    R = dense(blocks, orders)
    close(R @ R.T, torch.eye(16))
    expected = (x @ R @ layer.base_layer.weight.T) * layer.boft_s["default"].flatten() + layer.base_layer.bias
    close(model(x), expected)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = graft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(16, 6)), tmp_path)
    close(loaded(x), expected)
    model.merge_adapter()
    close(model(x), expected)


@pytest.mark.differs("BOFT adapters of different blocks on one layer")
def test_adapters_of_other_blocks_on_one_layer():
    """In PEFT the permutation of the last one serves all."""
    torch.manual_seed(0)
    model = graft.get_peft_model(
        nn.Sequential(nn.Linear(16, 6)), config(graft, boft_block_size=2, boft_n_butterfly_factor=2)
    )
    layer, x = layers(model)["0"], torch.randn(4, 16)
    layer.boft_R["default"].data.normal_()
    expected = model(x)
    model.add_adapter("b", config(graft, boft_block_size=4, boft_n_butterfly_factor=2))
    close(model(x), expected)


def test_dropout_replaces_blocks_of_one_factor():
    torch.manual_seed(0)
    options = dict(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.5)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(16, 6)), config(graft, **options)).train()
    layer = layers(model)["0"]
    layer.boft_R["default"].data.normal_()
    method, eye = layer.methods["default"], torch.eye(2)
    seen = set()
    for _ in range(20):
        still = (method.R() == eye).all((-1, -2))
        assert sorted(still.sum(1).tolist()) == [0, 4]
        seen.add(int(still.sum(1).argmax()))
    assert seen == {0, 1}
    model.eval()
    assert not (method.R() == eye).all((-1, -2)).any()


@pytest.mark.parametrize("blocks", [dict(boft_block_num=1, boft_block_size=0), dict(boft_block_size=8)])
def test_one_block(blocks):
    x, outputs = torch.linspace(-1, 1, 16).view(2, 8), []
    for lib in LIBS:
        with models.seeded(0):
            config = lib.BOFTConfig(target_modules=["0"], init_weights=False, **blocks)
            outputs.append(lib.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval()(x))
    torch.testing.assert_close(*outputs)
