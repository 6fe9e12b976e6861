# SPDX-License-Identifier: Apache-2.0
"""Control characters of names, configs and servers' answers: no verb prints one, and neither do reports and errors."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import graft
from graft.command import app
from graft.core import errors
from graft.inject.report import InjectReport, Matched
from graft.many.table import make_run_table
from tests.files import adapters
from tests.serving.server import answers, serving

EVIL = "\x1b]0;x\x07\x1bc\r\u202e\u2066\x9b31m\nequal"
NAME, FILES = f"self{EVIL}_attn", ("adapter_model.safetensors", "model.safetensors")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, a tuned model, and adapters whose folders, tensors, targets and cards have control characters."""
    made = tmp_path_factory.mktemp("evil")
    shutil.copytree(adapters.base(), made / "BASE")
    shutil.copytree(adapters.base(), made / "TUNED")
    for name, source in ("A", "plain"), ("B", "scaled"), ("DORA", "dora"), ("GOOD", "plain"):
        shutil.copytree(adapters.folder(source), made / name)
        config = json.loads((made / name / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": f"someone/{EVIL}", "revision": EVIL, "alpha_pattern": {EVIL: 3}}
        if name != "GOOD":
            config["target_modules"] = [*config["target_modules"], EVIL]
        (made / name / "adapter_config.json").write_text(json.dumps(config))
        (made / name / "README.md").write_text(f"---\nlicense: {EVIL}\n---\n")
    for folder in ("BASE", "TUNED", "A", "B", "DORA"):
        (path,) = (made / folder / name for name in FILES if (made / folder / name).exists())
        tensors = {name.replace("self_attn", NAME): t for name, t in load_file(path).items()}
        if folder == "TUNED":
            tensors = {name: t + torch.ones_like(t) if NAME in name else t for name, t in tensors.items()}
        save_file(tensors, path, {"format": "pt"})
    (made / "A").rename(made / f"A{EVIL}")
    (made / "OTHERS").mkdir()
    (made / "OTHERS" / EVIL).write_text("Dear")
    return {path.name.removesuffix(EVIL): path for path in made.iterdir()} | {"OUT": made / f"out{EVIL}"}


VERBS = [
    ("inspect A --spectrum", 0), ("inspect A --base BASE", 0), ("diff A B", 1), ("diff A B --base BASE", 1),
    ("lint A", 0), ("lint A --base BASE", 0), ("resize A -o OUT --rank 2", 0),
    ("resize A -o OTHERS --rank 2 --force", 2),
    ("extract TUNED BASE -o OUT --rank 2", 0), ("merge BASE A -o OUT", 0), ("merge BASE A -o OTHERS --force", 2),
    ("convert A --to gguf --base BASE -o OUT", 5 if find_spec("gguf") else 2), ("convert A --to mlx -o OUT", 0),
    ("convert DORA --to kohya -o OUT", 0),
    ("check A --for vllm,sglang,llama.cpp,mlx --base BASE", 1), ("check DORA --for vllm", 1),
    ("export A --for vllm --base BASE -o OUT", 0), ("export DORA --for vllm --base BASE -o OUT", 5),
    ("plan BASE --targets EVIL", 4), ("plan GOODBASE --targets q_proj --seq 8", 0),
    ("plan GOODBASE --config A --seq 8", 0), ("verify --adapter GOOD --base GOODBASE --url URL --model EVIL", 2),
    ("verify --adapter A --base BASE --url URL", 2), ("inspect EVIL", 3), ("EVIL", 2), ("lint A --EVIL", 2),
    ("inspect A EVIL", 2), ("resize A -o OUT --rank EVIL", 2), ("merge BASE A -o OUT --weights EVIL", 2),
]  # fmt: skip


@pytest.mark.parametrize("words, code", VERBS)
def test_no_verb_prints_them(words, code, places, monkeypatch, capfd):
    if places["OUT"].is_dir():
        shutil.rmtree(places["OUT"])
    known = {**places, "EVIL": EVIL, "--EVIL": f"--{EVIL}", "GOODBASE": adapters.base()}
    refuse = lambda h: h.say(f"no such model {EVIL}".encode(), 404) or True
    with serving({}, answer=refuse) as url:
        monkeypatch.setattr(
            sys, "argv", ["graft", *(str(known.get(word, word)).replace("URL", url) for word in words.split())]
        )
        with pytest.raises(SystemExit) as left:
            app.main()
    printed = capfd.readouterr()
    assert (left.value.code or 0) == code, printed
    assert printed.out or printed.err
    for line in (printed.out + printed.err).split("\n"):
        assert line.isprintable() and line != "equal", (words, line)
    for stream in printed:
        assert "\ufffd" not in stream


def test_verify_prints_what_a_server_answers(places, run):
    model = adapters.model("plain")
    names = {f"{EVIL}-base": answers(adapters.make("llama")), EVIL: answers(model)}
    with serving(names) as url:
        words = "--adapter", places["GOOD"], "--base", adapters.base(), "--url", url, "--base-name", "nobody"
        code, *said = run("verify", *words)
    printed = "".join(said)
    assert code == 2 and "\\x1b" in printed and printed.rstrip("\n").isprintable()


def test_names_are_shown_escaped(places, run):
    printed = run("inspect", places["A"], "--spectrum")[1]
    shown = errors.escape_controls(EVIL)
    assert f"model.layers.0.self{shown}_attn.q_proj" in printed and f"someone/{shown}" in printed
    assert shown == r"\x1b]0;x\x07\x1bc\r\u202e\u2066\x9b31m\nequal"


def test_verbs_print_by_one_function():
    """print itself would show names as they are."""
    package = Path(app.__file__).parent
    for path in sorted(package.glob("*.py")):
        if path.name not in ("app.py", "show.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            assert not [n.lineno for n in calls if getattr(n.func, "id", None) == "print"], path


def rendered(what):
    out = io.StringIO()
    Console(width=200, file=out, force_terminal=False).print(what)
    return out.getvalue()


def test_reports_errors_and_warnings():
    report = InjectReport(
        f"a{EVIL}[/]", "LORA", [Matched(f"m{EVIL}", "[bold]Linear", 3)], unmatched_targets={"[qv]_proj": []}
    )
    for text in (rendered(report), str(report)):
        assert all(line.isprintable() for line in text.split("\n"))
        assert "[/]" in text and "[qv]_proj" in text and "[bold]Linear" in text
    error = graft.core.errors.AdapterNameError(f"no adapter can be called {EVIL}")
    assert str(error) == r"no adapter can be called \x1b]0;x\x07\x1bc\r\u202e\u2066\x9b31m" + "\nequal"
    assert errors.join_some([EVIL]) == f"[{errors.escape_controls(EVIL)}]"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        errors.warn(f"of {EVIL}")
    assert "\x1b" not in str(told[0].message) and "\\x1b" in str(told[0].message)


def test_the_table_of_runs():
    class Run:
        name, step, steps, curve, valid, lr, tokens_per_second, state = f"[/]{EVIL}", 1, 2, [], [], 0.1, 3.0, "running"

    text = rendered(make_run_table([Run()]))
    assert all(line.isprintable() for line in text.split("\n")) and "[/]" in text


def test_the_card_of_a_saved_adapter(tmp_path):
    base = adapters.make("llama")
    base.name_or_path = base.config._name_or_path = f"someone/{EVIL}"
    graft.get_peft_model(base, graft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "someone/" in card and all(line.isprintable() for line in card.split("\n"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == f"someone/{EVIL}"


def test_status_and_numbers_of_a_model(capsys):
    make = adapters.make
    model = graft.get_peft_model(make("llama"), graft.LoraConfig(target_modules=["q_proj"]), adapter_name=f"a{EVIL}")
    model.print_trainable_parameters()
    planned = graft.plan(make("llama"), graft.LoraConfig(target_modules=["q_proj", EVIL]))
    print(model.get_model_status(), model.get_layer_status(), graft.audit(model), planned)
    printed = capsys.readouterr().out
    assert "\\x1b" in printed and all(line.isprintable() for line in printed.split("\n"))
