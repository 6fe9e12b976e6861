# SPDX-License-Identifier: Apache-2.0
"""Bad input: a specific exception that names adapter, layer and remedy, and a model left as it was."""

import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.serving.hotswap import hotswap_adapter_from_state_dict
from tests import models
from tests.covering import law, product
from tests.pair import adapt, output, randomize
from tests.raised import refuses, warns
from tests.samples import each, first, mergeable

pytestmark = pytest.mark.graft_only

LORA, HEAD = first("LORA"), first("LORA", "mlp", "head")
MLP = each(models="mlp")


def snapshot(model, run):
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "identity": {n: id(p) for n, p in model.named_parameters()},
        "trainable": {n: p.requires_grad for n, p in model.named_parameters()},
        "modules": {n: (type(m), m.training) for n, m in model.named_modules()},
        "adapters": (list(getattr(model, "peft_config", {})), list(getattr(model, "active_adapters", []) or [])),
        "output": run(model),
    }


@contextmanager
def refused(model, error, *words, run=lambda m: output(m, LORA)):
    """The block raises `error`, its text holds all the words, and the model is as before."""
    before = snapshot(model, run)
    with pytest.raises(error) as raised:
        yield
    text = str(raised.value)
    for word in words:
        assert word in text, text
    after = snapshot(model, run)
    assert torch.equal(after.pop("output"), before.pop("output"))
    tensors = before.pop("tensors")
    assert all(torch.equal(t, tensors[k]) for k, t in after.pop("tensors").items())
    assert after == before


def lora(**config):
    return graft.LoraConfig(**{"target_modules": ["fc1"], "r": 3, **config})


# targets

INJECTIONS = {
    "wrong_target": (dict(target_modules=["fc3"]), graft.NoMatchingPeftModuleError, ["fc3", "fc1"]),
    "wrong_regex": (dict(target_modules="fc9.*"), graft.NoMatchingPeftModuleError, ["fc9.*"]),
    "wrong_layer": (dict(layers_to_transform=[99], layers_pattern="layers"), graft.NoMatchingPeftModuleError, ["99"]),
    "empty_targets": (dict(target_modules=[]), graft.NoMatchingPeftModuleError, ["target_modules"]),
    "no_targets": (dict(target_modules=None), ValueError, ["target_modules"]),
    "broken_regex": (dict(target_modules="fc(1"), graft.ConfigError, ["fc(1"]),
    "norm": (
        dict(target_modules=["fc1", "norm"]),
        graft.UnsupportedLayerError,
        ["default", "layers.0.norm", "LayerNorm"],
    ),
    "container": (dict(target_modules=["layers"]), graft.UnsupportedLayerError, ["default", "layers", "ModuleList"]),
    "saved_container": (dict(target_modules=["lin0"], modules_to_save=["layers"]), TypeError, ["layers", "ModuleList"]),
    "all_excluded": (dict(exclude_modules=r".*"), graft.NoMatchingPeftModuleError, ["exclude_modules"]),
    "zero_rank": (dict(r=0), graft.ConfigError, ["`r`", "0", "positive"]),
    "negative_rank": (dict(r=-4), graft.ConfigError, ["`r`", "-4", "positive"]),
    "zero_rank_of_one_layer": (dict(rank_pattern={"layers.2.fc1": 0}), graft.ConfigError, ["`r`", "0", "layers.2.fc1"]),
    "unknown_init": (dict(init_lora_weights="xavier"), graft.ConfigError, ["xavier", "gaussian"]),
    "odd_orthogonal": (dict(init_lora_weights="orthogonal"), graft.ConfigError, ["even", "3"]),
    "unknown_bias": (dict(bias="some"), NotImplementedError, ["some", "none"]),
    "tokens_of_nothing": (dict(trainable_token_indices={"wte": [1]}), ValueError, ["wte"]),
}


@pytest.mark.differs("a failed `get_peft_model`, `add_adapter`, load")
@pytest.mark.parametrize("case", INJECTIONS)
def test_injection(case):
    config, error, words = INJECTIONS[case]
    model = models.make("mlp")
    with refused(model, error, *words):
        graft.get_peft_model(model, lora(**config))
    with refused(model, error, *words):
        graft.inject_adapter_in_model(lora(**config), model)
    adapted = adapt(graft, LORA, base=model)
    with refused(adapted, error, *(w.replace("default", "second") for w in words)):
        adapted.add_adapter("second", lora(**config))


