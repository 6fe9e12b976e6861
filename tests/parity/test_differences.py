# SPDX-License-Identifier: Apache-2.0
"""Where PEFT 0.21.2 is wrong or refuses, and what graft does instead. None of this compares with PEFT."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from tests import models
from tests.covering import Case, Sometimes, law
from tests.leaves_out import EMPTY_FILES
from tests.looks import layers_of
from tests.pair import adapt, close, close_dicts, outcome, output, randomize
from tests.raised import refuses
from tests.samples import LAWS, METHODS, SAMPLES, Sample, each, first, mergeable, over
from tests.trees import Config, tree

pytestmark = pytest.mark.graft_only


def clones(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.differs("OFT on Conv2d with kernel > 1")
@over([s for s in SAMPLES if "forward" in s.unlike])
def test_fresh_adapter_is_the_identity(sample):
    """PEFT: OFT on a convolution sums overlapping patches; HRA forgets the dilation."""
    close(
        output(adapt(graft, sample).eval(), sample),
        models.output(models.make(sample.model), models.inputs(sample.model)),
    )


@pytest.mark.differs(
    "HiRA on an embedding with a factor (Gemma 3), or on a convolution with another `padding_mode` than zeros"
)
@pytest.mark.differs("LoRA on a 1×1×1 Conv3d")
@over([s for s in SAMPLES if s.unlike])
def test_merged_equals_forward(sample):
    """PEFT: the above; a 1x1x1 kernel cannot be merged; a tied table gets the update twice."""
    model = randomize(adapt(graft, sample), sample).eval()
    plain = output(model, sample)
    merged = outcome(model.merge_and_unload)
    if sample.name == "replicated" and merged.error:
        assert merged.kind is ValueError and "replica" in str(merged.error)  # layers that share weights cannot differ
        return
    close(output(merged.value, sample), plain)


LAYERS = {
    "conv1D": ["c_fc"],
    "embedding": ["emb"],
    "conv1d": ["conv", "point", "grouped"],
    "conv2d": ["conv", "point", "grouped", "rect", "dilated"],
    "conv3d": ["conv", "point"],
}


ON_LAYERS = [
    (method, f"{model}.{name}")
    for method in METHODS
    for model, names in LAYERS.items()
    for name in names
    if method != "LN_TUNING"
]


@pytest.mark.differs("layer types")
@law("method, layer", ON_LAYERS, lambda case: [(case[0], case[1].partition(".")[0]), (case[1],)])
def test_any_layer_type(method, layer):
    """A method either adapts a layer completely or says that it cannot; PEFT has a list of classes per method."""
    model_name, name = layer.split(".")
    sample = Sample(method, "any", model_name, {**SIZES[method], "target_modules": [name]})
    made = outcome(lambda: adapt(graft, sample))
    if made.error:
        assert isinstance(made.error, (graft.UnsupportedLayerError, graft.ConfigError))
        assert name in str(made.error)
        return
    model = made.value.eval()
    base = models.output(models.make(model_name), models.inputs(model_name))
    if method not in ("VBLORA", "UNILORA"):  # which start near it
        close(output(model, sample), base)
    randomize(model, sample)
    plain = output(model, sample)
    assert not torch.allclose(plain, base, atol=1e-4)
    merged = outcome(model.merge_adapter)
    if merged.error:
        assert merged.kind is NotImplementedError and name in str(merged.error)
        return
    close(output(model, sample), plain)
    model.unmerge_adapter()
    close(output(model, sample), plain)
    with model.disable_adapter():
        close(output(model, sample), base)


SIZES = {
    "LORA": dict(r=4, lora_alpha=5),
    "IA3": dict(feedforward_modules=[]),
    "VERA": dict(r=4),
    "LOHA": dict(r=3, alpha=4),
    "OFT": dict(oft_block_size=3),
    "HRA": dict(r=4),
    "HIRA": dict(r=3),
    "MISS": dict(r=4),
    "VBLORA": dict(r=3, num_vectors=9, vector_length=1),
    "ROAD": dict(group_size=2),
    "BEFT": {},
    "SHIRA": dict(r=1),
    "SUPERTUNING": dict(sparsity=0.8),
    "DEFT": dict(r=2),
    "BOFT": dict(boft_block_size=3),
    "PSOFT": dict(r=3),
    "PVERA": dict(r=4),
    "RANDLORA": dict(r=4, randlora_alpha=5),
    "UNILORA": dict(r=3, theta_d_length=11),
    "TINYLORA": dict(u=5),
    "GRALORA": dict(r=4, alpha=5),
    "DELORA": dict(r=3),
    "C3A": dict(block_size=2, init_weights=True),
    "FOURIERFT": dict(n_frequency=20, scaling=37, init_weights=True),
    "GLORA": dict(r=3),
    "PEANUT": dict(r=3, act_fn="tanh"),
    "LILY": dict(r=3),
    "OSF": {},
    "ADAMSS": dict(r=5, num_subspaces=3),
    "WAVEFT": dict(n_frequency=20, scaling=1.3),
    "LOKR": dict(r=3, alpha=4),
    "FROD": dict(sparse_rate=0.1),
    "TRAINABLE_TOKENS": dict(token_indices=[2, 0, 5]),
}


@pytest.mark.differs("two OFT adapters")
@pytest.mark.parametrize(
    "sample", [s for s in each(models="mlp embedding conv2d") if s.method in ("OFT", "HRA")], ids=str
)
def test_two_rotations_merge_as_they_run(sample):
    """PEFT merges two OFT adapters in the other order."""
    model = adapt(graft, sample)
    model.add_adapter("b", sample.config(graft))
    randomize(model, sample).eval().base_model.set_adapter(["default", "b"])
    plain = output(model, sample)
    model.merge_adapter()
    close(output(model, sample), plain)
    model.unmerge_adapter()
    close(output(model, sample), plain)


@pytest.mark.differs("IA3 unmerge; RoAd unmerge")
@over(mergeable(each(models="mlp conv2d embedding llama")))
def test_unmerging_is_exact(sample):
    """PEFT divides or subtracts and leaves rounding behind."""
    model = randomize(adapt(graft, sample), sample).eval()
    before = clones(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    subtracts = {s.method for s in LAWS if s.subtracts} | {"ADAMSS"}
    close_dicts(dict(model.state_dict()), before, 1e-6 if sample.method in subtracts else 0)


@pytest.mark.differs("HiRA's `rank_pattern`")
def test_ranks_of_hira_by_layer():
    """PEFT honours the pattern from a layer's second adapter on."""
    sample = Sample("HIRA", "ranks", "mlp", dict(target_modules=["lin0", "fc1"], r=4, rank_pattern={"lin0": 2}))
    model = adapt(graft, sample)
    model.add_adapter("b", sample.config(graft))
    for name, r in (("lin0", 2), ("layers.0.fc1", 4)):
        layer = model.get_submodule(f"base_model.model.{name}")
        assert layer.r == {"default": r, "b": r} and {p.shape[0] for p in layer.hira_A.values()} == {r}


