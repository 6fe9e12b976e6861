# SPDX-License-Identifier: Apache-2.0
"""Starting a vLLM server of this machine for the time of a block."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

from graft import ServerError
from graft.files.ask import Connection

LONGEST = 600  # seconds until it must be ready


@contextmanager
def start_vllm(
    python: str, base: str, base_name: str, adapters: Mapping[str, str], dtype: str = "float32", max_rank: int = 64
) -> Iterator[str]:
    """Start the vLLM of a Python's environment; yield its address, and end it with the block.

    Args:
        base: folder of the model.
        adapters: name → folder.

    Raises:
        ServerError: the server ended, or was not ready in time; the text has the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", base_name,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager", "--max-model-len", "128",
        "--max-num-seqs", "4", "--enable-lora", "--max-lora-rank", str(max_rank),
    ]  # fmt: skip
    if adapters:
        command += ["--lora-modules", *(f"{name}={os.path.abspath(path)}" for name, path in adapters.items())]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | quiet, start_new_session=True)
        try:
            wait_for_server(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_server(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    """Wait until the server answers."""
    end = time.monotonic() + LONGEST
    while process.poll() is None and time.monotonic() < end:
        try:
            Connection(url, 5).send("/v1/models")
            return
        except ServerError:
            time.sleep(0.5)
    log.seek(0)
    said = log.read().decode(errors="replace").strip().splitlines()[-15:]
    raise ServerError("vllm ended before it was ready, or took too long:\n" + "\n".join(said))
