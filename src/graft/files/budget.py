# SPDX-License-Identifier: Apache-2.0
"""The memory that training an adapter needs, measured instead of estimated by a formula.

A training step runs on the meta device, where tensors have no values, and the bytes of all living tensors are counted.
The cost of one block is the difference between models of two and of one block (or period of blocks).
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
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

CONTEXT = 600e6  # bytes of a CUDA context and its libraries
CHUNK = 2**28  # bytes of a packed stack that are dense at once: `BUDGET` of graft.kernels.experts
MANY = 16  # rows; above, the memory of a step is a linear function of the rows
SPARE = 0.03  # share of a GPU's memory that fragments cannot use
ITEM = "aten::_local_scalar_dense"  # the operator of .item() and bool(tensor)
FORMATS: dict[int | str, float] = {  # format → bits per weight, scales included
    4: 4.5, 8: 8.0, "nf4": 4.5, "nf4-nested": 4.127, "mxfp4": 4.25, "nvfp4": 4.5, "fp8": 8 + 32 / 128**2,
}  # fmt: skip
ONLY_STACKS = ("mxfp4",)  # formats of experts only; other weights keep their dtype
GROUPED = "aten::_grouped_mm"
OPTIMIZERS = {"adamw": 8, "adamw_8bit": 2, "sgd": 0}  # optimizer → bytes of state per trainable number


@dataclass
class Budget:
    """Bytes of each part at the fullest moment of a training step.

    Attributes:
        weights: the frozen base, with buffers.
        adapter: the trainable parameters.
        optimizer: the optimizer's state.
        kept: activations that the forward pass saves for the backward pass.
        gradients: of the trainable parameters.
        working: other temporary tensors, such as the logits' gradient, blocks that run again, and unpacked weights.
        context: of CUDA and its libraries.
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
        """The sum of all parts."""
        total: float = sum(vars(self).values())
        return total