def test_hira_on_grouped_convolutions():
    """PEFT: NotImplementedError. Elementwise, groups make no difference."""
    sample = Sample("HIRA", "grouped", "conv2d", dict(target_modules=["grouped"], r=3))
    model = randomize(adapt(graft, sample), sample).eval()
    plain, layer = output(model, sample), layers_of(model, "default")[0]
    A, B = (p["default"].flatten(1) for p in (layer.hira_A, layer.hira_B))
    W = layer.base_layer.weight
    close(layer.get_delta_weight("default"), W * (B @ A).view(W.shape))
    model.merge_adapter()
    close(output(model, sample), plain)


def test_norms_with_a_head_unload():
    """PEFT leaves the wrapper of the head in the base."""
    sample = first("LN_TUNING", "mlp", "head")
    base = models.make("mlp")
    kinds = {n: type(m) for n, m in base.named_modules()}
    assert {n: type(m) for n, m in adapt(graft, sample).unload().named_modules()} == kinds


CONTAINER = Sample("LN_TUNING", "container", "mlp", {"target_modules": ["layers.1"]})


@pytest.mark.differs("file keys of a copied container (LN tuning)")
def test_copied_containers_load_under_another_name(tmp_path):
    """PEFT keeps the adapter's name inside these keys and then loads nothing."""
    model = randomize(adapt(graft, CONTAINER), CONTAINER)
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path, adapter_name="renamed")
    close(output(loaded, CONTAINER), output(model, CONTAINER))


