# SPDX-License-Identifier: Apache-2.0
"""Answers of hostile servers: malformed values, redirects, bytes that come forever; addresses, keys and timeouts."""

from __future__ import annotations

import copy
import json
import math
import random
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from graft import ServerError, UnknownModelError
from graft.core.errors import BaseModelMismatchError
from graft.files.ask import Connection, ask_log_probabilities, identify_server
from graft.files.errors import OptionError
from tests.serving.server import serving

PROMPT = [3, 1, 4, 1, 5]
HUGE = b"1" + b"0" * 400  # no float holds it
PATHS = {"vllm": "/v1/completions", "sglang": "/generate", "llama.cpp": "/completion"}
ANYWHERE = [  # instead of a whole answer
    b"[" * 200_000, b'{"a":' * 200_000, HUGE, b"1" * 5000, b"5", b"null", b'"\\ud800"', b"\xff\xfe", b"{", b"[]", b"{}",
    b'[{"id": [], "path": 1}]', b'{"data": [5]}', b'{"data": {"a": 1}}', b'[{"id": ' + HUGE + b', "path": "x"}, 5]',
]  # fmt: skip


def values(token_logprobs=(None, -1.0, -1.0, -1.0, -1.0, -1.0), tokens=()):
    return {"choices": [{"logprobs": {"token_logprobs": token_logprobs, "tokens": tokens}}]}


def entries(logprob=-1.0, token=None):
    return {"meta_info": {"input_token_logprobs": [[logprob, i if token is None else token] for i in PROMPT]}}


def top(logprob=-1.0, token=3):
    return {"completion_probabilities": [{"top_logprobs": [{"id": token, "logprob": logprob}]}]}


BAD_NUMBERS = [10**400, "x", "-1.0", True, None, [], {}, math.nan, math.inf]
MALFORMED = {
    "vllm": [
        values(5), values(None), values("abcdefgh"), values(tokens=5), values(tokens=[5]),
        values(tokens=["token_id:x"]), *(values([None, number, *[-1.0] * 4]) for number in BAD_NUMBERS),
        {"choices": {}}, {"choices": [5]}, {"choices": [{"logprobs": 5}]}, {"choices": "abc"},
    ],
    "sglang": [
        *map(entries, BAD_NUMBERS), *(entries(token=t) for t in ([], {}, "x", math.inf)), {"meta_info": 5},
        {"meta_info": {"input_token_logprobs": 5}}, {"meta_info": {"input_token_logprobs": [5]}},
    ],
    "llama.cpp": [
        *map(top, BAD_NUMBERS), *(top(token=t) for t in ([], {}, "x", None, math.inf, 10**400, -1, 2**31)),
        {"completion_probabilities": 5}, {"completion_probabilities": [5]}, {"completion_probabilities": {"a": 1}},
        {"completion_probabilities": [{"top_logprobs": 5}]}, {"completion_probabilities": "abc"},
    ],
}  # fmt: skip


def say(said, *paths):
    """Answer requests to these paths, all if there are none, with what is said."""

    def answer(handler):
        if paths and handler.path not in paths:
            return False
        handler.say(said)
        return True

    return answer


@pytest.mark.parametrize("kind", PATHS)
def test_malformed_log_probabilities(kind):
    said = [*ANYWHERE, *(json.dumps(value).encode() for value in MALFORMED[kind])]
    now = [b""]
    with serving({"base": None, "tuned": None}, kind, lambda h: say(now[0], PATHS[kind], "/detokenize")(h)) as url:
        connection = Connection(url, 5)
        for now[0] in said:
            with pytest.raises(ServerError, match=r"answers something else than expected|gives no log-prob") as error:
                ask_log_probabilities(connection, kind, "tuned", [PROMPT], is_base=False)
            assert str(error.value).isprintable() and len(str(error.value)) < 600, now[0][:100]


