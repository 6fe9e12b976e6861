# SPDX-License-Identifier: Apache-2.0
"""The search for learning rates on a tiny model: what it writes, and how it goes on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from examples.compare import fields, rates, texts
from examples.demo.data import DemoError

SIZES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
ARGUMENTS = ["--rates", "0.001", "0.5", "--tasks", "topics", "--steps", "2"]


def base():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Return a function that searches on a tiny BERT, and the names of the sweeps that it has run."""
    ids = torch.randint(40, (24, 6), generator=torch.Generator().manual_seed(1))
    data = DataLoader([{"input_ids": row, "labels": row[0] % 3} for row in ids], 4, shuffle=True)
    valid = DataLoader(data.dataset, 8)
    lacks = {"SHADOW": "for causal models"}
    field = fields.Field(
        "tiny", "bert", base, fields.for_bert, fields.two_groups(3, 32), data, valid, 4, lacks=lacks, test=valid
    )
    monkeypatch.setitem(rates.FIELDS, "topics", lambda task, quick: field)
    swept, sweep = [], rates.graft.sweep

    def counted(model, config, *args, **options):
        swept.append(config.peft_type.value)
        return sweep(model, config, *args, **options)

    monkeypatch.setattr(rates.graft, "sweep", counted)
    into = ["--into", str(tmp_path / "rates.json"), "--out", str(tmp_path)]
    return lambda *names: rates.main([*ARGUMENTS, *into, *names]), swept, tmp_path / "rates.json"


def test_a_row_for_each_method_and_no_search_twice(search):
    run, swept, file = search
    run("LoRA", "IA3")
    found = json.loads(file.read_text())
    assert [row["method"] for row in found] == ["LoRA", "IA3"] and found[0]["config"] == {"r": 4, "lora_alpha": 16}
    for row in found:
        assert len(row["means"]) == len(row["spreads"]) == 2 and row["steps"] == 2 and row["model"] == "tiny"
        assert 0 < row["spreads"][0] != row["spreads"][1] > 0  # three trainings at each of two rates
    assert [row["adapter"] for row in run("DoRA", "LoRA")] == ["LoRA", "IA3", "DoRA"]
    assert swept == ["LORA", "IA3", "LORA"]
    run("LoRA", "--rank", "2")
    assert [row["config"]["r"] for row in json.loads(file.read_text()) if row["method"] == "LoRA"] == [2, 4]


def test_means_are_those_of_training_alone(search):
    run, _, file = search
    run("LoRA")
    row, field = json.loads(file.read_text())[0], rates.FIELDS["topics"]("topics", False)
    losses = []
    for seed in rates.SEEDS:
        config, fresh = field.fit(rates.CHOICES["LoRA"].made(2, None)), base().eval()
        torch.manual_seed(seed)
        model = rates.graft.get_peft_model(fresh, config)
        optimizer = field.optimizer([p for p in model.parameters() if p.requires_grad], lr=0.5)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 2)
        batches = iter(field.train)
        for _ in range(2):
            model(**next(batches)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(torch.stack([model(**batch).loss for batch in field.valid]).mean().item())
    assert row["means"][1] == pytest.approx(sum(losses) / 3, abs=2e-4)


@pytest.mark.parametrize("name", ["OLoRA", "EVA", "LoRA-SB", "KaSA", "AdaLoRA", "prompt tuning"])
def test_what_a_sweep_cannot_train_trains_alone(search, name):
    run, swept, file = search
    run(name, "--steps", "12")
    (row,) = json.loads(file.read_text())
    assert not swept and row["method"] == name and row["spreads"][0] > 0 and row["means"][0] != row["means"][1]


def test_alone_is_as_in_a_sweep(search):
    run, _, file = search
    run("LoRA", "IA3")
    field = rates.FIELDS["topics"]("topics", False)
    for row in json.loads(file.read_text()):
        choice = rates.CHOICES[row["method"]]
        config = field.fit(choice.made(2, None))
        losses = [rates.judged(field, choice, config, 0.5, 2, seed) for seed in rates.SEEDS]
        assert row["means"][1] == pytest.approx(sum(losses) / 3, abs=2e-4)


def test_what_has_no_place_in_a_model_is_left_out(search, capsys):
    run, _, file = search
    run("SHADOW", "IA3")
    assert [row["method"] for row in json.loads(file.read_text())] == ["IA3"]
    assert "topics: left out SHADOW, for causal models" in capsys.readouterr().out


def test_a_method_that_fails_does_not_keep_the_others(search, monkeypatch):
    run, _, file = search
    monkeypatch.setitem(rates.CHOICES, "IA3", dataclasses.replace(rates.CHOICES["IA3"], config=lambda steps: 1 / 0))
    with pytest.raises(DemoError, match="IA3: ZeroDivisionError"):
        run("IA3", "LoRA")
    assert [row["method"] for row in json.loads(file.read_text())] == ["LoRA"]


def test_an_unknown_method_is_refused(search, capsys):
    run, swept, _ = search
    with pytest.raises(SystemExit):
        run("lora")
    assert not swept and "no such method: lora" in capsys.readouterr().err


def test_texts_compare_methods_at_their_best_rates(search, tmp_path, monkeypatch, capsys):
    run, _, _ = search
    found = run("LoRA", "IA3", "EVA")
    monkeypatch.setattr(texts, "read_searches", lambda: found)
    arguments = ["--tasks", "topics", "--steps", "3", "--out", str(tmp_path)]
    with pytest.raises(DemoError, match="topics, DoRA: DemoError: no rate was searched"):
        texts.main(["LoRA", "IA3", "EVA", "DoRA", *arguments])
    results = json.loads((tmp_path / "texts.json").read_text())["topics"]
    assert list(results) == ["LoRA", "EVA", "IA3"] and (tmp_path / "topics.png").exists()
    for row in found:
        m = results[row["method"]]
        assert m["lr"] == min(zip(row["means"], row["rates"]))[1]
        assert m["exact"] == pytest.approx(sum(m["seeds"]) / 3) and 0 <= m["exact"] <= 1
        assert m["parameters"] > 100 and m["bytes"] > 500
    monkeypatch.setattr(texts, "once", lambda *args: pytest.fail("trained again"))
    assert texts.main(["LoRA", "IA3", "EVA", *arguments])["topics"] == results
    capsys.readouterr()
