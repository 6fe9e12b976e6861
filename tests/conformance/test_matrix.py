# SPDX-License-Identifier: Apache-2.0
"""The laws that hold for every method on every layer type in every store."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.methods.lora.start import STARTS
from tests.conformance.samples import (
    ADAPTERS,
    CALLED,
    CALLED_CELLS,
    CELLS,
    ELSEWHERE,
    REFUSALS,
    SAMPLES,
    VARIANTS_ELSEWHERE,
    Cell,
    Net,
    features,
)
from tests.covering import EVERYTHING, Case, Sometimes, law
from tests.looks import layers, merged
from tests.models import disturb, seeded, trainable
from tests.raised import refuses

NAMES = ["other", "__base__", "default", "other", "default"]  # a mixed batch

every = law("cell", CELLS + CALLED_CELLS, features)
mergeable = law("cell", [c for c in CELLS if c.unmergeable is None], features)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's tensors as they are now, by their original names."""
    return {name: t.clone() for name, t in graft.get_base_model_state_dict(model).items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    now = weights(model)
    assert now.keys() == before.keys()
    for name, t in before.items():
        assert_close(now[name], t, rtol=tolerance, atol=tolerance)


def equal(ours: torch.Tensor, theirs: torch.Tensor, cell: Cell, tolerance: float | None = None) -> None:
    tolerance = cell.store.tolerance if tolerance is None else tolerance
    assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_every_method_is_in_the_matrix():
    assert {s.method for s in (*SAMPLES, *CALLED)} | set(ELSEWHERE) == set(graft.methods.METHODS)
    assert all((Path(__file__).parents[1] / name).is_file() for name in (ELSEWHERE | VARIANTS_ELSEWHERE).values())


def test_every_initialisation_that_begins_with_the_weight_or_data_is_in_the_matrix():
    assert {s.label for s in SAMPLES if s.shifts} == set(STARTS)
    assert {s.label for s in SAMPLES if s.prepare} == {"corda", "lora_ga", "eva", "sb"}


@pytest.mark.differs("PVeRA on a convolution with groups")
@pytest.mark.differs("DoRA on a convolution with groups")
@pytest.mark.parametrize("sample, layer, error, reason", REFUSALS, ids=[f"{s}-{layer}" for s, layer, _, _ in REFUSALS])
def test_a_refusal_says_why_and_changes_nothing(sample, layer, error, reason):
    cell = Cell(sample, layer, None)
    base = Net(layer.make(), bool(layer.ids))
    before = {name: (p.clone(), p.requires_grad) for name, p in base.named_parameters()}
    with pytest.raises(error, match=reason) as raised:
        graft.get_peft_model(base, cell.sample.make())
    assert "layer" in str(raised.value), "names the layer"
    assert {name: p.requires_grad for name, p in base.named_parameters()} == {n: r for n, (_, r) in before.items()}
    assert type(base.layer) is type(layer.make())


# the identity


@every
def test_a_fresh_adapter_is_the_identity(cell):
    x = cell.inputs()
    fresh, base = cell.fresh()(x), cell.base()(x)
    if cell.sample.identity is True:
        equal(fresh, base, cell)
    elif cell.sample.identity:
        assert 0 < (fresh - base).abs().max() < cell.sample.identity
    else:
        assert fresh.isfinite().all() and (fresh - base).abs().max() > 1e-3, "a sample says otherwise without need"


@every
def test_an_adapter_does_something_to_an_input_by_place_or_by_name(cell):
    x, model = cell.inputs(), cell.trained()
    y = model(x)
    assert (y - cell.base()(x)).abs().max() > 1e-3
    model.get_base_model().name = layers(model)["layer"].argument_names[0]
    assert torch.equal(model(x), y)


@every
def test_disabled_adapters_leave_the_base(cell):
    x, model = cell.inputs(), cell.trained(ADAPTERS)
    expected = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), cell.bare()(x))
    assert torch.equal(model(x), expected)


