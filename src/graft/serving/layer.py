# SPDX-License-Identifier: Apache-2.0
"""A linear layer with slots for many adapters, and the choice of a slot for each row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from threading import local
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft import AdapterLayer, RoutingError
from graft.core.rows import make_index

HALF = (torch.float16, torch.bfloat16)
NONE = 0  # the slot of zeros, for rows without adapter
VECTORS = {"gain": 1.0, "shift": 0.0, "inner": 1.0}  # with the values that leave the layer's output as it is


class SlotChoice(local):
    """The slot of each row of a thread's batch; each thread has its own values.

    `AdapterSlots` writes it, every SlotLayer of the model reads it.

    Attributes:
        slot: of all rows; None if rows differ, see `index`.
        mixed: `slot` is None. A bool, since code is compiled again for each value that it reads.
        index: (batch,); compiled code always reads it.
        used: the slots of a mix.
        rows: the slots that `gathered` holds, with the number of fills until then.
        gathered: factors by layer; None: gathered once, and not kept.
        fills: number of times that slots were written, shared by all threads.
    """

    def __init__(self, device: torch.device | None, fills: list[int]):  # runs in each thread
        """Begin with slot 0, no adapter, for all rows. It runs again in each thread that uses the object."""
        self.made_of = device, fills
        self.fills = fills  # how often slots have been filled: one number, of all threads
        self.slot: int | None = NONE  # the slot of all rows; None: see `index`
        self.mixed = False  # slot is None; a bool, since code is compiled again for each value that it reads
        with torch.inference_mode(False):
            self.index = torch.zeros(1, dtype=torch.long, device=device)  # (batch,); compiled code always reads it
        self.used: frozenset[int] = frozenset()  # the slots of a mix
        self.rows: tuple[int, ...] = ()  # the slots that `gathered` holds, and the fills until then
        self.gathered: dict[SlotLayer, tuple[Tensor, ...] | None] = {}  # None: gathered once, not kept
        self._indices = {1: self.index}  # by batch size; rewritten in place, so that compiled code stays valid

    def __reduce__(self) -> tuple[type[SlotChoice], tuple[object, ...]]:
        """Return how copies and pickles make this object: anew, without a choice."""
        return SlotChoice, self.made_of

    def set_all_rows(self, slot: int) -> None:
        """Choose one slot for all rows of any batch size: `mixed` is False, and the present index is overwritten in
        place.
        """
        self.slot, self.mixed = slot, False
        self.index.fill_(slot)

    def set_rows(self, rows: list[int], device: torch.device) -> None:
        """Choose a slot for each row.

        The index of this batch size is overwritten in place, so that compiled code stays valid; it is made for a new
        size or device. If all slots are equal, `slot` is that one, and `mixed` is False; else `slot` is None. `used`
        has the slots.

        Kept factors are dropped if the slots are mixed and differ from the last mix, or slots were written since.
        """
        n = len(rows)
        if n not in self._indices or self._indices[n].device != device:
            self._indices[n] = torch.zeros(n, dtype=torch.long, device=device)
        self.index = self._indices[n]
        self.index.copy_(make_index(rows, device))
        self.slot = rows[0] if len(set(rows)) == 1 else None
        self.mixed = self.slot is None
        self.used = frozenset(rows)
        if self.mixed and (*rows, *self.fills) != self.rows:
            self.rows = (*rows, *self.fills)
            self.gathered.clear()

    def get_index(self, batch: int, layer: str) -> Tensor:
        """Return the slot of each row, (batch,).

        For a batch of another size than the index, without a mix, it is the index's first entry, expanded.

        Raises:
            RoutingError: a mix has another number of rows, so that the layer's input is not one row per sample.
        """
        if batch == self.index.shape[0]:
            return self.index
        if self.mixed:
            raise RoutingError(
                f"layer '{layer}' received {batch} rows in a batch of {self.index.shape[0]} samples: its input is not "
                "one row per sample. Leave it out of `targets`, or use one adapter for all rows."
            )
        return self.index[:1].expand(batch)


class SlotLayer(nn.Module):
    """A base layer with A (r, in) and B (r, out), scaling included, for each slot: y + x Aᵀ B, by row.

    Slots of one rank are a group with separate buffers. With gains, each slot has three vectors as well, of inputs and
    outputs: gain ⊙ (W (inner ⊙ x) + b + x Aᵀ B) + shift.
    """

    base_layer: nn.Module
    site: Any
    choice: SlotChoice
    keep: bool  # keep a mix's gathered factors for its next forward
    output_is_new: bool  # the base layer's output may be overwritten
    methods: ClassVar[dict[str, object]] = {}
    state: ClassVar[Any] = type("State", (), {"merged": ()})  # nothing is merged
    may_fuse: Any = AdapterLayer.may_fuse  # a property
    why_not_adapted = "It has slots of AdapterSlots, whose remove() takes them off"
    A: Tensor  # (slots + 1, rank, in) of the first group; A1, A2, …: of the others; place 0 of each holds zeros
    B: Tensor  # (slots + 1, rank, out): a row of B is contiguous, which makes `bmm` three times as fast
    places: Tensor  # (groups, all slots + 1): the place of each slot in a group, 0 in groups that have it not
    gain: Tensor  # (all slots + 1, out), with gains
    shift: Tensor  # (all slots + 1, out), with gains
    inner: Tensor  # (all slots + 1, in), with gains

    def __init__(
        self,
        site: Any,
        sizes: dict[int, int],
        choice: SlotChoice,
        keep: bool,
        dtype: torch.dtype | None,
        gains: bool = False,
    ):
        """Allocate buffers of zeros for A and B, and with gains ones for gain and inner, on the layer's device.

        They are not saved.

        Args:
            sizes: rank → slots, numbered in this order from 1 on.
            keep: keep a mix's gathered factors for its next forward.
            dtype: None: float32 for a half-precision base, else the base's.
        """
        super().__init__()
        self.base_layer = site.module
        self.site, self.choice, self.keep, self.has_gains = site, choice, keep, gains
        self.output_is_new, self.store = site.output_is_new, site.store
        self.in_features, self.out_features = site.in_features, site.out_features
        device, base = site.weight.where()
        like = torch.empty(0, device=device, dtype=dtype or (torch.float32 if base in HALF else base))
        self.names = [(f"A{i or ''}", f"B{i or ''}") for i in range(len(sizes))]
        self.place = [(0, 0)]  # group and place in it, by slot
        for i, ((a, b), (rank, n)) in enumerate(zip(self.names, sizes.items())):
            self.register_buffer(a, like.new_zeros(n + 1, rank, site.in_features), persistent=False)
            self.register_buffer(b, like.new_zeros(n + 1, rank, site.out_features), persistent=False)
            self.place += [(i, j + 1) for j in range(n)]
        places = torch.zeros(len(sizes), len(self.place), dtype=torch.long)
        for slot, (i, j) in enumerate(self.place):
            places[i, slot] = j
        self.register_buffer("places", places.to(device), persistent=False)
        for name, neutral in VECTORS.items() if gains else ():
            width = site.in_features if name == "inner" else site.out_features
            self.register_buffer(name, like.new_full((len(self.place), width), neutral), persistent=False)
        self.gained: set[int] = set()  # slots with vectors other than ones and zeros

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """Gain, shift and inner of all slots; none without gains."""
        return (self.gain, self.shift, self.inner) if self.has_gains else ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the slots: A and B of each rank in turn, then `vectors`."""
        return (*[getattr(self, name) for pair in self.names for name in pair], *self.vectors)

    def get_factors(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return views of A (r, in) and B (r, out) of a slot."""
        group, place = self.place[slot]
        a, b = self.names[group]
        return getattr(self, a)[place], getattr(self, b)[place]

    def forward(self, x: Tensor, *args: object, **kwargs: Any) -> Tensor:
        """Return the layer's output with the adapter of the choice, or of each row.

        If the choice is slot 0 for all rows, only the base layer runs.

        With one slot for all rows, its factors are used without a copy; else factors are gathered for each row.
        Compiled code always gathers, and applies gains if the layer has vectors. Other code applies gains only if a
        slot in use has any; otherwise the products B A x are added to the base's output. Further arguments go to the
        base layer.
        """
        compiling = torch.compiler.is_compiling()
        slot = None if compiling else self.choice.slot  # one path for compiled code
        if slot == NONE:
            return self.base_layer(x, *args, **kwargs)
        if slot is None:
            tensors = self.gather_rows(x.shape[0])
        else:
            tensors = (*self.get_factors(slot), *[t[slot] for t in self.vectors])
        n = len(tensors) - len(self.vectors)
        pairs, vectors = [(tensors[i], tensors[i + 1]) for i in range(0, n, 2)], tensors[n:]
        if vectors and (compiling or (self.gained if slot is None else slot in self.gained)):
            return self.apply_gains(x, pairs, vectors, *args, **kwargs)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for A, B in pairs:
            y = self.add_product(y, x, A, B)
        return y

    def gather_rows(self, batch: int) -> tuple[Tensor, ...]:
        """Return for each row A (batch, r, in) and B (batch, r, out) of the groups in use, then vectors (batch, …).

        From a mix's second forward on they are kept, if `keep` is set and no code is compiled. Raises RoutingError as
        `get_index`.
        """
        index = self.choice.get_index(batch, self.site.key)
        if torch.compiler.is_compiling() or not self.keep:
            return self.select_rows(index)
        gathered = self.choice.gathered
        tensors = gathered.get(self)
        if tensors is None:
            with torch.inference_mode(False):  # they outlive an inference mode around this
                tensors = self.select_rows(index)
            gathered[self] = tensors if self in gathered else None
        return tensors

    def select_rows(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return copies of A and B for each row by its slot in `index`, for each group of slots of one rank, then the
        vectors.

        `index` is moved to A's device first. With several groups, uncompiled code leaves out those that no row of the
        current choice uses.
        """
        index = index.to(self.A.device)
        if len(self.names) == 1:
            return tuple([t.index_select(0, index) for t in self.tensors])
        groups = range(len(self.names))
        if not torch.compiler.is_compiling():
            groups = sorted({self.place[slot][0] for slot in self.choice.used if slot != NONE})  # type: ignore[assignment]
        pairs = [(getattr(self, name), self.places[i][index]) for i in groups for name in self.names[i]]
        return (*[t.index_select(0, place) for t, place in pairs], *[t.index_select(0, index) for t in self.vectors])

    def apply_gains(
        self, x: Tensor, pairs: list[tuple[Tensor, Tensor]], vectors: tuple[Tensor, ...], *args: object, **kwargs: Any
    ) -> Tensor:
        """Return gain ⊙ (W (inner ⊙ x) + b + x Aᵀ B) + shift in the dtype of the base's output.

        Tensors are of one adapter, or have a dimension of rows. The update is computed in the dtype of gains and
        factors; the base's input, `inner` ⊙ x, has x's dtype.

        Args:
            pairs: A and B, of each group of slots in use.
            vectors: gain, shift and inner.
        """
        rows = () if vectors[0].dim() == 1 else (x.shape[0],)
        gain, shift, inner = (v.view(*rows, *[1] * (x.dim() - 1 - len(rows)), -1) for v in vectors)
        y = self.base_layer((x * inner).to(x.dtype), *args, **kwargs)
        flat, out = x.to(gain.dtype).reshape(*rows, -1, x.shape[-1]), y
        for A, B in pairs:
            out = out + ((flat @ A.mT) @ B).view(y.shape)
        return torch.addcmul(shift, out, gain).to(y.dtype)

    def add_product(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return y + x Aᵀ B in y's dtype, rounded once, with A and B of one adapter (2-D), or of each row (3-D).

        x is cast to A's dtype. Equal dtypes use one fused operation. y is overwritten if `may_fuse` is True; else the
        result is a new tensor.
        """
        rows = () if A.dim() == 2 else (x.shape[0],)
        x = x.to(A.dtype).reshape(*rows, -1, x.shape[-1])
        h = (A @ x.mT).mT if rows else x @ A.mT  # for few tokens per row, two thirds of the time of x Aᵀ
        out = y.reshape(*rows, -1, y.shape[-1])
        if not y.dtype == h.dtype == B.dtype:
            out = out.add_(h @ B) if self.may_fuse else out + h @ B
        elif rows:
            out = out.baddbmm_(h, B) if self.may_fuse else out.baddbmm(h, B)
        else:
            out = out.addmm_(h, B) if self.may_fuse else out.addmm(h, B)
        return out.view(y.shape).to(y.dtype)

    # attributes of a linear layer that models read, and those of an AdapterLayer that fingerprints read

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def get_base_layer(self) -> nn.Module:
        """Return `base_layer`."""
        return self.base_layer

    def extra_repr(self) -> str:
        """Return the text in the printed model: number of slots, largest rank, and all ranks if there are several."""
        ranks = [getattr(self, a).shape[1] for a, _ in self.names]
        return f"slots={len(self.place) - 1}, max_rank={max(ranks)}" + (f", ranks={ranks}" if len(ranks) > 1 else "")


def move_to_devices(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Return each tensor on its device, in the order of `tensors`; tensors that are there already are returned
    themselves.

    Others that share source, dtype and destination are copied together, and returned as views of one copy.
    """
    out = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype, torch.device], list[int]] = {}
    for i, (t, device) in enumerate(zip(tensors, devices)):
        if t.device != device:
            groups.setdefault((t.device, t.dtype, device), []).append(i)
    for (_, _, device), places in groups.items():
        flat = torch.cat([tensors[i].flatten() for i in places]).to(device)
        for i, part in zip(places, flat.split([tensors[i].numel() for i in places])):
            out[i] = part.view(tensors[i].shape)
    return out
