# SPDX-License-Identifier: Apache-2.0
"""Files of adapters: whole or not there, read with suspicion, every key accounted for."""

import copy
import json
import os
import pickle
import socket
import sys
import warnings
from contextlib import nullcontext

import peft
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graft
import graft.io.files
from graft.io.fingerprint import KEY
from tests import models
from tests.looks import layers
from tests.models import adapted, disturb, seeded
from tests.raised import refuses, warns

CONFIG, TENSORS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
X = models.inputs("mlp")["x"]


def config(**options):
    return graft.LoraConfig(**{"target_modules": ["lin0", "fc1"], "r": 2, "lora_alpha": 6, **options})


def mlp_with(*names, base=None, number=1, **options):
    """A model with disturbed adapters of these names."""
    base = models.make("mlp") if base is None else base
    configs = dict.fromkeys(names or ["default"], config(**options))
    return adapted(base, configs, seed=number, scale=0.3 * number)


def load(folder, name="default", base=None, **options):
    return graft.PeftModel.from_pretrained(models.make("mlp") if base is None else base, folder, name, **options)


def snapshot(model):
    """All that a failed call must leave as it was."""
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    flags = {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()}
    modes = {name: (type(m), m.training) for name, m in model.named_modules()}
    configs = {n: c.to_dict() for n, c in model.peft_config.items()} if hasattr(model, "peft_config") else None
    return tensors, flags, modes, configs


def unchanged(model, before):
    tensors, *rest = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(t, before[0][name]) for name, t in tensors.items())
    assert rest == list(before[1:])


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder, tensors, metadata=None):
    new = folder / "new"  # in the place of the old file, of which tensors may be views
    safetensors.torch.save_file(tensors, new, metadata={"format": "pt", **(metadata or {})})
    new.replace(folder / TENSORS)


