# SPDX-License-Identifier: Apache-2.0
"""`graft push` and `pull` with huggingface_hub itself, in processes of their own: no network, a hub that refuses."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ADAPTER = Path(__file__).parents[1] / "files" / "fixtures" / "mlx_lora"


@contextmanager
def hub(status, code):
    """A hub that answers all requests with one error, as the real one does: its code stands in a header."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps({"error": code}).encode()
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_POST = do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run(endpoint, home, *words):
    code = "from graft.command import main; main()"
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": "hf_of_another"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("status, code, says", [
    (None, "", "refused"), (401, "", "Log in"), (403, "", "Log in"), (404, "RepoNotFound", "RepositoryNotFoundError"),
])  # fmt: skip
@pytest.mark.parametrize("verb", ["push", "pull"])
def test_one_line_says_why(verb, status, code, says, tmp_path):
    words = ("push", ADAPTER, "me/it") if verb == "push" else ("pull", "me/it", "-o", tmp_path / "got")
    if status is None:
        done = run("http://127.0.0.1:9", tmp_path / "home", *words)  # where nobody listens
    else:
        with hub(status, code) as endpoint:
            done = run(endpoint, tmp_path / "home", *words)
    assert done.returncode == 3 and done.stdout == "", done.stderr
    assert done.stderr.startswith("graft: ") and "me/it" in done.stderr and "Traceback" not in done.stderr
    assert says in done.stderr
    assert not (tmp_path / "got").exists()