def test_copied_containers_move_between_libraries(tmp_path):
    """Files of the default adapter, both ways."""
    import peft

    for writer, reader in ((graft, peft), (peft, graft)):
        model = randomize(adapt(writer, CONTAINER), CONTAINER)
        model.save_pretrained(tmp_path / writer.__name__)
        loaded = reader.PeftModel.from_pretrained(models.make("mlp"), tmp_path / writer.__name__)
        close(output(loaded, CONTAINER), output(model, CONTAINER))


WRONG = [s for s in SAMPLES if "gradients" in s.unlike and s.model in ("mlp", "conv1d", "conv2d")]


@pytest.mark.differs("LoHa `use_effective_conv2d`")
@over(WRONG)
def test_gradients_are_derivatives(sample):
    """PEFT's hand-written backward of the factored LoHa kernel mixes up its two halves; C3A's gives x a wrong one."""
    model = randomize(adapt(graft, sample), sample).double().eval()
    batch = {k: v.double() for k, v in models.inputs(sample.model).items()}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def run(*values):
        return torch.func.functional_call(model, dict(zip(parameters, values)), kwargs=batch)

    assert torch.autograd.gradcheck(run, tuple(parameters.values()), fast_mode=True)


@pytest.mark.parametrize(
    "sample", [first("LOHA", "mlp", "rank_dropout"), first("LOHA", "conv2d", "rank_dropout")], ids=str
)
def test_dropout_of_rows_keeps_the_mean(sample):
    """Whole output rows of one layer's update are dropped, the rest is scaled up."""
    model = randomize(adapt(graft, sample), sample).train()
    layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
    x = torch.randn(2, 10) if sample.model == "mlp" else torch.randn(2, 3, 5, 5)
    base, full = layer.base_layer(x), layer.eval()(x)
    layer.train()
    models.seed(0)
    draws = torch.stack([layer(x) for _ in range(3000)]) - base
    close(draws.mean(0), full - base, 0.06)
    rows = draws.movedim(2 if sample.model == "conv2d" else -1, 1).flatten(2).abs().amax(-1)  # (draws, out)
    assert 0.3 < (rows == 0).float().mean() < 0.5


@pytest.mark.differs("training with rank dropout or module dropout (LoHa)")
def test_dropout_of_whole_updates():
    """Each layer's update is there or not, with the given probability."""
    sample = first("LOHA", "mlp", "module_dropout")
    model = randomize(adapt(graft, sample), sample)
    layer = model.base_model.model.lin0
    x = torch.randn(2, 10)
    base, full = layer.base_layer(x), layer.eval()(x)
    layer.train()
    models.seed(0)
    draws = [layer(x) for _ in range(400)]
    assert all(torch.allclose(y, base) or torch.allclose(y, full) for y in draws)
    assert 0.3 < sum(torch.allclose(y, base) for y in draws) / 400 < 0.5


@pytest.mark.differs("OFT `module_dropout`")
def test_rotation_dropout_happens():
    """PEFT builds OFT's dropout and never calls it."""
    sample = first("OFT", "mlp", "dropout")
    model = randomize(adapt(graft, sample), sample)
    layer = model.base_model.model.lin0
    x = torch.randn(2, 10)
    base, full = layer.base_layer(x), layer.eval()(x)
    assert torch.equal(layer(x), full)
    layer.train()
    models.seed(0)
    draws = [layer(x) for _ in range(200)]
    assert sum(torch.allclose(y, full) for y in draws) > 50
    assert any(torch.allclose(y, base, atol=1e-6) for y in draws)