@pytest.fixture
def saved(tmp_path):
    mlp_with().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def quiet():
    """No warning of graft's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", graft.PeftWarning)
        yield


# writing


def test_what_is_written(tmp_path):
    model = mlp_with("default", "other")
    model.save_pretrained(tmp_path)
    names = {CONFIG, TENSORS, "README.md"}
    assert set(files(tmp_path)) == names | {f"other/{name}" for name in names - {"README.md"}}
    with safe_open(tmp_path / TENSORS, "pt") as f:
        assert f.metadata()["format"] == "pt" and json.loads(f.metadata()[KEY])["n"] == 4
        keys = list(f.keys())
    assert "base_model.model.lin0.lora_A.weight" in keys and len(keys) == 8
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["inference_mode"] is True and written["peft_type"] == "LORA"
    assert list(written) == sorted(written)
    assert all(not c.inference_mode for c in model.peft_config.values()), "the model still trains"


def test_a_process_alone_looks_for_no_stages(tmp_path):
    """Saving and loading a whole model asks once whether other processes hold parts of it, and nothing of stages."""
    asked = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.endswith(os.path.join("inject", "stage.py")):
            asked.append(frame.f_code.co_name)

    model = mlp_with()
    sys.setprofile(note)
    try:
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "again")
    finally:
        sys.setprofile(None)
    assert asked == ["find_team", "draw_alike"] and "again" in model.peft_config


def test_selected_adapters_and_sub_folders(tmp_path):
    model = mlp_with("first", "second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert set(files(tmp_path)) == {"README.md", f"second/{CONFIG}", f"second/{TENSORS}"}
    model.set_adapter("second")
    for loaded in (load(tmp_path / "second"), load(tmp_path, subfolder="second")):
        assert torch.equal(loaded(X), model(X))
    with pytest.raises(ValueError, match=r"selected_adapters.*\['first', 'second'\].*\['zz'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["zz"])
    refuses(ValueError, "should be a directory, not a file", model.save_pretrained, tmp_path / "README.md")


def test_only_the_main_process_writes(tmp_path):
    mlp_with().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


class Failure(Exception):
    pass


def fail_at(monkeypatch, number):
    """Let the rename of that number fail. Returns the list of renames."""
    done, real = [], os.replace

    def replace(source, target, **options):
        done.append(os.path.basename(target))
        if len(done) == number:
            raise Failure(target)
        real(source, target, **options)

    monkeypatch.setattr(os, "replace", replace)
    return done


@pytest.mark.parametrize("number", [1, 2])
def test_a_save_that_fails_at_a_rename_leaves_the_old_files(saved, monkeypatch, number):
    before, expected = files(saved), load(saved)(X)
    other = mlp_with(number=2, r=3)
    with monkeypatch.context() as patch:
        fail_at(patch, number)
        refuses(Failure, None, other.save_pretrained, saved)
    assert files(saved) == before
    assert torch.equal(load(saved)(X), expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_save_that_fails_while_writing_tensors_leaves_the_old_files(tmp_path, monkeypatch, safe):
    mlp_with().save_pretrained(tmp_path, safe_serialization=safe)
    before = files(tmp_path)

    def half(first, second, *_):
        with open(first, "wb") if safe else nullcontext(second) as f:
            f.write(b"half a file")
        raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(*((graft.io.files, "write_safetensors") if safe else (torch, "save")), half)
        refuses(Failure, None, mlp_with(number=2, r=3).save_pretrained, tmp_path, safe_serialization=safe)
    assert files(tmp_path) == before


def test_a_save_that_fails_while_writing_the_config_leaves_the_old_files(saved, monkeypatch):
    before = files(saved)

    def fail(*_, **__):
        raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        refuses(Failure, None, mlp_with(number=2, r=3).save_pretrained, saved)
    assert files(saved) == before


def test_a_model_card_that_fails_does_not_fail_the_save(saved, monkeypatch):
    model = mlp_with(number=2, r=3)
    (saved / "README.md").write_text("# Mine\n")  # which gets more text
    with monkeypatch.context() as patch:
        done = fail_at(patch, 3)
        warns(graft.PeftWarning, r"is saved; .*README.md could not be written", model.save_pretrained, saved)
    assert done[:3] == [TENSORS, CONFIG, "README.md"]
    assert set(files(saved)) == {CONFIG, TENSORS, "README.md"}
    assert torch.equal(load(saved)(X), model(X))


def test_a_model_card_that_stays_the_same_is_not_written(saved, monkeypatch):
    with monkeypatch.context() as patch:
        done = fail_at(patch, 99)
        load(saved).save_pretrained(saved)
    assert done == [TENSORS, CONFIG]


@pytest.mark.differs("`adapter_model.bin` beside a new `.safetensors`")
def test_the_files_of_the_other_format_go(tmp_path):
    first, second = mlp_with(), mlp_with(number=2)
    first.save_pretrained(tmp_path, safe_serialization=False)
    assert BIN in files(tmp_path) and TENSORS not in files(tmp_path)
    assert torch.equal(load(tmp_path)(X), first(X))
    second.save_pretrained(tmp_path)
    assert BIN not in files(tmp_path)
    assert torch.equal(load(tmp_path)(X), second(X))
    first.save_pretrained(tmp_path, safe_serialization=False)
    assert TENSORS not in files(tmp_path)
    assert torch.equal(load(tmp_path)(X), first(X))


@pytest.mark.differs("whether the vocabulary was resized")
def test_saving_never_asks_the_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    base = models.make("llama")
    base.name_or_path = base.config._name_or_path = "someone/some-model"
    made = graft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2, task_type="CAUSAL_LM")
    model = graft.get_peft_model(base, made)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "someone/some-model"
    assert "base_model: someone/some-model" in (tmp_path / "README.md").read_text()


@pytest.mark.differs("README.md of an adapter")
def test_a_model_card_keeps_its_text(saved):
    card = saved / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    mlp_with().save_pretrained(saved)
    assert card.read_text().count("My own words.") == 1 and card.read_text().count("### Framework versions") == 1


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    model = mlp_with()
    one, two = (layers(model)[f"layers.{i}.fc1"].lora_A["default"] for i in (0, 1))
    one.weight = two.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(X), model(X))


def test_tensors_that_share_memory_in_a_torch_file_are_loaded_apart(tmp_path):
    model = mlp_with()
    model.save_pretrained(tmp_path, safe_serialization=False)
    held = torch.load(tmp_path / BIN)
    one, two = (f"base_model.model.layers.{i}.fc1.lora_A.weight" for i in (0, 1))
    three = one.replace("lora_A", "lora_B")
    held[two] = held[one]
    held[three] = torch.cat([held[three], torch.zeros_like(held[three]).repeat(99, 1)])[: len(held[three])]
    torch.save(held, tmp_path / BIN)
    loaded = load(tmp_path, is_trainable=True)
    memory = [p.untyped_storage() for n, p in loaded.named_parameters() if "lora_" in n]
    assert len({m.data_ptr() for m in memory}) == len(memory) == len(held)
    assert sum(m.nbytes() for m in memory) == sum(t.nbytes for t in held.values())
    saved = graft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(saved[key], t) for key, t in held.items())


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_saving_while_merged_saves_the_adapter_once(tmp_path, bias):
    model = mlp_with(bias=bias, lora_bias=True, target_modules=["fc1"])
    expected = model(X)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(X), expected)


@pytest.mark.differs("saving while merged")
def test_saving_while_an_embedding_is_merged_saves_the_adapter_once(tmp_path):
    made = graft.LoraConfig(target_modules=["embed_tokens"], r=2, task_type="CAUSAL_LM")
    model = disturb(graft.get_peft_model(models.make("llama"), made)).eval()
    batch = models.inputs("llama")
    expected = models.output(model, batch)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, base=models.make("llama"))
    torch.testing.assert_close(models.output(loaded, batch), expected, rtol=1e-4, atol=1e-4)


# names


@pytest.mark.parametrize("name", ["0", "1", "mlp", "layers", "fc1", "lora_A", "weight", "default_0", "a b", "ß"])
def test_an_adapter_may_be_called_as_a_part_of_the_model(name, tmp_path):
    model = mlp_with("default", name)
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), (name, tmp_path / name)):
        with safe_open(folder / TENSORS, "pt") as f:
            assert len(f.keys()) == 8
        loaded = load(folder, name)
        loaded.load_adapter(folder, "another")
        model.set_adapter(adapter)
        assert torch.equal(loaded(X), model(X))
        loaded.set_adapter("another")
        assert torch.equal(loaded(X), model(X))


def test_names_of_transformer_parts(tmp_path):
    made = graft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM")
    names = ["0", "mlp", "self_attn", "layers", "model"]
    with seeded(1):
        model = graft.get_peft_model(models.make("llama"), made, names[0])
        for name in names[1:]:
            model.add_adapter(name, copy.copy(made))
    disturb(model).eval().save_pretrained(tmp_path)
    batch = models.inputs("llama")
    loaded = load(tmp_path / "0", "x", base=models.make("llama"))
    for name in names:
        model.set_adapter(name)
        loaded.load_adapter(tmp_path / name, name)
        loaded.set_adapter(name)
        assert torch.equal(models.output(loaded, batch), models.output(model, batch))


# reading


def test_a_folder_that_is_not_there(tmp_path):
    for missing in (tmp_path / "no", tmp_path):
        refuses(graft.CheckpointError, r"Can't find 'adapter_config.json'", load, missing)
    for name in "ab":
        mlp_with().save_pretrained(tmp_path / name)
    refuses(graft.CheckpointError, r"adapters in the folders \['a', 'b'\], give one of them", load, tmp_path)
    mlp_with().peft_config["default"].save_pretrained(tmp_path)
    refuses(graft.CheckpointError, r"Can't find weights for.*adapter_model.safetensors", load, tmp_path)


def test_a_place_that_is_no_folder_of_an_adapter_says_what_to_give(tmp_path):
    mlp_with().save_pretrained(tmp_path / "a")
    for where, options, match in (
        (tmp_path / "a" / "adapter_model.safetensors", {}, r"it is a file, give the folder .* graft\.load_adapter"),
        (tmp_path, dict(subfolder="b"), r"there is no folder 'b' in it, which holds adapters in the folders \['a'\]"),
        (tmp_path / "b", {}, "there is no such folder"),
    ):
        refuses(graft.CheckpointError, rf"Can't find 'adapter_config\.json' at .*{match}", load, where, **options)
    path = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(path.read_text())
    for kind, match in (("lora", "Unknown peft_type 'lora'.* See "), (None, "no peft_type.*load_adapter")):
        path.write_text(json.dumps(fields | {"peft_type": kind}))
        with pytest.warns(graft.PeftWarning, match="edited since"), pytest.raises(graft.ConfigError, match=match):
            load(tmp_path / "a")


def test_a_pointer_of_git_lfs(saved):
    saved.joinpath(TENSORS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    refuses(graft.CheckpointError, "git lfs pull", load, saved)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_tensors(saved, length):
    whole = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(whole[:length])
    base = models.make("mlp")
    before = snapshot(base)
    refuses(graft.CheckpointError, f"{TENSORS} is truncated or corrupted", load, saved, base=base)
    unchanged(base, before)


def test_a_corrupted_header(saved):
    whole = bytearray((saved / TENSORS).read_bytes())
    whole[8:20] = b"\xff" * 12
    (saved / TENSORS).write_bytes(whole)
    refuses(graft.CheckpointError, "truncated or corrupted", load, saved)


@pytest.mark.parametrize("text", ["", "{", '{"peft_type": "LORA",', "[1, 2]", "null", "\xff\xfe"], ids=repr)
def test_a_corrupted_config(saved, text):
    (saved / CONFIG).write_bytes(text.encode("latin1"))
    refuses(graft.CheckpointError, CONFIG, load, saved)


def test_a_fingerprint_that_cannot_be_read(saved):
    write(saved, safetensors.torch.load_file(saved / TENSORS), {KEY: "{not json"})
    refuses(graft.CheckpointError, None, load, saved)


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/graft-was-here",)


MALICE = {
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": Malice()})),
    "torch": lambda path: torch.save({"a": Malice()}, path),
    "module": lambda path: torch.save({"a": nn.Linear(1, 1)}, path),
    "no dict": lambda path: torch.save([torch.ones(1)], path),
    "no tensors": lambda path: torch.save({"a": 3, "b": "text"}, path),
    "numbers as keys": lambda path: torch.save({3: torch.ones(1)}, path),
    "garbage": lambda path: path.write_bytes(b"\x00" * 64),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("kind", MALICE)
def test_a_torch_file_that_holds_more_than_tensors_is_refused(saved, kind):
    (saved / TENSORS).unlink()
    MALICE[kind](saved / BIN)
    base = models.make("mlp")
    before = snapshot(base)
    refuses(graft.CheckpointError, BIN, load, saved, base=base)
    assert not os.path.exists("/tmp/graft-was-here")
    unchanged(base, before)


def test_config_keys_of_newer_versions_are_named_and_left_out(saved):
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**values, "foo": 1, "bar": [2]}))
    loaded = warns(UserWarning, r"\['bar', 'foo'\] for class LoraConfig.*newer version", load, saved)
    assert torch.equal(loaded(X), mlp_with()(X)) and not hasattr(loaded.peft_config["default"], "foo")


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"peft_type": "NOPE"}, graft.ConfigError, "Unknown peft_type 'NOPE'.*LORA"),
        ({"peft_type": None}, graft.ConfigError, "names no peft_type.*Name the folder of an adapter"),
        ({"r": "8"}, graft.ConfigTypeError, "LoraConfig.r must be int"),
        ({"r": 0}, graft.ConfigError, "`r` should be a positive integer"),
        ({"task_type": "NOPE"}, graft.ConfigError, "Invalid task type: 'NOPE'"),
        ({"target_modules": ["nope"]}, graft.NoMatchingPeftModuleError, "nope.*not found"),
        ({"target_modules": ["norm"]}, graft.UnsupportedLayerError, "layers.0.norm.*LayerNorm"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_a_config_that_does_not_fit(saved, changes, error, text):
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**values, **changes}))
    base, model = models.make("mlp"), mlp_with("mine")
    before = snapshot(base), snapshot(model)
    refuses(error, text, load, saved, base=base)
    refuses(error, text, model.load_adapter, saved, "new")
    unchanged(base, before[0])
    unchanged(model, before[1])


# keys


def spoil(folder, change):
    """Rewrite the tensors of a checkpoint."""
    with safe_open(folder / TENSORS, "pt") as f:
        metadata = f.metadata()
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    write(folder, tensors, {KEY: metadata[KEY]})


LEFT = "base_model.model.lin0.lora_B.weight"  # in the file


def in_memory(adapter):
    return f"base_model.model.lin0.lora_B.{adapter}.weight"


SPOILT = {
    "missing": (lambda t: t.pop(LEFT), "missing adapter keys.*" + in_memory(".+")),
    "unexpected": (lambda t: t.update({"base_model.model.lin7.lora_A.weight": torch.ones(1)}), "fit nothing.*lin7"),
    "of another method": (lambda t: t.update({"base_model.model.lin0.hada_w1_a": torch.ones(1)}), "fit nothing.*hada"),
    "shape": (
        lambda t: t.update({LEFT: torch.ones(3, 3)}),
        f"size mismatch for {in_memory('.+')}: " + r"\(3, 3\) .*\(12, 2\)",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_keys_that_do_not_fit_are_named_and_nothing_changes(saved, kind):
    change, text = SPOILT[kind]
    spoil(saved, change)
    base, model = models.make("mlp"), mlp_with("mine", number=2)
    before = snapshot(base), snapshot(model)
    refuses(graft.AdapterKeyError, text, load, saved, base=base)
    for name in ("new", "mine"):
        refuses(graft.AdapterKeyError, text, model.load_adapter, saved, name)
    unchanged(base, before[0])
    unchanged(model, before[1])


def test_without_strict_what_fits_is_loaded_and_the_rest_reported(saved):
    spoil(saved, SPOILT["missing"][0])
    spoil(saved, SPOILT["unexpected"][0])
    model = mlp_with("mine", number=2)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*lin0.*fit nothing.*lin7"):
        report = model.load_adapter(saved, "new", strict=False)
    assert report.missing_keys == [in_memory("new")] and report.unexpected_keys == [
        "base_model.model.lin7.lora_A.weight"
    ]
    assert len(report.loaded) == 7 and (report.missing_keys, report.unexpected_keys) == tuple(report)
    layer, source = layers(model)["lin0"], layers(mlp_with())["lin0"]
    assert torch.equal(layer.lora_A["new"].weight, source.lora_A["default"].weight)
    assert not layer.lora_B["new"].weight.any(), "as initialised"
    assert not any(t.is_meta for t in model.state_dict().values())


def test_without_strict_an_existing_adapter_keeps_what_is_missing(saved):
    spoil(saved, SPOILT["missing"][0])
    model = mlp_with("mine", number=2)
    kept = layers(model)["lin0"].lora_B["mine"].weight.clone()
    warns(UserWarning, "missing adapter keys", model.load_adapter, saved, "mine", strict=False)
    assert torch.equal(layers(model)["lin0"].lora_B["mine"].weight, kept)


def test_mismatched_sizes_are_left_out_on_demand(saved):
    spoil(saved, SPOILT["shape"][0])
    model = mlp_with("mine")
    refuses(graft.AdapterKeyError, "size mismatch", model.load_adapter, saved, "new", strict=False)
    with pytest.warns(UserWarning, match=r"ignore_mismatched_sizes=True.*lin0"):
        report = model.load_adapter(saved, "new", ignore_mismatched_sizes=True)
    assert report.mismatched_keys == [in_memory("new")] and len(report.loaded) == 7


def test_renaming_keys(saved):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("lin0", "old_name")] = tensors.pop(key)

    spoil(saved, rename)
    refuses(graft.AdapterKeyError, r"old_name.*the same under other names, pass key_mapping=\{", load, saved)
    assert torch.equal(load(saved, key_mapping={"^old_name": "lin0"})(X), mlp_with()(X))
    base = models.make("mlp")
    base._checkpoint_conversion_mapping = {"^old_name": "lin0"}
    assert torch.equal(load(saved, base=base)(X), mlp_with()(X)), "by default the model's own"
    model = mlp_with("mine", number=2)
    model.load_adapter(saved, "mine", key_mapping={"^old_n[a-z]*": "lin0", "lin0": "lin1"})
    assert torch.equal(model(X), mlp_with()(X)), "the first that fits, once"
    renamed = graft.load_peft_weights(saved, key_mapping={"^old_name": "lin0"})
    assert LEFT in renamed and len(renamed) == 8


def test_keys_without_the_prefix_of_a_wrapper(saved):
    def bare(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)

    spoil(saved, bare)
    assert torch.equal(load(saved)(X), mlp_with()(X))


# loading into what is there


def test_loading_into_an_existing_adapter_copies_in_place(saved):
    model = mlp_with("mine", number=2).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    model.load_adapter(saved, "mine", is_trainable=True)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    model.eval()
    assert torch.equal(model(X), mlp_with()(X))
    model(X).sum().backward()
    optimizer.step()
    assert (model(X) - mlp_with()(X)).abs().max() > 1e-3, "the optimizer still holds them"


def test_a_loaded_adapter_trains_if_asked_to(saved):
    frozen, training = load(saved), load(saved, is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    assert {n for n, p in training.named_parameters() if p.requires_grad} == {
        n for n, _ in training.named_parameters() if "lora_" in n
    }
    model = mlp_with("mine")
    model.load_adapter(saved, "new", is_trainable=True)
    assert model.active_adapters == ["mine"]
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n), "it trains, active or not"
    model.set_adapter("new")
    assert torch.equal(model(X), mlp_with()(X))


def test_a_checkpoint_of_another_method(saved):
    model = graft.get_peft_model(models.make("mlp"), graft.LoHaConfig(target_modules=["fc1"]), "mine")
    before = snapshot(model)
    for name in ("mine", "new"):
        refuses(graft.ConfigError, r"LOHA.*LORA|LORA.*LOHA", model.load_adapter, saved, name)
    unchanged(model, before)


def test_a_config_of_ones_own(saved):
    own = config(lora_alpha=12)
    loaded = load(saved, config=own)
    layer = layers(loaded)["lin0"]
    assert layer.scaling["default"] == 6.0
    refuses(ValueError, "must be a PeftConfig", load, saved, config={"r": 2})


@pytest.mark.parametrize("light", [True, False])
def test_nothing_stays_on_meta(saved, light):
    loaded = load(saved, low_cpu_mem_usage=light)
    assert not any(t.is_meta for t in loaded.state_dict().values())
    assert torch.equal(loaded(X), mlp_with()(X))


@pytest.mark.parametrize("dtype, upcast", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float64, True)])
def test_dtypes_of_a_loaded_adapter(saved, dtype, upcast):
    loaded = load(saved, base=models.make("mlp").to(dtype), autocast_adapter_dtype=upcast)
    wanted = torch.float32 if dtype == torch.bfloat16 and upcast else dtype
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {wanted}
    assert loaded(X.to(dtype)).dtype == dtype


def test_a_cancelled_load_leaves_the_model(saved, monkeypatch):
    model = mlp_with("mine")
    before = snapshot(model)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("graft.io.entries.Entry.assign", interrupt)
    refuses(KeyboardInterrupt, None, model.load_adapter, saved, "new")
    unchanged(model, before)


# the base model


@pytest.mark.differs("the base model of a file")
def test_the_base_it_was_trained_on(saved, quiet):
    for base in (models.make("mlp"), models.make("mlp").bfloat16(), models.make("mlp").double()):
        load(saved, base=base)
    mlp_with("mine").load_adapter(saved, "new")


def test_the_base_in_half_precision_is_the_same_base(saved, quiet):
    load(saved, base=models.make("mlp").half())


@pytest.mark.parametrize("when", ["saving", "loading"])
def test_a_merged_adapter_does_not_make_it_another_base(tmp_path, quiet, when):
    model = mlp_with("default", "other")
    if when == "saving":
        model.merge_adapter(["other"])
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    target = mlp_with("mine")
    if when == "loading":
        target.merge_adapter()
    target.load_adapter(tmp_path, "new")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_with_numbers_that_are_not_finite(tmp_path, quiet, value):
    def base():
        made = models.make("mlp")
        made.layers[0].fc1.weight.data[0, 0] = value
        return made

    mlp_with(base=base()).save_pretrained(tmp_path)
    load(tmp_path, base=base())


def other_weights():
    with seeded(9):
        return models.MODELS["mlp"].build()


def test_a_base_with_other_weights(saved):
    warns(graft.PeftWarning, "same architecture but with other weights", load, saved, base=other_weights())


def test_other_weights_that_are_not_adapted_do_not_matter(saved, quiet):
    base = models.make("mlp")
    base.head.weight.data.zero_()
    load(saved, base=base)


def narrow():
    base = models.make("mlp")
    base.layers = base.layers[:2]
    return base


def wide():
    base = models.make("mlp")
    base.lin0 = nn.Linear(11, 12)
    return base


def deep():
    base = models.make("mlp")
    base.layers.append(type(base.layers[0])())
    return base


BASES = {
    "shape": (wide, r"size mismatch for 'lin0': \(12, 10\) in the checkpoint's base, \(12, 11\) here"),
    "fewer layers": (narrow, "1 adapted layers of its base are not in this model, such as 'layers.2.fc1'"),
    "more layers": (deep, "1 targeted layers of this model were not in its base, such as 'layers.3.fc1'"),
}


@pytest.mark.parametrize("kind", BASES)
def test_a_base_of_another_architecture(saved, kind):
    make, text = BASES[kind]
    base = make()
    before = snapshot(base)
    refuses(graft.BaseModelMismatchError, f"another base model: .*{text}", load, saved, base=base)
    unchanged(base, before)


@pytest.mark.parametrize("kind", ["fewer layers", "more layers"])
def test_a_base_of_another_architecture_without_strict(saved, kind):
    with pytest.warns(UserWarning) as seen:
        loaded = load(saved, base=BASES[kind][0](), strict=False)
    assert any("another base model" in str(w.message) and w.category is graft.PeftWarning for w in seen)
    assert torch.equal(
        layers(loaded)["lin0"].lora_A["default"].weight, layers(mlp_with())["lin0"].lora_A["default"].weight
    )
    assert loaded(X).isfinite().all()


def test_a_checkpoint_without_a_fingerprint_loads(saved, quiet):
    write(saved, safetensors.torch.load_file(saved / TENSORS))
    loaded = load(saved, base=other_weights())
    held = [layers(model)["lin0"].lora_A["default"].weight for model in (loaded, mlp_with())]
    assert torch.equal(*held)


def test_initialisations_that_change_the_base_do_not_compare_its_values(tmp_path, quiet):
    model = mlp_with(init_lora_weights="pissa", target_modules=["fc1"])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded(X).isfinite().all()


def test_a_large_model_keeps_a_digest_only(tmp_path, monkeypatch):
    monkeypatch.setattr("graft.io.fingerprint.MAX_NAMED", 2)
    mlp_with().save_pretrained(tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as f:
        assert "weights" not in json.loads(f.metadata()[KEY])
    load(tmp_path)
    refuses(graft.BaseModelMismatchError, "adapts 4 weights, here 3 match", load, tmp_path, base=narrow())
    monkeypatch.undo()  # now the model names its weights, where the file does not
    refuses(graft.BaseModelMismatchError, "adapts 4 weights, here 3 match", load, tmp_path, base=narrow())


def test_embeddings_resized_over_a_base_of_the_hub_are_saved(tmp_path, monkeypatch):
    """The hub's cache has the base's config; the network is not asked."""
    folder = tmp_path / "models--some--base"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "config.json").write_text('{"vocab_size": 41}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for size, saved in ((41, False), (45, True)):
        base = models.make("llama")
        base.resize_token_embeddings(size)
        base.config._name_or_path = base.name_or_path = "some/base"
        model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            model.save_pretrained(tmp_path / str(size))
        held = safetensors.torch.load_file(tmp_path / str(size) / "adapter_model.safetensors")
        assert any("embed_tokens" in name for name in held) == saved
        assert any("vocabulary" in str(w.message) for w in record) == saved


def llama_of(tokens):
    base = models.make("llama")
    with seeded(2):
        base.resize_token_embeddings(tokens)
    return base


@pytest.mark.parametrize("options, error", [
    (dict(target_modules=["embed_tokens"]), graft.BaseModelMismatchError),
    (dict(target_modules=["lm_head"]), graft.BaseModelMismatchError),
    (dict(target_modules=["q_proj"]), graft.AdapterKeyError),
    (dict(trainable_token_indices=[2, 44]), graft.ConfigError),
])  # fmt: skip
def test_a_base_whose_vocabulary_did_not_grow_is_told_how_to(options, error, tmp_path):
    model = graft.get_peft_model(llama_of(45), graft.LoraConfig(**{"target_modules": ["q_proj"], **options}))
    model.save_pretrained(tmp_path, save_embedding_layers=error is graft.AdapterKeyError)
    base = models.make("llama")
    before = snapshot(base)
    refuses(error, r"resize_token_embeddings\(45\)", load, tmp_path, base=base)
    unchanged(base, before)
    load(tmp_path, base=llama_of(45))


@pytest.mark.parametrize("heads", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]], ids="-".join)
def test_a_vocabulary_of_its_own_merged_into_a_base_can_be_loaded(heads, tmp_path):
    inputs = models.inputs("llama")
    config = graft.LoraConfig(target_modules=["q_proj"], modules_to_save=heads)
    model = disturb(graft.get_peft_model(llama_of(45), config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"'.*' of adapter.*resize_token_embeddings\(45\)"):
        loaded = load(tmp_path / "adapter", base=models.make("llama")).eval()
    logits = models.output(loaded, inputs)
    if "lm_head" in heads:
        assert torch.equal(logits, models.output(model, inputs))
    whole = len(heads) == 2
    with nullcontext() if whole else pytest.warns(UserWarning, match=r"Call resize_token_embeddings\(45\)"):
        merged = loaded.merge_and_unload()
    if not whole:
        merged.resize_token_embeddings(45)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert again.config.vocab_size == 45
    torch.testing.assert_close(models.output(again, inputs)[..., : logits.shape[-1]], logits, rtol=0, atol=1e-5)


def test_a_model_whose_config_describes_several_texts(tmp_path):
    """As MusicGen's: transformers does not say which of them is the model's."""
    made = []
    for _ in range(2):
        made.append(models.make("llama"))
        made[-1].config.text_encoder = made[-1].config.decoder = copy.copy(made[-1].config)
    refuses(ValueError, "ambiguous", made[0].config.get_text_config)
    made[0].name_or_path = str(tmp_path)
    model = disturb(graft.get_peft_model(made[0], graft.LoraConfig(target_modules=["q_proj"])))
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(made[1], tmp_path).merge_and_unload().state_dict()
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == loaded.keys() and all(torch.equal(t, loaded[name]) for name, t in merged.items())


@pytest.mark.parametrize("names", [lambda m: nn.ModuleList([m.model.embed_tokens]), lambda m: m.lm_head.weight])
def test_embeddings_that_are_a_parameter_or_hold_their_tables_inside(names, tmp_path):
    """As Perceiver's and CSM's."""
    base = models.make("llama")
    base.config.tie_word_embeddings = True
    named = names(base)
    base.get_input_embeddings = lambda: named
    keys, inputs = base.state_dict().keys(), models.inputs("llama")
    model = disturb(graft.get_peft_model(base, graft.LoraConfig(target_modules=["q_proj"]))).eval()
    model.save_pretrained(tmp_path)
    output = models.output(model, inputs)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == keys and merged.config.tie_word_embeddings
    torch.testing.assert_close(models.output(merged, inputs), output, rtol=0, atol=1e-5)
    loaded = graft.PeftModel.from_pretrained(models.make("llama"), tmp_path).eval()
    assert torch.equal(models.output(loaded, inputs), output)


def test_a_key_that_is_there_with_and_without_the_name_of_a_wrapper(saved):
    spoil(saved, lambda t: t.update({LEFT.replace("lin0", "_orig_mod.lin0"): t[LEFT] + 1}))
    refuses(graft.AdapterKeyError, "twice", load, saved)


@pytest.mark.parametrize("read", ["model", "LoraConfig", "PeftConfig"])
@pytest.mark.parametrize("field, hint", [("lora_dropuot", "Did you mean 'lora_dropout' for"), ("zzz", "newer version")])
def test_an_unknown_field_of_a_config_gives_one_warning_with_what_it_may_mean(tmp_path, read, field, hint):
    mlp_with().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(fields | {field: 0.3}))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if read == "model":
            with seeded(1):
                graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
        else:
            getattr(graft, read).from_pretrained(tmp_path)
    (text,) = (str(w.message) for w in record)
    assert text.startswith(f"Unexpected keyword arguments ['{field}']") and hint in text


@pytest.mark.parametrize("writer, reader", [(peft, graft), (graft, peft), (graft, graft)])
def test_embeddings_saved_beside_heads_of_them(writer, reader, tmp_path):
    """PEFT saves all that is below the embeddings then: a head twice, and the base's; the adapter's name in no key."""
    made = []
    for lib in (writer, reader, peft):
        model = lib.get_peft_model(models.make("llama"), head := lib.LoraConfig(modules_to_save=["lm_head"]), "first")
        assert head.modules_to_save
        made.append(model)
    with seeded(0), torch.no_grad():
        for p in made[0].parameters():
            p.normal_() if p.requires_grad else None
    keys = [{*lib.get_peft_model_state_dict(m, adapter_name="first", save_embedding_layers=True)}
            for lib, m in zip((writer, reader, peft), made)]  # fmt: skip
    assert keys[0] == keys[1] == keys[2] and any(k.endswith("lm_head.modules_to_save.weight") for k in keys[0])
    made[0].save_pretrained(tmp_path, save_embedding_layers=True)
    read = reader.PeftModel.from_pretrained(models.make("llama"), tmp_path / "first")
    batch = models.inputs("llama")
    assert torch.equal(models.output(read, batch), models.output(made[0].eval(), batch))


@pytest.mark.parametrize("writer", [graft, peft], ids=["ours", "theirs"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_a_vocabulary_that_was_resized(tied, writer, tmp_path):
    """The base's embeddings stand around the rows in the file, tied ones twice."""
    sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with seeded(0):
        LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")

    def base(seed):
        with seeded(seed):
            model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
            model.resize_token_embeddings(24, mean_resizing=False)
        return model

    def config(lib):
        return lib.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[21, 22])

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.arange(24)[None]).logits

    model = writer.get_peft_model(base(1), config(writer))
    with seeded(5), torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape)
    warns(UserWarning, "save_embedding_layers", model.save_pretrained, tmp_path / "a")
    expected = logits(model)
    assert not [key for key in graft.load_peft_weights(tmp_path / "a") if key.endswith("default")]
    for lib in (graft, peft):
        torch.testing.assert_close(logits(lib.PeftModel.from_pretrained(base(2), tmp_path / "a")), expected)
    over = graft.get_peft_model(base(3), config(graft))
    over.load_adapter(tmp_path / "a", "default")
    torch.testing.assert_close(logits(over), expected)
    over.merge_adapter()
    warns(UserWarning, "save_embedding_layers", over.save_pretrained, tmp_path / "merged")
    torch.testing.assert_close(logits(graft.PeftModel.from_pretrained(base(4), tmp_path / "merged")), expected)