@pytest.mark.parametrize("text", ANYWHERE)
def test_malformed_lists_of_models(text):
    with serving({"base": None}, answer=say(text)) as url:
        connection = Connection(url, 5)
        with pytest.raises(ServerError, match=r"/v1/models answers something else"):
            identify_server(connection)
        if not text.startswith(b"[{"):
            with pytest.raises(ServerError, match=r"/lora-adapters answers something else|no adapter"):
                ask_log_probabilities(connection, "llama.cpp", "tuned", [PROMPT], is_base=False)


@pytest.mark.parametrize("text", [*ANYWHERE, b'{"content": 5}'])
def test_malformed_pieces_of_text(text):
    """llama.cpp's server is asked for a plain token where it gives no log-probabilities."""

    def answer(handler):
        return handler.path in ("/completion", "/detokenize") and say(b"{}" if handler.path == "/completion" else text)(
            handler
        )

    with serving({"base": None, "tuned": None}, "llama.cpp", answer) as url, pytest.raises(ServerError):
        ask_log_probabilities(Connection(url, 5), "llama.cpp", "tuned", [PROMPT], is_base=False)


@pytest.mark.parametrize("kind, said", [
    ("vllm", values([None, -1.0], ["token_id:" + "9" * 4000] * 9)), ("sglang", entries(token=10**4000)),
])  # fmt: skip
def test_other_tokens_of_any_size(kind, said):
    with (
        serving({"base": None, "tuned": None}, kind, say(json.dumps(said).encode(), PATHS[kind])) as url,
        pytest.raises(BaseModelMismatchError) as error,
    ):
        ask_log_probabilities(Connection(url, 5), kind, "tuned", [PROMPT], is_base=False)
    assert len(str(error.value)) < 500


def test_what_a_server_calls_itself_moves_no_cursor():
    names = {"data": [{"id": "\x1b[2J\u202e" + "x" * 100_000}]}
    refuse = lambda h: h.path == "/v1/completions" and (h.say(b"\x1b]0;owned\x07\r\n no", 404) or True)
    both = lambda h: refuse(h) or say(names)(h)
    with serving({}, answer=both) as url, pytest.raises(UnknownModelError) as error:
        ask_log_probabilities(Connection(url, 5), "vllm", "tuned", [PROMPT], is_base=False)
    assert str(error.value).isprintable() and "\\x1b" in str(error.value) and len(str(error.value)) < 1000


def test_a_redirect_does_not_get_the_key():
    keys = []

    def thief(handler):
        keys.append(handler.headers["Authorization"])
        handler.say({"data": [{"owned_by": "vllm"}]})
        return True

    with serving({}, answer=thief) as elsewhere:
        for status in (301, 302, 303, 307, 308):

            def redirect(handler, status=status):
                handler.send_response(status)
                handler.send_header("Location", elsewhere + "/v1/models")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return True

            with serving({}, answer=redirect) as url:
                connection = Connection(url, 5, "secret")
                with pytest.raises(ServerError, match=rf"answers {status}, a redirect to '{elsewhere}"):
                    identify_server(connection)
                with pytest.raises(ServerError, match="a redirect"):
                    connection.ask("/v1/completions", list, {})
        assert not keys
        assert identify_server(Connection(elsewhere, 5, "secret")) == "vllm" and keys == ["Bearer secret"]


@contextmanager
def dripping(*parts, forever=b"", pause=0.05):
    """A server that sends parts of an answer, then the same bytes again and again, for a minute.

    The event is set if the client goes before. The minute is for a client that reads on: load alone never takes it.
    """
    gone, end = threading.Event(), time.monotonic() + 60

    def talk():
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(60)
            try:
                peer.recv(1 << 16)
                for part in parts:
                    peer.sendall(part)
                while forever and time.monotonic() < end:
                    peer.sendall(forever)
                    time.sleep(pause)
            except TimeoutError:
                pass
            except OSError:
                gone.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=talk, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", gone


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("parts, forever", [
    ((b"HTTP/1.1 20",), b"0"), ((OK,), b"X-A: b\r\n"), ((OK, b"X-A: "), b"b"), ((), b"HTTP/1.1 100 Continue\r\n\r\n"),
    ((OK, b"\r\n"), b" "), ((OK, b"Transfer-Encoding: chunked\r\n\r\n"), b"1\r\n \r\n"),
    ((OK, b"Transfer-Encoding: chunked\r\n\r\n"), b"0"), ((b"HTTP/1.1 500 No\r\n\r\n",), b" "),
    ((b"HTTP/1.1 404 No\r\nContent-Length: 1000\r\n\r\n",), b" "),
])  # fmt: skip
def test_bytes_that_come_forever_end_with_the_timeout(parts, forever):
    with dripping(*parts, forever=forever) as (url, gone):
        with pytest.raises(ServerError, match=r"not answered within 0\.4 s"):
            Connection(url, 0.4, "secret").ask("/v1/models", list)
        assert gone.wait(30), "the connection is still open"


