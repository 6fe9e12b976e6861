# SPDX-License-Identifier: Apache-2.0
"""Import modules once, and run command after command in forks: imports take longer than training a tiny model.

`python forks.py MODULE…` reads a JSON list a line: a folder, a log and a command's words, a script's path or a module's
name first. It prints the command's exit status.
"""

import importlib
import json
import os
import runpy
import sys
import traceback

import torch
from sitecustomize import say


def run(folder: str, log: str, words: list[str]) -> int:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    os.environ["PEFT_WAS"] = f"{log}.peft"
    torch.manual_seed(0)  # axolotl sets no seed before it makes an adapter
    sys.argv = words
    try:
        if os.path.exists(words[0]):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        say()
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
            continue
        status = run(*json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
