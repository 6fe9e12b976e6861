# SPDX-License-Identifier: Apache-2.0
"""HQQ: the matrix of methods and layers, other settings, biases, a tiny Llama."""

import copy
import io

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.storage.find import find_store
from tests.looks import layers
from tests.models import disturb, seeded
from tests.packages.llama import model_tests, plain
from tests.storage.cells import IN, Kind, cells, identity, linear


def by(nbits=4, dtype=torch.float32, **options):
    def hold(layer):
        config = BaseQuantizeConfig(nbits=nbits, **{"group_size": 64, "axis": 1, **options})
        return HQQLinear(copy.deepcopy(layer), config, compute_dtype=dtype, device="cpu")

    return hold


KINDS = [Kind("4-bit", by()), Kind("3-bit", by(3, axis=0))]
globals().update(cells(KINDS))


def by_hand(folder):
    model = plain(folder).requires_grad_(False)
    for parent in [m for m in model.model.modules() if type(m).__name__ in ("LlamaAttention", "LlamaMLP")]:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, by()(layer))
    return model


for _test in model_tests({"4-bit": by_hand}):
    globals()[_test.__name__] = _test


X = torch.linspace(-1, 1, 10 * IN).view(2, 5, IN).sin()
SETTINGS = [
    by(8, torch.float16),
    by(2, torch.bfloat16, group_size=16, axis=0, view_as_float=True),
    by(1),
    by(1.58),
    by(3, torch.float16),
    by(4, torch.bfloat16, group_size=None),
    by(5, axis=0),
]


@pytest.mark.parametrize("hold", SETTINGS)
def test_a_new_weight_is_made_as_the_old_one_was(hold):
    old, new = hold(linear()), linear()
    dtype = old.compute_dtype
    new.weight.data *= 1.25
    goal, store = hold(new.to(dtype)), find_store(old)
    assert_close(store.read(old), identity(old, dtype), rtol=1e-2, atol=3e-3)
    before, kept = store.read(old), store.snapshot(old)
    store.write(old, "weight", new.weight.data)
    assert torch.equal(store.read(old), store.read(goal)) and store.read(old).dtype == dtype
    assert old.meta.keys() == goal.meta.keys() and old.quant_config == goal.quant_config
    assert torch.equal(store.snapshot_values(old, "weight", kept), before)
    store.restore(old, "weight", kept)
    assert torch.equal(store.read(old), before)


def net():
    first = linear()
    first.bias.requires_grad_()  # HQQ copies it with its graph
    with seeded(1):
        return nn.Sequential(by()(first), nn.Tanh(), by()(nn.Linear(96, 64)))


def test_a_bias_that_hqq_copied_does_not_train():
    model = graft.get_peft_model(net(), graft.LoraConfig(r=2, target_modules=["0"]))
    assert not model.base_model.model[0].base_layer.bias.requires_grad
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))


BIASES = {"all": ["0.base_layer.bias", "2.bias"], "lora_only": ["0.base_layer.bias"]}


@pytest.mark.parametrize("bias", BIASES)
def test_biases_train_although_they_are_no_parameters(bias, tmp_path):
    base = net()
    names, module = list(base.state_dict()), base[0]
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"], bias=bias))
    train = [f"base_model.model.{name}" for name in BIASES[bias]]
    assert [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")] == train
    model = disturb(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = [p.detach().clone() for n, p in model.named_parameters() if n in train]
    model(X).square().sum().backward()
    optimizer.step()
    after = [p for n, p in model.named_parameters() if n in train]
    assert all(p.grad.abs().sum() > 0 and not torch.equal(p, old) for p, old in zip(after, before))
    model.eval()
    expected = model(X)
    model.save_pretrained(tmp_path)
    assert set(train) <= load_file(tmp_path / "adapter_model.safetensors").keys()
    assert_close(graft.PeftModel.from_pretrained(net(), tmp_path).eval()(X), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    left = model.unload()
    assert left[0] is module and list(left.state_dict()) == names


def test_a_failed_call_leaves_biases_as_they_were(tmp_path):
    graft.LoraConfig(r=2, target_modules=["0"], bias="all").save_pretrained(tmp_path)
    save_file({"base_model.model.0.lora_A.weight": torch.zeros(3, IN)}, tmp_path / "adapter_model.safetensors")
    base = net()
    before = base[0].bias
    with pytest.raises(RuntimeError, match="size mismatch"):
        graft.PeftModel.from_pretrained(base, tmp_path)
    assert type(base[0]) is HQQLinear and base[0].__dict__["bias"] is before


def test_the_module_stays_and_its_state_can_be_saved():
    model = disturb(graft.get_peft_model(net(), graft.LoraConfig(r=2, target_modules=["0"]))).eval()
    module = layers(model)["0"].base_layer
    model.merge_adapter()
    assert layers(model)["0"].base_layer is module
    merged, buffer = model(X), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = HQQLinear(None, module.quant_config | {"offload_meta": False}, compute_dtype=torch.float32, device="cpu")
    fresh.load_state_dict(torch.load(buffer, weights_only=False))
    assert torch.equal(fresh(X), module(X)) and torch.equal(model.unload()(X), merged)


def test_a_layer_without_a_weight_yet_is_refused():
    empty = HQQLinear(None, BaseQuantizeConfig(nbits=4), compute_dtype=torch.float32, device="cpu")
    empty.in_features, empty.out_features = IN, 96
    assert find_store(empty).why_unreadable(empty) == "it is not quantized yet"
