# SPDX-License-Identifier: Apache-2.0
"""The stand-in hub over HTTP, for this machine only: code that insists on asking the hub gets its answers offline.

It reads the layout of the hub's cache (`hub/models--org--name/{refs,snapshots}`), so that a test with an empty cache
downloads from it. It speaks what huggingface_hub asks of a model: its facts, its tree, its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


class Absent(Exception):
    """What the hub says of a repository, revision or file that is not there."""


class Hub(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def snapshot(self, repo: str, revision: str) -> Path:
        folder = self.root / "hub" / ("models--" + repo.replace("/", "--"))
        if not folder.is_dir():
            raise Absent("RepoNotFound")
        ref = folder / "refs" / revision
        found = folder / "snapshots" / (ref.read_text() if ref.is_file() else revision)
        if not found.is_dir():
            raise Absent("RevisionNotFound")
        return found

    def file(self, repo: str, revision: str, name: str) -> None:
        snapshot = self.snapshot(repo, revision)
        if not (snapshot / name).is_file():
            raise Absent("EntryNotFound")
        body = (snapshot / name).read_bytes()
        tag = hashlib.sha1(f"{repo} {snapshot.name} {name}".encode()).hexdigest()
        self.reply(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": snapshot.name})

    def facts(self, asked: str) -> None:
        """Answer `name[/revision/x]` and `name/tree/x[/folder]`."""
        repo, tree, rest = asked.partition("/tree/")
        revision, _, below = rest.partition("/")
        if not tree:
            repo, _, revision = asked.partition("/revision/")
        snapshot = self.snapshot(repo, revision or "main")
        names = sorted(str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file())
        names = [n for n in names if not below or n.startswith(f"{below}/")]
        if not names:
            raise Absent("EntryNotFound")
        commit = snapshot.name
        said = dict(_id=commit[:24], id=repo, modelId=repo, sha=commit, private=False, gated=False, disabled=False)
        said |= dict(downloads=0, likes=0, tags=[], siblings=[{"rfilename": n} for n in names])
        files = [dict(type="file", path=n, size=(snapshot / n).stat().st_size, oid=commit) for n in names]
        self.reply(200, json.dumps(files if tree else said).encode(), {"Content-Type": "application/json"})

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        repo, resolve, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        try:
            if resolve:
                self.file(repo, revision, name)
            elif path.startswith("api/models/") and self.command != "POST":
                self.facts(path.removeprefix("api/models/"))
            else:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                raise Absent("RepoNotFound")
        except Absent as why:
            self.reply(404, b"", {"X-Error-Code": str(why), "X-Error-Message": str(why)})

    do_GET = do_HEAD = do_POST = answer

    def reply(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def served(root: Path) -> Iterator[str]:
    """Serve the hub in `root` until the block ends. Yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Hub,), {"root": root}))
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