@pytest.mark.differs("`ensure_weight_tying`")
def test_a_tied_head_stays_tied():
    """PEFT ties only layers called embed_tokens and lm_head, and leaves GPT-2's wte and head apart."""
    config = graft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True)
    model = graft.get_peft_model(models.make("gpt2"), config)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


# heads of another size


@pytest.mark.differs("heads of different sizes on one base")
@pytest.mark.parametrize("name, head", [("mlp", "head"), ("bert-seq", "classifier")])
def test_heads_of_different_sizes(name, head, tmp_path):
    sample = first("LORA", name, "head" if name == "mlp" else "classify")
    model = adapt(graft, sample)
    width = models.make(name).get_submodule(head).in_features
    model.add_adapter("wide", sample.config(graft), heads={head: nn.Linear(width, 7)})
    randomize(model, sample).eval()
    narrow = output(model, sample)
    model.set_adapter("wide")
    wide = output(model, sample)
    assert wide.shape == (*narrow.shape[:-1], 7)
    model.set_adapter("default")
    close(output(model, sample), narrow, 0)

    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make(name), tmp_path)
    loaded.load_adapter(tmp_path / "wide", "wide")
    close(output(loaded, sample), narrow)
    loaded.set_adapter("wide")
    close(output(loaded, sample), wide)
    alone = graft.PeftModel.from_pretrained(models.make(name), tmp_path / "wide")
    close(output(alone, sample), wide)
    close(output(alone.merge_and_unload(), sample), wide)


# loading accounts for every key


def spoil(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


SPOILED = {
    "missing": (lambda t: t.pop(max(t)), lambda keys: max(keys)),
    "unexpected": (
        lambda t: t.update({"base_model.model.nowhere.weight": torch.zeros(2)}),
        lambda keys: "nowhere.weight",
    ),
}


@pytest.mark.differs("missing keys")
@pytest.mark.differs("unexpected keys")
@pytest.mark.differs("`load_adapter` returns")
@pytest.mark.parametrize("how", SPOILED)
@over(each(models="mlp"))
def test_missing_and_unexpected_keys(sample, how, tmp_path):
    """PEFT warns of some missing keys and says nothing of unexpected ones."""
    change, named = SPOILED[how]
    adapt(graft, sample).save_pretrained(tmp_path)
    key = named(held := load_file(tmp_path / "adapter_model.safetensors"))
    if how == "missing" and len(held) == 1 and EMPTY_FILES.args[0]:
        pytest.skip("safetensors 0.4 reads no file without tensors")
    spoil(tmp_path, change)
    with pytest.raises(graft.AdapterKeyError) as error:
        graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
    assert isinstance(error.value, RuntimeError)
    assert key.split(".")[-1] in str(error.value) and "strict=False" in str(error.value)

    tolerant = outcome(lambda: graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path, strict=False))
    assert tolerant.error is None and tolerant.warned(key.split(".")[-1])


def test_load_adapter_is_strict_and_undoes_itself(tmp_path):
    sample = first("LORA")
    adapt(graft, sample).save_pretrained(tmp_path)
    spoil(tmp_path, lambda t: t.pop(max(t)))
    model = adapt(graft, sample)
    before = clones(model)
    refuses(graft.AdapterKeyError, None, model.load_adapter, tmp_path, "b")
    assert list(model.peft_config) == ["default"]
    close_dicts(dict(model.state_dict()), before, 0)
    report = model.load_adapter(tmp_path, "b", strict=False)
    assert len(report.missing_keys) == 1 and not report.unexpected_keys


# nothing is dropped in silence


def test_targets_that_match_nothing_are_reported():
    """PEFT injects the rest and says nothing."""
    made = outcome(
        lambda: graft.get_peft_model(models.make("llama"), graft.LoraConfig(target_modules=["q_proj", "v_prj"]))
    )
    assert made.error is None
    heard = " ".join(str(w.message) for w in made.warnings)
    assert "v_prj" in heard and "v_proj" in heard


