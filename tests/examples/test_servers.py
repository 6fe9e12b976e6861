# SPDX-License-Identifier: Apache-2.0
"""SGLang's protocol, spoken by a stand-in, and the class that the page on reinforcement learning shows."""

from __future__ import annotations

import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file

import graft
from examples import servers
from graft import ServerError
from graft.serving import Versions
from tests.docs.blocks import ROOT, blocks
from tests.families import base
from tests.leaves_out import FUSED_EXPERTS

pytestmark = FUSED_EXPERTS


class Stub(BaseHTTPRequestHandler):
    """What SGLang 0.5.23 does with these requests, by its source."""

    def do_GET(self):
        self.answer(200, {"data": [{"id": name} for name in ("base", *self.server.held)]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, held = body["lora_name"], self.server.held
        if self.path == "/load_lora_adapter" and name not in held:
            try:
                config = json.loads(Path(body["lora_path"], "adapter_config.json").read_text())
            except OSError as e:
                return self.answer(400, {"success": False, "error_message": str(e)})
            if config["r"] > 4:
                return self.answer(200, {"success": False, "error_message": "incompatible with the memory pool"})
            held[name] = load_file(f"{body['lora_path']}/adapter_model.safetensors")
        elif self.path == "/unload_lora_adapter" and name in held:
            del held[name]
        else:
            return self.answer(400, {"success": False, "error_message": f"{self.path} of {name}"})
        self.answer(200, {"success": True, "error_message": "", "loaded_adapters": {n: n for n in held}})

    def answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def sglang():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.held = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_versions_on_sglang(sglang, tmp_path):
    ours = servers.Sglang([f"http://127.0.0.1:{sglang.server_port}"], str(tmp_path))
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    policy = graft.get_peft_model(
        base("qwen3_moe"), graft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacks)
    )
    versions = Versions("policy", ours.load, ours.unload, keep=2)
    names = [versions.publish(graft.adapter_tensors(policy, layout="sglang")) for _ in range(3)]
    assert [*sglang.held] == names[1:] == sorted(path.name for path in tmp_path.iterdir())
    made = graft.adapter_tensors(policy, layout="sglang")
    assert {*sglang.held[names[2]]} == {*made.tensors}
    of = ["--enable-lora", "--max-lora-rank", "4", "--lora-target-modules", "down_proj", "gate_up_proj", "q_proj"]
    assert made.needs["flags"] == of


def test_what_sglang_refuses(sglang, tmp_path):
    ours = servers.Sglang([f"http://127.0.0.1:{sglang.server_port}"], str(tmp_path))
    versions = Versions("policy", ours.load, ours.unload)
    small, large = (
        graft.adapter_tensors(graft.get_peft_model(base("qwen3_moe"), graft.LoraConfig(r=r, target_modules=["q_proj"])))
        for r in (4, 8)
    )
    versions.publish(small)
    with pytest.raises(ServerError, match="memory pool"):
        versions.publish(large)
    assert versions.names == [*sglang.held] == [path.name for path in tmp_path.iterdir()]
    with pytest.raises(ServerError, match="answers 400"):  # the name is taken
        ours.load(versions.current, small)


def test_the_page_shows_the_class():
    page = next(b.text for b in blocks(ROOT / "docs" / "reinforcement_learning.md") if "class Vllm" in b.text)
    assert inspect.getsource(servers.Vllm) in page