@pytest.mark.differs("`token_indices` that are empty, negative or beyond the table")
@pytest.mark.parametrize("indices, error, text", [
    ([], graft.ConfigError, "token_indices is empty. Name the tokens of 'emb' to train"),
    ([2, 23], graft.UnsupportedLayerError, "Token indices [23] are outside its 23 rows"),
    ([2, -1], graft.UnsupportedLayerError, "Token indices [-1] are outside its 23 rows"),
])  # fmt: skip
def test_rows_that_a_table_lacks(indices, error, text):
    """PEFT trains no row, fails with an IndexError, and counts from the end."""
    model, run = models.make("embedding"), lambda m: models.output(m, models.inputs("embedding"))
    with refused(model, error, text, run=run):
        graft.get_peft_model(model, graft.TrainableTokensConfig(token_indices=indices, target_modules=["emb"]))
    if indices:
        with refused(model, graft.ConfigError, text, run=run):
            graft.get_peft_model(
                model, graft.LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": indices})
            )


@pytest.mark.parametrize("targets", ["all-linear", [""]])
def test_a_layer_that_stands_alone(targets):
    layer, config, words = nn.Linear(4, 4), graft.LoraConfig(target_modules=targets), ("no modules in it", "Sequential")
    with refused(layer, graft.NoMatchingPeftModuleError, *words, run=lambda m: m(torch.ones(4))):
        graft.get_peft_model(layer, config)
    graft.get_peft_model(nn.Sequential(layer), graft.LoraConfig(target_modules="all-linear"))


OTHER_RANKS = {
    "VeraConfig": dict(r=0), "LoHaConfig": dict(r=0), "HRAConfig": dict(r=-1), "OFTConfig": dict(r=0, oft_block_size=0),
    "HiraConfig": dict(r=0), "MissConfig": dict(r=0), "VBLoRAConfig": dict(r=0, vector_length=2),
    "GraloraConfig": dict(r=0), "DeloraConfig": dict(r=0), "LoKrConfig": dict(r=0),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_RANKS)
def test_ranks_of_other_methods(name):
    model = models.make("mlp")
    with refused(model, graft.ConfigError, "r"):
        graft.get_peft_model(model, getattr(graft, name)(target_modules=["fc1"], **OTHER_RANKS[name]))


@pytest.mark.parametrize("sample", MLP, ids=str)
def test_wrong_target_of_every_method(sample):
    model = models.make("mlp")
    extra = {"feedforward_modules": []} if sample.method == "IA3" else {}
    with refused(model, graft.NoMatchingPeftModuleError, "lin1", "lin0"):
        graft.get_peft_model(model, sample.config(graft, target_modules=["lin1"], **extra))


# configurations

WRONG_TYPES = {
    "r": "8",
    "lora_alpha": "x",
    "lora_dropout": "0.1",
    "target_modules": 3,
    "use_rslora": "yes",
    "rank_pattern": ["fc1"],
    "layers_to_transform": "1",
    "modules_to_save": 5,
}


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_field_of_the_wrong_type(field):
    model = models.make("mlp")
    with refused(model, graft.ConfigTypeError, field):
        graft.get_peft_model(model, lora(**{field: WRONG_TYPES[field]}))


def test_dropout_out_of_range():
    model = models.make("mlp")
    with refused(model, ValueError, "dropout", "1.5"):
        graft.get_peft_model(model, lora(lora_dropout=1.5))


@pytest.mark.differs("r ≤ 0, a dropout outside [0, 1], a number that is not finite, wrong types in a config")
@pytest.mark.parametrize(
    "config, field, value",
    [
        (graft.LoHaConfig, "module_dropout", 7.0),
        (graft.LoHaConfig, "rank_dropout", -0.1),
        (graft.OFTConfig, "module_dropout", -3.0),
        (graft.VeraConfig, "vera_dropout", -0.5),
        (graft.LoraConfig, "lora_alpha", float("nan")),
        (graft.OFTConfig, "eps", float("inf")),
    ],
)
def test_numbers_that_no_formula_can_do_with(config, field, value):
    with pytest.raises(graft.ConfigError, match=rf"`{field}` must be a (probability|finite number).*got {value}"):
        config(**{field: value})


