# SPDX-License-Identifier: Apache-2.0
"""The three axes of the matrix: methods (`SAMPLES`, of tests/samples), layers (`LAYERS`), weight storage (`STORES`).

A new layer type adds a line to `LAYERS`, a new store one to `STORES`; every law of test_matrix.py then holds for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import graft
from graft.core.errors import UnsupportedLayerError
from tests import samples
from tests.conformance import stores
from tests.covering import Sometimes
from tests.models import disturb, seeded
from tests.samples.laws import Sample

ADAPTERS = ("default", "other")


SAMPLES = samples.LAWS
CALLED = (
    samples.CALLED
)  # aLoRA, Poly, T-LoRA: for the laws of forward, gradients, files and copies; nothing merges them
# on whole attentions or blocks, with experts: their laws have tests of their own
ELSEWHERE = {
    "ADAPTION_PROMPT": "methods/test_whole.py",
    "MIXLORA": "methods/test_whole.py",
    "SHADOW": "methods/test_whole.py",
    "XLORA": "conformance/test_called.py",
    "ADAPTER_FUSION": "methods/test_fusion.py",
}
# a variant of LoRA: Arrow chooses among the other adapters of its layer for each token
VARIANTS_ELSEWHERE = {"arrow": "conformance/test_called.py"}


@dataclass(frozen=True)
class Layer:
    """A layer to adapt, what one row of its input looks like, and the traits that decide who can adapt it."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    traits: str = ""
    ids: int = 0  # the input holds ids below this

    def __str__(self) -> str:
        return self.name


def hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 10)
    nn.init.normal_(layer.weight, std=0.4)
    nn.init.normal_(layer.bias)
    return layer


# traits of numbers of channels: `odd-in`, `odd-patch` (what an output reads), `odd-out`, `uneven` (out is no multiple
# of 6), `torn` (odd in each group)
LAYERS = [
    Layer("linear", lambda: nn.Linear(10, 6), (4, 10)),
    Layer("linear-no-bias", lambda: nn.Linear(10, 6, bias=False), (10,), "no-bias"),
    Layer("Conv1D", hf_conv1d, (4, 10)),
    Layer("embedding", lambda: nn.Embedding(11, 6, padding_idx=2), (5,), "embedding odd-in", ids=11),
    Layer("conv1d", lambda: nn.Conv1d(6, 9, 3, stride=2, padding=1), (6, 11), "conv odd-out uneven"),
    Layer(
        "conv1d-circular",
        lambda: nn.Conv1d(6, 4, 3, padding=2, padding_mode="circular", bias=False),
        (6, 7),
        "conv no-bias uneven",
    ),
    Layer("conv2d", lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 5), "conv"),
    Layer("conv2d-point", lambda: nn.Conv2d(4, 6, 1), (4, 3, 5), "conv"),
    Layer(
        "conv2d-stride",
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        (4, 7, 5),
        "conv no-bias",
    ),
    Layer("conv2d-dilated", lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), (4, 7, 5), "conv"),
    Layer("conv2d-same", lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (4, 7, 5), "conv"),
    Layer("conv2d-grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 7, 5), "conv grouped torn"),
    Layer(
        "conv2d-depthwise",
        lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1),
        (4, 5, 5),
        "conv grouped odd-in odd-patch uneven",
    ),
    Layer("conv3d", lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=1), (4, 3, 4, 2), "conv"),
    Layer("conv3d-grouped", lambda: nn.Conv3d(4, 6, 2, groups=2), (4, 3, 4, 2), "conv grouped torn"),
    Layer("norm", lambda: nn.LayerNorm(10), (4, 10), "norm"),
]


@dataclass(frozen=True)
class Storage:
    """How the weight of the layer is held."""

    name: str
    hold: Callable[[nn.Module], nn.Module] = lambda layer: layer
    layers: tuple[str, ...] = ()  # that can be held so; all if empty
    unfit: str = ""  # methods and samples that train or quantize the weight itself, or need its gradient
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return self.name


FLOATS_ONLY = "LN_TUNING LORA-loftq LORA-lora_ga LORAXS-sb"
STORES = [Storage("dense"), Storage("rounded", stores.held, ("linear", "linear-no-bias"), FLOATS_ONLY, 1e-3)]