@every
def test_an_empty_batch_has_an_empty_output_and_gradients_of_zero(cell):
    model, x = cell.trained(), cell.inputs()[:0]
    with torch.no_grad():
        expected = cell.bare()(x)
        assert model(x).shape == expected.shape
    y = model(x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    if y.requires_grad:
        y.sum().backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


# merging


@mergeable
def test_merging_moves_the_adapter_into_the_weight(cell):
    x, model = cell.inputs(), cell.trained()
    expected = model(x)
    model.merge_adapter()
    layer = layers(model)["layer"]
    assert layer.merged_adapters == ["default"]
    equal(model(x), expected, cell)
    assert torch.equal(model(x), layer.base_layer(x if cell.layer.ids else x * 1.3) * 0.7), "the weight alone does it"


@pytest.mark.differs("unmerging in float32 and float64")
@mergeable
def test_unmerging_restores(cell):
    x, model = cell.inputs(), cell.trained()
    before, expected = weights(model), model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    unchanged(model, before, 1e-6 if cell.sample.subtracts else 0)
    equal(model(x), expected, cell, 1e-5 if cell.sample.subtracts else 0)
    assert merged(model) == []


@pytest.mark.differs("unmerging in half precision")
@mergeable
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_comes_back_bit_for_bit(cell, dtype):
    x = cell.inputs() if cell.layer.ids else cell.inputs().to(dtype)
    model = disturb(cell.fresh(ADAPTERS, base=cell.base().to(dtype)))
    before, base = weights(model), copy.deepcopy(model)
    with base.disable_adapter():
        expected = base(x)
    for names in ([["default"]], [["default"], ["other"]], [["default", "other"]]):
        if not cell.sample.together and names != [["default"]]:
            continue
        for some in names:
            model.base_model.set_adapter(some)
            model.merge_adapter(some)
        assert any(not torch.equal(t, before[name]) for name, t in weights(model).items())
        model.unmerge_adapter()
        unchanged(model, before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    unchanged(model, before)


@mergeable
def test_a_safe_merge_refuses_values_that_are_not_finite(cell):
    x, model = cell.inputs(), cell.trained()
    before = weights(model)
    with torch.no_grad():
        trainable(layers(model)["layer"], "default")[0].view(-1)[-1] = torch.nan
    refuses(ValueError, r"NaNs detected.*default", model.merge_adapter, safe_merge=True)
    unchanged(model, before)
    assert merged(model) == []
    with model.disable_adapter():
        assert torch.equal(model(x), cell.bare()(x))


@mergeable
def test_a_safe_merge_of_sound_values_is_a_merge(cell):
    x, model, other = cell.inputs(), cell.trained(), cell.trained()
    model.merge_adapter(safe_merge=True)
    other.merge_adapter()
    assert torch.equal(model(x), other(x))


@mergeable
def test_merging_and_unloading_leaves_a_plain_model(cell):
    x, model = cell.inputs(), cell.trained()
    expected = model(x)
    plain = model.merge_and_unload()
    assert type(plain) is Net and not any(isinstance(m, graft.AdapterLayer) for m in plain.modules())
    assert plain.state_dict().keys() == cell.base().state_dict().keys()
    equal(plain(x), expected, cell)


@mergeable
def test_two_active_adapters_fold_into_one_weight(cell):
    x, model = cell.inputs(), cell.trained(ADAPTERS)
    if not cell.sample.together:
        refuses(ValueError, "activate one", model.base_model.set_adapter, list(ADAPTERS))
        return
    model.base_model.set_adapter(list(ADAPTERS))
    both = model(x)
    for name in ADAPTERS:
        model.base_model.set_adapter(name)
        assert (model(x) - both).abs().max() > 1e-3, "each has its part"
    model.base_model.set_adapter(list(ADAPTERS))
    equal(model.merge_and_unload()(x), both, cell)


@pytest.mark.differs("RoAd on a convolution whose groups separate the two of a pair")
@law(
    "cell",
    [c for c in CELLS + CALLED_CELLS if c.unmergeable],
    lambda cell: [*features(cell), (cell.sample.method, cell.unmergeable[1])],
)
def test_what_cannot_be_merged_says_why(cell):
    x, model = cell.inputs(), cell.trained()
    before, expected = weights(model), model(x)
    error, reason = cell.unmergeable
    refuses(error, reason, model.merge_adapter)
    unchanged(model, before)
    assert merged(model) == []
    assert torch.equal(model(x), expected)


# files


@every
def test_a_saved_adapter_computes_the_same_on_a_fresh_base(cell, tmp_path):
    x, model = cell.inputs(), cell.trained(ADAPTERS)
    model.save_pretrained(tmp_path)
    loaded = cell.load(tmp_path)
    report = loaded.load_adapter(tmp_path / "other", "other")
    assert not report.missing_keys and not report.unexpected_keys
    for name in ADAPTERS:
        model.set_adapter(name)
        loaded.set_adapter(name)
        # mapped memory has another alignment, by which torch may sum in another order
        assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)
        saved, held = (graft.get_peft_model_state_dict(m, adapter_name=name) for m in (model, loaded))
        assert saved.keys() == held.keys()
        for key, t in saved.items():
            exact = not key.endswith("lora_shift.sample")  # of the base, from which the load has subtracted again
            assert_close(held[key], t, rtol=0, atol=0 if exact else 1e-6)
    assert weights(loaded).keys() == weights(model).keys()


@mergeable
def test_merging_leaves_what_a_checkpoint_holds(cell):
    model = cell.trained()
    before = {key: t.clone() for key, t in graft.get_peft_model_state_dict(model).items()}
    model.merge_adapter()
    after = graft.get_peft_model_state_dict(model)
    assert before.keys() == after.keys() and before
    assert all(torch.equal(after[key], t) for key, t in before.items())


@every
def test_a_state_dict_loads_into_a_twin(cell):
    x, model, twin = cell.inputs(), cell.trained(ADAPTERS), cell.fresh(ADAPTERS)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


# mixed batches


def one_by_one(cell, model, x, names):
    """Rows of `x` in turn, each with its adapter alone; all of an adapter at once, if they depend on each other."""
    parts = [(name, [i]) for i, name in enumerate(names)]
    if not cell.sample.by_row:
        parts = [(name, [i for i, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)]
    for name, rows in parts:
        if name == "__base__":
            with model.disable_adapter():
                yield rows, model(x[rows])
        else:
            model.set_adapter(name)
            yield rows, model(x[rows])


@every
def test_a_mixed_batch_is_its_rows_one_by_one(cell):
    x, model = cell.inputs(), cell.trained(ADAPTERS)
    mixed = model(x, adapter_names=NAMES)
    for rows, y in one_by_one(cell, model, x, NAMES):
        equal(mixed[rows], y, cell)
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=NAMES), cell.bare()(x))


