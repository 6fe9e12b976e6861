# SPDX-License-Identifier: Apache-2.0
"""The server as a process on this machine's loopback address, and real clients: OpenAI's own, eight at once.

`make examples` installs what it needs. Without that only what makes answers of tokens is tested.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import queue
import random
import re
import runpy
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import graft
from examples.server.batches import Batches, Row, Search
from examples.server.models import read_prompt
from tests.models import make, seeded

ROOT = Path(__file__).parents[2]
NEEDED = ("fastapi", "uvicorn", "openai")
served = pytest.mark.skipif(
    "GRAFT_EXAMPLES" not in os.environ and not all(map(find_spec, NEEDED)),
    reason="the extra server is not installed: make examples",
)
TASK = {"task_type": "CAUSAL_LM"}
CONFIGS = {
    "red": graft.LoraConfig(**TASK, r=4, target_modules=["q_proj", "v_proj"]),
    "green": graft.LoraConfig(**TASK, r=8, use_dora=True, target_modules="all-linear"),
    "blue": graft.IA3Config(
        **TASK, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "black": graft.LoraConfig(**TASK, r=2, target_modules=["up_proj"]),  # comes later
}
PROMPTS = ["Once", "The answer is", "é", "In the beginning there was a long prompt, and", "5. März 2024"]


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with a tokenizer, and adapters by name, whose weights are noise: each answers otherwise."""
    root = tmp_path_factory.mktemp("served")
    tokenizer = bytes_tokenizer()
    sizes = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, max_position_embeddings=100_000)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
    tokens = dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    with seeded(0):
        base = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens))
    base.lm_head.weight.data[1] = 0  # the end is never the likeliest token: no greedy answer ends by itself
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, config in {**CONFIGS, "prompts": graft.PromptTuningConfig(**TASK, num_virtual_tokens=3)}.items():
        with seeded(sum(map(ord, name))):
            model = graft.get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def address(folder):
    """Where the server listens. It begins with three adapters."""
    adapters = [f"--adapter={name}={folder / name}" for name in ("red", "green", "blue")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "examples.server", "--base", str(folder / "base"), *adapters, "--port", "0"]
    with (folder / "log").open("w") as log:
        environ = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=folder)
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", (folder / "log").read_text())):
            assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield found[1]
    finally:
        server.terminate()
        try:
            server.wait(20)
        finally:
            server.kill()


@pytest.fixture
def client(address):
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def load(client, name: str, folder: Path) -> str:
    return client.post("/load_lora_adapter", body={"lora_name": name, "lora_path": str(folder)}, cast_to=str)


def unload(client, name: str) -> str:
    return client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=str)


@pytest.fixture(scope="module")
def alone(folder):
    """What each adapter answers alone, without a server: greedy, (prompt, tokens) -> token ids."""
    tokenizer = bytes_tokenizer()

    @cache
    def model(name: str):
        base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        return base if name == "base" else graft.PeftModel.from_pretrained(base, folder / name).eval()

    @cache
    def answer(name: str, prompt: str, tokens: int) -> list[int]:
        batch = tokenizer(prompt, return_tensors="pt")
        made = model(name).generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return made[0, batch["input_ids"].shape[1] :].tolist()

    return answer


def ask(client, name: str, prompt: str, tokens: int, stream: bool = False, **how) -> tuple[str, list[int]]:
    """Return the text and the tokens of an answer."""
    how = {"temperature": 0, **how}
    made = client.completions.create(model=name, prompt=prompt, max_tokens=tokens, stream=stream, **how)
    choices = [piece.choices[0] for piece in made] if stream else made.choices
    assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason in ("stop", "length")
    return "".join(c.text for c in choices), [token for c in choices for token in c.token_ids]


def sizes_of_batches(client) -> dict[int, int]:
    found = client.get(str(client.base_url).replace("/v1/", "/health"), cast_to=dict)
    assert found["status"] == "ok"
    return {int(size): count for size, count in found["batches"].items()}


def crowd(work, clients: int = 8) -> list:
    """Run `work(number)` in so many threads that begin together."""
    together = threading.Barrier(clients)

    def one(number: int):
        together.wait()
        return work(number)

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, range(clients)))


