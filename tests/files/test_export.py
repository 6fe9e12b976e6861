# SPDX-License-Identifier: Apache-2.0
"""`export`: what it writes does what the adapter did, in graft and in PEFT, and has the one form that servers read."""

from __future__ import annotations

import json
import os
import re

import peft
import pytest
import torch

import graft
from graft.core.errors import BaseModelMismatchError, ConfigError, LossError
from graft.files import formats
from graft.files.base import read_base_files
from graft.files.errors import OptionError
from graft.files.export import export_adapter_file
from graft.files.export_model import export_model_adapter as export_of_model
from graft.files.serving import check_servers
from tests.files import adapters
from tests.models import inputs, make, output, seeded

EXACT = [
    "plain", "scaled", "patterns", "rslora", "regex", "paths", "one layer", "q", "pissa", "olora", "velora",
    "monteclora", "qalora", "bdlora", "lm_head", "embedding", "high", "kasa",
]  # fmt: skip
REFUSED = {
    "dora": "magnitude", "bias": "lora_bias", "whole head": "lm_head", "whole norm": "model.norm", "rows": "2 rows",
    "alora": "alora_invocation_tokens", "replicated": "layer_replication", "peft/pissa": "pissa",
    "method/LoHaConfig": "LOHA", "method/IA3Config": "IA3", "resized/embed": "embed_tokens",
}  # fmt: skip


def run(model):
    with torch.no_grad():
        return output(model, inputs("llama"))


def truth(name):
    return run(adapters.quietly(graft.PeftModel.from_pretrained, make("llama"), adapters.folder(name)).eval())


def exported(name, path, server="vllm"):
    base = read_base_files(adapters.base())
    return export_adapter_file(formats.read(adapters.folder(name), base), server, base, str(path))


def loaded(path, lib=graft):
    return lib.PeftModel.from_pretrained(make("llama"), str(path)).eval()


def assert_form(path):
    """The file says nothing that a server could fail to read."""
    config = json.loads((path / "adapter_config.json").read_text())
    held = formats.read(path)
    assert config["r"] == config["lora_alpha"]
    assert isinstance(config["target_modules"], list) and not any(
        re.search(r"\d|\*", t) for t in config["target_modules"]
    )
    assert not any(config.get(name) for name in (
        "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save", "layers_to_transform",
        "lora_bias",
    ))  # fmt: skip
    assert {(of.rank, of.scale) for of in held.low_rank.values()} == {(config["r"], 1.0)}
    assert not held.full and not held.unknown_keys and all(not of.extra for of in held.low_rank.values())


@pytest.mark.parametrize("name", EXACT)
def test_it_does_what_the_adapter_did(name, tmp_path):
    report = exported(name, tmp_path)
    assert_form(tmp_path)
    expected = truth(name)
    assert (expected - run(make("llama"))).abs().max() > 0.05
    for lib in graft, peft:
        torch.testing.assert_close(run(loaded(tmp_path, lib)), expected, rtol=1e-5, atol=1e-5)
    assert len(formats.read(tmp_path).modules) == report.modules
    assert report.rounding == 0 and report.error is None


@pytest.mark.parametrize("name", [name for name in EXACT if name != "high"])
def test_no_server_has_anything_against_it(name, tmp_path):
    exported(name, tmp_path, "sglang")
    read = formats.read(tmp_path)
    found = check_servers(read, ["vllm", "sglang", "lorax", "openvino"], read_base_files(adapters.base()))
    assert {f.condition for f in found} <= {"embeddings", "output_head"}, found


def test_what_changed_is_said(tmp_path):
    names = ("plain", "one layer", "pissa", "velora")
    notes = {name: " ".join(exported(name, tmp_path / name).notes) for name in names}
    assert "zeros" not in notes["plain"] and "3 modules have factors of zeros" in notes["one layer"]
    assert "twice the rank" in notes["pissa"] and "lora_velora_embed" in notes["velora"]


def save_in(dtype, folder, part="lora_", name="rslora"):
    """Save an adapter, the parameters with this in their names in another dtype."""
    model = adapters.model(name)
    for key, p in model.named_parameters():
        p.data = p.data.to(dtype) if part in key else p.data
    model.save_pretrained(folder)


def test_a_file_in_half_precision(tmp_path):
    """B with the scale in it is cast once, and the error is said."""
    save_in(torch.bfloat16, tmp_path / "bf16")
    base = read_base_files(adapters.base())
    held = formats.read(tmp_path / "bf16")
    assert {of.B.dtype for of in held.low_rank.values()} == {"BF16"}
    for of in held.low_rank.values():
        of.scale = 1.37
    report = export_adapter_file(held, "vllm", base, str(tmp_path / "out"))
    assert 1e-4 < report.rounding < 2**-8
    written = formats.read(tmp_path / "out")
    for path, of in written.low_rank.items():
        assert of.B.dtype == "BF16"
        torch.testing.assert_close(
            torch.tensor(of.B.read().copy()), torch.tensor(1.37 * held.low_rank[path].B.read()), rtol=2**-8, atol=0
        )


