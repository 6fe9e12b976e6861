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


VERBS = """
import contextlib, io, json, sys
from graft.command import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            print(json.dumps([end.code, out.getvalue(), err.getvalue()]), file=sys.__stdout__)
"""


def run(endpoint, home, *commands):
    """Run commands in one process; return the code, the output and the errors of each."""
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": "hf_of_another"}
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", VERBS, words], env=os.environ | own, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("status, code, says", [
    (None, "", "refused"), (401, "", "Log in"), (403, "", "Log in"), (404, "RepoNotFound", "RepositoryNotFoundError"),
])  # fmt: skip
def test_one_line_says_why(status, code, says, tmp_path):
    commands = ("push", ADAPTER, "me/it"), ("pull", "me/it", "-o", tmp_path / "got")
    if status is None:
        results = run("http://127.0.0.1:9", tmp_path / "home", *commands)  # where nobody listens
    else:
        with hub(status, code) as endpoint:
            results = run(endpoint, tmp_path / "home", *commands)
    for command, (returned, out, err) in zip(commands, results, strict=True):
        assert returned == 3 and out == "", (command, err)
        assert err.startswith("graft: ") and "me/it" in err and "Traceback" not in err
        assert says in err
    assert not (tmp_path / "got").exists()
