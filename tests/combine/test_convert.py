# SPDX-License-Identifier: Apache-2.0
"""An adapter of any method as plain LoRA: what a layer adds stays the same, or as near as the rank allows."""

import json

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.folding import why_no_delta
from tests import models
from tests.conformance.samples import CELLS, features
from tests.covering import law
from tests.models import seeded
from tests.pair import LIBS, close, outcome
from tests.raised import refuses, warns

T = ["lin0", "fc1", "fc2"]
CONVERTED = [  # methods that PEFT converts, and graft has
    ("LoHaConfig", dict(r=2)),
    ("VeraConfig", dict(r=5)),
    ("VBLoRAConfig", dict(r=2, num_vectors=6, vector_length=2)),
    ("MissConfig", dict(r=2, init_weights="bat")),
    ("LoraConfig", dict(r=4, lora_alpha=5)),
]


@torch.no_grad()
def moved(model, spread=0.3):
    """The model in eval mode, all that trains moved by values that depend on names only."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            with seeded(sum(map(ord, name))):
                p.add_(torch.randn(p.shape).to(p), alpha=spread)
    return model.eval()


def made(lib, config, base="mlp", **options):
    name, values = config
    model = models.make(base) if isinstance(base, str) else base
    targets = values.get("target_modules", T)
    with seeded(1):
        model = lib.get_peft_model(model, getattr(lib, name)(**{**values, "target_modules": targets}), **options)
    return moved(model)


def loha(lib=graft, base="mlp", **values):
    return made(lib, ("LoHaConfig", {"r": 2, **values}), base)


def put(config, tensors, base):
    """A fresh model with the converted adapter in it."""
    model = graft.get_peft_model(base, config)
    result = graft.set_peft_model_state_dict(model, tensors)
    assert not result.missing_keys and not result.unexpected_keys
    return model.eval()


def updates(tensors):
    """B A of each layer, by path."""
    found = {}
    for key, A in tensors.items():
        if ".lora_A." in key:
            B = tensors[key.replace("lora_A", "lora_B")]
            found[key.removeprefix("base_model.model.").partition(".lora_A")[0]] = B.flatten(1) @ A.flatten(1)
    return found


# of every method, on every layer


@pytest.mark.differs("converting to LoRA: which adapters")
@law("cell", CELLS, features)
def test_what_can_be_converted_acts_as_before(cell):
    model = cell.trained()
    layer, before = model.base_model.model.layer, {k: t.clone() for k, t in model.state_dict().items()}
    why = why_no_delta(layer.methods["default"])
    assert layer.supports_lora_conversion() == model.supports_lora_conversion() == (why is None)
    if why is not None:
        refuses(TypeError, "do not support LoRA conversion", graft.convert_to_lora, model, 1.0)
    else:
        config, tensors = graft.convert_to_lora(model, 1.0)
        new = put(config, tensors, cell.bare())
        expected = model(cell.inputs())
        assert_close(new(cell.inputs()), expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], t) for k, t in before.items())


MULTIPLY = {
    "OFTConfig": dict(oft_block_size=4),
    "BOFTConfig": dict(boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=1),
    "HRAConfig": dict(r=4),
    "IA3Config": dict(feedforward_modules=["fc2"]),
    "RoadConfig": dict(group_size=4),
}


@pytest.mark.parametrize("name", MULTIPLY)
def test_what_multiplies_the_weight_is_the_lora_that_is_merged(name):
    """Of the rank that the merged weights show: they, and not the method, are asked for ΔW."""
    model = made(graft, (name, MULTIPLY[name]))
    config, tensors = graft.convert_to_lora(model, 1.0)
    found = updates(tensors)
    before = {key: model.base_model.model.get_submodule(key).get_base_weight().clone() for key in found}
    merged = model.merge_and_unload()
    for key, W in before.items():
        delta = merged.get_submodule(key).weight - W
        close(found[key].view_as(delta), delta, 1e-5, key)
        assert config.at(key).r == max(1, torch.linalg.matrix_rank(delta, rtol=1e-5)), key


def test_what_a_low_rank_leaves_out_of_a_rotation_is_said():
    model = made(graft, ("OFTConfig", dict(oft_block_size=4)))
    warns(UserWarning, r"rank 1.*loses up to \d+ %|rank 1.*loses up to \d+%", graft.convert_to_lora, model, 1)


# the same as PEFT


@pytest.mark.parametrize("rank", [1, 3, 0.3, 0.9])
@pytest.mark.parametrize("config", CONVERTED, ids=lambda c: f"{c[0]}-{c[1]}")
def test_updates_and_ranks_are_pefts(config, rank):
    ours, theirs = (lib.convert_to_lora(made(lib, config), rank) for lib in LIBS)
    assert {k: t.shape for k, t in ours[1].items()} == {k: t.shape for k, t in theirs[1].items()}
    a, b = updates(ours[1]), updates(theirs[1])
    for key in b:
        close(a[key], b[key], 1e-4, key)


@pytest.mark.differs("converting to LoRA: MiSS: the rank")
@pytest.mark.parametrize("config", [dict(r=3), dict(r=2, init_weights="mini", mini_r=4)], ids=str)
def test_miss_is_exact_as_in_peft(config):
    """PEFT gives MiSS's own rank, whatever one asks for; graft the rank asked for."""
    ours, theirs = (lib.convert_to_lora(made(lib, ("MissConfig", config)), 3)[1] for lib in LIBS)
    a, b = updates(ours), updates(theirs)
    for key in b:
        close(a[key], b[key], 1e-5, key)
    small, theirs = (lib.convert_to_lora(made(lib, ("MissConfig", dict(r=3))), 2)[1] for lib in LIBS)
    key = "base_model.model.lin0.lora_A.weight"
    assert (len(small[key]), len(theirs[key])) == (2, 3)