def test_unknown_field_and_types():
    refuses(TypeError, "rnak", lora, rnak=3)
    refuses(ValueError, r"XX.*SEQ_CLS", lora, task_type="XX")
    refuses((ValueError, KeyError), r"WHAT.*LORA", graft.get_peft_config, {"peft_type": "WHAT"})


def test_unknown_peft_type_in_a_file(tmp_path):
    adapt(graft, LORA).save_pretrained(tmp_path)
    rewrite(tmp_path, peft_type="WHAT")
    model = models.make("mlp")
    with refused(model, (ValueError, KeyError), "WHAT", "LORA"):
        graft.PeftModel.from_pretrained(model, tmp_path)


def rewrite(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# names


@pytest.mark.differs("adapter names with a slash, and `__base__`")
@pytest.mark.parametrize("name", ["a.b", "", ".", "a.", "../up", "keys", "training"])
def test_impossible_adapter_names(name):
    model = models.make("mlp")
    with refused(model, graft.AdapterNameError, "name"):
        graft.get_peft_model(model, lora(), name)
    adapted = adapt(graft, LORA, base=model)
    with refused(adapted, graft.AdapterNameError, "name"):
        adapted.add_adapter(name, lora())


def test_name_that_means_no_adapter():
    """`__base__` stands for the base in mixed batches."""
    model = models.make("mlp")
    with refused(model, graft.AdapterNameError, "__base__"):
        graft.get_peft_model(model, lora(), "__base__")


@pytest.mark.parametrize("sample", MLP, ids=str)
def test_taken_adapter_name(sample):
    model = randomize(adapt(graft, sample), sample).eval()
    with refused(model, graft.AdapterNameError, "default", "already exists"):
        model.add_adapter("default", sample.config(graft))


@pytest.mark.parametrize("sample", MLP, ids=str)
@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_unknown_adapter(sample, call):
    model = randomize(adapt(graft, sample), sample).eval()
    with refused(model, graft.AdapterNotFoundError, "nope", "default"):
        getattr(model, call)("nope")


def test_unknown_adapter_elsewhere(tmp_path):
    model = randomize(adapt(graft, LORA), LORA).eval()
    for call in (
        lambda: model.merge_adapter(adapter_names=["nope"]),
        lambda: model.save_pretrained(tmp_path, selected_adapters=["nope"]),
        lambda: model.set_requires_grad("nope"),
        lambda: model.base_model.set_adapter(["default", "nope"]),
        lambda: graft.get_peft_model_state_dict(model, adapter_name="nope"),
    ):
        with refused(model, ValueError, "nope"):
            call()


def test_other_method():
    model = randomize(adapt(graft, LORA), LORA).eval()
    with refused(model, ValueError, "LORA", "VERA"):
        model.add_adapter("b", first("VERA").config(graft))


# twice


@pytest.mark.differs("`get_peft_model` on a model that has adapters")
@pytest.mark.parametrize("sample", MLP, ids=str)
def test_second_injection(sample):
    model = randomize(adapt(graft, sample), sample).eval()
    for name, remedy in (("default", "delete_adapter"), ("second", "add_adapter")):
        with refused(model, (ValueError, RuntimeError), remedy):
            graft.get_peft_model(model, sample.config(graft), name)
        with refused(model, (ValueError, RuntimeError), remedy):
            graft.get_peft_model(model.base_model.model, sample.config(graft), name)


@pytest.mark.parametrize("sample", mergeable(MLP), ids=str)
def test_merging_twice(sample):
    """A second merge must not add the update again."""
    model = randomize(adapt(graft, sample), sample).eval()
    model.merge_adapter()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    warns(UserWarning, "already merged", model.merge_adapter)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("sample", mergeable(MLP), ids=str)
def test_delete_while_merged(sample):
    model = randomize(adapt(graft, sample), sample).eval()
    model.merge_adapter()
    with refused(model, ValueError, "default", "unmerge"):
        model.delete_adapter("default")


def test_merge_that_cannot_be():
    """One layer of several refuses: none is merged."""
    sample = first("LORA", "conv2d", "grouped")
    model = models.make("conv2d")
    model = graft.get_peft_model(model, graft.LoraConfig(r=4, target_modules=["conv", "grouped", "lin"]))
    randomize(model, sample).eval()
    with refused(model, NotImplementedError, "grouped", run=lambda m: output(m, sample)):
        model.merge_adapter()


# mixed batches

ROWS = {
    "unknown": (["default", "nope", "b"], graft.RoutingError, ["nope", "default", "b"]),
    "too_few": (["default", "b"], graft.RoutingError, ["2", "3"]),
    "too_many": (["default"] * 4, graft.RoutingError, ["4", "3"]),
}


@law("sample, case", product([*MLP, HEAD], ROWS), lambda c: [str(c[0]), c[1]])
def test_mixed_batches(sample, case):
    names, error, words = ROWS[case]
    model = adapt(graft, sample)
    model.add_adapter("b", sample.config(graft))
    randomize(model, sample).eval()
    with refused(model, error, *words):
        output(model, sample, adapter_names=names)


@pytest.mark.parametrize("sample", mergeable(MLP), ids=str)
def test_mixed_batch_while_merged(sample):
    model = randomize(adapt(graft, sample), sample).eval()
    model.merge_adapter()
    with refused(model, graft.RoutingError, "unmerge_adapter"):
        output(model, sample, adapter_names=["default", "__base__", "default"])


def test_error_inside_a_mixed_batch_leaves_no_rows_behind():
    model = adapt(graft, LORA)
    model.add_adapter("b", LORA.config(graft))
    randomize(model, LORA).eval()
    with refused(model, RuntimeError):
        model(x=torch.ones(3, 4, 11), adapter_names=["default", "b", "b"])


# files


@pytest.fixture
def saved(tmp_path):
    randomize(adapt(graft, LORA), LORA).save_pretrained(tmp_path)
    return tmp_path


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def corrupt(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def empty(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"")


def no_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def no_config(folder):
    (folder / "adapter_config.json").unlink()


def bad_json(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", ')


def bad_bin(folder):
    """A pickle that would run code is not run."""
    (folder / "adapter_model.safetensors").unlink()
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "owned"), "w"))

    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": Evil()}))


