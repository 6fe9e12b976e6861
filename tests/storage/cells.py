# SPDX-License-Identifier: Apache-2.0
"""The cells of the matrix method × packed storage: what must hold for each, whatever the package.

A file of tests makes a `Kind` for each storage and takes its tests from `globals().update(cells(kinds))`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import graft
from graft.core.errors import UnsupportedLayerError
from graft.storage.find import find_store
from tests import samples
from tests.covering import Case, Sometimes, law
from tests.looks import layers
from tests.models import adapted, seeded
from tests.raised import refuses
from tests.samples.laws import Sample

IN, OUT = 320, 96  # what all samples and all block sizes divide
WHOLE = ("LN_TUNING",)  # trains the layer itself, which only floats can
SAMPLES = [s for s in samples.BY_THEMSELVES if s.method not in WHOLE]
FEW = [s for s in SAMPLES if str(s) in ("LORA", "LORA-dora", "LOHA", "HIRA", "OFT", "IA3", "BEFT-bias")]


@dataclass(frozen=True)
class Kind:
    """A packed storage: how a linear layer is held in it, and how exact its arithmetic is."""

    name: str
    hold: Callable[[nn.Linear], nn.Module]  # a new module; the layer's dtype is float32
    tolerance: float = 1e-5  # of changes of the output and of gradients, beside those of a dense layer
    fixed: str | None = None  # a part of the text that refuses merging; None: the weight can be written
    unread: str | None = None  # a part of the text that refuses what reads the weight
    dtype: torch.dtype = torch.float32  # of the inputs
    bias: bool = True
    only: tuple[str, ...] = ()  # samples, where another storage of its kind has all
    rounds_inputs: bool = False  # so that a change of the output is as exact as the output

    def __str__(self) -> str:
        return self.name


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def linear(bias: bool = True) -> nn.Linear:
    with seeded(0):
        return nn.Linear(IN, OUT, bias).requires_grad_(False)


def identity(m: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight by the module's own arithmetic, whatever a store says of it."""
    with torch.no_grad():
        zero = m(torch.zeros(1, IN, dtype=dtype))
        return (m(torch.eye(IN, dtype=dtype)) - zero).T.contiguous()


def inputs(kind: Kind) -> Tensor:
    with seeded(2):
        return torch.randn(5, IN).to(kind.dtype)


def packed(kind: Kind, sample: Sample, *adapters: str) -> Any:
    return around(kind.hold(linear(kind.bias)), sample, *adapters)


def around(layer: nn.Module, sample: Sample, *adapters: str) -> Any:
    return adapted(Net(layer).eval(), {name: sample.make(name) for name in adapters or ("default",)})


def twin(kind: Kind, sample: Sample, model: Any) -> Any:
    """The same adapter over a dense layer that has the weight which the packed one has now."""
    held = kind.hold(linear(kind.bias))
    dense = linear(kind.bias).to(kind.dtype)
    dense.weight.data = find_store(held).read(held, "weight").to(kind.dtype).clone()
    made = around(dense, sample)
    if sample.rewrites:  # the packed weight is rounded anew
        layer = layers(model)["layer"]
        layers(made)["layer"].base_layer.weight.data = layer.weight_now.to(kind.dtype).clone()
        graft.set_peft_model_state_dict(made, graft.get_peft_model_state_dict(model))
    return made


def change(model: Any, x: Tensor) -> Tensor:
    """What the adapter does to the output: packed layers round their own in ways of their own."""
    with model.disable_adapter():
        base = model(x)
    return model(x) - base