@every
def test_training_on_a_mixed_batch_gives_the_gradients_of_its_rows(cell):
    x, model = cell.inputs(), cell.trained(ADAPTERS).train(not cell.sample.draws)
    if not cell.layer.ids:
        x.requires_grad_()
    with seeded(4):
        weight = torch.randn_like(model(x))

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if not cell.layer.ids:
            found["input"], x.grad = x.grad, None
        model.zero_grad()
        return found

    model.set_requires_grad(ADAPTERS)
    (model(x, adapter_names=NAMES) * weight).sum().backward()
    mixed = gradients()
    for rows, y in one_by_one(cell, model, x, NAMES):
        if y.requires_grad:
            (y * weight[rows]).sum().backward()
    apart = gradients()
    assert mixed.keys() == apart.keys() and len(mixed) > 1
    for name in apart:
        equal(mixed[name], apart[name], cell, 1e-4)


# training


@every
def test_gradients_reach_the_active_adapter_and_nothing_else(cell):
    x, model = cell.inputs(), cell.trained(ADAPTERS).train()
    own = set(trainable(layers(model)["layer"], "default"))
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (p in own), name
        if p in own:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None, name


# numbers


@every
def test_half_precision_stays_close_to_double(cell):
    x = cell.inputs()
    x = x if cell.layer.ids else x.bfloat16()
    model = disturb(cell.fresh(base=cell.base().bfloat16()))
    exact = copy.deepcopy(model).double()
    expected = exact(x if cell.layer.ids else x.double())
    scale = expected.abs().max()

    def close(y):
        assert y.dtype == torch.bfloat16
        assert (y.double() - expected).abs().max() / scale < 0.03

    close(model(x))
    if cell.unmergeable is None:
        dtypes = {name: t.dtype for name, t in weights(model).items()}
        model.merge_adapter()
        assert {name: t.dtype for name, t in weights(model).items()} == dtypes
        close(model(x))


