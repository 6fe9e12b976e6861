# SPDX-License-Identifier: Apache-2.0
"""OpenAI's completions over HTTP: a model for each adapter, and one for the base. Adapters come and go by request."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

import graft
from examples.server.batches import Piece
from examples.server.models import Models, Refused

STATUS = {RequestValidationError: 400, Refused: 400, graft.AdapterNotFoundError: 404, graft.InUseError: 503}


class Completion(BaseModel, extra="forbid"):
    """What a client may ask for. A field that is not here is refused rather than ignored."""

    model: str
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    user: str | None = None  # whoever that is


class Load(BaseModel, extra="forbid"):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)


class Unload(BaseModel, extra="forbid"):
    lora_name: str


class Answer:
    """A request on its way: a row for each of its prompts, and the pieces that they send."""

    def __init__(self, asked: Completion, models: Models):
        several = isinstance(asked.prompt, list) and asked.prompt and not isinstance(asked.prompt[0], int)
        self.sent: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        send = partial(asyncio.get_running_loop().call_soon_threadsafe, self.sent.put_nowait)
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
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self.head["model"] = asked.model
        for row in self.rows:
            models.batches.waiting.put(row)

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


def refuse(_: Request, error: Exception) -> JSONResponse:
    status, content = told(error)
    return JSONResponse(content, status)


def make_app(models: Models) -> FastAPI:
    app = FastAPI(title="graft")
    for kind in (*STATUS, Exception):
        app.add_exception_handler(kind, refuse)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "batches": dict(models.batches.sizes)}  # rows in a batch → how many of these ran

    @app.get("/v1/models")
    def listed() -> dict[str, Any]:
        about = {"object": "model", "created": 0, "owned_by": "graft"}
        return {
            "object": "list",
            "data": [{"id": name, **about, "root": at} for name, at in list(models.folders.items())],
        }

    @app.post("/v1/completions")
    async def complete(asked: Completion, request: Request) -> Response:
        answer = Answer(asked, models)
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
