# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities from a running server, for prompts given as token ids: vLLM, SGLang, llama.cpp's, OpenAI's API."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from math import isfinite
from typing import Any
from urllib.parse import urlsplit

from graft.config.reading import Json
from graft.core.errors import BaseModelMismatchError
from graft.files.errors import OptionError, ServerError, UnknownModelError

LARGEST = 64_000_000  # bytes of an answer
PROBABILITIES = 512  # of one position, where a server tells of one only
Seen = dict[tuple[int, int], float]  # (position, token there) → its log-probability after the tokens before it


class Connection:
    """Requests to one server, each within `timeout` seconds, its answer's last byte included."""

    def __init__(self, url: str, timeout: float = 60.0, key: str | None = None):
        if urlsplit(url).scheme not in ("http", "https"):
            raise OptionError(f"{url!r} is no address of a server: http://host:port.")
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def get(self, path: str) -> Any:
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, object]) -> Any:
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(self.url + path, body, self.headers)
        try:
            reply = self._read(request)
        except urllib.error.HTTPError as e:
            with e:  # it holds the connection
                text = shown(e.read(1000))
            kind = UnknownModelError if e.code == 404 else ServerError
            raise kind(f"{self.url}{path} answers {e.code} {e.reason}: {text}") from None
        except TimeoutError:
            raise ServerError(
                f"{self.url}{path} has not answered within {self.timeout:g} s: give it longer with --timeout."
            ) from None
        except (OSError, HTTPException) as e:
            if isinstance(getattr(e, "reason", None), TimeoutError):
                raise ServerError(f"{self.url} cannot be reached within {self.timeout:g} s.") from None
            raise ServerError(f"{self.url}{path} cannot be reached: {getattr(e, 'reason', None) or e!r}") from None
        try:
            return json.loads(reply)
        except ValueError:
            raise ServerError(f"{self.url}{path} does not answer JSON: {shown(reply[:1000])}") from None

    def _read(self, request: urllib.request.Request) -> bytes:
        end, body = time.monotonic() + self.timeout, bytearray()
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            while part := answer.read1(1 << 16):
                body += part
                if time.monotonic() > end:
                    raise TimeoutError
                if len(body) > LARGEST:
                    raise ServerError(f"{request.full_url} answers more than {LARGEST} bytes.")
        return bytes(body)


def shown(text: bytes) -> str:
    """Return the beginning of what a server answers, on one line."""
    line = " ".join(text.decode(errors="replace").split())
    return repr(line if len(line) <= 200 else line[:200] + "…")


def server_of(connection: Connection) -> str:
    """Return which program a server is, by what it says of its models: "vllm", "sglang", "llama.cpp", or "openai"."""
    reply = connection.get("/v1/models")
    try:
        owners = {str(entry.get("owned_by")) for entry in reply["data"]}
    except (TypeError, KeyError, AttributeError):
        raise garbage(connection, "/v1/models", reply) from None
    return next((name for name in ("vllm", "sglang", "llama.cpp") if name.replace(".", "") in owners), "openai")


def garbage(connection: Connection, path: str, reply: object) -> ServerError:
    return ServerError(f"{connection.url}{path} answers something else than expected: {shown(str(reply).encode())}")


def ask(connection: Connection, server: str, name: str, prompts: Sequence[Sequence[int]], base: bool) -> list[Seen]:
    """Return what a model of the server says of each prompt.

    Args:
        server: as `server_of` returns it.
        name: of the base or of an adapter. Of llama.cpp's server an adapter's number, its path or the file's name.
        base: the name is the base's.

    Raises:
        ServerError: see there.
        UnknownModelError: the server does not know the name.
        BaseModelMismatchError: the server makes other tokens of these, or does not have one of them.
    """
    if server == "llama.cpp":
        lora = adapters_of_llama(connection, None if base else name)
        return [llama(connection, lora, prompt) for prompt in prompts]
    one: Callable[..., Seen] = sglang if server == "sglang" else openai
    try:
        return [one(connection, name, prompt) for prompt in prompts]
    except UnknownModelError as e:
        raise UnknownModelError(
            f"The server at {connection.url} has no model {name!r}, but {known(connection)} ({e})"
        ) from None


def known(connection: Connection) -> list[str]:
    """Return the names of the models that a server says it has."""
    try:
        return [str(entry["id"]) for entry in connection.get("/v1/models")["data"]]
    except (ServerError, TypeError, KeyError):
        return []