@every
def test_adapters_of_a_half_precision_base(cell):
    x = cell.inputs()
    x = x if cell.layer.ids else x.bfloat16()
    upcast = cell.sample.method != "LN_TUNING"  # its copy computes as the layer did
    for autocast in (True, False):
        model = disturb(cell.fresh(base=cell.base().bfloat16(), autocast_adapter_dtype=autocast))
        layer = layers(model)["layer"]
        floats = layer.store.where(layer.base_layer, "weight")[1] is not None  # else there is no dtype to follow
        wanted = torch.bfloat16 if floats and not (autocast and upcast) else torch.float32
        assert {p.dtype for p in trainable(layer, "default")} == {wanted}
        assert model(x).dtype == torch.bfloat16


@law("cell", [c for c in CELLS if c.store.name == "dense"], features)
def test_parameters_may_have_another_dtype_than_buffers(cell):
    """FSDP2's `mp_policy` casts parameters for a call, and leaves buffers as they are."""
    x, model = cell.inputs(), cell.trained()
    expected = model(x)
    for p in model.parameters():
        p.data = p.data.double()
    x = x if cell.layer.ids else x.double()
    y = model(x)
    assert y.dtype == torch.float64
    equal(y.float(), expected, cell, 1e-4)
    model.train()(x).sum().backward()


# copies, meta


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_equal_and_independent(cell, how):
    x, model = cell.inputs(), cell.trained(ADAPTERS)
    expected = model(x)
    other = how(model)
    assert torch.equal(other(x), expected)
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    assert not {p.data_ptr() for p in mine.values()} & {p.data_ptr() for p in theirs.values()}
    disturb(other)
    other.set_adapter("other")
    assert torch.equal(model(x), expected)
    assert model.active_adapters == ["default"]
    mixed = other(x, adapter_names=["other"] * len(x))
    equal(mixed, other(x), cell)