def test_a_flood_is_not_read_to_its_end():
    with dripping(OK, b"\r\n", forever=b"x" * 1_000_000, pause=0) as (url, gone):
        with pytest.raises(ServerError, match="more than 16000000 bytes"):
            Connection(url, 20).ask("/v1/models", list)
        assert gone.wait(30)


@pytest.mark.parametrize(
    "said",
    [b"\x1b[31m\x07\r\n\r\n", b"", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n"],
)
def test_what_is_no_http(said):
    with dripping(said) as (url, _), pytest.raises(ServerError, match="cannot be reached") as error:
        Connection(url, 5).ask("/v1/models", list)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("url", [
    "http://", "http:///v1", "http://[", "http://a..b", "http://" + "a" * 70, "http://h:99999", "http://h:x", "http://h:0",
    "http://user:secret@h", "http://h\r\nX: y", "http://h/ v1", "http://h\u00fc", "http://h\x1b", "gopher://h", "",
    "ftp://host", "localhost:8000", "file:///etc/passwd",
])  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(OptionError, match="no address of a server"):
        Connection(url)


@pytest.mark.parametrize("key", ["a\nb", "a\r\nX-Evil: 1", "a b", "schl\u00fcssel", "\x1b"])
def test_keys_that_no_header_holds_are_not_shown(key):
    with pytest.raises(OptionError, match="API key") as error:
        Connection("http://127.0.0.1:9", key=key)
    assert key not in str(error.value)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, 1e300])
def test_timeouts_that_cannot_be(timeout):
    with pytest.raises(OptionError, match="timeout"):
        Connection("http://127.0.0.1:9", timeout)


ODD = [*BAD_NUMBERS, -1, 5, 1e308, "", "\ud800", "token_id:3", [[]], [None], {"id": 5}, "9" * 4000, 3.7, False]


def mutated(draw, reply):
    """Return an answer with a few values replaced or gone."""
    places = [([reply], 0)]
    for inside, key in places:
        value = inside[key]
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        places += [(value, key) for key in keys]
    for inside, key in draw.choices(places, k=draw.choice([1, 1, 1, 3])):
        if draw.random() < 0.8:
            with suppress(IndexError):  # it has become shorter
                inside[key] = draw.choice(ODD)
        elif isinstance(inside, dict):
            inside.pop(key, None)
        elif key < len(inside):
            del inside[key]
    return places[0][0][0] if places[0][0] else None


@pytest.mark.parametrize("kind", PATHS)
def test_mutated_answers_are_right_or_told(kind):
    draw, told = random.Random(0), 0
    right = {
        "vllm": values((None, *[-1.0] * 5), [f"token_id:{i}" for i in PROMPT]),
        "sglang": entries(),
        "llama.cpp": top(),
    }
    now = [None]
    with serving({"base": None, "tuned": None}, kind, lambda h: say(now[0], PATHS[kind], "/detokenize")(h)) as url:
        connection = Connection(url, 5)
        for _ in range(120):
            now[0] = mutated(draw, copy.deepcopy(right[kind]))
            try:
                (seen,) = ask_log_probabilities(connection, kind, "tuned", [PROMPT], is_base=False)
                assert seen and all(type(v) is float and math.isfinite(v) for v in seen.values())
            except (ServerError, BaseModelMismatchError) as error:
                assert str(error).isprintable() and len(str(error)) < 1000, now[0]
                told += 1
    assert 60 < told < 120
