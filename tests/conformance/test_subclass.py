# SPDX-License-Identifier: Apache-2.0
"""A subclass that overrides only the mathematics of a method agrees everywhere: nothing else describes an adapter."""

import pytest
import torch
from torch.testing import assert_close

import graft
from graft.core.effect import form_delta
from graft.core.method import Method
from tests.conformance.samples import LAYERS, REFUSED, SAMPLES, STORES, UNMERGEABLE, Cell, find
from tests.covering import Sometimes, law
from tests.looks import layers
from tests.models import disturb, seeded
from tests.raised import refuses

FACTOR = 1.37  # no power of two, of which products are exact


def other_maths(method: type[Method], kinds: set[str]) -> type[Method]:
    """A subclass with other mathematics, by its method's hooks: factors, ΔW and a branch, or pre, post and fold."""
    hooks = {}
    if "factors" in kinds:

        def factors(self):
            f = super(made, self).factors()
            A, _ = f.matrices()
            inner = torch.linspace(0.5, 1.5, len(A), dtype=A.dtype)
            return f._replace(
                scale=FACTOR * (1 if f.scale is None else f.scale), inner=f.inner if f.inner is not None else inner
            )

        hooks["factors"] = factors
    if "delta" in kinds:
        hooks["delta"] = lambda self, *W0: FACTOR * form_delta(super(made, self).delta(*W0))
    if "branch" in kinds:
        hooks["branch"] = lambda self, x: FACTOR * super(made, self).branch(x)
    if "shift" in kinds:
        hooks["shift"] = lambda self: FACTOR * super(made, self).shift()
    if "pre" in kinds:
        hooks["pre"] = lambda self, x: (1 if self.effect.post else FACTOR) * super(made, self).pre(x)
    if "post" in kinds:
        hooks["post"] = lambda self, x, y: FACTOR * super(made, self).post(x, y)
    if "fold" in kinds:

        def fold(self, W, b):
            W, b = super(made, self).fold(W, b)
            after = self.effect.post is not None and not self.effect.apart
            return FACTOR * W, FACTOR * b if after and b is not None else b

        hooks["fold"] = fold
    made = type(f"Other{method.__name__}", (method,), hooks)
    return made


OTHER = {"BEFT": {"shift"}, "GLORA": {"delta"}}  # a part of the hooks by which these say what they do
UNCHANGED = {
    "LN_TUNING": "a module is all there is",
    "TRAINABLE_TOKENS": "rows have no mathematics",
    "LILY": "a branch is all there is",
}


def maths(method: str) -> set[str]:
    """What the mathematics of a method is called."""
    own = set().union(*(s.hooks for s in SAMPLES if s.method == method)) - {"describe"}
    return OTHER.get(method, own)


ON = [layer for layer in LAYERS if layer.name in ("linear", "Conv1D", "conv2d", "conv1d-circular", "embedding")]
CELLS = [
    Cell(s, layer, STORES[0])
    for s in SAMPLES
    if s.method not in UNCHANGED
    for layer in ON
    if find(REFUSED, s, layer) is None and find(UNMERGEABLE, s, layer) is None
]


@pytest.fixture
def swapped(monkeypatch, request):
    """`variant` gives the subclass."""

    def swap(cell: Cell) -> None:
        cls = graft.method_of(cell.sample.method)
        own = cls.variant(cell.sample.make())
        sub = other_maths(own, maths(cell.sample.method))
        monkeypatch.setattr(cls, "variant", classmethod(lambda c, cfg: sub))

    return swap


def loss(y):
    with seeded(9):
        return (y * torch.randn(y.shape)).sum()