def shapes(model: nn.Module) -> dict[str, tuple]:
    return {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


READ = ["MTLLORA", "POLY", "TLORA"]  # they make a tensor of the numbers that a call gives, wherever torch would


def life(cell: Cell, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return what a model computes: in training, in a mixed batch, with gradients, merged, unmerged and its tensors."""
    torch.default_generator.manual_seed(3)
    y = model.train()(x)
    if y.requires_grad:
        y.square().sum().backward()
    values = [y, model.eval()(x, adapter_names=NAMES), *(p.grad for p in model.parameters() if p.grad is not None)]
    if cell.unmergeable is None:
        model.merge_adapter()
        values.append(model(x))
        if cell.store.name == "dense":
            model.unmerge_adapter()
    return [*values, model(x)]


@law("cell", [c for c in CELLS + CALLED_CELLS if c.sample.method not in READ], features)
def test_a_default_device_changes_nothing(cell):
    """Each new tensor names the device of its layer: none is made on the default one, which here holds no values."""
    x, model, twin = cell.inputs(), cell.trained(["default", "other"]), cell.trained(["default", "other"])
    expected = life(cell, model, x)
    with torch.device("meta"):
        assert_close(life(cell, twin, x), expected, rtol=0, atol=0)


@law("cell", [c for c in CELLS + CALLED_CELLS if c.store.name == "dense"], features)
def test_a_default_dtype_changes_nothing(cell):
    """Each new tensor names its dtype, or the numbers in it have it already."""
    fresh, names = cell.fresh(), ["default", "other"]
    x, model, twin, base = cell.inputs(), cell.trained(names), cell.trained(names), cell.base()
    expected = life(cell, model, x)
    torch.set_default_dtype(torch.float64)
    try:
        values = life(cell, twin, x)
        if not cell.sample.prepare:  # which runs the model on inputs of the default dtype
            assert shapes(cell.fresh(base=base)) == shapes(fresh)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["FOURIERFT-linear-dense", "FROD-conv2d-point-dense"])
def test_branches_that_meet_a_default_dtype(name):
    """Those that the law's covering array leaves out."""
    (cell,) = (cell for cell in CELLS if str(cell) == name)
    x, model = cell.inputs(), cell.trained()
    expected = model(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(model(x), expected, rtol=0, atol=0)
        cell.fresh()
    finally:
        torch.set_default_dtype(torch.float32)


@every
def test_injection_on_the_meta_device_gives_the_same_names_and_shapes(cell):
    expected = cell.fresh()
    with torch.device("meta"):
        base = cell.base()
    if cell.sample.reads:
        refuses(graft.UnsupportedLayerError, r"'layer'.*meta device", cell.fresh, base=base)
    elif not cell.sample.prepare:  # which runs the model
        assert shapes(cell.fresh(base=base)) == shapes(expected)
    light = cell.fresh(low_cpu_mem_usage=True)
    assert shapes(light) == shapes(expected)
    plan = graft.plan(cell.base(), cell.sample.make())
    assert plan.trainable_parameters == expected.get_nb_trainable_parameters()[0]
    assert [m.name for m in plan.matched] == ["layer"]


# compiled


ON_LINEAR = [c for c in CELLS if c.layer.name in ("linear", "norm")]


def effect(cell: Cell) -> str:
    """The kind of effect: the hooks by which its method says what it does."""
    return " ".join(sorted(cell.sample.hooks))


SHOWN = {cell.sample.hooks: cell.sample for cell in ON_LINEAR}.values()  # one of each kind of effect
BACKENDS = [
    Case((cell, backend))
    for cell in ON_LINEAR
    for backend in ("eager", "aot_eager")
    if backend == "eager" or cell.sample in SHOWN or EVERYTHING
]


@pytest.mark.differs("PVeRA with `generator_seed` in compiled code")
@law(
    "cell, backend",
    BACKENDS,
    lambda case: [effect(case[0]), (case[0].store.name, case[1]), Sometimes((effect(case[0]), case[1]), 3)],
    (lambda case: [(case[0].sample.method, effect(case[0])), (effect(case[0]), case[1])], pytest.mark.slow),
)
def test_compiles_without_a_break(cell, backend):
    torch._dynamo.reset()
    x, model = cell.inputs(), cell.trained()
    net = model if graft.method_of(cell.sample.method).surrounds else model.get_base_model()  # which is faster
    equal(torch.compile(net, fullgraph=True, backend=backend)(x), model(x), cell)


@law(
    "cell",
    ON_LINEAR,
    lambda cell: [Sometimes(effect(cell), 3), cell.store.name],
    (lambda cell: [effect(cell)], pytest.mark.slow),
)
def test_a_compiled_model_follows_what_is_active(cell):
    """What guards look at is the plan of a kind of effect, and not the method."""
    torch._dynamo.reset()
    x, model = cell.inputs(), cell.trained(ADAPTERS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    first = model(x)
    equal(compiled(x), first, cell)
    model.set_adapter("other")
    second = model(x)
    assert (first - second).abs().max() > 1e-3
    equal(compiled(x), second, cell)
    with model.disable_adapter():
        equal(compiled(x), cell.bare()(x), cell)
    equal(compiled(x), second, cell)