CONFIGS = [
    dict(rank=3),
    dict(rank=0.8),
    dict(rank=0.8, modules_to_save=["head"]),
    dict(rank=2, base="llama", target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    dict(rank=2, base="bert-seq", target_modules=["query"], task_type="SEQ_CLS"),
]


@pytest.mark.differs("converting to LoRA: `target_modules` for an int rank")
@pytest.mark.differs("converting to LoRA: `task_type`")
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_config_and_keys_are_pefts(options):
    options = dict(options)
    rank, base = options.pop("rank"), options.pop("base", "mlp")
    (ours, a), (theirs, b) = (lib.convert_to_lora(loha(lib, base, **options), rank) for lib in LIBS)
    assert {k: (t.shape, t.dtype) for k, t in a.items()} == {k: (t.shape, t.dtype) for k, t in b.items()}
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "bias"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert sorted(ours.modules_to_save or []) == sorted(theirs.modules_to_save or [])
    for key in a:
        if ".lora_" not in key:
            close(a[key], b[key], 0, key)


@pytest.mark.differs("`save_as_lora`")
@pytest.mark.parametrize("adapter", ["default", "other"])
@pytest.mark.parametrize("rank", [4, 0.9])
def test_a_file_loads_in_both_and_has_no_readme(rank, adapter, tmp_path):
    model = loha(modules_to_save=["head"])
    model.add_adapter("other", graft.LoHaConfig(r=2, target_modules=["lin0", "layers.1.fc2"]))
    model.base_model.set_adapter(adapter)
    moved(model)
    folder = tmp_path / "new" / "folder"
    graft.save_as_lora(folder, model, rank, adapter)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA" and not stored["inference_mode"]
    outputs = [lib.PeftModel.from_pretrained(models.make("mlp"), folder).eval()(**models.inputs("mlp")) for lib in LIBS]
    close(outputs[0], outputs[1], 1e-5)
    if rank == 4:  # of 2², exact
        close(outputs[0], model(**models.inputs("mlp")), 1e-4)


# errors


FAILURES = {
    "a rank of 0": (dict(rank=0), "Passing a rank of 0 doesn't make sense"),
    "a threshold of 0": (dict(rank=0.0), "It must be between 0 and 1 but got 0.0"),
    "a negative threshold": (dict(rank=-0.5), "It must be between 0 and 1 but got -0.5"),
    "a threshold above 1": (dict(rank=1.5), "It must be between 0 and 1 but got 1.5"),
    "a rank too large": (
        dict(rank=123),
        "The chosen rank 123 is larger than the weight shape (10), please choose a lower",
    ),
    "no rank": (dict(rank="3"), ""),
    "no adapter": (
        dict(make=lambda lib: models.make("mlp")),
        "Could not detect any layer that supports LoRA conversion.",
    ),
    "a prompt": (
        dict(
            make=lambda lib: lib.get_peft_model(
                models.make("llama"), lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            )
        ),
        "Could not detect any layer that supports LoRA conversion.",
    ),
    "KaSA": (
        dict(make=lambda lib: made(lib, ("LoraConfig", dict(r=2, kasa_config=kasa(lib))))),
        "Some module types on this model do not support LoRA conversion",
    ),
    "biases": (dict(make=lambda lib: made(lib, ("VeraConfig", dict(r=2, bias="all")))), "sets bias=all, this is not"),
    "a layer that says no": (dict(make=lambda lib: refusing(loha(lib))), "do not support LoRA conversion"),
}


def kasa(lib):
    return lib.tuners.lora.config.KasaConfig() if lib is peft else lib.KasaConfig()


def refusing(model):
    model.base_model.model.layers[1].fc1.supports_lora_conversion = lambda *_: False
    return model


@pytest.mark.parametrize("case", FAILURES)
def test_errors_are_pefts(case, tmp_path):
    options, text = FAILURES[case]
    for name in ("convert_to_lora", "save_as_lora"):
        ours, theirs = (failed(lib, name, tmp_path, **options) for lib in LIBS)
        assert ours.kind is theirs.kind is not None
        assert text in str(ours.error) and text in str(theirs.error)
    assert not (tmp_path / "graft").exists()


def failed(lib, name, folder, make=loha, rank=2):
    where = (folder / lib.__name__,) if name == "save_as_lora" else ()
    model = make(lib)
    return outcome(lambda: getattr(lib, name)(*where, model, rank))


@pytest.mark.differs("converting to LoRA: negative ranks; True")
@pytest.mark.parametrize("rank", [True, -1, None])
def test_what_is_no_rank_is_refused(rank):
    refuses(ValueError, r"rank must be an int|rank of -1", graft.convert_to_lora, loha(), rank)


def test_an_adapter_that_is_not_loaded():
    refuses(graft.AdapterNotFoundError, "zz", graft.convert_to_lora, loha(), 2, "zz")
    assert not loha().supports_lora_conversion("zz")


def test_what_says_that_it_can_be_converted():
    for lib in LIBS:
        model = loha(lib)
        assert model.supports_lora_conversion() and model.base_model.supports_lora_conversion()
        assert model.base_model.model.lin0.supports_lora_conversion()
        assert not FAILURES["a prompt"][0]["make"](lib).supports_lora_conversion()
        other = FAILURES["KaSA"][0]["make"](lib)
        assert not other.supports_lora_conversion() and not other.base_model.supports_lora_conversion()


# beyond PEFT


def test_lora_again_says_so():
    for model, lib in [(made(lib, ("LoraConfig", dict(r=2))), lib) for lib in LIBS]:
        warns(UserWarning, "that is already a LoRA adapter", lib.convert_to_lora, model, 1)


@pytest.mark.parametrize("rank", [2, 5])
def test_no_product_of_that_rank_comes_closer(rank):
    model = loha(r=3)
    _, tensors = graft.convert_to_lora(model, rank)
    for key, made_of in updates(tensors).items():
        full = model.base_model.model.get_submodule(key).get_delta_weight("default").detach()
        lost = torch.linalg.svdvals(full.double())[rank:].square().sum()
        assert_close((made_of - full).double().square().sum(), lost, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_part_of_the_energy_takes_the_lowest_rank(share):
    model = loha(r=3)
    config, tensors = graft.convert_to_lora(model, share)
    for key in updates(tensors):
        S = torch.linalg.svdvals(
            model.base_model.model.get_submodule(key).get_delta_weight("default").detach().double()
        )
        energy, k = S.square().cumsum(0) / S.square().sum(), config.at(key).r
        assert energy[k - 1] >= share - 1e-6 and (k == 1 or energy[k - 2] < share)
        assert len(tensors[f"base_model.model.{key}.lora_A.weight"]) == k == config.at(key).lora_alpha


@pytest.mark.differs(
    "`convert_to_lora` of an adapter whose factors have the rank that the caller asks for (VeRA, LoRA, …)"
)
def test_factors_of_that_rank_are_taken_as_they_are():
    model = made(graft, ("VeraConfig", dict(r=5)))
    with torch.no_grad():
        expected = model.base_model.model.lin0.methods["default"].factors().matrices()
    _, tensors = graft.convert_to_lora(model, 5)
    for name, t in zip("AB", expected):
        assert torch.equal(tensors[f"base_model.model.lin0.lora_{name}.weight"], t)


def test_a_higher_rank_leaves_rows_that_can_learn():
    model = made(graft, ("VeraConfig", dict(r=2)))
    config, tensors = graft.convert_to_lora(model, 4)
    new = put(config, tensors, models.make("mlp"))
    close(new(**models.inputs("mlp")), model(**models.inputs("mlp")), 1e-5)
    new(**models.inputs("mlp")).square().mean().backward()
    B = new.base_model.model.lin0.lora_B["default"].weight
    assert (B.grad.norm(dim=0) > 0).all()


def test_an_adapter_that_does_nothing():
    with seeded(1):
        model = graft.get_peft_model(models.make("mlp"), graft.LoHaConfig(r=2, target_modules=T))
    for rank in (0.5, 1.0, 2):
        config, tensors = graft.convert_to_lora(model, rank)
        close(
            put(config, tensors, models.make("mlp"))(**models.inputs("mlp")), models.make("mlp")(**models.inputs("mlp"))
        )


@pytest.mark.differs("converting to LoRA: DoRA")
def test_dora_is_converted_with_its_magnitudes():
    """PEFT takes B A alone, which is another function."""
    x = models.inputs("mlp")
    distance = []
    for lib in LIBS:
        model = made(lib, ("LoraConfig", dict(r=2, lora_alpha=5, use_dora=True)))
        config, tensors = lib.convert_to_lora(model, 1.0)
        new = lib.get_peft_model(models.make("mlp"), config)
        lib.set_peft_model_state_dict(new, tensors)
        distance.append(float((new.eval()(**x) - model(**x)).detach().abs().max()))
    assert distance[0] < 1e-4 < 0.1 < distance[1]


@pytest.mark.differs("converting to LoRA: `lora_bias`")
def test_a_bias_of_b_comes_along():
    """PEFT drops it."""
    model = made(graft, ("LoraConfig", dict(r=2, lora_bias=True, target_modules=["lin0", "fc1"])))
    config, tensors = graft.convert_to_lora(model, 2)
    assert config.lora_bias
    close(put(config, tensors, models.make("mlp"))(**models.inputs("mlp")), model(**models.inputs("mlp")))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_in_half_precision(merged, dtype):
    model = loha(base=models.make("mlp").to(dtype))
    _, expected = graft.convert_to_lora(model, 3)
    if merged:
        model.merge_adapter()
    _, tensors = graft.convert_to_lora(model, 3)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert all(torch.equal(tensors[k], t) for k, t in expected.items())


def test_adapters_keep_a_dtype_that_they_were_given():
    model = made(graft, ("LoHaConfig", dict(r=2)), models.make("mlp").to(torch.bfloat16), autocast_adapter_dtype=False)
    _, tensors = graft.convert_to_lora(model, 3)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_in_training_nothing_random_is_taken_up():
    model = made(graft, ("LoHaConfig", dict(r=2, rank_dropout=0.5, module_dropout=0.5)))
    _, expected = graft.convert_to_lora(model, 3)
    _, tensors = graft.convert_to_lora(model.train(), 3)
    assert all(torch.equal(tensors[k], t) for k, t in expected.items())
    assert model.training and model.base_model.model.lin0.training


def test_a_compiled_model_and_the_result_compiled(tmp_path):
    model = loha()
    graft.save_as_lora(tmp_path, torch.compile(model, backend="eager"), 4)
    new = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path, low_cpu_mem_usage=True).eval()
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    close(compiled(**models.inputs("mlp")), model(**models.inputs("mlp")), 1e-4)


def test_beside_other_adapters(tmp_path):
    """Converted adapters are LoRA adapters like others: two at once, mixed batches, merged."""
    model = loha()
    graft.save_as_lora(tmp_path, model, 4)
    base = graft.get_peft_model(models.make("mlp"), graft.LoraConfig(r=2, target_modules=["lin0"]), "own")
    moved(base).load_adapter(tmp_path, "converted")
    x = models.inputs("mlp")
    base.set_adapter("converted")
    close(base(**x), model(**x), 1e-4)
    base.base_model.set_adapter(["own", "converted"])
    expected = base(**x)
    base.merge_adapter()
    close(base(**x), expected, 1e-4)


def test_tensors_are_copies():
    model = made(graft, ("LoraConfig", dict(r=2, modules_to_save=["head"])))
    _, tensors = graft.convert_to_lora(model, 2)
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not storages & {t.untyped_storage().data_ptr() for t in tensors.values()}


class Nested(nn.Module):
    """A path that is the end of another."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"lin": nn.Linear(6, 6)})

    def forward(self, x):
        return self.block["lin"](torch.tanh(self.lin(x)))


def nested():
    with seeded(0):
        return Nested()


@pytest.mark.differs(
    "converting to LoRA: `rank_pattern` where one layer's path ends with another's; `exclude_modules` as a regular "
    "expression; an adapter that is not on all layers"
)
@pytest.mark.parametrize("low, targets", [("lin", ["lin"]), ("block.lin", ["lin"]), ("lin", "lin")])
def test_patterns_and_targets_tell_paths_apart(low, targets):
    """PEFT's pattern "lin" gives "block.lin" the rank of "lin", so that the tensors do not fit."""
    model = made(graft, ("LoHaConfig", dict(r=2, target_modules=targets)), nested())
    with torch.no_grad():
        layer = model.base_model.model.get_submodule(low).methods["default"]
        layer.hada_w1_a[:, 1:] = layer.hada_w2_a[:, 1:] = 0  # of rank 1
    config, tensors = graft.convert_to_lora(model, 1.0)
    x = torch.randn(3, 6)
    close(put(config, tensors, nested())(x), model(x), 1e-4)


def test_excluded_by_a_regular_expression():
    """PEFT loses the expression and targets all of them."""
    values = dict(r=2, target_modules=r".*(q_proj|v_proj)", exclude_modules=r".*0.*")
    model = made(graft, ("LoHaConfig", values), "llama")
    config, tensors = graft.convert_to_lora(model, 0.5)
    new = put(config, tensors, models.make("llama"))
    assert {k for k in new.base_model.targeted_module_names} == set(model.base_model.targeted_module_names)


def test_models_without_a_peft_model_have_keys_without_a_prefix():
    ours, theirs = (
        lib.convert_to_lora(
            moved(lib.inject_adapter_in_model(lib.LoHaConfig(r=2, target_modules=T), models.make("mlp"))), 2
        )
        for lib in LIBS
    )
    assert ours[1].keys() == theirs[1].keys()
    ours, theirs = (lib.convert_to_lora(loha(lib).base_model, 2) for lib in LIBS)
    assert ours[1].keys() == theirs[1].keys()


@pytest.mark.differs("converting to LoRA: PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ")
def test_a_changed_base_is_said():
    model = made(graft, ("LoraConfig", dict(r=2, init_lora_weights="pissa")))
    result = outcome(lambda: graft.convert_to_lora(model, 2))
    assert result.warned("so that the plain LoRA will not fit a fresh base")
    config, tensors = result.value
    base = made(graft, ("LoraConfig", dict(r=2, init_lora_weights="pissa"))).unload()
    close(put(config, tensors, base)(**models.inputs("mlp")), model(**models.inputs("mlp")), 1e-4)


@pytest.mark.differs("converting to LoRA: trainable token rows")
def test_token_rows_come_along():
    values = dict(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    model = made(graft, ("LoraConfig", values), "llama")
    config, tensors = graft.convert_to_lora(model, 2)
    batch = models.inputs("llama")
    close(put(config, tensors, models.make("llama"))(**batch).logits, model(**batch).logits, 1e-4)


def test_in_a_mixed_model():
    model = graft.get_peft_model(models.make("mlp"), graft.HiraConfig(r=2, target_modules=T), "a", mixed=True)
    model.add_adapter("b", graft.LilyConfig(r=2, num_B=2, stride_A=1, target_modules=["lin0"]))
    moved(model)
    config, tensors = graft.convert_to_lora(model, 1.0, "a")
    close(put(config, tensors, models.make("mlp"))(**models.inputs("mlp")), model(**models.inputs("mlp")), 1e-3)
    refuses(TypeError, "Lily", graft.convert_to_lora, model, 1.0, "b")


def test_progress_and_compilation(capsys):
    model = loha()
    expected = graft.convert_to_lora(model, 3)[1]
    seen = graft.convert_to_lora(model, 3, progressbar=True, compile_kwargs={"backend": "eager"})[1]
    assert "Converting to LoRA" in capsys.readouterr().err
    for key, t in updates(expected).items():
        close(updates(seen)[key], t)
