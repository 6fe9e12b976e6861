# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that answers as vLLM's, SGLang's or llama.cpp's does, and computes by functions of ids."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp", "openai": "somebody"}


@contextmanager
def serving(models: dict[str, Callable[[list[int]], Tensor]], kind: str = "vllm", answer: Any = None) -> Iterator[str]:
    """Serve models: name → function from ids to log-probabilities (positions, vocabulary). The first is the base.

    Args:
        answer: called with the handler before anything else; returns True if it has answered.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if answer is not None and answer(self):
                return
            if self.path == "/v1/models":
                self.say({"data": [{"id": name, "owned_by": OWNERS[kind]} for name in models]})
            elif self.path == "/lora-adapters" and kind == "llama.cpp":
                self.say([{"id": n, "path": f"{name}.gguf", "scale": 1.0} for n, name in enumerate([*models][1:])])
            else:
                self.say({"error": "no such path"}, 404)

        def do_POST(self) -> None:
            self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if answer is not None and answer(self):
                return
            {"/v1/completions": self.completions, "/generate": self.generate, "/completion": self.llama}[self.path]()

        def completions(self) -> None:
            ids = self.body["prompt"]
            if self.body["model"] not in models:
                return self.say({"error": f"The model `{self.body['model']}` does not exist."}, 404)
            values = models[self.body["model"]](ids)
            said = [None, *(float(values[at - 1, ids[at]]) for at in range(1, len(ids))), float(values[-1].max())]
            tokens = [f"token_id:{i}" for i in [*ids, int(values[-1].argmax())]]
            self.say({"choices": [{"logprobs": {"token_logprobs": said, "tokens": tokens}}]})

        def generate(self) -> None:
            ids = self.body["input_ids"]
            values = models[self.body.get("lora_path") or next(iter(models))](ids)
            said = [
                [None, ids[0], None],
                *([float(values[at - 1, ids[at]]), ids[at], None] for at in range(1, len(ids))),
            ]
            self.say({"text": "", "meta_info": {"input_token_logprobs": said}})

        def llama(self) -> None:
            on = [n for n, entry in enumerate(self.body["lora"]) if entry["scale"]]
            values = models[[*models][1 + on[0] if on else 0]](self.body["prompt"])[-1]
            top = values.topk(min(self.body["n_probs"], len(values)))
            said = [{"id": int(i), "logprob": float(v)} for v, i in zip(*top)]
            self.say({"completion_probabilities": [{"top_logprobs": said}]})

        def say(self, what: Any, code: int = 200) -> None:
            held = what if isinstance(what, bytes) else json.dumps(what).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(held)))
            self.end_headers()
            self.wfile.write(held)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # it looks for its end each 10 ms, and not each half second
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def answers(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Callable[[list[int]], Tensor]:
    """Return a function that gives a model's log-probabilities after each of the ids."""

    @torch.no_grad()
    def run(ids: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0].to(dtype).float().log_softmax(-1)

    return run
