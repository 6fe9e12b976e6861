# SPDX-License-Identifier: Apache-2.0
"""Merging into, and extracting from, checkpoints that are ten times larger than the memory that may be used for it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from benchmarks.measure import Effort, Goal, Row
from benchmarks.memory import peak
from graft.files.tensors import Tensor, make_tensor, write_safetensors

FOLDER = tempfile.TemporaryDirectory()  # gone with the process
SIZE, HIDDEN, INNER, LAYERS, SHARDS = 150_000_000, 1024, 4096, 60, 6  # bytes allowed; the base has 2 GB in bfloat16
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 1024,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
IMPORTS = "from graft.files.merging.merge import merge_files\nimport transformers\n"
MERGE = IMPORTS + "merge_files({base!r}, {adapter!r}, {output!r}, force=True)"
SIDE, SQUARES = 2560, 48  # matrices of 26 MB in float32
EXTRACT_IMPORTS = """
from graft.files.base import read_base_files
from graft.files.extract import extract_adapter
from graft.files.formats import peft
"""
EXTRACT = (
    EXTRACT_IMPORTS
    + """
peft.write(extract_adapter(read_base_files({after!r}), read_base_files({before!r}), rank=8).adapter, {output!r})
"""
)
IN_MEMORY = """
import transformers
from benchmarks.measure import LIBS
model = transformers.AutoModelForCausalLM.from_pretrained({base!r}, dtype="bfloat16")
LIBS["PEFT"].PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload().save_pretrained({output!r})
"""


def shapes() -> dict[str, tuple[int, int]]:
    found = {}
    for i in range(LAYERS):
        found[f"model.layers.{i}.mlp.up_proj"] = found[f"model.layers.{i}.mlp.gate_proj"] = (INNER, HIDDEN)
        found[f"model.layers.{i}.mlp.down_proj"] = (HIDDEN, INNER)
    return found


@cache
def made() -> tuple[str, str]:
    """The folders of a base of 2 GB, written shard by shard, and of an adapter of all its matrices."""
    base, adapter = (os.path.join(FOLDER.name, name) for name in ("base", "adapter"))
    rng = np.random.default_rng(0)
    os.makedirs(base), os.makedirs(adapter)
    index: dict[str, str] = {}
    modules = list(shapes().items())
    for n in range(SHARDS):
        held: dict[str, Tensor] = {}
        for path, shape in modules[n::SHARDS]:
            held[f"{path}.weight"] = make_tensor(rng.standard_normal(shape, dtype="f4") * 0.02, "BF16")
        if n == 0:
            held |= rest(rng)
        name = f"model-{n + 1:05}-of-{SHARDS:05}.safetensors"
        write_safetensors(os.path.join(base, name), held, {"format": "pt"})
        index |= dict.fromkeys(held, name)
    factors = {}
    for path, (out, fan_in) in modules:
        for name, shape in (("lora_A", (8, fan_in)), ("lora_B", (out, 8))):
            factors[f"base_model.model.{path}.{name}.weight"] = make_tensor(
                rng.standard_normal(shape, dtype="f4") * 0.02
            )
    write_safetensors(os.path.join(adapter, "adapter_model.safetensors"), factors, {"format": "pt"})
    fields: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16,
                              "target_modules": ["up_proj", "gate_proj", "down_proj"]}  # fmt: skip
    for path, value in ((f"{adapter}/adapter_config.json", fields), (f"{base}/config.json", CONFIG),
                        (f"{base}/model.safetensors.index.json", {"metadata": {}, "weight_map": index})):  # fmt: skip
        with open(path, "w") as f:
            json.dump(value, f)
    return base, adapter


def rest(rng: np.random.Generator) -> dict[str, Tensor]:
    """The tensors that no adapter touches: attention, norms, embeddings."""
    found = {}
    for i in range(LAYERS):
        for name in "qkvo":
            key = f"model.layers.{i}.self_attn.{name}_proj.weight"
            found[key] = make_tensor(np.zeros((HIDDEN, HIDDEN), "f4"), "BF16")
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = make_tensor(np.ones(HIDDEN, "f4"), "BF16")
    for name in ("model.embed_tokens", "lm_head"):
        found[f"{name}.weight"] = make_tensor(rng.standard_normal((1024, HIDDEN), dtype="f4"), "BF16")
    return found | {"model.norm.weight": make_tensor(np.ones(HIDDEN, "f4"), "BF16")}


@dataclass
class Merging:
    """Peak memory above that of a process which has only imported the libraries."""

    what: str
    goal: Goal = field(default_factory=lambda: Goal(faster=10))
    long: bool = True

    def run(self, effort: Effort) -> Row:
        base, adapter = made()
        facts = dict(base=base, adapter=adapter, output=os.path.join(FOLDER.name, "out"))
        floor = peak(IMPORTS)
        values = {"graft": [peak(MERGE.format(**facts)) - floor], "PEFT": [peak(IN_MEMORY.format(**facts)) - floor]}
        if values["graft"][0] > SIZE:
            raise AssertionError(f"{values['graft'][0] / 1e6:.0f} MB, and {SIZE / 1e6:.0f} are allowed")
        return Row(self.what, values, self.goal, unit="B")


@cache
def tuned() -> tuple[str, str]:
    """Two checkpoints of 0.6 GB: a model, and the same after training of all its matrices."""
    rng = np.random.default_rng(0)
    folders = tuple(os.path.join(FOLDER.name, name) for name in ("before", "after"))
    for n, folder in enumerate(folders):
        os.makedirs(folder)
        for shard in range(SHARDS):
            held = {}
            for i in range(shard, SQUARES, SHARDS):
                W = np.full((SIDE, SIDE), 0.02, "f4")
                if n:
                    W += rng.standard_normal((SIDE, 4), dtype="f4") @ rng.standard_normal((4, SIDE), dtype="f4")
                held[f"model.layers.{i}.self_attn.q_proj.weight"] = make_tensor(W, "BF16")
            write_safetensors(os.path.join(folder, f"model-{shard}.safetensors"), held, {"format": "pt"})
    return folders[0], folders[1]


@dataclass
class Extracting:
    """Peak memory above that of a process which has only imported. The floor: one matrix in float32, and its change."""

    what: str
    goal: Goal = field(default_factory=lambda: Goal(over_floor=2.5))
    long: bool = True

    def run(self, effort: Effort) -> Row:
        before, after = tuned()
        code = EXTRACT.format(before=before, after=after, output=os.path.join(FOLDER.name, "extracted"))
        values = {"graft": [peak(code) - peak(EXTRACT_IMPORTS)], "floor": [2.0 * 4 * SIDE**2]}
        return Row(self.what, values, self.goal, unit="B")


# k: twice, as the other checkpoint's matrix is there in bfloat16 and in float32 while the difference is taken; a fifth
# each for the products of the randomized SVD and for the adapter, which is whole at the end
BENCHES = [
    Merging("peak memory, merge into a checkpoint of 2 GB"),
    Extracting("peak memory, extract from checkpoints of 0.6 GB (floor: a matrix and its change)"),
]
BENCHES = BENCHES if sys.platform.startswith("linux") else []
