# SPDX-License-Identifier: Apache-2.0
"""LoRA on packed experts: as on the dequantized base, with no more than a chunk of it dense."""

import copy
import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graft
from graft.core.errors import UnsupportedLayerError
from graft.kernels import experts as kernel
from graft.storage import stacks
from graft.storage.find import innermost
from tests.covering import law, product
from tests.families import IDS
from tests.leaves_out import FUSED_EXPERTS
from tests.looks import layers
from tests.models import adapted, checkpoint, seeded
from tests.raised import refuses
from tests.storage.packed_experts import BOTH, KINDS, WIDTH, blocks, both

pytestmark = FUSED_EXPERTS


def with_lora(model, adapter="default", **config):
    values = dict(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=BOTH, init_lora_weights=False)
    return adapted(model, {adapter: graft.LoraConfig(**values | config)}, scale=0)


def results(model, **inputs):
    """Return loss and gradients by name."""
    model.zero_grad()
    out = model(IDS, labels=IDS, **inputs)
    out.loss.backward()
    return out.loss, out.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(found, expected):
    assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    assert found[2].keys() == expected[2].keys() and found[2]
    for n, grad in expected[2].items():
        assert_close(found[2][n], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_single_matrices_have_the_bits_that_the_package_reads(kind, dtype):
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for _, m in blocks(both(kind)[0]):
        for name in ("gate_up_proj", "down_proj"):
            held = stacks.find_matrices(m, name)
            found = held.dense([3, 1], dtype)
            if kind == "mxfp4":
                codes = held.weight.unflatten(2, (-1, 16))
                expected = convert_moe_packed_tensors(codes, held.scale, dtype=dtype).mT
            elif kind == "fp4":  # transformers reads none
                codes = held.weight.view(torch.uint8).unflatten(2, (-1, 16))
                exponents = held.scale.log2().add(127).to(torch.uint8)
                expected = convert_moe_packed_tensors(codes, exponents, dtype=dtype).mT
            else:
                expected = _dequantize_fp8_weight(held.weight, held.scale, held.block, torch.float32).to(dtype)
            assert torch.equal(found, expected[[3, 1]]) and found.any()


def test_scales_may_be_bytes_of_exponents():
    (_, m), *_ = blocks(both("fp4")[0])
    held = stacks.find_matrices(m, "down_proj")
    in_bytes = replace(held, scale=held.scale.float().log2().add(127).to(torch.uint8))
    for e in range(held.shape[0]):
        assert torch.equal(in_bytes.matrix(e, torch.float32), held.matrix(e, torch.float32))
    grown = [stack.remake(lambda e: 40 * held.matrix(e, torch.float32)) for stack in (held, in_bytes)]
    assert grown[1].scale.dtype == torch.uint8 and not torch.equal(grown[1].scale, in_bytes.scale)
    assert torch.equal(*(stack.dense([0, 2], torch.float32) for stack in grown))


@pytest.mark.parametrize("targets", [BOTH, []], ids=["both", "none"])
@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_arguments_by_name_come_in_any_order(kind, targets):
    """Of a block that layers stand around, and of one below all adapters, which graft runs as well."""
    model = with_lora(both(kind)[0], target_parameters=targets or None)
    _, module = blocks(model)[0]
    x, weights = torch.randn(6, WIDTH, requires_grad=True), torch.rand(6, 2)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3], [2, 0]])
    first, second = [*inspect.signature(type(innermost(module)).forward).parameters][2:]
    assert torch.equal(module(x, **{second: weights, first: index}), module(x, index, weights))


