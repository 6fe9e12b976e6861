# SPDX-License-Identifier: Apache-2.0
"""The memory that training an adapter takes, measured: no formula is assumed.

A training step runs on the meta device, where tensors have no values, and all that lives in it is counted. What a block
takes is the difference between the model with one block and with two.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graft import ConfigError, PeftConfig, PeftModel, get_peft_model
from graft.kernels.eager import Context
from graft.kernels.experts import BUDGET as CHUNK

CONTEXT = 600e6  # bytes: what a CUDA context and its libraries take
MANY = 16  # rows, from which on what a step takes is a line
SPARE = 0.03  # share of a GPU's memory that fragments cannot use
ITEM = "aten::_local_scalar_dense"  # what asks a tensor for a number, or for True or False
FORMATS: dict[int | str, float] = {  # bits of a number of a packed base, with its share of scales
    4: 4.5, 8: 8.0, "nf4": 4.5, "nf4-nested": 4.127, "mxfp4": 4.25, "nvfp4": 4.5, "fp8": 8 + 32 / 128**2,
}  # fmt: skip
ONLY_STACKS = ("mxfp4",)  # formats of experts, beside which a model stays as its dtype says
GROUPED = "aten::_grouped_mm"
OPTIMIZERS = {"adamw": 8, "adamw_8bit": 2, "sgd": 0}  # bytes of state for a number that trains


@dataclass
class Budget:
    """Bytes of each part at the moment of a training step at which memory is fullest.

    Attributes:
        kept: activations that the forward pass leaves for the backward pass.
        gradients: of what trains.
        working: what else lives for a moment, as the logits' gradient, or a block that runs again for checkpointing.
    """

    weights: float
    adapter: float
    optimizer: float
    kept: float
    gradients: float
    working: float
    context: float = 0.0

    @property
    def total(self) -> float:
        total: float = sum(vars(self).values())
        return total

    def as_dict(self) -> dict[str, float]:
        return {**vars(self), "total": self.total}


@dataclass
class Training:
    """What trains, and how: an adapter on a model of which only the config is at hand.

    Attributes:
        make: number of blocks → the model with so many, on the default device.
        layers: how many blocks there are.
        config: of the adapter.
        length: tokens of a row.
        dtype: of the base's weights.
        on_gpu: attention is a GPU's, and there is a context.
        period: after how many blocks the same kinds of blocks come again.
    """

    make: Callable[[int], nn.Module]
    layers: int
    config: PeftConfig
    length: int
    dtype: torch.dtype = torch.bfloat16
    on_gpu: bool = False
    period: int = 1

    def build_model(self, blocks: int, device: str = "meta", checkpointing: bool = False) -> PeftModel:
        """Return the model with so many blocks and an adapter, ready to train."""
        with warnings.catch_warnings(), torch.device(device), use_default_dtype(self.dtype):
            warnings.simplefilter("ignore")
            base: nn.Module = self.make(blocks)
            base.config.use_cache = False
            model = get_peft_model(base.to(self.dtype), copy.deepcopy(self.config))
            if checkpointing:  # transformers 5 has the first name, 4 the second
                enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
                again = (nullcontext(), FusedAttention(self.on_gpu) if device == "meta" else nullcontext())
                enable({"use_reentrant": False, "context_fn": lambda: again})
                model.enable_input_require_grads()
        return model.train()

    @cached_property
    def whole_model(self) -> PeftModel:
        return self.build_model(self.layers)

    def extrapolate(self, measure: Callable[[int], float]) -> float:
        """Return what `measure` would give for all blocks, from what it gives for one period of them and for two."""
        if self.layers <= 2 * self.period:
            return measure(self.layers)
        one, two = measure(self.period), measure(2 * self.period)
        return one + (self.layers / self.period - 1) * (two - one)

    def measure_step(self, batch: int, checkpointing: bool) -> StepMemory:
        """Return what a step of so many rows takes, blocks running again in the backward pass or not.

        Kernels go through rows a few at a time, so that it would take long to run a step of very many.
        """
        if batch > MANY:
            a, b = self.measure_step(MANY // 2, checkpointing), self.measure_step(MANY, checkpointing)
            more = (batch - MANY) / (MANY - MANY // 2)
            return StepMemory(b.activations + more * (b.activations - a.activations), b.peak + more * (b.peak - a.peak))
        of = cache(
            lambda n: measure_training_step(self.build_model(n, "meta", checkpointing), batch, self.length, self.on_gpu)
        )
        return StepMemory(self.extrapolate(lambda n: of(n).activations), self.extrapolate(lambda n: of(n).peak))


@contextmanager
def use_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have models made in a dtype at once, where one made in float32 would take twice the memory for a moment."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class StepMemory:
    activations: float  # bytes that live from the forward to the backward pass, without parameters and buffers
    peak: float  # bytes of the fullest moment, gradients of parameters with them


def measure_budget(
    training: Training,
    batch: int,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    bits: int | str | None = None,
) -> Budget:
    """Return the memory of a training step.

    Args:
        batch: rows.
        checkpointing: blocks keep their inputs only, and run again in the backward pass.
        bits: the format of each matrix in a block, a key of FORMATS: 4 (the same as "nf4"), 8, or the name of one;
            "mxfp4" of stacks of experts alone. None: as the dtype says. Of a stack a step unpacks a chunk at a time.

    Raises:
        ConfigError: for an optimizer or a format that is not known, a model without blocks, one that does not take
            token ids, or that cannot run on tensors without values.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer is one of {', '.join(OPTIMIZERS)}, not {optimizer!r}.")
    if bits is not None and bits not in FORMATS:
        raise ConfigError(f"bits is one of {', '.join(map(str, FORMATS))}, not {bits!r}.")
    if training.layers < 1:
        raise ConfigError("The model's config does not say how many blocks it has.")
    step = training.measure_step(batch, checkpointing)
    trained = [p for p in training.whole_model.parameters() if p.requires_grad]
    adapter = float(sum(p.nbytes for p in trained))
    weights, dense = count_base_bytes(training.whole_model, bits)
    gradients = min(adapter, step.peak - step.activations)
    return Budget(
        weights=weights,
        adapter=adapter,
        optimizer=OPTIMIZERS[optimizer] * sum(p.numel() for p in trained),
        kept=step.activations,
        gradients=gradients,
        working=step.peak - step.activations - gradients + dense,
        context=CONTEXT if training.on_gpu else 0.0,
    )


