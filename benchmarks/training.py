# SPDX-License-Identifier: Apache-2.0
"""A training step, and the bytes that it keeps for backward. The floor: the frozen base with input gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import LIBS, Bench, Effort, Goal, Row, Turns
from benchmarks.models import LINEAR, WIDTH, lora, randomize, smollm

LAYERS, BATCH, TOKENS = 2, 4, 256


def inputs(dtype: torch.dtype, tokens: int = TOKENS) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"inputs_embeds": torch.randn(BATCH, tokens, WIDTH, dtype=dtype).requires_grad_()}


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    for p in (*model.parameters(), *batch.values()):
        p.grad = None
    model(**batch, use_cache=False).last_hidden_state.float().square().mean().backward()


def base(dtype: torch.dtype, layers: int = LAYERS) -> nn.Module:
    return smollm(layers, dtype=dtype).train().requires_grad_(False)


def adapted(lib: Any, dtype: torch.dtype, options: dict[str, Any], layers: int = LAYERS) -> nn.Module:
    return randomize(lib.get_peft_model(base(dtype, layers), lora(lib, **options))).train()


@dataclass
class Kind:
    name: str
    goal_time: Goal
    goal_bytes: Goal
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    long: bool = False

    def turns(self, lib: Any) -> Turns:
        return self._repeat(adapted(lib, self.dtype, self.options))

    def floor(self) -> Turns:
        return self._repeat(base(self.dtype))

    def _repeat(self, model: nn.Module) -> Turns:
        call = partial(step, model, inputs(self.dtype))
        while True:
            yield call

    def benches(self) -> list:
        time = Bench(f"training step, {self.name}", self.turns, self.goal_time, self.floor, long=self.long)
        models = {name: partial(adapted, lib, self.dtype, self.options) for name, lib in LIBS.items()}
        models["floor"] = partial(base, self.dtype)
        return [time, Saved(f"bytes kept, {self.name}", models, self.dtype, self.goal_bytes)]


@dataclass
class Saved:
    what: str
    models: dict[str, Callable[[], nn.Module]]
    dtype: torch.dtype
    goal: Goal
    long: bool = False

    def run(self, effort: Effort) -> Row:
        values = {who: [kept(make(), inputs(self.dtype))] for who, make in self.models.items()}
        return Row(self.what, values, self.goal, unit="B")


class Held:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def parts(t: Tensor) -> tuple[Tensor, ...]:
    """Return the dense tensors that a tensor consists of."""
    return (t._indices(), t._values()) if t.layout == torch.sparse_coo else (t,)


def kept(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Bytes of the tensors that autograd keeps until the backward pass, each memory once, without parameters and
    buffers, and without what a graph kept that was dropped before."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(t: Tensor) -> Held:
        held = Held(t.detach())  # an output would hold its own graph, for ever
        alive.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = model(**batch, use_cache=False).last_hidden_state
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for held in alive for t in parts(held.tensor))}
    del loss
    return float(sum(size for pointer, size in storages.items() if pointer not in own))


def at_most(share: float) -> Goal:
    """Bytes, as a share of PEFT's."""
    return Goal(faster=round(1 / share, 2))


def near(k: float) -> Goal:
    """Time: not above PEFT's, and k times the frozen base's at most."""
    return Goal(1.0, k)


# k: 1, and of the base's time
# - the adapters' six products beside the base's two: 3 r (in + out) / (2 in · out), 1 % of q and v, 7 % of all layers;
#   in float32 beside products in bf16, which are twice as fast, 16 %;
# - 2 % for the inputs that must be kept (1 % for q and v), 1 % for Python;
# - dropout: 3 % to find what is dropped, to copy inputs and to put gradients back, 5 % beside bf16; casts 1 %;
# - DoRA: B A for the norm of each row, 2 %, and twice a pass over the outputs, 3 %; with dropout the products of what
#   is dropped, a twentieth of the base's, at a third of the speed of dense ones: 15 %, and 2 % more passes.
KINDS = [
    Kind("LoRA q,v, float32", near(1.03), at_most(1.0), options={"targets": ("q_proj", "v_proj")}, long=True),
    Kind("LoRA all linear, float32", near(1.1), at_most(1.0)),
    Kind("the same + dropout", near(1.13), at_most(0.60), options={"lora_dropout": 0.05}, long=True),
    Kind("LoRA all linear, bf16 base", near(1.2), at_most(0.62), torch.bfloat16, {"targets": LINEAR}),
    Kind("bf16 base + dropout", near(1.25), at_most(0.42), torch.bfloat16, {"lora_dropout": 0.05}, long=True),
    Kind("DoRA all linear, float32", near(1.15), at_most(0.63), options={"use_dora": True}, long=True),
    Kind("DoRA + dropout", near(1.35), at_most(1.0), options={"use_dora": True, "lora_dropout": 0.05}, long=True),
]
BENCHES = [bench for kind in KINDS for bench in kind.benches()]