@pytest.mark.differs("experts held in codes (MXFP4, FP8, NVFP4, bitsandbytes' 4 bits) in `target_parameters`")
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:], []], ids=["both", "up", "down", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_dequantized_base(kind, targets):
    """With none, too: the layers below get gradients."""
    packed, dense = both(kind)
    expected = results(with_lora(dense, target_parameters=targets or None))
    model = with_lora(packed, target_parameters=targets or None)
    found = results(model)
    same(found, expected)
    model.train()
    checkpoint(model)
    same(results(model), expected)
    with torch.no_grad():
        assert_close(model(IDS).logits, expected[1], rtol=1e-5, atol=1e-6)


METHODS = {
    "LOKR": dict(r=2),
    "LOHA": dict(r=2),
    "HRA": dict(r=2),
    "HIRA": dict(r=2),
    "IA3": dict(feedforward_modules=BOTH[1:]),
    "VBLORA": dict(r=1, num_vectors=8, vector_length=4),
    "DELORA": dict(r=2, init_weights=False),
}


def moved(model, method, adapter="default", **config):
    """Return a model with an adapter of another method, which does something."""
    values = dict(target_modules=["q_proj"], target_parameters=BOTH, **METHODS[method])
    made = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](**values | config)
    with seeded(1):
        if isinstance(model, graft.PeftModel):
            model.add_adapter(adapter, made)
        else:
            model = graft.get_peft_model(model, made, adapter)
    with seeded(2), torch.no_grad():
        for n, p in model.named_parameters():
            if f".{adapter}" in n:
                p += 0.1 * torch.randn(p.shape)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_stack_is_read_as_its_dense_module_has_it(kind):
    config = graft.LoraConfig(r=2, target_parameters=BOTH)
    packed, dense = (layers(graft.get_peft_model(m, config)) for m in both(kind))
    assert packed.keys() == dense.keys() and len(packed) == 4
    for key, layer in packed.items():
        assert torch.equal(layer.base_weight.read(), dense[key].base_weight.read()), key
        assert torch.equal(layer.W0, dense[key].W0), key


@law("method, kind", product(METHODS, ("mxfp4", "fp8")), lambda c: c)
def test_other_methods_on_packed_stacks(method, kind, tmp_path):
    packed, dense = (moved(m, method) for m in both(kind))
    expected = results(dense)
    same(results(packed), expected)
    with torch.no_grad():
        assert_close(packed(IDS).logits, expected[1], rtol=1e-5, atol=1e-6)
        packed.save_pretrained(tmp_path)
        loaded = graft.PeftModel.from_pretrained(both(kind)[0], tmp_path)
        assert torch.equal(loaded(IDS).logits, packed(IDS).logits)


@torch.no_grad()
def test_other_methods_merge_into_packed_stacks(monkeypatch):
    """One matrix after the other, as into the dense stack, but for rounding; unmerging gives the bits back."""
    bases = both("fp8")
    inner, twins = (blocks(m) for m in bases)
    packed, dense = (moved(m, "LOKR", target_modules=[]) for m in bases)
    before, unmerged = dense_of(inner), packed(IDS).logits
    monkeypatch.setattr(stacks.PackedMatrices, "dense", lambda *_: pytest.fail("a dense stack"))
    packed.merge_adapter()
    monkeypatch.undo()
    dense.merge_adapter()
    for (path, m), (_, twin) in zip(inner, twins):
        for name in NAMES:
            change = getattr(twin, name) - before[f"{path}.{name}"]
            found = stacks.find_matrices(m, name).dense(range(len(change)), torch.float32) - before[f"{path}.{name}"]
            assert (found - change).norm() < 0.5 * change.norm()
    assert min(graft.merge_report(packed).values()) > 0.9
    packed.unmerge_adapter()
    assert torch.equal(packed(IDS).logits, unmerged)


