# SPDX-License-Identifier: Apache-2.0
"""OpenAI's completions over HTTP: a model for each adapter, and one for the base. Adapters come and go by request."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from functools import partial
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import graft

from .batches import Piece
from .models import Busy, Models, Refused

STATUS = {
    RequestValidationError: 400, Refused: 400, graft.AdapterNotFoundError: 404, graft.InUseError: 503, Busy: 503,
}  # fmt: skip
LARGEST = 1_000_000  # bytes of a request
PROMPTS, STOPS, FIELDS = 128, 4, 16  # of one request


def check_text(text: str) -> str:
    """Return a text that UTF-8 can hold, as JSON's escapes may not; else raise ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(check_text)]
Name = Annotated[Text, Field(min_length=1, max_length=200)]
Stop = Annotated[Text, Field(max_length=1000)]


def check_prompt(prompt: object) -> object:
    """Return a prompt that is a text, token ids, or a short list of either; ValueError says what is wrong.

    pydantic would make an error for each wrong item of each type that it might be.
    """
    prompts = [prompt]
    if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
        prompts = prompt
        if len(prompts) > PROMPTS:
            raise ValueError(f"{len(prompts)} prompts are too many for one request, which may have {PROMPTS}")
    for one in prompts:
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(token) is int for token in one)):
            raise ValueError("a prompt is a text or a list of token ids, or there is a list of such")
    if len({type(one) for one in prompts}) > 1:
        raise ValueError("prompts are all texts, or all token ids")
    return prompt


class Body(BaseModel, extra="forbid"):
    """What a request may have. A field that is not there is refused rather than ignored."""

    @model_validator(mode="before")
    @classmethod
    def check_fields(cls, given: object) -> object:
        if isinstance(given, dict) and len(given) > FIELDS:
            raise ValueError(f"{len(given)} fields are too many")
        return given


class Completion(Body):
    model: Name
    prompt: Annotated[Text | list[int] | list[Text] | list[list[int]], BeforeValidator(check_prompt)]
    max_tokens: int = Field(16, ge=1, le=2**24)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS, fail_fast=True)] | None = None
    stream: bool = False
    user: Annotated[Text, Field(max_length=1000)] | None = None  # whoever that is


class Load(Body):
    lora_name: Name
    lora_path: Text = Field(min_length=1, max_length=4096)


class Unload(Body):
    lora_name: Name


