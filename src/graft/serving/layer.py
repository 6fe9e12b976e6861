# SPDX-License-Identifier: Apache-2.0
"""A linear layer with slots for many LoRA adapters, what fits into them, and the slot of each row of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import local
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.core.containers import moved
from graft.core.errors import AdapterKeyError, ConfigError, RoutingError, some
from graft.core.ops import is_stock
from graft.core.site import Site, Store
from graft.inject.match import Matcher
from graft.inject.parts import Parts
from graft.io.files import Loaded
from graft.io.load import Values
from graft.kernels.eager import eager, has_no_hooks
from graft.kernels.waits import constant
from graft.methods.lora import LoraConfig
from graft.methods.lora.sub_configs import CONVERTED

NONE = 0  # the slot of zeros, for rows without adapter


class Choice(local):
    """The slot of each row of a thread's batch. `AdapterSlots` writes it, every SlotLayer of the model reads it."""

    def __init__(self, device: torch.device | None, fills: list[int]):  # runs in each thread
        self.made_of = device, fills
        self.fills = fills  # how often slots have been filled: one number, of all threads
        self.slot: int | None = NONE  # the slot of all rows; None: see `index`
        self.mixed = False  # slot is None; a bool, since code is compiled again for each value that it reads
        with torch.inference_mode(False):
            self.index = torch.zeros(1, dtype=torch.long, device=device)  # (batch,); compiled code always reads it
        self.rows: tuple[int, ...] = ()  # the slots that `gathered` holds, and the fills until then
        self.gathered: dict[SlotLayer, tuple[Tensor, Tensor] | None] = {}  # None: gathered once, not kept
        self._indices = {1: self.index}  # by batch size; rewritten in place, so that compiled code stays valid

    def __reduce__(self) -> tuple[type[Choice], tuple[Any, ...]]:
        return Choice, self.made_of

    def everywhere(self, slot: int) -> None:
        """Give all rows, however many, the same slot."""
        self.slot, self.mixed = slot, False
        self.index.fill_(slot)

    def each(self, rows: list[int], device: torch.device) -> None:
        """Give each row its slot."""
        n = len(rows)
        if n not in self._indices or self._indices[n].device != device:
            self._indices[n] = torch.zeros(n, dtype=torch.long, device=device)
        self.index = self._indices[n]
        self.index.copy_(constant(tuple(rows), torch.long, device))
        self.slot = rows[0] if len(set(rows)) == 1 else None
        self.mixed = self.slot is None
        if self.mixed and (*rows, *self.fills) != self.rows:
            self.rows = (*rows, *self.fills)
            self.gathered.clear()

    def of(self, batch: int, layer: str) -> Tensor:
        """Return the slot of each row, (batch,)."""
        if batch == self.index.shape[0]:
            return self.index
        if self.mixed:
            raise RoutingError(
                f"layer '{layer}' received {batch} rows in a batch of {self.index.shape[0]} samples: its input is not "
                "one row per sample, so rows cannot be given to adapters here. Leave it out of `targets`, or use one "
                "adapter for all rows."
            )
        return self.index[:1].expand(batch)


