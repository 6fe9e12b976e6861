# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods without its weights: every method of LoRA's family on a tiny model, table and picture."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.compare import __main__ as compare
from examples.compare import choices, one
from examples.compare.choices import CHOICES, FAMILY, LEFT_OUT
from examples.demo_lm import data
from graft.methods import ROWS
from tests.examples.test_demo_lm import tokenizer, write  # noqa: F401

MADE = dict(exact=0.5, lenient=0.6, loss=0.1, seconds=3.0, steps=3, cpu_seconds=2.0, prepare_seconds=0.0,
            peak_memory=2e9, bytes=40_000, parameters=1000, lr=0.003, note="r 4")  # fmt: skip


def made(name, *args, **settings):
    return MADE | {"lr": CHOICES[name].lr, "note": CHOICES[name].note}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):  # noqa: F811
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    tokens = dict(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", [*FAMILY, "LoRA-SB", "MoE-LoRA", "MixLoRA"])
@pytest.mark.filterwarnings("ignore")
def test_a_method_trains_saves_and_answers(name, source, capsys):
    task = data.dates(0, held_out=4, train=100, write=write)
    result = one.run(CHOICES[name], source, task, steps=2, seed=0)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["step"] for event in events] == [1, 2, 2] and events[-1]["answering"]
    assert 0 <= result["exact"] <= result["lenient"] <= 1
    assert result["bytes"] > 500 and result["parameters"] > 100 and result["peak_memory"] > 1e8


def test_logits_of_the_answers_alone_give_the_same_loss(source):
    model, words = one.load(source)
    pairs = data.dates(0, held_out=4, train=100, write=write).train[:5]
    batch = one.training_batch(words, "Write the date in ISO 8601.", pairs)
    cut = one.answers_only(batch)
    assert 0 < cut["labels"].shape[1] < batch["labels"].shape[1]
    torch.testing.assert_close(model(**cut).loss, model(**batch).loss)


def test_every_choice_has_a_config():
    configs = {name: choice.config(60) for name, choice in CHOICES.items()}
    assert {c.task_type for c in configs.values()} == {"CAUSAL_LM"}
    found = {type(config).__name__ for config in configs.values()}
    assert {row.config for row in ROWS.values()} == found | set(LEFT_OUT) and not found & set(LEFT_OUT)


def test_a_result_of_another_choice_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "model_source", lambda source: source)
    monkeypatch.setattr(compare, "compare", made)
    arguments = ["--quick", "--model", "x", "--out", str(tmp_path)]
    compare.main([*arguments, "LoRA", "DoRA"])
    assert list(compare.main([*arguments, "LoRA"])["methods"]) == ["LoRA", "DoRA"]
    monkeypatch.setitem(CHOICES, "DoRA", replace(CHOICES["DoRA"], lr=0.1))
    assert list(compare.main([*arguments, "LoRA"])["methods"]) == ["LoRA"]
    assert "Not for this task: TLoraConfig (needs the timesteps" in (tmp_path / "compare.md").read_text()


def test_table_picture_and_going_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(compare, "model_source", lambda source: source)
    monkeypatch.setattr(compare, "compare", lambda name, *a, **b: calls.append(name) or made(name))
    arguments = ["--quick", "--model", "x", "--out", str(tmp_path)]
    compare.main([*arguments, "LoRA"])
    results = compare.main([*arguments, "--lora"])
    assert calls == list(FAMILY) and list(results["methods"]) == list(FAMILY), "what is there is not done again"
    assert "| LoRA | r 4, q and v | 0.50 ± 0.16 |" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    compare.main([*arguments, "--again", "LoRA"])
    assert calls[-1] == "LoRA"
    with pytest.raises(SystemExit):
        compare.main([*arguments, "Lora"])


