# SPDX-License-Identifier: Apache-2.0
"""Python programs in processes of their own that need not import torch and transformers first.

`run` is `subprocess.run` of this Python for programs that may begin with both loaded, and graft too: a process that
has them, one for each of pytest's, forks for every program. transformers' Trainer is in none of them. What is about
starts, imports or settings that torch reads at its own takes `subprocess`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

PRELOADED = (
    "torch._dynamo", "numpy", "safetensors.torch", "transformers.models.llama.modeling_llama", "graft.model.api",
    "graft.methods.lora.lora", "graft.command.app",
)  # fmt: skip


def run(
    *words: object, cwd: str | os.PathLike | None = None, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python *words` to its end: `-m module`, `-c code` or a file, after `-W filter`, as the real one takes them.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; the program is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        task = {
            "words": [str(word) for word in words], "cwd": str(cwd or os.getcwd()), "timeout": timeout,
            "env": dict(os.environ if env is None else env), "out": str(out), "err": str(err),
        }  # fmt: skip
        server = started(os.getpid())
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        if code is None:
            raise subprocess.TimeoutExpired(task["words"], timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(task["words"], code, out.read_text(), err.read_text())


@cache
def started(_: int) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    atexit.register(lambda: server.communicate())  # it ends where its input does
    return server


# the process that forks


def serve() -> None:
    for name in PRELOADED:
        __import__(name)
    gc.collect()
    gc.freeze()
    del sys.path[0]  # this folder
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        task = json.loads(line)
        if (child := os.fork()) == 0:
            become(task)
        alarm = threading.Timer(task["timeout"], os.killpg, (child, signal.SIGKILL))
        os.setpgid(child, child)
        alarm.start()
        _, status = os.waitpid(child, 0)
        late = not alarm.is_alive()
        alarm.cancel()
        alarm.join()
        replies.write(json.dumps(None if late else os.waitstatus_to_exitcode(status)) + "\n")
        replies.flush()


def become(task: dict) -> None:
    """Be the program in this new process: it never returns."""
    os.setpgid(0, 0)
    for number, path in (1, task["out"]), (2, task["err"]):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    theirs = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *theirs, *(path for path in sys.path if path not in ours)]
    random.seed()
    sys.modules["numpy"].random.seed()
    code = 0
    try:
        follow(task["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def follow(words: Sequence[str]) -> None:
    warnings.resetwarnings()
    filters: list[str] = []
    while words[0] == "-W":
        filters.append(words[1])
        words = words[2:]
    warnings._setoption("ignore::DeprecationWarning")
    for text in filters:
        warnings._setoption(text)
    kind, *rest = words
    if kind == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [kind, *rest]
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve()