@dataclass
class Training:
    """A training setup: an adapter on a model given by its config alone.

    Attributes:
        make: number of blocks → a new base model with that many, on the current default device.
        layers: the number of blocks of the whole model.
        config: of the adapter.
        length: tokens of a row.
        dtype: of the base's weights.
        on_gpu: use the attention kernels of a GPU, and count a CUDA context.
        period: the number of blocks after which the kinds of blocks repeat.
    """

    make: Callable[[int], nn.Module]
    layers: int
    config: PeftConfig
    length: int
    dtype: torch.dtype = torch.bfloat16
    on_gpu: bool = False
    period: int = 1

    def build_model(self, blocks: int, device: str = "meta", checkpointing: bool = False) -> PeftModel:
        """Build a base of `blocks` blocks on `device` in `dtype`, inject the adapter, and return the PeftModel in
        training mode.

        The cache is switched off. With `checkpointing`, gradient checkpointing is on, and input embeddings require
        gradients; on meta the blocks run again with `FusedAttention`. Warnings are silenced. The config is copied.
        """
        with warnings.catch_warnings(), torch.device(device):
            warnings.simplefilter("ignore")
            base: nn.Module = self.make(blocks)
            base.config.use_cache = False
            model = get_peft_model(base.to(self.dtype), copy.deepcopy(self.config))
            if checkpointing:  # the first name is transformers 5's, the second 4's
                enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
                again = (nullcontext(), FusedAttention(self.on_gpu) if device == "meta" else nullcontext())
                enable({"use_reentrant": False, "context_fn": lambda: again})
                model.enable_input_require_grads()
        return model.train()

    @cached_property
    def whole_model(self) -> PeftModel:
        """The PeftModel with all blocks on the meta device, built once."""
        return self.build_model(self.layers)

    def extrapolate(self, measure: Callable[[int], float]) -> float:
        """Return `measure` for all blocks, extrapolated linearly from one and two periods of blocks.

        With at most two periods `measure` is called for all blocks.
        """
        if self.layers <= 2 * self.period:
            return measure(self.layers)
        one, two = measure(self.period), measure(2 * self.period)
        return one + (self.layers / self.period - 1) * (two - one)

    def measure_step(self, batch: int, checkpointing: bool) -> StepMemory:
        """Return the memory of a training step with `batch` rows, measured on the meta device.

        For more than 16 rows it is extrapolated linearly from 8 and 16. The number of blocks is extrapolated, too.
        """
        if batch > MANY:
            a, b = self.measure_step(MANY // 2, checkpointing), self.measure_step(MANY, checkpointing)
            more = (batch - MANY) / (MANY - MANY // 2)
            return StepMemory(b.activations + more * (b.activations - a.activations), b.peak + more * (b.peak - a.peak))
        of = cache(
            lambda n: measure_training_step(self.build_model(n, "meta", checkpointing), batch, self.length, self.on_gpu)
        )
        return StepMemory(self.extrapolate(lambda n: of(n).activations), self.extrapolate(lambda n: of(n).peak))


@dataclass
class StepMemory:
    """The memory of a training step, without the model's parameters and buffers."""

    activations: float  # bytes that live from the forward to the backward pass
    peak: float  # bytes of the fullest moment, including the gradients


def measure_budget(
    training: Training, batch: int, checkpointing: bool = False, optimizer: str = "adamw", bits: int | str | None = None
) -> Budget:
    """Return the memory of a training step, part by part. Builds the models on the meta device and runs steps there.

    The context is 600 MB on a GPU, else 0. Gradients are at most the adapter's bytes; the rest of the peak is
    `working`.

    Args:
        batch: rows.
        checkpointing: blocks save their inputs only, and run again in the backward pass.
        optimizer: "adamw" (8 bytes of state per trainable number), "adamw_8bit" (2) or "sgd" (0).
        bits: the format of each weight matrix in a block, a key of FORMATS; 4 is "nf4". "mxfp4" packs stacks of experts
            only. None: the weights have the dtype of `training`. A step unpacks one matrix at a time, of a stack a
            chunk.

    Raises:
        ConfigError: the optimizer or the format is unknown, the model has no blocks, takes no token ids, or cannot run
            on the meta device.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"The optimizer {optimizer!r} is unknown. Choose one of {', '.join(OPTIMIZERS)}.")
    if bits is not None and bits not in FORMATS:
        raise ConfigError(f"bits={bits!r} is unknown. Choose one of {', '.join(map(str, FORMATS))}.")
    if training.layers < 1:
        raise ConfigError("The model's config does not say how many blocks it has. Set num_hidden_layers in it.")
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
    """Return the bytes of a model's frozen parameters and buffers, each counted once, and the bytes of the largest
    weight that a step unpacks.

    With a format in `bits`, frozen parameters of two or more dimensions in blocks count in that format; for "mxfp4"
    only those of three or more, stacks of experts. With None nothing is unpacked: the second number is 0, as without
    such parameters.
    """
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
    """Return the bytes of a packed weight that are dense at the same time: all of a matrix; of a stack a chunk of 2²⁸
    bytes, but at least one expert and at most all.
    """
    return min(p.nbytes, max(CHUNK, p.nbytes // len(p))) if p.ndim == 3 else p.nbytes


def measure_training_step(model: PeftModel, batch: int, length: int, on_gpu: bool) -> StepMemory:
    """Run one forward and backward pass and return the bytes of activations after the forward pass and of the fullest
    moment. The tokens are zeros on the meta device.

    `on_gpu` decides whether attention counts as fused. Raises ConfigError, with the remedy to install transformers 5,
    if the model raises RuntimeError there.
    """
    live = LiveMemory(model)
    try:
        with FusedAttention(on_gpu), live:
            loss = compute_training_loss(model, torch.zeros(batch, length, dtype=torch.long, device="meta"))
            activations = live.bytes
            torch.autograd.backward(loss)  # `loss.backward` would leave the modes, and checkpointed blocks run again
    except RuntimeError as e:
        name = type(model.get_base_model()).__name__
        raise ConfigError(
            f"{name} cannot run on tensors without values, as a plan needs: {e} Models of transformers 4 need autocast "
            "there. Install transformers 5."
        ) from None
    return StepMemory(activations, live.peak)


class LiveMemory(TorchDispatchMode):
    """A dispatch mode that counts the bytes of all living tensors, except for the model's parameters and buffers.

    On meta tensors `.item()` returns True, and grouped matrix products run in bfloat16 and are cast back.

    Attributes:
        bytes: of the tensors that live now.
        peak: the most that `bytes` has been.
    """

    def __init__(self, model: nn.Module):
        """Note the storages of the model's parameters and buffers, which are not counted.

        `bytes` and `peak` begin at 0.
        """
        TorchDispatchMode.__init__(self)
        self.own = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.known = set(map(storage_id, self.own))
        self.watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.bytes = self.peak = 0.0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        """Run an operator, count the storages of its output tensors by `add`, and return its output.

        On meta tensors two operators differ: `.item()` returns True without running, and grouped matrix products run in
        bfloat16 and are cast back to the first argument's dtype.
        """
        if func.name() == ITEM and args[0].is_meta:
            return True  # models ask "is nothing padded?", "is nothing packed?"
        if func.name() == GROUPED and args[0].is_meta:  # its meta kernel only accepts bfloat16
            out = func(*(a.to(torch.bfloat16) for a in args[:2]), *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.add(t.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Add a storage to `known` and its size to `bytes`, and raise `peak` if needed.

        A storage in `known` already, such as the model's, does nothing.

        When the storage is freed, a weak reference in `watches` subtracts it and removes both entries.
        """
        one = storage_id(storage)
        if one in self.known:
            return
        self.known.add(one)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def forget(_: object) -> None:
            """Subtract a freed storage from `bytes`, and forget its number and its weak reference; `peak` stays."""
            self.bytes -= size
            self.known.discard(one)
            del self.watches[one]

        self.watches[one] = weakref.ref(storage, forget)


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return a number that no other living storage has."""
    return int(StorageWeakRef(storage).cdata)


class FusedAttention(TorchFunctionMode):
    """A function mode that replaces scaled dot product attention by one that saves the tensors which torch's fused
    kernels save.

    It is needed on the meta device, where torch uses an unfused form. Attention with dropout on a CPU, and with fewer
    key heads where the CPU's kernel has none, stays torch's.

    Args:
        on_gpu: model the kernels of a GPU, which have dropout and shared key heads.
    """

    def __init__(self, on_gpu: bool):
        """Set `on_gpu`, and `shares_keys`: True for a GPU, else whether the CPU's fused kernel accepts fewer
        key heads.
        """
        super().__init__()
        self.on_gpu, self.shares_keys = on_gpu, on_gpu or can_cpu_share_keys()

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        """Run a function; replace scaled dot product attention by `_FusedKernel` if the device's fused kernel takes
        these arguments, with q, k and v alone.

        It takes them with dropout only on a GPU, and with fewer heads in k than in q only if `shares_keys`. All other
        calls run unchanged.
        """
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            drops = args[4] if len(args) > 4 else kwargs.get("dropout_p")
            if (self.on_gpu or not drops) and (self.shares_keys or q.shape[-3] == k.shape[-3]):
                return _FusedKernel.apply(q, k, v)
        return func(*args, **kwargs)


@cache
def can_cpu_share_keys() -> bool:
    """Return True if torch's fused attention on the CPU accepts fewer key heads than query heads.

    A small call with gradients tells it, by the class of its `grad_fn`. Tried once, then cached.
    """
    q, k = (torch.ones(1, heads, 2, 8, device="cpu", requires_grad=True) for heads in (2, 1))
    with torch.enable_grad():
        y = nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    return "ScaledDotProduct" in type(y.grad_fn).__name__


class _FusedKernel(torch.autograd.Function):
    """Attention without values: the shapes of the output and of the saved tensors are those of a fused kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return an empty output (…, length, value size).

        Save q, k, v, the output and a float32 tensor (…, length) for the backward pass.
        """
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        """Return empty gradients of q, k and v, whatever `g` is."""
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def compute_training_loss(model: PeftModel, ids: Tensor) -> Tensor:
    """Run the model on token ids, with a mask of ones.

    Return its loss, with the ids as labels, for language models and encoder-decoders, which the class's name tells; for
    other models the mean of the first output in float32.

    If any config has a field `n_tasks` or `num_tasks`, all rows get task 0. The first config with `max_timestep`
    (T-LoRA) gives the timestep, its largest. Raises ConfigError for a model with another main input than `input_ids`.
    """
    base: nn.Module = model.get_base_model()
    task, main_input = type(base).__name__, getattr(base, "main_input_name", "input_ids")
    if main_input != "input_ids":
        raise ConfigError(f"{task} takes {main_input}, and a plan measures models of token ids. Give a text model.")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if any(hasattr(config, name) for config in model.peft_config.values() for name in ("n_tasks", "num_tasks")):
        inputs["task_ids"] = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    most = next((config.max_timestep for config in model.peft_config.values() if hasattr(config, "max_timestep")), None)
    with nullcontext() if most is None else model.timestep(most):  # T-LoRA
        takes_tokens = task.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration"))
        if takes_tokens or getattr(base.config, "is_encoder_decoder", False):
            return model(**inputs, labels=ids).loss
        return model(**inputs)[0].float().mean()


def count_adapted_blocks(matched: list[str], kinds: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Return kind of block → (number of blocks, number of blocks with an adapter in them or on them).

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
    """Return path → class name for the blocks of a model: the children of ModuleLists with more than one child that are
    not inside another block. {} without such lists.
    """
    classes: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(path.startswith(f"{p}.") for p in classes):
            classes |= {f"{path}.{i}": type(child).__name__ for i, child in enumerate(module)}
    return classes