def test_wrong_target_comes_with_a_hint():
    with pytest.raises(graft.NoMatchingPeftModuleError, match="v_proj"):
        graft.get_peft_model(models.make("llama"), graft.LoraConfig(target_modules=["v_prj"]))


@pytest.mark.differs("gemma4's default targets")
def test_default_targets_that_are_a_pattern():
    """PEFT takes gemma4's regular expression apart into letters."""
    names = ["model.language_model.layers.0.q_proj", "model.vision.layers.0.q_proj"]
    model = graft.get_peft_model(tree(names, config=Config("gemma4")), graft.LoraConfig())
    assert list(model.targeted_module_names) == names[:1]


# planning


@law(
    "sample, meta",
    [Case((sample, meta)) for sample in SAMPLES for meta in (False, True)],
    lambda case: [(case[0].method, case[1]), (case[0].model, case[1]), Sometimes((case[0].method, case[0].name), 8)],
)
def test_plan_tells_what_injection_does(sample, meta):
    base = models.make(sample.model)
    if meta:
        base = base.to("meta")
    before, rng = {k: (v.shape, type(v)) for k, v in base.state_dict().items()}, torch.get_rng_state()
    plan = graft.plan(base, sample.config(graft))
    assert {k: (v.shape, type(v)) for k, v in base.state_dict().items()} == before
    assert not any(hasattr(m, "base_layer") for m in base.modules())
    assert torch.equal(torch.get_rng_state(), rng)

    model = adapt(graft, sample)
    assert [m.name for m in plan.matched] == list(model.targeted_module_names)
    if not (
        sample.kwargs.get("inference_mode") or sample.kwargs.get("bias") or sample.kwargs.get("trainable_token_indices")
    ):
        trains = model.get_nb_trainable_parameters()[0]  # AdaMSS has fewer where a cluster has few rows
        assert plan.trainable_parameters == trains or (sample.method == "ADAMSS" and plan.trainable_parameters > trains)
    assert all(m.name in str(plan) for m in plan.matched) or len(plan.matched) > 1


def test_plan_says_why_modules_are_skipped():
    plan = graft.plan(
        models.make("mlp"), graft.LoraConfig(target_modules=["fc1", "hed"], exclude_modules=["layers.0.fc1"])
    )
    assert [m.name for m in plan.matched] == ["layers.1.fc1", "layers.2.fc1"]
    assert any("layers.0.fc1" in str(s) for s in plan.skipped)
    assert "hed" in str(plan.unmatched_targets) and "head" in str(plan)


# files


def test_an_interrupted_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    import os

    sample = first("LORA")
    model = adapt(graft, sample)
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    randomize(model, sample)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, "rename", fail)
    refuses(OSError, "disk full", model.save_pretrained, tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before
    close_dicts(
        graft.get_peft_model_state_dict(graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)),
        graft.get_peft_model_state_dict(adapt(graft, sample)),
        0,
    )


def test_other_weights_of_the_same_architecture_warn(tmp_path):
    sample = first("LORA")
    adapt(graft, sample).save_pretrained(tmp_path)
    other = models.make("mlp")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.5)
    loaded = outcome(lambda: graft.PeftModel.from_pretrained(other, tmp_path))
    assert loaded.error is None and loaded.warned("weights")
    same = outcome(lambda: graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path))
    assert same.error is None and not same.warnings


def test_another_architecture_is_refused(tmp_path):
    sample = first("LORA")
    adapt(graft, sample).save_pretrained(tmp_path)
    other = models.make("mlp")
    other.layers[1].fc1 = nn.Linear(12, 26)
    other.layers[1].fc2 = nn.Linear(26, 12)
    with pytest.raises((graft.BaseModelMismatchError, graft.AdapterKeyError), match=r"layers\.1\.fc1"):
        graft.PeftModel.from_pretrained(other, tmp_path)


@over(each(models="mlp"))
def test_saving_and_loading_stay_off_the_network(sample, tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was asked"))
    adapt(graft, sample).save_pretrained(tmp_path)
    graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