class SlotLayer(nn.Module):
    """A base layer with A (r, in) and B (r, out), scaling included, for each slot: y + x Aᵀ B, by row."""

    base_layer: Any
    site: Site
    choice: Choice
    keep: bool  # keep a mix's gathered factors for its next forward
    output_is_new: bool  # the base layer's output may be overwritten
    methods: ClassVar[dict[str, Any]] = {}
    merged_adapters = ()
    A: Tensor  # (slots + 1, max_rank, in)
    B: Tensor  # (slots + 1, max_rank, out): a row of B is contiguous, which makes `bmm` three times as fast

    def __init__(self, site: Site, slots: int, rank: int, choice: Choice, keep: bool, dtype: torch.dtype | None):
        super().__init__()
        self.base_layer = site.module
        self.site, self.choice, self.keep = site, choice, keep
        self.output_is_new = site.op.output_is_new and site.store.exact and is_stock(site.module)
        device, base = site.weight.where()
        like = torch.empty(0, device=device, dtype=dtype) if dtype else moved(torch.empty(0), device, base, True)
        self.register_buffer("A", like.new_zeros(slots + 1, rank, site.in_features), persistent=False)
        self.register_buffer("B", like.new_zeros(slots + 1, rank, site.out_features), persistent=False)
        self.training = site.module.training

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        slot = self.choice.slot if not torch.compiler.is_compiling() else None  # one path for compiled code
        if slot == NONE:
            return y
        if slot is not None:
            return self.add(y, x, self.A[slot], self.B[slot])
        return self.add(y, x, *self.gather(x.shape[0]))

    def gather(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return A (batch, r, in) and B (batch, r, out) of the rows; keep them from a mix's second forward on."""
        index = self.choice.of(batch, self.site.key)
        if torch.compiler.is_compiling() or not self.keep:
            return self.select(index)
        gathered = self.choice.gathered
        pair = gathered.get(self)
        if pair is None:
            with torch.inference_mode(False):  # they outlive an inference mode around this
                pair = self.select(index)
            gathered[self] = pair if self in gathered else None
        return pair

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.A.device)
        return self.A.index_select(0, index), self.B.index_select(0, index)

    def add(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return y + x Aᵀ B, with A and B of one adapter, or of each row."""
        rows = () if A.dim() == 2 else (x.shape[0],)
        x = x.to(A.dtype).reshape(*rows, -1, x.shape[-1])
        h = (A @ x.mT).mT if rows else x @ A.mT  # for few tokens per row, two thirds of the time of x Aᵀ
        if not (self.output_is_new and has_no_hooks(self.base_layer) and (torch.compiler.is_compiling() or eager())):
            return (y + (h @ B).view(y.shape)).to(y.dtype)
        out = y.view(*rows, -1, y.shape[-1])
        if not y.dtype == h.dtype == B.dtype:
            out += h @ B  # rounds once
        elif rows:
            out.baddbmm_(h, B)
        else:
            out.addmm_(h, B)
        return y

    # attributes of a linear layer that models read, and those of an AdapterLayer that fingerprints read

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.site.in_features

    @property
    def out_features(self) -> int:
        return self.site.out_features

    @property
    def store(self) -> Store:
        return self.site.store

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def extra_repr(self) -> str:
        return f"slots={self.A.shape[0] - 1}, max_rank={self.A.shape[1]}"


# what fits into slots


# fields of a LoraConfig that add something to A and B or run them in another way, and the value that leaves them off
PLAIN: dict[str, tuple] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


@dataclass
class SlotFactors:
    """The factors of an adapter on one layer: y + scaling · x Aᵀ B."""

    A: Tensor  # (r, in)
    B: Tensor  # (r, out), transposed from the file
    scaling: float


@dataclass
class Known:
    """An adapter that fits into a slot."""

    factors: dict[str, SlotFactors] | None  # by layer; None: `read` reads them from their files
    read: Callable[[], dict[str, SlotFactors]] | None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes."""
        return sum(t.nbytes for f in (self.factors or {}).values() for t in (f.A, f.B))


def check_config(name: str, config: LoraConfig) -> None:
    """Raise ConfigError unless adapters of this config are plain LoRA for the base as it is."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ConfigError(f"Adapter '{name}' does not fit: slots hold LoRA adapters, and this one's method is {kind}.")
    for option, off in PLAIN.items():
        value = getattr(config, option, off[0])
        if value not in off:
            raise ConfigError(
                f"Adapter '{name}' does not fit: its config says {option}={value!r}, and slots hold nothing but A and "
                "B. Run it from a PeftModel, or merge it into a base of its own."
            )
    how = config.init_lora_weights
    if isinstance(how, str) and how.startswith(CONVERTED):
        raise ConfigError(
            f"Adapter '{name}' does not fit: it belongs to base weights that init_lora_weights={how!r} changed. Save "
            "it as plain LoRA, with path_initial_model_for_weight_conversion."
        )


def fitted(
    name: str,
    config: LoraConfig,
    loaded: Loaded,
    layers: dict[str, SlotLayer],
    max_rank: int,
    base: nn.Module,
    allow_nonfinite: bool = False,
) -> dict[str, SlotFactors]:
    """Return the factors of an adapter by layer path, in memory of their own.

    Raises:
        CheckpointError: a tensor is not a plain one of finite real numbers.
        ConfigError: it is not plain LoRA, or a rank is above `max_rank`.
        AdapterKeyError: it targets other modules, or its tensors are not those that its config describes.
        BaseModelMismatchError: it was made for another architecture.
    """
    check_config(name, config)
    load = Values(base, config, name, loaded, allow_nonfinite=allow_nonfinite)
    found: dict[str, dict[str, Tensor]] = {}
    other = []
    for key, tensor in load.tensors.items():
        path, _, leaf = key.removeprefix("base_model.model.").rpartition(".lora_")
        if path in layers and leaf in ("A.weight", "B.weight"):
            found.setdefault(path, {})[leaf[0]] = tensor
        else:
            other.append(key)
    if other:
        raise AdapterKeyError(
            f"Adapter '{name}' does not fit: no slots for {some(other)}. Name these modules in `targets`, if they are "
            "linear layers."
        )
    matcher = Matcher(config)
    lost = [key for key in layers if key not in found and matcher(key).outcome == "matched"]
    lost += [f"{key}.lora_{x}" for key, pair in found.items() for x in "AB" if x not in pair]
    if lost or not found:
        raise AdapterKeyError(f"Adapter '{name}' does not fit: {loaded.path} lacks {some(lost) or 'any LoRA tensor'}.")
    load.check_base(Parts({key: layers[key] for key in found}, {}))  # type: ignore[misc]
    return {key: _pair(name, key, pair, config.at(key), layers[key], max_rank) for key, pair in found.items()}


def _pair(
    name: str, key: str, pair: dict[str, Tensor], cfg: LoraConfig, layer: SlotLayer, max_rank: int
) -> SlotFactors:
    A, B, r = pair["A"], pair["B"], cfg.r
    if r > max_rank:
        raise ConfigError(f"Adapter '{name}' does not fit: rank {r} on '{key}' is above max_rank={max_rank}.")
    wanted = (r, layer.in_features), (layer.out_features, r)
    if (tuple(A.shape), tuple(B.shape)) != wanted:
        raise AdapterKeyError(
            f"Adapter '{name}' does not fit: on '{key}' A is {tuple(A.shape)} and B {tuple(B.shape)}, which should be "
            f"{wanted[0]} and {wanted[1]} by its config and the base model."
        )
    if not (A.is_floating_point() and B.is_floating_point()):
        raise AdapterKeyError(f"Adapter '{name}' does not fit: on '{key}' A is {A.dtype} and B {B.dtype}, no floats.")
    scaling = cfg.lora_alpha / (math.sqrt(r) if cfg.use_rslora else r)
    return SlotFactors(_own(A), _own(B.T), scaling)


def _own(t: Tensor) -> Tensor:
    """Return a copy in host memory, since state dicts and models may change theirs."""
    return torch.empty(t.shape, dtype=t.dtype).copy_(t)
