# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities from a running server (vLLM, SGLang, llama.cpp, OpenAI's API), for prompts given as token ids."""

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

LARGEST = 16_000_000  # the most bytes of an answer
PROBABILITIES = 512  # candidates for the next token, asked of llama.cpp
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}  # server → owner of its models in /v1/models
MOST_TOKENS = 2**31  # in any vocabulary
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
# (position, token there) → its log-probability after the tokens before it
LogProbabilities = dict[tuple[int, int], float]


class Connection:
    """HTTP requests to one server. A request ends after `timeout` seconds, including name lookup and the last byte.

    The API key is sent as a bearer token. Redirects are errors, since the key would reach another host. A `/v1` at the
    end of `url` is dropped.

    Raises:
        OptionError: `url` is no server address, `key` is not printable ASCII without spaces, or `timeout` is not
            positive.
    """

    def __init__(self, url: str, timeout: float = 60.0, key: str | None = None):
        """Check the arguments and store them, the address without a final "/" and "/v1".

        No request is sent. With a key that is not empty, all requests carry it as a bearer token.

        Raises:
            OptionError: `url` is no address of a server, `timeout` is not above 0 or beyond the longest of threads, or
                the key has other characters than printable ASCII.
        """
        if not is_server_address(url):
            raise OptionError(f"{url!r} is no address of a server. Give it as http://host:port.")
        if not 0 < timeout <= TIMEOUT_MAX:
            raise OptionError(f"The timeout {timeout} is not possible. Give a number of seconds above 0.")
        if key is not None and not is_printable_ascii(key):
            raise OptionError("The API key has a space or another character that no header can hold. Correct it.")
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def ask(self, path: str, parse: Callable[[Any], Any], body: Json | None = None) -> Any:
        """Send a request as `send` does, decode the answer as JSON, and return `parse` of it.

        Raises:
            ServerError: the server is unreachable, late, answers with an error or a redirect, with no JSON, or with
                JSON that makes `parse` raise. The text has the beginning of such an answer.
            UnknownModelError: the server answers 404.
        """
        text = self.send(path, body)
        try:
            return parse(json.loads(text))
        except MALFORMED:
            raise ServerError(
                f"{self.url}{path} answers something else than expected: {quote_answer(text)}. Check its version."
            ) from None

    def send(self, path: str, body: Json | None = None) -> bytes:
        """Send a GET request, or a POST of `body` as JSON if `body` is not None. Return the bytes of the answer.

        The request runs in a daemon thread, since a socket's timeout begins anew with each byte. After `timeout`
        seconds for all of it, the wait ends. The connection is closed in all cases.

        Raises:
            ServerError: the server is unreachable or late, answers more than 16,000,000 bytes, a redirect, which is not
                followed, or a status from 400.
            UnknownModelError: the server answers 404.
            Any other exception of the thread is raised as it is.
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
            raise ServerError(f"{url} has not answered within {self.timeout:g} s. Give it longer with --timeout.")
        if isinstance(outcome, (OSError, HTTPException)):
            reason = escape_controls(shorten_text(str(getattr(outcome, "reason", outcome))))
            raise ServerError(f"{url} cannot be reached: {reason or repr(outcome)}. Check that it runs there.")
        if isinstance(outcome, BaseException):
            raise outcome
        status, location, text = outcome
        if len(text) > LARGEST:
            raise ServerError(f"{url} answers more than {LARGEST} bytes. Check the address.")
        if 300 <= status < 400:
            raise ServerError(
                f"{url} answers {status}, a redirect to {quote_answer(location)}, which graft does not follow. "
                "Give that address if it is the server's."
            )
        if status >= 400:
            raise (UnknownModelError if status == 404 else ServerError)(f"{url} answers {status}: {quote_answer(text)}")
        return text


class Exchange(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """One HTTP request in a thread. `run` puts its result into the queue `outcome`, and `close` interrupts it.

    It uses proxies from the environment, and no handlers of redirects or error statuses.

    Attributes:
        outcome: a queue with one item: (status, header Location, body), or the exception.
        socket: the socket of the connection; None before it is connected.
    """

    def __init__(self, request: urllib.request.Request, timeout: float):
        """Prepare the request, with an empty queue `outcome` and no socket. Nothing is sent."""
        super().__init__()
        self.request, self.timeout = request, timeout
        self.outcome: SimpleQueue[tuple[int, bytes, bytes] | BaseException] = SimpleQueue()
        self.socket: socket.socket | None = None
        self.opener = urllib.request.OpenerDirector()  # without handlers of redirects and errors
        for handler in (urllib.request.ProxyHandler(), self):
            self.opener.add_handler(handler)

    def run(self) -> None:
        """Send the request, read at most 64 KiB more than 16,000,000 bytes, and put (status, Location header, body) or
        the exception into `outcome`.

        After `timeout` seconds the result is a TimeoutError.
        """
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
        """Open the request with urllib, and store the socket in `socket`, so that `close` can shut it down."""
        exchange = self

        class Connected(http_class):  # type: ignore[misc]
            """A connection class that stores its socket in the exchange."""

            def connect(self) -> None:
                """Connect, then store the socket in the exchange."""
                super().connect()
                exchange.socket = self.sock

        return super().do_open(Connected, req, **options)

    def close(self) -> None:
        """Shut the socket down in both directions, so that the thread in `run` ends. Does nothing without a socket."""
        if self.socket is not None:
            with suppress(OSError):  # already closed
                self.socket.shutdown(socket.SHUT_RDWR)


def is_server_address(url: str) -> bool:
    """Return True if `url` is printable ASCII, http or https, with a host, without a user and with a valid port (not
    0).
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        has_place = bool(parts.scheme in ("http", "https") and host and parts.port != 0)
        return has_place and "@" not in url and is_printable_ascii(url)
    except ValueError:  # invalid port, IPv6 address or host label
        return False


