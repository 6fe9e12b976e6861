# SPDX-License-Identifier: Apache-2.0
"""`check`: each condition holds for an adapter that has it and for no plain one; each row of the data can come up."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from inspect import isfunction
from math import sqrt

import numpy as np
import pytest

from graft.core.errors import ConfigError
from graft.files import skeleton
from graft.files.base import read_base_files
from graft.files.formats import read
from graft.files.neutral import AdapterFile, LowRank
from graft.files.serving import VERDICTS, ServerOptions, Subject, check_servers, list_servers, read_server_data
from graft.files.tensors import make_tensor
from tests.files import adapters

Q0 = "model.layers.0.self_attn.q_proj"
CASES = {  # condition → adapter that fulfils it, server, options, text of what it returns
    "another_format": ("plain", "mlx", ServerOptions(), "peft"),
    "torch_file": ("bin/plain", "lorax", ServerOptions(), "adapter_model.bin"),
    "another_method": ("method/LoHaConfig", "vllm", ServerOptions(), "LOHA"),
    "kasa": ("kasa", "vllm", ServerOptions(), "KASA"),
    "blocks": ("bdlora", "vllm", ServerOptions(), "BDLORA"),
    "pooled": ("qalora", "vllm", ServerOptions(), "QALORA"),
    "dora": ("dora", "vllm", ServerOptions(), Q0),
    "bias": ("bias", "vllm", ServerOptions(), Q0),
    "extra_tensors": ("velora", "vllm", ServerOptions(), "lora_velora_embed"),
    "invocation_tokens": ("alora", "vllm", ServerOptions(), "[3, 4]"),
    "layer_replication": ("replicated", "vllm", ServerOptions(), "[1, 2]"),
    "base_changed_and_kept": ("pissa", "vllm", ServerOptions(), Q0),
    "base_changed": ("peft/pissa", "vllm", ServerOptions(), "'pissa'"),
    "whole_norms": ("whole norm", "vllm", ServerOptions(), "model.norm"),
    "whole_modules": ("whole head", "vllm", ServerOptions(), "lm_head"),
    "another_vocabulary": ("resized/embed", "vllm", ServerOptions(), "(44, 24)"),
    "token_rows": ("rows", "vllm", ServerOptions(), "2 rows of model.embed_tokens.weight"),
    "embeddings": ("embedding", "openvino", ServerOptions(), "model.embed_tokens"),
    "output_head": ("lm_head", "onnxruntime", ServerOptions(), "lm_head"),
    "kernels": ("conv/conv2d", "openvino", ServerOptions(), "kernel of"),
    "rank_above_the_limit": ("plain", "vllm", ServerOptions(max_rank=3), "rank 4, the limit is 3"),
    "rank_above_128": ("high", "lorax", ServerOptions(), "rank 130"),
    "several_ranks": ("patterns", "mlx", ServerOptions(), "ranks [2, 4]"),
    "scale_is_not_one": ("scaled", "openvino", ServerOptions(), "the scale 1.5, and would get 1"),
    "scale_is_not_alpha_by_the_rank": ("rslora", "llama.cpp", ServerOptions(), "the scale 4, and would get 2"),
    "scale_is_not_alpha_by_r": ("patterns", "sglang", ServerOptions(), "the scale 2.5, and would get 2"),
    "scale_is_not_the_configs": ("patterns", "lorax", ServerOptions(), "the scale 2.5, and would get 2"),
    "regular_expression": ("regex", "sglang", ServerOptions(), "(q|v)_proj"),
    "q_without_v": ("q", "sglang", ServerOptions(), Q0),
    "some_layers_only": ("one layer", "lorax", ServerOptions(), "model.layers.N.self_attn.q_proj on 1 of 2 layers"),
    "targets_excluded": ("plain", "vllm", ServerOptions(targets=("q_proj", "o_proj")), "up_proj"),
}
OTHERS = {  # conditions that have tests of their own
    "file_of_added_tokens", "fields_missing", "scale_is_not_told", "dora_of_kohya", "experts", "modules_missing",
    "layers_missing", "prefixes_differ", "stacks_of_sglang", "transformer_of_kohya", "not_whole", "unknown_keys",
    "stacks_of_peft",
}  # fmt: skip


def subject(adapter, server="vllm", options=None, base=True):
    held = adapter if isinstance(adapter, AdapterFile) else read(adapters.folder(adapter))
    return Subject(
        held, list_servers()[server], options or ServerOptions(), read_base_files(adapters.base()) if base else None
    )


def holds(name, *args, **options):
    return subject(*args, **options).find(name)


@pytest.mark.parametrize("name", CASES)
def test_a_condition_that_is_fulfilled(name):
    adapter, server, options, text = CASES[name]
    assert text in " ".join(holds(name, adapter, server, options))


@pytest.mark.parametrize("name", sorted({*CASES} | OTHERS))
def test_a_condition_that_is_not(name):
    """Neither with the base nor without: plain LoRA has none of them."""
    server = CASES[name][1] if name in CASES and name != "another_format" else "vllm"
    for base in True, False:
        assert holds(name, "plain", server, base=base) == []


def test_every_condition_is_tested_and_used():
    methods = {name for name, of in vars(Subject).items() if isfunction(of) and not name.startswith("_")} - {"find"}
    assert {*CASES} | OTHERS == methods
    assert not {*CASES} & OTHERS
    assert {row["when"] for row in all_rows()} == methods


def all_rows():
    return [*read_server_data()["every"], *(row for of in read_server_data()["servers"].values() for row in of["rows"])]


@pytest.mark.parametrize("name", list_servers())
def test_the_data(name):
    of = read_server_data()["servers"][name]
    assert (
        {"version", "date", "formats", "rows"} <= {*of} <= {"version", "date", "formats", "rows", "max_rank", "heads"}
    )
    assert max(Counter(row["when"] for row in of["rows"]).values()) == 1
    for row in (*read_server_data()["every"], *of["rows"]):
        assert {"when", "verdict", "does", "remedy"} <= {*row} <= {"when", "verdict", "does", "remedy", "evidence"}
        assert row["verdict"] in VERDICTS and row["does"]
        remedy = read_server_data()["remedies"][row["remedy"]].format(
            server="S", adapter="A", format="F", base="B", max_rank=3
        )
        assert bool(remedy) == (row["verdict"] != "ok" or row["when"] in ("dora", "output_head")), row


def test_no_remedy_is_left_over():
    used = {row["remedy"] for row in all_rows()}
    assert used == {*read_server_data()["remedies"]}


@pytest.mark.parametrize(
    "adapter, server, expected",
    [
        ("plain", "vllm", {}),
        ("patterns", "vllm", {}),
        ("rslora", "vllm", {}),
        ("dora", "vllm", {"dora": "refused"}),
        ("dora", "lorax", {"dora": "ignored"}),
        ("rslora", "sglang", {"scale_is_not_alpha_by_r": "wrong"}),
        ("rslora", "lorax", {}),
        ("scaled", "openvino", {"scale_is_not_one": "wrong"}),
        ("plain", "openvino", {}),
        ("peft/pissa", "sglang", {"base_changed": "wrong"}),
        ("lm_head", "vllm", {"output_head": "ok"}),
        ("velora", "openvino", {"scale_is_not_one": "wrong"}),
        ("whole norm", "llama.cpp", {"another_format": "refused", "whole_norms": "wrong",}),
        ("q", "sglang", {"q_without_v": "refused"}),
    ],
)  # fmt: skip
def test_what_a_server_does(adapter, server, expected):
    """As SERVERS were measured and read."""
    found = check_servers(read(adapters.folder(adapter)), [server], read_base_files(adapters.base()))
    assert {f.condition: f.verdict for f in found} == expected
    for f in found:
        assert f.ok == (f.verdict == "ok")
        assert (f.version, f.date) == (list_servers()[server].version, list_servers()[server].date)


def test_a_server_that_nobody_knows():
    with pytest.raises(ConfigError, match=r"ollama.*vllm"):
        check_servers(read(adapters.folder("plain")), ["vllm", "ollama"])


def test_the_rank_that_a_server_has_room_for_by_default():
    assert holds("rank_above_the_limit", "high") and not holds("rank_above_the_limit", "high", "sglang")
    assert not holds("rank_above_the_limit", "high", options=ServerOptions(max_rank=130))


def test_packed_projections_pass_together():
    """vLLM's --lora-target-modules q_proj lets k and v pass."""
    assert holds("targets_excluded", "plain", "vllm", ServerOptions(targets=("q_proj",))) == ["up_proj"]
    assert holds("targets_excluded", "plain", "sglang", ServerOptions(targets=("q_proj",))) == ["up_proj", "v_proj"]