def test_mixtures_of_methods_on_packed_stacks():
    """Each acts on the matrix that those before it made."""
    models = []
    for base in both("fp8"):
        with seeded(1):
            config = graft.LoraConfig(r=2, target_parameters=BOTH, init_lora_weights=False)
            model = graft.get_peft_model(base, config, mixed=True)
        for method, adapter in (("HRA", "h"), ("LOKR", "k")):
            with seeded(1):
                config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](r=2, target_parameters=BOTH, init_weights=False)
                model.add_adapter(adapter, config)
        model.set_adapter(["default", "h", "k"])
        models.append(model)
    same(results(models[0]), results(models[1]))


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_each_matrix_in_use_is_dequantized_once_in_either_direction(kind, monkeypatch):
    model = with_lora(both(kind)[0])
    counts, largest = {}, []

    def dense(self, experts, dtype, before=stacks.PackedMatrices.dense):
        for e in experts:
            counts[self.weight.data_ptr(), e] = counts.get((self.weight.data_ptr(), e), 0) + 1
        largest.append(len(experts))
        return before(self, experts, dtype)

    monkeypatch.setattr(stacks.PackedMatrices, "dense", dense)
    with torch.no_grad():
        model(IDS)
    used = len(counts)
    assert set(counts.values()) == {1} and used > 8
    counts.clear()
    results(model)
    assert set(counts.values()) == {2} and len(counts) == used
    monkeypatch.setattr(kernel, "BUDGET", 1)
    largest.clear()
    expected = results(model)
    assert set(largest) == {1}
    monkeypatch.setattr(kernel, "BUDGET", 2 * 64 * 64 * 4)  # two of gate_up_proj, four of down_proj
    same(results(model), expected)
    assert max(largest) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_switching_saving_and_loading(kind, tmp_path):
    packed, dense = both(kind)
    models = [with_lora(m) for m in (packed, dense)]
    for model in models:
        with seeded(2):
            model.add_adapter("b", graft.LoraConfig(r=3, target_parameters=BOTH[:1], init_lora_weights=False))
            model.add_adapter("c", graft.LoraConfig(r=1, target_parameters=BOTH[1:], init_lora_weights=False))
    for active in ("b", ["c", "default"], ["default", "b", "c"]):
        for model in models:
            model.base_model.set_adapter(active)
        same(*(results(model) for model in models))
    with torch.no_grad():
        plain = [model.get_base_model()(IDS).logits for model in models]
        models[0].save_pretrained(tmp_path)
        for model in models:
            with model.disable_adapter():
                plain.append(model(IDS).logits)
        assert_close(plain[2], plain[3], rtol=1e-5, atol=1e-6)
        models[1].set_adapter("default")
        for base in both(kind):
            loaded = graft.PeftModel.from_pretrained(base, tmp_path)
            assert_close(loaded(IDS).logits, models[1](IDS).logits, rtol=1e-5, atol=1e-6)


def test_unloading_leaves_the_module_as_it_was():
    packed, _ = both("mxfp4")
    before = [dict(m.__dict__) for _, m in blocks(packed)]
    model = with_lora(packed)
    results(model)
    other = copy.deepcopy(model)
    same(results(other), results(model))
    model.unload()
    assert [m.__dict__.keys() for _, m in blocks(packed)] == [held.keys() for held in before]


def test_sdt_on_packed_stacks_is_refused():
    packed, _ = both("mxfp4")
    before = [dict(m.__dict__) for _, m in blocks(packed)]
    said = r"down_proj \(Mxfp4GptOssExperts\) .*SDT trains A_log of a Mamba's mixer.*name other target_parameters"
    with pytest.raises(UnsupportedLayerError, match=said):
        graft.get_peft_model(packed, graft.SdtConfig(target_modules=["q_proj"], target_parameters=BOTH[1:]))
    assert [dict(m.__dict__) for _, m in blocks(packed)] == before
    assert not any("sdt" in n for n, _ in packed.named_parameters())


NAMES = ("gate_up_proj", "down_proj")


def dense_of(inner):
    """Return the dense stacks, by the key of their layer."""
    held = {f"{path}.{name}": stacks.find_matrices(m, name) for path, m in inner for name in NAMES}
    return {key: h.dense(range(h.shape[0]), torch.float32) for key, h in held.items()}


