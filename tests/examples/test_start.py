# SPDX-License-Identifier: Apache-2.0
"""`start_vllm` starts a server, says why it does not come up, and leaves none behind."""

from __future__ import annotations

import os
import sys
from itertools import pairwise

import pytest

from examples.start import start_vllm
from graft import ServerError
from graft.files.ask import Connection

SERVER = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"pid": os.getpid(), "words": sys.argv[1:]}).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def python(tmp_path, text):
    """An executable that runs this program with the words of `start_vllm`'s command."""
    (tmp_path / "server.py").write_text(text)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/server.py" "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_server_for_as_long_as_the_block_runs(tmp_path):
    adapters = {"one": "a/one", "two": "/two"}
    with start_vllm(python(tmp_path, SERVER), "a/base", "named", adapters, "bfloat16", 32) as url:
        said = Connection(url).ask("/v1/models", dict)
    words = said["words"]
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    given = dict(pairwise(words[2:]))
    assert given["--model"] == "a/base" and given["--served-model-name"] == "named"
    assert given["--dtype"] == "bfloat16" and given["--max-lora-rank"] == "32"
    assert words[words.index("--lora-modules") + 1 :] == [f"one={os.getcwd()}/a/one", "two=/two"]
    with pytest.raises(ProcessLookupError):
        os.kill(said["pid"], 0)


def test_a_server_that_ends(tmp_path):
    with (
        pytest.raises(ServerError, match=r"ended before it was ready(.|\n)*ValueError: no such model"),
        start_vllm(python(tmp_path, "raise ValueError('no such model')"), "base", "base", {}),
    ):
        raise AssertionError("it is not ready")