class Guard:
    """ASGI middleware that refuses requests of other sites' pages, and those with too many bytes.

    A page of another site can have a browser send requests here: under its own name, which it lets point to this
    machine, or across origins. The first have its name in Host, the others an Origin that is not this server's.

    Args:
        hosts: names by which clients know this server; numeric addresses are no names that may point elsewhere.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self.is_known(headers.getlist("host")):
            response = refusal(403, "This server does not go by the name in the Host header: see --allow-host.")
        elif "origin" in headers and urlsplit(headers["origin"]).netloc != headers["host"]:
            response = refusal(403, "Pages of other sites may ask nothing here.")
        elif int(headers.get("content-length", 0)) > LARGEST:  # uvicorn lets only digits pass
            response = refusal(413, f"A request has at most {LARGEST} bytes.")
        else:
            return await self.app(scope, self.bounded(receive), send)
        await response(scope, receive, send)

    def is_known(self, hosts: list[str]) -> bool:
        """Return True if the one Host header has a numeric address, or a name of this server."""
        try:
            (name,) = [urlsplit(f"//{host}").hostname or "" for host in hosts]
            return name in self.hosts or bool(ip_address(name))
        except ValueError:  # none, several, or neither
            return False

    def bounded(self, receive: Receive) -> Receive:
        """Return `receive` for a body without a length, which ends in an error when it is too long."""
        size = 0

        async def receive_part() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST:
                raise Refused(f"A request has at most {LARGEST} bytes.")
            return message

        return receive_part


class Answer:
    """A request on its way: a row for each of its prompts, and the pieces that they send."""

    def __init__(self, asked: Completion):
        self.asked = asked
        self.sent: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self.head["model"] = asked.model

    def begin(self, models: Models) -> None:
        """Make the rows and have them wait for their turn. In a thread: a tokenizer takes its time.

        Raises:
            Busy: there are too many.
        """
        asked = self.asked
        several = isinstance(asked.prompt, list) and asked.prompt and not isinstance(asked.prompt[0], int)
        send = partial(self.loop.call_soon_threadsafe, self.sent.put_nowait)
        self.rows = [
            models.row(
                asked.model,
                prompt,
                asked.max_tokens,
                tell=lambda piece, index=index: send((index, piece)),
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=asked.seed,
                stops=[stop for stop in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or []) if stop],
            )
            for index, prompt in enumerate(asked.prompt if several else [asked.prompt])
        ]
        if not models.batches.add(self.rows):
            raise Busy(f"{models.batches.room} prompts wait already: try again later.")

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the rows' places and pieces as they are made. When the listener leaves, the rows end."""
        running = len(self.rows)
        try:
            while running:
                index, piece = await self.sent.get()
                if isinstance(piece, Exception):
                    raise piece
                running -= piece.ended is not None
                yield index, piece
        finally:
            for row in self.rows:
                row.over = True

    async def events(self) -> AsyncIterator[str]:
        """Yield an event for each piece."""
        try:
            async with aclosing(self.pieces()) as pieces:
                async for index, piece in pieces:
                    yield event({**self.head, "choices": [choice(index, piece.text, piece.tokens, piece.ended)]})
        except Exception as error:  # it is too late for a status
            yield event(told(error)[1])
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> dict[str, Any]:
        """Return the whole answer; what there is of it, if the client has gone."""
        texts, ended = [""] * len(self.rows), [""] * len(self.rows)
        async with aclosing(self.pieces()) as pieces:
            async for index, piece in pieces:
                texts[index], ended[index] = texts[index] + piece.text, piece.ended or ""
                if await request.is_disconnected():
                    break
        choices = [choice(i, texts[i], row.made, ended[i]) for i, row in enumerate(self.rows)]
        asked, made = (sum(map(len, ids)) for ids in zip(*((row.prompt, row.made) for row in self.rows)))
        usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
        return {**self.head, "choices": choices, "usage": usage}


def choice(index: int, text: str, tokens: list[int], ended: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "token_ids": tokens, "finish_reason": ended, "logprobs": None}


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def told(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return an error's status and OpenAI's object for it."""
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    message, param = str(error), "model" if status == 404 else None
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:2]))
        message = f"{param}: {first['msg']}"
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "model_not_found" if status == 404 else None
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


def refuse(_: Request, error: Exception) -> JSONResponse:
    status, content = told(error)
    return JSONResponse(content, status)


def make_app(models: Models, hosts: Collection[str] = ("localhost",)) -> FastAPI:
    app = FastAPI(title="graft")
    app.add_middleware(Guard, hosts=hosts)
    for kind in (*STATUS, Exception):
        app.add_exception_handler(kind, refuse)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "batches": dict(models.batches.sizes)}  # rows in a batch → how many of these ran

    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        about = {"object": "model", "created": 0, "owned_by": "graft"}
        return {
            "object": "list",
            "data": [{"id": name, **about, "root": at} for name, at in list(models.folders.items())],
        }

    @app.post("/v1/completions")
    async def complete(asked: Completion, request: Request) -> Response:
        answer = Answer(asked)
        await asyncio.to_thread(answer.begin, models)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return JSONResponse(await answer.whole(request))

    @app.post("/v1/load_lora_adapter")
    def load(asked: Load) -> Response:  # not async: in a thread, where it may wait
        models.load(asked.lora_name, asked.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload(asked: Unload) -> Response:
        models.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return app