def is_printable_ascii(text: str) -> bool:
    """Return True if a text has only printable ASCII characters and no spaces, as addresses and headers need it."""
    return text.isascii() and text.isprintable() and " " not in text


def quote_answer(text: bytes) -> str:
    """Return at most 400 characters of the first 1,000 bytes of a server's answer as one quoted line.

    Whitespace becomes single spaces, control characters are escaped, and invalid UTF-8 is replaced.
    """
    return repr(shorten_text(" ".join(text[:1000].decode(errors="replace").split()), 400))


def identify_server(connection: Connection, name: str | None = None) -> str:
    """Return the server program: "vllm", "sglang", "llama.cpp", or "openai" for every other.

    Without `name` it is recognized by the owner of its models in `/v1/models`. With `name` that name is returned after
    one request to `/v1/models`; a 404 there is ignored.

    Raises:
        OptionError: `name` is none of these.
        ServerError: the request fails.
    """
    if name is not None:
        if name not in (*OWNERS, "openai"):
            raise OptionError(f"graft cannot ask a server {name!r}. Give one of {', '.join(OWNERS)}, openai.")
        with suppress(UnknownModelError):  # a server without a list of models
            connection.send("/v1/models")
        return name
    owners = connection.ask("/v1/models", lambda reply: {str(entry.get("owned_by")) for entry in reply["data"]})
    return next((name for name, owner in OWNERS.items() if owner in owners), "openai")


def ask_log_probabilities(
    connection: Connection, server: str, name: str, prompts: Sequence[Sequence[int]], is_base: bool
) -> list[LogProbabilities]:
    """Return a server's log-probabilities for each prompt, by (position, token): one dict per prompt.

    vLLM and OpenAI's API give the prompt's tokens from position 1. SGLang does the same. llama.cpp gives up to 512
    candidates for the token after the prompt.

    Args:
        server: a name that `identify_server` returns.
        name: the model's name on the server. For llama.cpp: an adapter's number, path or file name.
        prompts: token ids.
        is_base: `name` is the base model. On llama.cpp all adapters get the scale 0.

    Raises:
        ServerError: a request fails, or the answer is malformed.
        UnknownModelError: the server has no such model; the text lists its models.
        BaseModelMismatchError: the server's tokens differ from those of the prompt.
    """
    if server == "llama.cpp":
        lora = select_llama_adapter(connection, None if is_base else name)
        return [ask_llama_server(connection, lora, prompt) for prompt in prompts]
    ask_one: Callable[..., LogProbabilities] = ask_sglang if server == "sglang" else ask_openai
    try:
        return [ask_one(connection, name, prompt) for prompt in prompts]
    except UnknownModelError as e:
        models = shorten_text(str(list_served_models(connection)))
        raise UnknownModelError(
            f"The server at {connection.url} has no model {name!r}, but {models} ({e}). Give one."
        ) from None