def narrow(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.layers.1.fc1.lora_A.weight"
    save_file({**tensors, key: tensors[key][:, 1:].contiguous()}, path)


def other_method(folder):
    adapt(graft, first("LOHA")).save_pretrained(folder / "other")
    (folder / "other" / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")


def other_rank(folder):
    rewrite(folder, r=7)


FILES = {
    cut: (graft.CheckpointError, ["adapter_model.safetensors"]),
    corrupt: (graft.CheckpointError, ["adapter_model.safetensors"]),
    empty: (graft.CheckpointError, ["adapter_model.safetensors"]),
    no_weights: (ValueError, ["adapter_model.safetensors"]),
    no_config: (ValueError, ["adapter_config.json"]),
    bad_json: (ValueError, ["adapter_config.json"]),
    bad_bin: (ValueError, ["adapter_model.bin"]),
    narrow: (RuntimeError, ["layers.1.fc1", "lora_A", "(3, 11)", "(3, 12)"]),
    other_method: (graft.AdapterKeyError, ["hada_", "lora_"]),
    other_rank: (RuntimeError, ["lora_A", "(3, ", "(7, "]),
}


@pytest.mark.parametrize("spoil", FILES, ids=lambda f: f.__name__)
def test_files(spoil, saved):
    error, words = FILES[spoil]
    spoil(saved)
    model = models.make("mlp")
    with refused(model, error, *words):
        graft.PeftModel.from_pretrained(model, saved)
    adapted = randomize(adapt(graft, LORA), LORA).eval()
    with refused(adapted, error, *words):
        adapted.load_adapter(saved, "second")
    assert not (saved / "owned").exists()


@pytest.mark.parametrize("place", ["nowhere", "nowhere/at all"])
def test_missing_folder(place, tmp_path):
    model = models.make("mlp")
    with refused(model, ValueError, "adapter_config.json", place):
        graft.PeftModel.from_pretrained(model, tmp_path / place)


def test_load_over_an_adapter_of_another_shape(saved):
    """Loading into a name that is taken replaces its values, or nothing."""
    model = graft.get_peft_model(models.make("mlp"), lora(r=5, target_modules=LORA.kwargs["target_modules"]))
    randomize(model, LORA).eval()
    with refused(model, RuntimeError, "lora_A", "default"):
        model.load_adapter(saved, "default")


def test_checkpoint_of_another_method_beside_an_adapter(tmp_path):
    adapt(graft, first("LOHA")).save_pretrained(tmp_path)
    model = randomize(adapt(graft, LORA), LORA).eval()
    with refused(model, ValueError, "LORA", "LOHA"):
        model.load_adapter(tmp_path, "b")


def test_wrong_base(saved):
    """Layers of another width, layers under other names, no such layers."""
    wide = models.make("mlp")
    wide.layers[2].fc1, wide.layers[2].fc2 = nn.Linear(12, 30), nn.Linear(30, 12)
    with refused(wide, (graft.BaseModelMismatchError, graft.AdapterKeyError), "layers.2.fc1"):
        graft.PeftModel.from_pretrained(wide, saved)
    short = models.make("mlp")
    short.layers = short.layers[:2]
    with refused(short, (graft.BaseModelMismatchError, graft.AdapterKeyError), "layers.2.fc1"):
        graft.PeftModel.from_pretrained(short, saved)
    other = models.make("conv1d")
    run = lambda m: models.output(m, models.inputs("conv1d"))
    with refused(other, ValueError, "fc1", run=run):
        graft.PeftModel.from_pretrained(other, saved)


def test_saving_to_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    model = adapt(graft, LORA).eval()
    with refused(model, (ValueError, AssertionError), "directory"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


# things of other kinds in the place of a config or a model

CONFIGS = {
    "theirs": (lambda: peft.LoraConfig(target_modules=["fc1"]), "LoraConfig of another package. graft.get_peft_config"),
    "prompt": (lambda: peft.PromptTuningConfig(num_virtual_tokens=2), "PromptTuningConfig of another package. graft."),
    "dict": (lambda: {"r": 3, "target_modules": ["fc1"]}, "dict. graft.get_peft_config(config) makes one"),
    "text": (lambda: "LORA", "str. Make one, such as graft.LoraConfig"),
    "nothing": (lambda: None, "NoneType. Make one"),
    "class": (lambda: graft.LoraConfig, "LoraConfig. Call the class"),
}
TAKE_CONFIGS = {
    "get_peft_model": lambda model, config, folder: graft.get_peft_model(model, config),
    "mixed": lambda model, config, folder: graft.get_peft_model(model, config, mixed=True),
    "PeftModel": lambda model, config, folder: graft.PeftModel(model, config),
    "PeftMixedModel": lambda model, config, folder: graft.PeftMixedModel(model, config),
    "inject": lambda model, config, folder: graft.inject_adapter_in_model(config, model),
    "plan": lambda model, config, folder: graft.plan(model, config),
    "suggest_lr": lambda model, config, folder: graft.suggest_lr(config),
    "from_pretrained": lambda model, config, folder: graft.PeftModel.from_pretrained(model, folder, config=config),
    "corda": lambda model, config, folder: graft.preprocess_corda(model, config, print),
    "loraga": lambda model, config, folder: graft.preprocess_loraga(model, config, print),
    "lorasb": lambda model, config, folder: graft.preprocess_lorasb(model, config, print, 0.1),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("door", TAKE_CONFIGS)
def test_what_is_no_config(door, kind, tmp_path):
    """The error says what came, and what to give."""
    make, text = CONFIGS[kind]
    model = models.make("mlp")
    if door == "from_pretrained":
        if kind == "nothing":
            return  # then the file's
        adapt(graft, LORA).save_pretrained(tmp_path)
    with refused(model, (TypeError, ValueError), f"must be a PeftConfig, got {text}"):
        TAKE_CONFIGS[door](model, make(), tmp_path)
    if door == "get_peft_model":
        adapted = adapt(graft, LORA, base=model)
        with refused(adapted, TypeError, f"must be a PeftConfig, got {text}"):
            adapted.add_adapter("second", make())


def with_theirs():
    return peft.get_peft_model(models.make("mlp"), peft.LoraConfig(target_modules=["fc1"]))


WEIGHT = "base_model.model.lin0.lora_A.weight"
NO_TENSORS = [None, [(WEIGHT, torch.ones(1))], {1: torch.ones(1)}, {WEIGHT: [1.0]}, {WEIGHT: None},
              {WEIGHT: torch.ones(2, 2).numpy()}]  # fmt: skip


@pytest.mark.parametrize("tensors", NO_TENSORS, ids=["none", "pairs", "number", "list", "nothing", "numpy"])
@pytest.mark.parametrize("take", [
    lambda model, tensors: graft.set_peft_model_state_dict(model, tensors),
    lambda model, tensors: hotswap_adapter_from_state_dict(model, tensors, "default", lora()),
], ids=["set", "hot-swap"])  # fmt: skip
def test_what_is_no_state_dict(take, tensors):
    model = adapt(graft, LORA)
    with refused(model, graft.CheckpointError, "the given state dict does not hold a dict of tensors by name"):
        take(model, tensors)


@pytest.mark.parametrize("tensors", [{}, {"zz.lora_A.weight": torch.ones(2, 2)}], ids=["empty", "foreign"])
def test_a_state_dict_that_adapts_nothing(tensors):
    base = models.make("mlp")
    with refused(base, graft.NoMatchingPeftModuleError, "no tensor of adapter 'default' for a module of this model"):
        graft.inject_adapter_in_model(lora(), base, state_dict=tensors)


def test_a_folder_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("default", "other"):
        with refused(adapt(graft, LORA, name), FileNotFoundError, "has an empty name. Pass a path"):
            adapt(graft, LORA, name).save_pretrained("")
    assert not [*tmp_path.iterdir()]


MODELS = {
    "theirs": (with_theirs, graft.AlreadyInjectedError, "['default'] of another package, as PEFT. Take them off"),
    "in theirs": (lambda: with_theirs().base_model.model, graft.AlreadyInjectedError, "of another package"),
    "name": (lambda: "gpt2", TypeError, "A model has to be a torch.nn.Module, got 'gpt2'. Load it first"),
    "nothing": (lambda: None, TypeError, "A model has to be a torch.nn.Module, got None"),
    "object": (lambda: SimpleNamespace(config=1), TypeError, "torch.nn.Module, got namespace(config=1). Load it first"),
    "class": (lambda: nn.Linear, TypeError, "got the class Linear. Make an object of it"),
}
TAKE_MODELS = {
    "get_peft_model": lambda model, folder: graft.get_peft_model(model, lora()),
    "inject": lambda model, folder: graft.inject_adapter_in_model(lora(), model),
    "plan": lambda model, folder: graft.plan(model, lora()),
    "from_pretrained": lambda model, folder: graft.PeftModel.from_pretrained(model, folder),
    "load_adapter": lambda model, folder: graft.load_adapter(model, folder),
    "audit": lambda model, folder: graft.audit(model),
    "state dict": lambda model, folder: graft.get_peft_model_state_dict(model),
    "set state dict": lambda model, folder: graft.set_peft_model_state_dict(model, {}),
    "tensors": lambda model, folder: graft.adapter_tensors(model),
    "layer status": lambda model, folder: graft.get_layer_status(model),
    "model status": lambda model, folder: graft.get_model_status(model),
    "merge report": lambda model, folder: graft.merge_report(model),
    "convert": lambda model, folder: graft.convert_to_lora(model),
    "hot-swap": lambda model, folder: graft.hotswap_adapter(model, folder, "default"),
    "compiled": lambda model, folder: graft.prepare_model_for_compiled_hotswap(model),
}
TAKE_BASES = {
    "4 bits": lambda model, folder: graft.prepare_model_for_kbit_training(model),
    "cast": lambda model, folder: graft.cast_mixed_precision_params(model, torch.bfloat16),
    "kappa": lambda model, folder: graft.find_kappa_target_modules(model),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("door", [*TAKE_MODELS, *TAKE_BASES])
def test_what_is_no_model(door, kind, tmp_path):
    """The error says what came, and what to give; another package's adapters stay as they are."""
    make, error, text = MODELS[kind]
    if door in TAKE_BASES and "theirs" in kind:
        return
    adapt(graft, LORA).save_pretrained(tmp_path)
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()} if isinstance(model, nn.Module) else {}
    refuses(error, re.escape(text), (TAKE_MODELS | TAKE_BASES)[door], model, tmp_path)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