def test_factors_of_two_dtypes_are_written_in_float32(tmp_path):
    save_in(torch.bfloat16, tmp_path / "mixed", "lora_B")
    report = export_adapter_file(
        formats.read(tmp_path / "mixed"), "vllm", read_base_files(adapters.base()), str(tmp_path / "out")
    )
    before, after = (formats.read(tmp_path / name).low_rank for name in ("mixed", "out"))
    assert report.rounding == 0
    for path, of in after.items():
        rank = len(before[path].A.read())
        assert (of.A.read()[:rank] == before[path].A.read()).all()


def test_a_scale_that_half_precision_cannot_hold(tmp_path):
    save_in(torch.float16, tmp_path / "fp16", name="plain")
    base = read_base_files(adapters.base())
    held = formats.read(tmp_path / "fp16")
    path = next(iter(held.modules))
    for scale, says in ((1e6, ".*F16"), (float("nan"), "")):
        held.modules[path].scale = scale
        with pytest.raises(LossError, match=re.escape(path) + says):
            export_adapter_file(held, "vllm", base, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_plain_lora_cannot_hold(name, tmp_path):
    with pytest.raises(LossError, match=re.escape(REFUSED[name])) as refused:
        exported(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if name in ("dora", "bias", "whole head", "whole norm", "rows", "resized/embed"):
        assert "graft merge" in str(refused.value)


@pytest.mark.parametrize(
    "name, server", [("embedding", "openvino"), ("embedding", "lorax"), ("lm_head", "onnxruntime")]
)
def test_modules_that_a_server_does_not_adapt(name, server, tmp_path):
    with pytest.raises(LossError, match=rf"{server} adapts .* factors there: .*graft merge"):
        exported(name, tmp_path / "out", server)
    assert not (tmp_path / "out").exists()


def test_sglang_gets_v_beside_q(tmp_path):
    exported("q", tmp_path / "a", "sglang")
    exported("q", tmp_path / "b", "vllm")
    config = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab"]
    assert [c["target_modules"] for c in config] == [["q_proj", "v_proj"], ["q_proj"]]


def test_modules_of_another_name(tmp_path):
    """Those of the multimodal class become the text model's, as the base has them; what it lacks is an error."""
    held, base = formats.read(adapters.folder("plain")), read_base_files(adapters.base())
    modules = held.modules
    held.modules = {path.replace("model.", "model.language_model.", 1): of for path, of in modules.items()}
    report = export_adapter_file(held, "vllm", base, str(tmp_path / "a"))
    assert len(report.renamed) == len(modules)
    torch.testing.assert_close(run(loaded(tmp_path / "a")), truth("plain"), rtol=1e-5, atol=1e-5)
    held.modules = {path.replace("layers.1", "layers.5"): of for path, of in modules.items()}
    with pytest.raises(BaseModelMismatchError, match=r"no module 'model\.layers\.5"):
        export_adapter_file(held, "vllm", base, str(tmp_path / "b"))


def test_a_suffix_that_other_modules_have(tmp_path):
    """`fc1` of one part of a model and `fc1` of another: the suffix is as long as it takes."""
    on = torch.nn.ModuleDict({name: torch.nn.ModuleDict({"fc1": torch.nn.Linear(6, 6)}) for name in ("left", "right")})
    model = graft.get_peft_model(on, graft.LoraConfig(target_modules=["left.fc1"], init_lora_weights=False))
    export_of_model(model, "default", "vllm", str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["left.fc1"]


def test_an_unknown_server(tmp_path):
    with pytest.raises(ConfigError, match=r"ollama.*vllm"):
        exported("plain", tmp_path, "ollama")
    with pytest.raises(ConfigError, match="ollama"):
        adapters.model("plain").save_pretrained(tmp_path, for_server="ollama")
    assert not os.listdir(tmp_path)


def test_a_format_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "WRITTEN", ("peft",))
    with pytest.raises(OptionError, match="gguf"):
        exported("plain", tmp_path, "llama.cpp")
    assert not os.listdir(tmp_path)


# from a model


@pytest.mark.parametrize("name", ["patterns", "pissa", "lm_head"])
def test_save_pretrained_for_a_server(name, tmp_path):
    model = adapters.model(name)
    expected = run(model)
    model.save_pretrained(tmp_path, for_server="vllm")
    assert_form(tmp_path)
    for lib in graft, peft:
        torch.testing.assert_close(run(loaded(tmp_path, lib)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(model), expected)  # which is as it was


PROMPT = graft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
MODELS = {  # what is refused of a model in memory
    "dora": (lambda: adapters.model("dora"), LossError, "graft merge"),
    "kasa, which changed the base": (lambda: adapters.model("kasa"), LossError, r"KASA.*save it, and export the file"),
    "prompt": (lambda: graft.get_peft_model(make("llama"), PROMPT), LossError,
               r"'default' \(PROMPT_TUNING\) is an input"),
    "no update": (lambda: adapters.moved(make("llama"), graft.BottleneckConfig()), TypeError,
                  "support LoRA conversion"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_refuses(name, tmp_path):
    build, error, text = MODELS[name]
    with pytest.raises(error, match=text):
        build().save_pretrained(tmp_path, for_server="vllm")
    assert not os.listdir(tmp_path)


def test_several_adapters(tmp_path):
    model = adapters.model("plain")
    with seeded(4):
        model.add_adapter("other", graft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path, for_server="vllm")
    assert_form(tmp_path)
    assert_form(tmp_path / "other")


@pytest.mark.parametrize("kind", ["LoHaConfig", "HiraConfig", "VeraConfig", "IA3Config", "SupertuningConfig"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_method_becomes_lora_of_the_rank_that_holds_it(kind, dtype, tmp_path):
    options = {"VeraConfig": dict(target_modules=["q_proj"])}.get(kind, dict(target_modules=adapters.LISTED))
    options |= dict(feedforward_modules=[]) if kind == "IA3Config" else {}
    model = adapters.moved(make("llama").to(dtype), getattr(graft, kind)(**options))
    for p in model.parameters():
        p.data = p.data.to(dtype)
    report = export_of_model(model, "default", "vllm", str(tmp_path))
    assert_form(tmp_path)
    exact = dtype == torch.float32
    assert report.error is not None and report.error < (1e-4 if exact else 2**-7)
    if exact:
        torch.testing.assert_close(run(loaded(tmp_path, peft)), run(model), rtol=1e-4, atol=1e-4)


def test_adalora_is_exact(tmp_path):
    model = adapters.moved(make("llama"), graft.AdaLoraConfig(total_step=9, target_modules=adapters.LISTED))
    model.save_pretrained(tmp_path / "a")
    base = read_base_files(adapters.base())
    export_adapter_file(formats.read(tmp_path / "a", base), "vllm", base, str(tmp_path / "out"))
    assert_form(tmp_path / "out")
    torch.testing.assert_close(run(loaded(tmp_path / "out", peft)), run(model), rtol=1e-5, atol=1e-5)


def test_a_rank_that_loses_much_is_an_error_that_names_the_layer(tmp_path):
    model = adapters.moved(make("llama"), graft.LoHaConfig(r=4, target_modules=adapters.LISTED))
    for rank in (2, 0.9):
        with pytest.raises(LossError, match=rf"rank {rank}, .* loses too much: 'model\.layers.*%.*--lossy"):
            export_of_model(model, "default", "vllm", str(tmp_path / "out"), rank=rank)
    plain = adapters.model("plain")
    with pytest.warns(UserWarning, match="already a LoRA adapter"), pytest.raises(LossError, match="loses too much"):
        export_of_model(plain, "default", "vllm", str(tmp_path / "out"), rank=2)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        export_of_model(plain, "default", "vllm", str(tmp_path / "out"), rank=5)
    torch.testing.assert_close(run(loaded(tmp_path / "out", peft)), run(plain), rtol=1e-4, atol=1e-4)


def test_a_rank_above_the_limits_of_servers(tmp_path, monkeypatch):
    model = adapters.moved(make("llama"), graft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    monkeypatch.setattr("graft.files.export_model.RANK", 8)
    with pytest.raises(LossError, match=r"\(IA3\) needs rank \d+ on 'model\.layers\..*take 8 at most.*graft merge"):
        export_of_model(model, "default", "vllm", str(tmp_path))
    assert not os.listdir(tmp_path)
    assert export_of_model(model, "default", "vllm", str(tmp_path), rank=8, lossy=True).error > 0.01


def test_a_truncated_method_says_its_error(tmp_path):
    """Against the weights themselves."""
    model = adapters.moved(make("llama"), graft.LoHaConfig(r=4, target_modules=adapters.LISTED))
    report = export_of_model(model, "default", "vllm", str(tmp_path), rank=2, lossy=True)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, graft.AdapterLayer)}
    made = {n: m for n, m in loaded(tmp_path).named_modules() if isinstance(m, graft.AdapterLayer)}
    exact = {n: layer.get_delta_weight("default") for n, layer in layers.items()}
    lost = sum(float((exact[n] - made[n].get_delta_weight("default")).square().sum()) for n in exact)
    assert report.error == pytest.approx((lost / sum(float(d.square().sum()) for d in exact.values())) ** 0.5, rel=1e-4)
    assert report.error > 0.1
