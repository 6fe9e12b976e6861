# SPDX-License-Identifier: Apache-2.0
"""One training of the demo, in a process of its own: prints a line of JSON for each event."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import graft
from examples.demo_lm.chat import prompt
from examples.demo_lm.data import Task, dates
from examples.demo_lm.methods import LORA
from examples.demo_lm.story import TOKENS, judge, size
from examples.demo_lm.training import generate, train


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def base(source: str, kind: str) -> Any:
    """Return the model, dense or packed in 4 bits as it is read."""
    if kind == "dense":
        return AutoModelForCausalLM.from_pretrained(source)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=nf4)


def config(method: str, steps: int) -> Any:
    made = LORA.config(steps)
    made.use_dora = method == "DoRA"
    return made


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's weights, with the scales of packed ones."""
    return model.get_memory_footprint()  # type: ignore[operator,no-any-return]


def forget_peak() -> None:
    """Have Linux count the process's peak memory from now on."""
    gc.collect()
    with contextlib.suppress(OSError):  # elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the process's peak memory, in bytes."""
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(kind: str, method: str, source: str, folder: Path, steps: int, seed: int, held_out: int) -> None:
    task = dates(seed, held_out)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = base(source, kind)
    packed_bytes = bytes_of(model)
    torch.manual_seed(seed)
    model = graft.get_peft_model(graft.prepare_model_for_kbit_training(model, False), config(method, steps))
    forget_peak()
    start = time.process_time()
    for i, loss in enumerate(train(model, tokenizer, task, steps=steps, lr=LORA.lr, seed=seed)):
        say(step=i + 1, what=f"loss {loss:.3f}")
    cpu, memory = time.process_time() - start, peak()
    model.save_pretrained(folder)
    exact = {"as trained": score(model, tokenizer, task, "as trained")}
    del model
    if kind != "dense":
        over = {"over the 4-bit base": kind, "over the dense base": "dense"}
        for place, other in over.items():
            exact[place] = score(loaded(source, other, folder), tokenizer, task, place)
        merged = loaded(source, kind, folder).merge_and_unload()
        exact["merged into 4 bits"] = score(merged, tokenizer, task, "merged into 4 bits")
        merged = loaded(source, kind, folder).merge_and_unload(dequantize=True)
        exact["merged, dense"] = score(merged, tokenizer, task, "merged, dense")
    result = {
        "exact": exact,
        "steps": steps,
        "cpu_seconds": cpu,
        "base_bytes": packed_bytes,
        "peak_memory": memory,
        "file_bytes": size(folder),
    }
    say(result=result)


def loaded(source: str, kind: str, folder: Path) -> Any:
    return graft.PeftModel.from_pretrained(base(source, kind), folder)


def score(model: Any, tokenizer: Any, task: Task, place: str) -> float:
    say(what=f"answers, {place}")
    prompts = [prompt(tokenizer, task.instruction, pair.text) for pair in task.test]
    return judge(generate(model, tokenizer, prompts, tokens=TOKENS), task)["exact"]


if __name__ == "__main__":
    kind, method, source, folder, *numbers = sys.argv[1:]
    main(kind, method, source, Path(folder), *map(int, numbers))
