# SPDX-License-Identifier: Apache-2.0
"""No file runs code, hangs, or leaves half a load; and what is wrong is said with file and field."""

import json
import re
import sys
import time
import warnings

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graft
from graft.config import reading
from graft.core.errors import HubError, NonFiniteError
from graft.io.entries import rename_keys
from graft.io.files import check_tensors, is_file_sum_finite
from graft.io.fingerprint import KEY
from graft.serving import AdapterSlots
from tests import models
from tests.io.test_checkpoint_files import BIN, CONFIG, TENSORS, X, config, load, mlp_with, snapshot, unchanged, write
from tests.models import seeded
from tests.prompts import samples as prompts
from tests.raised import refuses

pytestmark = pytest.mark.graft_only


@pytest.fixture
def saved(tmp_path):
    mlp_with().save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tensors_of(folder):
    return load_file(folder / TENSORS)


# patterns

SLOW, NAME = "(a|aa)+", "a" * 40 + "b"


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(reading, "BUDGET", 0.1)


@pytest.mark.differs("a regular expression that takes seconds to match a name")
@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save", "layers_pattern"]
)
@pytest.mark.parametrize(
    "text, words", [(SLOW, "takes too long"), ("lin(", "not a regular expression")], ids=["slow", "broken"]
)
def test_a_pattern_is_refused_by_name_and_in_time(field, text, words):
    value = {"rank_pattern": {text: 3}, "modules_to_save": [text], "layers_pattern": [text]}.get(field, text)
    settings = {"target_modules": [NAME], field: value}
    if field == "layers_pattern":
        settings["layers_to_transform"] = [0]
    model = nn.ModuleDict({NAME: nn.ModuleDict({NAME: nn.Linear(3, 3)})})
    start = time.perf_counter()
    with pytest.raises(graft.ConfigError, match=f"{re.escape(repr(text))} of {field}.*{words}"):
        graft.get_peft_model(model, graft.LoraConfig(**settings))
    assert time.perf_counter() - start < 5


@pytest.mark.usefixtures("brief")
def test_a_slow_pattern_of_key_mapping_and_of_feed_forward_modules():
    model = nn.ModuleDict({NAME: nn.Linear(3, 3)})
    with pytest.raises(graft.ConfigError, match="feedforward_modules takes too long"):
        graft.get_peft_model(model, graft.IA3Config(target_modules=[NAME], feedforward_modules=SLOW))
    for mapping, words in (({f"{SLOW}$": "x"}, "takes too long"), ({"(a)": r"\2"}, "cannot replace")):
        refuses(graft.ConfigError, f"key_mapping.*{words}", rename_keys, {NAME: torch.ones(1)}, mapping)


@pytest.mark.parametrize("text", ["a{1000000000}", "((a{1000}){1000}){1000}", "a" * 200_000])
def test_a_pattern_that_would_fill_memory_is_refused(text):
    refuses(graft.ConfigError, "too large", reading.compile_pattern, text, "target_modules")


# JSON

TEXTS = {
    "digits": ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "'r'"),
    "1e400": ('{"peft_type": "LORA", "lora_alpha": 1e400}', "'lora_alpha'"),
    "nan": ('{"peft_type": "LORA", "rank_pattern": {"a": NaN}}', "'rank_pattern'"),
    "deep": ('{"peft_type": "LORA", "r": ' + "[" * 500 + "]" * 500 + "}", "'r'"),
    "deeper": ('{"a":' * 100_000, "deep"),
    "twice": ('{"r": 1, "r": 2}', "'r' stands twice"),
    "bytes": (b'{"a": "\xff"}', "JSON"),
    "type": ('{"peft_type": ["LORA"]}', "peft_type"),
    "method": ('{"peft_type": "XYZ"}', "XYZ"),
    "large": ('{"peft_type": "LORA", "r": 1e30}', "LoraConfig.r"),
    "rank": ('{"peft_type": "LORA", "r": 100000000000}', "`r`"),
    "alpha": ('{"peft_type": "LORA", "lora_alpha": ' + "9" * 200 + "}", "`lora_alpha`"),
    "pattern": ('{"peft_type": "LORA", "alpha_pattern": {"a": 1e30}}', "`alpha_pattern`"),
    "kasa": ('{"peft_type": "LORA", "kasa_config": {"beta": "x"}}', "KasaConfig.beta"),
    "terms": (
        '{"peft_type": "OFT", "oft_block_size": 2, "num_cayley_neumann_terms": 1000000}',
        "num_cayley_neumann_terms",
    ),
    "eps": ('{"peft_type": "OFT", "oft_block_size": 2, "eps": -1}', "`eps`"),
}


