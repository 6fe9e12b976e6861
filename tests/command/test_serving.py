# SPDX-License-Identifier: Apache-2.0
"""`graft check`, `export` and `verify` as commands: exit codes, what they print, what they leave behind."""

import json
import re
import shutil
import warnings

import pytest
import typer
from safetensors.torch import load_file, save_file

from graft.command import app, models
from graft.core.errors import PeftWarning
from graft.files.serving import read_server_data as serving_data
from tests.files import adapters
from tests.models import make
from tests.serving.server import answers, serving


def test_check_finds_something(run):
    code, out, _ = run("check", adapters.folder("rslora"), "--for", "vLLM,sglang", "--base", adapters.base())
    assert code == 1
    assert "vllm 0.32.0" in out and "ok: no problem is known" in out
    assert "wrong: sglang takes lora_alpha / r for all modules (sglang 40835)" in out
    assert f"graft export {adapters.folder('rslora')} --for sglang --base {adapters.base()}" in out


@pytest.mark.parametrize("remedy", [text for text in serving_data()["remedies"].values() if "graft " in text])
def test_commands_of_remedies_have_all_options_that_they_need(remedy):
    known = dict(adapter="an-adapter", base="a-base", server="vllm", format="gguf", max_rank="16")
    command = remedy.format(**known).partition("graft ")[2]
    words = re.split(",|;| writes", command)[0].split()
    group = typer.main.get_command(app.app)
    group.commands[words[0]].make_context(words[0], words[1:])


def test_check_finds_nothing(run):
    code, out, _ = run("check", adapters.folder("plain"), "--for", "vllm")
    assert code == 0 and "Names of modules were not compared" in out


def test_check_for_programs(run):
    code, out, _ = run("check", adapters.folder("dora"), "--for", "vllm,lorax", "--json")
    found = {f["server"]: f["verdict"] for f in json.loads(out)["findings"]}
    assert (code, found) == (1, {"vllm": "refused", "lorax": "ignored"})


def test_check_takes_the_servers_options(run):
    options = "--for", "vllm", "--max-rank", 3, "--lora-target-modules", "q_proj, o_proj"
    _, out, _ = run("check", adapters.folder("plain"), *options)
    assert "the limit is 3" in out and "ignored" in out and "up_proj" in out


def test_export_and_check_again(run, tmp_path):
    out = tmp_path / "out"
    to = "--base", adapters.base(), "-o", out
    code, said, _ = run("export", adapters.folder("patterns"), "--for", "sglang", *to)
    assert code == 0 and "all modules have rank 4" in said
    assert run("check", out, "--for", "vllm,sglang,lorax,openvino", "--base", adapters.base())[0] == 0
    assert run("export", adapters.folder("plain"), "--for", "vllm", *to)[0] == 2
    assert run("export", adapters.folder("plain"), "--for", "vllm", *to, "--force", "-q") == (0, "", "")


@pytest.mark.parametrize("name", ["method/LoHaConfig", "peft/pissa"])
def test_export_of_what_needs_the_base(name, run, tmp_path):
    """Another method becomes factors; PEFT's PiSSA is subtracted from the base as it was."""
    base, out = adapters.base(), tmp_path / "out"
    code, said, _ = run("export", adapters.folder(name), "--for", "vllm", "--base", base, "-o", out, "--json")
    report = json.loads(said)
    assert code == 0
    assert ("relative error" in report["notes"][0]) == (report["error"] is not None) == (name == "method/LoHaConfig")
    assert run("check", out, "--for", "vllm", "--max-rank", 64)[0] == 0


def test_export_of_a_rank_that_loses_much(run, tmp_path):
    loha = adapters.folder("method/LoHaConfig")
    words = "export", loha, "--for", "vllm", "--base", adapters.base(), "--rank", 2, "-o"
    code, out, err = run(*words, tmp_path / "out")
    assert code == 5 and "loses too much" in err and "--lossy" in err and not (tmp_path / "out").exists()
    code, out, err = run(*words, tmp_path / "out", "--lossy")
    assert code == 0 and "rank 2" in out, err


@pytest.mark.parametrize("served, code, says", [("plain", 0, "applies the adapter"), ("lm_head", 1, "another adapter")])
def test_verify(served, code, says, run):
    held = {"base": answers(make("llama")), "tuned": answers(adapters.model(served))}
    words = "verify", "--model", "tuned", "--adapter", adapters.folder("plain"), "--base", adapters.base()
    with serving(held) as url:
        found, out, err = run(*words, "--url", url)
        assert (found, says in out) == (code, True), out + err
        assert json.loads(run(*words, "--url", url, "--json")[1])["ok"] == (code == 0)
        assert run(*words[:2], "nobody", *words[3:], "--url", url)[0] == 2


@pytest.mark.parametrize(
    "old, new", [("q_proj", "query"), ("_proj", "_dense"), ("self_attn", "attn"), ("layers.1.", "layers.7.")]
)
def test_verify_an_adapter_of_other_names(old, new, run, tmp_path):
    """It does not fit the base: exit code 4, whatever the server does."""
    shutil.copytree(adapters.folder("plain"), tmp_path / "a")
    weights, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    save_file({name.replace(old, new): t for name, t in load_file(weights).items()}, weights)
    config.write_text(config.read_text().replace(old, new))
    base = answers(make("llama"))
    with serving({"base": base, "adapter": base}) as url, warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # of the targets that match nothing
        code, out, err = run("verify", "--adapter", tmp_path / "a", "--base", adapters.base(), "--url", url)
    assert (code, out) == (4, "") and new.strip(".").rpartition(".")[2] in err, err


@pytest.mark.parametrize(
    "words, code, says",
    [
        (("--url", "http://127.0.0.1:9"), 3, "cannot be reached"),
        (("--url", "http://127.0.0.1:9", "--server", "vllm"), 3, "cannot be reached"),
        (("--url", "URL", "--server", "tgi"), 2, "vllm, sglang, llama.cpp, openai"),
        (("--url", "URL", "--dtype", "int8"), 2, "bfloat16"),
        (("--url", "URL", "--tolerance", "inf"), 2, "tolerance=inf"),
        (("--url", "URL", "--timeout", "inf"), 2, "timeout inf"),
        (("--url", "URL", "--api-key", "a b"), 2, "API key"),
    ],
)
def test_verify_asks_before_it_loads_the_base(words, code, says, run, monkeypatch):
    monkeypatch.setattr(models, "load_base", lambda *_, **__: pytest.fail("the base is loaded"))
    with serving({"base": None}) as url:
        given = [url if word == "URL" else word for word in words]
        found, out, err = run("verify", "--adapter", adapters.folder("plain"), "--base", adapters.base(), *given)
    assert (found, out) == (code, "") and says in err, err


def test_verify_an_adapter_of_another_format(run, tmp_path):
    """MLX keeps factors transposed: what it says of the folder would be wrong if it were read as PEFT's."""
    other = tmp_path / "mlx"
    assert run("convert", adapters.folder("plain"), "--to", "mlx", "--base", adapters.base(), "-o", other)[0] == 0
    held = {"base": answers(make("llama")), "tuned": answers(adapters.model("plain"))}
    with serving(held) as url:
        code, out, err = run("verify", "--url", url, "--model", "tuned", "--adapter", other, "--base", adapters.base())
    assert code == 0 and "applies the adapter" in out, out + err