# files that somebody changed, or made by hand


def copied(tmp_path, name="plain"):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters.folder(name), folder)
    return folder


def test_added_tokens(tmp_path):
    folder = copied(tmp_path)
    assert not holds("file_of_added_tokens", read(folder))
    (folder / "added_tokens.json").write_text("{}")
    assert holds("file_of_added_tokens", read(folder)) == ["added_tokens.json"]


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules"])
def test_a_field_that_is_missing(field, tmp_path):
    folder = copied(tmp_path)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[field]
    held = read(adapters.folder("plain"))
    assert holds("fields_missing", replace(held, config=config)) == [field]


def by_hand(format, path="lora", magnitude=False, kind="linear", **options):
    a, b = make_tensor(np.ones((2, 6), "f4")), make_tensor(np.ones((6, 2), "f4"))
    m = make_tensor(np.ones(6, "f4")) if magnitude else None
    return AdapterFile(format, "x", "LORA", {path: LowRank(a, b, 0.5, kind, m)}, **options)


def test_files_of_diffusers():
    assert holds("scale_is_not_told", by_hand("diffusers")) == ["lora"]
    assert not holds("scale_is_not_told", by_hand("diffusers", metadata={"lora_adapter_metadata": "{}"}))
    assert holds("dora_of_kohya", by_hand("kohya", magnitude=True)) == ["magnitude of lora"]
    assert not holds("dora_of_kohya", by_hand("diffusers", magnitude=True))


