# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities from a running server, for prompts given as token ids: vLLM, SGLang, llama.cpp's, OpenAI's API."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Thread
from typing import Any
from urllib.parse import urlsplit

from graft import BaseModelMismatchError, ServerError, UnknownModelError
from graft.config.reading import Json
from graft.core.errors import escape_controls, shorten_text
from graft.files.errors import OptionError

LARGEST = 16_000_000  # bytes of an answer
PROBABILITIES = 512  # of one position, where a server tells of one only
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}  # server → owner that it names of its models
MOST_TOKENS = 2**31  # of a vocabulary
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
# (position, token there) → its log-probability after the tokens before it
LogProbabilities = dict[tuple[int, int], float]


class Connection:
    """Requests to one server. Each ends within `timeout` seconds, name lookup and the answer's last byte included.

    No redirect is followed, since the key would go to another host.

    Raises:
        OptionError: `url` is no address, `key` does not fit a header, or `timeout` is no positive number.
    """

    def __init__(self, url: str, timeout: float = 60.0, key: str | None = None):
        if not is_server_address(url):
            raise OptionError(f"{url!r} is no address of a server: http://host:port.")
        if not 0 < timeout <= TIMEOUT_MAX:
            raise OptionError(f"A timeout of {timeout} cannot be waited for: give a number of seconds above 0.")
        if key is not None and not is_printable_ascii(key):
            raise OptionError("The API key has a space, a line break or another character that no header can hold.")
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def get(self, path: str, parse: Callable[[Any], Any] = lambda reply: reply) -> Any:
        """Return `parse` of the JSON that the server answers to a GET.

        Raises:
            ServerError: it cannot be reached, is late, answers an error, no JSON, or JSON for which `parse` raises.
            UnknownModelError: it answers 404.
        """
        return self._parse(path, self.send(path), parse)

    def post(self, path: str, body: Json, parse: Callable[[Any], Any] = lambda reply: reply) -> Any:
        """Return `parse` of the JSON that the server answers to a POST of `body`. Errors as of `get`."""
        return self._parse(path, self.send(path, body), parse)

    def send(self, path: str, body: Json | None = None) -> bytes:
        """Return the bytes that the server answers to a GET, or to a POST of `body`. Errors as of `get`.

        The request runs in a thread: a socket's timeout begins anew with each byte. A late thread loses its connection.
        """
        url = self.url + path
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), self.headers)
        exchange = Exchange(request, self.timeout)
        Thread(target=exchange.run, daemon=True).start()
        try:
            outcome = exchange.outcome.get(timeout=self.timeout)
        except Empty:
            outcome = TimeoutError()
        finally:
            exchange.close()
        if isinstance(getattr(outcome, "reason", outcome), TimeoutError):
            raise ServerError(f"{url} has not answered within {self.timeout:g} s: give it longer with --timeout.")
        if isinstance(outcome, (OSError, HTTPException)):
            reason = escape_controls(shorten_text(str(getattr(outcome, "reason", outcome))))
            raise ServerError(f"{url} cannot be reached: {reason or repr(outcome)}")
        if isinstance(outcome, BaseException):
            raise outcome
        status, location, text = outcome
        if len(text) > LARGEST:
            raise ServerError(f"{url} answers more than {LARGEST} bytes.")
        if 300 <= status < 400:
            raise ServerError(
                f"{url} answers {status}, a redirect to {quote_answer(location)}, which graft does not follow. "
                "Give that address if it is the server's."
            )
        if status >= 400:
            raise (UnknownModelError if status == 404 else ServerError)(f"{url} answers {status}: {quote_answer(text)}")
        return text

    def _parse(self, path: str, text: bytes, parse: Callable[[Any], Any]) -> Any:
        try:
            return parse(json.loads(text))
        except MALFORMED:
            raise ServerError(f"{self.url}{path} answers something else than expected: {quote_answer(text)}") from None