class Net(nn.Module):
    """One layer between two frozen factors. It gets its input as the keyword argument `name`, if that is set."""

    def __init__(self, layer: nn.Module, ids: bool):
        super().__init__()
        self.layer, self.ids, self.name = layer, ids, ""
        self.before, self.after = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.ids else x * self.before
        return (self.layer(**{self.name: x}) if self.name else self.layer(x)) * self.after


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix."""

    sample: Sample
    layer: Layer
    store: Storage

    def __str__(self) -> str:
        return f"{self.sample}-{self.layer}-{self.store}"

    def base(self) -> Net:
        """A fresh base model, the same every time, with every parameter away from its trivial value."""
        with seeded(0):
            net = Net(self.layer.make(), bool(self.layer.ids))
            if isinstance(net.layer, nn.LayerNorm):
                net.layer.weight.data.normal_()
                net.layer.bias.data.normal_()
            net.layer = self.store.hold(net.layer)
        return net.eval()

    def bare(self) -> nn.Module:
        """The base model as adapters leave it."""
        return self.fresh().unload() if self.sample.rewrites or self.sample.shifts else self.base()

    def fresh(self, adapters: Iterable[str] = ("default",), base: nn.Module | None = None, **options):
        """A model with adapters as they start."""
        with seeded(1):
            first, *others = adapters
            base, cfg, after = self.base() if base is None else base, self.sample.make(first), None
            if self.sample.prepare:
                after = self.sample.prepare(base, cfg, self.inputs(40).to(base.before))
            model = graft.get_peft_model(base, cfg, first, **options)
            if after:
                after(model)
            for name in others:
                model.add_adapter(name, self.sample.make(name), **options)
        return self.sample.called(model).eval()

    def load(self, folder):
        """The first adapter of a folder on a fresh base."""
        return self.sample.called(graft.PeftModel.from_pretrained(self.base(), folder))

    def trained(self, adapters: Iterable[str] = ("default",), **options):
        """A model with adapters that do something."""
        return disturb(self.fresh(adapters, **options))

    def inputs(self, rows: int = 5) -> Tensor:
        with seeded(2):
            shape = (rows, *self.layer.shape)
            if self.layer.ids:
                return torch.randint(0, self.layer.ids, shape, device="cpu")
            return torch.randn(shape, device="cpu")

    @property
    def unmergeable(self) -> tuple[type[Exception], str] | None:
        return find(UNMERGEABLE, self.sample, self.layer)


# methods or samples, a trait of the layer ("": any) → what is raised, and why

WHOLE = ["LN_TUNING"]  # they take any module
REFUSED = [
    *((s.method, "norm", UnsupportedLayerError, "LayerNorm.* not supported") for s in SAMPLES if s.method not in WHOLE),
    *samples.REFUSED,
]
UNMERGEABLE = samples.UNMERGEABLE


def find(reasons: list[tuple], sample: Sample, layer: Layer) -> tuple[type[Exception], str] | None:
    """What is raised for this pair, and a part of the text."""
    for names, trait, error, text in reasons:
        fits = not trait or trait in layer.traits.split()
        if fits and {sample.method, str(sample)} & set(names.split()):
            return error, text
    return None


def cells(samples: list[Sample]) -> list[Cell]:
    """The samples on every layer that takes them, in every store that holds it."""
    return [
        Cell(sample, layer, store)
        for sample in samples
        for layer in LAYERS
        if find(REFUSED, sample, layer) is None
        for store in STORES
        if (not store.layers or layer.name in store.layers)
        and not {sample.method, str(sample)} & set(store.unfit.split())
    ]


PAIRS = [(sample, layer) for sample in (*SAMPLES, *CALLED) for layer in LAYERS]
CELLS, CALLED_CELLS = cells(SAMPLES), cells(CALLED)


def features(cell: Cell) -> list[tuple]:
    """What a law should meet: the adapter, layer and storage; some of its samples, and it on some kinds of layer."""
    kind = cell.layer.traits.replace("no-bias", "").strip() or cell.layer.name.removesuffix("-no-bias")
    return [
        ("adapter", cell.sample.adapter),
        ("layer", cell.layer.name),
        ("store", cell.store.name),
        ("kind", kind),
        Sometimes(("sample", str(cell.sample)), 3),
        Sometimes(("store", cell.store.name, cell.sample.method), 3),
        Sometimes(("kind", kind, cell.sample.method), 6),
    ]


REFUSALS = [(*pair, *found) for pair in PAIRS if (found := find(REFUSED, *pair)) is not None]
