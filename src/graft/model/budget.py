# SPDX-License-Identifier: Apache-2.0
"""The memory that training an adapter takes, measured on the meta device: no weight is made, no formula assumed.

What a forward pass keeps for the backward pass is counted where autograd saves it, on the model with one block and with
two; what a block adds, is added for all the others.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from graft.core.errors import ConfigError
from graft.model.api import get_peft_model

CONTEXT = 600e6  # bytes: what a CUDA context and its libraries take
SPARE = 0.03  # share of a GPU's memory that fragments cannot use
OPTIMIZERS = {"adamw": 8, "adamw_8bit": 2, "sgd": 0}  # bytes of state for a number that trains


@dataclass
class Budget:
    """Bytes of each part while an adapter trains.

    Attributes:
        kept: activations that the forward pass keeps.
        logits: the gradient of the logits, in float32, beside what is kept of them.
        block: what one block keeps, which with checkpointing comes back for one block at a time.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    kept: float
    logits: float
    block: float
    context: float = 0.0

    @property
    def fixed(self) -> float:
        """What does not depend on the batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.context

    @property
    def total(self) -> float:
        return self.fixed + self.kept + self.logits

    def as_dict(self) -> dict[str, float]:
        return {**vars(self), "total": self.total}


def budget(
    make: Callable[[int], nn.Module],
    layers: int,
    config: Any,
    batch: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    on_gpu: bool = False,
    bits: int | None = None,
) -> Budget:
    """Return the memory of a training step.

    Args:
        make: number of blocks → the model with so many, on the meta device.
        layers: how many blocks there are.
        config: of the adapter.
        batch, length: rows and tokens of a row.
        dtype: of the base's weights.
        checkpointing: blocks keep their inputs only, and run again in the backward pass.
        bits: 4 or 8: of each weight in a block, with a scale for 64 of them where they have 4; None: as `dtype` says.

    Raises:
        ConfigError: for an optimizer that is not known, or a model without blocks.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer is one of {', '.join(OPTIMIZERS)}, not {optimizer!r}.")
    if layers < 1:
        raise ConfigError("The model's config does not say how many blocks it has.")
    one, two = (measured(make(n), config, batch, length, dtype, on_gpu) for n in (1, 2))
    block = two.kept - one.kept
    kept = one.kept + (layers - 1) * block
    if checkpointing:
        kept = one.kept + layers * batch * length * hidden(make(1)) * dtype.itemsize
    each = two.weights - one.weights
    packed = 1.0 if bits is None else (bits / 8 + 0.0625 * (bits == 4)) / dtype.itemsize  # with a scale for 64 codes
    adapter = one.trained + (layers - 1) * (two.trained - one.trained)
    return Budget(
        weights=one.weights - each + layers * each * packed,
        adapter=4 * adapter,
        gradients=4 * adapter,
        optimizer=OPTIMIZERS[optimizer] * adapter,
        kept=kept,
        logits=one.logits,
        block=block,
        context=CONTEXT if on_gpu else 0.0,
    )


@dataclass
class Measured:
    weights: float  # bytes
    trained: int  # numbers
    kept: float  # bytes that autograd keeps, but for parameters
    logits: float  # bytes of their gradient in float32


def measured(model: Any, config: Any, batch: int, length: int, dtype: torch.dtype, on_gpu: bool) -> Measured:
    """Run the forward pass of a model on the meta device, with an adapter; return what it holds and keeps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model.to(dtype), copy.deepcopy(config)).train()
    counted = Counter(model)
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    with FusedAttention(on_gpu), torch.autograd.graph.saved_tensors_hooks(counted, lambda held: held):
        out = model(**arguments(model, ids))  # which lives on, as in a training step
    logits = getattr(out, "logits", None)
    parameters = {id(p): p for p in model.parameters()}.values()
    return Measured(
        weights=sum(p.nbytes for p in parameters if not p.requires_grad),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        kept=counted.bytes,
        logits=0.0 if logits is None else 4.0 * logits.numel(),
    )


class FusedAttention(TorchFunctionMode):
    """Attention that keeps what torch's fused kernels keep; on the meta device torch takes another form.

    Args:
        with_dropout: those of a GPU have dropout, too.
    """

    def __init__(self, with_dropout: bool):
        super().__init__()
        self.with_dropout = with_dropout

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            if self.with_dropout or not (args[4] if len(args) > 4 else kwargs.get("dropout_p")):
                return _Attention.apply(q, k, v)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def arguments(model: Any, ids: Tensor) -> dict[str, Tensor]:
    base = model.get_base_model()
    if getattr(base.config, "is_encoder_decoder", False):
        return {"input_ids": ids, "labels": ids}
    task = type(base).__name__
    takes_tokens = task.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration"))
    return {"input_ids": ids, "labels": ids} if takes_tokens else {"input_ids": ids}


class Counter:
    """Counts the bytes that autograd keeps: each memory once, and no parameter's."""

    def __init__(self, model: nn.Module):
        self.seen = {key(t) for t in (*model.parameters(), *model.buffers())}
        self.alive: list[Any] = []  # or the next storage might get the number of one that is gone
        self.bytes = 0.0

    def __call__(self, t: Tensor) -> Tensor:
        if key(t) not in self.seen:
            self.seen.add(key(t))
            storage = t.untyped_storage()
            self.alive.append(storage)
            self.bytes += storage.nbytes()
        return t


def key(t: Tensor) -> int:
    return int(StorageWeakRef(t.untyped_storage()).cdata)


def hidden(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def largest_batch(held: Budget, batch: int, memory: float) -> int:
    """Return the largest batch that fits, from what one of `batch` rows takes; 0 if none does."""
    free = memory * (1 - SPARE) - held.fixed
    return max(0, int(free // ((held.kept + held.logits) / batch)))


def coverage(matched: list[str], kinds: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Return, for each kind of block, how many there are and how many of them have an adapter.

    Args:
        matched: paths of the modules with an adapter.
        kinds: path of a block → the name of its class.
    """
    found: dict[str, tuple[int, int]] = {}
    for path, kind in kinds.items():
        has = any(name == path or name.startswith(f"{path}.") for name in matched)
        total, adapted = found.get(kind, (0, 0))
        found[kind] = (total + 1, adapted + has)
    return found


def block_kinds(model: nn.Module) -> dict[str, str]:
    """Return the blocks of a model: the children of lists of more than one module that stand in no other such list."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(path.startswith(f"{p}.") for p in found):
            found |= {f"{path}.{i}": type(child).__name__ for i, child in enumerate(module)}
    return found