def openai(connection: Connection, name: str, ids: Sequence[int]) -> Seen:
    """Ask by OpenAI's completions, which echo the prompt with its log-probabilities."""
    path = "/v1/completions"
    body = dict(model=name, prompt=list(ids), max_tokens=1, temperature=0, logprobs=1, echo=True)
    reply = connection.post(path, body | dict(return_tokens_as_token_ids=True))
    try:
        said = reply["choices"][0]["logprobs"]
        values, tokens = said["token_logprobs"], said["tokens"]
        named = [int(t.removeprefix("token_id:")) for t in tokens if t.startswith("token_id:")]
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        raise garbage(connection, path, reply) from None
    if len(values) < len(ids) or (named and named[: len(ids)] != list(ids)):
        raise BaseModelMismatchError(
            f"{connection.url} makes {len(values) - 1} tokens {named[:8]}… of the {len(ids)} of a prompt, "
            f"{list(ids)[:8]}…: it does not take tokens by their ids, or has another vocabulary."
        )
    return numbers(connection, path, ids, values[: len(ids)])


def sglang(connection: Connection, name: str, ids: Sequence[int]) -> Seen:
    """Ask by SGLang's own request. `name` is an adapter's, or the served model's."""
    path = "/generate"
    body: Json = dict(
        input_ids=list(ids), sampling_params=dict(max_new_tokens=1, temperature=0), return_logprob=True,
        logprob_start_len=0,
    )  # fmt: skip
    if name not in known(connection)[:1]:
        body["lora_path"] = name
    reply = connection.post(path, body)
    try:
        said = reply["meta_info"]["input_token_logprobs"]
        values, tokens = [entry[0] for entry in said], [entry[1] for entry in said]
    except (TypeError, KeyError, IndexError):
        raise garbage(connection, path, reply) from None
    if tokens != list(ids):
        raise BaseModelMismatchError(f"{connection.url} makes the tokens {tokens[:8]}… of the prompt {list(ids)[:8]}….")
    return numbers(connection, path, ids, values)


def numbers(connection: Connection, path: str, ids: Sequence[int], values: Sequence[float]) -> Seen:
    """Return the log-probabilities of a prompt's tokens but the first, which has none."""
    if not all(isinstance(v, (int, float)) and isfinite(v) for v in values[1:]):
        raise garbage(connection, path, values)
    return {(at, ids[at]): float(values[at]) for at in range(1, len(ids))}


def adapters_of_llama(connection: Connection, name: str | None) -> list[Json]:
    """Return the scales of all adapters of llama.cpp's server that let `name` act alone; None: none of them."""
    reply = connection.get("/lora-adapters")
    try:
        paths = {entry["id"]: str(entry["path"]) for entry in reply}
    except (TypeError, KeyError):
        raise garbage(connection, "/lora-adapters", reply) from None
    files = {i: os.path.basename(path) for i, path in paths.items()}
    fits = [i for i, file in files.items() if name in (str(i), paths[i], file, file.removesuffix(".gguf"))]
    if name is not None and len(fits) != 1:
        raise UnknownModelError(f"The server at {connection.url} has no adapter {name!r}, but {paths}.")
    return [{"id": i, "scale": 1.0 if name is not None and i in fits else 0.0} for i in paths]


def llama(connection: Connection, lora: list[dict[str, object]], ids: Sequence[int]) -> Seen:
    """Ask for the distribution of the next token, the only one that llama.cpp's server tells."""
    path = "/completion"
    body: Json = dict(
        prompt=list(ids), n_predict=1, n_probs=PROBABILITIES, temperature=0, cache_prompt=False, lora=lora
    )
    reply = connection.post(path, body)
    if isinstance(reply, dict) and not reply.get("completion_probabilities"):  # of a token that is part of a character
        reply = connection.post(path, body | dict(logit_bias=[[plain_token(connection), 100]]))
    try:
        said = reply["completion_probabilities"][0]["top_logprobs"]
        seen = {(len(ids), int(entry["id"])): float(entry["logprob"]) for entry in said}
    except (TypeError, KeyError, IndexError, ValueError):
        raise garbage(connection, path, reply) from None
    if not seen or not all(map(isfinite, seen.values())):
        raise garbage(connection, path, reply)
    return seen


def plain_token(connection: Connection) -> int:
    """Return a token that is text by itself."""
    for token in range(3, 300):
        reply = connection.post("/detokenize", {"tokens": [token]})
        text = reply.get("content") if isinstance(reply, dict) else None
        if isinstance(text, str) and text.isascii() and text.strip().isalpha():
            return token
    raise ServerError(f"{connection.url} tells no log-probabilities: it knows no token that is plain text.")
