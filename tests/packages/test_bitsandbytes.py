# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: layers of 4 and 8 bits."""

import copy
import warnings
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.errors import UnsupportedLayerError
from graft.storage.find import find_store
from tests.looks import layers
from tests.models import adapted, disturb, seeded
from tests.packages.bnb_layers import eight, embedding, four, pair, rearranged
from tests.storage.cells import FEW, Kind, cells, flat, identity, linear, near, same

globals().update(
    cells(
        [
            Kind("nf4", four),
            Kind("nested", partial(four, nested=True)),
            Kind("int8-training", partial(eight, trains=True)),
        ]
    )
)

OTHERS = [
    Kind("fp4", partial(four, kind="fp4")),
    Kind("bf16", partial(four, compute=torch.bfloat16), tolerance=5e-2),
    Kind("fp16", partial(four, compute=torch.float16), tolerance=5e-2),
    Kind("int8", eight, tolerance=0.12),  # rounds its inputs
]
globals().update({f"{name}_of_others": test for name, test in cells(OTHERS, FEW).items()})

HOLDS = {"nf4": four, "nested": partial(four, nested=True), "int8": eight}
TARGETS = ["0", "2"]
with seeded(5):
    X = torch.randn(6, 64)


def with_lora(base, name="default", **options):
    options = dict(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False) | options
    return adapted(base, {name: graft.LoraConfig(**options)}, seed=3, scale=0)