def count_base_bytes(model: nn.Module, bits: int | str | None) -> tuple[float, float]:
    """Return the bytes of what does not train, buffers with it, and of the most that a step unpacks at a time."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad}
    whole = float(sum(t.nbytes for t in tensors.values()))
    if bits is None:
        return whole, 0.0
    blocks = [model.get_submodule(path) for path in find_block_classes(model)]
    least = 3 if bits in ONLY_STACKS else 2
    packed = {id(p): p for block in blocks for p in block.parameters() if p.ndim >= least and id(p) in tensors}.values()
    saved = sum(p.numel() * FORMATS[bits] / 8 - p.nbytes for p in packed)
    return whole + saved, float(max((count_unpacked_bytes(p) for p in packed), default=0))


def count_unpacked_bytes(p: Tensor) -> int:
    """Return the bytes of a packed weight that are dense at once: of a stack a chunk of its matrices."""
    return min(p.nbytes, max(CHUNK, p.nbytes // len(p))) if p.ndim == 3 else p.nbytes


def measure_training_step(model: PeftModel, batch: int, length: int, on_gpu: bool) -> StepMemory:
    """Run a training step on the meta device, and count the memory that lives in it."""
    live = LiveMemory(model)
    try:
        with FusedAttention(on_gpu), live:
            loss = compute_training_loss(model, torch.zeros(batch, length, dtype=torch.long, device="meta"))
            activations = live.bytes
            torch.autograd.backward(loss)  # unlike `loss.backward`, within both modes: blocks may run again
    except RuntimeError as e:
        name = type(model.get_base_model()).__name__
        raise ConfigError(
            f"{name} cannot run on tensors without values, as a plan needs: {e} Models of transformers 4 ask for "
            "autocast there: install transformers 5."
        ) from None
    return StepMemory(activations, live.peak)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that live, but for those of a model.

    Attributes:
        bytes, peak: now, and at the fullest moment.
    """

    def __init__(self, model: nn.Module):
        TorchDispatchMode.__init__(self)
        self.own = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.known = set(map(storage_id, self.own))
        self.watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.bytes = self.peak = 0.0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        if func.name() == ITEM and args[0].is_meta:
            return True  # what models ask: is nothing padded, is nothing packed?
        if func.name() == GROUPED and args[0].is_meta:  # which only knows bfloat16 there
            out = func(*(a.to(torch.bfloat16) for a in args[:2]), *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.add(t.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        one = storage_id(storage)
        if one in self.known:
            return
        self.known.add(one)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def forget(_: object) -> None:
            self.bytes -= size
            self.known.discard(one)
            del self.watches[one]

        self.watches[one] = weakref.ref(storage, forget)


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return what tells a memory from others while it lives."""
    return int(StorageWeakRef(storage).cdata)


class FusedAttention(TorchFunctionMode):
    """Attention that keeps what torch's fused kernels keep; on the meta device torch takes another form.

    Args:
        on_gpu: those of a GPU have dropout, too, and heads that share keys, as those of a CPU have under a newer torch.
    """

    def __init__(self, on_gpu: bool):
        super().__init__()
        self.on_gpu, self.shares_keys = on_gpu, on_gpu or can_cpu_share_keys()

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            drops = args[4] if len(args) > 4 else kwargs.get("dropout_p")
            if (self.on_gpu or not drops) and (self.shares_keys or q.shape[-3] == k.shape[-3]):
                return _FusedKernel.apply(q, k, v)
        return func(*args, **kwargs)


@cache
def can_cpu_share_keys() -> bool:
    """Return True if torch's fused attention of a CPU takes fewer heads of keys than of queries."""
    q, k = (torch.ones(1, heads, 2, 8, device="cpu", requires_grad=True) for heads in (2, 1))
    with torch.enable_grad():
        y = nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    return "ScaledDotProduct" in type(y.grad_fn).__name__


class _FusedKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def compute_training_loss(model: PeftModel, ids: Tensor) -> Tensor:
    """Return what a Trainer would go back from; of a model without a loss, the mean of its outputs."""
    base: nn.Module = model.get_base_model()
    task, main_input = type(base).__name__, getattr(base, "main_input_name", "input_ids")
    if main_input != "input_ids":
        raise ConfigError(f"{task} takes {main_input}: what a step takes is measured for models of token ids only.")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if any(hasattr(config, name) for config in model.peft_config.values() for name in ("n_tasks", "num_tasks")):
        inputs["task_ids"] = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    most = next((config.max_timestep for config in model.peft_config.values() if hasattr(config, "max_timestep")), None)
    with nullcontext() if most is None else model.timestep(most):  # T-LoRA's
        return compute_loss_of_inputs(model, base, inputs, task)


def compute_loss_of_inputs(model: PeftModel, base: nn.Module, inputs: dict[str, Tensor], task: str) -> Tensor:
    """Return the model's loss for token ids as their own labels; of a model without a loss, the mean of its outputs."""
    takes_tokens = task.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration"))
    if takes_tokens or getattr(base.config, "is_encoder_decoder", False):
        loss: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
        return loss
    return model(**inputs)[0].float().mean()


def count_adapted_blocks(matched: list[str], kinds: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Return, for each kind of block, how many there are and how many of them have an adapter.

    Args:
        matched: paths of the modules with an adapter.
        kinds: path of a block → the name of its class.
    """
    counts: dict[str, tuple[int, int]] = {}
    for path, kind in kinds.items():
        is_adapted = any(name == path or name.startswith(f"{path}.") for name in matched)
        total, adapted = counts.get(kind, (0, 0))
        counts[kind] = (total + 1, adapted + is_adapted)
    return counts


def find_block_classes(model: nn.Module) -> dict[str, str]:
    """Return the blocks of a model: the children of lists of more than one module that stand in no other such list."""
    classes: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(path.startswith(f"{p}.") for p in classes):
            classes |= {f"{path}.{i}": type(child).__name__ for i, child in enumerate(module)}
    return classes
