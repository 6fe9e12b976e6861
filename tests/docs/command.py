# SPDX-License-Identifier: Apache-2.0
"""What pages show of the command: `python -m tests.docs.command` runs it and puts the output on them."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import graft
from tests import fresh, models
from tests.docs.blocks import ROOT
from tests.serving.server import answers, serving

PAGE = ROOT / "docs" / "command.md"
VERBS, REFERENCE = (ROOT / "docs" / "reference" / name for name in ("verbs.md", "command.md"))
PAGES = (PAGE, VERBS, ROOT / "docs" / "from_training_to_a_server.md")
PORT = "127.0.0.1:8000"  # of a server on a page
BLOCK = re.compile(r"```console\n\$ (?P<command>graft [^\n]*)\n(?P<output>.*?)```", re.S)


def prepare(folder: Path) -> None:
    """Make what the page's examples work on: a base, an adapter on it, and the two merged."""
    base = models.make("llama")
    base.save_pretrained(folder / "my-base")
    base.name_or_path = "someone/my-base"
    torch.manual_seed(0)
    config = graft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    model = graft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p *= 0.3 ** torch.arange(8)
    model.save_pretrained(folder / "my-adapter")
    (folder / "my-adapter" / "README.md").unlink()
    model.merge_and_unload().save_pretrained(folder / "my-tuned-model")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the base, the adapter as "tuned", and as "other" one that does nothing; yield the server's address."""
    base = models.make("llama").eval()
    tuned = graft.PeftModel.from_pretrained(models.make("llama"), folder / "my-adapter").eval()
    with serving({"base": answers(base), "tuned": answers(tuned), "other": answers(base)}) as url:
        yield url.removeprefix("http://")


def run(command: str, folder: Path) -> str:
    """Return what a command prints, errors too, and its exit code if that is not 0."""
    if PORT in command:
        with served(folder) as address:
            return run(command.replace(PORT, address), folder).replace(address, PORT)
    code = "from graft.command import main; main()"
    env = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    done = fresh.run("-c", code, *command.split()[1:], cwd=folder, env=env)
    lines = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    while lines and not lines[-1]:
        del lines[-1]
    lines += [f"(exit code {done.returncode})"] if done.returncode else []
    return "".join(f"{line}\n" for line in lines)


def filled(text: str, answer: Callable[[str], str]) -> str:
    """Return the page with the output of each command below it, in the page's order."""
    return BLOCK.sub(lambda m: f"```console\n$ {m['command']}\n{answer(m['command'])}```", text)


def main() -> None:
    """Fill in all pages, or those whose names are given."""
    for page in [p for p in PAGES if p.stem in sys.argv[1:] or len(sys.argv) == 1]:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            page.write_text(filled(page.read_text(), lambda command: run(command, Path(folder))))


if __name__ == "__main__":
    main()
