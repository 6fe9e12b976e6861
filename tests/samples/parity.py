# SPDX-License-Identifier: Apache-2.0
"""What the rows of the samples are made of that graft and PEFT are compared on.

`row(name, models, **config)` stands for one `Sample` per model. `target_modules` comes from `TARGETS` unless the row
gives it. `unlike` names the aspects in which PEFT is not the oracle for that row ("forward", "gradients", "merge",
"init", "rng", "reload", "several", "unmerge", "autocast"): tests of graft alone, in test_differences.py or of the
method, take the place of those comparisons. Scalings are never powers of two, so that a lost, doubled or misplaced
scaling shows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

TARGETS = {
    "mlp": ["lin0", "fc1", "fc2"],
    "conv1D": ["c_fc", "c_proj"],
    "embedding": ["emb"],
    "conv1d": ["conv", "point"],
    "conv2d": ["conv", "point", "lin"],
    "conv3d": ["conv"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "opt": ["q_proj", "fc2"],
    "neox": ["query_key_value", "dense_4h_to_h"],
    "gemma3": ["q_proj", "up_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "output.dense"],
    "bert-seq": ["query", "value"],
    "bert-tok": ["query", "value"],
    "bert-qa": ["query", "intermediate.dense"],
    "deberta": ["query_proj", "value_proj"],
}


@dataclass(frozen=True)
class Sample:
    method: str
    name: str
    model: str
    kwargs: dict[str, Any] = field(hash=False)
    unlike: frozenset[str] = frozenset()

    @property
    def spread(self) -> float:
        """Standard deviation of random adapter values: large enough to matter, small enough to be well conditioned."""
        return {"OFT": 0.1, "RANDLORA": 0.15, "TINYLORA": 0.1, "ADAMSS": 0.15, "FROD": 0.15}.get(self.method, 0.3)

    def __str__(self) -> str:
        return f"{self.method}-{self.name}-{self.model}"

    def config(self, lib, **overrides):
        """The configuration as an object of `lib` (graft or peft)."""
        cls = lib.PEFT_TYPE_TO_CONFIG_MAPPING[self.method]
        return cls(**copy.deepcopy({**self.kwargs, **overrides}))


def row(name: str, models: str, unlike: str = "", **config) -> list[tuple]:
    return [
        (name, model, {"target_modules": TARGETS[model], **config}, frozenset(unlike.split()))
        for model in models.split()
    ]


LAYERS = [  # fields that every method with `layers_to_transform` shares
    *row("layer", "llama", layers_to_transform=1),
    *row("layers", "mlp", target_modules=["fc1", "fc2"], layers_to_transform=[0, 2], layers_pattern="layers"),
    *row("layers_pattern", "t5", layers_to_transform=[1], layers_pattern=["block"]),
]
CHOICE = [  # ways to choose modules
    *row("regex", "llama mlp", target_modules=r".*\.(1|lin0)\..*(k_proj|gate_proj|fc2)|lin0"),
    *row("all-linear", "llama bert-seq mlp", target_modules="all-linear"),
    *row("head", "mlp", modules_to_save=["head"]),
    *row("lm_head", "llama", modules_to_save=["lm_head", "embed_tokens"]),
    *row("save_by_ending", "llama", modules_to_save=["head"]),
    *row("norms", "bert-seq", modules_to_save=["LayerNorm", "classifier"]),
    *row("classify", "bert-seq deberta", task_type="SEQ_CLS"),
    *row("inference", "mlp", inference_mode=True),
]
EXCLUDE = [
    *row("exclude", "mlp", exclude_modules=["layers.1.fc1", "lin0"]),
    *row("exclude_regex", "llama", exclude_modules=r".*\.0\..*proj"),
]
SHARED = {name for name, *_ in (*LAYERS, *CHOICE, *EXCLUDE)}  # rows about what is no method's business
DEFAULT_TARGETS = dict(target_modules=None)


def sized(rows: list[tuple], **config) -> list[tuple]:
    """Rows with more fields, for methods whose default sizes are too large for the tiny models."""
    return [(name, model, {**config, **own}, unlike) for name, model, own, unlike in rows]