def gradients(model, x, **options):
    model.zero_grad()
    with seeded(8):  # of what is random in training
        y = model(x, **options)
    loss(y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(ours, theirs, tolerance=2e-5):
    assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def hooked(model):
    """Have every module of the adapted layer called, with a hook that does nothing."""
    for module in layers(model)["layer"].modules():
        module.register_forward_hook(lambda *_: None)
    return model


@law(
    "cell",
    CELLS,
    lambda cell: [
        cell.sample.method,
        cell.sample.hooks,
        cell.layer.name,
        Sometimes(str(cell.sample), 2),
        Sometimes((cell.sample.method, cell.layer.name), 4),
    ],
)
def test_a_subclass_that_overrides_only_the_maths_agrees_everywhere(cell, swapped):
    parent, x, many = cell.trained(), cell.inputs(), cell.inputs(96)
    swapped(cell)
    model = cell.trained()
    layer = layers(model)["layer"]
    y, long = model(x), model(many)
    assert (y - parent(x)).abs().max() > 1e-3, "it computes something else"
    close(long[:5] if torch.equal(many[:5], x) else y, y)  # few rows and many run by other kernels
    close(torch.cat([model(part) for part in many.split(7)]), long)
    # called module by module
    close(hooked(cell.trained())(many), long)
    grads = gradients(model.train(), many)
    assert grads
    for name, g in gradients(hooked(cell.trained()).train(), many).items():
        close(grads[name], g, 3e-4)
    # rows
    names = ["default", "__base__"] * 2 + ["default"]
    mixed = model.eval()(x, adapter_names=names)
    close(mixed[::2], y[::2])
    close(mixed[1::2], cell.bare()(x)[1::2])
    # its weight
    if layer.methods["default"].effect.additive:
        W = layer.site.module.weight + layer.get_delta_weight("default")
        with torch.no_grad():
            bare = cell.base()
            bare.layer.weight.copy_(W)
            if layer.methods["default"].effect.shift() is None:
                close(bare(x), y)
    model.merge_adapter()
    close(model(x), y)
    model.unmerge_adapter()


@law(
    "cell",
    CELLS,
    lambda cell: [Sometimes(" ".join(sorted(cell.sample.hooks)), 2), cell.layer.name],
    (lambda cell: [Sometimes(cell.sample.method, 3), cell.sample.hooks], pytest.mark.slow),
)
def test_a_subclass_that_overrides_only_the_maths_compiles(cell, swapped):
    torch._dynamo.reset()
    swapped(cell)
    x, model = cell.inputs(), cell.trained()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("cell", [c for c in CELLS if c.layer.name == "linear"], ids=str)
def test_beside_its_parent(cell, swapped):
    """A variant on a layer whose first adapter is of its parent."""
    if not cell.sample.together:
        pytest.skip("one at a time")
    with seeded(1):
        model = cell.fresh()
        swapped(cell)
        model.add_adapter("other", cell.sample.make("other"))
    disturb(model).eval()
    methods = layers(model)["layer"].methods
    assert type(methods["other"]) is not type(methods["default"])
    x = cell.inputs(70)
    model.base_model.set_adapter(["default", "other"])
    y = model(x)
    model.merge_adapter()
    close(model(x), y)
    model.unmerge_adapter()
    names = ["default", "other"] * 35
    mixed = model(x, adapter_names=names)
    for i, name in enumerate(("default", "other")):
        model.set_adapter(name)
        close(mixed[i::2], model(x)[i::2])


def test_half_an_override_is_refused():
    IA3, HRA, LoHa = (graft.method_of(name) for name in ("IA3", "HRA", "LOHA"))
    with pytest.raises(TypeError, match="Half overrides fold and inherits pre, post, which says the same"):
        type("Half", (IA3,), {"fold": lambda self, W, b: (W, b)})
    refuses(TypeError, "overrides pre and inherits fold", type, "Half", (HRA,), {"pre": lambda self, x: x})
    refuses(TypeError, "overrides delta and inherits factors", type, "Half", (LoHa,), {"delta": lambda self: 0})
    type("Whole", (HRA,), {"pre": lambda self, x: x, "fold": lambda self, W, b: (W, b)})