class Exchange(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """One request and its answer, for a thread.

    Attributes:
        outcome: gets the status, the header Location and the body, or the exception.
    """

    def __init__(self, request: urllib.request.Request, timeout: float):
        super().__init__()
        self.request, self.timeout = request, timeout
        self.outcome: SimpleQueue[tuple[int, bytes, bytes] | BaseException] = SimpleQueue()
        self.socket: socket.socket | None = None
        self.opener = urllib.request.OpenerDirector()  # without handlers of redirects and errors
        for handler in (urllib.request.ProxyHandler(), self):
            self.opener.add_handler(handler)

    def run(self) -> None:
        """Put the outcome of the request into `outcome`."""
        end, body = time.monotonic() + self.timeout, bytearray()
        try:
            with self.opener.open(self.request, timeout=self.timeout) as answer:
                while len(body) <= LARGEST and time.monotonic() < end and (part := answer.read1(1 << 16)):
                    body += part
            location = str(answer.headers["Location"]).encode(errors="replace")
            self.outcome.put((answer.status, location, bytes(body)) if time.monotonic() < end else TimeoutError())
        except BaseException as e:
            self.outcome.put(e)

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> Any:
        exchange = self

        class Connected(http_class):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                exchange.socket = self.sock

        return super().do_open(Connected, req, **options)

    def close(self) -> None:
        """End the connection, so that the thread ends as well."""
        if self.socket is not None:
            with suppress(OSError):  # it is closed already
                self.socket.shutdown(socket.SHUT_RDWR)


def is_server_address(url: str) -> bool:
    """Return True if a text is the address of a server: http or https, a host, no user, nothing that is no ASCII."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        return (
            bool(parts.scheme in ("http", "https") and host and parts.port != 0)
            and "@" not in url
            and is_printable_ascii(url)
        )
    except ValueError:  # of a port, an IPv6 address or a label
        return False


def is_printable_ascii(text: str) -> bool:
    """Return True if a text is printable ASCII without spaces, as addresses and headers need it."""
    return text.isascii() and text.isprintable() and " " not in text


def quote_answer(text: bytes) -> str:
    """Return the beginning of a server's answer, on one line, in quotes, control characters escaped."""
    return repr(shorten_text(" ".join(text[:1000].decode(errors="replace").split()), 400))


def identify_server(connection: Connection, name: str | None = None) -> str:
    """Return which program a server is, by what it says of its models: "vllm", "sglang", "llama.cpp", or "openai".

    Args:
        name: of the program, where the server does not tell; the server has to answer all the same.

    Raises:
        OptionError: `name` is none of these.
        ServerError: see there.
    """
    if name is not None:
        if name not in (*OWNERS, "openai"):
            raise OptionError(f"graft cannot ask a server {name!r}. Give one of {', '.join(OWNERS)}, openai.")
        with suppress(UnknownModelError):  # it lists no models
            connection.send("/v1/models")
        return name
    owners = connection.get("/v1/models", lambda reply: {str(entry.get("owned_by")) for entry in reply["data"]})
    return next((name for name, owner in OWNERS.items() if owner in owners), "openai")


def ask_log_probabilities(
    connection: Connection, server: str, name: str, prompts: Sequence[Sequence[int]], is_base: bool
) -> list[LogProbabilities]:
    """Return what a model of the server says of each prompt.

    Args:
        server: as `identify_server` returns it.
        name: of the base or of an adapter. Of llama.cpp's server an adapter's number, its path or the file's name.
        base: the name is the base's.

    Raises:
        ServerError: see there.
        UnknownModelError: the server does not know the name.
        BaseModelMismatchError: the server makes other tokens of these, or does not have one of them.
    """
    if server == "llama.cpp":
        lora = select_llama_adapter(connection, None if is_base else name)
        return [ask_llama_server(connection, lora, prompt) for prompt in prompts]
    ask_one: Callable[..., LogProbabilities] = ask_sglang if server == "sglang" else ask_openai
    try:
        return [ask_one(connection, name, prompt) for prompt in prompts]
    except UnknownModelError as e:
        models = shorten_text(str(list_served_models(connection)))
        raise UnknownModelError(f"The server at {connection.url} has no model {name!r}, but {models} ({e})") from None


def list_served_models(connection: Connection) -> list[str]:
    """Return the names of the models that a server says it has; none if it does not say."""
    try:
        names: list[str] = connection.get("/v1/models", lambda reply: [str(entry["id"]) for entry in reply["data"]])
        return names
    except ServerError:
        return []


def ask_openai(connection: Connection, name: str, ids: Sequence[int]) -> LogProbabilities:
    """Ask by OpenAI's completions, which echo the prompt with its log-probabilities."""

    def parse(reply: Any) -> tuple[int, list[int], LogProbabilities]:
        said = reply["choices"][0]["logprobs"]
        values, tokens = said["token_logprobs"], said["tokens"]
        named = [int(t.removeprefix("token_id:")) for t in tokens if t.startswith("token_id:")]
        return len(values), named[: len(ids)], pair_with_tokens(ids[: len(values)], values)

    body = dict(model=name, prompt=list(ids), max_tokens=1, temperature=0, logprobs=1, echo=True)
    number, named, seen = connection.post("/v1/completions", body | dict(return_tokens_as_token_ids=True), parse)
    if number < len(ids) or (named and named != list(ids)):
        raise BaseModelMismatchError(
            f"{connection.url} makes {number - 1} tokens {shorten_text(str(named[:8]))}… of the {len(ids)} of a "
            "prompt, "
            f"{list(ids)[:8]}…: it does not take tokens by their ids, or has another vocabulary."
        )
    return seen


def ask_sglang(connection: Connection, name: str, ids: Sequence[int]) -> LogProbabilities:
    """Ask by SGLang's own request. `name` is an adapter's, or the served model's."""

    def parse(reply: Any) -> tuple[list[int], LogProbabilities]:
        said = reply["meta_info"]["input_token_logprobs"]
        return [int(entry[1]) for entry in said], pair_with_tokens(ids[: len(said)], [entry[0] for entry in said])

    body: Json = dict(
        input_ids=list(ids), sampling_params=dict(max_new_tokens=1, temperature=0), return_logprob=True,
        logprob_start_len=0,
    )  # fmt: skip
    if name not in list_served_models(connection)[:1]:
        body["lora_path"] = name
    tokens, seen = connection.post("/generate", body, parse)
    if tokens != list(ids):
        text = shorten_text(str(tokens[:8]))
        raise BaseModelMismatchError(f"{connection.url} makes the tokens {text}… of the prompt {list(ids)[:8]}….")
    return seen


def pair_with_tokens(ids: Sequence[int], values: Sequence[object]) -> LogProbabilities:
    """Return the log-probabilities of a prompt's tokens but the first, which has none."""
    return {(at, ids[at]): parse_log_probability(values[at]) for at in range(1, len(ids))}


def parse_log_probability(value: Any) -> float:
    """Return a log-probability of an answer; OverflowError or ValueError if it is no finite number."""
    if type(value) not in (int, float) or not math.isfinite(number := float(value)):
        raise ValueError("a log-probability is a finite number")
    return number


def select_llama_adapter(connection: Connection, name: str | None) -> list[Json]:
    """Return the scales of all adapters of llama.cpp's server that let `name` act alone; None: none of them."""
    paths = connection.get("/lora-adapters", lambda reply: {int(entry["id"]): str(entry["path"]) for entry in reply})
    files = {i: os.path.basename(path) for i, path in paths.items()}
    fits = [i for i, file in files.items() if name in (str(i), paths[i], file, file.removesuffix(".gguf"))]
    if name is not None and len(fits) != 1:
        text = shorten_text(str(paths))
        raise UnknownModelError(f"The server at {connection.url} has no adapter {name!r}, but {text}.")
    return [{"id": i, "scale": 1.0 if name is not None and i in fits else 0.0} for i in paths]


def ask_llama_server(connection: Connection, lora: list[Json], ids: Sequence[int]) -> LogProbabilities:
    """Ask for the distribution of the next token, the only one that llama.cpp's server tells."""

    def parse(reply: Any) -> LogProbabilities:
        said = reply.get("completion_probabilities") or [{"top_logprobs": []}]
        seen = {
            (len(ids), int(entry["id"])): parse_log_probability(entry["logprob"]) for entry in said[0]["top_logprobs"]
        }
        if not all(0 <= token < MOST_TOKENS for _, token in seen):
            raise ValueError("no vocabulary has such a token")
        return seen

    def parse_whole(reply: Any) -> LogProbabilities:
        if not (seen := parse(reply)):
            raise ValueError("no log-probabilities")
        return seen

    body: Json = dict(
        prompt=list(ids), n_predict=1, n_probs=PROBABILITIES, temperature=0, cache_prompt=False, lora=lora
    )
    seen: LogProbabilities = connection.post("/completion", body, parse)
    if not seen:  # of a token that is part of a character
        seen = connection.post(
            "/completion", body | dict(logit_bias=[[find_plain_token(connection), 100]]), parse_whole
        )
    return seen


def find_plain_token(connection: Connection) -> int:
    """Return a token that is text by itself."""
    for token in range(3, 300):
        text = connection.post("/detokenize", {"tokens": [token]}, lambda reply: reply["content"])
        if isinstance(text, str) and text.isascii() and text.strip().isalpha():
            return token
    raise ServerError(f"{connection.url} tells no log-probabilities: it knows no token that is plain text.")