def test_stacks_of_experts():
    assert holds("experts", by_hand("peft", "model.layers.0.mlp.experts.down_proj", kind="experts"))


# names


def renamed(adapter, change):
    held = read(adapters.folder(adapter))
    return replace(held, modules={change(path): of for path, of in held.modules.items()})


@pytest.mark.parametrize(
    "change, condition",
    [
        (lambda path: path.replace("model.", "model.language_model.", 1), "prefixes_differ"),
        (lambda path: path.removeprefix("model."), "prefixes_differ"),
        (lambda path: path.replace("layers.1", "layers.7"), "layers_missing"),
        (lambda path: path.replace("up_proj", "w3"), "modules_missing"),
    ],
)
def test_names_that_the_base_does_not_have(change, condition):
    adapter = renamed("plain", change)
    names = ("prefixes_differ", "layers_missing", "modules_missing")
    assert [name for name in names if holds(name, adapter)] == [condition]
    assert all(path not in read(adapters.folder("plain")).modules for path in holds(condition, adapter))
    assert not any(holds(name, adapter, base=False) for name in names)


def test_the_class_that_the_server_runs(tmp_path):
    """An adapter of the text model does nothing in the multimodal one, whose checkpoint has a third kind of names."""
    transformers = pytest.importorskip("transformers")
    text = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, vocab_size=41)
    vision = dict(
        hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text)
    )
    adapters.quietly(transformers.LlavaForConditionalGeneration(config).save_pretrained, tmp_path)
    base, server = read_base_files(tmp_path), list_servers()["vllm"]
    adapter = read(adapters.folder("plain"))
    assert Subject(adapter, server, base=base).find("prefixes_differ") == [*adapter.modules]
    there = renamed("plain", lambda path: path.replace("model.", "model.language_model.", 1))
    assert not {*there.modules} <= {*base.modules}  # the checkpoint says language_model.model
    assert not Subject(there, server, base=base).find("prefixes_differ")


def test_the_class_is_built_once_for_a_server(monkeypatch):
    made, whole = [], skeleton.build_meta_model
    monkeypatch.setattr(skeleton, "build_meta_model", lambda path: made.append(path) or whole(path))
    assert check_servers(renamed("plain", lambda path: f"x.{path}"), ["vllm"], read_base_files(adapters.base()))
    assert len(made) == 1


def test_a_base_that_transformers_does_not_know(tmp_path):
    """Its config names a class, and no type: then only the checkpoint's names are compared."""
    shutil.copytree(adapters.base(), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    found = check_servers(renamed("plain", lambda path: f"x.{path}"), ["vllm"], read_base_files(tmp_path / "base"))
    assert "prefixes_differ" in {f.condition for f in found}


def test_scales_in_figures():
    held = read(adapters.folder("rslora"))
    assert {of.scale for of in held.low_rank.values()} == {8 / sqrt(4)}