def test_three_seeds_have_a_mean_and_a_spread(tmp_path, monkeypatch):
    seen = []

    def run(name, source, seed, **settings):
        seen.append((name, seed))
        return made(name) | {"exact": (0.2, 0.5, 0.8)[seed], "loss": float(seed)}

    monkeypatch.setattr(compare, "model_source", lambda source: source)
    monkeypatch.setattr(compare, "compare", run)
    arguments = ["--model", "x", "--out", str(tmp_path), "LoRA"]
    compare.main([*arguments, "--seeds", "1"])
    assert "| LoRA | r 4, q and v | 0.20 ± 0.04 |" in (tmp_path / "compare.md").read_text()  # of one seed: over dates
    found = compare.main([*arguments, "DoRA"])["methods"]["LoRA"]
    assert "| LoRA | r 4, q and v | 0.50 ± 0.30 |" in (tmp_path / "compare.md").read_text() and found["loss"] == 1.0
    assert seen == [("LoRA", 0), ("DoRA", 0), ("LoRA", 1), ("DoRA", 1), ("LoRA", 2), ("DoRA", 2)], "none twice"
    compare.main(arguments)
    assert len(seen) == 6


def test_a_rate_that_was_searched_on_the_dates_is_taken(monkeypatch):
    row = dict(method="LoRA", task="dates", steps=9, config={"r": 4, "lora_alpha": 16}, rates=[0.1, 0.2], means=[2, 1])
    other = row | dict(config={"r": 8, "lora_alpha": 16}, means=[1, 2])
    monkeypatch.setattr(choices, "read_searches", lambda: [row, other, row | dict(task="spam", means=[1, 2])])
    assert choices.searched("LoRA", FAMILY["LoRA"]).lr == 0.2
    assert choices.searched("DoRA", FAMILY["DoRA"]) is FAMILY["DoRA"]


def test_learning_rates_are_tried_on_validation_dates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "model_source", lambda source: source)
    monkeypatch.setattr(compare, "compare", lambda *a, rate, **b: MADE | {"lr": rate})
    arguments = ["--quick", "--model", "x", "--out", str(tmp_path)]
    found = compare.main(["LoRA", "IA3", "--rates", "0.01", "3e-2", *arguments])
    assert {name: list(rates) for name, rates in found.items()} == {"LoRA": [0.01, 0.03], "IA3": [0.01, 0.03]}
    assert "10 validation questions" in capsys.readouterr().out and not list(tmp_path.iterdir())
    for wrong in (["--rates", "0.01"], ["LoRA", "--rates", "0.01", "0"]):
        with pytest.raises(SystemExit):
            compare.main([*wrong, *arguments])
    seen = []
    task = data.dates(0, held_out=4, train=100, write=write)
    monkeypatch.setattr(one, "dates", lambda *a: task)
    monkeypatch.setattr(one, "run", lambda choice, source, task, *a: seen.append((choice.lr, task.test)) or MADE)
    one.compare("LoRA", "x", 1, 0, 4, 0.05)
    one.compare("LoRA", "x", 1, 0, 4)
    assert seen == [(0.05, task.validation), (CHOICES["LoRA"].lr, task.test)]


def test_the_others_go_on_after_a_method_that_fails(tmp_path, monkeypatch, capsys):
    def run(name, *args, **settings):
        if name != "PiSSA":
            raise compare.DemoError(f"{name} ended without a result")
        return MADE

    monkeypatch.setattr(compare, "model_source", lambda source: source)
    monkeypatch.setattr(compare, "compare", run)
    arguments = ["--quick", "--model", "x", "--out", str(tmp_path)]
    with pytest.raises(compare.DemoError, match="DoRA ended without a result; MiCA ended"):
        compare.main([*arguments, "DoRA", "PiSSA", "MiCA"])
    assert list(json.loads((tmp_path / "compare.json").read_text())["methods"]) == ["PiSSA"]
    assert "| PiSSA |" in (tmp_path / "compare.md").read_text()
    with pytest.raises(compare.DemoError, match="LoRA ended without a result"):
        compare.main([*arguments, "--again", "LoRA"])
    capsys.readouterr()
    with pytest.raises(compare.DemoError, match="LoRA ended without a result"):
        compare.main([*arguments, "LoRA", "PiSSA", "--rates", "0.1"])
    assert "PiSSA" in capsys.readouterr().out


def test_a_child_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(compare.sys, "executable", "/bin/false")
    with pytest.raises(compare.DemoError, match="LoRA ended without a result: no message"):
        compare.compare("LoRA", "/nowhere", steps=1, seed=0, held_out=1)
