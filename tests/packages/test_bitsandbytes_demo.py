# SPDX-License-Identifier: Apache-2.0
"""The story of `make demo-4bit` on a tiny model, in this process."""

import json
from functools import partial

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from examples.demo_4bit import __main__ as demo
from examples.demo_4bit import one
from examples.demo_lm import data
from tests.examples.test_demo_lm import tokenizer, write  # noqa: F401 - a fixture


@pytest.fixture
def source(tokenizer, tmp_path):  # noqa: F811
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    tokens = dict(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("base, method", demo.RUNS)
def test_each_run_tells_its_results(base, method, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(one, "dates", partial(data.dates, write=write))
    one.main(base, method, source, tmp_path / "adapter", steps=2, seed=0, held_out=10)
    *events, last = map(json.loads, capsys.readouterr().out.splitlines())
    result = last["result"]
    assert [e["step"] for e in events if "step" in e] == [1, 2]
    assert list(result["exact"]) == (["as trained"] if base == "dense" else list(demo.PLACES))
    assert result["file_bytes"] > 0 and result["peak_memory"] > 0 and result["cpu_seconds"] > 0
    demo.console.print(demo.costs({"run": result}), demo.answers({"run": result}, 10))


def test_packed_weights_are_smaller(source):
    assert one.bytes_of(one.base(source, "4-bit")) < one.bytes_of(one.base(source, "dense"))