def run(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The change of the output, and all gradients."""
    x = x.clone().requires_grad_()
    y = model(x)
    with seeded(4):
        y.backward(torch.randn(y.shape).to(y.dtype))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return {"x": x.grad, "change": change(model, x.detach()).detach(), **found}


# methods that transform outputs, by how much they may amplify what a packed layer rounds there
OF_OUTPUTS = dict.fromkeys(["BOTTLENECK", "REFT", "STEERING"], 3)


def near(ours: Tensor, theirs: Tensor, tolerance: float, scale: float = 0.0) -> None:
    scale = scale or theirs.abs().max().item()
    assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance * max(scale, 1e-3))


def state(model: Any) -> list[Tensor]:
    """Copies of all that the packed weight is made of."""
    base = layers(model)["layer"].base_layer
    return [t.clone() for t in flat(find_store(base).snapshot(base, "weight", False))]


def flat(value: Any) -> list[Tensor]:
    """All plain tensors inside a value."""
    if isinstance(value, Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is not None and type(value) not in (Tensor, nn.Parameter):
            names, _ = inner()
            return [t for name in names for t in flat(getattr(value, name))]
        own = [t for key in sorted(value.__dict__) if key != "module" for t in flat(value.__dict__[key])]
        return [value.data if isinstance(value, nn.Parameter) else value, *own]
    if isinstance(value, dict):
        return [t for key in value for t in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in flat(item)]
    if type(value).__name__ == "QuantState":
        return [t for key in sorted(value.__dict__) for t in flat(value.__dict__[key])]
    return []


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(bits(a), bits(b)) for a, b in zip(before, after))


def bits(t: Tensor) -> Tensor:
    """Return the bytes of a tensor: codes may be stored as floats that are no numbers."""
    return t.reshape(-1).contiguous().view(torch.uint8)


def cells(kinds: list[Kind], chosen: list[Sample] = SAMPLES) -> dict[str, Callable[..., None]]:
    """Return the tests by name, for the globals of a file: reading, forward and gradients, merging, dequantizing,
    files, and that codes do not train.

    By default each storage and each method meets every law, and a storage with a method, or a sample, one of three.
    """
    each_kind = pytest.mark.parametrize("kind", kinds, ids=str)
    each = law(
        "kind, sample",
        [Case((kind, sample)) for kind in kinds for sample in chosen if takes(kind, sample)],
        lambda pair: [
            pair[0].name,
            pair[1].method,
            *(Sometimes((pair[0].name, p), 3) for p in (pair[1].method, str(pair[1]))),
        ],
    )

    @each_kind
    def test_reading(kind):
        held = kind.hold(linear(kind.bias))
        store = find_store(held)
        assert store.name != "dense" and not store.exact
        if kind.unread is None:
            near(store.read(held, "weight"), identity(held, kind.dtype), max(kind.tolerance, 1e-5))
            assert store.why_unreadable(held, "weight") is None

    @each
    def test_forward_and_gradients(kind, sample):
        model = packed(kind, sample)
        ours, theirs = run(model, inputs(kind)), run(twin(kind, sample, model), inputs(kind))
        assert ours.keys() == theirs.keys() and ours["change"].abs().max() > 1e-3
        size = model(inputs(kind)).abs().max().item() if kind.rounds_inputs else 0.0
        for key in ours:
            near(
                ours[key],
                theirs[key],
                kind.tolerance * OF_OUTPUTS.get(sample.method, 1),
                size if key == "change" else 0.0,
            )

    @pytest.mark.differs("merging on quanto")
    @each
    @pytest.mark.filterwarnings("ignore:Merging has lost")  # as few bits do: tests/core/test_rounding.py
    def test_merging(kind, sample):
        model, x = packed(kind, sample), inputs(kind)
        expected, before = model(x), state(model)  # in this order: a first call may rearrange codes
        if kind.fixed is not None or not samples.mergeable([sample]):
            reason = kind.fixed if samples.mergeable([sample]) else None
            for merge in (model.merge_adapter, model.merge_and_unload):
                with pytest.raises(NotImplementedError, match=reason):
                    merge()
            assert same(before, state(model)) and torch.equal(model(x), expected)
            return
        model.merge_adapter()
        dense = twin(kind, sample, packed(kind, sample))
        dense.merge_adapter()
        layer, theirs = layers(model)["layer"], layers(dense)["layer"].base_layer
        same_weight = all(m.effect.keeps_weight for m in layer.methods.values())
        if not same_weight:
            goal = kind.hold(theirs.to(torch.float32) if sample.rewrites else restored(theirs))
            ours, goals = layer.weight_now, find_store(goal).read(goal, "weight")
            assert (ours != goals).float().mean() < 0.02, "the rounding of W + ΔW"
            assert (ours - goals).norm() < 0.02 * goals.norm()
            assert type(layer.base_layer) is type(goal)
        if layer.base_layer.bias is not None:
            near(layer.base_layer.bias, theirs.bias, max(kind.tolerance, 1e-5))
        assert same(before, state(model)) == same_weight
        model.unmerge_adapter()
        assert same(before, state(model)), "bit for bit"
        assert torch.equal(model(x), expected)

    @each
    def test_merging_into_a_dense_layer(kind, sample):
        if not samples.mergeable([sample]):
            return
        model, x = packed(kind, sample), inputs(kind)
        dense = twin(kind, sample, model)
        plain = model.merge_and_unload(dequantize=True)
        assert type(plain.layer) is nn.Linear
        near(plain(x), dense(x), max(kind.tolerance, 1e-5))

    @each
    def test_files(kind, sample, tmp_path):
        if sample.rewrites:
            return
        model = packed(kind, sample)
        model.save_pretrained(tmp_path / "ours")
        twin(kind, sample, model).save_pretrained(tmp_path / "dense")
        ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "dense"))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            near(ours[key], theirs[key], 1e-5)
        loaded = graft.PeftModel.from_pretrained(Net(kind.hold(linear(kind.bias))).eval(), tmp_path / "dense").eval()
        near(loaded(inputs(kind)), model(inputs(kind)), max(kind.tolerance, 1e-5))

    @pytest.mark.differs("`modules_to_save`, or LN tuning, on a layer that holds codes")
    @each_kind
    def test_codes_do_not_train(kind):
        base = nn.Sequential(nn.Sequential(kind.hold(linear(kind.bias))), nn.Linear(OUT, 4))
        saved = graft.LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"])
        for config in (saved, graft.LNTuningConfig(target_modules=["0.0"])):
            refuses(UnsupportedLayerError, "is held in codes, which cannot train", graft.get_peft_model, base, config)
            assert not any(isinstance(m, graft.AdapterLayer) for m in base.modules()) and type(base[1]) is nn.Linear

    return {name: test for name, test in locals().items() if name.startswith("test_")}


def restored(layer: nn.Linear) -> nn.Linear:
    return copy.deepcopy(layer).to(torch.float32)


def takes(kind: Kind, sample: Sample) -> bool:
    """Return True if the storage has a cell for the sample: not if that writes to a base that cannot be written."""
    return (str(sample) in kind.only or not kind.only) and not (sample.rewrites and kind.fixed is not None)