@torch.no_grad()
def merges_and_unmerges(packed):
    """Merge a small and a large update: see what is kept and said, and that unmerging gives the bits back."""
    inner = blocks(packed)
    model = with_lora(packed, target_modules=[])
    before, shares = dense_of(inner), []
    for factor in (0.01, 400):
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p *= factor
        unmerged = model(IDS).logits
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model.merge_adapter()
        far, after, report = 0.0, dense_of(inner), graft.merge_report(model)
        for key, layer in layers(model).items():
            A, B = layer.methods["default"].effect.factors().matrices()
            delta = layer.op.product(A, B, layer.site.shape)
            share = ((after[key] - before[key]) * delta).sum() / (delta * delta).sum()
            assert abs(float(share) - report[key]) < 1e-3
            far = max(far, float((after[key] - before[key] - delta).norm() / delta.norm()))
        shares.append(min(report.values()))
        lost = [text for w in said if "lost a part of the update" in (text := str(w.message))]
        assert len(lost) == (shares[-1] < 0.9) and all("into the base loaded dequantized" in text for text in lost)
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, unmerged) and graft.merge_report(model) == {}
        assert all(torch.equal(W, before[key]) for key, W in dense_of(inner).items())
    assert shares[0] < 0.9 < shares[1] and far < 0.5, (shares, far)
    refuses(NotImplementedError, r"understands only codes.*base dequantized", model.merge_and_unload, dequantize=True)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_what_it_says_and_gives_the_bits_back(kind):
    merges_and_unmerges(both(kind)[0])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes, but for bytes, which codes are."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if type(t) is torch.Tensor and t.element_size() > 1]
        self.numbers = max(self.numbers, *made, 0)
        return out


def holds_one_matrix(packed):
    """Merge, twice and with the check of every weight, and unmerge: no tensor is larger than a matrix.

    But for the blocks of scales that reach over its edge.
    """
    sizes = {key: W.numel() // len(W) for key, W in dense_of(blocks(packed)).items()}
    model = with_lora(packed, target_modules=[])
    with seeded(2):
        model.add_adapter("b", graft.LoraConfig(r=1, target_parameters=BOTH, init_lora_weights=False))
    with Largest() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["default"], safe_merge=True)
        model.merge_adapter(["b"], safe_merge=True)
        model.unmerge_adapter()
    assert max(sizes.values()) <= seen.numbers < 1.5 * max(sizes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_has_one_matrix_dense_at_a_time(kind):
    holds_one_matrix(both(kind)[0])


@torch.no_grad()
def test_a_merge_that_is_not_finite_is_refused_and_nothing_changes():
    packed, _ = both("fp8")
    inner = blocks(packed)
    model, before = with_lora(packed, target_modules=[]), dense_of(inner)
    for n, p in model.named_parameters():
        if n.endswith("lora_B.default.weight"):
            p.fill_(3e38)  # finite, and its product is not
    refuses(ValueError, "NaNs detected in the merged weights", model.merge_adapter, safe_merge=True)
    assert all(torch.equal(W, before[key]) for key, W in dense_of(inner).items())
    assert graft.merge_report(model) == {}


@torch.no_grad()
def test_mxfp4_keeps_the_scales_of_the_base():
    """New ones would move numbers that the update does not touch."""
    packed, _ = both("mxfp4")
    (_, m), *_ = blocks(packed)
    before = stacks.find_matrices(m, "down_proj")
    W = before.dense(range(5), torch.float32)
    assert torch.equal(before.remake(W.__getitem__).dense(range(5), torch.float32), W)
    unit = 2.0 ** (float(before.scale[2, 3, 0]) - 127)
    W[2, 3, 4] = 7.5 * unit
    after = before.remake(W.__getitem__)
    moved = (after.dense(range(5), torch.float32) != before.dense(range(5), torch.float32)).nonzero()
    assert after.scale[2, 3, 0] == before.scale[2, 3, 0] + 1 and (after.scale != before.scale).sum() == 1
    assert {(int(e), int(row)) for e, row, _ in moved} == {(2, 3)}
    assert after.dense([2], torch.float32)[0, 3, 4] == 8 * unit