@pytest.mark.differs(
    "numbers of a config above 2²⁴ (seeds and steps: 2⁶³), JSON above 16 MiB or 32 levels deep, more than 10,000 "
    "patterns, 100 entries of `layers_pattern`, 1,000 Cayley-Neumann terms, 32 times as many layers by replication"
)
@pytest.mark.parametrize("case", TEXTS)
def test_a_config_is_refused_by_file_and_field(tmp_path, case):
    text, words = TEXTS[case]
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(graft.PeftError) as raised:
        graft.PeftConfig.from_pretrained(tmp_path)
    assert words in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_huge_config_is_not_read(tmp_path):
    with open(tmp_path / CONFIG, "wb") as f:
        f.truncate(2**34)  # of which a disk holds nothing
    refuses(graft.CheckpointError, r"17,179,869,184 bytes", graft.PeftConfig.from_pretrained, tmp_path)


@pytest.mark.parametrize(
    "note",
    ["[]", '"x"', '{"n": "x"}', '{"shapes": 1}', '{"weights": {"a": "b"}}', '{"sample": {"a": 1}}', "{", "[" * 9999],
)
def test_a_note_on_the_base_is_refused_by_file(saved, note):
    write(saved, tensors_of(saved), {KEY: note})
    refuses(graft.CheckpointError, f"{re.escape(str(saved))}.*{KEY}", load, saved)


def test_an_alpha_of_zero_is_said():
    with pytest.warns(graft.PeftWarning, match="lora_alpha.*no effect"):
        graft.LoraConfig(lora_alpha=0)
    with pytest.raises(graft.ConfigError, match="lora_alpha"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graft.get_peft_model(models.make("mlp"), config(lora_alpha=0, init_lora_weights="pissa"))


# room


def prompt_folder(folder, method, **fields):
    with seeded(1):
        prompts.adapt(graft, prompts.first(method)).save_pretrained(folder)
    edit(folder, **fields)
    return prompts.make(prompts.MODEL)


ROOMS = {
    "num_tasks": lambda d: prompt_folder(d, "MULTITASK_PROMPT_TUNING", num_tasks=10**6, num_ranks=2),
    "num_layers": lambda d: prompt_folder(d, "PREFIX_TUNING", num_layers=10**7, token_dim=10**7),
}


def layered(folder, cls, **fields):
    with seeded(1):
        model = graft.get_peft_model(models.make("mlp"), cls(target_modules=["fc1"], **fields.pop("made", {})))
    model.save_pretrained(folder)
    edit(folder, **fields)
    return models.make("mlp")


ROOMS["VeRA"] = lambda d: layered(d, graft.VeraConfig, r=10**7, made=dict(r=2))
ROOMS["bank"] = lambda d: layered(
    d, graft.VBLoRAConfig, num_vectors=10**7, made=dict(num_vectors=8, vector_length=4, r=1)
)


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.differs("a config that describes far more numbers than the file beside it holds")
@pytest.mark.parametrize("case", ROOMS)
def test_what_a_config_asks_for_is_in_proportion_to_the_file(tmp_path, case):
    model = ROOMS[case](tmp_path)
    before = snapshot(model)
    with Sizes() as sizes, pytest.raises(graft.CheckpointError, match=r"describes .* holds"):
        load(tmp_path, base=model)
    assert sizes.most < 10**6
    unchanged(model, before)


def test_replication_has_a_limit(tmp_path):
    model = prompts.make("llama")
    with pytest.raises(graft.ConfigError, match="layer_replication asks for 20,000 layers"):
        graft.get_peft_model(model, graft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2)] * 10_000))