def state(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    held = [getattr(base[int(i)], "base_layer", base[int(i)]) for i in TARGETS]
    return [t.clone() for m in held for t in flat(find_store(m).snapshot(m, "weight", False))]


# how a weight is packed


@pytest.mark.parametrize(
    "hold",
    [
        partial(four, storage=torch.bfloat16, nested=True),
        partial(four, storage=torch.float32),
        partial(four, blocksize=128, kind="fp4"),
        partial(eight, floats=True),
        partial(eight, threshold=0.0),
    ],
)
def test_other_settings(hold):
    held = hold(linear())
    W = find_store(held).read(held, "weight")
    near(W, identity(held.train()), 1e-5)
    model = with_lora(pair(hold))
    before, y = state(model), model(X)
    settings = {k: v for k, v in vars(layers(model)["0"].base_layer.weight).items() if isinstance(v, (int, str))}
    model.merge_adapter()
    after = layers(model)["0"].base_layer.weight
    assert not same(before, state(model)) and settings.items() <= vars(after).items()
    model.unmerge_adapter()
    assert same(before, state(model)) and torch.equal(model(X), y)


@pytest.mark.differs("a bf16 base after merging in bnb 4-bit")
def test_a_written_weight_keeps_the_dtype_of_its_values():
    base = pair(lambda m: four(m.to(torch.bfloat16)))
    model = with_lora(base)
    held = layers(model)["0"].base_layer
    assert layers(model)["0"].W0.dtype == torch.bfloat16 == held.weight.quant_state.dtype
    model.merge_adapter()
    assert held.weight.quant_state.dtype == torch.bfloat16 and held.quant_state is held.weight.quant_state
    assert model(X.to(torch.bfloat16)).dtype == torch.bfloat16


def test_a_dense_layer_has_the_dtype_of_the_model():
    for hold in (four, eight):
        base = nn.Sequential(nn.Linear(64, 64), hold(nn.Linear(64, 64, bias=False).to(torch.bfloat16)))
        base[0].to(torch.bfloat16)
        model = with_lora(base, target_modules=["1"])
        y = model(X.to(torch.bfloat16))
        plain = model.merge_and_unload(dequantize=True)
        assert plain[1].weight.dtype == torch.bfloat16
        assert_close(plain(X.to(torch.bfloat16)), y, rtol=0.05, atol=0.05)


# AVX512-BF16


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("saved", [False, True])
def test_a_rearranged_weight_is_put_back(nested, storage, saved):
    hold = partial(four, nested=nested, storage=storage)
    fresh, base = pair(hold), pair(hold)
    W = [find_store(m).read(m, "weight") for m in (fresh[0], fresh[2])]
    for i in (0, 2):
        held = rearranged(base[i], saved)
        near(find_store(held).read(held, "weight"), W[i // 2], 4e-3)  # without changing it; bfloat16
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = with_lora(base)
    assert [str(w.message)[:40] for w in said].count("bitsandbytes has rearranged weights of 4") == 1 - (
        saved and nested
    )
    theirs = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    for i in (0, 2):
        theirs[i].weight.data = find_store(base[i].base_layer).read(base[i].base_layer, "weight")
        theirs[i].bias.data = base[i].base_layer.bias.data
        assert torch.equal(bits(base[i].base_layer.weight), bits(fresh[i].weight)), "the codes"
    theirs = with_lora(theirs)
    for m in (model, theirs):
        m(X).square().sum().backward()
    for ours, dense in zip(model.parameters(), theirs.parameters()):
        if dense.grad is not None:
            near(ours.grad, dense.grad, 1e-4)
    model.merge_adapter()
    model(X)
    assert not getattr(base[0].base_layer.weight.quant_state, "packing_format_for_cpu", False)
    model.merge_and_unload()


def bits(t):
    return t.detach().reshape(-1).view(torch.uint8)


@pytest.mark.differs("bnb 4-bit on CPUs with AVX512-BF16")
def test_an_adapter_keeps_weights_from_being_rearranged():
    base = pair(four, (96, 40))  # which bitsandbytes could not rearrange: rows of blocks and a half, no groups of 32
    x = X.repeat(1, 2)[:, :96]
    model = with_lora(base)
    with torch.no_grad():
        y = model(x)
    assert model(x).requires_grad and torch.equal(model(x), y)
    assert not base[0].base_layer.support_avx512bf16_for_cpu


# several adapters, copies, devices


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_two_adapters_merged_one_by_one_and_at_once(hold):
    model = with_lora(pair(hold), "a")
    with seeded(4):
        model.add_adapter("b", graft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False, use_dora=True))
    disturb(model.eval())
    before = state(model)
    for names in (["a", "b"], ["b", "a"]):  # DoRA's gain acts on what came before it
        model.base_model.set_adapter(names)
        expected = model(X)
        model.merge_adapter(names)
        at_once = model(X)
        model.unmerge_adapter()
        for name in names:
            model.merge_adapter([name])
        one_by_one = model(X)
        model.unmerge_adapter()
        assert same(before, state(model)) and torch.equal(model(X), expected)
        assert torch.equal(one_by_one, at_once), "rounded once"
        assert (at_once - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@pytest.mark.parametrize(
    "options", [dict(init_lora_weights="pissa"), dict(use_dora=True), dict(init_lora_weights=True)]
)
def test_an_adapter_made_while_another_is_merged(hold, options):
    config = lambda: graft.LoraConfig(r=4, target_modules=TARGETS, **options)
    alone = with_lora(pair(hold))
    with seeded(9):
        alone.add_adapter("second", config())
    model = with_lora(pair(hold))
    model.merge_adapter()
    with seeded(9):
        model.add_adapter("second", config())
    model.unmerge_adapter()
    ours, theirs = (graft.get_peft_model_state_dict(m, adapter_name="second") for m in (model, alone))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert same(state(model), state(alone)) and torch.equal(model(X), alone(X))


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_copies_and_casts(hold):
    model = with_lora(pair(hold))
    y, before = model(X), state(model)
    model.merge_adapter()
    merged = model(X)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert same(before, state(twin)) and torch.equal(twin(X), y)
    assert torch.equal(model(X), merged), "the copy is one"
    model.to("cpu").to(torch.bfloat16).unmerge_adapter()
    assert same(before, state(model))
    assert_close(model(X.to(torch.bfloat16)).float(), y, atol=0.15, rtol=0.1)
    model.delete_adapter("default")
    model.unload()
    assert same(before, state(model.get_base_model()))


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_mixed_batches(hold):
    model = with_lora(pair(hold), "a")
    with seeded(4):
        model.add_adapter("b", graft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False, use_dora=True))
    model.eval()
    for layer in layers(model).values():
        layer.base_layer.training = True  # 8 bits are not exact else
    rows = ["a", "b", "__base__", "a", "b", "b"]
    mixed = model(X, adapter_names=rows)
    for i, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(X[i : i + 1])
        else:
            model.set_adapter(name)
            alone = model(X[i : i + 1])
        near(mixed[i : i + 1], alone, 1e-5)


# embeddings


@pytest.mark.parametrize("kind", [4, 8])
@pytest.mark.parametrize("options", [{}, dict(use_dora=True), dict(trainable_token_indices=[1, 4])], ids=str)
def test_embeddings(kind, options):
    with seeded(0):
        table = nn.Embedding(30, 64)
    ids = torch.tensor([[1, 4, 9], [29, 0, 4]])
    held = embedding(kind, table)
    W = find_store(held).read(held, "weight")
    assert_close(W[ids], held(ids))
    if options.get("trainable_token_indices"):
        options = {"trainable_token_indices": {"0": [1, 4]}, "target_modules": ["1"]}
    found = []
    for base in (held, nn.Embedding.from_pretrained(W.clone())):
        with seeded(1):
            net = nn.Sequential(base, nn.Linear(64, 8))
            cfg = graft.LoraConfig(**dict(r=4, target_modules=["0"], init_lora_weights=False) | options)
            found.append(disturb(graft.get_peft_model(net, cfg).eval()))
    ours, theirs = found
    assert_close(ours(ids), theirs(ids))
    y = ours(ids)
    ours.merge_adapter()
    assert (ours(ids) - y).norm() < 0.2 * y.norm()
    ours.unmerge_adapter()
    assert_close(ours(ids), y)
    plain = ours.merge_and_unload(dequantize=True)
    assert type(plain[0]) is nn.Embedding or options.get("target_modules")
    assert_close(plain(ids), y)


def test_their_plain_embedding():
    with seeded(0):
        net = nn.Sequential(bnb.nn.Embedding(20, 8))
    model = graft.get_peft_model(net, graft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    y = model(torch.arange(5))
    model.merge_adapter()
    assert_close(model(torch.arange(5)), y)


# what is refused


def test_what_cannot_be_read_is_refused_before_anything_changes():
    dora = graft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    fresh = nn.Sequential(bnb.nn.LinearNF4(64, 32))
    lost = nn.Sequential(eight(nn.Linear(64, 32)))
    lost[0].weight.SCB = None
    cast = pair(partial(four, storage=torch.bfloat16)).float()
    with torch.device("meta"):
        empty = nn.Sequential(bnb.nn.LinearNF4(64, 32))
    cases = [
        (fresh, "not quantized yet: bitsandbytes does so in .to"),
        (lost, r"no scales \(SCB\)"),
        (cast, "codes were cast from torch.bfloat16 to torch.float32"),
        (empty, "on the meta device"),
    ]
    for base, why in cases:
        with pytest.raises(UnsupportedLayerError, match=f"needs its weight, and .*{why}"):
            graft.get_peft_model(base, dora)
        assert type(base[0]).__module__ == "bitsandbytes.nn.modules"
        model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(NotImplementedError, match=f"layer '0': .*{why}"):
            model.merge_adapter()


class Doubled(bnb.nn.LinearNF4):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own():
    net = nn.Sequential(Doubled(64, 32).to("cpu"))
    with pytest.raises(UnsupportedLayerError, match="Doubled has a replaced forward"):
        graft.get_peft_model(net, graft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    model = graft.get_peft_model(net, graft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model(X).sum().backward()
    with pytest.raises(NotImplementedError, match="Doubled has a replaced forward"):
        model.merge_and_unload()


def test_a_merge_that_would_write_what_is_not_finite():
    model = with_lora(pair(four))
    before = state(model)
    layers(model)["2"].lora_A["default"].weight.data[0, 0] = float("nan")
    for safe in (True, False):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=safe)
    assert same(before, state(model))


def test_one_model_with_several_storages():
    with seeded(0):
        plain = nn.Linear(64, 64)
    base = nn.Sequential(four(plain), eight(plain), plain, four(plain, nested=True, kind="fp4"))
    model = disturb(graft.get_peft_model(base, graft.OFTConfig(target_modules="all-linear", oft_block_size=8)).eval())
    assert len(layers(model)) == 4
    y = model(X)
    model.merge_adapter()
    assert (model(X) - y).norm() < 0.5 * y.norm()
    model.unmerge_adapter()
    assert torch.equal(model(X), y)
    assert [type(m) for m in model.merge_and_unload(dequantize=True)] == [nn.Linear] * 4