def list_served_models(connection: Connection) -> list[str]:
    """Return the model names in the server's `/v1/models`; [] if that request fails or its answer is malformed."""
    try:
        names: list[str] = connection.ask("/v1/models", lambda reply: [str(entry["id"]) for entry in reply["data"]])
        return names
    except ServerError:
        return []


def ask_openai(connection: Connection, name: str, ids: Sequence[int]) -> LogProbabilities:
    """Return the log-probabilities of a prompt's tokens from position 1, by OpenAI's completions with `echo`.

    Raises BaseModelMismatchError if the answer has fewer tokens than the prompt, or other token ids. The result maps
    (position, token id) to log-probabilities. One new token is requested; ids are compared only if the server names
    tokens "token_id:N", as vLLM does.
    """

    def parse(reply: Any) -> tuple[int, list[int], LogProbabilities]:
        """Return the number of values in the first choice, the token ids that the server names, and the
        log-probabilities of the first `ids`.

        Only tokens such as "token_id:5" (vLLM's) name an id; the list is cut to the length of `ids`. A missing field is
        a KeyError.
        """
        said = reply["choices"][0]["logprobs"]
        values, tokens = said["token_logprobs"], said["tokens"]
        named = [int(t.removeprefix("token_id:")) for t in tokens if t.startswith("token_id:")]
        return len(values), named[: len(ids)], pair_with_tokens(ids[: len(values)], values)

    body = dict(model=name, prompt=list(ids), max_tokens=1, temperature=0, logprobs=1, echo=True)
    number, named, seen = connection.ask("/v1/completions", parse, body | dict(return_tokens_as_token_ids=True))
    if number < len(ids) or (named and named != list(ids)):
        raise BaseModelMismatchError(
            f"{connection.url} has {number - 1} tokens {shorten_text(str(named[:8]))}… for a prompt of {len(ids)}, "
            f"{list(ids)[:8]}…. It does not accept token ids, or has another vocabulary."
        )
    return seen


def ask_sglang(connection: Connection, name: str, ids: Sequence[int]) -> LogProbabilities:
    """Return the log-probabilities of a prompt's tokens from position 1, by SGLang's `/generate`.

    `name` is sent as `lora_path`, unless it is the first model that the server lists. Raises BaseModelMismatchError if
    the answer has other tokens.
    """

    def parse(reply: Any) -> tuple[list[int], LogProbabilities]:
        """Return the token ids of the input that have log-probabilities in the reply (`input_token_logprobs`), and
        these for each of the first `ids`. A missing field is a KeyError.
        """
        said = reply["meta_info"]["input_token_logprobs"]
        return [int(entry[1]) for entry in said], pair_with_tokens(ids[: len(said)], [entry[0] for entry in said])

    body: Json = dict(
        input_ids=list(ids), sampling_params=dict(max_new_tokens=1, temperature=0), return_logprob=True,
        logprob_start_len=0,
    )  # fmt: skip
    if name not in list_served_models(connection)[:1]:
        body["lora_path"] = name
    tokens, seen = connection.ask("/generate", parse, body)
    if tokens != list(ids):
        text = shorten_text(str(tokens[:8]))
        raise BaseModelMismatchError(
            f"{connection.url} has the tokens {text}… for the prompt {list(ids)[:8]}…. Check that it serves this base."
        )
    return seen


