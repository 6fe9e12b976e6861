# SPDX-License-Identifier: Apache-2.0
"""`verify` tells what a server does with an adapter: it asks one that runs another file, as a faulty server would."""

from __future__ import annotations

import copy
import math
import time
from contextlib import suppress

import pytest
import torch

import graft
from graft import ServerError, UnknownModelError
from graft.core.errors import BaseModelMismatchError
from graft.files.ask import Connection, identify_server
from graft.files.verify import verify_server
from tests.models import make, nudged, seeded
from tests.serving.server import answers, serving

TARGETS = ["q_proj", "v_proj", "up_proj", "lm_head"]
RANKS = dict(r=9, rank_pattern={"up_proj": 4}, alpha_pattern={"lm_head": 3})


def strong_lora(seed=1, **options):
    """A model with an adapter of order-one effect, LoRA of these options."""
    with seeded(seed):
        config = graft.LoraConfig(**dict(target_modules=TARGETS, r=4, lora_alpha=6, task_type="CAUSAL_LM") | options)
        model = graft.get_peft_model(make("llama"), config)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.normal_(std=0.15)
    return model.eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def loader(folder):
    return lambda base: graft.PeftModel.from_pretrained(base, folder).eval()


def scaled(model, k):
    """A copy whose B is k times as large."""
    return without(model, "", k)


def without(model, part, k=0):
    """A copy whose B in this part is k times as large."""
    other = copy.deepcopy(model)
    for name, p in other.named_parameters():
        if "lora_B" in name and part in (*name.split("."), ""):
            p.data.mul_(k)
    return other


def verdict(folder, served, kind="vllm", dtype="float32", base=None):
    with serving({"base": answers(base or make("llama")), "tuned": answers(served)}, kind) as url:
        return verify_server(Connection(url), make("llama"), loader(folder), "tuned", "base", dtype)