# tensors

KINDS = {
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "meta": (lambda t: t.to("meta"), "meta device"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized"),
    "whole": (lambda t: t.long(), "int64"),
    "repeated": (lambda t: torch.ones(1).expand(t.shape), "repeats"),
    "nan": (lambda t: t * float("nan"), "NaN"),
    "inf": (lambda t: t + float("inf"), "NaN or infinite"),
}


@pytest.mark.differs("NaN, infinite, sparse, complex or whole numbers in a file; tensors on the meta device")
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch, from 2.15 on
@pytest.mark.parametrize("case", KINDS)
def test_a_tensor_of_another_kind_leaves_all_as_it_was(saved, case):
    change, word = KINDS[case]
    tensors = {k: t + 1 for k, t in tensors_of(saved).items()}
    name = list(tensors)[-1]
    tensors[name] = change(tensors[name])
    (saved / TENSORS).unlink()
    torch.save(tensors, saved / BIN)
    model = mlp_with("default", "other")
    calls = {
        "over": lambda: model.load_adapter(saved, "default"),
        "new": lambda: model.load_adapter(saved, "third"),
        "swap": lambda: graft.hotswap_adapter(model, saved, "default"),
        "state": lambda: graft.set_peft_model_state_dict(model, tensors),
    }
    before = snapshot(model)
    for how, call in calls.items():
        refuses(graft.PeftError, rf"{re.escape(name)}(.|\n)*{word}|{word}(.|\n)*{re.escape(name)}", call)
        unchanged(model, before)
        assert how
    slots = AdapterSlots(models.make("mlp"), 1, 4, targets=["lin0", "fc1"])
    refuses(graft.PeftError, None, slots.load, "a", saved)


def test_numbers_that_are_not_finite_can_be_asked_for(saved):
    tensors = tensors_of(saved)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    write(saved, tensors)
    refuses(NonFiniteError, rf"{re.escape(name)}.*allow_nonfinite=True", load, saved)
    model = load(saved, allow_nonfinite=True)
    model.load_adapter(saved, "b", allow_nonfinite=True)
    graft.hotswap_adapter(model, saved, "default", allow_nonfinite=True)
    graft.set_peft_model_state_dict(model, tensors, allow_nonfinite=True)
    AdapterSlots(models.make("mlp"), 1, 4, targets=["lin0", "fc1"]).load("a", saved, allow_nonfinite=True)
    assert all(t.isnan().any() for t in (p for n, p in model.named_parameters() if name.replace(".weight", ".b") in n))


def test_the_sum_of_a_file_tells_numbers_that_are_not_finite():
    nan, inf, most = float("nan"), float("inf"), torch.finfo(torch.float32).max
    first = torch.ones(2, 3)
    for values in ([nan], [inf], [-inf], [inf, -inf], [most, most]):  # the last overflow: each is looked at by itself
        tensors = {"a": first, "b": torch.tensor(values)}
        assert not is_file_sum_finite(save(tensors), tensors)
    for dtype in (torch.bfloat16, torch.int32):  # bytes of another type say nothing as float32
        tensors = {"a": first, "b": torch.ones(4, dtype=dtype)}
        assert not is_file_sum_finite(save(tensors), tensors)
    for second in (torch.full((2,), -most), torch.ones(0)):
        tensors = {"a": first, "b": second[:1]}
        assert is_file_sum_finite(save(tensors), tensors)
    assert not is_file_sum_finite(save({}), {})


def test_numbers_whose_sum_overflows_are_finite(saved):
    tensors = {k: torch.full_like(t, torch.finfo(t.dtype).max) for k, t in tensors_of(saved).items()}
    write(saved, tensors)
    model = load(saved)
    assert all(t.equal(tensors[k]) for k, t in graft.get_peft_model_state_dict(model).items())


class DTensor(torch.Tensor):
    """A tensor that says it is sharded; to compute with it would take all processes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function.__name__ not in ("sum", "reshape", "isfinite")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_sharded_tensors_are_not_looked_into():
    check_tensors({"a": torch.ones(3).as_subclass(DTensor)}, "the given state dict")


def test_large_half_precision_numbers_are_finite(saved):
    write(saved, {k: torch.full_like(t, 6e4).half() for k, t in tensors_of(saved).items()})
    load(saved)


def test_a_torch_file_that_unpacks_to_more_than_it_has_is_refused(saved):
    import zipfile

    (saved / TENSORS).unlink()
    torch.save({"a": torch.zeros(10**6)}, saved / "plain")
    with zipfile.ZipFile(saved / "plain") as old, zipfile.ZipFile(saved / BIN, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    refuses(graft.CheckpointError, "more than it has", load, saved)


TOPK = {
    "twice": (lambda index, weight: (torch.zeros_like(index), weight), "one index twice"),
    "outside": (lambda index, weight: (index + 100, weight), "outside the bank"),
    "bool": (lambda index, weight: (index.bool(), weight), "shapes"),
    "shape": (lambda index, weight: (index[..., :1].contiguous(), weight), "shapes"),
    "sum": (lambda index, weight: (index, weight + 2), "sum up to more"),
    "negative": (lambda index, weight: (index, -weight - 1), "negative"),
}


@pytest.mark.parametrize("case", TOPK)
def test_indices_of_a_bank_are_checked(tmp_path, case):
    change, words = TOPK[case]
    made = dict(num_vectors=8, vector_length=4, topk=2, save_only_topk_weights=True)
    model = layered(tmp_path, graft.VBLoRAConfig, made=made)
    tensors = tensors_of(tmp_path)
    index = next(name for name in tensors if name.endswith("_topk_indices"))
    weight = index.replace("indices", "weights")
    tensors[index], tensors[weight] = change(tensors[index], tensors[weight])
    write(tmp_path, tensors)
    refuses(graft.CheckpointError, words, load, tmp_path, base=model)


def test_a_note_that_contradicts_itself(saved):
    with safe_open(saved / TENSORS, "pt") as f:
        note = json.loads(f.metadata()[KEY])
    write(saved, tensors_of(saved), {KEY: json.dumps(note | {"shapes": "0" * 16})})
    refuses(graft.BaseModelMismatchError, "contradicts itself", load, saved)


# keys outside layers


@pytest.mark.differs('base biases (`bias="all"`, `"…_only"`) that a file lacks')
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_that_a_file_lacks(tmp_path, bias):
    mlp_with(bias=bias).save_pretrained(tmp_path)
    whole = tensors_of(tmp_path)
    load(tmp_path)
    name = "base_model.model.layers.1.fc1.base_layer.bias"
    write(tmp_path, {k: t for k, t in whole.items() if k != name})
    refuses(graft.AdapterKeyError, re.escape(name), load, tmp_path)
    write(tmp_path, {k: t for k, t in whole.items() if not k.endswith(".bias")})
    if bias == "all":
        refuses(graft.AdapterKeyError, r"norm\.bias", load, tmp_path)
    else:  # as PEFT writes it
        with pytest.warns(graft.PeftWarning, match="lora_only.*holds none of them"):
            load(tmp_path)


def test_a_head_whose_weight_and_bias_disagree(tmp_path):
    mlp_with(modules_to_save=["head"]).save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    key = "base_model.model.head"
    larger = {f"{key}.weight": torch.randn(7, 12), f"{key}.bias": torch.randn(7)}
    write(tmp_path, tensors | larger)
    assert load(tmp_path)(X).shape[-1] == 7
    for name in larger:
        write(tmp_path, tensors | {name: larger[name]})
        refuses(graft.AdapterKeyError, r"'head'.*heads of different sizes", load, tmp_path)
        leaf = name.rpartition(".")[2]
        with pytest.warns(UserWarning, match=rf"head\.modules_to_save\.default\.{leaf}"):
            assert load(tmp_path, ignore_mismatched_sizes=True)(X).shape[-1] == 5


def test_an_empty_key_is_no_tensor(saved):
    model = mlp_with(number=2, lora_bias=False)
    tensors = tensors_of(saved)
    name = next(iter(tensors))
    tensors[""] = tensors.pop(name)
    write(saved, tensors)
    before = snapshot(model)
    refuses(graft.AdapterKeyError, re.escape(name), graft.hotswap_adapter, model, saved, "default")
    unchanged(model, before)


def test_a_key_mapping_that_fits_nothing_is_said(saved):
    with pytest.warns(graft.PeftWarning, match="key_mapping.*fits none"):
        load(saved, key_mapping={"nowhere": "x"})
    refuses(graft.AdapterKeyError, "Two keys", load, saved, key_mapping={".*": "x"})


# names

BAD_NAMES = ["", ".", "..", "a.b", "a/b", "a\\b", "a\0b", "\ud800", "é" * 128, "a" * 256]


@pytest.mark.differs("adapter names longer than 255 bytes, with NUL, or no valid text")
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_file_system_takes(name):
    model = mlp_with()
    for call in (
        lambda: graft.get_peft_model(models.make("mlp"), config(), name),
        lambda: model.add_adapter(name, config()),
        lambda: graft.inject_adapter_in_model(config(), models.make("mlp"), name),
        lambda: AdapterSlots(models.make("mlp"), 1, 4, targets=["lin0"]).load(name, model),
    ):
        refuses(graft.AdapterNameError, None, call)


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "a b", "-x", "a:b", "你好", "con", " "])
def test_names_that_file_systems_take(tmp_path, name):
    mlp_with(name).save_pretrained(tmp_path)
    assert load(tmp_path / name, name).active_adapter == name


# the hub


def answers(monkeypatch, **by_file):
    """Let the hub answer for each file with an error or a path; return the list of files that were asked for."""
    asked = []

    def download(repo, filename, **_):
        asked.append(filename)
        answer = by_file[filename.partition(".")[0] + filename[-4:].replace(".", "_")]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **_: None)
    return asked


def http(cls):
    error = cls.__new__(cls)  # their arguments differ between versions
    error.args = ("of the hub",)
    return error


FAILURES = {
    "network": (lambda: errors.LocalEntryNotFoundError("no connection"), "cannot be reached"),
    "server": (lambda: http(errors.HfHubHTTPError), "HfHubHTTPError"),
    "revision": (lambda: http(errors.RevisionNotFoundError), "no revision 'v9'"),
    "gated": (lambda: http(errors.GatedRepoError), "gated"),
    "repository": (lambda: http(errors.RepositoryNotFoundError), "no such repository"),
    "disk": (lambda: OSError(28, "No space left on device"), "No space left"),
}


@pytest.mark.differs("a network or hub failure")
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_of_the_hub_is_told_as_what_it_is(monkeypatch, saved, case):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    make, words = FAILURES[case]
    failure = make()
    answers(monkeypatch, adapter_configjson=failure)
    with pytest.raises(HubError, match=words) as raised:
        graft.PeftConfig.from_pretrained("a/b", revision="v9")
    assert raised.value.__cause__ is failure and isinstance(raised.value, ValueError)
    asked = answers(
        monkeypatch, adapter_configjson=str(saved / CONFIG), adapter_modelsors=failure, adapter_model_bin=""
    )
    refuses(HubError, words, load, "a/b", revision="v9")
    assert asked == [CONFIG, TENSORS], "the other format is not asked for"


def test_a_file_that_is_not_there(monkeypatch, saved):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    gone = http(errors.RemoteEntryNotFoundError)
    answers(monkeypatch, adapter_configjson=gone)
    refuses(graft.CheckpointError, f"Can't find '{CONFIG}' at 'a/b'$", graft.PeftConfig.from_pretrained, "a/b")
    torch.save(tensors_of(saved), saved / BIN)
    asked = answers(
        monkeypatch, adapter_configjson=str(saved / CONFIG), adapter_modelsors=gone, adapter_model_bin=str(saved / BIN)
    )
    load("a/b")
    assert asked == [CONFIG, TENSORS, BIN]


@pytest.mark.differs("the name of a folder that is not there, with the hub out of reach")
def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """Its own downloads try again for half a minute, which no folder of that name is worth."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def metadata(url, **_):
        asked.append(url)
        raise ConnectionError("no route")

    def download(repo, filename, local_files_only=False, **_):
        assert local_files_only, "tries again and again"
        raise errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in ("my_adapter", "out/my_adapter"):
        refuses(HubError, f"no folder '{name}' here.*cannot be reached: no route", load, name)
    assert len(asked) == 2


def test_a_hub_that_cannot_be_reached_gives_what_its_cache_has(monkeypatch, saved):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answers(monkeypatch, adapter_configjson=str(saved / CONFIG), adapter_modelsors=str(saved / TENSORS))

    def metadata(url, **_):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    load("a/b")


def test_an_offline_hub_is_said(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(graft.CheckpointError, match=f"Can't find '{CONFIG}' at 'a/b'.*HF_HUB_OFFLINE"):
        graft.PeftConfig.from_pretrained("a/b")


def test_a_larger_vocabulary_on_the_hub_is_that_of_the_adapters_revision(monkeypatch, tmp_path):
    import transformers

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    models.make("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = graft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    graft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    more, asked = base.config.vocab_size + 3, {}

    def download(repo, filename, revision=None, **_):
        asked[repo, filename] = revision
        if not (tmp_path / "adapter" / filename).is_file():
            raise http(errors.EntryNotFoundError)
        return str(tmp_path / "adapter" / filename)

    def tokenizer(repo, revision=None, **_):
        asked[repo, "tokenizer"] = revision
        return range(more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **_: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    loaded = graft.AutoPeftModelForCausalLM.from_pretrained("a/b", revision="v2")
    assert loaded.get_base_model().get_input_embeddings().num_embeddings == more
    assert set(asked.values()) == {"v2"} and {("a/b", "tokenizer"), ("a/b", "tokenizer_config.json")} <= set(asked)


# code


@pytest.mark.differs("`trust_remote_code` of `AutoPeftModel…` for classes of transformers")
def test_a_tokenizer_beside_an_adapter_runs_no_code(tmp_path, monkeypatch):
    import transformers

    seen = []

    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": [3, 4]}

        def __len__(self):
            return 3

    def from_pretrained(where, **options):
        seen.append(options.get("trust_remote_code"))
        return Tokenizer()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    base = models.make("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = graft.get_peft_model(base, graft.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    graft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    graft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert seen == [False, True]
    text = prompts.first(
        "PROMPT_TUNING", prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="y"
    )
    prompts.adapt(graft, text)
    with pytest.warns(graft.PeftWarning, match="trust_remote_code is ignored"):
        prompts.adapt(
            graft, prompts.first("PROMPT_TUNING", **text.kwargs, tokenizer_kwargs={"trust_remote_code": True})
        )
    assert seen == [False, True, False, False]


MAPPINGS = [
    {"parent_library": "transformers"},
    {"base_model_class": "x"},
    {"parent_library": 3, "base_model_class": "x"},
    {"parent_library": "transformers", "base_model_class": "logging"},
    {"parent_library": "transformers.nowhere", "base_model_class": "x"},
]


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_an_auto_mapping_that_names_no_class(saved, mapping):
    edit(saved, auto_mapping=mapping, base_model_name_or_path="x")
    refuses(graft.ConfigError, "auto_mapping", graft.AutoPeftModel.from_pretrained, saved)


def test_a_warning_that_is_an_error_is_no_damage(saved, monkeypatch):
    tensors = tensors_of(saved)
    (saved / TENSORS).unlink()
    torch.save(tensors, saved / BIN)
    real = torch.load

    def load(*args, **kwargs):
        warnings.warn("of torch's", UserWarning, stacklevel=1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    model = mlp_with("default")
    before = snapshot(model)
    refuses(UserWarning, "of torch's", model.load_adapter, saved, "default")  # tests make errors of warnings
    unchanged(model, before)
    with pytest.warns(UserWarning, match="of torch's"):
        model.load_adapter(saved, "default")


def test_a_slow_pattern_without_the_package_regex(monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(graft.ConfigError, match=r"of target_modules needs the package regex.*pip install regex"):
        reading.Pattern("(a+)+b", "target_modules")
    assert reading.Pattern("a.b", "target_modules").match("axb")