def pair_with_tokens(ids: Sequence[int], values: Sequence[object]) -> LogProbabilities:
    """Return the values by (position, token id), without position 0, which has no log-probability.

    Raises IndexError for fewer values than `ids`, ValueError for one that is no finite number.
    """
    return {(at, ids[at]): parse_log_probability(values[at]) for at in range(1, len(ids))}


def parse_log_probability(value: Any) -> float:
    """Return a number as a float.

    Raises ValueError for another type, NaN or infinity, OverflowError for huge integers.
    """
    if type(value) not in (int, float) or not math.isfinite(number := float(value)):
        raise ValueError("a log-probability is a finite number")
    return number


def select_llama_adapter(connection: Connection, name: str | None) -> list[Json]:
    """Return the scales of all adapters of llama.cpp's server: 1 for the adapter `name`, 0 for others; all 0 if `name`
    is None. One request reads the list; nothing changes on the server.

    `name` is an adapter's number, its path, its file name, or that name without ".gguf". Raises UnknownModelError if no
    adapter has that name, or several have.
    """
    paths = connection.ask("/lora-adapters", lambda reply: {int(entry["id"]): str(entry["path"]) for entry in reply})
    files = {i: os.path.basename(path) for i, path in paths.items()}
    fits = [i for i, file in files.items() if name in (str(i), paths[i], file, file.removesuffix(".gguf"))]
    if name is not None and len(fits) != 1:
        text = shorten_text(str(paths))
        raise UnknownModelError(f"The server at {connection.url} has no adapter {name!r}, but {text}. Give one.")
    return [{"id": i, "scale": 1.0 if name is not None and i in fits else 0.0} for i in paths]


def ask_llama_server(connection: Connection, lora: list[Json], ids: Sequence[int]) -> LogProbabilities:
    """Return the log-probabilities of the most likely next tokens after a prompt, by (position, token id), by
    llama.cpp's `/completion`. Their position is the length of the prompt. Asks for one token at temperature 0 without
    the prompt's cache, with the adapters and scales of `lora`.

    If the answer has none (the token is a part of a character), a second request makes the server choose a plain-text
    token.

    Raises:
        ServerError: the second answer has none, either, or an answer is malformed.
    """

    def parse(reply: Any) -> LogProbabilities:
        """Return the log-probabilities of the next token by (length of the prompt, token id), {} if there are none.

        Raises ValueError for token ids below 0 or from 2³¹ on, and any error of a missing or malformed field.
        """
        said = reply.get("completion_probabilities") or [{"top_logprobs": []}]
        seen = {(len(ids), int(item["id"])): parse_log_probability(item["logprob"]) for item in said[0]["top_logprobs"]}
        if not all(0 <= token < MOST_TOKENS for _, token in seen):
            raise ValueError("no vocabulary has such a token")
        return seen

    def parse_whole(reply: Any) -> LogProbabilities:
        """Return `parse(reply)`. Raises ValueError if it is empty."""
        if not (seen := parse(reply)):
            raise ValueError("no log-probabilities")
        return seen

    body: Json = dict(
        prompt=list(ids), n_predict=1, n_probs=PROBABILITIES, temperature=0, cache_prompt=False, lora=lora
    )
    seen: LogProbabilities = connection.ask("/completion", parse, body)
    if not seen:  # the token was a part of a character
        body |= dict(logit_bias=[[find_plain_token(connection), 100]])
        seen = connection.ask("/completion", parse_whole, body)
    return seen


def find_plain_token(connection: Connection) -> int:
    """Return the first token id of 3 to 299 that the server (`/detokenize`) decodes to ASCII letters alone, with spaces
    around them or without.

    Raises ServerError if there is none.
    """
    for token in range(3, 300):
        text = connection.ask("/detokenize", lambda reply: reply["content"], {"tokens": [token]})
        if isinstance(text, str) and text.isascii() and text.strip().isalpha():
            return token
    raise ServerError(f"{connection.url} gives no log-probabilities, nor tokens of text. Give a text model.")