@pytest.fixture(scope="module")
def model():
    return strong_lora()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return saved(model, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp", "openai"])
def test_an_adapter_that_the_server_applies(kind, folder, model):
    found = verdict(folder, model, kind)
    assert found.ok and found.verdict == "applied"
    assert found.effect > 0.1 and found.deviations["applied"] < 1e-5


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp"])
def test_a_server_that_answers_as_its_base(kind, folder):
    found = verdict(folder, make("llama"), kind)
    assert (found.verdict, found.ok) == ("not applied", False)


@pytest.mark.parametrize("k", [0.05, 0.354, 1.25, 2.0, 11.0])
def test_a_scale_that_is_off(k, folder, model):
    found = verdict(folder, scaled(model, k))
    assert found.verdict == "scale off"
    assert found.scale == pytest.approx(k, rel=1e-3)


def test_a_scale_of_one(folder, model):
    assert "does not read the config" in verdict(folder, scaled(model, 4 / 6)).text


def test_a_server_without_rslora(tmp_path):
    model = strong_lora(use_rslora=True, r=9)
    found = verdict(saved(model, tmp_path), scaled(model, 1 / 3))
    assert found.scale == pytest.approx(1 / 3, rel=1e-3)
    assert "use_rslora" in found.text


@pytest.mark.parametrize("there, not_read, text", [
    (dict(alpha_pattern={"layers.0.self_attn.q_proj": 24, "up_proj": 1}), {}, "patterns not read"),
    (dict(RANKS, use_rslora=True), RANKS, "use_rslora not read"),
], ids=["patterns", "rslora where ranks differ"])  # fmt: skip
def test_what_of_a_config_is_not_read(there, not_read, text, tmp_path):
    model, other = strong_lora(**there), strong_lora(**not_read)
    other.load_state_dict(model.state_dict())
    assert verdict(saved(model, tmp_path), other).verdict == text


@pytest.mark.parametrize("part", ["lm_head", "v_proj"])
def test_a_part_that_is_missing(part, folder, model):
    found = verdict(folder, without(model, part))
    assert found.verdict == "missing"
    assert found.text.startswith(f"{part} missing")


@pytest.mark.parametrize("part", ["all", "lm_head"])
def test_a_base_that_answers_with_the_adapter(part, folder, model):
    """As vLLM on a CPU does with lm_head, after an adapter that has one."""
    leaked = model
    for other in ("q_proj", "v_proj", "up_proj") if part == "lm_head" else ():
        leaked = without(leaked, other)
    found = verdict(folder, model, base=leaked)
    assert (found.verdict, found.ok) == ("in the base too", False)
    assert f"({part} of it)" in found.text and found.deviations["applied"] < 1e-5


def test_another_adapter(folder):
    found = verdict(folder, strong_lora(seed=2))
    assert found.verdict == "another adapter"
    assert min(found.deviations.values()) > 10 * found.tolerance


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_server_of_less_precision(dtype, folder, model):
    """Its own rounding is no fault; what it does wrong is seen all the same."""
    half = getattr(torch, dtype)
    for served, expected in (model, "applied"), (make("llama"), "not applied"), (scaled(model, 2), "scale off"):
        served = copy.deepcopy(served).to(half)
        found = verdict(folder, served, dtype=dtype, base=make("llama").to(half))
        assert found.verdict == expected, found


def test_an_adapter_that_has_not_been_trained(tmp_path):
    config = graft.LoraConfig(target_modules=TARGETS, r=4)
    model = graft.get_peft_model(make("llama"), config).eval()
    assert verdict(saved(model, tmp_path), model).verdict == "too small to tell"


def test_a_start_that_changes_the_base(tmp_path):
    """PiSSA's base without the adapter is not the server's base."""
    config = graft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa")
    with seeded(3):
        model = nudged(graft.get_peft_model(make("llama"), config))
    assert verdict(saved(model, tmp_path), model).ok
    assert verdict(str(tmp_path), make("llama")).verdict == "not applied"


def test_methods_without_a_scaling(tmp_path):
    with seeded(3):
        model = graft.get_peft_model(make("llama"), graft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
        for name, p in model.named_parameters():
            if "ia3" in name:
                p.data.normal_(1, 0.5)
    folder = saved(model.eval(), tmp_path)
    assert verdict(folder, model).ok
    assert verdict(folder, make("llama")).verdict == "not applied"
    assert verdict(folder, strong_lora()).verdict == "another adapter"


# servers that are not right


def ask_it(folder, answer=None, timeout=5.0, base=None, kind="vllm", name="tuned", **options):
    base = base or answers(make("llama"))
    with serving({"base": base, "tuned": base}, kind, answer) as url:
        return verify_server(Connection(url, timeout), make("llama"), loader(folder), name, "base", **options)


def test_another_base(folder):
    with seeded(5):
        other = make("llama")
        for p in other.parameters():
            p.data.add_(0.05 * torch.randn(p.shape))
    with pytest.raises(BaseModelMismatchError, match="differs from this base model"):
        ask_it(folder, base=answers(other))


def say(said, *paths, code=200):
    """Answer requests to these paths, all POST if there are none, with what is said."""
    chosen = lambda handler: handler.path in paths if paths else handler.command == "POST"
    return lambda handler: chosen(handler) and (handler.say(said, code) or True)


def test_another_tokenizer(folder):
    tokens = [f"token_id:{i}" for i in range(40)]
    said = {"choices": [{"logprobs": {"token_logprobs": [None, *[-1.0] * 39], "tokens": tokens}}]}
    with pytest.raises(BaseModelMismatchError, match="another vocabulary"):
        ask_it(folder, say(said, "/v1/completions"))


def test_a_larger_vocabulary(folder):
    large = lambda ids: torch.zeros(len(ids), 50).log_softmax(-1)
    with pytest.raises(BaseModelMismatchError, match="the base model 41"):
        ask_it(folder, base=large, kind="llama.cpp")


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_a_name_that_the_server_does_not_know(kind, folder):
    with pytest.raises(UnknownModelError, match=r"no (model|adapter) 'tuend'.*tuned"):
        ask_it(folder, name="tuend", kind=kind)


@pytest.mark.parametrize(
    "said", [b"<html>", b"[1, 2", b"", b"null", {"choices": []}, {"choices": [{"logprobs": None}]}, [], {"choices": 1},
             {"choices": [{"logprobs": {"token_logprobs": [None, *["x"] * 20], "tokens": []}}]},
             {"choices": [{"logprobs": {"token_logprobs": [None, *[math.nan] * 20], "tokens": []}}]},
             {"choices": [{"logprobs": {"token_logprobs": [None, *[-math.inf] * 20], "tokens": ["token_id:x"]}}]}],
)  # fmt: skip
def test_garbage(said, folder):
    with pytest.raises(ServerError, match="/v1/completions"):
        ask_it(folder, say(said))


@pytest.mark.parametrize("said", [b"", {"data": 3}, {"data": [3]}, [], {}])
def test_garbage_instead_of_models(said, folder):
    with pytest.raises(ServerError, match="/v1/models"):
        ask_it(folder, lambda handler: handler.say(said) or True)


@pytest.mark.parametrize(
    "said", [{}, {"completion_probabilities": [{}]}, {"completion_probabilities": [{"top_logprobs": []}]}]
)
def test_garbage_of_llama(said, folder):
    piece, values = say({"content": "a"}, "/detokenize"), say(said, "/completion")
    with pytest.raises(ServerError, match="/completion"):
        ask_it(folder, lambda handler: piece(handler) or values(handler), kind="llama.cpp")


def test_a_generated_token_that_is_a_part_of_a_character(folder, model):
    """llama.cpp's server tells nothing of it; with a bias to a plain token it does."""
    plain = []

    def answer(handler):
        if handler.path == "/detokenize":
            plain.append(handler.body["tokens"][0])
            handler.say({"content": "word" if plain[-1] == 7 else "\ufffd"})
        elif handler.path == "/completion" and handler.body.get("logit_bias") != [[7, 100]]:
            handler.say({"content": ""})
        else:
            return False
        return True

    with serving({"base": answers(make("llama")), "tuned": answers(model)}, "llama.cpp", answer) as url:
        assert verify_server(Connection(url), make("llama"), loader(folder), "tuned", "base").ok
    assert set(plain) == {3, 4, 5, 6, 7}


@pytest.mark.parametrize("code", [500, 503, 400, 401])
def test_a_server_that_fails(code, folder):
    with pytest.raises(ServerError, match=f"answers {code}.*out of memory"):
        ask_it(folder, say({"error": "out of memory"}, code=code))


def test_a_server_that_is_slow(folder):
    def answer(handler):
        if handler.command == "POST":
            time.sleep(1)
        return False

    with pytest.raises(ServerError, match=r"within 0\.3 s"):
        ask_it(folder, answer, timeout=0.3)


def test_a_server_that_sends_a_byte_now_and_then(folder):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        with suppress(BrokenPipeError):
            for _ in range(20):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.1)
        return True

    before = time.monotonic()
    with pytest.raises(ServerError, match=r"within 0\.3 s"):
        ask_it(folder, answer, timeout=0.3)
    assert time.monotonic() - before < 1.5


def test_no_server():
    with pytest.raises(ServerError, match="cannot be reached"):
        identify_server(Connection("http://127.0.0.1:9"))


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp", "openai"])
def test_which_server_it_is(kind):
    with serving({"base": answers(make("llama"))}, kind) as url:
        assert identify_server(Connection(url + "/v1/")) == kind
