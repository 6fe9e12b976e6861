# SPDX-License-Identifier: Apache-2.0
"""What `graft plan` foretells, against real training steps of real shapes: peak memory of a process, and time."""

from __future__ import annotations

import sys
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
import transformers

import graft
from benchmarks.measure import Effort, Goal, Row
from benchmarks.memory import NO_HOLES, peak
from graft.command.plan import make_training
from graft.files.budget import Training, compute_training_loss, measure_budget

# The shapes of published models, by the fields of their config.json that say them.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("LlamaForCausalLM", dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )),
    "Llama-3.2-1B": ("LlamaForCausalLM", dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    )),
    "Qwen2.5-0.5B": ("Qwen2ForCausalLM", dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    )),
    "GPT-2": ("GPT2LMHeadModel", {}),
    "BERT base": ("BertForMaskedLM", {}),
    "T5 base": ("T5ForConditionalGeneration", dict(
        d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0,
    )),
}  # fmt: skip
READY = "from benchmarks import plans\nimport transformers\n"
STEPS = READY + "plans.train({how!r})"


@dataclass(frozen=True)
class How:
    name: str
    batch: int
    length: int
    dtype: str = "float32"
    checkpointing: bool = False

    def training(self) -> Training:
        name, fields = SHAPES[self.name]
        kind = getattr(transformers, name)
        with torch.device("meta"):
            model = kind(kind.config_class(**fields))
        config = graft.LoraConfig(r=16, target_modules="all-linear", fan_in_fan_out=self.name == "GPT-2")
        return make_training(model, config, self.length, self.dtype, on_gpu=False)


def train(how: tuple[Any, ...]) -> None:
    """Two steps, as the first one has no state of the optimizer yet."""
    plan = How(*how)
    training = plan.training()
    model = training.build_model(training.layers, "cpu", plan.checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.zeros(plan.batch, plan.length, dtype=torch.long)
    for _ in range(2):
        compute_training_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Memory:
    how: How
    goal: Goal = field(default_factory=lambda: Goal(within=0.1))
    long: bool = True

    @property
    def what(self) -> str:
        h = self.how
        again = ", checkpointing" if h.checkpointing else ""
        return f"peak memory that plan foretells, {h.name}, {h.batch} × {h.length}, {h.dtype}{again}"

    def run(self, effort: Effort) -> Row:
        foretold = measure_budget(self.how.training(), self.how.batch, self.how.checkpointing).total
        real = peak(STEPS.format(how=astuple(self.how)), **NO_HOLES) - peak(READY, **NO_HOLES)
        return Row(self.what, {"graft": [foretold], "floor": [real]}, self.goal, unit="B")


BENCHES = [
    Memory(how)
    for how in (
        How("SmolLM2-135M", 4, 256),
        How("Llama-3.2-1B", 1, 128, "bfloat16", True),
        How("Qwen2.5-0.5B", 1, 256, "bfloat16"),
        How("GPT-2", 4, 256),
        How("BERT base", 8, 128),
        How("T5 base", 4, 128),
    )
]
BENCHES = BENCHES if sys.platform.startswith("linux") else []  # elsewhere there is no /proc