@served
def test_eight_clients_get_what_their_adapter_alone_would_answer(client, alone):
    names = ["red", "green", "blue", "base"]
    tokenizer = bytes_tokenizer()

    def work(number: int) -> None:
        for turn in range(6):
            name, prompt = names[(number + turn) % 4], PROMPTS[(number * 3 + turn) % 5]
            tokens, stream = 3 + (5 * number + turn) % 11, bool((number + turn // 2) % 2)
            text, ids = ask(client, name, prompt, tokens, stream)
            assert ids == alone(name, prompt, tokens), (name, prompt, tokens)
            assert text == tokenizer.decode(ids)

    assert len({tuple(alone(name, "Once", 8)) for name in names}) == 4  # they differ
    crowd(work)
    assert max(sizes_of_batches(client)) > 1


@served
def test_a_seed_draws_the_same_alone_and_in_a_crowd(client):
    how = [dict(temperature=0.5 + number / 8, seed=number, top_p=0.9 if number % 2 else 1.0) for number in range(8)]
    names = ["red", "green", "blue", "base"] * 2
    one_by_one = [ask(client, name, "Once", 12, **how) for name, how in zip(names, how)]
    together = crowd(lambda number: ask(client, names[number], "Once", 12, stream=number < 4, **how[number]))
    assert together == one_by_one
    assert ask(client, "red", "Once", 12, temperature=1, seed=1) != ask(
        client, "red", "Once", 12, temperature=1, seed=2
    )
    assert len({ask(client, "red", "Once", 12, temperature=2)[0] for _ in range(3)}) == 3  # no seed: each another


@served
def test_adapters_come_and_go_while_others_answer(client, alone, folder):
    import openai

    going, missing = threading.Event(), []

    def work(number: int) -> int:
        if number == 7:
            try:
                for _ in range(4):
                    assert "black" in load(client, "black", folder / "black")
                    assert ask(client, "black", "Once", 4)[1] == alone("black", "Once", 4)
                    assert "black" in unload(client, "black")
            finally:
                going.set()
            return 0
        answers = 0
        while not going.is_set():
            name = "black" if number % 2 else ["red", "green", "blue", "base"][number // 2]
            try:
                assert ask(client, name, PROMPTS[number % 5], 6, stream=number > 3)[1] == alone(
                    name, PROMPTS[number % 5], 6
                )
                answers += 1
            except openai.NotFoundError:
                assert name == "black"
                missing.append(number)
            except openai.APIError as error:  # in a stream, in which no status can come any more
                assert name == "black" and number > 3 and "unloaded" in str(error)
        return answers

    answers = crowd(work)
    assert all(answers[number] for number in (0, 2, 4, 6)) and missing
    assert [model.id for model in client.models.list()] == ["base", "red", "green", "blue"]


@served
def test_streamed_pieces_come_one_by_one_and_make_up_the_whole(client):
    made = client.completions.create(model="red", prompt=PROMPTS[3], max_tokens=20, temperature=0, stream=True)
    pieces = [piece.choices[0] for piece in made]
    assert len(pieces) == 20 and [len(piece.token_ids) for piece in pieces] == [1] * 20
    assert "".join(piece.text for piece in pieces) == ask(client, "red", PROMPTS[3], 20)[0]


@served
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_the_answer_before_it(client, stream):
    whole, _ = ask(client, "green", "The answer is", 24)
    stop = whole[7:10]
    text, ids = ask(client, "green", "The answer is", 24, stream, stop=["never", stop])
    assert text == whole[: whole.index(stop)] and len(ids) < 24


@served
def test_several_prompts_and_token_ids_in_one_request(client, alone):
    tokenizer = bytes_tokenizer()
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    made = client.completions.create(model="blue", prompt=prompts, max_tokens=5, temperature=0)
    assert [choice.token_ids for choice in made.choices] == [alone("blue", prompt, 5) for prompt in PROMPTS]
    assert made.usage.prompt_tokens == sum(map(len, prompts)) and made.usage.completion_tokens == 25
    made = client.completions.create(model="blue", prompt=prompts[0], max_tokens=5, temperature=0)
    assert made.choices[0].token_ids == alone("blue", PROMPTS[0], 5)


@served
def test_what_cannot_be_answered_is_refused_with_the_reason(client):
    import openai

    with pytest.raises(openai.NotFoundError, match=r"'yellow' does not exist.*red, green, blue") as told:
        ask(client, "yellow", "Once", 3)
    assert (told.value.code, told.value.param, told.value.type) == ("model_not_found", "model", "invalid_request_error")
    for how, says in (
        (dict(max_tokens=0), "max_tokens: .*greater"),
        (dict(max_tokens=100_000), "exceed 100000"),
        (dict(temperature=-1), "temperature"),
        (dict(prompt=[]), "at least one token"),
        (dict(prompt=[3, 9999]), "of 0 to 257"),
        (dict(logit_bias={"3": 1}), "logit_bias: .*not permitted"),
        (dict(n=2), "n: .*not permitted"),
    ):
        with pytest.raises(openai.BadRequestError, match=says) as told:
            client.completions.create(**{"model": "red", "prompt": "Once", **how})
        assert told.value.type == "invalid_request_error"


@served
def test_an_adapter_that_cannot_be_served_is_refused_and_nothing_changes(client, alone, folder):
    import openai

    for name, path, says in (
        ("red", folder / "red", "taken"),
        ("base", folder / "red", "taken"),
        ("else", folder / "nowhere", "no adapter_config.json"),
        ("else", folder / "base", "no adapter_config.json"),
        ("else", folder / "prompts", "acts on no layers"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            load(client, name, path)
    for name in ("base", "else"):
        with pytest.raises(openai.NotFoundError, match=name):
            unload(client, name)
    assert [model.id for model in client.models.list()] == ["base", "red", "green", "blue"]
    assert ask(client, "red", "Once", 5)[1] == alone("red", "Once", 5)


@served
@pytest.mark.parametrize("stream", [False, True])
def test_nobody_waits_for_the_answer_to_a_client_that_went_away(client, alone, stream):
    """Its 90,000 tokens would take minutes."""
    import openai

    how = dict(model="red", prompt="Once", max_tokens=90_000, temperature=0)
    if stream:
        with client.completions.create(**how, stream=True) as made:
            next(iter(made))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1).completions.create(**how)
    assert ask(client.with_options(timeout=30), "blue", "Once", 5)[1] == alone("blue", "Once", 5)


# requests that no client means well by


def send(address: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Send a request with these headers alone; return the status and the body of the answer."""
    place = urlsplit(address)
    with closing(HTTPConnection(place.hostname, place.port, timeout=60)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"host": place.netloc, **headers}.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@served
def test_pages_of_other_sites_ask_nothing(address, folder):
    """A name that a page lets point to this machine, and requests across origins."""
    port = urlsplit(address).port
    loading = json.dumps({"lora_name": "evil", "lora_path": str(folder / "black")}).encode()
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::1",
    ):
        for method, path, body in (
            ("GET", "/health", None), ("GET", "/v1/models", None), ("POST", "/v1/load_lora_adapter", loading),
            ("POST", "/v1/completions", b'{"model": "red", "prompt": "a"}'), ("GET", "/openapi.json", None),
        ):  # fmt: skip
            assert send(address, method, path, body, host=host)[0] in (400, 403), (host, path)
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        assert send(address, "POST", "/v1/load_lora_adapter", loading, origin=origin)[0] == 403
    assert "evil" not in send(address, "GET", "/v1/models")[1]
    for host in (f"127.0.0.1:{port}", "127.0.0.1", "localhost", f"LocalHost:{port}", "[::1]", "192.168.1.7:80"):
        assert send(address, "GET", "/health", host=host)[0] == 200, host
    assert send(address, "GET", "/health", host="localhost", origin="http://localhost")[0] == 200


COMPLETION = {"model": "red", "prompt": "a", "max_tokens": 1}
HOSTILE = {  # name: (body, status)
    "prompts": (COMPLETION | {"prompt": ["a"] * 100_000}, 400),
    "prompts of a token": (COMPLETION | {"prompt": [[5]] * 100_000}, 400),
    "prompts of no kind": (COMPLETION | {"prompt": [{}] * 100_000}, 400),
    "tokens of no kind": (COMPLETION | {"prompt": [5, *["a"] * 100_000]}, 400),
    "a list of those": (COMPLETION | {"prompt": [[5.5] * 100_000]}, 400),
    "two kinds": (COMPLETION | {"prompt": ["a", [5]]}, 400),
    "too many tokens": (COMPLETION | {"prompt": [5] * 200_000}, 400),
    "a long stop": (COMPLETION | {"stop": "a" * 300_000}, 400),
    "long stops": (COMPLETION | {"stop": ["a" * 200_000] * 4}, 400),
    "stops": (COMPLETION | {"stop": ["a"] * 100_000}, 400),
    "stops of no kind": (COMPLETION | {"stop": [5] * 100_000}, 400),
    "a long name": (COMPLETION | {"model": "a" * 900_000}, 400),
    "fields": (COMPLETION | {f"a{n}": 1 for n in range(60_000)}, 400),
    "a user": (COMPLETION | {"user": "a" * 900_000}, 400),
    "numbers": (COMPLETION | {"max_tokens": 10**400, "seed": 10**400}, 400),
    "NaN": (COMPLETION | {"temperature": float("nan"), "top_p": float("nan")}, 400),
    "infinity": (COMPLETION | {"temperature": float("inf")}, 400),
    "a surrogate": (b'{"model": "red", "prompt": "\\ud800"}', 400),
    "a surrogate in a list": (b'{"model": "red", "prompt": ["a", "\\udfff"]}', 400),
    "lists in lists": (b"[" * 200_000, 400),
    "objects in objects": (b'{"a":' * 100_000, 400),
    "digits": (b'{"model": "red", "prompt": "a", "seed": ' + b"1" * 500_000 + b"}", 400),
    "no JSON": (b"\xff" * 900_000, 400),
    "bytes": (b" " * 2_000_000, 413),
}


def peak(folder: Path) -> int:
    """The server's largest memory so far, in kB."""
    number = re.search(r"process \[(\d+)\]", (folder / "log").read_text())[1]
    return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{number}/status").read_text())[1])


@served
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_and_holds_nobody_up(name, address, folder):
    what, status = HOSTILE[name]
    body = what if isinstance(what, bytes) else json.dumps(what).encode()
    send(address, "POST", "/v1/completions", json.dumps(COMPLETION).encode())
    before = peak(folder) if sys.platform == "linux" else 0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(send, address, "POST", "/v1/completions", body)
        waits = []
        while not answer.done():
            begin = time.monotonic()
            assert send(address, "GET", "/health")[0] == 200
            waits.append(time.monotonic() - begin)
    assert answer.result()[0] == status and len(answer.result()[1]) < 1000, answer.result()
    assert max(waits, default=0) < 2
    assert sys.platform != "linux" or peak(folder) - before < 60_000


@served
@pytest.mark.parametrize("name, path", [
    ("\ud800", "RED"), ("evil", "\ud800"), ("", "RED"), ("a" * 300, "RED"), ("evil", "/" + "a" * 5000),
    ("evil", "/dev/zero"), ("evil", "a\0b"), (5, "RED"), ("evil", ["RED"]),
])  # fmt: skip
def test_names_and_folders_that_cannot_be(name, path, address, folder):
    path = str(folder / "red") if path == "RED" else path
    body = json.dumps({"lora_name": name, "lora_path": path}).encode()
    assert send(address, "POST", "/v1/load_lora_adapter", body)[0] == 400
    status, models = send(address, "GET", "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(models)["data"]] == ["base", "red", "green", "blue"]


@served
def test_a_body_without_a_length_is_bounded(address):
    def parts():
        for _ in range(40):
            yield b" " * 50_000

    place = urlsplit(address)
    with closing(HTTPConnection(place.hostname, place.port, timeout=60)) as connection:
        try:
            connection.request("POST", "/v1/completions", parts(), {"content-type": "application/json"})
            assert connection.getresponse().status == 400
        except (BrokenPipeError, ConnectionResetError):
            pass  # it does not wait for the rest


@served
def test_a_long_text_is_tokenized_while_others_are_answered(address):
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            send, address, "POST", "/v1/completions", json.dumps(COMPLETION | {"prompt": "a" * 900_000}).encode()
        )
        while not answer.done():
            asked = time.monotonic()
            assert send(address, "GET", "/health")[0] == 200
            assert time.monotonic() - asked < 2
    assert answer.result()[0] == 400 and "exceed 100000" in answer.result()[1] and time.monotonic() - begin < 30


@served
def test_more_prompts_than_there_is_room_for_are_refused():
    from examples.server.app import Answer, Completion
    from examples.server.models import Busy

    class Models:
        batches = Batches.__new__(Batches)  # its thread has not begun
        vars(batches).update(waiting=queue.SimpleQueue(), room=5, adding=threading.Lock())

        def row(self, name: str, prompt: object, limit: int, **how: object) -> Row:
            return Row([5], "__base__", limit=limit, **how)

    async def ask(count: int) -> None:
        Answer(Completion(model="a", prompt=["b"] * count)).begin(Models())

    asyncio.run(ask(3))
    with pytest.raises(Busy, match="5 prompts wait"):
        asyncio.run(ask(3))
    asyncio.run(ask(2))
    assert Models.batches.waiting.qsize() == 5


def test_a_change_that_waits_too_long_for_another(monkeypatch):
    from examples.server import models as module

    monkeypatch.setattr(module, "PATIENCE", 0.05)
    served_models = module.Models.__new__(module.Models)
    vars(served_models).update(changing=threading.Lock(), folders={"base": "b"}, name="base")
    with served_models.change(), pytest.raises(module.Busy, match="try again"):
        served_models.unload("red")
    with pytest.raises(graft.AdapterNotFoundError):
        served_models.unload("red")


# batches, and tokens of an answer


def test_an_adapter_that_is_there_when_its_batch_begins_stays_until_it_ends():
    config = graft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = graft.get_peft_model(make("llama"), config, "red").eval()
    batches, told = Batches(model, None, [], 4), queue.SimpleQueue()
    generate, leaving = batches.generate, threading.Thread(target=model.delete_adapter, args=("red",))

    def late(rows: list[Row]) -> None:
        if not leaving.ident:
            leaving.start()
            leaving.join(0.2)
        generate(rows)

    batches.generate = late
    batches.waiting.put(Row([5, 6], "red", told.put, limit=2))
    assert [told.get(timeout=60).ended for _ in range(2)] == [None, "length"]
    leaving.join(60)
    batches.waiting.put(Row([5, 6], "red", told.put, limit=2))
    batches.waiting.put(Row([5, 6], "__base__", told.put, limit=1))
    assert isinstance(told.get(timeout=60), graft.AdapterNotFoundError) and told.get(timeout=60).ended == "length"


def test_rows_that_would_pass_the_last_position_together_take_turns():
    """A long prompt and a long answer, each of which has room alone: the one's row goes along until the other ends."""
    with seeded(0):
        base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    base.generation_config = GenerationConfig(pad_token_id=0)
    config = graft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    batches = Batches.__new__(Batches)  # its thread has not begun
    vars(batches).update(model=graft.get_peft_model(base, config, "red"), tokenizer=None, ends=[], most=4, longest=32)
    vars(batches).update(sizes=Counter(), waiting=queue.SimpleQueue())
    told = [queue.SimpleQueue() for _ in range(3)]
    for (length, limit), queued in zip([(28, 4), (20, 4), (2, 30)], told):
        batches.waiting.put(Row([5] * length, "red", queued.put, limit=limit))
    threading.Thread(target=batches.run, daemon=True).start()
    for limit, queued in zip([4, 4, 30], told):
        assert [queued.get(timeout=60).ended for _ in range(limit)] == [None] * (limit - 1) + ["length"]
    assert batches.sizes == {2: 1, 1: 1}


def row(**how) -> tuple[Row, list]:
    told = []
    return Row(how.pop("prompt", [5]), "__base__", told.append, **{"limit": 99, **how}), told


def test_draws_follow_the_probabilities():
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0])
    drawing, _ = row(temperature=0.7, seed=0)
    counts = torch.stack([drawing.drawn(scores).argmax() for _ in range(4000)]).bincount(minlength=4)
    torch.testing.assert_close(counts / 4000, (scores / 0.7).softmax(-1), atol=0.03, rtol=0)
    narrow, _ = row(temperature=0.7, top_p=0.8, seed=0)  # of .77, .18, .04 and .01 the first two
    assert {int(narrow.drawn(scores).argmax()) for _ in range(400)} == {3, 0}


def test_text_is_told_when_it_is_settled():
    tokenizer = bytes_tokenizer()
    answer, told = row(stops=["STOP"], prompt=tokenizer("é").input_ids)
    for token in tokenizer("aß STO STOP, and more").input_ids:
        if not answer.over:
            answer.take(token, [1], tokenizer)
    texts = [piece.text for piece in told]
    assert texts[:4] == ["a", "", "ß", " "] and "".join(texts) == "aß STO " and told[-1].ended == "stop"


def test_stops_are_found_as_they_would_be_in_the_whole_text():
    draw = random.Random(0)
    for _ in range(2000):
        stop, text = ("".join(draw.choices("ab", k=draw.randint(1, n))) for n in (6, 30))
        search, seen = Search(stop), 0
        while seen < len(text):
            piece = text[seen : seen + draw.randint(1, 4)]
            seen += len(piece)
            back = search.feed(piece)
            at = text[:seen].find(stop)
            assert back == (seen - at if at >= 0 else 0)
            if back:
                break
            begun = max(n for n in range(len(stop)) if text[:seen].endswith(stop[:n]))
            assert search.matched == begun


def test_a_search_takes_linear_time():
    begin = time.monotonic()
    search = Search("a" * 300_000 + "b")
    assert search.feed("a" * 600_000) == 0 and search.feed("b") == 300_001
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("seed", range(5))
def test_pieces_make_up_the_text_of_all_tokens(seed):
    """Of any bytes, those that are no text among them."""
    tokenizer, draw = bytes_tokenizer(), random.Random(seed)
    tokens = (
        tokenizer("é" * 30 + "👍🏽 x ").input_ids
        + [draw.randint(2, 257) for _ in range(60)]
        + tokenizer("end").input_ids
    )
    answer, told = row(prompt=tokenizer("Once é").input_ids, limit=len(tokens))
    for token in tokens:
        answer.take(token, [1], tokenizer)
    text = "".join(piece.text for piece in told)
    assert text.startswith("é" * 30 + "👍🏽 x ") and text.endswith("end") and told[-1].ended == "length"
    assert text == tokenizer.decode(tokens)


def test_a_long_answer_takes_linear_time():
    class Slow:
        asked = 0

        def decode(self, ids, **_):
            self.asked += len(ids)
            return "x" * len(ids)

    tokenizer = Slow()
    answer, told = row(limit=5000)
    for _ in range(5000):
        answer.take(7, [], tokenizer)
    assert tokenizer.asked < 5000 * 20 and "".join(piece.text for piece in told) == "x" * 5000


def test_a_client_that_leaves_while_its_token_is_told_stays_away(monkeypatch):
    answer, _ = row()
    monkeypatch.setattr(answer, "text", lambda tokenizer, last: setattr(answer, "over", True) or "")
    answer.take(7, [], None)
    assert answer.over


@pytest.mark.parametrize(("token", "limit", "ended"), [(1, 99, "stop"), (1, 3, "stop"), (20, 3, "length")])
def test_an_answer_ends_with_what_it_held_back(token, limit, ended):
    tokenizer = bytes_tokenizer()
    answer, told = row(stops=["STOP"], limit=limit)
    for one in (*tokenizer("ST").input_ids, token):
        answer.take(one, [1], tokenizer)
    assert "".join(piece.text for piece in told)[:2] == "ST" and told[-1].ended == ended and answer.over
    assert len(answer.made) == (2 if token == 1 else 3)


@pytest.mark.parametrize("package", ["uvicorn", "fastapi"])
def test_a_package_that_the_server_lacks_is_named_with_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name == "examples.server.app"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=rf"The server needs (uvicorn|{package}): .*pip install -e '\.\[server\]'"):
        runpy.run_module("examples.server", run_name="__main__")


@pytest.mark.slow
@served
def test_the_server_runs_from_its_wheel_without_a_clone(folder, tmp_path):
    isolation = ["--no-build-isolation"] if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77 else []
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", *isolation, "--target", str(tmp_path / "at")]
    subprocess.run([*install, str(ROOT / "packaging" / "server")], check=True)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "at"), str(ROOT / "src")])}

    def run(*options: str) -> str:
        command = [sys.executable, "-c", "from graft_server.__main__ import main; main()", *options]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "--base is needed" in run()
    assert "argument --port: invalid int value" in run("--base", str(folder / "base"), "--port", "any")
    text = (ROOT / "packaging" / "server" / "pyproject.toml").read_text()
    assert f'version = "{graft.__version__}"' in text


def test_a_prompt_does_not_end_the_text():
    assert read_prompt(ByT5Tokenizer(), "ab") == [100, 101] and ByT5Tokenizer()("ab").input_ids == [100, 101, 1]
    assert read_prompt(ByT5Tokenizer(), "") == []
    for text in ("ab", "a</s>"):
        assert read_prompt(bytes_tokenizer(), text) == bytes_tokenizer()(text).input_ids
